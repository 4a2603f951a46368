"""What every model is to the training loop, and what every generative one can do besides."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from medgen.types import Latent, ModelOutput


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
