"""Batches of conditions besides the class (medgen/data/conditions.py), and dropout, so that any can be left out.

Dropout of a condition makes classifier-free guidance possible (Ho & Salimans 2022).

Shapes: B batch, N images, K values, M channels of a mask, H W height and width, h w of a network's grid.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.data.conditions import ConditionSpace
from medgen.data.store import Split
from medgen.nn.parallel import rand

DROPOUT = 0.1  # of the label and all conditions together; with conditions also of each alone
MASK_DETAIL = 16  # least positions a side with which a network on a small grid gets a mask


class ConditionArray(Protocol):
    """Conditions of N images that are read when they are indexed, by a slice or by rows (B,)."""

    def __getitem__(self, rows: slice | Tensor) -> "Conditions": ...


@dataclass(frozen=True)
class Conditions:
    """Conditions of a batch of images; all values of an unknown one are 0."""

    values: Tensor  # (B, K)
    mask: Tensor | None = None  # (B, M, H, W): 1 if the mask is known, then 1 inside of each class but the background

    @classmethod
    def unknown(cls, space: ConditionSpace, count: int, device: torch.device | str = "cpu") -> "Conditions":
        """Conditions of `count` images of which nothing is known; a mask has a single position."""
        channels = space.mask_channels
        mask = torch.zeros(count, channels, 1, 1, device=device) if channels else None
        return cls(torch.zeros(count, space.size, device=device), mask)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> "Conditions":
        return Conditions(self.values[rows], None if self.mask is None else self.mask[rows])

    def to(self, device: torch.device | str) -> "Conditions":
        """Return the conditions on a device."""
        return Conditions(self.values.to(device), None if self.mask is None else self.mask.to(device))

    def expand(self, count: int) -> "Conditions":
        """Return the conditions of a single image for `count` images, without copies."""
        mask = None if self.mask is None else self.mask.expand(count, -1, -1, -1)
        return Conditions(self.values.expand(count, -1), mask)

    def cleared(self) -> "Conditions":
        """Return conditions of the same shape of which nothing is known."""
        return Conditions(torch.zeros_like(self.values), None if self.mask is None else torch.zeros_like(self.mask))

    def then(self, others: "Conditions") -> "Conditions":
        """Return these conditions followed by others."""
        mask = None if self.mask is None or others.mask is None else torch.cat([self.mask, others.mask])
        return Conditions(torch.cat([self.values, others.values]), mask)

    def on_grid(self, sides: tuple[int, ...]) -> "Conditions":
        """Return the conditions with the mask as channels (B, G, h, w) of a network's grid, `grid_channels` of them.

        A grid of fewer than `MASK_DETAIL` positions a side gets several positions of the mask in each.
        """
        if self.mask is None:
            return self
        factor = grid_factor(sides)
        fine = F.adaptive_avg_pool2d(self.mask, (factor * sides[0], factor * sides[1]))
        return Conditions(self.values, F.pixel_unshuffle(fine, factor))


@dataclass(frozen=True)
class StoredConditions:
    """Conditions (N, K) of rows of a split, read when they are indexed; a row below 0 has unknown ones."""

    split: Split
    rows: Tensor  # (N,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Tensor) -> Conditions:
        return read_conditions(self.split, self.rows[rows])


def read_conditions(split: Split, rows: Tensor) -> Conditions:
    """Conditions of rows (B,) of a split that has some, on the CPU; those of a row below 0 are unknown."""
    space, known = split.conditions, rows >= 0
    assert space is not None
    at = rows.clamp(min=0).numpy()
    values = torch.from_numpy(split.condition_values[at]) * known[:, None]
    if space.mask is None:
        return Conditions(values)
    if split.masks is None:
        height, width = split.images.shape[2:]
        return Conditions(values, torch.zeros(len(rows), space.mask_channels, height, width))
    has_mask = known & torch.isin(rows, torch.from_numpy(split.masked_rows))
    return Conditions(values, encode_mask(torch.from_numpy(split.masks[at]), space.mask_channels, has_mask))


def encode_mask(mask: Tensor, channels: int, known: Tensor) -> Tensor:
    """Channels (B, M, H, W) of class numbers (B, 1, H, W); those of a mask that is not `known` (B,) are 0."""
    classes = torch.arange(1, channels).view(1, -1, 1, 1)
    inside = (mask == classes).float()
    return torch.cat([torch.ones(len(mask), 1, *mask.shape[2:]), inside], dim=1) * known[:, None, None, None]


def grid_factor(sides: tuple[int, ...]) -> int:
    """Positions of a mask along a side of each position of a grid (h, w)."""
    return max(1, math.ceil(MASK_DETAIL / min(sides)))


def grid_channels(space: ConditionSpace | None, sides: tuple[int, ...]) -> int:
    """G, channels of `Conditions.on_grid`; 0 without a mask."""
    return 0 if space is None else space.mask_channels * grid_factor(sides) ** 2


def drop_conditions(
    labels: Tensor,
    conditions: Conditions | None,
    conditional: bool,
    space: ConditionSpace | None,
    generator: torch.Generator,
) -> tuple[Tensor, Conditions | None]:
    """Labels (B,) and conditions with random dropout: -1 and 0 mean unconditional.

    Everything is dropped together, and each condition and the label alone, so that any of them can be left out later.
    Without `conditional` all labels are -1; without `space` there are no conditions.
    """
    dropped = (rand(len(labels), generator=generator) < DROPOUT).to(labels.device)
    if space is None or conditions is None:
        return labels.masked_fill(dropped, -1) if conditional else torch.full_like(labels, -1), None
    alone = (rand(len(labels), 1 + len(space.fields), generator=generator) < DROPOUT).to(labels.device)
    alone = alone | dropped[:, None]
    labels = labels.masked_fill(alone[:, 0], -1) if conditional else torch.full_like(labels, -1)
    kept = {field.name: ~alone[:, 1 + number] for number, field in enumerate(space.fields)}
    values = conditions.values.clone()
    for name, (_, place) in space.vector_fields.items():
        values[:, place] *= kept[name][:, None]
    mask = conditions.mask
    if mask is not None and space.mask is not None:
        mask = mask * kept[space.mask.name][:, None, None, None]
    return labels, Conditions(values, mask)
