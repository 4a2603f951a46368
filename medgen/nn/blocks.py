"""Normalisation, residual block, self-attention and resampling of convolutional networks.

Shapes: B batch, C channels, H W grid, E dimensions of a condition.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from medgen.nn.parallel import Dropout


def conv2d(in_channels: int, out_channels: int, stride: int = 1, single_position: bool = False) -> nn.Conv2d:
    """3×3 convolution that keeps the grid, or halves it with `stride` 2; 1×1 on a grid of a single position."""
    size = 1 if single_position else 3
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2)


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
        single_position: the grid is 1×1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        condition_dim: int = 0,
        dropout: float = 0.0,
        single_position: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, single_position)
        self.conv1 = conv2d(in_channels, out_channels, stride, single_position)
        self.film = nn.Linear(condition_dim, 2 * out_channels) if condition_dim else None
        self.norm2 = group_norm(out_channels, single_position)
        self.dropout = Dropout(dropout)
        self.conv2 = conv2d(out_channels, out_channels, single_position=single_position)
        nn.init.zeros_(self.conv2.weight)  # the block starts as its shortcut, which lets deep stacks train at once
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.stride = stride

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, in, H, W), conditions (B, E) -> (B, out, H / stride, W / stride)."""
        residual = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.film is not None:
            scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)  # each (B, out, 1, 1)
            residual = residual * (1.0 + scale) + shift
        residual = self.conv2(self.dropout(F.silu(residual)))
        # pooling before the 1×1 shortcut uses every pixel; a strided 1×1 would drop three of four
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        return self.shortcut(shortcut) + residual  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Self-attention between all positions of a grid, added to its input (Vaswani et al. 2017).

    Args:
        channels: C.
        num_heads: None for the most heads of 64 channels or more.
    """

    def __init__(self, channels: int, num_heads: int | None = None) -> None:
        super().__init__()
        most = max(1, channels // 64)
        self.num_heads = num_heads or next(heads for heads in range(most, 0, -1) if channels % heads == 0)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.num_heads, c // self.num_heads, h * w)
        query, key, value = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, H·W, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.project(attended.transpose(-1, -2).reshape(b, c, h, w))  # type: ignore[no-any-return]


class DoubleConv(nn.Module):
    """Twice 3×3 convolution, GroupNorm and ReLU: a U-Net stage (Ronneberger et al. 2015, without norm there)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
            layers += [convolution, group_norm(out_channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return self.layers(x)  # type: ignore[no-any-return]


def downsample(channels: int, kind: str) -> nn.Module:
    """(B, C, H, W) -> (B, C, H/2, W/2), by max-pooling ("maxpool") or a strided convolution ("strided")."""
    return nn.MaxPool2d(2) if kind == "maxpool" else conv2d(channels, channels, stride=2)


def upsample(in_channels: int, out_channels: int, kind: str) -> nn.Module:
    """(B, in, H, W) -> (B, out, 2H, 2W), by a transposed convolution ("transposed") or bilinearly ("upsample")."""
    if kind == "transposed":
        return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
    return nn.Sequential(bilinear_upsample(), conv2d(in_channels, out_channels))


def bilinear_upsample() -> nn.Upsample:
    """(B, C, H, W) -> (B, C, 2H, 2W), without the checkerboard artefacts of a transposed convolution."""
    return nn.Upsample(scale_factor=2.0, mode="bilinear")
