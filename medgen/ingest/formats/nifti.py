"""A volume of NIfTI, MGZ or Analyze -> its slices, upright and in grey.

contents = inspect(Path("T1.nii.gz"), preprocess)   # the slices that preprocess.volume asks for, from the header alone
with VolumeFile(path, preprocess) as file:
    raw = file.read(contents.indices[0])

nibabel reads the header; the voxels are read here, one frame of them and nothing else, so that neither a long series
nor a header that lies can fill the memory. A large volume is mapped from a temporary file without a name, so that
memory stays bounded however many threads each have one open.

Shapes: X Y Z the volume's sides, to the patient's Right, front (Anterior) and head (Superior).
"""

import gzip
import math
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest.formats.arrays import spill
from medgen.ingest.formats.raw import MAX_PIXELS, Contents, LeftOut, RawImage, UnreadableImage

_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # in X Y Z
_MAX_VOXELS = 1 << 28  # of a frame: 512 x 512 x 1024, a long CT
_MAX_VOXELS_IN_MEMORY = 1 << 25  # 320 x 320 x 320
_MAX_RATIO = 1032  # deflate makes no byte more than this (zlib.net/zlib_tech.html)
_NUM_SAMPLES = 1 << 21  # voxels that the window is found from
_CHUNK = 1 << 20
_PAIR = re.compile(r"(.+)\.(hdr|img)((?:\.gz)?)", re.IGNORECASE)
_SQUARE = 1.01  # pixels of sides nearer than this are square


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """Numbers of the slices along `preprocess.volume.axis`, counted from left, back and foot.

    Volumes as long as each other along the axis have the same numbers.

    Raises:
        UnreadableImage: it is no volume, is damaged or too large, or is the .img of a .hdr, which is the file to read.
    """
    header = _read_header(path, preprocess, mask=False)
    volume, length = preprocess.volume, header.num_slices(_AXES[preprocess.volume.axis])
    start = min(round(volume.first * length), length - 1)
    stop = max(round(volume.last * length), start + 1)
    return Contents(
        range(start, stop, volume.step), companions=() if header.voxels_path == path else (header.voxels_path,)
    )


class VolumeFile:
    """One volume, or one frame of a series; loaded at the first `read`. A mask of one volume serves any frame.

    Axial slices have the patient's front at the top, coronal and sagittal ones the head. Left and right are as
    radiologists look at them, and as DICOM slices come: the patient's right is on the picture's left, and a sagittal
    slice looks to the left.
    """

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        self._volume, self._mask, self._keeps_values = preprocess.volume, mask, preprocess.mask_values is not None
        self._axis = _AXES[preprocess.volume.axis]
        self._header = _read_header(path, preprocess, mask)
        self._voxels: NDArray[Any] | None = None  # (X, Y, Z) as stored, unscaled
        self._reason = ""  # why they cannot be loaded
        self._window = _Window(0.0, 0.0, 0.0)
        self._lock = threading.Lock()

    @property
    def num_pictures(self) -> int:
        """All slices along the axis: a mask must have as many as its image."""
        return self._header.num_slices(self._axis)

    def read(self, index: int) -> RawImage:
        """That slice: uint16, the volume's window stretched over it; of a mask uint8, 255 where it is not zero,
        or uint16, its values, where `preprocess.mask_values` tells them apart.

        Raises:
            UnreadableImage: the volume is damaged.
            LeftOut: less of the slice is foreground than `preprocess.volume.min_foreground`.
        """
        voxels = self._load()
        if not 0 <= index < voxels.shape[self._axis]:
            raise UnreadableImage(f"slice {index} of {voxels.shape[self._axis]}")
        plane = voxels[(slice(None),) * self._axis + (index,)]
        upright = self._header.scale(plane[::-1, ::-1].T)  # Z or Y downwards, X or Y to the left
        finite = np.isfinite(upright)
        if self._mask and self._keeps_values:
            whole = np.where(finite, upright, 0).clip(0, 65535).round().astype(np.uint16)
            return self._picture(whole, cv2.INTER_NEAREST)
        if self._mask:
            return self._picture(np.where((upright != 0) & finite, np.uint8(255), np.uint8(0)), cv2.INTER_NEAREST)
        share = float(np.mean(finite & (upright > self._window.foreground)))
        if share < self._volume.min_foreground:
            raise LeftOut(f"empty slice: {100 * share:.3g} % foreground, less than preprocess.volume.min_foreground")
        return self._picture(self._window.stretch(upright, finite), cv2.INTER_LINEAR)

    def _picture(self, pixels: Any, interpolation: int) -> RawImage:
        height, width = pixels.shape
        target = self._header.picture_size(self._axis)
        if target != (width, height):
            pixels = cv2.resize(pixels, target, interpolation=interpolation)
        return RawImage(pixels, (width, height), self._header.dtype.name)

    def _load(self) -> NDArray[Any]:
        with self._lock:
            if self._reason:
                raise UnreadableImage(self._reason)
            if self._voxels is None:
                try:
                    voxels = _read_voxels(self._header)
                    if not self._mask:
                        self._window = _find_window(self._header.scale(_sample(voxels)), self._volume.window)
                except UnreadableImage as error:
                    self._reason = str(error)  # once for all slices, as a damaged file may be long
                    raise
                self._voxels = _turn(voxels, self._header)
            return self._voxels

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._voxels = None


# the header


@dataclass(frozen=True)
class _Header:
    """What is needed of a header, checked. A, B and C are the file's own axes, in its own order."""

    voxels_path: Path
    shape: tuple[int, int, int]  # A, B, C
    dtype: np.dtype[Any]
    start: int  # of the frame, in bytes
    slope: float
    intercept: float
    orientation: NDArray[
        Any
    ]  # (3, 2): of A, B and C the axis in X Y Z, and 1 or -1 for its direction; as nibabel has it
    voxel_sizes: tuple[float, float, float]  # mm along A, B, C

    @property
    def axes(self) -> list[int]:
        """Which of A, B, C runs along X, Y and Z."""
        return [int(axis) for axis in np.argsort(self.orientation[:, 0])]

    def num_slices(self, axis: int) -> int:
        """Across that axis of X Y Z."""
        return self.shape[self.axes[axis]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def scale(self, values: NDArray[Any]) -> NDArray[np.float64]:
        with np.errstate(all="ignore"):
            return values.astype(np.float64) * self.slope + self.intercept

    def picture_size(self, axis: int) -> tuple[int, int]:
        """Width and height of a slice across that axis of X Y Z, in square pixels as small as the smaller side."""
        across, upwards = (file_axis for place, file_axis in enumerate(self.axes) if place != axis)
        sides = self.voxel_sizes[across], self.voxel_sizes[upwards]
        counts = self.shape[across], self.shape[upwards]
        if max(sides) <= _SQUARE * min(sides):
            return counts
        width, height = (round(count * side / min(sides)) for count, side in zip(counts, sides, strict=True))
        return width, height


def _read_header(path: Path, preprocess: Preprocess, mask: bool) -> _Header:
    with _reasons():
        voxels_path = _voxels_path(path)
        with _open(path) as stream:
            parsed = _parse(stream.read(540), is_pair=voxels_path != path)
        with np.errstate(all="ignore"):  # of an affine with values that no scanner wrote
            header = _check(parsed, voxels_path, preprocess, mask)
        _check_length(header)
    return header


def _voxels_path(path: Path) -> Path:
    """The file with the voxels: the file itself, or the .img of a .hdr."""
    match = _PAIR.fullmatch(path.name)
    if match is None:
        return path
    stem, suffix, zipped = match.groups()
    if suffix.lower() == "img":
        here = any(path.with_name(f"{stem}.{word}{zipped}").is_file() for word in ("hdr", "HDR"))
        raise UnreadableImage(
            "the voxels of a .hdr, which is the file to read" if here else "the voxels of a .hdr that is not here"
        )
    other = ".IMG" if suffix.isupper() else ".img"
    for name in (f"{stem}{other}{zipped}", f"{stem}{other}", f"{stem}{other}.gz"):
        if path.with_name(name).is_file():
            return path.with_name(name)
    raise UnreadableImage(f"a header without its voxels: {stem[:100]}{other} is not here")


def _parse(block: bytes, is_pair: bool) -> Any:
    """nibabel's header of the file's first bytes. Only the fixed fields: extensions can be of any length."""
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
    raise UnreadableImage("no header of NIfTI, MGZ or Analyze, or one that is cut short")


def _check(parsed: Any, voxels_path: Path, preprocess: Preprocess, mask: bool) -> _Header:
    shape, num_frames = _shape(parsed)
    frame = 0 if mask and num_frames == 1 else preprocess.volume.frame
    if frame >= num_frames:
        raise UnreadableImage(f"a series of {num_frames}; preprocess.volume.frame is {frame}, counted from 0")
    dtype = np.dtype(parsed.get_data_dtype())
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = "colours" if dtype.names else dtype.name
        raise UnreadableImage(f"voxels are {kind}; expected whole or real numbers of at most 64 bits")
    start = int(parsed.get_data_offset())
    if start < (0 if _PAIR.fullmatch(voxels_path.name) else parsed.template_dtype.itemsize):
        raise UnreadableImage(f"voxels begin at byte {start}, before the header's end")
    affine = np.asarray(parsed.get_best_affine(), np.float64)
    if not np.isfinite(affine).all():
        raise UnreadableImage("the affine is not finite")
    orientation = _nibabel().orientations.io_orientation(affine)
    if not np.isfinite(orientation).all():
        raise UnreadableImage("the affine does not say how the volume lies")
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
    width, height = header.picture_size(_AXES[preprocess.volume.axis])
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"a slice of {width} x {height} square pixels is more than {MAX_PIXELS // 10**6} megapixels"
        )
    return header


def _shape(parsed: Any) -> tuple[tuple[int, int, int], int]:
    """The volume's sides and the number of volumes."""
    sides = [int(side) for side in parsed.get_data_shape()]
    text = " x ".join(map(str, sides))
    if len(sides) < 2 or min(sides) < 1 or any(side > 1 for side in sides[4:]):
        raise UnreadableImage(f"an array of {text}; expected a volume, or a series of volumes")
    first, second, third, num_frames = (sides + [1, 1])[:4]
    if first * second * third > _MAX_VOXELS:
        raise UnreadableImage(f"{text} voxels; expected at most {_MAX_VOXELS} in a volume")
    return (first, second, third), num_frames


def _check_length(header: _Header) -> None:
    """A header may promise more than there is: nothing is allocated for that."""
    with header.voxels_path.open("rb") as file:
        is_zipped = file.read(2) == b"\x1f\x8b"
    length = header.voxels_path.stat().st_size * (_MAX_RATIO if is_zipped else 1)
    if header.start + header.num_bytes > length:
        raise UnreadableImage(f"cut short: the voxels should reach byte {header.start + header.num_bytes}")


# the voxels


def _read_voxels(header: _Header) -> NDArray[Any]:
    """One frame (A, B, C), as stored."""
    with _reasons(), _open(header.voxels_path) as stream:
        stream.seek(header.start)  # gzip's seek inflates piece by piece and keeps nothing
        large = math.prod(header.shape) > _MAX_VOXELS_IN_MEMORY
        values: Any = spill(stream, header.num_bytes) if large else _take(stream, header.num_bytes)
        stream.read(1)  # where it is the end, gzip compares its checksum
    return np.frombuffer(values, header.dtype).reshape(header.shape, order="F")


def _take(stream: IO[bytes], num_bytes: int) -> NDArray[np.uint8]:
    buffer = np.empty(num_bytes, np.uint8)
    view, filled = buffer.data, 0
    while filled < num_bytes:
        count = cast(Any, stream).readinto(view[filled : filled + _CHUNK])
        if not count:
            raise UnreadableImage(f"cut short: {filled} of {num_bytes} bytes of the voxels")
        filled += count
    return buffer


def _turn(voxels: NDArray[Any], header: _Header) -> NDArray[Any]:
    """(A, B, C) -> (X, Y, Z), without a copy."""
    return cast(NDArray[Any], _nibabel().orientations.apply_orientation(voxels, header.orientation))


def _sample(voxels: NDArray[Any]) -> NDArray[Any]:
    """Enough voxels for percentiles, the same ones each time.

    Multiples of the golden ratio, modulo 1, lie evenly and in step with no side of the volume (Knuth, The Art of
    Computer Programming 3, 6.4).
    """
    flat: NDArray[Any] = voxels.reshape(-1, order="F")
    if flat.size <= _NUM_SAMPLES:
        return flat
    places = np.arange(_NUM_SAMPLES, dtype=np.uint64) * np.uint64(2654435769) % np.uint64(1 << 32)
    places = places * np.uint64(flat.size) >> np.uint64(32)
    return cast(NDArray[Any], flat[places])


@dataclass(frozen=True)
class _Window:
    """Values that become black and white, and the one above which there is tissue."""

    black: float
    white: float
    foreground: float

    def stretch(self, values: NDArray[np.float64], finite: NDArray[np.bool_]) -> NDArray[np.uint16]:
        """Values -> 0 to 65535; black where they are not finite."""
        with np.errstate(all="ignore"):
            shares = (values - self.black) / (self.white - self.black)
            shares = np.where(finite & (shares > 0), np.minimum(shares, 1.0), 0.0)
        return np.rint(shares * 65535).astype(np.uint16)


def _find_window(samples: NDArray[np.float64], percentiles: tuple[float, float]) -> _Window:
    """The window of a volume's values.

    Foreground is what lies more than a tenth of the way from the 2nd to the 98th percentile, the rule by which BET
    tells a head from the air around it (Smith, Fast robust automated brain extraction, Human Brain Mapping 17, 2002):
    it ignores the air's noise and single bright voxels, and holds too where the air is all zeros because the brain was
    cut out. It does not move with `volume.window`, which is a matter of contrast.
    """
    samples = samples[np.isfinite(samples)]
    if not samples.size:
        raise UnreadableImage("no voxel has a finite value")
    black, white, darkest, brightest = np.percentile(samples, [*percentiles, 2, 98]).tolist()
    if black == white:  # nearly all is background, as in the map of a lesion
        black, white = float(samples.min()), float(samples.max())
    return _Window(black, white, darkest + 0.1 * (brightest - darkest))


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, inflated where it is gzip: its content decides, not its name."""
    with path.open("rb") as file:
        is_zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_zipped:
            yield file
            return
        with gzip.open(file) as stream:
            yield cast(IO[bytes], stream)


@contextmanager
def _reasons() -> Iterator[None]:
    """What gzip, numpy and nibabel raise on a damaged file, as a reason."""
    nibabel = _nibabel()
    try:
        yield
    except UnreadableImage:
        raise
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise UnreadableImage("damaged or cut short") from None
    except OSError as error:
        raise UnreadableImage(error.strerror or "damaged") from None
    except (
        nibabel.spatialimages.HeaderDataError,
        nibabel.filebasedimages.ImageFileError,
        nibabel.wrapstruct.WrapStructError,
        *(LookupError, ValueError, TypeError, OverflowError),
    ) as error:
        raise UnreadableImage(f"a damaged header ({type(error).__name__})") from None


def _nibabel() -> Any:
    """nibabel, most of which has no types; imported where a volume is read, as it takes a moment."""
    import nibabel

    return nibabel
