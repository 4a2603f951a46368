"""The domain extractor: a small network trained to recognise this dataset's classes and image degradations.

It is trained on the train split itself, because features of a network trained on photographs say little about X-rays.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from medgen.errors import UserError
from medgen.io import parsing, read_description, read_tensors, save_artifact
from medgen.metrics.degradations import DEGRADATIONS

NUM_FEATURES = 128
NUM_CONTENT = 96  # the first features describe the content of the image, the others its sharpness, noise and artifacts
DESCRIPTION = "extractor.json"
COMMAND = "medgen features"
SCHEMA = 2
CLEAN = 0  # output of the quality head for an undegraded image; the others follow the order of DEGRADATIONS
_FINAL_SIDE = 8  # approximate side of the grid after the last strided block
_BLOCK, _STRIDE = 8, 4  # pixels: side of a block of the cosine transform, and the step from one to the next
_TENTH = 10  # the statistics of a block's coefficients include their first and last decile
_OFFSET = 0.003  # less than a grey level; added to coefficients before the logarithm, to damp quantisation noise
_MAX_SHIFT = 2.0  # largest shift of a feature by degradations, root mean square over the train split


@dataclass(frozen=True)
class ExtractorSizes:
    """The architecture of an extractor."""

    image_channels: int
    image_size: int  # of the train images; determines the number of blocks
    width: int  # channels after the first convolution; doubled in each block up to 48
    num_outputs: int  # of the class head: classes, or 4 rotations


class DomainExtractor(nn.Module):
    """Network from images of any size from 32 to 128 features, class scores and degradation scores.

    A residual network gives 96 content features, and a perceptron on the image's spectrum 32 quality features. They are
    separate because one network for both learns the classes far more slowly. Results do not depend on the batch.
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
        """Images (B, C, H, W) in [0, 1] -> scores (B, 7): undegraded, then each kind of DEGRADATIONS."""
        scores: Tensor = self.quality_head(self.quality(image))
        return scores

    @torch.no_grad()
    def standardise(
        self, clean: Iterable[Tensor], degraded: Iterable[Tensor], gather: Callable[[Tensor], Tensor] = Tensor.cpu
    ) -> None:
        """Set the features' mean and scale from batches of train images, so that kernels get values around 1.

        `gather` concatenates the rows of all processes, each of which has a part of the batches.

        The scale of a feature is its standard deviation over the clean images, or larger if degradations shift the
        feature so far that a slight blur would hide every other difference.
        """
        none = torch.empty(0, NUM_FEATURES, device=self.mean.device)  # a process may have no batch
        pooled = gather(torch.cat([none, *(self._pooled(image) for image in clean)])).double()
        moved = gather(torch.cat([none, *(self._pooled(image) for image in degraded)])).double() - pooled.mean(dim=0)
        scale = pooled.std(dim=0, correction=0)
        # Otherwise a feature that hardly varies on real images would dominate the distances of unusual ones.
        scale = scale.clamp_min(0.1 * float(scale.mean()) + 1e-6)
        self.mean.copy_(pooled.mean(dim=0))
        self.scale.copy_(torch.maximum(scale, moved.square().mean(dim=0).sqrt() / _MAX_SHIFT))

    def _pooled(self, image: Tensor) -> Tensor:
        return torch.cat([self.content(image), self.quality(image)], dim=1)


class _Content(nn.Module):
    """Content features (B, 96) of images (B, C, H, W).

    A 5x5 convolution of stride 2, residual blocks of stride 2 down to a grid of about 8x8, then the mean and the
    maximum over the grid. With the mean alone, a finding in a small part of the image is learnt very slowly.
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
    """Quality features (B, 32) of images (B, C, H, W).

    A perceptron on statistics of the log-magnitudes of 8x8 cosine transforms, the blocks that JPEG uses: the strength
    of each frequency and its variation over the image.

    Source: Frank et al.: Leveraging frequency analysis for deep fake image recognition, 2020, for the input.
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
    def standardise(self, batches: Iterable[Tensor], gather: Callable[[Tensor], Tensor] = Tensor.cpu) -> None:
        """Set the mean and scale of the statistics from images, before training; `gather` as for the extractor."""
        none = torch.empty(0, len(self.mean), device=self.mean.device)
        statistics = gather(torch.cat([none, *(self._statistics(image) for image in batches)])).double()
        self.mean.copy_(statistics.mean(dim=0))
        self.scale.copy_(statistics.std(dim=0, correction=0).clamp_min(1e-3))

    def _statistics(self, image: Tensor) -> Tensor:
        """Mean, deviation, first and last decile of each coefficient's log-magnitude: (B, C, H, W) -> (B, 252)."""
        channels = image.shape[1]
        basis = self.basis.repeat(channels, 1, 1, 1)
        coefficients = F.conv2d(image, basis, stride=_STRIDE, groups=channels)  # (B, C * 63, h, w)
        magnitudes = (coefficients.abs() + _OFFSET).log().flatten(2)  # (B, C * 63, h * w)
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
    """Write extractor.safetensors and extractor.json, which replace the folder's content; return the weights' SHA-256.

    `facts` are further JSON values, such as the task and the validation results.
    """
    description = {"schema": SCHEMA, "sizes": asdict(extractor.sizes), **facts}
    return save_artifact(folder, "extractor", extractor.state_dict(), description)


def load_extractor(folder: Path, dataset: str | None = None) -> tuple[DomainExtractor, str]:
    """The extractor in evaluation mode, on the CPU, and the SHA-256 of its weights.

    `dataset` is the fingerprint of the store that the extractor must be trained on; None accepts any.

    Raises:
        UserError: a file is missing or damaged, or the extractor was trained on other data.
    """
    path, description = folder / DESCRIPTION, _read_description(folder)
    if dataset is not None and description.get("dataset") != dataset:
        raise UserError(
            f"{path}: the extractor was trained on dataset {description.get('dataset')}, but the store is {dataset}; "
            f"run `{COMMAND}` again"
        )
    with parsing(path, COMMAND):
        digest: str = description["sha256"]
        tensors = read_tensors(folder, "extractor", COMMAND, digest)
        extractor = DomainExtractor(TypeAdapter(ExtractorSizes).validate_python(description["sizes"]))
        extractor.load_state_dict(tensors)
    return extractor.eval(), digest


def unrecognised_classes(folder: Path) -> tuple[str, ...]:
    """Classes that the extractor does not recognise on validation images, as extractor.json lists them.

    Raises:
        UserError: there is no extractor, or its description is damaged.
    """
    unrecognised = _read_description(folder).get("unrecognised", {})
    return tuple(unrecognised.get("classes", ()))


def _read_description(folder: Path) -> dict[str, Any]:
    """The checked content of extractor.json."""
    description = read_description(folder, "extractor", COMMAND)
    if description.get("schema") != SCHEMA:
        raise UserError(f"{folder / DESCRIPTION}: expected an extractor of schema {SCHEMA}; run `{COMMAND}` again")
    return description
