"""Transformer that predicts masked codes of a grid (Chang et al., MaskGIT, 2022).

Shapes: B batch, K codes, P = h·w positions of a grid, C channels, V values of conditions, G channels of maps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen.nn.parallel import Dropout
from medgen.nn.velocity import mlp

HEAD_CHANNELS = 32


class MaskedTransformer(nn.Module):
    """Bidirectional transformer with norm before each layer (Xiong et al. 2020) over grids of codes, given the class.

    A position is embedded by its row and column, in a volume also by its slice. The embedding of the codes also gives
    the logits.

    Args:
        sides: (h, w) or (d, h, w) of the grid.
        num_embeddings: K; index K is the mask.
        num_classes: number of labels; 0 for none.
        channels: width; a head has about 32 of them.
        blocks: number of transformer blocks.
        dropout: of embeddings and block outputs.
        num_values: V, length of a vector of conditions besides the class; 0 for none.
        context_channels: G, channels of a map (G, h, w) or (G, d, h, w) that conditions the network; 0 for none.
    """

    def __init__(
        self,
        sides: tuple[int, ...],
        num_embeddings: int,
        num_classes: int,
        channels: int,
        blocks: int,
        dropout: float,
        num_values: int = 0,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.code = nn.Embedding(num_embeddings + 1, channels)
        self.label = nn.Embedding(num_classes + 1, channels)  # row 0 is "no label"
        *depth, height, width = sides
        self.slice = nn.Parameter(torch.empty(depth[0], 1, 1, channels)) if depth else None
        self.row = nn.Parameter(torch.empty(height, 1, channels))
        self.column = nn.Parameter(torch.empty(width, channels))
        self.dropout = Dropout(dropout)
        self.blocks = nn.Sequential(*(TransformerBlock(channels, dropout) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        self.norm = nn.LayerNorm(channels)
        self.bias = nn.Parameter(torch.zeros(num_embeddings))
        slices = [] if self.slice is None else [self.slice]
        for embedding in (self.code.weight, self.label.weight, self.row, self.column, *slices):
            nn.init.normal_(embedding, std=0.2)  # the usual 0.02 learns more slowly
        nn.init.constant_(self.norm.weight, 0.1)  # keeps the first logits near 0 despite the large embeddings
        self.values = mlp(num_values, channels) if num_values else None
        self.context = nn.Conv2d(context_channels, channels, 3, padding=1) if context_channels else None

    def forward(
        self, codes: Tensor, label: Tensor, values: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Codes (B, P), K if masked, and labels (B,), -1 for none -> logits (B, P, K).

        A network built with `num_values` and `context_channels` takes conditions (B, V) and a map (B, G, h, w).
        """
        position = self.row + self.column
        if self.slice is not None:
            position = self.slice + position
        x = self.code(codes) + position.flatten(0, -2) + self.label(label + 1)[:, None]
        if self.values is not None and values is not None:
            x = x + self.values(values)[:, None]
        if self.context is not None and context is not None:
            planes = context if self.slice is None else context.transpose(1, 2).flatten(0, 1)  # slices of a volume
            x = x + self.context(planes).flatten(2).transpose(1, 2).reshape(x.shape)
        x = self.norm(self.head(self.blocks(self.dropout(x))))
        return F.linear(x, self.code.weight[: self.num_embeddings], self.bias)


class TransformerBlock(nn.Module):
    """Self-attention over all positions, then a two-layer network at each, both added to their input."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = math.gcd(channels, max(1, channels // HEAD_CHANNELS))
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.dropout = Dropout(dropout)
        for layer in (self.project, self.narrow):  # the block starts as its shortcut
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, C) -> (B, P, C)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, P, C / heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.project(attended))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm2(x)))))  # type: ignore[no-any-return]
