"""The autoencoder of latent diffusion (Rombach et al. 2022), layer for layer diffusers' AutoencoderKL.

Modules have diffusers' names, so that the state dict is the one of its checkpoints and `medgen export` only writes it.
Images are in [-1, 1] inside the network, as published weights expect.
"""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from medgen.config import Model
from medgen.models.base import GenerativeModel, Latent, gaussian_latent
from medgen.models.grids import stage_sizes
from medgen.models.residual import spatial_latent
from medgen.nn.conditions import Conditions

LOGVAR_RANGE = (-30.0, 20.0)  # of the published models


def block_channels(params: Model, image_shape: tuple[int, ...]) -> list[int]:
    """Channels at each resolution, from the image's to the latent's."""
    num_stages = len(stage_sizes(image_shape[1:], min(spatial_latent(params, image_shape)[1:])))
    return [min(params.base_channels * 2**i, params.max_channels) for i in range(num_stages + 1)]


def norm_groups(channels: list[int]) -> int:
    """Groups of every GroupNorm: 32, as published, or the most that divide all channels."""
    return math.gcd(32, *channels)


class AutoencoderKL(GenerativeModel):
    """Images (B, C, H, W) <-> latents (B, Z, h, w), H = h · 2^stages."""

    encoder_parts = ("encoder", "quant_conv")

    def __init__(self, params: Model, image_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.latent_shape = spatial_latent(params, image_shape)
        latent_channels, channels = self.latent_shape[0], block_channels(params, image_shape)
        sizes = (channels, params.blocks_per_stage, norm_groups(channels))
        self.encoder = Encoder(image_shape[0], 2 * latent_channels, *sizes)
        self.decoder = Decoder(latent_channels, image_shape[0], *sizes)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Latent:
        """Images (B, C, H, W) -> a Gaussian over (B, Z, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(2.0 * image - 1.0)).chunk(2, dim=1)
        return gaussian_latent(mean, logvar.float().clamp(*LOGVAR_RANGE), self.training)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Conditions | None = None) -> Tensor:
        """Latents (B, Z, h, w) -> images (B, C, H, W) in [0, 1]."""
        image: Tensor = (self.decoder(self.post_quant_conv(latent)).float() + 1.0) / 2.0
        clamped = image.clamp(0.0, 1.0)
        # in training the gradient passes the clamp: beyond it a pixel could not return
        return clamped.detach() + (image - image.detach()) if self.training else clamped


class Encoder(nn.Module):
    """(B, in, H, W) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, channels: list[int], num_blocks: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        levels = pairwise([channels[0], *channels])
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            Level(before, after, num_blocks, groups, Downsample if i < last else None)
            for i, (before, after) in enumerate(levels)
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the levels from the image's resolution to the latent's."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """(B, in, h, w) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, channels: list[int], num_blocks: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(channels[-1], groups)
        levels = pairwise([channels[-1], *reversed(channels)])
        last = len(channels) - 1
        self.up_blocks = nn.ModuleList(
            Level(before, after, num_blocks + 1, groups, Upsample if i < last else None)
            for i, (before, after) in enumerate(levels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the levels from the latent's resolution to the image's."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        groups: int,
        resample: "type[Downsample] | type[Upsample] | None",
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_blocks]
        self.resnets = nn.ModuleList(ResnetBlock(before, after, groups) for before, after in pairwise(widths))
        name = "upsamplers" if resample is Upsample else "downsamplers"
        self.add_module(name, nn.ModuleList([] if resample is None else [resample(out_channels)]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W), at half or double the resolution."""
        for part in self.children():
            for layer in part.children():
                x = layer(x)
        return x


class MidBlock(nn.Module):
    """Residual block, self-attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))  # type: ignore[no-any-return]


class ResnetBlock(nn.Module):
    """Twice GroupNorm, SiLU and convolution, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.conv_shortcut(x) + residual  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention with one head between all positions of a grid, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        positions = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        query, key, value = (layer(positions)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.to_out[0](attended).transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
