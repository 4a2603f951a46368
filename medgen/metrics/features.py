"""The domain extractor: a small network that has learnt the classes of this dataset and how damaged images differ.

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
from medgen.io import write_folder
from medgen.metrics.degradations import DEGRADATIONS

NUM_FEATURES = 128
NUM_CONTENT = 96  # the first features: what the image shows; the others: how sharp, noisy or damaged it is
WEIGHTS, DESCRIPTION = "extractor.safetensors", "extractor.json"
SCHEMA = 2
CLEAN = 0  # output of the quality head for an image without damage; the others follow the order of DEGRADATIONS
_FINAL_SIDE = 8  # the strided blocks go on until the grid is about this small
_BLOCK, _STRIDE = 8, 4  # pixels: side of a block of the cosine transform, and the step from one to the next
_TENTH = 10  # the statistics of a block's coefficients include their first and last tenth
_FLOOR = 0.003  # below a grey level: added to coefficients before the logarithm, so that rounding counts little
_MAX_SHIFT = 2.0  # most that a degradation moves a feature, root mean square over the train split


@dataclass(frozen=True)
class ExtractorSizes:
    """All that is needed to rebuild an extractor."""

    image_channels: int
    image_size: int  # trained at; sets the number of blocks
    width: int  # channels after the first convolution; doubled at each block up to 48
    num_outputs: int  # of the class head: classes, or 4 rotations


class DomainExtractor(nn.Module):
    """Images of any size from 32 -> 128 features, class scores, and scores for each kind of degradation.

    96 content features come from a residual network, 32 quality features from the image's spectrum. Separate parts,
    since one network that learns both learns the classes far more slowly. No image depends on others of its batch.
    """

    def __init__(self, sizes: ExtractorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.content = _Content(sizes)
        self.quality = _Quality()
        self.class_head = nn.Linear(NUM_CONTENT, sizes.num_outputs)
        self.quality_head = nn.Linear(NUM_FEATURES - NUM_CONTENT, 1 + len(DEGRADATIONS))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("scale", torch.ones(NUM_FEATURES))

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, 128), of mean 0 and variance at most 1 on the train split."""
        return (self._pooled(image) - self.mean) / self.scale

    def logits(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> class scores (B, num_outputs)."""
        scores: Tensor = self.class_head(self.content(image))
        return scores

    def quality_logits(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> scores (B, 7): clean, then each kind of DEGRADATIONS."""
        scores: Tensor = self.quality_head(self.quality(image))
        return scores

    @torch.no_grad()
    def standardise(self, clean: Iterable[Tensor], degraded: Iterable[Tensor]) -> None:
        """Sets the features' mean and scale, so that kernels see numbers around 1.

        The scale is the standard deviation over the clean images. It is larger where the degraded images are so far
        away that a slightly blurred set would hide every other difference.

        Args:
            clean: batches of train images.
            degraded: batches of degraded train images.
        """
        pooled = torch.cat([self._pooled(image) for image in clean]).double()
        moved = torch.cat([self._pooled(image) for image in degraded]).double() - pooled.mean(dim=0)
        scale = pooled.std(dim=0, correction=0)
        # A feature that hardly varies on real images would drown the others on unusual ones.
        scale = scale.clamp_min(0.1 * float(scale.mean()) + 1e-6)
        self.mean.copy_(pooled.mean(dim=0))
        self.scale.copy_(torch.maximum(scale, moved.square().mean(dim=0).sqrt() / _MAX_SHIFT))

    def _pooled(self, image: Tensor) -> Tensor:
        return torch.cat([self.content(image), self.quality(image)], dim=1)


class _Content(nn.Module):
    """Images (B, C, H, W) -> (B, 96): what the image shows.

    A 5x5 convolution of stride 2, then residual blocks of stride 2 down to a grid of about 8x8, then the mean and the
    maximum over the grid: in the mean alone a finding that fills a small part of the image is learnt very slowly.
    """

    def __init__(self, sizes: ExtractorSizes) -> None:
        super().__init__()
        most = NUM_CONTENT // 2
        num_blocks = max(2, math.ceil(math.log2(sizes.image_size / 2 / _FINAL_SIDE)))
        widths = [min(sizes.width * 2**block, most) for block in range(num_blocks)] + [most]
        self.stem = nn.Conv2d(sizes.image_channels, widths[0], 5, stride=2, padding=2, bias=False)
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.norm = _norm(most)

    def forward(self, image: Tensor) -> Tensor:
        hidden: Tensor = F.silu(self.norm(self.blocks(self.stem(2.0 * image - 1.0))))  # (B, 48, h, w)
        return torch.cat([hidden.mean(dim=(2, 3)), hidden.amax(dim=(2, 3))], dim=1)


class _Quality(nn.Module):
    """Images (B, C, H, W) -> (B, 32): which frequencies are weak or strong, and whether everywhere alike.

    A perceptron on statistics of the log-magnitudes of 8x8 cosine transforms, the blocks JPEG uses.

    Source: Frank et al.: Leveraging frequency analysis for deep fake image recognition, 2020, for such an input.
    """

    def __init__(self) -> None:
        super().__init__()
        num_statistics = 4 * (_BLOCK**2 - 1)
        self.basis: Tensor
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("basis", cosine_basis(_BLOCK)[1:], persistent=False)  # [0]: the mean
        self.register_buffer("mean", torch.zeros(num_statistics))
        self.register_buffer("scale", torch.ones(num_statistics))
        self.hidden = nn.Linear(num_statistics, NUM_FEATURES)
        self.last = nn.Linear(NUM_FEATURES, NUM_FEATURES - NUM_CONTENT)

    def forward(self, image: Tensor) -> Tensor:
        statistics = (self._statistics(image) - self.mean) / self.scale
        return F.silu(self.last(F.silu(self.hidden(statistics))))

    @torch.no_grad()
    def standardise(self, batches: Iterable[Tensor]) -> None:
        """Sets the statistics' mean and scale from images, before training."""
        statistics = torch.cat([self._statistics(image) for image in batches]).double()
        self.mean.copy_(statistics.mean(dim=0))
        self.scale.copy_(statistics.std(dim=0, correction=0).clamp_min(1e-3))

    def _statistics(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 252): mean, deviation, first and last tenth of each coefficient's log-magnitude."""
        channels = image.shape[1]
        basis = self.basis.repeat(channels, 1, 1, 1)
        coefficients = F.conv2d(image, basis, stride=_STRIDE, groups=channels)  # (B, C * 63, h, w)
        magnitudes = (coefficients.abs() + _FLOOR).log().flatten(2)  # (B, C * 63, h * w)
        magnitudes = magnitudes.reshape(len(image), channels, -1, magnitudes.shape[2]).mean(dim=1)
        ordered = magnitudes.sort(dim=2).values  # (B, 63, h * w)
        tenth = ordered.shape[2] // _TENTH
        parts = [magnitudes.mean(dim=2), magnitudes.std(dim=2), ordered[:, :, tenth], ordered[:, :, -1 - tenth]]
        return torch.cat(parts, dim=1)


def cosine_basis(size: int) -> Tensor:
    """Orthonormal two-dimensional cosine transform (DCT-II) of square blocks, (size², 1, size, size)."""
    position = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * (2.0 * position + 1.0) * position[:, None] / (2 * size)) * math.sqrt(2.0 / size)
    rows[0] /= math.sqrt(2.0)
    return torch.einsum("ay,bx->abyx", rows, rows).reshape(size**2, 1, size, size).float()


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
        facts: more for the JSON, such as the task and the validation results; plain JSON values.

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
    path, description = folder / DESCRIPTION, _describe(folder)
    weights = _read(folder / WEIGHTS)
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


def unrecognised_classes(folder: Path) -> tuple[str, ...]:
    """Classes that the extractor does not tell from the others on validation images.

    Raises:
        UserError: there is no extractor, or its description is damaged.
    """
    unrecognised = _describe(folder).get("unrecognised", {})
    return tuple(unrecognised.get("classes", ()))


def _describe(folder: Path) -> dict[str, Any]:
    """The checked content of extractor.json."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run `medgen features` again") from None
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        raise UserError(f"{path}: expected an extractor of schema {SCHEMA}; run `medgen features` again")
    return description


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `medgen features` (or `dvc repro`) first") from None
