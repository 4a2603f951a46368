"""U-Net that predicts a flow's velocity from a noisy latent or image, a time and a class.

Residual blocks are scaled and shifted by time and class (Perez et al., FiLM, 2018; Dhariwal & Nichol 2021); small grids
have self-attention. A flat latent is a grid of one position, where the same blocks with 1×1 convolutions form a
residual MLP.

Shapes: B batch, Z h w input, G channels of a conditioning map, C channels of a block, E dimensions of a condition.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen.nn.blocks import ResidualBlock, SelfAttention, conv, group_norm

MAX_DOWNSAMPLINGS = 3
FLAT_WIDTH_FACTOR = 4  # a flat latent has all its dimensions at one position, so its layers are wider


class VelocityNetwork(nn.Module):
    """U-Net over inputs (Z, h, w) or (Z, d, h, w) with any sides, residual MLP over inputs (D,).

    Untrained, its output is 0.

    Args:
        latent_shape: of the input, (Z, h, w), (Z, d, h, w) or (D,).
        num_classes: number of labels; 0 for none.
        channels: on the largest grid; the smaller ones have twice as many.
        blocks: residual blocks: half of them on the smallest grid, a quarter on the way down to it and up again for
            each larger one (at least one each).
        dropout: of the residual blocks.
        context_channels: G, channels of a map (G, h, w) that conditions the network; 0 for none.
        has_noise_level: the map's noise level conditions the network as the time does.
        smallest_side: grids are halved until a side is this small, or `MAX_DOWNSAMPLINGS` times.
        attention_side: grids up to this side have self-attention; the smallest one always has.
        num_values: K, length of a vector of conditions besides the class; 0 for none.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        num_classes: int,
        channels: int,
        blocks: int,
        dropout: float,
        context_channels: int = 0,
        has_noise_level: bool = False,
        smallest_side: int = 4,
        attention_side: int = 4,
        num_values: int = 0,
    ) -> None:
        super().__init__()
        self.condition = ConditionEmbedding(channels, num_classes, has_noise_level, num_values)
        condition_dim = 4 * channels
        latent_channels, *sides = latent_shape if len(latent_shape) > 1 else (*latent_shape, 1, 1)
        dims, size = len(sides), 1 if max(sides) == 1 else 3
        single_position = max(sides) == 1
        if single_position:
            channels = FLAT_WIDTH_FACTOR * channels
        grids = [sides]
        while min(grids[-1]) > smallest_side and len(grids) <= MAX_DOWNSAMPLINGS:
            grids.append([math.ceil(side / 2) for side in grids[-1]])
        widths = [channels] + [2 * channels] * (len(grids) - 1)
        steps = list(pairwise(widths))
        self.grid = (latent_channels, *sides)

        def stage(level: int, count: int) -> Stage:
            grid = grids[level]
            attends = max(grid) > 1 and (grid == grids[-1] or max(grid) <= attention_side)
            return Stage(widths[level], condition_dim, max(grid) == 1, max(1, count), dropout, attends, dims)

        larger = range(len(steps))
        self.enter = conv(dims, latent_channels + context_channels, channels, size)
        self.down = nn.ModuleList(stage(level, blocks // 4) for level in larger)
        self.halve = nn.ModuleList(conv(dims, few, many, stride=2) for few, many in steps)
        self.middle = stage(-1, blocks // 2 if steps else blocks)
        self.merge = nn.ModuleList(conv(dims, many + few, few, 1) for few, many in steps)
        self.up = nn.ModuleList(stage(level, blocks // 4) for level in larger)
        self.norm = group_norm(channels, single_position)
        self.leave = conv(dims, channels, latent_channels, size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]  # there is one

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor,
        context: Tensor | None = None,
        noise_level: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Inputs (B, *latent_shape), times (B,) in [0, 1], labels (B,), -1 for none -> velocities (B, *latent_shape).

        A network built with `context_channels` and `has_noise_level` takes `context` (B, G, h, w) and its noise levels
        (B,), one with `num_values` takes conditions (B, K).
        """
        condition = self.condition(time, label, noise_level, values)
        shape, skips = x.shape, []
        x = x.view(-1, *self.grid)
        x = self.enter(x if context is None else torch.cat([x, context], dim=1))
        for stage, downsample in zip(self.down, self.halve, strict=True):
            x = stage(x, condition)
            skips.append(x)
            x = downsample(x)
        x = self.middle(x, condition)
        for merge, stage in reversed(list(zip(self.merge, self.up, strict=True))):
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[2:])  # nearest neighbour: an odd side is not twice the smaller one
            x = stage(merge(torch.cat([x, skip], dim=1)), condition)
        return self.leave(F.silu(self.norm(x))).view(shape)  # type: ignore[no-any-return]


class ConditionEmbedding(nn.Module):
    """Embeds time and noise level, as Fourier features (Tancik et al. 2020), class and conditions: (B, 4·C)."""

    def __init__(self, channels: int, num_classes: int, has_noise_level: bool = False, num_values: int = 0) -> None:
        super().__init__()
        self.num_frequencies = channels // 2
        self.time = mlp(channels, 4 * channels)
        weight = torch.empty(num_classes + 1, 4 * channels)  # row 0 is "no label"
        if not weight.is_meta:  # else (load_network) this would import torch's compiler, for over a second
            nn.init.normal_(weight)
        self.label = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
        self.level = mlp(channels, 4 * channels) if has_noise_level else None
        self.values = mlp(num_values, 4 * channels) if num_values else None

    def forward(
        self, time: Tensor, label: Tensor, noise_level: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """Times (B,), labels (B,), noise levels (B,) and conditions (B, K) -> (B, 4·C)."""
        features = self.time(self._fourier_features(time)) + self.label(label + 1)
        if self.level is not None and noise_level is not None:
            features = features + self.level(self._fourier_features(noise_level))
        if self.values is not None and values is not None:
            features = features + self.values(values)
        return F.silu(features)

    def _fourier_features(self, value: Tensor) -> Tensor:
        # at most 100 radians: the velocity does not change faster than the steps of a sampler
        frequencies = torch.logspace(0.0, 2.0, self.num_frequencies, device=value.device)
        angles = value[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two linear layers: (B, inputs) -> (B, outputs)."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


class Stage(nn.Module):
    """`count` residual blocks on one grid, each followed by self-attention if the stage `attends`."""

    def __init__(
        self,
        channels: int,
        condition_dim: int,
        single_position: bool,
        count: int,
        dropout: float,
        attends: bool,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, channels, 1, condition_dim, dropout, single_position, dims) for _ in range(count)
        )
        num_heads = math.gcd(channels, max(1, channels // 64))  # stored networks were trained with this number
        self.attention = nn.ModuleList(
            SelfAttention(channels, num_heads, dims) if attends else nn.Identity() for _ in range(count)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, C, h, w), conditions (B, E) -> (B, C, h, w)."""
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x, condition))
        return x
