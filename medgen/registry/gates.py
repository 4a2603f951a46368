"""Gates that a version must pass to become champion: limits of its own metrics, and comparisons with champions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medgen.config import Gates
from medgen.metrics.comparison import Comparison
from medgen.metrics.privacy import CERTAIN_COPY, MIN_HELD_OUT_LIMIT
from medgen.registry.versions import EVALUATED_ON, EVALUATED_WITH, PARAMS_TAG, Version

SSIM, DICE, MMD = "reconstruction/ssim", "segmentation/dice_foreground", "generation/mmd_domain"
COPIES, HELD_OUT_LIMIT, NUM_GENERATED = "privacy/copy_rate", "privacy/held_out_limit", "run/num_generated"
COPIES_BY_CHANCE, NEAREST = "privacy/copy_rate_plausible", "privacy/nearest_over_limit"
UTILITY = ("utility/gain_both", "utility/gain_dice_both")  # of classifiers and of U-Nets
TRAINED_ON, DATASET_NAME = "dataset.fingerprint", "dataset.name"  # tags
HASH_LENGTH = 7  # characters of a hash in tables
NO_VALUE = "–"


@dataclass(frozen=True)
class Gate:
    """One gate and its result: a row of the table that `medgen promote` prints."""

    name: str
    candidate: str
    champion: str
    required: str
    passed: bool
    difference: str = ""  # by how much the candidate is worse, with its 95 % interval
    p: str = ""  # of the hypothesis that the candidate is not worse
    detectable: str = ""  # the smallest difference that is detected with a power of 80 %


def check_gates(
    candidate: Version,
    champion: Version | None,
    gates: Gates,
    comparisons: Sequence[tuple[Version, Sequence[Comparison] | None]] = (),
    earlier: Sequence[Version] = (),
) -> list[Gate]:
    """All gates, passed or not, in the order of the table.

    Args:
        champion: the version that the candidate would replace; None if there is none.
        comparisons: champions, the present one first, each with the tests whether the candidate is worse; None if
            the two evaluations cannot be compared.
        earlier: all champions on record. SSIM (Dice) must be at least the highest of those with a comparable
            evaluation, less the margin; otherwise many steps within the margin could add up.
    """
    is_segmentation = DICE in candidate.metrics
    key, minimum, margin = (SSIM, gates.ssim_floor, gates.ssim_margin)
    if is_segmentation:
        key, minimum, margin = (DICE, gates.dice_floor, gates.dice_margin)
    comparable = (version for version in earlier if are_comparable(candidate, version))
    best = max((version.metrics.get(key, -math.inf) for version in comparable), default=-math.inf)
    minimum = max(minimum, float(f"{best - margin:.6g}"))  # six digits, as the metrics in the tags have
    found = [
        _dataset_gate(candidate, champion),
        _evaluation_gate(candidate, champion),
        *_lineage_gates(candidate, champion),
        _metric_gate(key, candidate, champion, f"≥ {minimum:g}", lambda value: value >= minimum),
    ]
    for index, (version, comparison) in enumerate(comparisons):
        suffix = f" (version {version.number})" if index else ""
        if comparison is None:
            found.append(Gate(f"comparison{suffix}", NO_VALUE, NO_VALUE, "comparable evaluations", False))
            continue
        by_name = {one.name: one for one in comparison}
        found += [_comparison_gate(one, by_name, margin, gates.alpha, suffix) for one in comparison]
    if not is_segmentation:
        found += _copy_gates(candidate, champion, gates.copy_rate_ceiling)
    if not is_segmentation and (least := gates.utility_floor) is not None:
        measured = [key for key in UTILITY if key in candidate.metrics] or UTILITY[:1]
        found += [
            _metric_gate(key, candidate, champion, f"≥ {least:g}", lambda value: value >= least) for key in measured
        ]
    return found


def are_comparable(candidate: Version, champion: Version) -> bool:
    """Return True if both are of one dataset and were evaluated on the same images, by the same extractor and number.

    The number is that of samples.
    """
    kinds = [{SSIM, DICE} & version.metrics.keys() for version in (candidate, champion)]
    num_samples = [version.metrics.get(NUM_GENERATED) for version in (candidate, champion)]
    same_hashes = _evaluation_hashes(candidate) == _evaluation_hashes(champion) != {}
    is_same = kinds[0] == kinds[1] and num_samples[0] == num_samples[1] and same_hashes
    return is_same and not of_different_datasets(candidate, champion)


def of_different_datasets(candidate: Version, champion: Version) -> bool:
    """Return True if the two were trained on datasets of different names.

    One dataset may have another content than before. Versions of an older medgen have no name.
    """
    names, contents = (
        [version.tags.get(key, "unknown") for version in (candidate, champion)] for key in (DATASET_NAME, TRAINED_ON)
    )
    return "unknown" not in names and names[0] != names[1] and contents[0] != contents[1]


def _comparison_gate(
    one: Comparison, by_name: Mapping[str, Comparison], margin: float, alpha: float, suffix: str
) -> Gate:
    """The gate of one statistic: SSIM and Dice are compared with the margin, others by a significance test."""
    if one.name in ("ssim", "dice"):
        required, passed = f"at most {margin:g} lower", one.difference <= margin
    else:
        required, passed = f"not worse (p ≥ {alpha:g})", one.p >= alpha
    # k-NN recall counts balls around samples, which are large if samples spread too far: a champion with too much
    # spread has a higher recall than a better model. A lower recall is accepted if C2ST is clearly better.
    if one.name == "recall" and not passed and by_name["c2st"].high < 0.0:
        required, passed = "not lower, unless clearly more realistic (c2st)", True
    return Gate(
        f"{one.name}{suffix}",
        f"{one.candidate:.4g}",
        f"{one.reference:.4g}",
        required,
        passed,
        difference=f"{one.difference:+.2g} ({one.low:+.2g} to {one.high:+.2g})",
        p=f"{one.p:.3f}",
        detectable=f"{one.detectable:.2g}",
    )


def _evaluation_hashes(version: Version) -> dict[str, str]:
    return {key: version.tags[key] for key in (EVALUATED_ON, EVALUATED_WITH) if key in version.tags}


def _dataset_gate(candidate: Version, champion: Version | None) -> Gate:
    ours, theirs = (
        NO_VALUE if version is None else version.tags.get(DATASET_NAME, "unknown") for version in (candidate, champion)
    )
    is_other = champion is not None and of_different_datasets(candidate, champion)
    return Gate("dataset", ours, theirs, "any" if champion is None else "the same", not is_other)


def _evaluation_gate(candidate: Version, champion: Version | None) -> Gate:
    def text(version: Version | None) -> str:
        if version is None:
            return NO_VALUE
        parts = [value[:HASH_LENGTH] for value in _evaluation_hashes(version).values()]
        if (number := version.metrics.get(NUM_GENERATED)) is not None:
            parts.append(f"{number:g}")
        return " ".join(parts) or NO_VALUE

    if champion is None:
        required, passed = "known", bool(_evaluation_hashes(candidate))
    else:
        required, passed = "the same", are_comparable(candidate, champion)
    return Gate("evaluated with", text(candidate), text(champion), required, passed)


def _lineage_gates(candidate: Version, champion: Version | None) -> list[Gate]:
    """The origin of the candidate must be known, and it must be evaluated on its own dataset.

    A model of another dataset may be trained on today's test images, and was not checked for copies of its own.
    """

    def row(name: str, key: str, required: str = "known", changes: str = "", passed: bool = True) -> Gate:
        ours, theirs = (
            NO_VALUE if version is None else (version.tags.get(key) or "unknown")[:HASH_LENGTH]
            for version in (candidate, champion)
        )
        return Gate(name, ours + changes, theirs, required, passed and ours != "unknown" and not changes)

    state = candidate.tags.get("git.dirty") or "unknown"
    changes = {"false": "", "true": ", other content"}.get(state, ", content unknown")
    same_dataset = candidate.tags.get(TRAINED_ON) == candidate.tags.get(EVALUATED_ON)
    return [
        row("git commit", "git.commit", "has the files it was made from", changes),
        row("data", "data.md5"),
        row("trained on", TRAINED_ON, "the dataset it is evaluated on", passed=same_dataset),
        row("params", PARAMS_TAG),
    ]


def _copy_gates(candidate: Version, champion: Version | None, ceiling: float | None) -> list[Gate]:
    """Gates of the share of samples that copy train images and of the nearest sample; one failed gate if unknown."""
    if candidate.metrics.get(HELD_OUT_LIMIT, 0.0) < MIN_HELD_OUT_LIMIT:
        return [_metric_gate(COPIES, candidate, champion, "test images unlike train images (medgen data audit)")]
    if not {COPIES_BY_CHANCE, NEAREST} <= candidate.metrics.keys():
        return [_metric_gate(COPIES, candidate, champion, "evaluated by this version of medgen (medgen evaluate)")]
    limit = candidate.metrics[COPIES_BY_CHANCE] if ceiling is None else ceiling
    required = f"≤ {limit:.4g}" + (", the rate by chance" if ceiling is None else "")
    return [
        _metric_gate(COPIES, candidate, champion, required, lambda value: value <= limit),
        _metric_gate(NEAREST, candidate, champion, f"≥ {CERTAIN_COPY:g}", lambda value: value >= CERTAIN_COPY),
    ]


def _metric_gate(
    key: str, candidate: Version, champion: Version | None, required: str, test: Callable[[float], bool] | None = None
) -> Gate:
    """The gate of one metric; it fails if the metric is missing or there is no test."""
    value = candidate.metrics.get(key)
    reference = None if champion is None else champion.metrics.get(key)
    ours, theirs = (NO_VALUE if number is None else f"{number:.4g}" for number in (value, reference))
    passed = value is not None and test is not None and test(value)
    return Gate(key.partition("/")[2], ours, theirs, required, passed)
