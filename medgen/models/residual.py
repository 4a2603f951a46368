"""Encoder and decoder of residual blocks and self-attention, shared by models with a latent grid."""

import math

from torch import nn

from medgen.config import Model
from medgen.models.grids import default_grid, latent_sides, stage_sizes
from medgen.nn.blocks import ResidualBlock, SelfAttention, conv, group_norm, linear_upsample


def spatial_latent(params: Model, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Latent shape (Z, h, w) or (Z, d, h, w): as `params` set it, or the default for this image size."""
    sides = image_shape[1:]
    grid = latent_sides(sides, params.latent_size or default_grid(sides))
    return params.latent_channels or max(1, math.prod(sides) // 4 // math.prod(grid)), *grid


def residual_encoder(params: Model, image_shape: tuple[int, ...], out_channels: int) -> nn.Sequential:
    """Images (B, C, H, W) -> (B, out_channels, h, w)."""
    sizes, channels = _stages(params, image_shape)
    dims = params.dims
    layers: list[nn.Module] = [conv(dims, image_shape[0], channels[0], 7, stride=2)]
    previous = channels[0]
    for i, (size, width) in enumerate(zip(sizes, channels, strict=True)):
        for block in range(params.blocks_per_stage):
            layers.append(ResidualBlock(previous, width, stride=2 if i > 0 and block == 0 else 1, dims=dims))
            previous = width
        if size in params.attention_resolutions:
            layers.append(SelfAttention(width, dims=dims))
    layers += [group_norm(previous), nn.SiLU(), conv(dims, previous, out_channels)]
    return nn.Sequential(*layers)


def residual_decoder(params: Model, image_shape: tuple[int, ...], in_channels: int) -> nn.Sequential:
    """Latents (B, in_channels, h, w) -> logits (B, C, H, W)."""
    sizes, channels = _stages(params, image_shape)
    dims, previous = params.dims, channels[-1]
    layers: list[nn.Module] = [conv(dims, in_channels, previous)]
    for i, (size, width) in enumerate(zip(reversed(sizes), reversed(channels), strict=True)):
        if i > 0:
            layers.append(linear_upsample(dims))
        for _ in range(params.blocks_per_stage):
            layers.append(ResidualBlock(previous, width, dims=dims))
            previous = width
        if size in params.attention_resolutions:
            layers.append(SelfAttention(width, dims=dims))
    last = max(previous // 2, 8)
    layers += [linear_upsample(dims), ResidualBlock(previous, last, dims=dims), group_norm(last), nn.SiLU()]
    return nn.Sequential(*layers, conv(dims, last, image_shape[0]))


def _stages(params: Model, image_shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Sizes of the grids down to the latent one, and the channels at each."""
    sizes = stage_sizes(image_shape[1:], min(spatial_latent(params, image_shape)[1:]))
    return sizes, [min(params.base_channels * 2**i, params.max_channels) for i in range(len(sizes))]
