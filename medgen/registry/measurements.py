"""All measurements of a version: each evaluation that changes its metrics is a tag, and earlier ones are kept."""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from medgen.metrics.summary import SUMMARY
from medgen.registry.ledger import account_and_host
from medgen.registry.versions import EVALUATED_ON, EVALUATED_WITH, EVALUATION_DIGEST, Version

_KEY = re.compile(r"measurement\.(\d+)")
_MEASURED_WITH = (EVALUATED_ON, EVALUATED_WITH, EVALUATION_DIGEST)


def new_measurement(tags: Mapping[str, str], measured: Mapping[str, str]) -> dict[str, str]:
    """The tags to add to a version before its metrics are replaced; none if they stay the same.

    Args:
        tags: the version's tags.
        measured: the tags of its new metrics, from `medgen.registry.versions.metric_tags`.
    """
    before, after = _values(tags), _values(measured)
    if not after or (before == after and any(_KEY.fullmatch(key) for key in tags)):
        return {}
    numbers = [int(match[1]) for key in tags if (match := _KEY.fullmatch(key))]
    entries = [{"time": datetime.now(UTC).isoformat(timespec="seconds"), "who": account_and_host(), **after}]
    if before and before != after and not numbers:  # measured by a medgen that kept no measurements
        entries.insert(0, {"time": "", "who": "unknown", **before})
    first = max(numbers, default=0) + 1
    return {f"measurement.{first + i:06d}": json.dumps(entry, sort_keys=True) for i, entry in enumerate(entries)}


def measurements(version: Version) -> list[dict[str, Any]]:
    """The measurements of a version, oldest first: time, who, main metrics, and what they were measured with."""
    found = []
    for key in sorted(key for key in version.tags if _KEY.fullmatch(key)):
        try:
            entry = json.loads(version.tags[key])
        except ValueError:  # anyone may edit a tag
            entry = None
        found.append(entry if isinstance(entry, dict) else {"time": "", "who": "unknown"})
    return found


def replaced_metrics(version: Version, keys: Iterable[str]) -> str:
    """All values of these metrics of a version that was measured several times with different results, else ""."""
    found = [*measurements(version), version.tags]  # the tags equal the last measurement, unless somebody changed them
    parts = []
    for key in keys:
        values = [str(entry[key]) for entry in found if key in entry]
        changes = [value for value, before in zip(values, ["", *values], strict=False) if value != before]
        if len(changes) > 1:
            parts.append(f"{key} {', then '.join(changes)}")
    return f"{version.uri} was measured again: {'; '.join(parts)}" if parts else ""


def _values(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: tags[key] for key in (*SUMMARY, *_MEASURED_WITH) if key in tags}
