"""The door to every image file: what kind it is, and the module that reads it.

contents = inspect(path, preprocess)
with open_file(path, preprocess) as file:
    raw = file.read(contents.indices[0])

A format's module is imported when its first file comes. A new format is one module beside the others (see
medgen/ingest/formats/raw.py) and its lines here.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medgen.config import Preprocess
from medgen.ingest.formats.images import SUFFIXES
from medgen.ingest.formats.raw import Contents, ImageFile, RawImage, UnreadableImage
from medgen.ingest.formats.signatures import NUM_BYTES, TEXT, describe_start, kind_of_start

_KINDS = {
    **dict.fromkeys(SUFFIXES, "picture"),
    **dict.fromkeys((".dcm", ".dicom", ".dic", ".ima"), "dicom"),
    **dict.fromkeys((".nii", ".nii.gz", ".mgz", ".mgh", ".hdr"), "volume"),
    ".npz": "npz",
}
_VOXELS = ".img"  # of the .hdr beside it, through which they are read
_TEXTS = {  # by suffix, of files that begin as text
    **dict.fromkeys((".csv", ".tsv"), "a table"),
    **dict.fromkeys((".json", ".jsonl"), "a JSON file"),
    ".ipynb": "a notebook",
    ".xml": "an XML file",
    ".svg": "an SVG drawing: convert it to PNG",
}
_BINARIES = {  # by suffix, of files whose beginning says less
    **dict.fromkeys((".pt", ".pth", ".ckpt"), "a torch checkpoint"),
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "HDF5, such as weights of Keras"),
    **dict.fromkeys((".pkl", ".pickle"), "a Python pickle, which is never opened"),
    **dict.fromkeys((".docx", ".xlsx", ".pptx"), "an Office document"),
    **dict.fromkeys((".mha", ".mhd"), "a MetaImage volume: convert it to NIfTI"),
    ".mnc": "MINC: convert it with mnc2nii",
    ".db": "folder settings of Windows",
    _VOXELS: "voxels without their header (.hdr)",
}


def kind_of(path: Path) -> str | None:
    """`picture`, `dicom`, `volume`, `npz`, `idx` or `cifar`, by name or else by the first bytes; None for all others.

    A name that promises an image is believed; why it cannot be read is for its reader to say.
    """
    if _is_special(path):
        return None
    if kind := _kind_of_name(path.name):
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


def describe(path: Path) -> str:
    """What a file is that `kind_of` does not know, in a few words; never its text."""
    from medgen.ingest.formats.arrays import is_idx_labels

    if _is_special(path):
        return "not a regular file"
    if is_idx_labels(path.name):
        return "labels without their pictures (images-idx3-ubyte)"
    try:
        start = _start(path)
    except OSError as error:
        return "a link that leads nowhere" if os.path.islink(path) else error.strerror or type(error).__name__
    found, suffix = describe_start(start), path.suffix.lower()
    if found == TEXT:
        return _TEXTS.get(suffix, found)
    if b"\0" in start:  # else a page or a pointer that stands for what the name says
        found = _BINARIES.get(suffix, found)
    return found or "no image format that is read here"


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """How many pictures a file has, and what it says of them; no pixels are read.

    Raises:
        UnreadableImage: it is no image file, or damaged.
    """
    return _format_of(path).inspect(path, preprocess)


def bytes_of(path: Path, preprocess: Preprocess) -> tuple[Path, ...]:
    """The files whose bytes make its pictures: itself, and the voxels of an Analyze or NIfTI header."""
    if path.suffix.lower() != ".hdr":
        return (path,)
    try:
        return (path, *inspect(path, preprocess).companions)
    except UnreadableImage:
        return (path,)


def open_file(path: Path, preprocess: Preprocess, mask: bool = False) -> ImageFile:
    """The file, for reading; `mask` says that its pictures are masks, whose values mean more than their brightness.

    Raises:
        UnreadableImage: it is no image file, or damaged.
    """
    return _format_of(path).open(path, preprocess, mask)


def read_image(path: Path, preprocess: Preprocess) -> RawImage:
    """One picture of a file: the only one, or the middle one of a volume or series.

    Raises:
        UnreadableImage: it is no image file, or damaged.
    """
    indices = inspect(path, preprocess).indices
    if not indices:
        raise UnreadableImage("it holds no picture")
    with open_file(path, preprocess) as file:
        return file.read(indices[len(indices) // 2])


@dataclass(frozen=True, slots=True)
class _Format:
    inspect: Callable[[Path, Preprocess], Contents]
    open: Callable[[Path, Preprocess, bool], ImageFile]


def _format_of(path: Path) -> _Format:
    match kind_of(path):
        case "picture":
            from medgen.ingest.formats import images

            return _Format(images.inspect, images.PictureFile)
        case "dicom":
            from medgen.ingest.formats import dicom

            return _Format(dicom.inspect, dicom.DicomFile)
        case "volume":
            from medgen.ingest.formats import nifti

            return _Format(nifti.inspect, nifti.VolumeFile)
        case None:
            raise UnreadableImage(describe(path))
        case kind:
            from medgen.ingest.formats import arrays

            files = {"npz": arrays.NpzFile, "idx": arrays.IdxFile, "cifar": arrays.CifarFile}
            return _Format(arrays.inspect, files[kind])


def _kind_of_name(name: str) -> str | None:
    from medgen.ingest.formats.arrays import is_idx_images

    if is_idx_images(name):
        return "idx"
    suffixes = name.lower().rsplit(".", 2)[1:]  # the last two, such as nii and gz
    return next((kind for i in range(len(suffixes)) if (kind := _KINDS.get("." + ".".join(suffixes[i:])))), None)


def _is_special(path: Path) -> bool:
    """A folder, or a pipe, socket or device: to open one could wait for ever."""
    return os.path.exists(path) and not os.path.isfile(path)  # unlike Path's own, these never raise


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(NUM_BYTES)
