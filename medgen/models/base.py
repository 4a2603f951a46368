"""Interface of all models, and the values that they return.

Legend of shapes: B batch, C image channels, H W image height and width, Z latent channels,
h w latent height and width, D dimensions of a latent, K codes of a codebook or classes of a mask.
Volumes (B, C, D, H, W) have a depth D before the height, and latents (B, Z, d, h, w).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from medgen.data.conditions import ConditionSpace
from medgen.nn.conditions import Conditions
from medgen.nn.parallel import randn_like


@dataclass(frozen=True)
class Latent:
    """An encoder's output for a batch.

    Evaluation decodes `mean`. Training decodes `value`, for a variational model a draw from the posterior.
    """

    value: Tensor  # (B, Z, h, w) or (B, D)
    mean: Tensor  # as value
    logvar: Tensor | None = None  # as value, float32; of variational models
    codes: Tensor | None = None  # (B, h, w) int64 indices into the codebook; of models with one


@dataclass(frozen=True)
class ModelOutput:
    """Output of every model's forward pass. Models never weigh losses: `terms` are plain scalars."""

    prediction: Tensor  # reconstruction (B, C, H, W) in [0, 1], or a segmenter's mask probabilities (B, K, H, W)
    latent: Latent | None  # None for a segmenter
    terms: dict[str, Tensor] = field(default_factory=dict)  # e.g. commitment, codebook


class Decoder(Protocol):
    """The part of a model that a prior needs to make images."""

    conditional: bool  # True if `decode` uses the label
    space: ConditionSpace | None  # conditions that `decode` uses; None: it ignores them

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, Z, h, w) or (B, D) -> images (B, C, H, W) in [0, 1]."""
        ...


class ImageModel(nn.Module, ABC):
    """A network trained on images (B, C, H, W) in [0, 1] to predict a target: the image itself or its mask."""

    target: Literal["image", "mask"] = "image"
    encoder_parts: tuple[str, ...] = ("encoder",)  # attributes with the modules that `train.freeze: encoder` freezes

    @abstractmethod
    def forward(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """One pass for the objective."""

    @abstractmethod
    def predict(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """One pass without randomness, for evaluation."""


class GenerativeModel(ImageModel):
    """A model of images (B, C, H, W) in [0, 1] with latents of `latent_shape`.

    `conditions` are of the images, on any device; None if they are unknown. Only models with a `space` use them.

    A new model implements `encode` and `decode` and sets `latent_shape`.
    """

    latent_shape: tuple[int, ...]
    conditional = False  # True if encode and decode use the label
    space: ConditionSpace | None = None  # conditions that encode and decode use; None: they ignore them

    @property
    def codebook(self) -> Tensor | None:
        """Vectors (K, Z) that every latent (Z, h, w) is made of; None for models without a codebook."""
        return None

    @abstractmethod
    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Latent:
        """Images (B, C, H, W), labels (B,) -> latents; in training mode `value` is a posterior draw."""

    @abstractmethod
    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, *latent_shape) -> images (B, C, H, W) in [0, 1]."""

    def forward(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """One pass for the objective."""
        latent = self.encode(image, label, conditions)
        return ModelOutput(prediction=self.decode(latent.value, label, conditions), latent=latent)

    def predict(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> ModelOutput:
        """One pass without randomness: the posterior mean, decoded."""
        latent = self.encode(image, label, conditions)
        return ModelOutput(prediction=self.decode(latent.mean, label, conditions), latent=latent)

    def reconstruct(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Images (B, C, H, W), encoded to the posterior mean and decoded without randomness."""
        return self.predict(image, label, conditions).prediction

    def sample(self, n: int, label: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """`n` images decoded from N(0, I) latents; fitted priors give better ones (see medgen/priors)."""
        weight = next(self.parameters())
        latent = torch.randn(n, *self.latent_shape, generator=generator)
        return self.decode(latent.to(weight.device), label)


def soft_bound(value: Tensor, bound: float) -> Tensor:
    """`bound * tanh(value / bound)` in float32: within ±bound, with a gradient everywhere.

    exp overflows for a log-variance above 88, which makes the loss infinite. A hard clamp prevents that too, but has no
    gradient beyond its bounds.
    """
    return bound * torch.tanh(value.float() / bound)


def gaussian_latent(mean: Tensor, logvar: Tensor, training: bool) -> Latent:
    """Reparameterised posterior (Kingma & Welling 2014): a draw in training, the mean otherwise."""
    mean = mean.float()  # KL and sampling stay in float32 under autocast
    value = mean + randn_like(mean) * torch.exp(0.5 * logvar) if training else mean
    return Latent(value=value, mean=mean, logvar=logvar)
