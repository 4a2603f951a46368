"""Batches of a split, read from its memory-mapped files before the step that needs them; no state to save.

A training batch is a pure function of (seed, position, rank, world), so that a resumed run sees the same batches. The
random changes of an image depend on (seed, position, row in the split), whichever process has it. The processes of a
machine share one copy of the images: the operating system's cache of the files.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from medgen.config import Augment, seed_of
from medgen.data.images import DTYPES, middle_planes, to_floats
from medgen.data.store import ShardedArray, Split
from medgen.nn.conditions import Conditions, read_conditions
from medgen.training.augment import augment_images

NUM_AHEAD = 3  # batches that are read before they are asked for
CHUNK_BYTES = 64 << 20  # read at a time to fill a GPU's memory

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Images of a training or evaluation step, on its device."""

    image: Tensor  # (B, C, H, W) or (B, C, D, H, W) float32 in [0, 1]
    label: Tensor  # (B,) int64
    index: Tensor  # (B,) int64 on the CPU: row in the split and in its manifest
    mask: Tensor | None = None  # as the image with one channel, float32 class numbers, 0 or 1 in a binary mask
    conditions: Conditions | None = None  # besides the label

    def generator(self, *seeds: int) -> torch.Generator:
        """Generator of the batch's random draws, the same whichever process has the batch."""
        return torch.Generator().manual_seed(seed_of(*seeds, int(self.index[0])))

    def part(self, index: int, count: int) -> "Batch":
        """The rows `index`, `index + count`, …"""
        rows = slice(index, None, count)
        mask = None if self.mask is None else self.mask[rows]
        conditions = None if self.conditions is None else self.conditions[rows]
        return Batch(self.image[rows], self.label[rows], self.index[rows], mask, conditions)


class Loader:
    """Batches of a split on `device`.

    On a GPU, images that fit into a quarter of its free memory are kept there. Otherwise a thread reads the next
    batches from the files, and for a GPU copies them there from pinned memory.
    `subset` uses only that many images, spread over the split; `with_masks` only those with a mask, and adds it;
    `with_conditions` adds the images' conditions, whose maps are mirrored with the image.
    `horizontal_flip` and `augment` change the images and masks of `batch`, which are random crops of the sides `patch`.
    `as_planes` gives the `middle_planes` of volumes.
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
        augment: Augment = Augment(),  # noqa: B008  # frozen
        patch: Sequence[int] | None = None,
        as_planes: bool = False,
        with_conditions: bool = False,
    ) -> None:
        self.device = torch.device(device)
        rows = split.masked_rows if with_masks else np.arange(len(split.images))
        total = len(rows)
        self.rows = rows[np.unique(np.linspace(0, total - 1, min(subset or total, total)).astype(np.int64))]
        self.num_images = len(self.rows)
        self.labels = torch.from_numpy(split.labels[self.rows])  # (N,) on the CPU
        self.batch_size = min(batch_size, self.num_images)
        # an epoch leaves out the incomplete last batch, of other images each time
        self.num_batches = self.num_images // self.batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.horizontal_flip, self.augment = horizontal_flip, augment
        self.patch, self.as_planes = patch, as_planes
        self._conditions_of = split if with_conditions else None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # epoch and its permutation
        masks = split.masks if with_masks else None
        self._arrays = [split.images] if masks is None else [split.images, masks]
        self._resident = self._copy_to_device()
        is_mapped = self._resident is None
        self._thread = ThreadPoolExecutor(1, "loader") if is_mapped else None
        on_gpu = is_mapped and self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._steps = self._ahead(self._read_step)

    def batch(self, position: int) -> Batch:
        """This rank's part of batch number `position`, in an order shuffled anew for each epoch."""
        batch = self._finish(self._steps(position))
        if self.patch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, position, 0, 3))
            draws = torch.rand(self.batch_size, len(self.patch), generator=generator)[self.rank :: self.world]
            batch = _crop(batch, self.patch, draws)
        if self.horizontal_flip:
            generator = torch.Generator().manual_seed(seed_of(self.seed, position, 0, 1))
            draws = torch.rand(self.batch_size, generator=generator)[self.rank :: self.world]
            batch = _flip(batch, draws < 0.5)
        if self.augment != Augment():
            seeds = [seed_of(self.seed, position, row, 2) for row in batch.index.tolist()]
            image, mask = augment_images(batch.image, batch.mask, self.augment, seeds)
            batch = replace(batch, image=image, mask=mask)
        return batch

    def sequential(self) -> Iterator[Batch]:
        """This rank's part of the split in order: consecutive batches. The last batch of the split may be smaller."""
        total = math.ceil(self.num_images / self.batch_size)
        first, stop = (rank * total // self.world for rank in (self.rank, self.rank + 1))
        read = self._ahead(self._read_in_order, stop)
        for number in range(first, stop):
            yield self._finish(read(number))

    def gather(self, rows: Tensor) -> Batch:
        """Images at these positions (B,), a tensor on the CPU, among those that the loader uses."""
        return self._finish(self._read(rows))

    def _ahead(self, read: Callable[[int], "_Rows"], stop: int = sys.maxsize) -> Callable[[int], "_Rows"]:
        return read if self._thread is None else _Ahead(self._thread, read, stop)

    def _read_step(self, position: int) -> "_Rows":
        epoch, step = divmod(position, self.num_batches)
        known, order = self._order
        if known != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.num_images, generator=generator)
            self._order = (epoch, order)
        return self._read(order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world])

    def _read_in_order(self, number: int) -> "_Rows":
        start = number * self.batch_size
        return self._read(torch.arange(start, min(start + self.batch_size, self.num_images)))

    def _read(self, rows: Tensor) -> "_Rows":
        index = self.rows[rows.numpy()]
        if self._resident is not None:
            rows = rows.to(self.device, non_blocking=True)
            tensors = [tensor[rows] for tensor in self._resident]
            tensors[1] = tensors[1].view(DTYPES[8 * self._arrays[0].dtype.itemsize])
            return _Rows(torch.from_numpy(index), tensors)
        # NumPy, since an operation of torch in another thread may start a second set of OpenMP threads
        tensors = [torch.from_numpy(array[index]) for array in self._arrays]
        tensors = [torch.from_numpy(self.labels.numpy()[rows.numpy()]), *tensors]
        if self._stream is None:
            return _Rows(torch.from_numpy(index), tensors)
        with torch.cuda.stream(self._stream):
            tensors = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
            return _Rows(torch.from_numpy(index), tensors, self._stream.record_event())

    def _finish(self, rows: "_Rows") -> Batch:
        if rows.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(rows.copied)
            for tensor in rows.tensors:
                tensor.record_stream(stream)  # its memory is not reused before this stream has read it
        label, image, *masks = rows.tensors
        if self.as_planes:
            image = middle_planes(image)
        mask = masks[0].float() if masks else None
        conditions = None
        if self._conditions_of is not None:
            conditions = read_conditions(self._conditions_of, rows.index).to(self.device)
        return Batch(image=to_floats(image), label=label, index=rows.index, mask=mask, conditions=conditions)

    def _copy_to_device(self) -> list[Tensor] | None:
        """Labels, images and masks in a GPU's memory; None on a CPU, or if they are too large."""
        size = sum(self.num_images * array.row_bytes for array in self._arrays)
        if self.device.type != "cuda" or size >= torch.cuda.mem_get_info(self.device)[0] // 4:
            return None
        return [self.labels.to(self.device), *(self._copy_array(array) for array in self._arrays)]

    def _copy_array(self, array: ShardedArray) -> Tensor:
        dtype = torch.int16 if array.dtype == np.uint16 else torch.uint8  # a GPU may not index uint16
        copy = torch.empty((self.num_images, *array.shape[1:]), dtype=dtype, device=self.device)
        size = max(1, CHUNK_BYTES // array.row_bytes)
        for start in range(0, self.num_images, size):
            copy[start : start + size] = torch.from_numpy(array[self.rows[start : start + size]]).view(dtype)
        return copy


@dataclass(frozen=True)
class _Rows:
    """Rows of a split, on the device of a batch."""

    index: Tensor  # (B,)
    tensors: list[Tensor]  # labels, images as stored, and masks as uint8 if they are used
    copied: "torch.cuda.Event | None" = None  # recorded after the copy to a GPU


class _Ahead(Generic[T]):
    """A function of consecutive numbers below `stop`, computed in a thread before they are asked for."""

    def __init__(self, thread: ThreadPoolExecutor, function: Callable[[int], T], stop: int) -> None:
        self._thread, self._function, self._stop = thread, function, stop
        self._pending: dict[int, Future[T]] = {}

    def __call__(self, number: int) -> T:
        """The function's result for any number, or its exception."""
        old = self._pending
        wanted = range(number, min(number + 1 + NUM_AHEAD, self._stop))
        self._pending = {
            each: old.pop(each) if each in old else self._thread.submit(self._function, each) for each in wanted
        }
        for future in old.values():  # after a jump
            future.cancel()
        return self._pending.pop(number).result()


def _crop(batch: Batch, sides: Sequence[int], draws: Tensor) -> Batch:
    """Crops with these sides, at a place for each image that its draws (B, sides) in [0, 1) choose uniformly."""
    room = torch.tensor(batch.image.shape[2:]) - torch.tensor(sides) + 1
    starts = (draws * room).long().tolist()
    parts = [tuple(slice(at, at + side) for at, side in zip(start, sides, strict=True)) for start in starts]

    def crop(images: Tensor) -> Tensor:
        return torch.stack([image[(..., *part)] for image, part in zip(images, parts, strict=True)])

    mask = None if batch.mask is None else crop(batch.mask)
    return replace(batch, image=crop(batch.image), mask=mask)


def _flip(batch: Batch, chosen: Tensor) -> Batch:
    chosen = chosen.to(batch.image.device).view(-1, *[1] * (batch.image.dim() - 1))

    def flip(images: Tensor) -> Tensor:
        return torch.where(chosen, images.flip(-1), images)

    mask = None if batch.mask is None else flip(batch.mask)
    conditions = batch.conditions
    if conditions is not None and conditions.maps is not None:
        conditions = replace(conditions, maps=flip(conditions.maps))
    return replace(batch, image=flip(batch.image), mask=mask, conditions=conditions)
