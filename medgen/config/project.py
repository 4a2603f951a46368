"""Paths of a project's files."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

RESULTS_VARIABLE = "MEDGEN_RESULTS"  # environment variable of a stage's process: `Project.results`


@dataclass(frozen=True)
class Project:
    """Folder that a command runs in, and the paths of what medgen writes there."""

    root: Path
    # folder of model, prior, refiner, runs and reports instead: of a trial or a registered version
    apart: Path | None = None
    results: Path | None = None  # folder of artifacts/ and reports/ instead: of a recipe
    parent: Path | None = None  # project that keeps the runs and the tracking store of this one, an experiment of DVC

    @classmethod
    def find(cls, root: Path) -> "Project":
        """The project in a folder. In a work tree of `dvc exp run --temp` or `--queue`, runs belong to its project.

        DVC removes such a tree after the experiment, and names the project it belongs to in the variable DVC_ROOT.
        """
        folder, owner = os.environ.get(RESULTS_VARIABLE), os.environ.get("DVC_ROOT")
        results = Path(folder) if folder else None
        if owner is None or Path(owner, ".dvc").resolve() not in root.resolve().parents:
            return cls(root, results=results)
        parent = Path(_git(Path(owner), "--show-toplevel"), _git(root, "--show-prefix"))
        return cls(root, results=results, parent=parent)

    @property
    def dataset(self) -> Path:
        """The preprocessed dataset."""
        return self._results / "artifacts" / "dataset"

    @property
    def features(self) -> Path:
        """The domain extractor."""
        return self._results / "artifacts" / "features"

    @property
    def model(self) -> Path:
        """The exported model."""
        return self._own / "artifacts" / "model"

    @property
    def prior(self) -> Path:
        """The prior of its latents."""
        return self._own / "artifacts" / "prior"

    @property
    def refiner(self) -> Path:
        """Its refiner."""
        return self._own / "artifacts" / "refiner"

    @property
    def utility(self) -> Path:
        """Results of classifiers trained on its samples."""
        return self._own / "artifacts" / "utility"

    @property
    def evaluation(self) -> Path:
        """Per-image values of the last evaluation."""
        return self._own / "artifacts" / "evaluation"

    @property
    def runs(self) -> Path:
        """Records and checkpoints of runs."""
        return (self.apart or self.home) / "runs"

    @property
    def home(self) -> Path:
        """Folder of the runs and the tracking store."""
        return self.parent or self.root

    @property
    def reports(self) -> Path:
        """Metrics and pages of the last evaluation."""
        return self._own / "reports"

    @property
    def figures(self) -> Path:
        """Figures of the last evaluation."""
        return self.reports / "figures"

    @property
    def curves(self) -> Path:
        """Curves and animation of the last training."""
        return self.reports / "training"

    @property
    def images(self) -> Path:
        """Images that were evaluated, if evaluate.save_images asks for them."""
        return self.evaluation / "images"

    @property
    def _results(self) -> Path:
        return self.results or self.root

    @property
    def _own(self) -> Path:
        return self.apart or self._results


def _git(folder: Path, option: str) -> str:
    """Output of `git rev-parse` with an option."""
    command = ["git", "rev-parse", option]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
