"""Models that were trained on patches, applied to whole images or volumes window by window.

A window has the size of the training's patches, so that the statistics of normalisation layers are those of the
training, and memory does not grow with the image. Windows overlap by half; where they do, results are averaged with
Gaussian weights, which are highest in the middle of a window (Isensee et al., nnU-Net, 2021).

Shapes: as in medgen/models/base.py; the latent grid (h, w) is the image divided by the model's stride.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.errors import UserError
from medgen.models.base import GenerativeModel, ImageModel, Latent, ModelOutput
from medgen.models.unet import UNet
from medgen.nn.conditions import Conditions
from medgen.nn.quantizer import nearest_codes

_SIGMA = 1 / 8  # of the weights, as a share of the window's side


def by_windows(model: ImageModel, patch: Sequence[int] | None, image_shape: tuple[int, ...]) -> ImageModel:
    """The model, or for one trained on smaller patches the same model applied window by window.

    Raises:
        UserError: train.patch does not fit the model or the images.
    """
    sides = image_shape[1:]
    if patch is None:
        return model
    shown, expected = " x ".join(map(str, patch)), " x ".join(map(str, sides))
    if len(patch) != len(sides) or any(size > side for size, side in zip(patch, sides, strict=False)):
        raise UserError(f"train.patch: {shown}; expected {len(sides)} sides of at most {expected}, the images' sides")
    stride = _stride(model, sides)
    if any(size % stride for size in patch):
        raise UserError(f"train.patch: {shown}; expected multiples of {stride}, the model's stride")
    if tuple(patch) == sides:
        return model
    windows = Windows(tuple(size // stride for size in patch), tuple(side // stride for side in sides), stride)
    return WindowedModel(model, windows) if isinstance(model, GenerativeModel) else WindowedSegmenter(model, windows)


def _stride(model: ImageModel, sides: tuple[int, ...]) -> int:
    """Pixels per position of the smallest grid of a model for images with these sides."""
    if isinstance(model, UNet):
        return int(2 ** len(model.downs))
    shape: tuple[int, ...] = getattr(model, "latent_shape", ())
    if len(shape) != len(sides) + 1:
        raise UserError(
            "train.patch: models with a flat latent encode whole images only; remove it, or choose a model "
            "with a latent grid, such as spatial_vae"
        )
    return int(sides[0] // shape[1])


class Windows:
    """Overlapping windows over a grid.

    Args:
        size: sides of a window, in positions of the grid.
        grid: sides of the grid.
        stride: pixels per position.
    """

    def __init__(self, size: tuple[int, ...], grid: tuple[int, ...], stride: int) -> None:
        self.size, self.grid, self.stride = size, grid, stride
        starts = [_starts(window, side) for window, side in zip(size, grid, strict=True)]
        self.starts = list(itertools.product(*starts))

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor, read: int, write: int) -> Tensor:
        """Weighted mean of the results of a function of each window of `x`.

        Args:
            function: windows (B, C, *sides) -> (B, K, *sides).
            x: (B, C, *sides).
            read: values of `x` per position of the grid: the stride for images, 1 for latents.
            write: the same of the result.
        """
        weight = gaussian_weights([write * side for side in self.size], x.device)
        total: Tensor | None = None
        weights = torch.zeros([write * side for side in self.grid], device=x.device)
        for starts in self.starts:
            found = function(x[self._part(starts, read)]).float()
            if total is None:
                total = found.new_zeros(*found.shape[:2], *weights.shape)
            part = self._part(starts, write)
            total[part] += weight * found
            weights[part] += weight
        assert total is not None
        return total / weights

    def _part(self, starts: tuple[int, ...], factor: int) -> Any:
        """The window that starts at this position, in a tensor with `factor` values per position."""
        pairs = zip(starts, self.size, strict=True)
        return (..., *(slice(factor * start, factor * (start + size)) for start, size in pairs))


def gaussian_weights(sides: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Weights of the values of a window with these sides: 1 in the middle, positive everywhere."""
    weight = torch.ones([])
    for side in sides:
        offset = (torch.arange(side) - (side - 1) / 2) / (side * _SIGMA)
        weight = weight[..., None] * torch.exp(-0.5 * offset.square())
    return weight.to(device)


def _starts(window: int, side: int) -> list[int]:
    """First positions of windows that overlap by half and cover a side."""
    count = 1 + math.ceil((side - window) / max(1, window // 2))
    return [round(number * (side - window) / max(1, count - 1)) for number in range(count)]


class WindowedModel(GenerativeModel):
    """A model with a latent grid, applied window by window; for evaluation, not for training."""

    def __init__(self, model: GenerativeModel, windows: Windows) -> None:
        super().__init__()
        self.model, self.windows = model, windows
        self.latent_shape, self.conditional = model.latent_shape, model.conditional

    @property
    def codebook(self) -> Tensor | None:
        """The model's codebook."""
        return self.model.codebook

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Latent:
        """Images (B, C, H, W) -> latents without a draw; codes are those nearest to the mean of overlapping windows."""
        is_variational = False

        def encode(window: Tensor) -> Tensor:
            nonlocal is_variational
            latent = self.model.encode(window, label)
            is_variational = latent.logvar is not None
            return latent.mean if latent.logvar is None else torch.cat([latent.mean, latent.logvar], dim=1)

        result = self.windows.apply(encode, image, self.windows.stride, 1)
        if is_variational:
            mean, logvar = result.chunk(2, dim=1)
            return Latent(value=mean, mean=mean, logvar=logvar)
        if self.codebook is None:
            return Latent(value=result, mean=result)
        codes = nearest_codes(result, self.codebook)
        nearest = F.embedding(codes, self.codebook).movedim(-1, 1)
        return Latent(value=nearest, mean=nearest, codes=codes)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, Z, h, w) -> images (B, C, H, W) in [0, 1]."""
        return self.windows.apply(lambda window: self.model.decode(window, label), latent, 1, self.windows.stride)


class WindowedSegmenter(ImageModel):
    """A model that predicts masks, applied window by window; for evaluation, not for training."""

    target = "mask"

    def __init__(self, model: ImageModel, windows: Windows) -> None:
        super().__init__()
        self.model, self.windows = model, windows

    def forward(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """Images (B, C, H, W) -> probabilities (B, K, H, W)."""
        stride = self.windows.stride
        found = self.windows.apply(lambda window: self.model.predict(window, label).prediction, image, stride, stride)
        return ModelOutput(prediction=found, latent=None)

    def predict(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """Same as `forward`."""
        return self(image, label)  # type: ignore[no-any-return]
