"""What a version must show to become champion: its own numbers, and the champion's beside them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medgen.config import Gates
from medgen.evaluation_report import LEAST_LIMIT
from medgen.metrics.privacy import plausible
from medgen.registry.versions import JUDGED_BY, JUDGED_ON, Version

SSIM, DICE, KID, COPIES = "reconstruction/ssim", "segmentation/dice", "generation/kid_domain", "privacy/copy_rate"
KID_HIGH, HELD_OUT_LIMIT, NUM_TEST = "generation/kid_domain_ci_high", "privacy/held_out_limit", "run/num_test"
SHORT = 12  # characters of a hash that are shown
NOTHING = "–"


@dataclass(frozen=True)
class Gate:
    """One row of the table."""

    name: str
    candidate: str
    champion: str
    wanted: str
    passed: bool

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge(candidate: Version, champion: Version | None, gates: Gates) -> list[Gate]:
    """All gates, passed or not, in the order of the table."""
    found = [_alike(candidate, champion), *_lineage(candidate, champion)]
    if DICE in candidate.metrics:
        return [
            *found,
            _at_least(DICE, candidate, champion, gates.dice_floor),
            _not_below(DICE, candidate, champion, gates.dice_margin),
        ]
    return [
        *found,
        _at_least(SSIM, candidate, champion, gates.ssim_floor),
        _not_below(SSIM, candidate, champion, gates.ssim_margin),
        _kid(candidate, champion, gates.kid_margin),
        _copies(candidate, champion, gates.copy_rate_ceiling),
    ]


def are_alike(candidate: Version, champion: Version) -> bool:
    """Whether both were judged on the same test images through the same extractor, and for the same purpose."""
    measured = [{SSIM, DICE} & version.metrics.keys() for version in (candidate, champion)]
    return measured[0] == measured[1] and _judged(candidate) == _judged(champion) != {}


def _judged(version: Version) -> dict[str, str]:
    return {key: version.tags[key] for key in (JUDGED_ON, JUDGED_BY) if key in version.tags}


def _alike(candidate: Version, champion: Version | None) -> Gate:
    def words(version: Version) -> str:
        return " ".join(text[:SHORT] for text in _judged(version).values()) or "not judged"

    passed = bool(_judged(candidate)) if champion is None else are_alike(candidate, champion)
    wanted = "judged" if champion is None else "judged on the same images by the same extractor"
    return Gate("data and extractor", words(candidate), words(champion) if champion else NOTHING, wanted, passed)


def _lineage(candidate: Version, champion: Version | None) -> list[Gate]:
    def row(name: str, wanted: str, words: Callable[[Mapping[str, str]], str], passed: bool) -> Gate:
        return Gate(name, words(candidate.tags), words(champion.tags) if champion else NOTHING, wanted, passed)

    def commit(tags: Mapping[str, str]) -> str:
        state = {"true": ", changed", "false": ""}.get(tags.get("git.dirty", ""), ", state unknown")
        return tags.get("git.commit", "unknown")[:SHORT] + state

    def value(key: str) -> Callable[[Mapping[str, str]], str]:
        return lambda tags: tags.get(key, "unknown")[:SHORT]

    known = {key: candidate.tags.get(key, "unknown") != "unknown" for key in ("git.commit", "data.md5")}
    clean = known["git.commit"] and candidate.tags.get("git.dirty") == "false"
    params = "params.fingerprint"
    return [
        row("git commit", "known, nothing changed since", commit, clean),
        row("data md5", "known", value("data.md5"), known["data.md5"]),
        row("params hash", "known", value(params), candidate.tags.get(params, "unknown") != "unknown"),
    ]


def _at_least(key: str, candidate: Version, champion: Version | None, floor: float) -> Gate:
    value = candidate.metrics.get(key)
    return _row(key, candidate, champion, f"at least {floor:g}", value is not None and value >= floor)


def _not_below(key: str, candidate: Version, champion: Version | None, margin: float) -> Gate:
    """Against the champion, less a margin; without a champion there is nothing to fall short of."""
    limit = _of_champion(key, candidate, champion)
    if limit is None:
        return _uncompared(key, candidate, champion)
    value = candidate.metrics.get(key)
    wanted = f"at most {margin:g} below the champion's"
    return _row(key, candidate, champion, wanted, value is not None and value >= limit - margin)


def _kid(candidate: Version, champion: Version | None, margin: float) -> Gate:
    limit = _of_champion(KID_HIGH, candidate, champion)
    if limit is None:
        return _uncompared(KID, candidate, champion)
    value = candidate.metrics.get(KID)
    wanted = f"at most {limit + margin:.4g}, the upper end of the champion's interval" + (
        f" and {margin:g}" if margin else ""
    )
    return _row(KID, candidate, champion, wanted, value is not None and value <= limit + margin)


def _copies(candidate: Version, champion: Version | None, ceiling: float | None) -> Gate:
    metrics = candidate.metrics
    value, limit = metrics.get(COPIES), metrics.get(HELD_OUT_LIMIT)
    chance = plausible(round(metrics.get(NUM_TEST, 1.0)))
    most = chance if ceiling is None else ceiling
    wanted = f"at most {most:.4g}" + (", what chance allows" if ceiling is None else "")
    if limit is not None and limit < LEAST_LIMIT:  # test images are nearly in the train split: no rate means anything
        return _row(COPIES, candidate, champion, "data in which copies can be told (medgen data audit)", False)
    return _row(COPIES, candidate, champion, wanted, value is not None and value <= most)


def _of_champion(key: str, candidate: Version, champion: Version | None) -> float | None:
    """A number of the champion's, where the candidate may be held against it."""
    if champion is None or not are_alike(candidate, champion):
        return None
    return champion.metrics.get(key)


def _uncompared(key: str, candidate: Version, champion: Version | None) -> Gate:
    """Passed where there is no champion; where there is one, it must be comparable."""
    wanted = "nothing: the first champion" if champion is None else "judged alike"
    return _row(key, candidate, champion, wanted, champion is None and key in candidate.metrics)


def _row(key: str, candidate: Version, champion: Version | None, wanted: str, passed: bool) -> Gate:
    def words(version: Version | None) -> str:
        value = None if version is None else version.metrics.get(key)
        return NOTHING if value is None else f"{value:.4g}"

    return Gate(key, words(candidate), words(champion), wanted, passed)
