"""Spread of an image's reconstructions over draws from the posterior of a variational model."""

import torch
from torch import Tensor

from medgen.errors import UserError
from medgen.models import GenerativeModel

VARIATIONAL = ("vae", "cvae", "spatial_vae", "autoencoder_kl")  # families whose encoder gives a variance


@torch.no_grad()
def reconstruction_deviation(
    model: GenerativeModel, images: Tensor, labels: Tensor | None, num_draws: int, generator: torch.Generator
) -> Tensor:
    """Standard deviation (B, C, H, W), on the CPU, of `num_draws` decoded draws from q(z|x) of images (B, C, H, W).

    It is the part of the model's uncertainty that the latent leaves open, in grey values from 0 to 1. Detail that no
    latent can hold is not in it: that is the reconstruction error.

    Raises:
        UserError: the encoder gives no variance.
    """
    latent = model.encode(images, labels)
    if latent.logvar is None:
        raise UserError(
            "uncertainty: the encoder of this model has no variance to draw from; expected a variational model "
            f"({', '.join(VARIATIONAL)})"
        )
    deviation = torch.exp(0.5 * latent.logvar)
    mean = squares = torch.zeros_like(images, dtype=torch.float64)
    for number in range(1, num_draws + 1):  # Welford's sums hold one draw at a time
        noise = torch.randn(latent.mean.shape, generator=generator).to(images.device)
        drawn = model.decode(latent.mean + deviation * noise, labels).double()
        change = drawn - mean
        mean = mean + change / number
        squares = squares + change * (drawn - mean)
    return (squares / (num_draws - 1)).sqrt().float().cpu()
