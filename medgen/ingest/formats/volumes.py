"""Voxels with their place in the patient: upright grey slices, or whole volumes; for the readers of all volume formats.

with OrientedVolume(header, load, preprocess, mask=False) as file:
    raw = file.read(0)

Shapes: X Y Z the volume's sides towards the patient's Right, Anterior and Superior (RAS); A B C its sides as stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import IntensityWindow, Preprocess, Volume
from medgen.config.data import PERCENTILE
from medgen.ingest.formats.raw import Affine, ImageFile, LeftOutImage, RawImage, UnreadableImage, check_size
from medgen.ingest.formats.streams import LoadOnce
from medgen.ingest.formats.windowing import find_limits, sample, stretch

MAX_VOXELS = 1 << 28  # of a volume: 512 x 512 x 1024, a long CT
MAX_VOXELS_IN_MEMORY = 1 << 25  # 320 x 320 x 320; larger volumes are mapped from an unnamed temporary file
_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # indices into X Y Z
MAX_SLICES = 32_767  # the longest side that NIfTI-1 can hold
_MAX_RESIZED = 8 * MAX_VOXELS  # pixels of all slices after resizing to square pixels
_MAX_SIDE_RATIO = 1.01  # of the sides of a pixel that counts as square


@dataclass(frozen=True)
class VolumeHeader:
    """Size, place and scale of the voxels."""

    shape: tuple[int, int, int]  # A, B, C
    mode: str  # type of a voxel in the format's own terms
    slope: float
    intercept: float
    affine: Affine  # from indices of A, B and C

    @cached_property
    def orientation(self) -> NDArray[Any]:
        """(3, 2) as in nibabel: for each of A B C its axis in X Y Z, and its direction, 1 or -1."""
        orientation: NDArray[Any] = import_nibabel().orientations.io_orientation(self.affine)
        return orientation

    @cached_property
    def voxel_sizes(self) -> tuple[float, float, float]:
        """Sizes in mm along A, B, C."""
        sizes = import_nibabel().affines.voxel_sizes(self.affine)
        return cast(tuple[float, float, float], tuple(float(size) for size in sizes))

    @property
    def axes(self) -> list[int]:
        """Index into A B C of the axes X, Y and Z."""
        return [int(axis) for axis in np.argsort(self.orientation[:, 0])]

    def num_slices(self, volume: Volume) -> int:
        """Number of slices along `volume.axis`."""
        return self.shape[self.axes[_AXES[volume.axis]]]

    def select_slices(self, volume: Volume) -> range:
        """Indices of the slices that preprocess.volume selects, counted from the patient's left, back and foot."""
        length = self.num_slices(volume)
        start = min(round(volume.first * length), length - 1)
        stop = max(round(volume.last * length), start + 1)
        return range(start, stop, volume.step)

    def scale(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Apply the rescale slope and intercept."""
        with np.errstate(all="ignore"):
            return values.astype(np.float64) * self.slope + self.intercept

    def sizes_along(self, axis: int) -> tuple[float, float, float]:
        """Voxel sizes in mm: across the slices of an axis of X Y Z, along their rows, along their columns."""
        sizes = [self.voxel_sizes[file_axis] for file_axis in self.axes]
        across = sizes.pop(axis)
        return across, sizes[1], sizes[0]

    def slice_size(self, axis: int) -> tuple[int, int]:
        """Width and height of a slice across one axis of X Y Z, in square pixels of the shorter voxel side."""
        across, upwards = (file_axis for place, file_axis in enumerate(self.axes) if place != axis)
        sides = self.voxel_sizes[across], self.voxel_sizes[upwards]
        counts = self.shape[across], self.shape[upwards]
        if max(sides) <= _MAX_SIDE_RATIO * min(sides):
            return counts
        width, height = (round(count * side / min(sides)) for count, side in zip(counts, sides, strict=True))
        return width, height

    def check(self, volume: Volume) -> None:
        """Check the affine and the size of the slices, before any memory is allocated for them.

        Raises:
            UnreadableImage: the affine gives no orientation, or the slices are too small, too large or too many.
        """
        if not np.isfinite(self.affine).all():
            raise UnreadableImage("the affine is not finite")
        if not np.isfinite(self.orientation).all():
            raise UnreadableImage("the affine gives no orientation")
        width, height = self.slice_size(_AXES[volume.axis])
        num_slices = self.num_slices(volume)
        check_size(width, height, f"{volume.axis} slices: ")
        if num_slices > MAX_SLICES:
            raise UnreadableImage(f"{num_slices} slices; expected at most {MAX_SLICES}")
        if num_slices * width * height > _MAX_RESIZED:
            raise UnreadableImage(
                f"{num_slices} slices of {width} x {height} square pixels; expected at most {_MAX_RESIZED >> 20} "
                "megapixels"
            )


class OrientedVolume(ImageFile):
    """One volume; the first `read` loads it.

    Axial slices have the patient's front at the top, coronal and sagittal slices the head. Left and right follow the
    radiological convention, as DICOM slices do: the patient's right is on the left of the image, and the front is on
    the left of a sagittal slice. A whole volume starts with the slice at the head, the front or the patient's right, so
    that its other two planes are upright, too.
    """

    def __init__(
        self, header: VolumeHeader, load: Callable[[], NDArray[Any]], preprocess: Preprocess, mask: bool = False
    ) -> None:
        """`load` returns the voxels (A, B, C), unscaled."""
        self._volume, self._mask, self._keeps_values = preprocess.volume, mask, preprocess.mask_values is not None
        low, high = preprocess.volume.window
        self._limits = preprocess.window or IntensityWindow(low=low, high=high, unit=PERCENTILE)
        self._axis = _AXES[preprocess.volume.axis]
        self._header, self._load_voxels = header, load
        self._slices = header.select_slices(preprocess.volume) if preprocess.has_volumes else None
        self.num_images = header.num_slices(preprocess.volume) if self._slices is None else 1
        self._load = LoadOnce(self._load_volume)

    def read(self, index: int) -> RawImage:
        """Read one slice, or the whole volume.

        An image is uint16, where 0 and 65535 are the ends of the volume's window. A mask is uint8, 255 where it is not
        zero; with `preprocess.mask_values` it is uint16 and keeps its values.

        Raises:
            UnreadableImage: the volume is damaged.
            LeftOutImage: the share of foreground in the slice is below `preprocess.volume.min_foreground`.
        """
        voxels, window = self._load()
        if not 0 <= index < self.num_images:
            raise UnreadableImage(f"slice {index} of {self.num_images}")
        if self._slices is not None:
            planes = [self._grey_values(self._upright(voxels, place), window) for place in reversed(self._slices)]
            sizes = self._header.sizes_along(self._axis)
            spacing = (sizes[0] * self._slices.step, *sizes[1:])
            affine = self._stack_affine(self._slices)
            return RawImage(np.stack(planes), planes[0].shape[::-1], self._header.mode, spacing, affine)
        upright = self._upright(voxels, index)
        if not self._mask:
            share = float(np.mean(np.isfinite(upright) & (upright > window.foreground)))
            if share < self._volume.min_foreground:
                percent = f"{100 * share:.3g} %"
                raise LeftOutImage(f"empty slice: {percent} foreground, less than preprocess.volume.min_foreground")
        interpolation = cv2.INTER_NEAREST if self._mask else cv2.INTER_LINEAR
        return self._to_raw(self._grey_values(upright, window), interpolation)

    def _upright(self, voxels: NDArray[Any], index: int) -> NDArray[np.float64]:
        """One slice (H, W), scaled: Z or Y point up, X or Y to the left."""
        plane = voxels[(slice(None),) * self._axis + (index,)]
        return self._header.scale(plane[::-1, ::-1].T)

    def _stack_affine(self, slices: range) -> Affine:
        """Affine of a whole volume, the stack of `slices` from the last one on, each upright."""
        sides = [self._header.shape[axis] for axis in self._header.axes]
        to_xyz = np.zeros((4, 4))
        to_xyz[3, 3] = 1.0
        across, columns, rows = self._axis, *(axis for axis in range(3) if axis != self._axis)
        to_xyz[across, [0, 3]] = -slices.step, slices[-1]
        to_xyz[rows, [1, 3]] = -1.0, sides[rows] - 1
        to_xyz[columns, [2, 3]] = -1.0, sides[columns] - 1
        to_stored = import_nibabel().orientations.inv_ornt_aff(self._header.orientation, self._header.shape)
        affine: Affine = self._header.affine @ to_stored @ to_xyz
        return affine

    def _grey_values(self, upright: NDArray[np.float64], window: "_Window") -> Any:
        """Grey values of an image, or values of a mask, as `read` returns them."""
        finite = np.isfinite(upright)
        if self._mask and self._keeps_values:
            return np.where(finite, upright, 0).clip(0, 65535).round().astype(np.uint16)
        if self._mask:
            return np.where((upright != 0) & finite, np.uint8(255), np.uint8(0))
        return stretch(upright, window.black, window.white)

    def _to_raw(self, pixels: Any, interpolation: int) -> RawImage:
        height, width = pixels.shape
        target = self._header.slice_size(self._axis)
        if target != (width, height):
            pixels = cv2.resize(pixels, target, interpolation=interpolation)
        return RawImage(pixels, (width, height), self._header.mode)

    def _load_volume(self) -> tuple[NDArray[Any], "_Window"]:
        """Voxels (X, Y, Z) as stored, unscaled, and the window of an image."""
        voxels = self._load_voxels()
        window = _Window(0.0, 0.0, 0.0)
        if not self._mask:
            window = _find_window(self._header.scale(sample(voxels)), self._limits)
        return import_nibabel().orientations.apply_orientation(
            voxels, self._header.orientation
        ), window  # without a copy

    def __exit__(self, *exception: object) -> None:
        self._load = LoadOnce(self._load_volume)  # forget the voxels


@dataclass(frozen=True)
class _Window:
    """Values that become black and white, and the foreground threshold."""

    black: float
    white: float
    foreground: float


def _find_window(samples: NDArray[np.float64], limits: IntensityWindow) -> _Window:
    """Window of a volume, from a sample of its values.

    The foreground threshold is a tenth of the way from the 2nd to the 98th percentile, as BET separates the head from
    the air (Smith, Fast robust automated brain extraction, Human Brain Mapping 17, 2002): noise of the air and single
    bright voxels do not change it, and it also holds for skull-stripped volumes, whose background is zero. It does not
    depend on `limits`, which set the contrast.
    """
    samples = samples[np.isfinite(samples)]
    if not samples.size:
        raise UnreadableImage("no voxel has a finite value")
    darkest, brightest = np.percentile(samples, [2, 98]).tolist()
    return _Window(*find_limits(samples, limits), darkest + 0.1 * (brightest - darkest))


def import_nibabel() -> Any:
    """Import nibabel when a volume is read, because the import is slow; most of it has no types."""
    import nibabel

    return nibabel
