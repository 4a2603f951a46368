"""The campaign's folder: images, a reference project without faults, and the project that a round works on."""

import contextlib
import importlib
import itertools
import json
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.campaign import process
from benchmarks.campaign.process import Child, Violation, start, start_function
from benchmarks.campaign.project import PARAMS, STAGES, check_same, digest, stored_points
from benchmarks.campaign.search import SEARCH, trials_of
from benchmarks.campaign.team import Team

IMAGES = 48
# what medgen's commands import, most of it late
MODULES = (
    *("medgen.cli", "medgen.ingest.preprocess", "medgen.ingest.audit", "medgen.ingest.formats.arrays", "medgen.tune"),
    *(
        "medgen.datasets.import_data",
        "medgen.evaluation.evaluate",
        "medgen.registry.promotion",
        "medgen.training.launch",
    ),
    *("alembic.command", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "PIL.GifImagePlugin"),
    *("mlflow.store.model_registry.sqlalchemy_store", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "jinja2"),
    *("scipy.signal", "torchmetrics.image", "torchvision.models", "pydicom", "nibabel"),
)


class Lab:
    """Projects of the campaign; every round works in `project`, the same path as the reference: MLflow keeps paths.

    Args:
        folder: the campaign's folder, which is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.project = self.work / "project"
        self.logs = folder / "logs"
        self.counts: Counter[str] = Counter()  # of the present round
        self.seconds: dict[str, float] = {}  # of each command without faults
        self.cleanup: list[Callable[[], object]] = []  # calls at the end of the present round
        self._numbers = itertools.count()
        self._team: Team | None = None
        self._search: dict[int, Any] | None = None
        for name in ("work/project", "logs", "snapshots", "home", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def make_reference(self) -> None:
        """Import what the commands need, and run all stages without faults, with a snapshot before each."""
        for name in MODULES:
            importlib.import_module(name)
        assert threading.active_count() == 1, "a fork of a process with threads may hang"
        start_function(lambda: draw(self.project / "data"), self.log("draw")).wait()
        (self.project / "params.yaml").write_text(json.dumps(PARAMS))
        start_function(self._make_database, self.log("database")).wait()
        for stage in STAGES:
            shutil.copytree(self.project, self.snapshot(stage))
            begin = time.monotonic()
            self.run(stage)
            self.seconds[stage] = time.monotonic() - begin
        shutil.copytree(self.project, self.snapshot("done"))
        self.points = {name: self._points(self.snapshot(name)) for name in ("prior", "refiner", "evaluate", "done")}

    def snapshot(self, stage: str) -> Path:
        """The reference project before a stage; "done": after all."""
        return self.folder / "snapshots" / stage

    def restore(self, stage: str) -> Path:
        """Make `project` the reference project before a stage, or after all with "done"."""
        shutil.rmtree(self.project, ignore_errors=True)  # leaves a folder that something is mounted on
        shutil.copytree(self.snapshot(stage), self.project, dirs_exist_ok=True)
        return self.project

    def start(self, *words: str, prepare: Iterable[Callable[[], None]] = ()) -> Child:
        """Start a command in the project."""
        return start(self.project, words, self.log(words[0]), prepare)

    def run(self, *words: str, prepare: Iterable[Callable[[], None]] = (), codes: Iterable[int] = (0,)) -> str:
        """Run a command in the project; see `process.run`."""
        return process.run(self.project, *words, log=self.log(words[0]), prepare=prepare, codes=codes)

    def log(self, name: str) -> Path:
        """A new log file of this round."""
        return self.logs / f"{next(self._numbers):03d}-{name}.log"

    def check_stage(self, stage: str, points: bool = True) -> None:
        """Compare the project after a stage with the reference; with `points`, its metric points in MLflow too.

        Raises:
            Violation: they differ.
        """
        after = [*STAGES, "done"][STAGES.index(stage) + 1]
        check_same(self.project, digest(self.snapshot(after)))
        if points and after in self.points:
            self.run("sync")
            self.check_points(after)

    def check_points(self, after: str) -> None:
        """Compare the metric points in the project's MLflow with those of the reference before the stage `after`."""
        self.compare_points(self._points(self.project), after)

    def compare_points(self, found: Counter[Any], after: str) -> None:
        """Raise Violation unless these are the metric points of the reference before the stage `after`."""
        expected = self.points[after]
        if found != expected:
            missing, extra = list((expected - found).items())[:3], list((found - expected).items())[:3]
            raise Violation("lost", f"metric points in MLflow: missing {missing}, too many {extra}")

    def search(self) -> dict[int, Any]:
        """The trials of an undisturbed search, which the first call runs."""
        if self._search is None:
            self.restore("train")
            begin = time.monotonic()
            self.run(*SEARCH)
            self.seconds["tune"] = time.monotonic() - begin
            self._search = trials_of(self.project)
        return self._search

    def team(self) -> Team:
        """The team's servers, which the first call starts."""
        if self._team is None:
            self._team = Team(self.folder / "servers")
        self._team.heal()
        return self._team

    def stop(self) -> None:
        """End the servers, at the end of the campaign."""
        if self._team is not None:
            self._team.stop()

    def close(self) -> None:
        """End what a round has started and not ended."""
        for end in reversed(self.cleanup):
            end()
        self.cleanup.clear()

    def _points(self, project: Path) -> Counter[Any]:
        with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
            return stored_points(database)

    def _make_database(self) -> None:
        """MLflow's database without runs: creating it takes longer than any stage."""
        from medgen.config import Project, Tracking
        from medgen.tracking.mlflow_sync import connect

        connect(Project(self.project), Tracking())


def draw(folder: Path) -> None:
    """Draw the images of the project."""
    from medgen.datasets.sample import draw as draw_images

    draw_images(folder, num_images=IMAGES, size=64, seed=0)
