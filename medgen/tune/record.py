"""A search in MLflow: the study is a run with its trials below it. One process of a machine writes there."""

import time
from collections.abc import Sequence
from pathlib import Path

from filelock import Timeout
from optuna.trial import FrozenTrial
from rich.console import Console

from medgen.config import Tracking
from medgen.errors import UserError
from medgen.tracking import Tracker, lineage, mirror_run
from medgen.tracking.mlflow_sync import Mirror
from medgen.tune.study import Study, trial_name
from medgen.tune.worker import UNTRACKED, Search

RETRY_SECONDS = 60.0  # after MLflow did not answer


class Sender:
    """Sends records of the study and of trials that have ended. What it cannot send stays for `medgen sync`."""

    def __init__(self, search: Search, study: Study, tracking: Tracking) -> None:
        self._search, self._study, self._tracking = search, study, tracking
        self._sent: set[int] = set()
        self._has_parent = False
        self._retry_at = 0.0

    def send(self) -> None:
        """The study's record, which those of its trials belong to; then those of trials that have ended here."""
        if not self._has_parent:
            self.send_parent()
        for trial in self._study.trials:
            if self._has_parent and trial.state.is_finished() and trial.number not in self._sent:
                folders = self._search.folder.glob(f"trial_{trial.number:04d}/runs/*")
                if all([self._send_one(folder) for folder in folders]):
                    self._sent.add(trial.number)

    def send_parent(self) -> None:
        """The study's own record; in turn, so that two machines do not make its MLflow run twice."""
        with self._study.storage.turn():
            self._has_parent = self._send_one(self._search.folder)

    def send_rest(self, console: Console) -> None:
        """All that is left, or a line that says what to do."""
        self._retry_at = 0.0
        self.send_parent()
        self.send()
        if self._retry_at:
            console.print("[yellow]not all records of this search are in MLflow yet: run `medgen sync`[/]")

    def _send_one(self, folder: Path) -> bool:
        """One record; False where it has to wait."""
        if not self._tracking.enabled:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            if Mirror(folder, self._tracking, self._search.project).num_pending():
                mirror_run(folder, self._search.project, self._tracking, patience=0)
        except Timeout:  # another command is sending it
            return False
        except UserError:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True


def keep_record(
    search: Search, study: Study, status: str, best: FrozenTrial | None = None, files: Sequence[Path] = ()
) -> None:
    """Writes the study's own record: searched keys, counts, the best trial, figures."""
    params, objective = search.params, study.objective
    name = f"{'confirmation' if search.confirms else 'search'} {study.name}"
    with Tracker.open(
        search.folder, UNTRACKED, search.project, name, identity=study.record, parent=study.parent
    ) as tracker:
        tracker.params({"tune": params.tune, "model": params.model, "loss": params.loss, "train": params.train})
        tracker.tags({**lineage(search.project, params), "tune.study": study.name})
        tracker.note(f"Search over {', '.join(study.space)}: {', '.join(objective.labels)} of the val split.")
        counts = study.counts()
        ended = sum(counts.values())
        tracker.metrics({f"tune/{name}": float(count) for name, count in counts.items()}, step=ended)
        if best is not None:
            values = dict(zip(objective.labels, best.values, strict=True))
            tracker.metrics({f"tune/best/{label}": value for label, value in values.items()}, step=ended)
            tried = {f"tune.best.{key}": str(value) for key, value in study.tried(best).items()}
            tracker.tags({"tune.best": trial_name(best), **tried})
            samples = search.trial_folder(best.number) / "reports" / "figures" / "samples.png"
            if samples.exists():  # if the trial ran on this machine
                tracker.artifact(samples, "best")
        for path in files:
            tracker.artifact(path, "tune")
        tracker.finish(status)
