"""Normalisation, residual block, self-attention and resampling of convolutional networks, for images and volumes.

The number of sides of a grid, `dims`, chooses the layers: 2 for images, 3 for volumes.

Shapes: B batch, C channels, H W grid (of a volume D H W), E dimensions of a condition.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from medgen.nn.parallel import Dropout

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def conv(
    dims: int, in_channels: int, out_channels: int, size: int = 3, stride: int = 1, bias: bool = True
) -> nn.Conv2d | nn.Conv3d:
    """Convolution of an odd size that keeps the grid, or halves it with `stride` 2."""
    return CONVOLUTIONS[dims](in_channels, out_channels, size, stride=stride, padding=size // 2, bias=bias)


def group_norm(channels: int, single_position: bool = False) -> nn.GroupNorm:
    """GroupNorm with groups of four channels or more, 32 groups at most (Wu & He 2018).

    A grid of a single position has one group: the statistics of a few values would be too noisy.
    """
    groups = 1 if single_position else math.gcd(32, max(1, channels // 4), channels)
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU and convolution, added to a shortcut.

    Args:
        in_channels, out_channels: of input and output.
        stride: 2 halves the grid.
        condition_dim: E, size of a condition that scales and shifts the second norm (FiLM, Perez et al. 2018); 0: none.
        dropout: before the second convolution.
        single_position: the grid is 1×1, so the convolutions are too.
        dims: sides of the grid.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        condition_dim: int = 0,
        dropout: float = 0.0,
        single_position: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        size = 1 if single_position else 3
        self.norm1 = group_norm(in_channels, single_position)
        self.conv1 = conv(dims, in_channels, out_channels, size, stride)
        self.film = nn.Linear(condition_dim, 2 * out_channels) if condition_dim else None
        self.norm2 = group_norm(out_channels, single_position)
        self.dropout = Dropout(dropout)
        self.conv2 = conv(dims, out_channels, out_channels, size)
        nn.init.zeros_(self.conv2.weight)  # the block starts as its shortcut, which lets deep stacks train at once
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else conv(dims, in_channels, out_channels, 1)
        self.pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
        self.stride = stride

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, in, H, W), conditions (B, E) -> (B, out, H / stride, W / stride)."""
        residual = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            film = self.film(condition)
            scale, shift = film.view(*film.shape, *[1] * (x.dim() - 2)).chunk(2, dim=1)  # each (B, out, 1, 1)
            residual = residual * (1.0 + scale) + shift
        residual = self.conv2(self.dropout(F.silu(residual)))
        # pooling before the 1×1 shortcut uses every pixel; a strided 1×1 would drop three of four
        shortcut = self.pool(x, 2) if self.stride == 2 else x
        return self.shortcut(shortcut) + residual  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Self-attention between all positions of a grid, added to its input (Vaswani et al. 2017).

    Args:
        channels: C.
        num_heads: None for the most heads of 64 channels or more.
        dims: sides of the grid.
    """

    def __init__(self, channels: int, num_heads: int | None = None, dims: int = 2) -> None:
        super().__init__()
        most = max(1, channels // 64)
        self.num_heads = num_heads or next(heads for heads in range(most, 0, -1) if channels % heads == 0)
        self.norm = group_norm(channels)
        self.qkv = conv(dims, channels, 3 * channels, 1)
        self.project = conv(dims, channels, channels, 1)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        b, c, *sides = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.num_heads, c // self.num_heads, math.prod(sides))
        query, key, value = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, H·W, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.project(attended.transpose(-1, -2).reshape(x.shape))  # type: ignore[no-any-return]


class DoubleConv(nn.Module):
    """Twice 3×3 convolution, GroupNorm and ReLU: a U-Net stage (Ronneberger et al. 2015, without norm there)."""

    def __init__(self, in_channels: int, out_channels: int, dims: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [conv(dims, channels, out_channels, bias=False), group_norm(out_channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return self.layers(x)  # type: ignore[no-any-return]


def downsample(channels: int, kind: str, dims: int = 2) -> nn.Module:
    """(B, C, H, W) -> (B, C, H/2, W/2), by max-pooling ("maxpool") or a strided convolution ("strided")."""
    if kind == "maxpool":
        return nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
    return conv(dims, channels, channels, stride=2)


def upsample(in_channels: int, out_channels: int, kind: str, dims: int = 2) -> nn.Module:
    """(B, in, H, W) -> (B, out, 2H, 2W), by a transposed convolution ("transposed") or linearly ("upsample")."""
    if kind == "transposed":
        return TRANSPOSED[dims](in_channels, out_channels, 2, stride=2)
    return nn.Sequential(linear_upsample(dims), conv(dims, in_channels, out_channels))


def linear_upsample(dims: int = 2) -> nn.Upsample:
    """(B, C, H, W) -> (B, C, 2H, 2W), without the checkerboard artefacts of a transposed convolution."""
    return nn.Upsample(scale_factor=2.0, mode="bilinear" if dims == 2 else "trilinear")


def to_channels(images: Tensor, patch: int) -> Tensor:
    """Move the pixels of patches to channels: (B, C, H, W) -> (B, C·P², H / P, W / P), with P³ for volumes."""
    if images.dim() == 4:
        return F.pixel_unshuffle(images, patch)
    b, c, *sides = images.shape
    d, h, w = (side // patch for side in sides)
    return images.reshape(b, c, d, patch, h, patch, w, patch).permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def from_channels(patches: Tensor, patch: int) -> Tensor:
    """Inverse of `to_channels`."""
    if patches.dim() == 4:
        return F.pixel_shuffle(patches, patch)
    b, c, *grid = patches.shape
    pixels = patches.reshape(b, c // patch**3, patch, patch, patch, *grid).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return pixels.reshape(b, c // patch**3, *(patch * side for side in grid))
