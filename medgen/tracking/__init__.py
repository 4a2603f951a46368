"""A run's record: runs/<fingerprint>/history.jsonl is the truth, MLflow a mirror that may fail.

    with Tracker.open(scratch, params.tracking, project, "spatial_vae") as tracker:
        tracker.params(params.model_dump())
        tracker.metrics({"train/loss": 0.31}, step=200)

Training appends lines and never waits; a thread sends them to MLflow in order. What MLflow misses
stays in the file until `medgen sync`.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from rich.console import Console

from medgen.config import Project, Section, Tracking
from medgen.errors import TrainingInterrupted, UserError
from medgen.io import hash_file
from medgen.tracking.history import HISTORY, LOCK, History, RunRecord, encode, history, read_run
from medgen.tracking.lineage import lineage
from medgen.tracking.mlflow_sync import Mirror, unreachable
from medgen.tracking.naming import telling_tags
from medgen.tracking.uploader import Worker

PRIOR_ORIGIN = "prior.origin.json"  # of a run: what made its prior
REFINER_ORIGIN = "refiner.origin.json"  # and its refiner
LOCK_PATIENCE_SECONDS = 10.0  # lets a process that is ending end

RECORDS = ("*", "tune/*", "tune/*/trial_*/runs/*")  # in runs/: trainings, searches, and after them their trials

__all__ = [
    "PRIOR_ORIGIN",
    "REFINER_ORIGIN",
    "RunRecord",
    "Synced",
    "Tracker",
    "flatten",
    "history",
    "lineage",
    "mirror_run",
    "read_run",
    "sync",
]


class Tracker:
    """Records one run. Opening the same folder again continues its record.

    Repeats of what the file already holds (a resumed training says the same things again) are
    dropped; a changed value is appended, and the last one counts.
    """

    def __init__(self, scratch: Path, tracking: Tracking, project: Project, record: History, lock: FileLock) -> None:
        self._lock = lock
        self._scratch = scratch
        self._among_runs = scratch.parent == project.runs  # not a search, a trained prior
        self._history = record
        self._history.append("status", status="RUNNING")
        self._finished = False
        self._worker = Worker(self._history, Mirror(scratch, tracking, project), tracking)
        if tracking.enabled:
            self._worker.start()

    @classmethod
    def open(
        cls,
        scratch: Path,
        tracking: Tracking,
        project: Project,
        run_name: str,
        identity: str | None = None,
        parent: str | None = None,
    ) -> Self:
        """Starts or continues the record of the run whose folder is `scratch`.

        A new record takes `identity` (32 hexadecimal digits; None: its own), and may belong to the record `parent`.

        Raises:
            UserError: another process is writing this run.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        lock = FileLock(scratch / LOCK, timeout=LOCK_PATIENCE_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{scratch}: another process is writing this run; wait for it to end, or stop it") from None
        try:
            record = History(scratch / HISTORY)
            record.start(run_name, identity, parent)
            return cls(scratch, tracking, project, record, lock)
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        ended_well = kind is None or (isinstance(error, SystemExit) and not error.code)
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | TrainingInterrupted)
        self.finish("FINISHED" if ended_well else "KILLED" if interrupted else "FAILED")

    def params(self, values: Mapping[str, object]) -> None:
        """Parameters; sections and mappings become dotted names, such as train.phases.0.epochs.

        The first ones of a training also say what sets it apart from the training before.
        """
        flat = flatten(values)
        known = read_run(self._scratch)
        if self._among_runs and known and not known.params:
            self.tags(telling_tags(self._scratch, flat))
        self._history.append("params", values=flat)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags: text by name."""
        self._history.append("tags", values={name: str(value) for name, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step. Infinite and NaN ones are kept here and not sent: MLflow gets the tag nonfinite_step."""
        plain = {name: float(value) for name, value in values.items()}
        self._history.append("metrics", step=step, values={name: encode(value) for name, value in plain.items()})
        broken = sorted(name for name, value in plain.items() if not math.isfinite(value))
        if broken and not self._history.knows(("tags", "nonfinite_step", None)):
            self.tags({"nonfinite_step": str(step), "nonfinite_metrics": ", ".join(broken)})

    def image(self, key: str, path: Path, step: int) -> None:
        """An image file as one step of the series `key`, shown in the page's image grid."""
        self._history.append("image", key=key, step=step, path=self._relative(path), sha256=hash_file(path))

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file, kept in `folder` of the run's artifacts."""
        key = f"{folder}/{path.name}" if folder else path.name
        self._history.append("artifact", key=key, folder=folder, path=self._relative(path), sha256=hash_file(path))

    def dataset(self, name: str, fingerprint: str, source: str, counts: Mapping[str, int]) -> None:
        """The data the run works on; `counts` are images per split."""
        self._history.append("dataset", key=name, fingerprint=fingerprint, source=source, counts=dict(counts))

    def note(self, text: str) -> None:
        """The run's description, in Markdown."""
        self.tags({"mlflow.note.content": text})

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the record (FINISHED, FAILED or KILLED) and gives MLflow a bounded time to catch up."""
        if self._finished:
            return
        self._finished = True
        self._history.append("status", status=status)
        self._worker.stop()
        self._history.close()
        self._lock.release()

    def _relative(self, path: Path) -> str:
        """Paths relative to the scratch folder survive a move of the project."""
        return Path(os.path.relpath(path, self._scratch)).as_posix()


@dataclass(frozen=True)
class Synced:
    """What `sync` did: counts of runs and records."""

    num_runs: int = 0
    num_sent: int = 0
    num_refused: int = 0  # records MLflow does not accept, such as an image file that is gone
    live: tuple[str, ...] = ()  # runs left to the process that is writing them


def sync(project: Project, tracking: Tracking) -> Synced:
    """Sends what MLflow missed of every run, in order, each record once, and says so.

    Raises:
        UserError: tracking is off, or the store does not answer.
    """
    if not tracking.enabled:
        raise UserError("tracking.enabled: false, so there is no MLflow to send to; set it to true")
    num_sent = num_refused = 0
    live = []
    folders = [path.parent for pattern in RECORDS for path in sorted(project.runs.glob(f"{pattern}/{HISTORY}"))]
    for folder in folders:
        try:
            mirror = mirror_run(folder, project, tracking, patience=0)
        except Timeout:
            live.append(folder.name)
            continue
        num_sent += mirror.num_sent
        num_refused += len(mirror.refused)
    done = Synced(len(folders) - len(live), num_sent, num_refused, tuple(live))
    refused = f", {num_refused} refused" if num_refused else ""
    busy = f"; left to the processes writing them: {', '.join(live)}" if live else ""
    Console(highlight=False).print(f"{num_sent} records of {done.num_runs} runs sent to MLflow{refused}{busy}")
    return done


def mirror_run(scratch: Path, project: Project, tracking: Tracking, patience: float = LOCK_PATIENCE_SECONDS) -> Mirror:
    """Sends what MLflow missed of one run; the result knows the MLflow run's id.

    Raises:
        filelock.Timeout: another process is still writing the run after `patience` seconds.
        UserError: the store does not answer.
    """
    mirror = Mirror(scratch, tracking, project)
    with FileLock(scratch / LOCK, timeout=patience):
        try:
            mirror.send()
        except UserError:
            raise
        except Exception as error:  # whatever a store or the network raises: the records stay where they are
            left = f"{mirror.num_pending()} records of {scratch.name} wait: start the server, then run `medgen sync`"
            raise unreachable(project, tracking, error, left) from error
    return mirror


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    """Sections and mappings within mappings as one, by dotted names such as train.phases.0.epochs."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Section):
            value = value.model_dump(mode="json")
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(position): item for position, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return flat
