"""Encoder and decoder of residual blocks and self-attention, shared by models with a latent grid."""

from torch import nn

from medgen.config import Model
from medgen.models.grids import default_grid, latent_sides, stage_sizes
from medgen.nn.blocks import ResidualBlock, SelfAttention, bilinear_upsample, group_norm


def spatial_latent(params: Model, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latent shape (Z, h, w): as `params` set it, or the default for this image size."""
    sides = image_shape[1:]
    height, width = latent_sides(sides, params.latent_size or default_grid(sides))
    return params.latent_channels or max(1, sides[0] * sides[1] // 4 // (height * width)), height, width


def residual_encoder(params: Model, image_shape: tuple[int, int, int], out_channels: int) -> nn.Sequential:
    """Images (B, C, H, W) -> (B, out_channels, h, w)."""
    sizes, channels = _stages(params, image_shape)
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], channels[0], 7, stride=2, padding=3)]
    previous = channels[0]
    for i, (size, width) in enumerate(zip(sizes, channels, strict=True)):
        for block in range(params.blocks_per_stage):
            layers.append(ResidualBlock(previous, width, stride=2 if i > 0 and block == 0 else 1))
            previous = width
        if size in params.attention_resolutions:
            layers.append(SelfAttention(width))
    layers += [group_norm(previous), nn.SiLU(), nn.Conv2d(previous, out_channels, 3, padding=1)]
    return nn.Sequential(*layers)


def residual_decoder(params: Model, image_shape: tuple[int, int, int], in_channels: int) -> nn.Sequential:
    """Latents (B, in_channels, h, w) -> logits (B, C, H, W)."""
    sizes, channels = _stages(params, image_shape)
    previous = channels[-1]
    layers: list[nn.Module] = [nn.Conv2d(in_channels, previous, 3, padding=1)]
    for i, (size, width) in enumerate(zip(reversed(sizes), reversed(channels), strict=True)):
        if i > 0:
            layers.append(bilinear_upsample())
        for _ in range(params.blocks_per_stage):
            layers.append(ResidualBlock(previous, width))
            previous = width
        if size in params.attention_resolutions:
            layers.append(SelfAttention(width))
    last = max(previous // 2, 8)
    layers += [bilinear_upsample(), ResidualBlock(previous, last), group_norm(last), nn.SiLU()]
    layers += [nn.Conv2d(last, image_shape[0], 3, padding=1)]
    return nn.Sequential(*layers)


def _stages(params: Model, image_shape: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """Sizes of the grids down to the latent one, and the channels at each."""
    sizes = stage_sizes(image_shape[1:], min(spatial_latent(params, image_shape)[1:]))
    return sizes, [min(params.base_channels * 2**i, params.max_channels) for i in range(len(sizes))]
