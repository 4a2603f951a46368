"""Reader of NIfTI, MGZ and Analyze volumes: upright grey slices, or whole volumes.

contents = inspect(Path("T1.nii.gz"), preprocess)   # the slices that preprocess.volume selects, from the header alone
with VolumeFile(path, preprocess) as file:
    raw = file.read(contents.indices[0])

nibabel reads the header. This module reads the voxels, one frame only, so that neither a long series nor a false header
can fill the memory. A large volume is mapped from an unnamed temporary file, which bounds the memory even if every
thread has a volume open.

Shapes: A B C the volume's sides as stored.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest.formats.raw import Contents, UnreadableImage
from medgen.ingest.formats.streams import (
    copy_to_mmap,
    max_inflated_bytes,
    open_inflated,
    read_exactly,
    unreadable_errors,
)
from medgen.ingest.formats.volumes import MAX_VOXELS, MAX_VOXELS_IN_MEMORY, OrientedVolume, VolumeHeader, import_nibabel

_PAIR = re.compile(r"(.+)\.(hdr|img)((?:\.gz)?)", re.IGNORECASE)


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """Indices of the slices along `preprocess.volume.axis`, counted from the patient's left, back and foot.

    They depend only on the length of the axis: an image and a mask of equal length have the same indices. With
    `preprocess.has_volumes` the file has one item, the stack of these slices.

    Raises:
        UnreadableImage: the file is not a volume, is damaged or too large, or is the .img of a .hdr (read the .hdr).
    """
    header = _read_header(path, preprocess, mask=False)
    indices = range(1) if preprocess.has_volumes else header.select_slices(preprocess.volume)
    return Contents(indices, companions=() if header.voxels_path == path else (header.voxels_path,))


class VolumeFile(OrientedVolume):
    """One volume of a file, or one frame of a series. A mask of one volume serves any frame."""

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        header = _read_header(path, preprocess, mask)
        super().__init__(header, lambda: _read_voxels(header), preprocess, mask)


# the header


@dataclass(frozen=True)
class _Header(VolumeHeader):
    """Checked fields of a header."""

    voxels_path: Path
    dtype: np.dtype[Any]
    start: int  # of the frame, in bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
    nibabel = import_nibabel()
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
    slope, intercept = parsed.get_slope_inter()
    header = _Header(
        shape,
        dtype.name,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        np.asarray(parsed.get_best_affine(), np.float64),
        voxels_path,
        dtype,
        start + frame * math.prod(shape) * dtype.itemsize,
    )
    header.check(preprocess.volume)
    return header


def _check_shape(parsed: Any) -> tuple[tuple[int, int, int], int]:
    """Sides of the volume (A, B, C) and number of volumes in the series."""
    sides = [int(side) for side in parsed.get_data_shape()]
    text = " x ".join(map(str, sides))
    if len(sides) < 2 or min(sides) < 1 or any(side > 1 for side in sides[4:]):
        raise UnreadableImage(f"an array of {text}; expected a volume, or a series of volumes")
    first, second, third, num_frames = (sides + [1, 1])[:4]
    if first * second * third > MAX_VOXELS:
        raise UnreadableImage(f"{text} voxels; expected at most {MAX_VOXELS} in a volume")
    return (first, second, third), num_frames


# the voxels


def _read_voxels(header: _Header) -> NDArray[Any]:
    """One frame (A, B, C), as stored."""
    with unreadable_errors(), open_inflated(header.voxels_path) as stream:
        stream.seek(header.start)  # gzip inflates in pieces up to there and keeps nothing
        large = math.prod(header.shape) > MAX_VOXELS_IN_MEMORY
        values: Any = (copy_to_mmap if large else read_exactly)(stream, header.num_bytes)
        stream.read(1)  # gzip compares its checksum if this is the end
    return np.frombuffer(values, header.dtype).reshape(header.shape, order="F")
