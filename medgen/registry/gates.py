"""Gates a version must pass to become champion: on its own, and compared with champions by the same images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medgen.config import Gates
from medgen.metrics.comparison import Comparison
from medgen.metrics.privacy import CERTAIN
from medgen.registry.versions import JUDGED_BY, JUDGED_ON, Version
from medgen.reports.evaluation import LEAST_LIMIT

SSIM, DICE, MMD = "reconstruction/ssim", "segmentation/dice_foreground", "generation/mmd_domain"
COPIES, HELD_OUT_LIMIT, NUM_GENERATED = "privacy/copy_rate", "privacy/held_out_limit", "run/num_generated"
COPIES_BY_CHANCE, NEAREST = "privacy/copy_rate_plausible", "privacy/nearest_over_limit"
TRAINED_ON = "dataset.fingerprint"  # tag
SHORT = 7  # characters of a hash that are shown
NOTHING, UNALIKE = "–", "evaluated alike by this medgen"


@dataclass(frozen=True)
class Gate:
    """One row of the table."""

    name: str
    candidate: str
    champion: str
    wanted: str
    passed: bool
    difference: str = ""  # how much worse the candidate is, with its 95 % interval
    p: str = ""  # of no difference, or a better candidate
    detectable: str = ""  # the smallest difference that would be found 4 times out of 5


def check_gates(
    candidate: Version,
    champion: Version | None,
    gates: Gates,
    comparisons: Sequence[tuple[Version, Sequence[Comparison] | None]] = (),
    earlier: Sequence[Version] = (),
) -> list[Gate]:
    """All gates, passed or not, in the order of the table.

    Args:
        candidate: what would become champion.
        champion: what it would replace; None where there is none, and nothing to fall short of.
        gates: what is wanted.
        comparisons: champions, the present one first, and how much worse the candidate is than each by the same
            held-out images; None where their evaluations cannot be compared.
        earlier: all champions on record. SSIM (Dice) may not fall below the highest of those evaluated alike by more
            than the margin, or many steps within the margin would add up.
    """
    finds_masks = DICE in candidate.metrics
    key, floor, margin = (SSIM, gates.ssim_floor, gates.ssim_margin)
    if finds_masks:
        key, floor, margin = (DICE, gates.dice_floor, gates.dice_margin)
    best = max(
        (version.metrics.get(key, -math.inf) for version in earlier if are_alike(candidate, version)), default=-math.inf
    )
    floor = max(floor, float(f"{best - margin:.6g}"))  # of six digits, as metrics are
    found = [_alike(candidate, champion), *_lineage(candidate, champion), _at_least(key, candidate, champion, floor)]
    for number, (version, comparison) in enumerate(comparisons):
        suffix = f" (version {version.number})" if number else ""
        if comparison is None:
            found.append(Gate(f"comparison{suffix}", NOTHING, NOTHING, UNALIKE, False))
            continue
        by_name = {one.name: one for one in comparison}
        found += [_compared(one, by_name, margin, gates.alpha, suffix) for one in comparison]
    if not finds_masks:
        found += _copies(candidate, champion, gates.copy_rate_ceiling)
    return found


def are_alike(candidate: Version, champion: Version) -> bool:
    """Whether both were evaluated on the same test images through the same extractor, by as many samples."""
    measured = [{SSIM, DICE} & version.metrics.keys() for version in (candidate, champion)]
    numbers = [version.metrics.get(NUM_GENERATED) for version in (candidate, champion)]
    return measured[0] == measured[1] and numbers[0] == numbers[1] and _judged(candidate) == _judged(champion) != {}


def _compared(one: Comparison, by_name: Mapping[str, Comparison], margin: float, alpha: float, suffix: str) -> Gate:
    """A statistic in which the candidate may not be worse: beyond a margin (SSIM, Dice), else beyond chance."""
    if one.name in ("ssim", "dice"):
        wanted, passed = f"at most {margin:g} lower", one.difference <= margin
    else:
        wanted, passed = f"not worse (p ≥ {alpha:g})", one.p >= alpha
    # k-NN recall counts balls around samples, which are large where samples spread too far: an overspread champion
    # has more of it than a better model. A candidate that is clearly harder to tell from real images is excused.
    if one.name == "recall" and not passed and by_name["c2st"].high < 0.0:
        wanted, passed = "not lower, unless clearly more realistic (c2st)", True
    return Gate(
        f"{one.name}{suffix}",
        f"{one.candidate:.4g}",
        f"{one.reference:.4g}",
        wanted,
        passed,
        difference=f"{one.difference:+.2g} ({one.low:+.2g} to {one.high:+.2g})",
        p=f"{one.p:.3f}",
        detectable=f"{one.detectable:.2g}",
    )


def _judged(version: Version) -> dict[str, str]:
    return {key: version.tags[key] for key in (JUDGED_ON, JUDGED_BY) if key in version.tags}


def _alike(candidate: Version, champion: Version | None) -> Gate:
    def words(version: Version | None) -> str:
        hashes = _judged(version) if version else {}
        number = version.metrics.get(NUM_GENERATED) if version else None
        return " ".join([text[:SHORT] for text in hashes.values()] + ([f"{number:g}"] if number else [])) or NOTHING

    passed = bool(_judged(candidate)) if champion is None else are_alike(candidate, champion)
    return Gate(
        "evaluated with", words(candidate), words(champion), "known" if champion is None else "the same", passed
    )


def _lineage(candidate: Version, champion: Version | None) -> list[Gate]:
    def row(name: str, key: str, wanted: str = "known", changed: str = "") -> Gate:
        def words(version: Version | None) -> str:
            value = (version.tags.get(key) or "unknown")[:SHORT] if version else NOTHING
            return f"{value}{changed}" if version is candidate else value

        return Gate(name, words(candidate), words(champion), wanted, words(candidate) != "unknown" and not changed)

    state = candidate.tags.get("git.dirty") or "unknown"
    changed = {"false": "", "true": ", files changed"}.get(state, ", changes unknown")
    return [
        row("git commit", "git.commit", "known, no file changed", changed),
        row("data", "data.md5"),
        _trained_here(candidate, champion),
        row("params", "params.fingerprint"),
    ]


def _trained_here(candidate: Version, champion: Version | None) -> Gate:
    """A model of other data may have been trained on today's test images, and its copies were not looked for here."""

    def dataset(version: Version | None) -> str:
        return (version.tags.get(TRAINED_ON) or "unknown")[:SHORT] if version else NOTHING

    passed = candidate.tags.get(TRAINED_ON) == candidate.tags.get(JUDGED_ON)
    return Gate("trained on", dataset(candidate), dataset(champion), "the data it is judged on", passed)


def _at_least(key: str, candidate: Version, champion: Version | None, floor: float) -> Gate:
    return _row(key, candidate, champion, f"≥ {floor:g}", lambda value: value >= floor)


def _copies(candidate: Version, champion: Version | None, ceiling: float | None) -> list[Gate]:
    """The share of samples that are near train images, and the nearest sample alone; one row where neither is known."""
    if candidate.metrics.get(HELD_OUT_LIMIT, 0.0) < LEAST_LIMIT:
        return [_row(COPIES, candidate, champion, "test images unlike train images (medgen data audit)")]
    if not {COPIES_BY_CHANCE, NEAREST} <= candidate.metrics.keys():
        return [_row(COPIES, candidate, champion, "evaluated by this version of medgen (medgen evaluate)")]
    most = candidate.metrics[COPIES_BY_CHANCE] if ceiling is None else ceiling
    wanted = f"≤ {most:.4g}" + (", what chance allows" if ceiling is None else "")
    return [
        _row(COPIES, candidate, champion, wanted, lambda value: value <= most),
        _at_least(NEAREST, candidate, champion, CERTAIN),
    ]


def _row(
    key: str, candidate: Version, champion: Version | None, wanted: str, holds: Callable[[float], bool] | None = None
) -> Gate:
    """A metric as a gate; what was not measured does not hold, nor what has nothing to be held against."""
    value = candidate.metrics.get(key)
    passed = value is not None and holds is not None and holds(value)
    beside = None if champion is None else champion.metrics.get(key)
    ours, theirs = (NOTHING if number is None else f"{number:.4g}" for number in (value, beside))
    return Gate(key.partition("/")[2], ours, theirs, wanted, passed)
