"""VAE with a flat latent, and a conditional variant.

Encoder: strided convolutions with BatchNorm down to a grid of at most 7 a side, one linear layer to a Gaussian over a
vector. Decoder: one linear layer, transposed convolutions with BatchNorm, sigmoid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgen.config import Model
from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError
from medgen.models.base import GenerativeModel, Latent, gaussian_latent, soft_bound
from medgen.models.grids import flat_sizes, latent_sides
from medgen.nn.blocks import CONVOLUTIONS, TRANSPOSED, conv
from medgen.nn.conditions import Conditions, grid_channels
from medgen.nn.parallel import BatchNorm

DEFAULT_LATENT_DIM = 128  # D if model.latent_channels is null


class VAE(GenerativeModel):
    """Images (B, C, H, W) <-> latents (B, D), D = `latent_channels` (Kingma & Welling 2014)."""

    encoder_parts: tuple[str, ...] = ("encoder", "to_latent")

    def __init__(
        self,
        params: Model,
        image_shape: tuple[int, ...],
        num_classes: int,
        embedding: int = 0,
        space: ConditionSpace | None = None,
    ) -> None:
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
        entering = image_shape[0] + (0 if space is None else space.map_channels)
        encoder: list[nn.Module] = []
        for before, after in zip([entering, *channels[:-1]], channels, strict=True):
            encoder += [convolution(before, after, 4, stride=2, padding=1), BatchNorm(after), nn.LeakyReLU(0.2)]
        self.encoder = nn.Sequential(*encoder, nn.Flatten())
        self.to_latent = nn.Linear(features + embedding, 2 * latent_dim)

        self.from_latent = nn.Linear(latent_dim + embedding, features)
        entering = channels[-1] + grid_channels(space, grid)
        decoder: list[nn.Module] = []
        widths = [entering, *reversed(channels[:-1])]
        for before, after in zip(widths, [*widths[1:], channels[0]], strict=True):
            decoder += [transposed(before, after, 4, stride=2, padding=1), BatchNorm(after), nn.ReLU()]
        self.decoder = nn.Sequential(*decoder, conv(params.dims, channels[0], image_shape[0]))

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Latent:
        """Images (B, C, H, W) -> a Gaussian over (B, D)."""
        given = self._given(image, conditions)
        if given is not None and (maps := given.on_image(image.shape[2:])) is not None:
            image = torch.cat([image, maps], dim=1)
        features = self._embed(self.encoder(image), label, given)
        mean, logvar = self.to_latent(features).chunk(2, dim=1)
        return gaussian_latent(mean, soft_bound(logvar, self.logvar_bound), self.training)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, D) -> images (B, C, H, W) in [0, 1]."""
        given = self._given(latent, conditions)
        grid = self.from_latent(self._embed(latent, label, given)).unflatten(1, self.grid)
        if given is not None and (maps := given.on_grid(self.grid[1:]).maps) is not None:
            grid = torch.cat([grid, maps], dim=1)
        return torch.sigmoid(self.decoder(grid).float())

    def _given(self, rows: Tensor, conditions: Conditions | None) -> Conditions | None:
        """Conditions of images or latents (B, ...), on their device; None for a model without a `space`."""
        if self.space is None:
            return None
        if conditions is None:
            return Conditions.unknown(self.space, rows.shape[0], rows.device)  # len() has a fixed value in an export
        return conditions.to(rows.device)

    def _embed(self, features: Tensor, label: Tensor | None, given: Conditions | None) -> Tensor:
        """Features (B, F) unchanged; `ConditionalVAE` appends an embedding of label and conditions."""
        return features


class ConditionalVAE(VAE):
    """A VAE whose encoder and decoder also take an embedding of label and conditions (Sohn et al. 2015).

    The latent then encodes what these do not, such as the slant of a digit. The embedding of label -1, of no label and
    of unknown conditions is zero. Maps are further channels of the image in the encoder, and of the first grid in the
    decoder.
    """

    def __init__(
        self, params: Model, image_shape: tuple[int, ...], num_classes: int, space: ConditionSpace | None = None
    ) -> None:
        if num_classes == 0 and space is None:
            raise UserError(
                "model.name: cvae needs labels or preprocess.conditions, and the dataset has neither; add class "
                "folders or a manifest with labels (docs/data.md), or set model.name: vae"
            )
        num_values = num_classes + (0 if space is None else space.size)  # 0 if maps are the only conditions
        width = params.label_channels if num_values else 0
        super().__init__(params, image_shape, num_classes, width, space)
        self.num_classes, self.space = num_classes, space
        self.conditional = num_classes > 0
        self.encoder_parts = ("encoder", "to_latent", *(("embedding",) if num_values else ()))
        self.embedding = nn.Linear(num_values, width, bias=False) if num_values else None

    def _embed(self, features: Tensor, label: Tensor | None, given: Conditions | None) -> Tensor:
        if self.embedding is None:
            return features
        values = features.new_zeros(features.shape[0], self.num_classes)
        if label is not None and self.conditional:
            one_hot = F.one_hot(label.clamp(min=0), self.num_classes).to(features.dtype)
            values = one_hot * (label >= 0)[:, None]
        if given is not None:
            values = torch.cat([values, given.values.to(features.dtype)], dim=1)
        return torch.cat([features, self.embedding(values)], dim=1)
