"""Reader of DICOM series: the slices of one SeriesInstanceUID in a folder as one volume.

with SeriesFile(Path("scans/ct1"), preprocess) as file:   # a folder of one series, or any file of a series
    raw = file.read(0)

A series is read as the NIfTI file that a converter makes of it: intensities after rescale slope and intercept, in the
window of the whole volume, turned to the patient's axes. Slices are ordered by their position along the normal of their
plane, never by file name.

Shapes: A columns, B rows and C slices of the volume as stored.
"""

import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest.formats.dicom import (
    Header,
    functional_groups,
    read_header,
    read_series_uid,
    read_values,
)
from medgen.ingest.formats.raw import MIN_SIDE, Affine, Contents, LeftOutImage, SeriesKey, UnreadableImage
from medgen.ingest.formats.streams import check_temporary_space, unreadable_errors
from medgen.ingest.formats.volumes import MAX_SLICES, MAX_VOXELS, MAX_VOXELS_IN_MEMORY, OrientedVolume, VolumeHeader

_AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))  # ImageOrientationPatient of rows to the left, columns to the back
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes point to the patient's Left, Posterior and Superior
_MAX_ANGLE = 1e-3  # difference of direction cosines
_MAX_SIZE_RATIO = 1e-3  # relative difference of pixel spacings
_MAX_GAP_RATIO = 0.05  # relative difference of the distances between slices
_MIN_GAP_RATIO = 1e-3  # of the largest distance; closer slices have one position


def read_key(path: Path) -> SeriesKey:
    """Series and patient of a DICOM file. A damaged file belongs to its series, which cannot be read without it.

    Raises:
        LeftOutImage: the file is whole and has no images.
        UnreadableImage: the file is damaged and names no series.
    """
    try:
        header = read_header(path)
    except LeftOutImage:
        raise
    except UnreadableImage:
        if uid := read_series_uid(path):
            return SeriesKey(uid, None)
        raise
    return SeriesKey(header.series, header.patient)


def find_files(path: Path) -> list[Path]:
    """The files of a series: all of a folder that has one series, or those of the series that a file belongs to.

    Raises:
        UnreadableImage: the folder has no series or several ones, or the file cannot be read.
    """
    uid = None if path.is_dir() else read_key(path).uid
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted((path if path.is_dir() else path.parent).iterdir()):
        if file.is_file() and not file.name.startswith("."):
            try:
                found[read_key(file).uid].append(file)
            except UnreadableImage:  # not a slice, such as a report or a text file
                continue
    if uid is not None:
        return found[uid]
    if len(found) != 1:
        firsts = ", ".join(files[0].name for files in list(found.values())[:3])
        raise UnreadableImage(
            f"a folder of {len(found)} DICOM series, with the first files {firsts}; expected one: name a file of it"
            if found
            else "a folder without DICOM files; expected the slices of a series"
        )
    return next(iter(found.values()))


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """One volume, and its patient, of a folder of a series or a file of it; errors as `find_files`."""
    return Contents((0,), patient=read_key(find_files(path)[0]).patient)


class SeriesFile(OrientedVolume):
    """A DICOM series, or one file of many frames, as one volume."""

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False, files: Sequence[Path] = ()) -> None:
        """`path` is a folder of one series, or a file of it; `files` are all its files, if they are known.

        Raises:
            LeftOutImage: there are too few slices for a volume, or they have several directions, as localizers do.
            UnreadableImage: a slice is damaged, slices are missing, two have one position, or their sizes or spacings
                differ.
        """
        header, slices = _join(files or find_files(path), preprocess)
        super().__init__(header, partial(_load, header.shape, slices, preprocess, mask), preprocess, mask)


@dataclass(frozen=True)
class _Slice:
    """One frame of a file, with its place in the patient in DICOM's axes (PS3.3 C.7.6.2)."""

    header: Header
    frame: int
    position: NDArray[np.float64] | None  # (3,) of the first pixel's centre, mm
    directions: NDArray[np.float64]  # (2, 3) of the rows and the columns
    pixel_size: tuple[float, float]  # mm between columns, between rows
    thickness: float | None  # mm between slices, if the file names it
    number: float | None

    @property
    def name(self) -> str:
        """Name of the file, with the frame if it has several."""
        name = self.header.path.name
        return f"frame {self.frame} of {name}" if self.header.num_frames > 1 else name


def _join(files: Sequence[Path], preprocess: Preprocess) -> tuple[VolumeHeader, list[_Slice]]:
    """Header of a series, and its slices in order along the normal of their plane."""
    headers = []
    for file in files:
        with unreadable_errors(f"{file.name}: " if len(files) > 1 else ""):
            headers.append(read_header(file))
    num_slices = sum(header.num_frames for header in headers)
    if num_slices < MIN_SIDE:
        found = "1 slice" if num_slices == 1 else f"{num_slices} slices"
        raise LeftOutImage(f"a DICOM series of {found}; expected at least {MIN_SIDE} in a volume")
    if num_slices > MAX_SLICES:
        raise UnreadableImage(f"a DICOM series of {num_slices} slices; expected at most {MAX_SLICES}")
    slices: list[_Slice] = []
    for header in headers:
        with unreadable_errors(f"{header.path.name}: "):
            slices += [_read_slice(header, frame) for frame in range(header.num_frames)]
    first = slices[0]
    if first.header.samples != 1 or first.header.photometric == "PALETTE COLOR":
        raise UnreadableImage("a DICOM series of colour images; expected grey slices")
    shape = (first.header.columns, first.header.rows, len(slices))
    if math.prod(shape) > MAX_VOXELS:
        text = " x ".join(map(str, shape))
        raise UnreadableImage(f"{text} voxels; expected at most {MAX_VOXELS} in a volume")
    _check_equal(slices)
    with np.errstate(all="ignore"):  # damaged positions overflow
        slices, affine = _order(slices)
    mode = f"{first.header.photometric};{first.header.bits_stored}"
    volume = VolumeHeader(shape, mode, 1.0, 0.0, affine)
    volume.check(preprocess.volume)
    return volume, slices


def _read_slice(header: Header, frame: int) -> _Slice:
    keywords = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    groups = [*functional_groups(header, frame, keywords), header.dataset]

    def numbers(keyword: str, count: int) -> list[float] | None:
        """Numbers of the first group that has them."""
        value = next((group.get(keyword) for group in groups if group.get(keyword) not in (None, "")), None)
        try:
            found = [float(each) for each in ([value] if isinstance(value, str | float | int) else value or [])]
        except (TypeError, ValueError):
            found = []
        return found if len(found) == count and np.isfinite(found).all() else None

    spacing = numbers("PixelSpacing", 2)
    if spacing is None or min(spacing) <= 0:
        raise UnreadableImage("no PixelSpacing, so the size of the voxels is unknown")
    position, directions = numbers("ImagePositionPatient", 3), numbers("ImageOrientationPatient", 6)
    thickness = numbers("SpacingBetweenSlices", 1) or numbers("SliceThickness", 1)
    number = numbers("InstanceNumber", 1)
    return _Slice(
        header,
        frame,
        None if position is None else np.array(position),
        _unit_vectors(np.array(_AXIAL if directions is None else directions).reshape(2, 3)),
        (spacing[1], spacing[0]),
        None if thickness is None else abs(thickness[0]),
        None if number is None else number[0],
    )


def _unit_vectors(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(directions, axis=1)
    if np.abs(lengths - 1).max() > 0.1 or abs(directions[0] @ directions[1]) > 0.01:
        raise UnreadableImage("ImageOrientationPatient is not two perpendicular directions of length 1")
    units: NDArray[np.float64] = directions / lengths[:, None]
    return units


def _check_equal(slices: Sequence[_Slice]) -> None:
    """Refuse slices of several directions, sizes, colour spaces or pixel spacings in one series."""
    first = slices[0]
    for other in slices[1:]:
        names = f"{first.name} and {other.name}"
        if np.abs(other.directions - first.directions).max() > _MAX_ANGLE:
            raise LeftOutImage(f"slices of different orientations in one series, as of a localizer ({names})")
        if (other.header.columns, other.header.rows) != (first.header.columns, first.header.rows):
            sizes = (f"{each.header.columns} x {each.header.rows}" for each in (first, other))
            raise UnreadableImage(f"slices of different sizes in one series: {' and '.join(sizes)} ({names})")
        if (other.header.samples, other.header.photometric) != (first.header.samples, first.header.photometric):
            raise UnreadableImage(f"slices of different colour spaces in one series ({names})")
        if not np.allclose(other.pixel_size, first.pixel_size, rtol=_MAX_SIZE_RATIO):
            sizes = (f"{each.pixel_size[0]:.4g} x {each.pixel_size[1]:.4g} mm" for each in (first, other))
            raise UnreadableImage(f"slices of different pixel sizes in one series: {' and '.join(sizes)} ({names})")


def _order(slices: Sequence[_Slice]) -> tuple[list[_Slice], Affine]:
    """Slices in order along the normal, and the affine from columns, rows and slices."""
    directions, pixel_size = slices[0].directions, slices[0].pixel_size
    normal = np.cross(*directions)
    normal /= np.linalg.norm(normal)
    missing = sum(each.position is None for each in slices)
    if missing == len(slices):
        ordered, spacing = _order_by_number(slices)
        origin = np.zeros(3)
    elif missing:
        raise UnreadableImage(f"{missing} of {len(slices)} slices have no ImagePositionPatient")
    else:
        positions = np.array([each.position for each in slices])
        order = np.argsort(positions @ normal, kind="stable")
        ordered, positions = [slices[row] for row in order], positions[order]
        spacing = _check_gaps(ordered, positions @ normal)
        origin = positions[0]
        _check_shifts(ordered, positions - np.outer(positions @ normal, normal))
    lps = np.eye(4)
    lps[:3] = np.column_stack([directions[0] * pixel_size[0], directions[1] * pixel_size[1], normal * spacing, origin])
    return ordered, _TO_RAS @ lps


def _order_by_number(slices: Sequence[_Slice]) -> tuple[list[_Slice], float]:
    """Slices without positions in order of InstanceNumber and frame, and the distance that the first one names."""
    keys = [(each.number, each.frame) for each in slices]
    if any(number is None for number, _ in keys) or len(set(keys)) < len(keys):
        raise UnreadableImage("slices without ImagePositionPatient and without different instance numbers")
    if not slices[0].thickness:
        raise UnreadableImage("slices without ImagePositionPatient, SpacingBetweenSlices and SliceThickness")
    return sorted(slices, key=lambda each: (each.number, each.frame)), slices[0].thickness


def _check_gaps(slices: Sequence[_Slice], places: NDArray[np.float64]) -> float:
    """The distance in mm between slices at `places` along the normal, in order."""
    gaps = np.diff(places)
    typical = float(np.median(gaps))

    def pair(at: int) -> str:
        return f"{slices[at].name} and {slices[at + 1].name}"

    if (twice := np.flatnonzero(gaps <= _MIN_GAP_RATIO * gaps.max())).size:
        raise UnreadableImage(
            f"{twice.size} slices at the position of another one ({pair(int(twice[0]))}); expected one volume in a "
            "series: separate echoes, time points and copies"
        )
    if gaps.max() > 1.5 * typical:
        raise UnreadableImage(
            f"slices are missing: {gaps.max():.4g} mm between {pair(int(gaps.argmax()))}, {typical:.4g} mm elsewhere"
        )
    if np.abs(gaps - typical).max() > _MAX_GAP_RATIO * typical:
        raise UnreadableImage(f"uneven distances of slices: {gaps.min():.4g} to {gaps.max():.4g} mm; expected one")
    return float(places[-1] - places[0]) / (len(places) - 1)


def _check_shifts(slices: Sequence[_Slice], offsets: NDArray[np.float64]) -> None:
    """Refuse slices that are not above each other; `offsets` (C, 3) are their positions within their plane."""
    shift = float(np.linalg.norm(offsets - offsets[0], axis=1).max())
    if shift > min(slices[0].pixel_size):
        raise UnreadableImage(
            f"slices are shifted by {shift:.4g} mm against each other, as by a tilted gantry; expected a straight "
            "stack: convert the series with dcm2niix, which corrects the tilt"
        )


def _load(shape: tuple[int, int, int], slices: Sequence[_Slice], preprocess: Preprocess, mask: bool) -> NDArray[Any]:
    """Intensities (A, B, C), or the stored values of a mask, float32."""
    if math.prod(shape) <= MAX_VOXELS_IN_MEMORY:
        voxels = np.empty(shape, np.float32, order="F")
    else:
        check_temporary_space(4 * math.prod(shape))
        with unreadable_errors(), tempfile.TemporaryFile() as file:
            voxels = np.memmap(file, np.float32, "w+", shape=shape, order="F")
    for place, each in enumerate(slices):
        with unreadable_errors(f"{each.name}: "):
            voxels[:, :, place] = read_values(each.header, each.frame, preprocess.window, mask).T
    return voxels
