"""Types that every reader of image files shares.

Each format is one module with a function `inspect` and a class that implements `ImageFile`:

contents = dicom.inspect(path, preprocess)     # number of images, labels, splits, patient; reads no pixels
with dicom.DicomFile(path, preprocess) as file:
    raw = file.read(0)

Shapes: H W height and width of an image, D depth of a volume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Affine = NDArray[np.float64]  # (4, 4) from indices of voxels to mm towards the patient's Right, Anterior and Superior

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; the largest detectors have a fifth of that
MIN_SIDE = 4  # pixels; smaller images carry no content, and a small file could claim a million of them


class UnreadableImage(ValueError):
    """A file or an image that cannot be read; the message is the reason shown in rejected.csv."""


class LeftOutImage(UnreadableImage):
    """An undamaged image or file that is left out, such as an empty slice; rejected.csv lists it."""


@dataclass(frozen=True, slots=True)
class RawImage:
    """One upright image or volume; 0 is black and the highest value of its type is white."""

    # (H, W), or (H, W, 3) RGB where preprocess.channels is 3, or (D, H, W) of a volume; uint8 or uint16
    pixels: Pixels
    size: tuple[int, int]  # width, height as stored in the file
    mode: str  # pixel type in the format's own terms: Pillow's mode such as "RGB" or "I;16", or DICOM's or NIfTI's
    spacing: tuple[float, float, float] | None = None  # of the voxels along D, H and W, in any unit; None: not a volume
    affine: Affine | None = None  # from indices of D, H and W to mm; None: not a volume, or not in the file

    @property
    def preview(self) -> Pixels:
        """The image; of a volume its three middle planes side by side, with black borders."""
        if self.spacing is None:
            return self.pixels
        depth, height, width = (side // 2 for side in self.pixels.shape)
        planes = (self.pixels[depth], self.pixels[:, height], self.pixels[:, :, width])
        rows = max(len(plane) for plane in planes)
        return np.hstack([np.pad(plane, ((0, rows - len(plane)), (0, 0))) for plane in planes])


@dataclass(frozen=True, slots=True)
class Contents:
    """Metadata of a file's images, known before any pixels are read."""

    indices: Sequence[int]  # arguments of `read`; (0,) for a file of one image
    labels: Sequence[str | None] | None = None  # one per index, if the file has labels
    splits: Sequence[str | None] | None = None  # train, val or test per index, if the file has splits
    patient: str | None = None  # identifier exactly as in the file: hash it before use, never show it
    independent: bool = False  # every image belongs to a different patient, as in a file of thousands of digits
    findings: Sequence[str] | None = None  # one text per index, such as mass+nodule, if images have several labels
    companions: Sequence[Path] = ()  # further files that belong to this one, such as its labels


class SeriesKey(NamedTuple):
    """The series and the patient of a DICOM file, exactly as in the file: never show them."""

    uid: str  # "" without a SeriesInstanceUID
    patient: str | None


class ImageFile(Protocol):
    """An open image file, and the base class of the readers.

    Several threads may call `read`; reading in the order of the indices is fastest.
    """

    num_images: int  # in the file, selected or not: a mask file must have as many as its image file

    def read(self, index: int) -> RawImage:
        """Read the image at one of `Contents.indices`.

        Raises:
            UnreadableImage: the image cannot be read, is damaged or is too large.
            LeftOutImage: preprocess.volume leaves the image out.
        """
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Release what is loaded; a reader that opens the file anew for each `read` has nothing to release."""


def no_volume(kind: str) -> UnreadableImage:
    """The error for a file of flat images where volumes are asked for."""
    return UnreadableImage(
        f"{kind}: preprocess.image_size has three sides, which needs volumes (NIfTI, MGZ, Analyze, DICOM series or "
        "MedMNIST3D)"
    )


def check_size(width: int, height: int, prefix: str = "") -> None:
    """Check the size of an image that a header claims, before any memory is allocated for it.

    Raises:
        UnreadableImage: a side is shorter than `MIN_SIDE`, or there are more than `MAX_PIXELS` pixels.
    """
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(f"{prefix}images of {width} x {height}; expected at least {MIN_SIDE} x {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{prefix}images of {width} x {height}, more than {MAX_PIXELS // 10**6} megapixels")
