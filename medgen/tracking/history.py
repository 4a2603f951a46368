"""runs/<fingerprint>/history.jsonl: one JSON line for one event, appended and never changed.

An event has a kind, a time and what was said: `values` by name (params, tags, metrics, system), or a
`key` and its content (image, artifact, dataset, status, run). Two events of the same kind, name and
step are one fact; the last one counts.
"""

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

HISTORY = "history.jsonl"
LOCK = "tracker.lock"  # held while a process writes or mirrors a run
FSYNC_SECONDS = 1.0

Event = dict[str, Any]  # {"kind": str, "time": seconds, ...}
Identity = tuple[str, str, int | None]  # kind, name, step

_UNKNOWN = object()


@dataclass(frozen=True)
class RunRecord:
    """What history.jsonl says of a run."""

    name: str
    status: str  # RUNNING, FINISHED, FAILED, KILLED; INTERRUPTED: says RUNNING, and no process writes it
    started: float  # seconds since 1970
    updated: float
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # see `history`


def history(scratch: Path) -> list[dict[str, Any]]:
    """Metrics of a run, one dict per step in order: {"step": 3, "train/loss": 0.1, ...}; empty without a record."""
    steps: dict[int, dict[str, Any]] = {}
    for event, _ in read(scratch / HISTORY):
        if event["kind"] == "metrics":
            record = steps.setdefault(event["step"], {"step": event["step"]})
            record.update({name: float(value) for name, value in event["values"].items()})
    return [steps[step] for step in sorted(steps)]


def read_run(scratch: Path) -> RunRecord | None:
    """All that is known of a run, or None where no record is."""
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
        updated=events[-1]["time"],
        params=last["params"],
        tags=last["tags"],
        metrics=history(scratch),
    )


class History:
    """history.jsonl open for appending by several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[Identity, Any] = {}
        self._mutex = threading.Lock()
        self._synced = 0.0
        end = 0
        for event, end in read(path):  # noqa: B007  # the offset after the last whole event
            self._known.update(facts(event))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._descriptor, end)  # a line torn by a kill or a power cut

    def start(self, run_name: str, identity: str | None = None, parent: str | None = None) -> None:
        """Gives a new record its identity; a continued one keeps its own.

        `identity` is given where several machines write to the same MLflow run; `parent` is that of the record this
        one belongs to.
        """
        if not self.knows(("run", "", None)):
            own: dict[str, Any] = {} if parent is None else {"parent": parent}
            self.append("run", id=identity or os.urandom(16).hex(), name=run_name, **own)

    def knows(self, identity: Identity) -> bool:
        """Whether anything was said of this kind, name and step."""
        return identity in self._known

    def last_step(self, kind: str) -> int:
        """Highest step of a kind of event; -1 before the first."""
        return max((step for known, _, step in self._known if known == kind and step is not None), default=-1)

    def append(self, kind: str, *, key: str = "", step: int | None = None, **content: Any) -> None:
        """Adds a line, less what is known already; nothing is written when all is."""
        event: Event = {"kind": kind, "time": round(time.time(), 3), **content}
        if step is not None:
            event["step"] = step
        if "values" not in content:
            event["key"] = key
        with self._mutex:
            news = {known: value for known, value in facts(event).items() if self._known.get(known, _UNKNOWN) != value}
            if not news:
                return
            if "values" in content:
                event["values"] = {name: value for (_, name, _), value in news.items()}
            os.write(self._descriptor, (json.dumps(event, allow_nan=False) + "\n").encode())
            self._known.update(news)
            # The write alone outlives a killed process; the disk is asked only now and then.
            if time.monotonic() - self._synced >= FSYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()

    def close(self) -> None:
        """Sees the file to the disk."""
        with self._mutex:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def facts(event: Event) -> dict[Identity, Any]:
    """What an event says, by identity: equal facts need no second line."""
    kind, step = event["kind"], event.get("step")
    if "values" in event:
        return {(kind, name, step): value for name, value in event["values"].items()}
    content = {name: value for name, value in event.items() if name not in ("kind", "time", "step", "key")}
    return {(kind, event["key"], step): content}


def read(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Whole events from `offset` on, each with the offset after it."""
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
            except ValueError:  # a block the disk lost: the rest is still good
                continue
            yield event, offset


def encode(value: float) -> float | str:
    """JSON has no inf and NaN; `float` reads these words back."""
    return value if math.isfinite(value) else str(value)


def is_live(scratch: Path) -> bool:
    """Whether a process is writing this run."""
    try:
        with FileLock(scratch / LOCK, timeout=0):
            return False
    except Timeout:
        return True
