"""The few values every room passes to another.

Legend of shapes: B batch, C image channels, H W image height and width, Z latent channels,
h w latent height and width, D numbers in a latent, N images in a split.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Generator, Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one training or evaluation step, on the device they are used on."""

    image: Tensor  # (B, C, H, W) float32 in [0, 1]
    label: Tensor  # (B,) int64
    index: Tensor  # (B,) int64 on the CPU, row in the split, and so in its manifest
    mask: Tensor | None = None  # (B, 1, H, W) float32: class numbers, 0 or 1 where there are two


@dataclass(frozen=True)
class Latent:
    """What an encoder says of a batch.

    `mean` is the point a deterministic decoder call starts from; `value` is what the decoder got
    (for a variational model a draw from the posterior). Non-variational models have no `logvar`.
    """

    value: Tensor  # (B, Z, h, w) or (B, D)
    mean: Tensor  # as value
    logvar: Tensor | None = None  # as value, float32
    codes: Tensor | None = None  # (B, h, w) int64: numbers of codes, where the model has a codebook


@dataclass(frozen=True)
class ModelOutput:
    """What every model's forward returns. Models never weigh losses: `terms` are plain scalars."""

    reconstruction: Tensor  # (B, C, H, W) in [0, 1]; of a segmenter the mask's probabilities (B, K, H, W)
    latent: Latent | None  # None where the model has no latent
    terms: dict[str, Tensor] = field(default_factory=dict)  # e.g. commitment, codebook


class Decoder(Protocol):
    """All a prior needs of a model to make images."""

    conditional: bool  # whether `decode` uses the label

    def decode(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Latents (B, Z, h, w) or (B, D) -> images (B, C, H, W) in [0, 1]."""
        ...


class ImageRefiner(Protocol):
    """All that sampling needs of a refiner."""

    def draw(self, decoder: Decoder, latents: Tensor, labels: Tensor | None, generator: Generator) -> Tensor:
        """A prior's latents (B, ...), decoded and refined: images (B, C, H, W) in [0, 1]."""
        ...
