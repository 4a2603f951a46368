"""Save and load the per-image values of an evaluation, for later comparisons with other models.

artifacts/evaluation holds evaluation.safetensors and evaluation.json: features and spectra of samples and held-out
images, and the SSIM (Dice, for models that predict masks) and patient index of each held-out image. They contain no
image and no patient identifier.

Shapes: N held-out images, M samples.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from medgen.errors import UserError
from medgen.io import parsing, read_description, read_tensors, save_artifact
from medgen.metrics.comparison import ImageSet
from medgen.metrics.generation import subsample

DESCRIPTION = "evaluation.json"
SCHEMA = 1


@dataclass(frozen=True)
class EvaluationInfo:
    """Inputs and settings of an evaluation; two evaluations can be compared if theirs are equal."""

    dataset: str  # fingerprint of the store
    extractor: str  # SHA-256 of the domain extractor; "" for models that predict masks
    split: str
    seed: int
    num_generated: int
    # of the RBF kernel; not compared: dataset and extractor determine it, up to rounding on different machines
    bandwidth: float = field(compare=False)


@dataclass(frozen=True)
class EvaluationData:
    """Per-image values of an evaluation."""

    info: EvaluationInfo
    similarity: Tensor  # (N,) SSIM of each held-out image's reconstruction, or Dice of its mask
    groups: Tensor  # (N,) index of each held-out image's patient
    samples: ImageSet | None = None  # None for models that predict masks
    held_out: ImageSet | None = None  # of n images: N, or fewer of a large split
    digest: str = ""  # SHA-256 of the file that the values were read from

    @property
    def held_out_groups(self) -> Tensor:
        """Patient index (n,) of each image of the set `held_out`, which is spread evenly over a large split."""
        assert self.held_out is not None
        return subsample(self.groups, len(self.held_out.features))


def save_evaluation(folder: Path, data: EvaluationData) -> str:
    """Write evaluation.safetensors and evaluation.json atomically, in place of the folder's old content.

    Returns:
        The SHA-256 of evaluation.safetensors.
    """
    tensors = {"similarity": data.similarity, "groups": data.groups}
    for name, images in (("samples", data.samples), ("held_out", data.held_out)):
        if images is not None:
            tensors |= {f"{name}.features": images.features, f"{name}.power": images.power}
    return save_artifact(folder, "evaluation", tensors, {"schema": SCHEMA, "info": asdict(data.info)})


def load_evaluation(folder: Path) -> EvaluationData:
    """Load the values that `save_evaluation` wrote.

    Raises:
        UserError: a file is missing or damaged, or has another schema.
    """
    path, command = folder / DESCRIPTION, "medgen evaluate"
    description = read_description(folder, "evaluation", command)
    with parsing(path, command):
        if description["schema"] != SCHEMA:
            raise UserError(f"{path}: found schema {description['schema']}, expected {SCHEMA}; run `{command}` again")
        info, digest = TypeAdapter(EvaluationInfo).validate_python(description["info"]), description["sha256"]
        tensors = read_tensors(folder, "evaluation", command, digest)
        samples, held_out = (
            ImageSet(tensors[f"{name}.features"], tensors[f"{name}.power"]) if f"{name}.features" in tensors else None
            for name in ("samples", "held_out")
        )
        return EvaluationData(info, tensors["similarity"], tensors["groups"], samples, held_out, digest)
