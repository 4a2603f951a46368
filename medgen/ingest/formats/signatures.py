"""Recognises a file by its first bytes. No result quotes the file's text, which may name a patient.

kind_of_start(b"\\x89PNG\\r\\n\\x1a\\n…")   # "raster"
describe_start(b"%PDF-1.7…")             # "a PDF document"
"""

import codecs
import re

NUM_BYTES = 512  # that the tables below need
EMPTY = "empty file"
TEXT = "a text file"
LFS_POINTER = "a Git LFS pointer instead of the file (run: git lfs pull)"

_RASTER_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# DICOM without a preamble: group 2 or 8 with explicit VR, or the length or character set of group 8 with implicit VR
_DATA_SET = re.compile(rb"[\x02\x08]\0..(?:UL|CS|UI|OB|DA|LO)|\x08\0(?:\0\0\x04|\x05\0.)\0\0\0", re.DOTALL)
_KINDS = {"raster": "a PNG, JPEG, BMP or TIFF image", "dicom": "a DICOM file", "volume": "a NIfTI volume"}
_CONVERT = "convert it to PNG"
_UNPACK = "unpack it"

_OTHERS = (  # offset, bytes at that offset, description; the first match counts
    (0, b"version https://git-lfs", LFS_POINTER),
    (0, b"GIF87a", f"a GIF image: {_CONVERT}"),
    (0, b"GIF89a", f"a GIF image: {_CONVERT}"),
    (8, b"WEBP", f"a WebP image: {_CONVERT}"),
    (4, b"jP  \r\n\x87\n", f"a JPEG 2000 image: {_CONVERT}"),
    (0, b"\xff\x4f\xff\x51", f"a JPEG 2000 image: {_CONVERT}"),
    (4, b"JXL \r\n\x87\n", f"a JPEG XL image: {_CONVERT}"),
    (4, b"ftypavif", f"an AVIF image: {_CONVERT}"),
    (4, b"ftyphei", f"a HEIC image: {_CONVERT}"),
    (4, b"ftypmif1", f"a HEIC image: {_CONVERT}"),
    (0, b"8BPS", f"a Photoshop image: {_CONVERT}"),
    (4, b"ftyp", "a video"),
    (8, b"AVI ", "a video"),
    (0, b"CDF\1", "NetCDF, such as MINC: convert MINC with mnc2nii"),
    (0, b"CDF\2", "NetCDF, such as MINC: convert MINC with mnc2nii"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5, such as weights of Keras or MINC 2 (convert MINC with mnc2nii)"),
    (0, b"NRRD0", "an NRRD volume: convert it to NIfTI"),
    (0, b"ObjectType = Image", "a MetaImage volume: convert it to NIfTI"),
    (0, b"MATLAB 5.0 MAT-file", "a MATLAB file"),
    (0, b"\x93NUMPY", "a NumPy array: save it as an .npz of the MedMNIST layout"),
    (0, b"\x1f\x8b", f"a gzip archive: {_UNPACK}"),
    (0, b"BZh", f"a bzip2 archive: {_UNPACK}"),
    (0, b"\xfd7zXZ\0", f"an xz archive: {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"a zstd archive: {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (0, b"Rar!\x1a\x07", f"a RAR archive: {_UNPACK}"),
    (0, b"PK\3\4", f"a zip archive: {_UNPACK}"),
    (0, b"PK\5\6", "an empty zip archive"),
    (257, b"ustar", f"a tar archive: {_UNPACK}"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"\0\0\0\1Bud1", "folder settings of macOS"),
    (0, b"\0\5\x16\7", "attributes of a macOS file"),
    (0, b"\x7fELF", "a program"),
)
_HTML = (b"<!doctype html", b"<html")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\x1b")


def kind_of_start(start: bytes) -> str | None:
    """`raster`, `dicom` or `volume`, the kinds of medgen/ingest/images.py, or None."""
    if start[128:132] == b"DICM" or _DATA_SET.match(start):  # the preamble may be a TIFF header (PS3.10, 7.1)
        return "dicom"
    is_bmp = start.startswith(b"BM") and start[6:10] == bytes(4)  # a text can begin with BM too
    if is_bmp or start.startswith(_RASTER_STARTS):
        return "raster"
    # magic strings of NIfTI-1 and NIfTI-2 (nifti1.h, nifti2.h), each in one file or in two
    if start[344:348] in (b"n+1\0", b"ni1\0") or start[4:12] in (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"):
        return "volume"
    return None


def describe_start(start: bytes) -> str | None:
    """Short description of a file by its first `NUM_BYTES` bytes; None if they are not known."""
    if not start:
        return EMPTY
    for offset, signature, description in _OTHERS:
        if start.startswith(signature, offset):
            return description
    if kind := kind_of_start(start):
        return _KINDS[kind]
    if start.lstrip().lower().startswith(_HTML):
        return "a web page (a failed download?)"
    if start.startswith(_UTF_16) or _is_text(start):
        return TEXT
    return None


def _is_text(start: bytes) -> bool:
    """True for UTF-8, or a single-byte encoding with few accents, without control characters."""
    if any(byte < 32 and byte not in _TEXT_CONTROLS for byte in start):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # the last letter may be cut off
    except UnicodeDecodeError:
        return 4 * sum(byte >= 128 for byte in start) < len(start)
    return True
