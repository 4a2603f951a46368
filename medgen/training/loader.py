"""Batches of a split, which is kept in memory as uint8; no worker processes, no state to save.

A training batch is a pure function of (seed, position, rank, world), so that a resumed run sees the same batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.data.store import Split


@dataclass(frozen=True)
class Batch:
    """Images of a training or evaluation step, on its device."""

    image: Tensor  # (B, C, H, W) float32 in [0, 1]
    label: Tensor  # (B,) int64
    index: Tensor  # (B,) int64 on the CPU: row in the split and in its manifest
    mask: Tensor | None = None  # (B, 1, H, W) float32 class numbers, 0 or 1 in a binary mask


class Loader:
    """Batches of a split on `device`.

    The images are kept on the device if they fit into a quarter of its free memory, and in main memory otherwise.
    `subset` uses only that many images, spread over the split; `with_masks` only those with a mask, and adds it.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device | str,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        horizontal_flip: bool = False,
        subset: int | None = None,
        with_masks: bool = False,
    ) -> None:
        self.device = torch.device(device)
        rows = split.masked_rows if with_masks else np.arange(len(split.images))
        total = len(rows)
        self.rows = rows[np.unique(np.linspace(0, total - 1, min(subset or total, total)).astype(np.int64))]
        self.images = _resident(split.images[self.rows], self.device)  # (N, C, H, W) uint8
        self.labels = torch.from_numpy(split.labels[self.rows]).to(self.images.device)
        masks = split.masks if with_masks else None  # (N, 1, H, W) uint8
        self.masks = None if masks is None else _resident(masks[self.rows], self.device)
        self.batch_size = min(batch_size, len(self.images))
        self.num_batches = (
            len(self.images) // self.batch_size
        )  # an epoch leaves out the incomplete last batch, of other images each time
        self.seed, self.rank, self.world = seed, rank, world
        self.horizontal_flip = horizontal_flip
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # epoch and its permutation

    def batch(self, position: int) -> Batch:
        """This rank's part of batch number `position`, in an order shuffled anew for each epoch."""
        epoch, step = divmod(position, self.num_batches)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        rows = self._order[1][step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world]
        batch = self.gather(rows)
        if self.horizontal_flip:
            generator = torch.Generator().manual_seed(seed_of(self.seed, position, self.rank, 1))
            batch = _flip(batch, torch.rand(len(rows), generator=generator) < 0.5)
        return batch

    def sequential(self) -> Iterator[Batch]:
        """The whole split in order; the last batch may be smaller."""
        for start in range(0, len(self.images), self.batch_size):
            yield self.gather(torch.arange(start, min(start + self.batch_size, len(self.images))))

    def gather(self, rows: Tensor) -> Batch:
        """Images at these positions (B,), a tensor on the CPU, among those that the loader uses."""
        index = torch.from_numpy(self.rows)[
            rows
        ]  # from rows on the CPU: reading them from the device would wait for it
        rows = rows.to(self.images.device, non_blocking=True)
        return Batch(
            image=self.images[rows].to(self.device).float().div_(255.0),
            label=self.labels[rows].to(self.device),
            index=index,
            mask=None if self.masks is None else self.masks[rows].to(self.device).float(),
        )


def _resident(array: np.ndarray, device: torch.device) -> Tensor:
    images = torch.from_numpy(array)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
        return images.to(device)
    return images


def _flip(batch: Batch, chosen: Tensor) -> Batch:
    chosen = chosen.to(batch.image.device)[:, None, None, None]
    image = torch.where(chosen, batch.image.flip(-1), batch.image)
    mask = None if batch.mask is None else torch.where(chosen, batch.mask.flip(-1), batch.mask)
    return Batch(image=image, label=batch.label, index=batch.index, mask=mask)
