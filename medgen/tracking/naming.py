"""What a run is called: what was changed since the run before it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgen.tracking.history import HISTORY, RunRecord, read, read_run

MAX_CHANGES = 3  # in a name; a run that differs in more is another thing, and keeps the name it was given
ABSENT = "–"


def telling_tags(scratch: Path, params: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a new run that say what sets it apart: differs.from, differs.in, and its name where that is short.

    Args:
        scratch: the run's folder; the folders beside it are the other runs.
        params: all its parameters, by dotted name.
    """
    before = _run_before(scratch)
    if before is None:
        return {}
    sections = {_section(name) for name in params}  # later stages have added theirs to the earlier run
    names = [*params, *(name for name in before.params if name not in params and _section(name) in sections)]
    changed = [name for name in names if params.get(name, ABSENT) != before.params.get(name, ABSENT)]
    said = [f"{name}: {before.params.get(name, ABSENT)} → {params.get(name, ABSENT)}" for name in changed]
    tags = {"differs.from": before.name, "differs.in": ", ".join(said) or "data or code, no parameter"}
    if 0 < len(changed) <= MAX_CHANGES:
        values = ", ".join(f"{_short(name, names)}={params.get(name, ABSENT)}" for name in changed)
        tags["mlflow.runName"] = f"{values} ({scratch.name[:6]})"
    return tags


def _run_before(scratch: Path) -> RunRecord | None:
    """The run that began last."""
    began = {}
    for path in scratch.parent.glob(f"*/{HISTORY}"):
        if path.parent != scratch and (first := next(read(path), None)):
            began[path.parent] = first[0]["time"]
    return read_run(max(began, key=lambda folder: began[folder])) if began else None


def _short(name: str, names: list[str]) -> str:
    """The last words of a dotted name that no other name ends in; never a number first."""
    words = name.split(".")
    for start in range(len(words) - 1, 0, -1):
        ending = ".".join(words[start:])
        if not words[start].isdigit() and sum(f".{other}".endswith(f".{ending}") for other in names) == 1:
            return ending
    return name


def _section(name: str) -> str:
    return name.partition(".")[0]
