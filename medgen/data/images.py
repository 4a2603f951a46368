"""Images of a split that are read when they are indexed, batches of images, and grey values as floats.

Stored images are integers from 0 to the maximum of their type, networks and metrics take floats from 0 to 1. Metrics of
sets of images and figures show a volume by its three middle planes.

Shapes: N images, C channels, H W height and width, D depth of volumes, S their longest side.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from medgen.data.store import Split
from medgen.errors import UserError

DTYPES = {8: torch.uint8, 16: torch.uint16}  # by preprocess.bits


class StoredImages:
    """Images (N, C, H, W) or volumes (N, C, D, H, W) of some rows of a split, or of all.

    They are indexed like a tensor, by a slice or by rows.
    """

    def __init__(self, split: Split, rows: Tensor | None = None) -> None:
        self._images = split.images
        self._rows = torch.arange(len(split.images)) if rows is None else rows
        self.shape = torch.Size([len(self._rows), *split.images.shape[1:]])
        self.dtype = torch.from_numpy(np.empty(0, split.images.dtype)).dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return torch.from_numpy(self._images[self._rows[index].numpy()])


class StoredPlanes(StoredImages):
    """As `StoredImages`, but with the `middle_planes` of volumes."""

    def __init__(self, split: Split, rows: Tensor | None = None) -> None:
        super().__init__(split, rows)
        self.shape = torch.Size([len(self), *middle_planes(torch.empty(1, *self.shape[1:])).shape[1:]])

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return middle_planes(super().__getitem__(index))


Images = Tensor | StoredImages  # uint8 or uint16, or floats in [0, 1]


def maximum(images: Images) -> float:
    """The value of white."""
    return 1.0 if images.dtype.is_floating_point else float(torch.iinfo(images.dtype).max)


def to_floats(images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Stored images as floats in [0, 1], by default float32; floats keep their values."""
    if images.is_floating_point():
        return images.to(dtype or images.dtype)
    return images.to(dtype or torch.float32).div_(maximum(images))


def to_stored(images: Tensor, bits: int) -> Tensor:
    """Floats in [0, 1] rounded to 2^bits grey values, as real images are; else a classifier could find the difference.

    Raises:
        UserError: a value is not finite.
    """
    if not bool(torch.isfinite(images).all()):
        raise UserError("the model's images hold values that are not finite; train the model again")
    return (images.clamp(0.0, 1.0) * torch.iinfo(DTYPES[bits]).max).round().to(DTYPES[bits])


def middle_planes(images: Tensor) -> Tensor:
    """The three middle planes (N, 3·C, S, S) of volumes (N, C, D, H, W), or images (N, C, H, W) unchanged.

    The planes (H, W), (D, W) and (D, H) are the channels of a square image, with black borders if the sides differ.
    """
    if images.dim() == 4:
        return images
    depth, height, width = images.shape[2:]
    side = max(depth, height, width)
    planes = images.new_zeros(len(images), 3, images.shape[1], side, side)
    middle = (images[:, :, depth // 2], images[:, :, :, height // 2], images[..., width // 2])
    for number, plane in enumerate(middle):
        top, left = ((side - length) // 2 for length in plane.shape[2:])
        planes[:, number, :, top : top + plane.shape[2], left : left + plane.shape[3]] = plane
    return planes.flatten(1, 2)


def side_by_side(planes: Tensor, channels: int) -> Tensor:
    """Planes (N, 3·C, S, S) of volumes with C channels as one image each, (N, C, S, 3·S)."""
    parts = planes.view(len(planes), 3, channels, *planes.shape[2:])
    return parts.permute(0, 2, 3, 1, 4).flatten(3)


def split_images(images: Images, size: int) -> Iterator[Tensor]:
    """Yield the images in order, `size` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def join_rows(parts: Iterable[Tensor], count: int) -> Tensor:
    """The rows of `parts` (B, ...), one or more, one after another: (count, ...).

    Each part is copied as it comes. If the parts were kept until the end, the large tensors from which they were
    computed would leave gaps between them that are too small for the next, and the process would grow each time.
    """
    parts = iter(parts)
    first = next(parts)
    rows, end = first.new_empty(count, *first.shape[1:]), 0
    for part in chain([first], parts):
        rows[end : end + len(part)] = part
        end += len(part)
    return rows
