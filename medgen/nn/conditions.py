"""Batches of conditions besides the class (medgen/data/conditions.py), and dropout, so that any can be left out.

Dropout of a condition makes classifier-free guidance possible (Ho & Salimans 2022).

Shapes: B batch, N images, K values, M channels of maps (a mask and paired images), H W height and width, h w of a
network's grid. Volumes have a depth D before the height, and grids d.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.data.conditions import ConditionField, ConditionSpace
from medgen.data.images import to_floats
from medgen.data.store import Split
from medgen.nn.blocks import to_channels
from medgen.nn.parallel import rand

DROPOUT = 0.1  # of the label and all conditions together; with conditions also of each alone
# least positions a side with which a network on a small grid gets maps, by the number of sides
MAP_DETAIL = {2: 16, 3: 8}


class ConditionArray(Protocol):
    """Conditions of N images that are read when they are indexed, by a slice or by rows (B,)."""

    def __getitem__(self, rows: slice | Tensor) -> "Conditions": ...


@dataclass(frozen=True)
class Conditions:
    """Conditions of a batch of images; all values of an unknown one are 0."""

    values: Tensor  # (B, K)
    # (B, M, H, W): of each map 1 if it is known, then 1 inside of each class of a mask but the background, or the grey
    # values of a paired image in [0, 1]
    maps: Tensor | None = None

    @classmethod
    def unknown(cls, space: ConditionSpace, count: int, device: torch.device | str = "cpu") -> "Conditions":
        """Conditions of `count` images of which nothing is known; maps have a single position."""
        channels = space.map_channels
        maps = torch.zeros(count, channels, 1, 1, device=device) if channels else None
        return cls(torch.zeros(count, space.size, device=device), maps)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> "Conditions":
        return Conditions(self.values[rows], None if self.maps is None else self.maps[rows])

    def to(self, device: torch.device | str) -> "Conditions":
        """Return the conditions on a device."""
        return Conditions(self.values.to(device), None if self.maps is None else self.maps.to(device))

    def expand(self, count: int) -> "Conditions":
        """Return the conditions of a single image for `count` images, without copies."""
        maps = None if self.maps is None else self.maps.expand(count, *self.maps.shape[1:])
        return Conditions(self.values.expand(count, -1), maps)

    def cleared(self) -> "Conditions":
        """Return conditions of the same shape of which nothing is known."""
        return Conditions(torch.zeros_like(self.values), None if self.maps is None else torch.zeros_like(self.maps))

    def then(self, others: "Conditions") -> "Conditions":
        """Return these conditions followed by others."""
        maps = None if self.maps is None or others.maps is None else torch.cat([self.maps, others.maps])
        return Conditions(torch.cat([self.values, others.values]), maps)

    def on_image(self, sides: tuple[int, ...]) -> Tensor | None:
        """Return the maps (B, M, H, W) at every pixel of images of these sides; None without any."""
        if self.maps is None:
            return None
        maps = self.maps
        if maps[0, 0].numel() == 1:  # unknown
            maps = maps.view(*maps.shape[:2], *[1] * len(sides))
        return maps.expand(-1, -1, *sides)

    def on_grid(self, sides: tuple[int, ...]) -> "Conditions":
        """Return the conditions with the maps as channels (B, G, h, w) of a network's grid, `grid_channels` of them.

        A grid of fewer than `MAP_DETAIL` positions a side gets several positions of the maps in each.
        """
        if self.maps is None:
            return self
        factor = grid_factor(sides)
        fine = tuple(factor * side for side in sides)
        if self.maps[0, 0].numel() == 1:
            maps = self.on_image(fine)
        else:
            pool: Callable[[Tensor, Any], Tensor] = F.adaptive_avg_pool2d if len(fine) == 2 else F.adaptive_avg_pool3d
            maps = pool(self.maps, fine)
        assert maps is not None
        return Conditions(self.values, to_channels(maps, factor))


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
    maps = []
    for name, (field, _) in space.map_fields.items():
        has_map = known & torch.from_numpy(split.has_map(name)[at])
        maps.append(encode_map(field, torch.from_numpy(split.read_map(field, at)), has_map))
    return Conditions(values, torch.cat(maps, dim=1) if maps else None)


def encode_map(field: ConditionField, stored: Tensor, known: Tensor) -> Tensor:
    """Channels (B, field.channels, H, W) of a map that is not known in some images, where they are 0.

    Args:
        field: a mask or a paired image.
        stored: (B, 1, H, W) uint8 class numbers or grey values.
        known: (B,).
    """
    if field.kind == "mask":
        classes = torch.arange(1, field.channels).view(1, -1, *[1] * (stored.dim() - 2))
        inside = (stored == classes).float()
    else:
        inside = to_floats(stored)
    return torch.cat([torch.ones_like(inside[:, :1]), inside], dim=1) * _to_each(known, inside)


def _to_each(rows: Tensor, images: Tensor) -> Tensor:
    """Values (B,) in the shape (B, 1, …) that multiplies images (B, …)."""
    return rows.view(-1, *[1] * (images.dim() - 1))


def grid_factor(sides: tuple[int, ...]) -> int:
    """Positions of a map along a side of each position of a grid (h, w)."""
    return max(1, math.ceil(MAP_DETAIL[len(sides)] / min(sides)))


def grid_channels(space: ConditionSpace | None, sides: tuple[int, ...]) -> int:
    """G, channels of `Conditions.on_grid`; 0 without maps."""
    return 0 if space is None else space.map_channels * grid_factor(sides) ** len(sides)


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
    maps = conditions.maps
    if maps is not None:
        maps = maps.clone()
        for name, (_, place) in space.map_fields.items():
            maps[:, place] *= _to_each(kept[name], maps)
    return labels, Conditions(values, maps)
