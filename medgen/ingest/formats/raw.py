"""What a reader gives: a file's pictures, each with its whole range of grey or colour.

Every format has one module with the same two words, which data/images.py chooses between:

contents = dicom.inspect(path, preprocess)     # how many pictures, and what the file says of them; no pixels are read
with dicom.DicomFile(path, preprocess) as file:
    raw = file.read(0)

Shapes: H W height and width of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; the largest detectors have a fifth of it


class UnreadableImage(ValueError):
    """A file, or a picture of it, that cannot be read; the message is the reason that rejected.csv shows."""


class LeftOut(UnreadableImage):
    """A picture that could be read and is not wanted, such as an empty slice: listed, but no sign of damage."""


@dataclass(frozen=True, slots=True)
class RawImage:
    """One picture, upright; 0 is black and the highest value of its type is white."""

    pixels: Pixels  # (H, W), or (H, W, 3) RGB where preprocess.channels is 3; uint8 or uint16
    size: tuple[int, int]  # width, height as stored in the file
    mode: str  # the file's own kind of pixels: Pillow's name such as "RGB" or "I;16", or DICOM's, NIfTI's


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file says of its pictures before any is read."""

    indices: Sequence[int]  # what `read` takes; (0,) for a file of one picture
    labels: Sequence[str | None] | None = None  # one for each index, where the file has them
    splits: Sequence[str | None] | None = None  # train, val or test for each index, where the file says so
    patient: str | None = None  # the identifier as it stands in the file: to be hashed, never shown
    independent: bool = False  # each picture is of its own patient, as in a file of thousands of digits
    companions: Sequence[Path] = ()  # files that belong to this one, such as its labels


class ImageFile(Protocol):
    """An open file. `read` may be called by several threads; pictures are cheapest in the order of their index."""

    @property
    def num_pictures(self) -> int:
        """Of the file, asked for or not: a mask has as many as its image."""
        ...

    def read(self, index: int) -> RawImage:
        """The picture of that index of `Contents.indices`.

        Raises:
            UnreadableImage: it cannot be read, is damaged or too large.
            LeftOut: it is not wanted.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
