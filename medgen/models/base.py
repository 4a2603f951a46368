"""Interface of all models, and the values that they return.

Legend of shapes: B batch, C image channels, H W image height and width, Z latent channels,
h w latent height and width, D dimensions of a latent, N images in a split.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn


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


class ImageModel(nn.Module, ABC):
    """A network that is trained on images (B, C, H, W) in [0, 1] towards a target of the same batch."""

    target: Literal["image", "mask"] = "image"  # what its output is compared with

    @abstractmethod
    def forward(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """One pass for the objective."""

    @abstractmethod
    def predict(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """One pass without randomness, for judging."""


class GenerativeModel(ImageModel):
    """A model of images (B, C, H, W) in [0, 1] with latents of `latent_shape`.

    A new model implements `encode` and `decode` and sets `latent_shape`; the rest follows.
    """

    latent_shape: tuple[int, ...]
    conditional = False  # whether encode and decode use the label

    @property
    def codes(self) -> Tensor | None:
        """Vectors (K, Z) that every latent (Z, h, w) is made of; None for models without a codebook."""
        return None

    @abstractmethod
    def encode(self, image: Tensor, label: Tensor | None = None) -> Latent:
        """Images (B, C, H, W), labels (B,) -> latents; in training mode `value` is a posterior draw."""

    @abstractmethod
    def decode(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Latents (B, *latent_shape) -> images (B, C, H, W) in [0, 1]."""

    def forward(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """One pass for the objective."""
        latent = self.encode(image, label)
        return ModelOutput(reconstruction=self.decode(latent.value, label), latent=latent)

    def predict(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        """One pass without randomness: the posterior mean, decoded."""
        latent = self.encode(image, label)
        return ModelOutput(reconstruction=self.decode(latent.mean, label), latent=latent)

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Images through the posterior mean and back, without randomness: (B, C, H, W)."""
        return self.predict(image, label).reconstruction

    def sample(self, n: int, label: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """`n` images decoded from N(0, I) latents; fitted priors do better (see medgen/priors)."""
        weight = next(self.parameters())
        latent = torch.randn(n, *self.latent_shape, generator=generator)
        return self.decode(latent.to(weight.device), label)


def soft_bound(value: Tensor, bound: float) -> Tensor:
    """`bound * tanh(value / bound)` in float32: within ±bound, with a gradient everywhere.

    A log-variance above 88 makes exp overflow (the infinite loss of system A); a hard clamp
    would stop that too, but gives no gradient that leads back.
    """
    return bound * torch.tanh(value.float() / bound)


def gaussian_latent(mean: Tensor, logvar: Tensor, training: bool) -> Latent:
    """Reparameterised posterior (Kingma & Welling 2014): a draw in training, the mean otherwise."""
    mean = mean.float()  # KL and sampling stay in float32 under autocast
    value = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar) if training else mean
    return Latent(value=value, mean=mean, logvar=logvar)
