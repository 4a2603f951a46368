"""The per-image values of one evaluation, kept with a model so that another model can be compared with it later.

artifacts/evaluation holds evaluation.safetensors and evaluation.json: features and spectra of samples and held-out
images, each held-out image's SSIM (Dice, of models that find masks), and the number of its patient. No image and no
patient identifier is in them.

Shapes: N held-out images, M samples.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from medgen.errors import UserError
from medgen.io import write_folder
from medgen.metrics.comparison import ImageSet

TENSORS, DESCRIPTION = "evaluation.safetensors", "evaluation.json"
SCHEMA = 1


@dataclass(frozen=True)
class EvaluationInfo:
    """Inputs and settings of an evaluation; two evaluations of equal ones can be compared."""

    dataset: str  # fingerprint of the store
    extractor: str  # SHA-256 of the domain extractor; "" of models that find masks
    split: str
    seed: int
    num_generated: int
    # of the RBF kernel; follows from dataset and extractor, up to the rounding of the machine
    bandwidth: float = field(compare=False)


@dataclass(frozen=True)
class EvaluationData:
    """The values themselves."""

    info: EvaluationInfo
    similarity: Tensor  # (N,) SSIM of each held-out image's reconstruction, or Dice of its mask
    groups: Tensor  # (N,) number of each held-out image's patient
    samples: ImageSet | None = None  # None of models that find masks
    held_out: ImageSet | None = None
    digest: str = ""  # SHA-256 of the file they were read from


def save_evaluation(folder: Path, data: EvaluationData) -> str:
    """Writes evaluation.safetensors and evaluation.json, whole or not at all; the folder's old content goes.

    Returns:
        The SHA-256 of evaluation.safetensors.
    """
    tensors = {"similarity": data.similarity, "groups": data.groups}
    for name, images in (("samples", data.samples), ("held_out", data.held_out)):
        if images is not None:
            tensors |= {f"{name}.features": images.features, f"{name}.power": images.power}
    content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    plain = {"schema": SCHEMA, "sha256": digest, "info": asdict(data.info)}
    write_folder(folder, {TENSORS: content, DESCRIPTION: (json.dumps(plain, indent=2) + "\n").encode()})
    return digest


def load_evaluation(folder: Path) -> EvaluationData:
    """Reads what `save_evaluation` wrote.

    Raises:
        UserError: there is none, it is damaged, or another medgen wrote it.
    """
    path = folder / DESCRIPTION
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        content = (folder / TENSORS).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if plain["schema"] != SCHEMA or plain["sha256"] != digest:
            raise UserError(f"{folder}: damaged or of another medgen; run `medgen evaluate` again")
        info = TypeAdapter(EvaluationInfo).validate_python(plain["info"])
        tensors = safetensors.torch.load(content)
        samples, held_out = (
            ImageSet(tensors[f"{name}.features"], tensors[f"{name}.power"]) if f"{name}.features" in tensors else None
            for name in ("samples", "held_out")
        )
        return EvaluationData(info, tensors["similarity"], tensors["groups"], samples, held_out, digest)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no evaluation here; run `medgen evaluate` first") from None
    except (ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise UserError(f"{path}: not an evaluation's description ({error}); run `medgen evaluate` again") from None


def group_numbers(keys: list[str] | None, count: int) -> Tensor:
    """Numbers (count,) that are equal where the keys are; without keys each image has its own."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))} if keys is not None else {}
    return torch.arange(count) if keys is None else torch.tensor([numbers[key] for key in keys])
