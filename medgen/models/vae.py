"""VAE with a flat latent, and a conditional variant.

Encoder: strided convolutions with BatchNorm down to a grid of at most 7 a side, one linear layer to a Gaussian over a
vector. Decoder: one linear layer, transposed convolutions with BatchNorm, sigmoid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgen.config import Model
from medgen.errors import UserError
from medgen.models.base import GenerativeModel, Latent, gaussian_latent, soft_bound
from medgen.models.grids import flat_sizes, latent_sides
from medgen.nn.blocks import CONVOLUTIONS, TRANSPOSED, conv
from medgen.nn.parallel import BatchNorm

DEFAULT_LATENT_DIM = 128  # D if model.latent_channels is null


class VAE(GenerativeModel):
    """Images (B, C, H, W) <-> latents (B, D), D = `latent_channels` (Kingma & Welling 2014)."""

    encoder_parts: tuple[str, ...] = ("encoder", "to_latent")

    def __init__(self, params: Model, image_shape: tuple[int, ...], num_classes: int, embedding: int = 0) -> None:
        super().__init__()
        latent_dim = params.latent_channels or DEFAULT_LATENT_DIM
        sizes = flat_sizes(image_shape[1:], params.latent_size)
        grid = latent_sides(image_shape[1:], sizes[-1])
        channels = [min(params.base_channels * 2**i, params.max_channels) for i in range(len(sizes))]
        self.latent_shape = (latent_dim,)
        self.logvar_bound = params.logvar_bound
        self.grid = (channels[-1], *grid)
        features = math.prod(self.grid)

        convolution, transposed = CONVOLUTIONS[params.dims], TRANSPOSED[params.dims]
        encoder: list[nn.Module] = []
        for before, after in zip([image_shape[0], *channels[:-1]], channels, strict=True):
            encoder += [convolution(before, after, 4, stride=2, padding=1), BatchNorm(after), nn.LeakyReLU(0.2)]
        self.encoder = nn.Sequential(*encoder, nn.Flatten())
        self.to_latent = nn.Linear(features + embedding, 2 * latent_dim)

        self.from_latent = nn.Linear(latent_dim + embedding, features)
        decoder: list[nn.Module] = []
        for before, after in zip(reversed(channels), [*reversed(channels[:-1]), channels[0]], strict=True):
            decoder += [transposed(before, after, 4, stride=2, padding=1), BatchNorm(after), nn.ReLU()]
        self.decoder = nn.Sequential(*decoder, conv(params.dims, channels[0], image_shape[0]))

    def encode(self, image: Tensor, label: Tensor | None = None) -> Latent:
        """Images (B, C, H, W) -> a Gaussian over (B, D)."""
        features = self._with_label(self.encoder(image), label)
        mean, logvar = self.to_latent(features).chunk(2, dim=1)
        return gaussian_latent(mean, soft_bound(logvar, self.logvar_bound), self.training)

    def decode(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Latents (B, D) -> images (B, C, H, W) in [0, 1]."""
        grid = self.from_latent(self._with_label(latent, label)).unflatten(1, self.grid)
        return torch.sigmoid(self.decoder(grid).float())

    def _with_label(self, features: Tensor, label: Tensor | None) -> Tensor:
        """Features (B, F) unchanged; `ConditionalVAE` appends the label's embedding."""
        return features


class ConditionalVAE(VAE):
    """A VAE whose encoder and decoder also take an embedding of the label (Sohn et al. 2015).

    The latent then encodes what the label does not, such as the slant of a digit. The embedding of label -1 and of no
    label is zero.
    """

    conditional = True
    encoder_parts = ("encoder", "to_latent", "embedding")

    def __init__(self, params: Model, image_shape: tuple[int, ...], num_classes: int) -> None:
        if num_classes == 0:
            raise UserError(
                "model.name: cvae needs labels, and the dataset has none; add class folders or a manifest with labels "
                "(docs/data.md), or set model.name: vae"
            )
        super().__init__(params, image_shape, num_classes, embedding=params.label_channels)
        self.num_classes = num_classes
        self.embedding = nn.Linear(num_classes, params.label_channels, bias=False)

    def _with_label(self, features: Tensor, label: Tensor | None) -> Tensor:
        if label is None:
            label = torch.full((len(features),), -1, device=features.device)
        one_hot = F.one_hot(label.clamp(min=0), self.num_classes).to(features.dtype)
        return torch.cat([features, self.embedding(one_hot * (label >= 0)[:, None])], dim=1)
