"""Spatial VAE: a latent grid in place of a flat vector (system C: 128 px, 4×4×64).

Encoder: Conv 7×7/2, then residual stages that halve the grid and double the channels, with
self-attention at chosen resolutions, to a Gaussian over a latent grid. Decoder: the way back by
bilinear upsampling and residual blocks, sigmoid at the end.
"""

import torch
from torch import Tensor, nn

from medgen.config import Model
from medgen.errors import UserError
from medgen.models.base import GenerativeModel, gaussian_latent, soft_bound
from medgen.models.blocks import ResidualBlock, SelfAttention, Upsample, group_norm
from medgen.types import Latent


class SpatialVAE(GenerativeModel):
    """Images (B, C, S, S) <-> latents (B, Z, h, h), h = `latent_size`, S = h · 2^stages."""

    def __init__(self, params: Model, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        image_channels, image_size, _ = image_shape
        latent_size = params.latent_size or default_grid(image_size)
        latent_channels = params.latent_channels or max(1, image_size**2 // 4 // latent_size**2)
        sizes = stage_sizes(image_size, latent_size)  # S/2, S/4, …, h
        channels = [min(params.base_channels * 2**i, params.max_channels) for i in range(len(sizes))]
        attention = set(params.attention_resolutions)
        self.latent_shape = (latent_channels, latent_size, latent_size)
        self.logvar_bound = params.logvar_bound

        encoder: list[nn.Module] = [nn.Conv2d(image_channels, channels[0], 7, stride=2, padding=3)]
        previous = channels[0]
        for i, (size, width) in enumerate(zip(sizes, channels, strict=True)):
            for block in range(params.blocks_per_stage):
                encoder.append(ResidualBlock(previous, width, stride=2 if i > 0 and block == 0 else 1))
                previous = width
            if size in attention:
                encoder.append(SelfAttention(width))
        encoder += [group_norm(previous), nn.SiLU(), nn.Conv2d(previous, 2 * latent_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*encoder)

        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, previous, 3, padding=1)]
        for i, (size, width) in enumerate(zip(reversed(sizes), reversed(channels), strict=True)):
            if i > 0:
                decoder.append(Upsample())
            for _ in range(params.blocks_per_stage):
                decoder.append(ResidualBlock(previous, width))
                previous = width
            if size in attention:
                decoder.append(SelfAttention(width))
        last = max(previous // 2, 8)
        decoder += [Upsample(), ResidualBlock(previous, last), group_norm(last), nn.SiLU()]
        decoder += [nn.Conv2d(last, image_channels, 3, padding=1)]
        self.decoder = nn.Sequential(*decoder)

    def encode(self, image: Tensor, label: Tensor | None = None) -> Latent:
        """Images (B, C, S, S) -> a Gaussian over (B, Z, h, h)."""
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return gaussian_latent(mean, soft_bound(logvar, self.logvar_bound), self.training)

    def decode(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Latents (B, Z, h, h) -> images (B, C, S, S) in [0, 1]."""
        return torch.sigmoid(self.decoder(latent).float())


def default_grid(image_size: int) -> int:
    """Side of the latent grid: 8 up to 64 px, measured on chest X-rays (docs/results.md); an eighth beyond, a guess."""
    size = image_size
    while size % 2 == 0 and size > max(8, image_size // 8):
        size //= 2
    return size


def stage_sizes(image_size: int, latent_size: int) -> list[int]:
    """Grid sides after each halving, from image_size / 2 down to latent_size.

    Raises:
        UserError: image_size is not latent_size times a power of two.
    """
    sizes = []
    size = image_size
    while size > latent_size and size % 2 == 0:
        size //= 2
        sizes.append(size)
    if not sizes or sizes[-1] != latent_size:
        raise UserError(
            f"model.latent_size: {latent_size} does not fit images of {image_size} px; "
            f"expected {image_size} divided by 2, 4, 8, …; set model.latent_size or preprocess.image_size"
        )
    return sizes
