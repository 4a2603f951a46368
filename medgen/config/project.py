"""Paths of a project's files."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Project:
    """Folder that a command runs in, and the paths of what medgen writes there."""

    root: Path
    apart: Path | None = (
        None  # folder of model, prior, refiner, runs and reports instead: of a trial or a registered version
    )

    @property
    def dataset(self) -> Path:
        """The preprocessed dataset."""
        return self.root / "artifacts" / "dataset"

    @property
    def features(self) -> Path:
        """The domain extractor."""
        return self.root / "artifacts" / "features"

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
    def evaluation(self) -> Path:
        """Per-image values of the last evaluation."""
        return self._own / "artifacts" / "evaluation"

    @property
    def runs(self) -> Path:
        """Records and checkpoints of runs."""
        return self._own / "runs"

    @property
    def reports(self) -> Path:
        """Metrics and pages of the last evaluation."""
        return self._own / "reports"

    @property
    def figures(self) -> Path:
        """Image files of the reports."""
        return self._own / "reports" / "figures"

    @property
    def images(self) -> Path:
        """Images that were evaluated, if evaluate.save_images asks for them."""
        return self._own / "reports" / "images"

    @property
    def _own(self) -> Path:
        return self.apart or self.root
