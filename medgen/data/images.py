"""Images of a split that are read when they are indexed, and batches of images.

Shapes: N images, C channels, H W height and width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from medgen.data.store import Split


class StoredImages:
    """Images (N, C, H, W) uint8 of some rows of a split, or of all; indexed like a tensor, by a slice or by rows."""

    def __init__(self, split: Split, rows: Tensor | None = None) -> None:
        self._images = split.images
        self._rows = torch.arange(len(split.images)) if rows is None else rows
        self.shape = torch.Size([len(self._rows), *split.images.shape[1:]])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return torch.from_numpy(self._images[self._rows[index].numpy()])


Images = Tensor | StoredImages  # uint8, or floats in [0, 1]


def split_images(images: Images, size: int) -> Iterator[Tensor]:
    """Yield the images in order, `size` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
