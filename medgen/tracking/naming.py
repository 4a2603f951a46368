"""Names of runs: the parameters that differ from the run before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgen.tracking.history import HISTORY, RunRecord, read, read_run

MAX_CHANGES = 3  # in a name; a run that differs in more parameters keeps the name it was given
ABSENT = "–"


def difference_tags(scratch: Path, params: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a new run: differs.from, differs.in, and its name if at most `MAX_CHANGES` parameters differ.

    Args:
        scratch: the run's folder; the other folders in the same place are the other runs.
        params: all its parameters, by dotted name.
    """
    before = _latest_run(scratch)
    if before is None:
        return {}
    sections = {_section(name) for name in params}  # later stages have added other sections to the earlier run
    names = [*params, *(name for name in before.params if name not in params and _section(name) in sections)]
    changed = [name for name in names if params.get(name, ABSENT) != before.params.get(name, ABSENT)]
    changes = [f"{name}: {before.params.get(name, ABSENT)} → {params.get(name, ABSENT)}" for name in changed]
    tags = {"differs.from": before.name, "differs.in": ", ".join(changes) or "data or code, no parameter"}
    if 0 < len(changed) <= MAX_CHANGES:
        values = ", ".join(f"{_shorten(name, names)}={params.get(name, ABSENT)}" for name in changed)
        tags["mlflow.runName"] = f"{values} ({scratch.name[:6]})"
    return tags


def _latest_run(scratch: Path) -> RunRecord | None:
    """The other run that started last."""
    started = {}
    for path in scratch.parent.glob(f"*/{HISTORY}"):
        if path.parent != scratch and (first := next(read(path), None)):
            started[path.parent] = first[0]["time"]
    return read_run(max(started, key=started.__getitem__)) if started else None


def _shorten(name: str, names: list[str]) -> str:
    """The shortest end of a dotted name that no other name ends in and that does not begin with a number."""
    parts = name.split(".")
    for start in range(len(parts) - 1, 0, -1):
        ending = ".".join(parts[start:])
        if not parts[start].isdigit() and sum(f".{other}".endswith(f".{ending}") for other in names) == 1:
            return ending
    return name


def _section(name: str) -> str:
    return name.partition(".")[0]
