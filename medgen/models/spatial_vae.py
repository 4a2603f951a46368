"""VAE with a latent grid instead of a flat vector.

Encoder: 7×7 convolution of stride 2, then residual stages that halve the grid and double the channels, with
self-attention at chosen resolutions, to a Gaussian over the latent grid. Decoder: bilinear upsampling and residual
blocks, then a sigmoid.
"""

import torch
from torch import Tensor

from medgen.config import Model
from medgen.models.base import GenerativeModel, Latent, gaussian_latent, soft_bound
from medgen.models.residual import residual_decoder, residual_encoder, spatial_latent
from medgen.nn.conditions import Conditions


class SpatialVAE(GenerativeModel):
    """Images (B, C, H, W) <-> latents (B, Z, h, w), min(h, w) = `latent_size`, H = h · 2^stages."""

    def __init__(self, params: Model, image_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.latent_shape = spatial_latent(params, image_shape)
        self.logvar_bound = params.logvar_bound
        self.encoder = residual_encoder(params, image_shape, 2 * self.latent_shape[0])
        self.decoder = residual_decoder(params, image_shape, self.latent_shape[0])

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Latent:
        """Images (B, C, H, W) -> a Gaussian over (B, Z, h, w)."""
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return gaussian_latent(mean, soft_bound(logvar, self.logvar_bound), self.training)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, Z, h, w) -> images (B, C, H, W) in [0, 1]."""
        return torch.sigmoid(self.decoder(latent).float())
