"""Read and write runs/<fingerprint>/history.jsonl: one JSON line per event, appended and never changed.

An event has a kind, a time and either `values` by name (params, tags, metrics, system) or a `key` and its content
(image, artifact, dataset, status, run). Of several values with the same kind, name and step the last one counts.
"""

import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

HISTORY = "history.jsonl"
LOCK = "tracker.lock"  # held while a process writes a run or sends it to MLflow
FLUSH_SECONDS = 1.0
# of numbers in a damaged file, which Python, datetime and MLflow could not store
MAX_TIME, MAX_STEP, MAX_VALUE = 253402300799, 2**63 - 1, sys.float_info.max

Event = dict[str, Any]  # {"kind": str, "time": seconds, ...}
FactKey = tuple[str, str, int | None]  # kind, name, step

_MISSING = object()


@dataclass(frozen=True)
class RunRecord:
    """The content of history.jsonl."""

    name: str
    status: str  # RUNNING, FINISHED, FAILED, KILLED; INTERRUPTED: RUNNING in the file, but no process writes it
    started: float  # seconds since 1970
    seconds: float  # while a process recorded it; the time between a training and a later stage does not count
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # see `history`


def history(scratch: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict per step in order: {"step": 3, "train/loss": 0.1, ...}; [] without a record."""
    steps: dict[int, dict[str, Any]] = {}
    for event, _ in read(scratch / HISTORY):
        if event["kind"] == "metrics":
            record = steps.setdefault(event["step"], {"step": event["step"]})
            record.update({name: float(value) for name, value in event["values"].items()})
    return [steps[step] for step in sorted(steps)]


def read_run(scratch: Path) -> RunRecord | None:
    """The record of a run; None if there is none."""
    events = [event for event, _ in read(scratch / HISTORY)]
    if not events:
        return None
    last: dict[str, dict[str, Any]] = {"params": {}, "tags": {}, "status": {}, "run": {}}
    for event in events:
        if event["kind"] in last:
            last[event["kind"]].update(event.get("values", event))
    status = last["status"].get("status", "RUNNING")
    return RunRecord(
        name=last["tags"].get("mlflow.runName") or last["run"].get("name", scratch.name),
        status="INTERRUPTED" if status == "RUNNING" and not is_live(scratch) else status,
        started=events[0]["time"],
        seconds=_recorded_seconds(events),
        params=last["params"],
        tags=last["tags"],
        metrics=history(scratch),
    )


def _recorded_seconds(events: Sequence[Event]) -> float:
    """The sum of the times between events, without those before a process opened the record."""
    total = 0.0
    for before, event in itertools.pairwise(events):
        if not (event["kind"] == "status" and event["status"] == "RUNNING"):
            total += event["time"] - before["time"]
    return total


class History:
    """history.jsonl, open for appending by several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[FactKey, Any] = {}
        self._mutex = threading.Lock()
        self._flushed_at = 0.0
        end = 0
        for event, end in read(path):  # noqa: B007  # the offset after the last whole event
            self._facts.update(facts(event))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._descriptor, end)  # removes a line that a kill or a power cut left incomplete

    def start(self, run_name: str, identity: str | None = None, parent: str | None = None) -> None:
        """Give a new record its ID and name, as in `Tracker.open`; a continued one keeps its own."""
        if not self.contains(("run", "", None)):
            parents: dict[str, Any] = {} if parent is None else {"parent": parent}
            self.append("run", id=identity or os.urandom(16).hex(), name=run_name, **parents)

    def contains(self, key: FactKey) -> bool:
        """True if there is a value of this kind, name and step."""
        return key in self._facts

    def last_step(self, kind: str) -> int:
        """The highest step of a kind of event; -1 before the first."""
        return max((step for each, _, step in self._facts if each == kind and step is not None), default=-1)

    def recorded_paths(self) -> set[str]:
        """The paths of the artifacts and images, relative to the run's folder, without those replaced since."""
        with self._mutex:
            return {content["path"] for (kind, *_), content in self._facts.items() if kind in ("artifact", "image")}

    def append(self, kind: str, *, key: str = "", step: int | None = None, **content: Any) -> None:
        """Append an event without the values that the file already holds; append nothing if it holds all."""
        event: Event = {"kind": kind, "time": round(time.time(), 3), **content}
        if step is not None:
            event["step"] = step
        if "values" not in content:
            event["key"] = key
        with self._mutex:
            new = {fact: value for fact, value in facts(event).items() if self._facts.get(fact, _MISSING) != value}
            if not new:
                return
            if "values" in content:
                event["values"] = {name: value for (_, name, _), value in new.items()}
            os.write(self._descriptor, (json.dumps(event, allow_nan=False) + "\n").encode())
            self._facts.update(new)
            # The write alone survives a killed process; a flush, which protects from power cuts, is slow.
            if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
                self._flush()

    def flush(self) -> None:
        """Write all events to the disk, where they survive a power cut."""
        with self._mutex:
            self._flush()

    def _flush(self) -> None:
        os.fsync(self._descriptor)
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        with self._mutex:
            self._flush()
            os.close(self._descriptor)
            self._descriptor = -1


def facts(event: Event) -> dict[FactKey, Any]:
    """The values of an event by kind, name and step."""
    kind, step = event["kind"], event.get("step")
    if "values" in event:
        return {(kind, name, step): value for name, value in event["values"].items()}
    content = {name: value for name, value in event.items() if name not in ("kind", "time", "step", "key")}
    return {(kind, event["key"], step): content}


def read(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Yield the complete events from `offset` on, each with the offset after it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # a damaged line; those after it are still valid
                continue
            if _is_event(event):
                yield event, offset


def _is_event(line: Any) -> bool:
    """True if a line of the file has the shape that `History.append` writes."""
    if not isinstance(line, dict) or not (
        _is_number(line.get("time"), 0, MAX_TIME) and _is_number(line.get("step", 0), -MAX_STEP, MAX_STEP)
    ):
        return False
    match line:
        case {"kind": "metrics" | "system", "time": int() | float(), "step": int(), "values": dict(values)}:
            return all(
                value in ("nan", "inf", "-inf") or _is_number(value, -MAX_VALUE, MAX_VALUE) for value in values.values()
            )
        case {"kind": "tags", "time": int() | float(), "values": dict(values)}:
            return all(isinstance(value, str) for value in values.values())
        case {"kind": "params", "time": int() | float(), "values": dict()}:
            return True
        case {"kind": "status", "time": int() | float(), "key": str(), "status": str()}:
            return True
        case {"kind": "run", "time": int() | float(), "key": str(), "id": str(), "name": str()}:
            return True
        case {"kind": "image" | "artifact" | "dataset", "time": int() | float(), "key": str()}:
            return True
        case _:
            return False


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and low <= value <= high


def encode(value: float) -> float | str:
    """The value as JSON holds it: NaN and infinities as text, which `float` converts back."""
    return value if math.isfinite(value) else str(value)


def is_live(scratch: Path) -> bool:
    """True if a process is writing this run."""
    try:
        with FileLock(scratch / LOCK, timeout=0):
            return False
    except Timeout:
        return True
