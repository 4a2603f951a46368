"""Record runs in runs/<fingerprint>/history.jsonl and copy the records to MLflow.

    with Tracker.open(scratch, params.tracking, project, "spatial_vae") as tracker:
        tracker.params(params.model_dump())
        tracker.metrics({"train/loss": 0.31}, step=200)

history.jsonl is authoritative. Training appends to it and never waits for MLflow: a thread sends the lines in order.
`sync` sends what MLflow has not received, from the run's folder alone: a recorded file that other runs replace, such as
those in reports/, is copied there.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from medgen.config import Project, Section, Tracking
from medgen.console import say
from medgen.errors import TrainingInterrupted, UserError
from medgen.io import write_atomic
from medgen.tracking.history import HISTORY, LOCK, History, RunRecord, encode, history, read_run
from medgen.tracking.lineage import lineage
from medgen.tracking.mlflow_descriptions import NOTE_TAG
from medgen.tracking.mlflow_sync import MlflowSync, store_error
from medgen.tracking.naming import difference_tags
from medgen.tracking.uploader import Uploader

PRIOR_ORIGIN = "prior.origin.json"  # in a run's folder: provenance of its prior
REFINER_ORIGIN = "refiner.origin.json"  # of its refiner
EVALUATION_ORIGIN = "evaluation.origin.json"  # and of its last evaluation
FILES = "files"  # in a run's folder: copies of recorded files, named after their content
LOCK_TIMEOUT_SECONDS = 10.0  # enough for a process that is ending to release the lock

# patterns in runs/; a search comes before its trials, whose MLflow runs need its run as their parent
RECORDS = ("*", "tune/*", "tune/*/trial_*/runs/*")

__all__ = [
    "EVALUATION_ORIGIN",
    "PRIOR_ORIGIN",
    "REFINER_ORIGIN",
    "RunRecord",
    "SyncResult",
    "Tracker",
    "flatten",
    "history",
    "lineage",
    "read_run",
    "sync",
    "sync_run",
]


class Tracker:
    """Record of one run. Opening the same folder again continues it.

    A value that the file already holds, such as one that a resumed training records again, is dropped. A changed value
    is appended and replaces the earlier one.
    """

    def __init__(self, scratch: Path, tracking: Tracking, project: Project, record: History, lock: FileLock) -> None:
        self._lock = lock
        self._scratch = scratch
        self._is_training_run = scratch.parent == project.runs  # neither a search nor one of its trials
        self._history = record
        self._history.append("status", status="RUNNING", process=os.getpid())
        self._finished = False
        sender = MlflowSync(scratch, tracking, project)
        self._uploader = Uploader(self._history, sender, tracking) if tracking.enabled else None

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
        """Start or continue the record of a run.

        Args:
            scratch: folder of the run.
            tracking, project: settings and location of the MLflow store.
            run_name: name of a new record.
            identity: ID of a new record, 32 hexadecimal digits, if several machines write to the same MLflow run; None:
                a random one.
            parent: ID of the record that a new one belongs to.

        Raises:
            UserError: another process is writing this run.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        lock = FileLock(scratch / LOCK, timeout=LOCK_TIMEOUT_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{scratch}: another process is writing this run; wait until it ends, or stop it") from None
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
        """Record parameters; sections and mappings become dotted names, such as train.phases.kl.epochs.

        The first parameters of a training run also set tags that name its differences from the run before it.
        """
        flat = flatten(values)
        record = read_run(self._scratch)
        if self._is_training_run and record and not record.params:
            self.tags(difference_tags(self._scratch, flat))
        self._history.append("params", values=flat)

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags: name to text."""
        self._history.append("tags", values={name: str(value) for name, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at a step. MLflow gets the tag nonfinite_step in place of values that are not finite."""
        plain = {name: float(value) for name, value in values.items()}
        self._history.append("metrics", step=step, values={name: encode(value) for name, value in plain.items()})
        nonfinite = sorted(name for name, value in plain.items() if not math.isfinite(value))
        if nonfinite and not self._history.contains(("tags", "nonfinite_step", None)):
            self.tags({"nonfinite_step": str(step), "nonfinite_metrics": ", ".join(nonfinite)})

    def durations(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics that a repeated step would measure differently: the first value of a step stays."""
        new = {name: value for name, value in values.items() if not self._history.contains(("metrics", name, step))}
        self.metrics(new, step)

    def image(self, key: str, path: Path, step: int) -> None:
        """Record an image file as one step of the series `key`, which MLflow shows in its image grid."""
        self._history.append("image", key=key, step=step, **self._keep(path))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a file, which MLflow keeps in `folder` of the run's artifacts, in place of an earlier one there."""
        key = f"{folder}/{path.name}" if folder else path.name
        self._history.append("artifact", key=key, folder=folder, **self._keep(path))

    def dataset(self, name: str, fingerprint: str, source: str, counts: Mapping[str, int]) -> None:
        """Record the dataset of the run; `counts` are the numbers of images in each split."""
        self._history.append("dataset", key=name, fingerprint=fingerprint, source=source, counts=dict(counts))

    def note(self, text: str) -> None:
        """Record the run's description, in Markdown."""
        self.tags({NOTE_TAG: text})

    def flush(self) -> None:
        """Write the record to the disk, where it survives a power cut."""
        self._history.flush()

    def finish(self, status: str = "FINISHED") -> None:
        """End the record (FINISHED, FAILED or KILLED), after a bounded time for MLflow to receive the rest."""
        if self._finished:
            return
        self._finished = True
        self._history.append("status", status=status)
        if self._uploader is not None:
            self._uploader.stop()
        self._remove_replaced()
        self._history.close()
        self._lock.release()

    def _keep(self, path: Path) -> dict[str, Any]:
        """Copy a file to the run's folder unless it lies there; return its path from that folder and its SHA-256.

        A hard link would save the space, but not the content: a program that writes into the file in place, such as an
        editor, would change both.
        """
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if path.absolute().is_relative_to(self._scratch.absolute()):
            kept = path.absolute().relative_to(self._scratch.absolute())
        else:
            kept = Path(FILES, f"{digest[:16]}{path.suffix}")
            write_atomic(self._scratch / kept, content)
        return {"path": kept.as_posix(), "sha256": digest}

    def _remove_replaced(self) -> None:
        """Remove the copies of files that a later record has replaced, which MLflow would only overwrite."""
        recorded = self._history.recorded_paths()
        for path in (self._scratch / FILES).glob("*"):
            if f"{FILES}/{path.name}" not in recorded:
                path.unlink()


@dataclass(frozen=True)
class SyncResult:
    """Counts of what `sync` did."""

    num_runs: int
    num_sent: int  # records
    live: tuple[str, ...]  # runs that another process is writing, which sends their records itself


def sync(project: Project, tracking: Tracking) -> SyncResult:
    """Send the records that MLflow has not received, of every run in order, and print the counts.

    Raises:
        UserError: tracking is off, or the store does not answer.
    """
    if not tracking.enabled:
        raise UserError("tracking.enabled: is false, so there is no MLflow store to send to; set it to true")
    num_sent = num_refused = 0
    live = []
    folders = [path.parent for pattern in RECORDS for path in sorted(project.runs.glob(f"{pattern}/{HISTORY}"))]
    for folder in folders:
        try:
            sent = sync_run(folder, project, tracking, timeout=0)
        except Timeout:
            live.append(folder.name)
            continue
        num_sent += sent.num_sent
        num_refused += len(sent.refused) + len(sent.changed)
    result = SyncResult(len(folders) - len(live), num_sent, tuple(live))
    refused = f", {num_refused} refused" if num_refused else ""
    skipped = f"; skipped, as other processes are writing them: {', '.join(live)}" if live else ""
    say(f"{num_sent} records of {result.num_runs} runs sent to MLflow{refused}{skipped}")
    return result


def sync_run(scratch: Path, project: Project, tracking: Tracking, timeout: float = LOCK_TIMEOUT_SECONDS) -> MlflowSync:
    """Send the records of one run that MLflow has not received; the result holds the ID of the MLflow run.

    Raises:
        filelock.Timeout: another process is still writing the run after `timeout` seconds, or a thread is sending it.
        UserError: the store does not answer.
    """
    mlflow_sync = MlflowSync(scratch, tracking, project)
    with FileLock(scratch / LOCK, timeout=timeout):
        try:
            mlflow_sync.send()
        except (UserError, Timeout):
            raise
        except Exception as error:  # stores and networks raise many kinds; the records stay in the file
            pending = mlflow_sync.num_pending()
            advice = f"{pending} records of {scratch.name} are not sent: start the server, then run `medgen sync`"
            raise store_error(project, tracking, error, advice) from error
    mlflow_sync.warn_unsent()
    return mlflow_sync


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections, mappings and lists of mappings to dotted names such as train.phases.kl.epochs."""
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
