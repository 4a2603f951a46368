"""Detect the format of an image file and select its reader.

contents = inspect(path, preprocess)
with open_file(path, preprocess) as file:
    raw = file.read(contents.indices[0])

A format's module is imported when its first file is read. To add a format, add a module to medgen/ingest/formats (see
raw.py there) and its entries here.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from medgen.config import Preprocess
from medgen.ingest.formats.images import SUFFIXES
from medgen.ingest.formats.raw import (
    Contents,
    ImageFile,
    RawImage,
    SeriesKey,
    UnreadableImage,
    no_volume,
)
from medgen.ingest.formats.signatures import NUM_BYTES, TEXT, describe_start, kind_of_start

_KINDS = {
    **dict.fromkeys(SUFFIXES, "raster"),
    **dict.fromkeys((".dcm", ".dicom", ".dic", ".ima"), "dicom"),
    **dict.fromkeys((".nii", ".nii.gz", ".mgz", ".mgh", ".hdr"), "volume"),
    ".npz": "npz",
}
_VOXELS = ".img"  # read through the .hdr of the same name
_TEXTS = {  # descriptions of text files by suffix
    **dict.fromkeys((".csv", ".tsv"), "a table"),
    **dict.fromkeys((".json", ".jsonl"), "a JSON file"),
    ".ipynb": "a notebook",
    ".xml": "an XML file",
    ".svg": "an SVG drawing: convert it to PNG",
}
_BINARIES = {  # descriptions of binary files by suffix, more precise than those by their first bytes
    **dict.fromkeys((".pt", ".pth", ".ckpt"), "a torch checkpoint"),
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "HDF5, such as weights of Keras"),
    **dict.fromkeys((".pkl", ".pickle"), "a Python pickle, which is never opened"),
    **dict.fromkeys((".docx", ".xlsx", ".pptx"), "an Office document"),
    **dict.fromkeys((".mha", ".mhd"), "a MetaImage volume: convert it to NIfTI"),
    ".mnc": "MINC: convert it with mnc2nii",
    ".db": "folder settings of Windows",
    _VOXELS: "voxels without their header (.hdr)",
}


def file_kind(path: Path) -> str | None:
    """`raster`, `dicom`, `volume`, `npz`, `idx` or `cifar`, by name or else by the first bytes; None for other files.

    The suffix of an image format is enough. If the content is something else, the reader reports the reason.
    """
    if _is_special(path):
        return None
    if kind := kind_of_name(path.name):
        return kind
    if path.suffix.lower() == _VOXELS:
        return None
    from medgen.ingest.formats.arrays import is_cifar_batch

    try:
        if is_cifar_batch(path):
            return "cifar"
        start = _start(path)
    except OSError:
        return None
    return kind_of_start(start)


def companion_names(name: str) -> list[str]:
    """Names, in the same folder, of files that may belong to a file: voxels of a header, labels, class names."""
    from medgen.ingest.formats import arrays, nifti

    return [*nifti.voxels_names(name), *arrays.companion_names(name)]


def describe_file(path: Path) -> str:
    """A short description of a file that has no `file_kind`. It contains nothing of the file's text."""
    from medgen.ingest.formats.arrays import is_idx_labels

    if _is_special(path):
        return "not a regular file"
    if is_idx_labels(path.name):
        return "labels without their images (images-idx3-ubyte)"
    try:
        start = _start(path)
    except OSError as error:
        return "a link that leads nowhere" if os.path.islink(path) else error.strerror or type(error).__name__
    found, suffix = describe_start(start), path.suffix.lower()
    if found == TEXT:
        return _TEXTS.get(suffix, found)
    if b"\0" in start:  # without a zero byte it is text, such as a web page or a Git LFS pointer, whatever its name
        found = _BINARIES.get(suffix, found)
    return found or "no image format that is read here"


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """The metadata of a file's images. Reads no pixels.

    Raises:
        UnreadableImage: the file is no image file, or is damaged.
    """
    inspect_format, _ = _format_of(path, preprocess)
    return inspect_format(path, preprocess)


def series_key(path: Path) -> SeriesKey:
    """Series and patient of a DICOM file; errors as `formats.series.read_key`."""
    from medgen.ingest.formats import series

    return series.read_key(path)


def source_files(path: Path, preprocess: Preprocess) -> tuple[Path, ...]:
    """The files that contain the images of one file: itself and, for an Analyze or NIfTI header, its voxels."""
    if path.suffix.lower() != ".hdr":
        return (path,)
    try:
        return (path, *inspect(path, preprocess).companions)
    except UnreadableImage:
        return (path,)


def open_file(path: Path, preprocess: Preprocess, mask: bool = False, slices: Sequence[Path] = ()) -> ImageFile:
    """Open a file for reading. With `mask`, its images are masks: no windowing, rescaling or colour.

    `slices` are the files of a DICOM series, if they are known.

    Raises:
        UnreadableImage: the file is no image file, or is damaged.
    """
    if slices:
        from medgen.ingest.formats import series

        return series.SeriesFile(path, preprocess, mask, slices)
    _, reader = _format_of(path, preprocess)
    return reader(path, preprocess, mask)


def read_image(path: Path, preprocess: Preprocess) -> RawImage:
    """Read one image of a file: the only one, or the middle one of a volume or series.

    Raises:
        UnreadableImage: the file is no image file, or is damaged.
    """
    indices = inspect(path, preprocess).indices
    if not indices:
        raise UnreadableImage("the file contains no image")
    with open_file(path, preprocess) as file:
        return file.read(indices[len(indices) // 2])


def _format_of(
    path: Path, preprocess: Preprocess
) -> tuple[Callable[[Path, Preprocess], Contents], Callable[..., ImageFile]]:
    """The function `inspect` and the reader class of a file's format."""
    match "dicom" if preprocess.has_volumes and path.is_dir() else file_kind(path):
        case "raster" if preprocess.has_volumes:
            raise no_volume("a flat image")
        case "dicom" if preprocess.has_volumes:
            from medgen.ingest.formats import series

            return series.inspect, series.SeriesFile
        case "raster":
            from medgen.ingest.formats import images

            return images.inspect, images.RasterFile
        case "dicom":
            from medgen.ingest.formats import dicom

            return dicom.inspect, dicom.DicomFile
        case "volume":
            from medgen.ingest.formats import nifti

            return nifti.inspect, nifti.VolumeFile
        case None:
            raise UnreadableImage(describe_file(path))
        case _:
            from medgen.ingest.formats import arrays

            return arrays.inspect, arrays.ArrayFile


def kind_of_name(name: str) -> str | None:
    """`file_kind` by the name alone; None if it does not tell."""
    from medgen.ingest.formats.arrays import is_idx_images

    if is_idx_images(name):
        return "idx"
    suffixes = name.lower().rsplit(".", 2)[1:]  # the last two, such as nii and gz
    return next((kind for i in range(len(suffixes)) if (kind := _KINDS.get("." + ".".join(suffixes[i:])))), None)


def _is_special(path: Path) -> bool:
    """True for a folder, pipe, socket or device: opening one could block forever."""
    return os.path.exists(path) and not os.path.isfile(path)  # unlike Path's methods, these never raise


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(NUM_BYTES)
