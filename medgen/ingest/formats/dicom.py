"""Reader of DICOM files: grey or colour images, one frame at a time.

contents = inspect(Path("ct.dcm"), preprocess)  # the header only
with DicomFile(Path("ct.dcm"), preprocess) as file:
    raw = file.read(0)

pydicom reads headers and uncompressed frames, imagecodecs (libjpeg-turbo, CharLS, OpenJPEG) decodes compressed ones.
No error, warning or log quotes the value of a tag, because any tag may hold a name or a birth date.

Shapes: H W height and width of a frame.
"""

import io
import logging
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medgen.config import IntensityWindow, Preprocess
from medgen.ingest.formats.codestreams import read_jpeg_2000_header, read_jpeg_header
from medgen.ingest.formats.raw import (
    MAX_PIXELS,
    Contents,
    ImageFile,
    LeftOutImage,
    RawImage,
    UnreadableImage,
    check_size,
)
from medgen.ingest.formats.signatures import EMPTY, NUM_BYTES, describe_start
from medgen.ingest.formats.streams import CHUNK
from medgen.ingest.formats.voi_lut import LookupTable, StoredPixels, VoiTransform, Window, apply_voi, to_intensities
from medgen.ingest.formats.windowing import apply_window

T = TypeVar("T")

_MAX_HEADER_BYTES = 16 << 20  # enough for 10,000 frames with their own attributes; Python objects take 80 times that
_MAX_INFLATED_BYTES = 2 * MAX_PIXELS + _MAX_HEADER_BYTES  # of a deflated file, which pydicom inflates without a limit
_MAX_FRAMES = 1_000_000  # the longest series known are slides of 10^5 tiles

_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_JPEG = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70))
_JPEG_LS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (80, 81))
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))  # from 200 on: HTJ2K

_GREY = ("MONOCHROME1", "MONOCHROME2")
_YCC = ("YBR_FULL", "YBR_FULL_422")
_SAMPLES = {  # per pixel
    **dict.fromkeys((*_GREY, "PALETTE COLOR"), 1),
    **dict.fromkeys(("RGB", *_YCC, "YBR_ICT", "YBR_RCT"), 3),  # the JPEG 2000 decoder converts the last two to RGB
}
_RETIRED = ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_422", "YBR_PARTIAL_420")

_PIXEL_ELEMENTS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
_PALETTE = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
_KEYWORDS = [
    *("SOPClassUID", "PatientID", "StudyInstanceUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel"),
    "PlanarConfiguration",
    *("PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", f"{_PALETTE[0]}Descriptor"),
    *("SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SliceThickness", "SpacingBetweenSlices"),
    *(f"{kind}{table}Data" for kind in ("", "Segmented") for table in _PALETTE),
]
# Names of SOP classes that have pixels: an object of such a class without pixels is damaged.
_PIXEL_CLASSES = re.compile(r"Image|Map\b|^Segmentation|Volume (Storage|Analysis)|DICOS|Overlay")
_ENDS_EARLY = "damaged: the pixel data ends early"
_QUIET = re.compile(rf"(pydicom|{re.escape(__name__)})\b")  # modules whose warnings may quote the file


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """Frames and patient of a DICOM file, from the header alone; all frames belong to one patient.

    Without a patient ID the study UID identifies the patient, which keeps a series together.

    Raises:
        UnreadableImage: the file is damaged or cut short, or its pixel format is not supported.
        LeftOutImage: the file is whole and has no images, such as a report, a treatment plan or a DICOMDIR.
    """
    header = read_header(path)
    return Contents(range(header.num_frames), patient=header.patient)


def read_header(path: Path) -> "Header":
    """The header of a file with pixels; errors as `inspect`."""
    return _call_safely(lambda: _read_header(path))


def read_series_uid(path: Path) -> str:
    """SeriesInstanceUID, also of a file whose pixels are damaged; "" if it cannot be read. It must not be shown."""
    import pydicom

    def read() -> str:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if _inflate(file, size) is not None:
                return ""
            file.seek(0)
            bounded: Any = _BoundedReader(file, size)
            tags: list[Any] = ["SeriesInstanceUID"]
            return _get_text(pydicom.dcmread(bounded, stop_before_pixels=True, force=True, specific_tags=tags), tags[0])

    try:
        return _call_safely(read)
    except UnreadableImage:
        return ""


def read_values(
    header: "Header", index: int, limits: IntensityWindow | None, mask: bool = False
) -> NDArray[np.float32]:
    """Intensities (H, W) of a grey frame, such as Hounsfield units, NaN where it is padding; negated if low is white.

    With `mask` the values as they are stored.

    Raises:
        UnreadableImage: the frame is damaged, or low is white and `limits` is a window in the file's unit.
    """

    def read() -> NDArray[np.float32]:
        stored = _read_frame(header, index)
        if mask:
            return stored.codes.astype(np.float32)  # type: ignore[no-any-return]
        transform = _read_voi_transform(header, index, limits)
        values = to_intensities(stored, transform)
        return -values if transform.is_inverted else values

    return _call_safely(read)


class DicomFile(ImageFile):
    """A DICOM file, as `medgen.ingest.formats.raw.ImageFile`; opening it raises the errors of `inspect`.

    Grey values pass through the file's modality and VOI transformations (PS3.3 C.11.1, C.11.2): the ends of the window,
    or else the frame's smallest and largest value, become black and white. `preprocess.window` replaces the VOI
    transformation. Padding is black. With `mask`, every pixel that is not 0 is white.
    """

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        self._header = read_header(path)
        self.num_images = self._header.num_frames
        self._keeps_colour = preprocess.channels == 3
        self._window = preprocess.window
        self._mask = mask
        self._lock = threading.Lock()  # pydicom converts an element in place at the first access

    def read(self, index: int) -> RawImage:
        """Read one frame, counted from 0; thread-safe.

        Raises:
            UnreadableImage: the frame is damaged, cut short or in a format that is not supported.
        """
        header = self._header
        if not 0 <= index < self.num_images:
            raise UnreadableImage(f"no frame {index}: the file has {self.num_images}")
        pixels = _call_safely(lambda: self._read(index))
        mode = f"{header.photometric};{header.bits_stored}"
        return RawImage(np.ascontiguousarray(pixels), (header.columns, header.rows), mode)

    def _read(self, index: int) -> Any:
        header = self._header
        stored = _read_frame(header, index)
        if header.photometric in _GREY:
            if self._mask:
                return np.where(stored.codes != 0, np.uint8(255), np.uint8(0))
            with self._lock:
                transform = _read_voi_transform(header, index, self._window)
            return apply_voi(stored, transform)
        if header.samples == 1:
            with self._lock:
                palette, first = _read_palette(header)
            pixels = stored.map_values(lambda values: palette[np.clip(values - first, 0, len(palette) - 1)])
        else:
            pixels = _to_rgb(stored)
        if self._keeps_colour and not self._mask:
            return pixels if self._window is None else apply_window(pixels, self._window)
        grey: Any = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)  # luma of ITU-R BT.601
        if self._mask:
            return np.where(grey > 0, np.uint8(255), np.uint8(0))
        return grey if self._window is None else apply_window(grey, self._window)


def _call_safely(work: Callable[[], T], message: str = "damaged DICOM file") -> T:
    """Call `work`; raise any error as UnreadableImage without its text and context, which may quote a tag."""
    _silence_pydicom()
    try:
        return work()
    except UnreadableImage as error:
        kind, reason = type(error), str(error)
    except Exception as error:  # parsers raise errors of any type on damaged bytes
        system = error.strerror if isinstance(error, OSError) else None
        kind, reason = UnreadableImage, system or f"{message} ({type(error).__name__})"
    raise kind(reason)


def _silence_pydicom() -> None:
    """Turn off pydicom's warnings and logs, which may quote the file, again on each call: filters may be reset."""
    if not any(module == _QUIET for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_QUIET.pattern)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


# ---- the header


@dataclass(frozen=True, slots=True)
class Header:
    """Checked attributes of a file with pixels."""

    path: Path
    content: bytes | None  # of a deflated file
    dataset: Any
    syntax: str  # UID of the transfer syntax
    keyword: str  # of the element that holds the pixels
    value_type: str  # of that element
    offset: int  # of its value in the file
    fragments: Sequence[Sequence[tuple[int, int]]]  # offset and length of the fragments of each compressed frame
    patient: str | None  # patient ID, or else study UID
    series: str  # UID
    num_frames: int
    rows: int
    columns: int
    samples: int  # per pixel
    planar: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool

    def open(self) -> BinaryIO:
        """The bytes of the file, inflated."""
        return self.path.open("rb") if self.content is None else io.BytesIO(self.content)


class _BoundedReader:
    """File for pydicom that ends after `_MAX_HEADER_BYTES`, so that a false header cannot fill the memory."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._left = file, size, _MAX_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        rest = max(0, self._size - self._file.tell())
        count = rest if count < 0 else min(count, rest)
        self._left -= count
        if self.overrun:
            raise EOFError
        return self._file.read(count)

    @property
    def overrun(self) -> bool:
        return self._left < 0


def _read_header(path: Path) -> Header:
    import pydicom

    with path.open("rb") as plain:
        start = plain.read(NUM_BYTES)
        content = _inflate(plain, os.fstat(plain.fileno()).st_size)
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        bounded: Any = _BoundedReader(file, size)
        try:
            dataset = pydicom.dcmread(bounded, stop_before_pixels=True, force=True, specific_tags=list(_KEYWORDS))
        finally:  # also if pydicom caught the EOFError
            if bounded.overrun:
                raise UnreadableImage(f"a header of more than {_MAX_HEADER_BYTES >> 20} MB")
        element = _read_pixel_element(file)
        if element is None:
            raise _no_pixels_error(dataset, start)
        keyword, value_type, length, implicit, little = element
        native = _IMPLICIT if implicit else _EXPLICIT if little else _BIG_ENDIAN
        syntax = native if content is not None else str(dataset.file_meta.get("TransferSyntaxUID") or native)
        header = _check_header(
            dataset, path=path, content=content, syntax=syntax, keyword=keyword, value_type=value_type,
            offset=file.tell(), fragments=(),
        )  # fmt: skip
        if syntax in (_IMPLICIT, _EXPLICIT, _BIG_ENDIAN):
            if min(length, size - header.offset) < _num_native_bytes(header) or length == 0xFFFFFFFF:
                raise UnreadableImage(_ENDS_EARLY)
            return header
        if syntax not in (_RLE, *_JPEG, *_JPEG_LS, *_JPEG_2000):
            raise UnreadableImage(f"no decoder for {_uid_name(syntax) or 'an unknown transfer syntax'}")
        if length != 0xFFFFFFFF or keyword != "PixelData":
            raise UnreadableImage(f"damaged: the pixel data is not compressed; expected {_uid_name(syntax)}")
        return replace(header, fragments=_find_fragments(header, file, size))


def _inflate(file: BinaryIO, size: int) -> bytes | None:
    """Inflate the dataset of a deflated file (PS3.5 A.5); None for any other file."""
    from pydicom.filereader import read_dataset

    file.seek(128)
    if file.read(4) != b"DICM":
        return None
    bounded: Any = _BoundedReader(file, size)
    meta = read_dataset(bounded, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return None
    inflate, parts, num_bytes = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
    while not inflate.eof:
        packed = inflate.unconsumed_tail or file.read(CHUNK)
        if not packed:
            raise UnreadableImage("damaged: the deflated data ends early")
        parts.append(inflate.decompress(packed, CHUNK))
        num_bytes += len(parts[-1])
        if num_bytes > _MAX_INFLATED_BYTES:
            raise UnreadableImage(f"deflated data of more than {_MAX_INFLATED_BYTES >> 20} MB")
    return b"".join(parts)


def _read_pixel_element(file: BinaryIO) -> tuple[str, str, int, bool, bool] | None:
    """Keyword, VR, length, implicit VR, little endian of the pixel element at this position; None for other elements.

    The element decides, because some files name a wrong transfer syntax.
    """
    head = file.read(8)
    for order in "<>" if len(head) == 8 else "":
        group, number = struct.unpack_from(f"{order}HH", head)
        keyword = _PIXEL_ELEMENTS.get(group << 16 | number)
        if keyword is None:
            continue
        if head[4:6] not in (b"OB", b"OW", b"OF", b"OD", b"UN"):
            (length,) = struct.unpack_from(f"{order}L", head, 4)
            return keyword, "OW", length, True, order == "<"
        (length,) = struct.unpack(f"{order}L", file.read(4))
        return keyword, head[4:6].decode(), length, False, order == "<"
    return None


def _no_pixels_error(dataset: Any, start: bytes) -> UnreadableImage:
    has_size = dataset.get("Rows") is not None
    name = _uid_name(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID"))
    if name:
        kind = UnreadableImage if has_size or _PIXEL_CLASSES.search(name) else LeftOutImage
        return kind(f"no pixel data: {name}")
    if start[128:132] == b"DICM" or has_size:
        return UnreadableImage("no pixel data")
    found = describe_start(start)
    return UnreadableImage(EMPTY if found == EMPTY else f"not a DICOM file: {found}" if found else "not a DICOM file")


def _uid_name(uid: Any) -> str | None:
    """Name of a UID in the standard; never the value itself, which may be any text."""
    from pydicom._uid_dict import UID_dictionary

    entry = UID_dictionary.get(str(uid))
    return entry[0] if entry else None


def _check_header(dataset: Any, **known: Any) -> Header:
    """Check the attributes of the image pixel module (PS3.3 C.7.6.3)."""
    rows, columns = _get_int(dataset, "Rows"), _get_int(dataset, "Columns")
    samples, floats = _get_int(dataset, "SamplesPerPixel", 1), known["keyword"] != "PixelData"
    allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(known["keyword"])
    allocated = allocated or _get_int(dataset, "BitsAllocated")
    stored = allocated if floats else _get_int(dataset, "BitsStored", allocated)
    high_bit = _get_int(dataset, "HighBit", stored - 1)
    num_frames = _get_int(dataset, "NumberOfFrames", 1) or 1
    check_size(columns, rows)
    if not 1 <= num_frames <= _MAX_FRAMES:  # no value in the message: a wrong tag may hold an identifier
        raise UnreadableImage(f"damaged: NumberOfFrames is not from 1 to {_MAX_FRAMES:,}")
    if (allocated not in (1, 8, 16, 32) and not floats) or not 1 <= stored <= allocated:
        raise UnreadableImage(f"{stored} bits stored in {allocated} bits; expected 8, 16 or 32 bits allocated")
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip()
    if photometric in _RETIRED:
        raise UnreadableImage(f"no decoder for {photometric} colours")
    if samples != _SAMPLES.get(photometric):
        raise UnreadableImage(f"damaged: {samples} samples per pixel, which does not fit the colour space")
    return Header(
        dataset=dataset,
        patient=_get_text(dataset, "PatientID") or _get_text(dataset, "StudyInstanceUID") or None,
        series=_get_text(dataset, "SeriesInstanceUID"),
        num_frames=num_frames,
        rows=rows,
        columns=columns,
        samples=samples,
        planar=_get_int(dataset, "PlanarConfiguration", 0),
        photometric=photometric,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit if stored <= high_bit + 1 <= allocated else stored - 1,
        is_signed=not floats and _get_int(dataset, "PixelRepresentation", 0) == 1,
        **known,
    )


def _get_text(dataset: Any, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip()


def _get_int(dataset: Any, keyword: str, default: int | None = None) -> int:
    """An integer of the header; damaged files hold any type in its place."""
    value = _first_value(dataset.get(keyword))
    if value is None and default is not None:
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UnreadableImage(f"damaged: {keyword} is {'missing' if value is None else 'not an integer'}") from None


def _first_value(value: Any) -> Any:
    """The first of several values, as of several windows; None for empty ones."""
    if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        return None if value in ("", b"") else value
    return value[0] if len(value) else None


def _num_native_bytes(header: Header) -> int:
    bits = header.num_frames * header.rows * header.columns * header.samples * header.bits_allocated
    return -(-bits // 8) * (2 if header.photometric == "YBR_FULL_422" else 3) // 3


def _find_fragments(header: Header, file: BinaryIO, size: int) -> Sequence[Sequence[tuple[int, int]]]:
    """Fragments of each compressed frame (PS3.5 A.4), found by their lengths without reading their content."""
    items: list[tuple[int, int]] = []  # offset and length of the offset table, then of each fragment
    file.seek(header.offset)
    while len(items) <= _MAX_FRAMES:
        head = file.read(8)
        if len(head) < 8:
            raise UnreadableImage(_ENDS_EARLY)
        group, number, length = struct.unpack("<HHL", head)
        if (group, number) == (0xFFFE, 0xE0DD):
            break
        start = file.tell()
        if (group, number) != (0xFFFE, 0xE000) or length == 0xFFFFFFFF:
            raise UnreadableImage("damaged: an unexpected element among the compressed frames")
        if start + length > size:
            raise UnreadableImage(_ENDS_EARLY)
        items.append((start, length))
        file.seek(length, os.SEEK_CUR)
    (table_start, table_length), found = (items[0] if items else (0, 0)), items[1:]
    if len(found) < header.num_frames:
        raise UnreadableImage(_ENDS_EARLY)
    if len(found) == header.num_frames:
        return [[fragment] for fragment in found]
    if header.num_frames == 1:
        return [found]
    if table_length != 4 * header.num_frames:
        raise UnreadableImage(f"{len(found)} fragments of {header.num_frames} frames without an offset table")
    file.seek(table_start)
    starts = np.frombuffer(file.read(table_length), "<u4").astype(np.int64) + found[0][0]  # of each frame's content
    owner = np.searchsorted(starts, [start for start, _ in found], side="right") - 1
    fragments: list[list[tuple[int, int]]] = [[] for _ in range(header.num_frames)]
    for frame, fragment in zip(owner.tolist(), found, strict=True):
        fragments[max(frame, 0)].append(fragment)
    return fragments


# ---- the pixels of a frame


def _read_frame(header: Header, index: int) -> StoredPixels:
    if not header.fragments:
        return _read_native(header, index)
    fragments = header.fragments[index]
    total = sum(length for _, length in fragments)
    if total > 2 * header.rows * header.columns * header.samples * header.bits_allocated // 8 + CHUNK:
        raise UnreadableImage("damaged: the compressed data is twice as long as the image")
    data = bytearray()
    with header.open() as file:
        for start, length in fragments:
            file.seek(start)
            data += file.read(length)
    if len(data) < total:
        raise UnreadableImage(_ENDS_EARLY)
    if header.syntax == _RLE:
        return _extract_bits(header, _decode_rle(header, bytes(data)))
    return _call_safely(lambda: _decode(header, bytes(data)), "damaged: the compressed data cannot be decoded")


def _read_native(header: Header, index: int) -> StoredPixels:
    from pydicom.pixels.decoders.base import get_decoder

    options: dict[str, Any] = {
        "rows": header.rows,
        "columns": header.columns,
        "samples_per_pixel": header.samples,
        "planar_configuration": header.planar,
        "photometric_interpretation": header.photometric,
        "number_of_frames": header.num_frames,
        "bits_allocated": header.bits_allocated,
        "bits_stored": header.bits_stored,
        "pixel_representation": 0,
        "pixel_keyword": header.keyword,
        "pixel_vr": header.value_type,
        "correct_unused_bits": False,
    }
    with header.open() as file:
        file.seek(header.offset)
        pixels, _ = get_decoder(header.syntax).as_array(file, index=index, raw=True, **options)
    return _extract_bits(header, pixels.astype(pixels.dtype.newbyteorder("="), copy=False))


def _extract_bits(header: Header, words: Any) -> StoredPixels:
    """Words as allocated -> the bits that hold the value (PS3.5 8.1.1)."""
    if words.dtype.kind == "u" and header.bits_allocated > 1:
        shift = header.high_bit + 1 - header.bits_stored
        if shift:
            words = words >> shift
        if header.bits_stored < header.bits_allocated:
            words = words & words.dtype.type((1 << header.bits_stored) - 1)  # old files keep overlays in the bits above
    return StoredPixels(words, header.bits_stored, header.is_signed, header.photometric in _YCC)


def _decode_rle(header: Header, data: bytes) -> Any:
    """RLE Lossless (PS3.5 Annex G) -> (H, W) or (H, W, 3); a segment holds one byte of one sample of all pixels."""
    num_bytes, num_pixels = header.bits_allocated // 8, header.rows * header.columns
    num_segments = header.samples * num_bytes
    if len(data) < 64 or struct.unpack_from("<L", data)[0] != num_segments or not num_bytes:
        raise UnreadableImage("damaged: the bit depth of the compressed data differs from the header's")
    starts = [*struct.unpack_from(f"<{num_segments}L", data, 4), len(data)]
    planes = np.empty((header.samples, num_pixels, num_bytes), np.uint8)
    for number in range(num_segments):
        packed = data[starts[number] : starts[number + 1]]
        try:  # PackBits as in TIFF, as one long row; Pillow stops at the end of the row
            row = Image.frombytes("L", (num_pixels, 1), packed, "packbits", "L")
        except ValueError:
            raise UnreadableImage(_ENDS_EARLY) from None
        planes[number // num_bytes, :, number % num_bytes] = np.asarray(row)[0]
    words = planes.view(f">u{num_bytes}").reshape(header.samples, header.rows, header.columns)
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    return native[0] if header.samples == 1 else native.transpose(1, 2, 0)


def _decode(header: Header, data: bytes) -> StoredPixels:
    """Decode JPEG, JPEG-LS or JPEG 2000. The bit depth of the data counts, which may differ from the header's."""
    import imagecodecs

    is_ycc = header.photometric in _YCC
    if header.syntax in _JPEG_2000:
        stream, data = read_jpeg_2000_header(data)
        stream.check_size(header.columns, header.rows, header.samples)
        codes: Any = imagecodecs.jpeg2k_decode(data, numthreads=1)
    else:
        stream = read_jpeg_header(data)
        stream.check_size(header.columns, header.rows, header.samples)
        if header.syntax in _JPEG_LS:
            codes = imagecodecs.jpegls_decode(data)
        elif header.samples == 1:
            codes = imagecodecs.jpeg8_decode(data)
        else:
            codes = imagecodecs.jpeg8_decode(data, colorspace="RGB", outcolorspace="RGB")  # no conversion
            is_ycc = is_ycc if stream.is_ycc is None else stream.is_ycc
    shape = (header.rows, header.columns, 3)[: 2 if header.samples == 1 else 3]
    if codes.shape != shape or codes.dtype.kind not in "ui" or not 1 <= stream.bits <= 8 * codes.dtype.itemsize:
        raise UnreadableImage("damaged: the size of the decoded data differs from the header's")
    codes = codes.view(f"u{codes.dtype.itemsize}")
    codes &= codes.dtype.type((1 << stream.bits) - 1)
    return StoredPixels(codes, stream.bits, header.is_signed, is_ycc)


# ---- modality and VOI transformation


def _read_voi_transform(header: Header, index: int, limits: IntensityWindow | None) -> VoiTransform:
    """Transformation of a frame; `limits`, the window of the settings, replaces that of the file."""
    keywords = ("FrameVOILUTSequence", "PixelValueTransformationSequence")
    groups = [*functional_groups(header, index, keywords), header.dataset]  # a frame's come before the dataset's
    window = next((group for group in groups if _get_float(group, "WindowCenter") is not None), header.dataset)
    rescale = next((group for group in groups if _get_float(group, "RescaleSlope") is not None), header.dataset)
    shape = str(header.dataset.get("PresentationLUTShape") or "").strip().upper()
    is_inverted = header.photometric == "MONOCHROME1" or shape == "INVERSE"  # files with both invert once
    if is_inverted and limits is not None and not limits.is_percentile:
        raise UnreadableImage(
            "its largest values are black (MONOCHROME1 or INVERSE); preprocess.window in the file's unit needs files "
            "whose largest values are white: leave it out, or give percentiles"
        )
    return VoiTransform(
        slope=_get_float(rescale, "RescaleSlope") or 1.0,  # a slope of 0 is an error: it would leave no image
        intercept=_get_float(rescale, "RescaleIntercept") or 0.0,
        modality_lut=_read_lut(header, header.dataset.get("ModalityLUTSequence")),
        voi=None if limits else _read_voi_lut(header, window) or _read_window(window),
        window=limits,
        is_inverted=is_inverted,
        padding=_read_padding(header),
    )


def functional_groups(header: Header, index: int, keywords: Sequence[str]) -> list[Any]:
    """Items of these sequences of an enhanced object (PS3.3 C.7.6.16): this frame's first, then the shared."""
    frames = header.dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.dataset.get("SharedFunctionalGroupsSequence") or []
    found: list[Any] = []
    for group in (*frames[index : index + 1], *shared[:1]):
        for keyword in keywords:
            found.extend((group.get(keyword) or [])[:1])
    return found


def _get_float(dataset: Any, keyword: str) -> float | None:
    """A finite number, or None if it is missing or invalid: a frame can be read without a window."""
    try:
        value = float(_first_value(dataset.get(keyword)))
    except (TypeError, ValueError, OverflowError):
        return None
    return value if np.isfinite(value) else None


def _read_window(dataset: Any) -> Window | None:
    centre, width = _get_float(dataset, "WindowCenter"), _get_float(dataset, "WindowWidth")
    function = str(_first_value(dataset.get("VOILUTFunction")) or "LINEAR").strip().upper()
    if centre is None or width is None or width <= 0 or (width < 1 and function == "LINEAR"):
        return None
    return Window(centre, width, function)


def _read_voi_lut(header: Header, dataset: Any) -> LookupTable | None:
    """A VOI LUT scaled so that its lowest and highest entry are 0 and 1: the stated bit depth is often wrong."""
    table = _read_lut(header, dataset.get("VOILUTSequence"))
    if table is None:
        return None
    low, high = table.entries.min(), table.entries.max()
    return LookupTable(table.first, (table.entries - low) / (high - low)) if high > low else None


def _read_lut(header: Header, sequence: Any) -> LookupTable | None:
    if not sequence:
        return None
    descriptor, data = sequence[0].get("LUTDescriptor"), sequence[0].get("LUTData")
    if descriptor is None or data is None:
        return None
    entries = _entries(header, data, int(descriptor[0]) or 65536).astype(np.float64)
    return LookupTable(_first_mapped(header, descriptor), entries) if len(entries) else None


def _entries(header: Header, data: Any, count: int) -> Any:
    """Entries (count,) of 8 or 16 bits; pydicom returns numbers or bytes, depending on the VR."""
    if not isinstance(data, bytes):
        return np.asarray(data if hasattr(data, "__len__") else [data], np.int64)[:count] & 0xFFFF
    order = ">" if header.syntax == _BIG_ENDIAN else "<"
    deep = len(data) >= 2 * count
    return np.frombuffer(data, f"{order}u2" if deep else np.uint8, count=min(count, len(data) // (2 if deep else 1)))


def _first_mapped(header: Header, descriptor: Any) -> int:
    """Stored value of a table's first entry."""
    first = int(descriptor[1])
    return first - 65536 if header.is_signed and first > 32767 else first


def _read_padding(header: Header) -> tuple[float, float] | None:
    """Smallest and largest stored value that is padding (PS3.3 C.7.5.1.1.2), in the type of the pixels."""
    value = _get_float(header.dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = _get_float(header.dataset, "PixelPaddingRangeLimit")
    num_codes = 1 << header.bits_allocated
    lowest = -num_codes // 2 if header.is_signed else 0  # some files write US for SS, or SS for US
    first, second = ((int(end) - lowest) % num_codes + lowest for end in (value, value if limit is None else limit))
    return min(first, second), max(first, second)


# ---- colour


def _to_rgb(stored: StoredPixels) -> Any:
    """Colours of any depth (H, W, 3) -> RGB (H, W, 3): uint8, or uint16 for more than 8 bits."""
    if stored.bits > 16:
        raise UnreadableImage(f"colours of {stored.bits} bits; expected up to 16")
    full, dtype = (255, np.uint8) if stored.bits <= 8 else (65535, np.uint16)
    top = (1 << stored.bits) - 1
    if top == full:
        pixels = stored.codes.astype(dtype, copy=False)
    else:
        pixels = StoredPixels(stored.codes, stored.bits, is_signed=False).map_values(
            lambda values: np.rint(values * (full / top)).astype(dtype)
        )
    if not stored.is_ycc:
        return pixels
    return cv2.cvtColor(np.ascontiguousarray(pixels[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)  # PS3.3 C.7.6.3.1.2


def _read_palette(header: Header) -> tuple[Any, int]:
    """Palette (N, 3) of uint8 or uint16, and the stored value of its first entry (PS3.3 C.7.6.3.1.5)."""
    if header.bits_stored > 16:
        raise UnreadableImage(f"a palette for values of {header.bits_stored} bits; expected at most 16")
    descriptor = header.dataset.get(f"{_PALETTE[0]}Descriptor")
    if descriptor is None or len(descriptor) != 3:
        raise UnreadableImage("damaged: a PALETTE COLOR image without its palette")
    count = int(descriptor[0]) or 65536
    columns = []
    for table in _PALETTE:
        plain, segmented = header.dataset.get(f"{table}Data"), header.dataset.get(f"Segmented{table}Data")
        if plain:
            columns.append(_entries(header, plain, count))
        elif segmented:
            width = 1 if int(descriptor[2]) <= 8 else 2
            columns.append(_expand_segments(_entries(header, segmented, len(segmented) // width).tolist(), count))
    if len({len(column) for column in columns}) != 1 or len(columns) != 3 or not len(columns[0]):
        raise UnreadableImage("damaged: a PALETTE COLOR image without its palette")
    palette = np.stack(columns, axis=1)
    if palette.max() > 255 and not (palette & 255).any():
        palette = palette >> 8  # 8-bit colours in the upper byte
    return palette.astype(np.uint8 if palette.max() < 256 else np.uint16), _first_mapped(header, descriptor)


def _expand_segments(data: list[int], count: int) -> NDArray[np.uint16]:
    """Discrete and linear segments (PS3.3 C.7.9.2) -> entries (count,)."""
    out: list[int] = []
    at = 0
    while at + 2 < len(data) and len(out) < count:
        kind, length = data[at : at + 2]
        if kind == 0:
            out.extend(data[at + 2 : at + 2 + length])
            at += 2 + length
        elif kind == 1 and out:
            out.extend(np.rint(np.linspace(out[-1], data[at + 2], length + 1)[1:]).astype(int).tolist())
            at += 3
        else:
            raise UnreadableImage("no decoder for a palette with indirect segments")
    return np.asarray(out[:count], np.uint16)
