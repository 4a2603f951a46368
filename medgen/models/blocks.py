"""Building blocks of convolutional models: residual block, self-attention, resampling."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of four channels or more, 32 groups at most (Wu & He 2018)."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3×3 convolution, twice, beside a shortcut; `stride` 2 halves the grid."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # the block starts as its shortcut: deep stacks train at once
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H / stride, W / stride)."""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        # pooling before the 1×1 shortcut keeps every pixel's say; a strided 1×1 would drop three of four
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        return self.shortcut(shortcut) + residual  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Residual self-attention over the grid, heads of up to 64 channels (Vaswani et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = next(heads for heads in range(max(1, channels // 64), 0, -1) if channels % heads == 0)
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


class Upsample(nn.Module):
    """Bilinear doubling: no checkerboard, unlike a transposed convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class DoubleConv(nn.Module):
    """3×3 convolution, GroupNorm, ReLU, twice: a stage of the U-Net (Ronneberger et al. 2015, who had no norm)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            group_norm(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            group_norm(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return self.layers(x)  # type: ignore[no-any-return]


def halve(channels: int, kind: str) -> nn.Module:
    """(B, C, H, W) -> (B, C, H/2, W/2), by "maxpool" or a learnt "strided" convolution."""
    return nn.MaxPool2d(2) if kind == "maxpool" else nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def double(in_channels: int, out_channels: int, kind: str) -> nn.Module:
    """(B, in, H, W) -> (B, out, 2H, 2W), by a "transposed" convolution or "upsample" and convolution."""
    if kind == "transposed":
        return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
    return nn.Sequential(Upsample(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
