"""A velocity network: from a noisy latent or image, a time and a class to the direction in which it moves.

A small U-Net (Ronneberger et al. 2015) of residual blocks that time and class scale and shift (Perez et al., FiLM,
2018; Dhariwal & Nichol 2021), with self-attention on small grids. A flat latent is a grid of one position: there
the same blocks, with 1×1 convolutions, are a residual MLP.

Shapes: B batch, Z h w input, G channels that it is conditioned on, C channels of a block, E dimensions of a condition.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_HALVINGS = 3  # of the grid
FLAT_FACTOR = 4  # a flat latent has one position for all its numbers, so its layers are wider


class VelocityNetwork(nn.Module):
    """U-Net over inputs (Z, h, w) of any sides, residual MLP over inputs (D,); its first output is 0.

    Args:
        latent_shape: of the input, (Z, h, w) or (D,).
        num_classes: how many labels there are; 0 for none.
        channels: on the largest grid; the smaller ones have twice as many.
        blocks: residual blocks: half of them on the smallest grid, a quarter on the way down to it and up again for
            each larger one (at least one each).
        dropout: share of a block's numbers that are left out in training.
        given_channels: G, channels of a map (G, h, w) that it is conditioned on; 0 for none.
        levels: whether a noise level of what is given conditions the network, as the time does.
        smallest_side: grids are halved until a side is this small, or `MAX_HALVINGS` times.
        attention_side: grids up to this side have self-attention; the smallest one always has.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        num_classes: int,
        channels: int,
        blocks: int,
        dropout: float,
        given_channels: int = 0,
        levels: bool = False,
        smallest_side: int = 4,
        attention_side: int = 4,
    ) -> None:
        super().__init__()
        self.condition = Condition(channels, num_classes, levels)
        size = 4 * channels  # of the condition
        latent_channels, *sides = (*latent_shape, 1, 1)[:3]
        if sides == [1, 1]:
            channels = FLAT_FACTOR * channels
        grids = [sides]
        while min(grids[-1]) > smallest_side and len(grids) <= MAX_HALVINGS:
            grids.append([math.ceil(side / 2) for side in grids[-1]])
        widths = [channels] + [2 * channels] * (len(grids) - 1)
        steps = list(pairwise(widths))
        self.grid = (latent_channels, *sides)

        def stage(level: int, count: int) -> Stage:
            attends = grids[level] != [1, 1] and (grids[level] == grids[-1] or max(grids[level]) <= attention_side)
            return Stage(widths[level], size, grids[level], max(1, count), dropout, attends)

        larger = range(len(steps))
        self.enter = convolution(latent_channels + given_channels, channels, sides)
        self.down = nn.ModuleList(stage(level, blocks // 4) for level in larger)
        self.halve = nn.ModuleList(nn.Conv2d(few, many, 3, stride=2, padding=1) for few, many in steps)
        self.middle = stage(-1, blocks // 2 if steps else blocks)
        self.merge = nn.ModuleList(nn.Conv2d(many + few, few, 1) for few, many in steps)
        self.up = nn.ModuleList(stage(level, blocks // 4) for level in larger)
        self.norm = group_norm(channels, sides)
        self.leave = convolution(channels, latent_channels, sides)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]  # convolution() gives all of them one

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor, given: Tensor | None = None, level: Tensor | None = None
    ) -> Tensor:
        """Inputs (B, *latent_shape), times (B,) in [0, 1], labels (B,), -1 for none -> (B, *latent_shape).

        `given` (B, G, h, w) and its noise levels `level` (B,) go with a network that was built for them.
        """
        condition = self.condition(time, label, level)
        shape, skips = x.shape, []
        x = x.view(-1, *self.grid)
        x = self.enter(x if given is None else torch.cat([x, given], dim=1))
        for stage, halve in zip(self.down, self.halve, strict=True):
            x = stage(x, condition)
            skips.append(x)
            x = halve(x)
        x = self.middle(x, condition)
        for merge, stage in reversed(list(zip(self.merge, self.up, strict=True))):
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[-2:])  # to the nearest: an odd side is not twice the smaller one
            x = stage(merge(torch.cat([x, skip], dim=1)), condition)
        return self.leave(F.silu(self.norm(x))).view(shape)  # type: ignore[no-any-return]


class Condition(nn.Module):
    """Time and noise level, as Fourier features (Tancik et al. 2020), and class -> (B, 4·C)."""

    def __init__(self, channels: int, num_classes: int, levels: bool = False) -> None:
        super().__init__()
        self.num_frequencies = channels // 2
        self.time = _mlp(channels)
        self.label = nn.Embedding(num_classes + 1, 4 * channels)  # row 0 is "no label"
        self.level = _mlp(channels) if levels else None

    def forward(self, time: Tensor, label: Tensor, level: Tensor | None = None) -> Tensor:
        """Times (B,), labels (B,) and noise levels (B,) -> (B, 4·C)."""
        features = self.time(self._waves(time)) + self.label(label + 1)
        if self.level is not None and level is not None:
            features = features + self.level(self._waves(level))
        return F.silu(features)

    def _waves(self, value: Tensor) -> Tensor:
        # up to 100 radians: finer than the steps of a sampler, nothing changes with time
        frequencies = torch.logspace(0.0, 2.0, self.num_frequencies, device=value.device)
        angles = value[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def _mlp(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))


class Stage(nn.Module):
    """Residual blocks on one grid, with self-attention after each where it `attends`."""

    def __init__(
        self, channels: int, condition: int, sides: list[int], count: int, dropout: float, attends: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, condition, sides, dropout) for _ in range(count))
        self.attention = nn.ModuleList(Attention(channels, sides) if attends else nn.Identity() for _ in range(count))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, w), conditions (B, E) -> (B, C, h, w)."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x, condition))
        return x


class Block(nn.Module):
    """GroupNorm, SiLU, convolution, twice, and a shortcut; the condition scales and shifts the second norm."""

    def __init__(self, channels: int, condition: int, sides: list[int], dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, sides)
        self.conv1 = convolution(channels, channels, sides)
        self.film = nn.Linear(condition, 2 * channels)
        self.norm2 = group_norm(channels, sides)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(channels, channels, sides)
        nn.init.zeros_(self.conv2.weight)  # the block starts as its shortcut

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, w), conditions (B, E) -> (B, C, h, w)."""
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)  # each (B, C, 1, 1)
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = F.silu(self.norm2(residual) * (1.0 + scale) + shift)
        return x + self.conv2(self.dropout(residual))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Residual self-attention over the grid (Vaswani et al. 2017)."""

    def __init__(self, channels: int, sides: list[int]) -> None:
        super().__init__()
        self.num_heads = math.gcd(channels, max(1, channels // 64))
        self.norm = group_norm(channels, sides)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.num_heads, c // self.num_heads, h * w)
        query, key, value = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, h·w, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.project(attended.transpose(-1, -2).reshape(b, c, h, w))  # type: ignore[no-any-return]


def convolution(in_channels: int, out_channels: int, sides: list[int]) -> nn.Conv2d:
    """A 3×3 convolution; where there is one position, its centre alone."""
    size = 1 if math.prod(sides) == 1 else 3
    return nn.Conv2d(in_channels, out_channels, size, padding=size // 2)


def group_norm(channels: int, sides: list[int]) -> nn.GroupNorm:
    """Groups of four channels or more; one group where there is one position, whose few numbers say little."""
    groups = 1 if math.prod(sides) == 1 else math.gcd(32, max(1, channels // 4), channels)
    return nn.GroupNorm(groups, channels)
