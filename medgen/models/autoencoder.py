"""Autoencoder: the encoder and decoder of a U-Net, without its skip connections.

A U-Net with skips copies its input past the latent: the latent then carries no information to sample from.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from medgen.config import Model
from medgen.models.base import GenerativeModel, Latent
from medgen.models.grids import stage_sizes
from medgen.models.residual import spatial_latent
from medgen.nn.blocks import DoubleConv, conv, downsample, upsample
from medgen.nn.conditions import Conditions


class Stage(nn.Module):
    """A U-Net stage added to a 1×1 shortcut (Zhang et al. 2018), which replaces the skip connections.

    Skips carry the gradient around the bottleneck. Here all of it passes through the bottleneck, and training is slow
    without a shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        self.convolutions = DoubleConv(in_channels, out_channels, dims)
        self.shortcut = conv(dims, in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return self.shortcut(x) + self.convolutions(x)  # type: ignore[no-any-return]


class Autoencoder(GenerativeModel):
    """Images (B, C, H, W) <-> deterministic latents (B, Z, h, w); a prior fitted afterwards makes it generative."""

    def __init__(self, params: Model, image_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.latent_shape = spatial_latent(params, image_shape)
        dims = params.dims
        sizes = stage_sizes(image_shape[1:], min(self.latent_shape[1:]))
        channels = [min(params.base_channels * 2**i, params.max_channels) for i in range(len(sizes) + 1)]

        encoder: list[nn.Module] = [Stage(image_shape[0], channels[0], dims)]
        for before, after in pairwise(channels):
            encoder += [downsample(before, params.down, dims), Stage(before, after, dims)]
        self.encoder = nn.Sequential(*encoder, conv(dims, channels[-1], self.latent_shape[0], 1))

        decoder: list[nn.Module] = [conv(dims, self.latent_shape[0], channels[-1], 1)]
        for before, after in pairwise(reversed(channels)):
            decoder += [upsample(before, after, params.up, dims), Stage(after, after, dims)]
        self.decoder = nn.Sequential(*decoder, conv(dims, channels[0], image_shape[0], 1))

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Latent:
        """Images (B, C, H, W) -> (B, Z, h, w)."""
        latent = self.encoder(image).float()
        return Latent(value=latent, mean=latent)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, Z, h, w) -> images (B, C, H, W) in [0, 1]."""
        return torch.sigmoid(self.decoder(latent).float())
