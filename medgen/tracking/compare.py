"""Compare runs from their history.jsonl; needs no server."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.table import Table

from medgen.config import Project
from medgen.console import OUT, show
from medgen.errors import UserError
from medgen.metrics.summary import SUMMARY
from medgen.tracking import RunRecord, read_run

NAME_WIDTH, RUN_WIDTH = 30, 16  # columns of the table, in characters


@dataclass(frozen=True)
class Row:
    """One run of the comparison."""

    run: str  # its folder in runs/
    name: str
    status: str
    started: str  # local time, ISO 8601
    minutes: float  # of training, and of recording the stages after it
    params: dict[str, Any]  # that differ between the runs
    metrics: dict[str, float]  # the last finite value of each


def compare(project: Project, as_json: bool = False) -> list[Row]:
    """Print all runs side by side, oldest first: parameters that differ, last metrics.

    Raises:
        UserError: there is no run yet.
    """
    found = {folder.name: read_run(folder) for folder in sorted(project.runs.glob("*/"))}
    records = {name: record for name, record in found.items() if record is not None}
    if not records:
        raise UserError(f"{project.runs}: no runs yet; run `medgen train` (or `dvc repro`) first")
    ordered = sorted(records.items(), key=lambda item: item[1].started)
    differing = _find_differing([record.params for _, record in ordered])
    rows = [_row(name, record, differing) for name, record in ordered]
    if as_json:
        print(json.dumps([row.__dict__ for row in rows], indent=2))
    else:
        _print(rows, differing)
    return rows


def _row(run: str, record: RunRecord, differing: Sequence[str]) -> Row:
    metrics: dict[str, float] = {}
    for step in record.metrics:
        metrics |= {name: value for name, value in step.items() if name != "step" and math.isfinite(value)}
    return Row(
        run=run,
        name=record.name,
        status=record.status.lower(),
        started=datetime.fromtimestamp(record.started).astimezone().isoformat(timespec="seconds"),
        minutes=round(record.seconds / 60, 1),
        params={name: record.params.get(name) for name in differing},
        metrics=dict(sorted(metrics.items())),
    )


def _find_differing(params: Sequence[Mapping[str, Any]]) -> list[str]:
    names = sorted({name for one in params for name in one})
    return [name for name in names if len({json.dumps(one.get(name)) for one in params}) > 1]


def _print(rows: Sequence[Row], differing: Sequence[str]) -> None:
    """Print tables, one below the other, with as many runs each as fit the width of the terminal.

    They have the main metrics and those of training; `--json` has all.
    """
    measured = {name for row in rows for name in row.metrics}
    metrics = [name for name in SUMMARY if name in measured]
    metrics += sorted(name for name in measured if name.startswith("val/"))
    per_table = max(1, (OUT.width - NAME_WIDTH) // (RUN_WIDTH + 3))
    for first in range(0, len(rows), per_table):
        shown = rows[first : first + per_table]
        table = Table(min_width=NAME_WIDTH + len(shown) * RUN_WIDTH)
        table.add_column("run", overflow="fold", min_width=NAME_WIDTH - 4)
        for row in shown:
            table.add_column(row.run, overflow="fold", justify="right")
        table.add_row("status", *(row.status for row in shown))
        table.add_row("started", *(row.started[:16].replace("T", " ") for row in shown))
        table.add_row("minutes", *(str(row.minutes) for row in shown), end_section=True)
        for name in differing:
            table.add_row(name, *(_format(row.params[name]) for row in shown), end_section=name == differing[-1])
        for name in metrics:
            table.add_row(name, *(_format(row.metrics.get(name)) for row in shown))
        show(table)


def _format(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
