"""The domain extractor: a small residual network that has learnt what this dataset's images show.

Features of a network trained on photographs say little about X-rays; these come from the train split itself.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from medgen.errors import UserError
from medgen.files import write_folder

NUM_FEATURES = 128
WEIGHTS, DESCRIPTION = "extractor.safetensors", "extractor.json"
_FINAL_SIDE = 8  # the strided blocks go on until the grid is about this small
SCHEMA = 1


@dataclass(frozen=True)
class ExtractorSizes:
    """All that is needed to rebuild an extractor."""

    image_channels: int
    image_size: int  # trained at; sets the number of blocks
    width: int  # channels after the first convolution; doubled at each block up to 128
    num_outputs: int  # of the head: classes, or 4 rotations


class DomainExtractor(nn.Module):
    """Images of any size from 32 -> 128 features, standardised over the train split, and class logits.

    A 5x5 convolution of stride 2, then residual blocks of stride 2 down to a grid of about 8x8, then the mean
    over the grid. GroupNorm, so that an image's features depend on no other image of its batch.
    """

    def __init__(self, sizes: ExtractorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        num_blocks = max(2, math.ceil(math.log2(sizes.image_size / 2 / _FINAL_SIDE)))
        widths = [min(sizes.width * 2**block, NUM_FEATURES) for block in range(num_blocks)] + [NUM_FEATURES]
        self.stem = nn.Conv2d(sizes.image_channels, widths[0], 5, stride=2, padding=2, bias=False)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.norm = _norm(NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, sizes.num_outputs)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("scale", torch.ones(NUM_FEATURES))

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, 128), of mean 0 and variance 1 on the train split."""
        return (self._pooled(image) - self.mean) / self.scale

    def logits(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> class scores (B, num_outputs)."""
        scores: Tensor = self.head(self._pooled(image))
        return scores

    @torch.no_grad()
    def standardise(self, batches: Iterable[Tensor]) -> None:
        """Sets the features' mean and scale from images, so that the kernel of KID sees numbers around 1."""
        pooled = torch.cat([self._pooled(image) for image in batches]).double()
        scale = pooled.std(dim=0, correction=0)
        self.mean.copy_(pooled.mean(dim=0))
        # A feature that hardly varies on real images would drown the others on unusual ones.
        self.scale.copy_(scale.clamp_min(0.1 * float(scale.mean()) + 1e-6))

    def _pooled(self, image: Tensor) -> Tensor:
        hidden: Tensor = F.silu(self.norm(self.blocks(self.stem(2.0 * image - 1.0))))  # (B, 128, h, w)
        return hidden.mean(dim=(2, 3))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class _Block(nn.Module):
    """Pre-activation residual block of stride 2 (He et al., Identity mappings, 2016)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        skipped: Tensor = self.skip(F.avg_pool2d(hidden, 2, ceil_mode=True))
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return skipped + hidden


def save_extractor(folder: Path, extractor: DomainExtractor, facts: dict[str, Any]) -> str:
    """Writes extractor.safetensors and extractor.json, whole or not at all; the folder's old content goes.

    Args:
        folder: where to.
        extractor: what to write.
        facts: more for the JSON, such as the task and the validation accuracy; plain JSON values.

    Returns:
        The SHA-256 of the weights file.
    """
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in extractor.state_dict().items()})
    digest = hashlib.sha256(weights).hexdigest()
    description = {"schema": SCHEMA, "sizes": asdict(extractor.sizes), "sha256": digest, **facts}
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    write_folder(folder, {WEIGHTS: weights, DESCRIPTION: text.encode()})
    return digest


def load_extractor(folder: Path, dataset: str | None = None) -> tuple[DomainExtractor, str]:
    """The extractor in evaluation mode, on the CPU, and the SHA-256 of its weights.

    Args:
        folder: where `save_extractor` wrote it.
        dataset: fingerprint of the store it has to be trained on; None takes any.

    Raises:
        UserError: there is none, it is damaged, or trained on other data.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; run `medgen features` (or `dvc repro`) first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run `medgen features` again") from None
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        raise UserError(f"{path}: expected an extractor of schema {SCHEMA}; run `medgen features` again")
    if dataset is not None and description.get("dataset") != dataset:
        raise UserError(
            f"{path}: trained on dataset {description.get('dataset')}, but the store is now {dataset}; "
            "run `medgen features` again"
        )
    digest = hashlib.sha256(weights).hexdigest()
    if digest != description.get("sha256"):
        raise UserError(
            f"{folder / WEIGHTS}: damaged, its SHA-256 is not the one in {DESCRIPTION}; run `medgen features` again"
        )
    try:
        extractor = DomainExtractor(TypeAdapter(ExtractorSizes).validate_python(description.get("sizes")))
        extractor.load_state_dict(load(weights))
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: does not describe {WEIGHTS} ({error}); run `medgen features` again") from None
    return extractor.eval(), digest
