"""Reader of NIfTI, MGZ and Analyze volumes: upright grey slices, or whole volumes.

contents = inspect(Path("T1.nii.gz"), preprocess)   # the slices that preprocess.volume selects, from the header alone
with VolumeFile(path, preprocess) as file:
    raw = file.read(contents.indices[0])

nibabel reads the header. This module reads the voxels, one frame only, so that neither a long series nor a false header
can fill the memory. A large volume is mapped from an unnamed temporary file, which bounds the memory even if every
thread has a volume open.

Shapes: X Y Z the volume's sides towards the patient's Right, Anterior and Superior (RAS); A B C its sides as stored.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import IntensityWindow, Preprocess, Volume
from medgen.config.data import PERCENTILE
from medgen.ingest.formats.raw import Contents, ImageFile, LeftOutImage, RawImage, UnreadableImage, check_size
from medgen.ingest.formats.streams import (
    LoadOnce,
    copy_to_mmap,
    max_inflated_bytes,
    open_inflated,
    read_exactly,
    unreadable_errors,
)
from medgen.ingest.formats.windowing import find_limits, sample, stretch

_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # indices into X Y Z
_MAX_VOXELS = 1 << 28  # of a frame: 512 x 512 x 1024, a long CT
_MAX_SLICES = 32_767  # the longest side that NIfTI-1 can hold
_MAX_RESIZED = 8 * _MAX_VOXELS  # pixels of all slices after resizing to square pixels
_MAX_VOXELS_IN_MEMORY = 1 << 25  # 320 x 320 x 320
_PAIR = re.compile(r"(.+)\.(hdr|img)((?:\.gz)?)", re.IGNORECASE)
_MAX_SIDE_RATIO = 1.01  # of the sides of a pixel that counts as square


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """Indices of the slices along `preprocess.volume.axis`, counted from the patient's left, back and foot.

    They depend only on the length of the axis: an image and a mask of equal length have the same indices. With
    `preprocess.has_volumes` the file has one item, the stack of these slices.

    Raises:
        UnreadableImage: the file is not a volume, is damaged or too large, or is the .img of a .hdr (read the .hdr).
    """
    header = _read_header(path, preprocess, mask=False)
    indices = range(1) if preprocess.has_volumes else _select_slices(header, preprocess.volume)
    return Contents(indices, companions=() if header.voxels_path == path else (header.voxels_path,))


def _select_slices(header: "_Header", volume: Volume) -> range:
    """Indices of the slices that preprocess.volume selects."""
    length = header.num_slices(_AXES[volume.axis])
    start = min(round(volume.first * length), length - 1)
    stop = max(round(volume.last * length), start + 1)
    return range(start, stop, volume.step)


class VolumeFile(ImageFile):
    """One volume, or one frame of a series; the first `read` loads it. A mask of one volume serves any frame.

    Axial slices have the patient's front at the top, coronal and sagittal slices the head. Left and right follow the
    radiological convention, as DICOM slices do: the patient's right is on the left of the image, and the front is on
    the left of a sagittal slice. A whole volume starts with the slice at the head, the front or the patient's right, so
    that its other two planes are upright, too.
    """

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        self._volume, self._mask, self._keeps_values = preprocess.volume, mask, preprocess.mask_values is not None
        low, high = preprocess.volume.window
        self._limits = preprocess.window or IntensityWindow(low=low, high=high, unit=PERCENTILE)
        self._axis = _AXES[preprocess.volume.axis]
        self._header = _read_header(path, preprocess, mask)
        self._slices = _select_slices(self._header, preprocess.volume) if preprocess.has_volumes else None
        self.num_images = self._header.num_slices(self._axis) if self._slices is None else 1
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
            return RawImage(np.stack(planes), planes[0].shape[::-1], self._header.dtype.name, spacing)
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
        return RawImage(pixels, (width, height), self._header.dtype.name)

    def _load_volume(self) -> tuple[NDArray[Any], "_Window"]:
        """Voxels (X, Y, Z) as stored, unscaled, and the window of an image."""
        voxels = _read_voxels(self._header)
        window = _Window(0.0, 0.0, 0.0)
        if not self._mask:
            window = _find_window(self._header.scale(sample(voxels)), self._limits)
        return _nibabel().orientations.apply_orientation(voxels, self._header.orientation), window  # without a copy

    def __exit__(self, *exception: object) -> None:
        self._load = LoadOnce(self._load_volume)  # forget the voxels


# the header


@dataclass(frozen=True)
class _Header:
    """Checked fields of a header."""

    voxels_path: Path
    shape: tuple[int, int, int]  # A, B, C
    dtype: np.dtype[Any]
    start: int  # of the frame, in bytes
    slope: float
    intercept: float
    orientation: NDArray[Any]  # (3, 2) as in nibabel: for each of A B C its axis in X Y Z, and its direction, 1 or -1
    voxel_sizes: tuple[float, float, float]  # mm along A, B, C

    @property
    def axes(self) -> list[int]:
        """Index into A B C of the axes X, Y and Z."""
        return [int(axis) for axis in np.argsort(self.orientation[:, 0])]

    def num_slices(self, axis: int) -> int:
        """Number of slices along one axis of X Y Z."""
        return self.shape[self.axes[axis]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

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


def _read_header(path: Path, preprocess: Preprocess, mask: bool) -> _Header:
    with unreadable_errors(damaged="a damaged header"):
        voxels_path = _find_voxels(path)
        with open_inflated(path) as stream:
            parsed = _parse(stream.read(540), is_pair=voxels_path != path)
        with np.errstate(all="ignore"):  # damaged affines overflow
            header = _check(parsed, voxels_path, preprocess, mask)
        end = header.start + header.num_bytes
        if end > max_inflated_bytes(voxels_path):  # before any memory is allocated
            raise UnreadableImage(f"cut short: the voxels should reach byte {end}")
    return header


def _find_voxels(path: Path) -> Path:
    """Path of the file with the voxels: the file itself, or the .img of a .hdr."""
    match = _PAIR.fullmatch(path.name)
    if match is None:
        return path
    stem, suffix, zipped = match.groups()
    if suffix.lower() == "img":
        here = any(path.with_name(f"{stem}.{word}{zipped}").is_file() for word in ("hdr", "HDR"))
        raise UnreadableImage(
            "voxels of the .hdr file, which is read instead" if here else "voxels whose .hdr is not in this folder"
        )
    for name in voxels_names(path.name):
        if path.with_name(name).is_file():
            return path.with_name(name)
    expected = voxels_names(f"{stem[:100]}.{suffix}")[0]
    raise UnreadableImage(f"a header without its voxels: {expected} is not in this folder")


def voxels_names(name: str) -> list[str]:
    """Names that the voxels of a header can have; none for another file."""
    match = _PAIR.fullmatch(name)
    if match is None or match[2].lower() == "img":
        return []
    other = match[1] + (".IMG" if match[2].isupper() else ".img")
    return [f"{other}{match[3]}", other, f"{other}.gz"]


def _parse(block: bytes, is_pair: bool) -> Any:
    """Parse a file's first bytes with nibabel: the fixed fields only, as extensions can have any length."""
    nibabel = _nibabel()
    if len(block) < 4:
        raise UnreadableImage("cut short" if block else "empty file")
    sizes = {struct.unpack(order, block[:4])[0] for order in ("<i", ">i")}
    if 540 in sizes and len(block) >= 540:
        return nibabel.nifti2.Nifti2PairHeader(block, check=False)
    if 348 in sizes and len(block) >= 348:
        if block[344:348] in (b"n+1\0", b"ni1\0"):
            return nibabel.nifti1.Nifti1PairHeader(block[:348], check=False)
        if is_pair:
            return nibabel.spm2analyze.Spm2AnalyzeHeader(block[:348], check=False)
    if block[:4] == b"\0\0\0\1" and len(block) >= 284:
        return nibabel.freesurfer.mghformat.MGHHeader(block[:90], check=False)
    raise UnreadableImage("not a header of NIfTI, MGZ or Analyze, or one that is cut short")


def _check(parsed: Any, voxels_path: Path, preprocess: Preprocess, mask: bool) -> _Header:
    shape, num_frames = _check_shape(parsed)
    frame = 0 if mask and num_frames == 1 else preprocess.volume.frame
    if frame >= num_frames:
        raise UnreadableImage(f"a series of {num_frames}; preprocess.volume.frame is {frame}, counted from 0")
    dtype = np.dtype(parsed.get_data_dtype())
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = "colours" if dtype.names else dtype.name
        raise UnreadableImage(f"voxels are {kind}; expected integers or floats of at most 64 bits")
    start = int(parsed.get_data_offset())
    if start < (0 if _PAIR.fullmatch(voxels_path.name) else parsed.template_dtype.itemsize):
        raise UnreadableImage(f"voxels begin at byte {start}, before the end of the header")
    affine = np.asarray(parsed.get_best_affine(), np.float64)
    if not np.isfinite(affine).all():
        raise UnreadableImage("the affine is not finite")
    orientation = _nibabel().orientations.io_orientation(affine)
    if not np.isfinite(orientation).all():
        raise UnreadableImage("the affine gives no orientation")
    slope, intercept = parsed.get_slope_inter()
    header = _Header(
        voxels_path,
        shape,
        dtype,
        start + frame * math.prod(shape) * dtype.itemsize,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        orientation,
        cast(tuple[float, float, float], tuple(float(size) for size in _nibabel().affines.voxel_sizes(affine))),
    )
    axis = _AXES[preprocess.volume.axis]
    width, height = header.slice_size(axis)
    num_slices = header.num_slices(axis)
    check_size(width, height, f"{preprocess.volume.axis} slices: ")
    if num_slices > _MAX_SLICES:
        raise UnreadableImage(f"{num_slices} slices; expected at most {_MAX_SLICES}")
    if num_slices * width * height > _MAX_RESIZED:
        raise UnreadableImage(
            f"{num_slices} slices of {width} x {height} square pixels; expected at most {_MAX_RESIZED >> 20} megapixels"
        )
    return header


def _check_shape(parsed: Any) -> tuple[tuple[int, int, int], int]:
    """Sides of the volume (A, B, C) and number of volumes in the series."""
    sides = [int(side) for side in parsed.get_data_shape()]
    text = " x ".join(map(str, sides))
    if len(sides) < 2 or min(sides) < 1 or any(side > 1 for side in sides[4:]):
        raise UnreadableImage(f"an array of {text}; expected a volume, or a series of volumes")
    first, second, third, num_frames = (sides + [1, 1])[:4]
    if first * second * third > _MAX_VOXELS:
        raise UnreadableImage(f"{text} voxels; expected at most {_MAX_VOXELS} in a volume")
    return (first, second, third), num_frames


# the voxels


def _read_voxels(header: _Header) -> NDArray[Any]:
    """One frame (A, B, C), as stored."""
    with unreadable_errors(), open_inflated(header.voxels_path) as stream:
        stream.seek(header.start)  # gzip inflates in pieces up to there and keeps nothing
        large = math.prod(header.shape) > _MAX_VOXELS_IN_MEMORY
        values: Any = (copy_to_mmap if large else read_exactly)(stream, header.num_bytes)
        stream.read(1)  # gzip compares its checksum if this is the end
    return np.frombuffer(values, header.dtype).reshape(header.shape, order="F")


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


def _nibabel() -> Any:
    """Import nibabel when a volume is read, because the import is slow; most of it has no types."""
    import nibabel

    return nibabel
