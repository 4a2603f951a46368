"""Record a search: the study is an MLflow run, its trials are child runs.

Only the process that started the workers writes to MLflow.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from filelock import Timeout
from optuna.trial import FrozenTrial

from medgen.console import warn
from medgen.errors import UserError
from medgen.tracking import Tracker, lineage, sync_run
from medgen.tracking.mlflow_sync import MlflowSync
from medgen.tune.study import trial_name
from medgen.tune.worker import NO_MLFLOW, Search, open_study

RETRY_SECONDS = 60.0  # after MLflow did not answer


class TrackedStudy:
    """A study that sends its record and those of its trials to MLflow. `medgen sync` sends what it could not."""

    def __init__(self, search: Search) -> None:
        self.search, self.study = search, open_study(search)
        self._tracking = search.params.tracking
        self._uploaded: set[int] = set()
        self._has_parent = False
        self._retry_at = 0.0

    def write_record(self, status: str, best: FrozenTrial | None = None, files: Sequence[Path] = ()) -> None:
        """Write the study's own record: searched keys, counts, the best trial, figures."""
        search, study = self.search, self.study
        params, objective = search.params, study.objective
        name = f"{'confirmation' if search.is_confirmation else 'search'} {study.name}"
        with Tracker.open(
            search.folder, NO_MLFLOW, search.project, name, identity=study.record, parent=study.parent
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
                searched = {f"tune.best.{key}": str(value) for key, value in study.values_of(best).items()}
                tracker.tags({"tune.best": trial_name(best), **searched})
                samples = search.trial_folder(best.number) / "reports" / "figures" / "samples.png"
                if samples.exists():  # only if the trial ran on this machine
                    tracker.artifact(samples, "best")
            for path in files:
                tracker.artifact(path, "tune")
            tracker.finish(status)

    def upload(self) -> None:
        """Send the study's record, which MLflow needs first, then those of trials that have ended on this machine."""
        if not self._has_parent:
            self.upload_parent()
        for trial in self.study.trials:
            if self._has_parent and trial.state.is_finished() and trial.number not in self._uploaded:
                folders = self.search.folder.glob(f"trial_{trial.number:04d}/runs/*")
                if all([self._upload_one(folder) for folder in folders]):
                    self._uploaded.add(trial.number)

    def upload_parent(self) -> None:
        """Send the study's own record, under a lock, so that two machines do not create two MLflow runs."""
        with self.study.storage.lock():
            self._has_parent = self._upload_one(self.search.folder)

    def upload_rest(self) -> None:
        """Send all remaining records; if that fails, print what to do."""
        self._retry_at = 0.0
        self.upload_parent()
        self.upload()
        if self._retry_at:
            warn("not all records of this search are in MLflow yet: run `medgen sync`")

    def _upload_one(self, folder: Path) -> bool:
        """Send one record; returns False if it has to be sent later."""
        if not self._tracking.enabled:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            if MlflowSync(folder, self._tracking, self.search.project).num_pending():
                sync_run(folder, self.search.project, self._tracking, timeout=0)
        except Timeout:  # another process is sending it
            return False
        except UserError:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True
