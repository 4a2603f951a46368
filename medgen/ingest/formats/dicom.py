"""DICOM files -> grey or colour pictures, one frame at a time.

contents = inspect(Path("ct.dcm"), preprocess)  # the header only
with DicomFile(Path("ct.dcm"), preprocess) as file:
    raw = file.read(0)

pydicom reads headers and uncompressed frames, imagecodecs (libjpeg-turbo, CharLS, OpenJPEG) the compressed ones.
No value of a tag stands in an error, a warning or a log: files hold names and birth dates where nobody expects them.

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
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medgen.config import Preprocess
from medgen.ingest.formats.codestreams import read_jpeg, read_jpeg_2000
from medgen.ingest.formats.raw import MAX_PIXELS, Contents, LeftOut, RawImage, UnreadableImage
from medgen.ingest.formats.signatures import EMPTY, NUM_BYTES, describe_start
from medgen.ingest.formats.voi_lut import Shades, Stored, Table, Window, render

T = TypeVar("T")

_MAX_HEADER_BYTES = 16 << 20  # 10,000 frames described one by one; as Python objects up to 80 times as much
_MAX_INFLATED_BYTES = 2 * MAX_PIXELS + _MAX_HEADER_BYTES  # of a deflated file, which pydicom would inflate unasked
_MIN_SIDE = 4  # pixels; less is no picture, and a small file could claim a million of them
_MAX_FRAMES = 1_000_000  # slides of 10^5 tiles are the longest series known
_CHUNK = 1 << 20  # bytes of deflated data at a time

_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_JPEG = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70))
_JPEG_LS = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (80, 81))
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))  # from 200 on: HTJ2K

_GREY = ("MONOCHROME1", "MONOCHROME2")
_YCC = ("YBR_FULL", "YBR_FULL_422")
_COLOURS = ("RGB", *_YCC, "YBR_ICT", "YBR_RCT")  # JPEG 2000 turns the last two to RGB itself
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
    *(f"{kind}{table}Data" for kind in ("", "Segmented") for table in _PALETTE),
]
# Classes of objects that have pixels, by their names in the standard: one that comes without them is damaged.
_OF_PICTURES = re.compile(r"Image|Map\b|^Segmentation|Volume (Storage|Analysis)|DICOS|Overlay")
_ENDS_EARLY = "damaged: the pixel data ends early"
_QUIET = re.compile(rf"(pydicom|{re.escape(__name__)})\b")  # whose warnings may quote the file


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """The frames of a DICOM file and its patient, from the header alone; all frames are of one patient.

    Where the patient has no number, the study stands for them: it keeps a series together.

    Raises:
        UnreadableImage: the file is damaged or cut short, or its pictures cannot be read here.
        LeftOut: the file is whole and has no pictures, such as a report, a treatment plan or a DICOMDIR.
    """
    header = _guarded(lambda: _read_header(path))
    return Contents(range(header.num_frames), patient=header.patient)


class DicomFile:
    """A DICOM file, as `medgen.ingest.formats.raw.ImageFile`.

    Grey values go through the file's modality and VOI transformations (PS3.3 C.11.1, C.11.2): the ends of its window
    become black and white; without a window the frame's smallest and largest value do. Padding is black. With `mask`,
    every pixel that is not 0 is white. Opening raises what `inspect` does.
    """

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        self._header = _guarded(lambda: _read_header(path))
        self._colour = preprocess.channels == 3
        self._mask = mask
        self._lock = threading.Lock()  # pydicom converts an element in place when it is first asked for

    @property
    def num_pictures(self) -> int:
        """All frames."""
        return self._header.num_frames

    def read(self, index: int) -> RawImage:
        """The frame of that number, from 0; safe to call from several threads.

        Raises:
            UnreadableImage: the frame is damaged, cut short or in a form that cannot be read here.
        """
        header = self._header
        if not 0 <= index < header.num_frames:
            raise UnreadableImage(f"no frame {index}: the file has {header.num_frames}")
        pixels = _guarded(lambda: self._read(index))
        mode = f"{header.photometric};{header.bits_stored}"
        return RawImage(np.ascontiguousarray(pixels), (header.columns, header.rows), mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass  # each read opens and closes the file: threads share no position in it

    def _read(self, index: int) -> Any:
        header = self._header
        stored = _read_frame(header, index)
        if header.photometric in _GREY:
            if self._mask:
                return np.where(stored.codes != 0, np.uint8(255), np.uint8(0))
            with self._lock:
                shades = _shades_of(header, index)
            return render(stored, shades)
        if header.samples == 1:
            with self._lock:
                palette, first = _palette_of(header)
            pixels = stored.look_up(lambda values: palette[np.clip(values - first, 0, len(palette) - 1)])
        else:
            pixels = _fill_range(stored)
        if self._colour and not self._mask:
            return pixels
        grey: Any = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)  # luma of ITU-R BT.601
        return np.where(grey > 0, np.uint8(255), np.uint8(0)) if self._mask else grey


def _guarded(work: Callable[[], T], what: str = "damaged DICOM file") -> T:
    """What `work` gives; any error becomes one short reason, raised apart from the error, which may quote a tag."""
    _silence()
    try:
        return work()
    except UnreadableImage as error:
        kind, reason = type(error), str(error)
    except Exception as error:  # parsers of damaged bytes raise anything; the file is to blame, not the run
        system = error.strerror if isinstance(error, OSError) else None
        kind, reason = UnreadableImage, system or f"{what} ({type(error).__name__})"
    raise kind(reason)


def _silence() -> None:
    """Keeps pydicom from quoting the file in warnings and logs. Others may reset the filters, so each call looks."""
    if not any(module == _QUIET for _, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_QUIET.pattern)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


# ---- the header


@dataclass(frozen=True, slots=True)
class _Header:
    path: Path
    content: bytes | None  # of a deflated file
    dataset: Any
    syntax: str  # UID of the transfer syntax
    keyword: str  # which element holds the pixels
    value_type: str  # of that element
    offset: int  # of its value in the file
    fragments: Sequence[Sequence[tuple[int, int]]]  # of each compressed frame: offset and length of its parts
    patient: str | None  # or the study
    num_frames: int
    rows: int
    columns: int
    samples: int  # a pixel
    planar: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    def open(self) -> BinaryIO:
        return self.path.open("rb") if self.content is None else io.BytesIO(self.content)


class _Bounded:
    """The part of a file that pydicom uses; stops a header that is no header from being taken into memory."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._left = file, size, _MAX_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        there = max(0, self._size - self._file.tell())
        count = there if count < 0 else min(count, there)
        self._left -= count
        if self.overrun:
            raise EOFError
        return self._file.read(count)

    @property
    def overrun(self) -> bool:
        return self._left < 0


def _read_header(path: Path) -> _Header:
    import pydicom

    with path.open("rb") as plain:
        start = plain.read(NUM_BYTES)
        content = _inflated(plain, os.fstat(plain.fileno()).st_size)
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        bounded: Any = _Bounded(file, size)
        try:
            dataset = pydicom.dcmread(bounded, stop_before_pixels=True, force=True, specific_tags=list(_KEYWORDS))
        finally:  # whatever pydicom makes of it
            if bounded.overrun:
                raise UnreadableImage(f"more than {_MAX_HEADER_BYTES >> 20} MB of header before any pixels")
        element = _read_pixel_element(file)
        if element is None:
            raise _why_no_pixels(dataset, start)
        keyword, value_type, length, implicit, little = element
        native = _IMPLICIT if implicit else _EXPLICIT if little else _BIG_ENDIAN
        syntax = native if content is not None else str(dataset.file_meta.get("TransferSyntaxUID") or native)
        header = _fields(
            dataset, path=path, content=content, syntax=syntax, keyword=keyword, value_type=value_type,
            offset=file.tell(), fragments=(),
        )  # fmt: skip
        if syntax in (_IMPLICIT, _EXPLICIT, _BIG_ENDIAN):
            if min(length, size - header.offset) < _num_native_bytes(header) or length == 0xFFFFFFFF:
                raise UnreadableImage(_ENDS_EARLY)
            return header
        if syntax not in (_RLE, *_JPEG, *_JPEG_LS, *_JPEG_2000):
            raise UnreadableImage(f"no decoder for {_public_name(syntax) or 'an unknown transfer syntax'}")
        if length != 0xFFFFFFFF or keyword != "PixelData":
            raise UnreadableImage(f"damaged: no compressed frames, as {_public_name(syntax)} has them")
        return _with_fragments(header, file, size)


def _inflated(file: BinaryIO, size: int) -> bytes | None:
    """The dataset of a deflated file (PS3.5 A.5), or None for any other file."""
    from pydicom.filereader import read_dataset

    file.seek(128)
    if file.read(4) != b"DICM":
        return None
    bounded: Any = _Bounded(file, size)
    meta = read_dataset(bounded, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return None
    inflate, parts, room = zlib.decompressobj(-zlib.MAX_WBITS), [], _MAX_INFLATED_BYTES
    while not inflate.eof:
        packed = inflate.unconsumed_tail or file.read(_CHUNK)
        if not packed:
            raise UnreadableImage("damaged: the deflated data ends early")
        parts.append(inflate.decompress(packed, _CHUNK))
        room -= len(parts[-1])
        if room < 0:
            raise UnreadableImage(f"deflated data of more than {_MAX_INFLATED_BYTES >> 20} MB")
    return b"".join(parts)


def _read_pixel_element(file: BinaryIO) -> tuple[str, str, int, bool, bool] | None:
    """Keyword, VR, length, implicit VR, little endian of the element that begins here; None where it is another.

    The element itself is asked: some files are not of the transfer syntax that they say.
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


def _why_no_pixels(dataset: Any, start: bytes) -> UnreadableImage:
    is_picture = dataset.get("Rows") is not None
    name = _public_name(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID"))
    if name:
        kind = UnreadableImage if is_picture or _OF_PICTURES.search(name) else LeftOut
        return kind(f"no pixel data: {name}")
    if start[128:132] == b"DICM" or is_picture:
        return UnreadableImage("no pixel data")
    words = describe_start(start)
    return UnreadableImage(EMPTY if words == EMPTY else f"no DICOM file: {words}" if words else "no DICOM file")


def _public_name(uid: Any) -> str | None:
    """Its name in the standard; never the value itself, which may be any text."""
    from pydicom._uid_dict import UID_dictionary

    entry = UID_dictionary.get(str(uid))
    return entry[0] if entry else None


def _fields(dataset: Any, **known: Any) -> _Header:
    """Checks what the image pixel module says (PS3.3 C.7.6.3) before anything is read by it."""
    rows, columns = _whole(dataset, "Rows"), _whole(dataset, "Columns")
    samples, floats = _whole(dataset, "SamplesPerPixel", 1), known["keyword"] != "PixelData"
    allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(known["keyword"])
    allocated = allocated or _whole(dataset, "BitsAllocated")
    stored = allocated if floats else _whole(dataset, "BitsStored", allocated)
    high_bit = _whole(dataset, "HighBit", stored - 1)
    num_frames = _whole(dataset, "NumberOfFrames", 1) or 1
    if rows < 1 or columns < 1 or num_frames < 1:
        raise UnreadableImage("damaged: a picture without pixels")
    if min(rows, columns) < _MIN_SIDE:
        raise UnreadableImage(f"pictures of {columns} x {rows}; expected at least {_MIN_SIDE} x {_MIN_SIDE}")
    if rows * columns > MAX_PIXELS:
        raise UnreadableImage(f"{columns} x {rows} is more than {MAX_PIXELS // 1_000_000} megapixels")
    if num_frames > _MAX_FRAMES:
        raise UnreadableImage(f"more than {_MAX_FRAMES:,} frames")
    if (allocated not in (1, 8, 16, 32) and not floats) or not 1 <= stored <= allocated:
        raise UnreadableImage(f"values of {stored} bits stored in {allocated}; expected in 8, 16 or 32")
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip()
    if photometric in _RETIRED:
        raise UnreadableImage(f"no decoder for {photometric} colours")
    if samples != {**dict.fromkeys((*_GREY, "PALETTE COLOR"), 1), **dict.fromkeys(_COLOURS, 3)}.get(photometric):
        raise UnreadableImage(f"damaged: {samples} samples a pixel of another kind of colour")
    return _Header(
        dataset=dataset,
        patient=_text(dataset, "PatientID") or _text(dataset, "StudyInstanceUID") or None,
        num_frames=num_frames,
        rows=rows,
        columns=columns,
        samples=samples,
        planar=_whole(dataset, "PlanarConfiguration", 0),
        photometric=photometric,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=high_bit if stored <= high_bit + 1 <= allocated else stored - 1,
        signed=not floats and _whole(dataset, "PixelRepresentation", 0) == 1,
        **known,
    )


def _text(dataset: Any, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip()


def _whole(dataset: Any, keyword: str, default: int | None = None) -> int:
    """An integer of the header; a damaged file has anything in its place."""
    value = _first(dataset.get(keyword))
    if value is None and default is not None:
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UnreadableImage(f"damaged: {keyword} is {'missing' if value is None else 'no whole number'}") from None


def _first(value: Any) -> Any:
    """Of several values the first, as of several windows."""
    if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        return None if value in ("", b"") else value
    return value[0] if len(value) else None


def _num_native_bytes(header: _Header) -> int:
    bits = header.num_frames * header.rows * header.columns * header.samples * header.bits_allocated
    return -(-bits // 8) * (2 if header.photometric == "YBR_FULL_422" else 3) // 3


def _with_fragments(header: _Header, file: BinaryIO, size: int) -> _Header:
    """Finds the parts of each compressed frame (PS3.5 A.4) by their lengths, without reading them."""
    items: list[tuple[int, int]] = []  # of each part, and first of the table of offsets
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
            raise UnreadableImage("damaged: something else among the compressed frames")
        if start + length > size:
            raise UnreadableImage(_ENDS_EARLY)
        items.append((start, length))
        file.seek(length, os.SEEK_CUR)
    (table_start, table_length), parts = (items[0] if items else (0, 0)), items[1:]
    if len(parts) < header.num_frames:
        raise UnreadableImage(_ENDS_EARLY)
    if len(parts) == header.num_frames:
        return replace(header, fragments=[[part] for part in parts])
    if header.num_frames == 1:
        return replace(header, fragments=[parts])
    if table_length != 4 * header.num_frames:
        raise UnreadableImage(f"{len(parts)} compressed parts of {header.num_frames} frames, and no table of them")
    file.seek(table_start)
    starts = np.frombuffer(file.read(table_length), "<u4").astype(np.int64) + parts[0][0]  # each of a part's content
    owner = np.searchsorted(starts, [start for start, _ in parts], side="right") - 1
    fragments: list[list[tuple[int, int]]] = [[] for _ in range(header.num_frames)]
    for frame, part in zip(owner.tolist(), parts, strict=True):
        fragments[max(frame, 0)].append(part)
    return replace(header, fragments=fragments)


# ---- the pixels of a frame


def _read_frame(header: _Header, index: int) -> Stored:
    if not header.fragments:
        return _read_native(header, index)
    parts = header.fragments[index]
    total = sum(length for _, length in parts)
    if total > 2 * header.rows * header.columns * header.samples * header.bits_allocated // 8 + _CHUNK:
        raise UnreadableImage("damaged: compressed data twice as long as the picture")
    data = bytearray()
    with header.open() as file:
        for start, length in parts:
            file.seek(start)
            data += file.read(length)
    if len(data) < total:
        raise UnreadableImage(_ENDS_EARLY)
    if header.syntax == _RLE:
        return _placed(header, _decode_rle(header, bytes(data)), header.photometric in _YCC)
    return _guarded(lambda: _decode(header, bytes(data)), "damaged: the compressed data cannot be decoded")


def _read_native(header: _Header, index: int) -> Stored:
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
    return _placed(header, pixels.astype(pixels.dtype.newbyteorder("="), copy=False), header.photometric in _YCC)


def _placed(header: _Header, words: Any, ycc: bool) -> Stored:
    """Words as they are allocated -> the bits of them that are the value (PS3.5 8.1.1)."""
    if words.dtype.kind == "u" and header.bits_allocated > 1:
        shift = header.high_bit + 1 - header.bits_stored
        if shift:
            words = words >> shift
        if header.bits_stored < header.bits_allocated:
            words = words & words.dtype.type((1 << header.bits_stored) - 1)  # old files keep overlays above it
    return Stored(words, header.bits_stored, header.signed, ycc)


def _decode_rle(header: _Header, data: bytes) -> Any:
    """RLE Lossless (PS3.5 Annex G) -> (H, W) or (H, W, 3): a run for each byte of each sample."""
    num_bytes, num_pixels = header.bits_allocated // 8, header.rows * header.columns
    num_segments = header.samples * num_bytes
    if len(data) < 64 or struct.unpack_from("<L", data)[0] != num_segments or not num_bytes:
        raise UnreadableImage("damaged: the compressed data is not of the picture's depth")
    starts = [*struct.unpack_from(f"<{num_segments}L", data, 4), len(data)]
    planes = np.empty((header.samples, num_pixels, num_bytes), np.uint8)
    for number in range(num_segments):
        packed = data[starts[number] : starts[number + 1]]
        try:  # PackBits of TIFF, as one long row; Pillow stops where the row ends
            row = Image.frombytes("L", (num_pixels, 1), packed, "packbits", "L")
        except ValueError:
            raise UnreadableImage(_ENDS_EARLY) from None
        planes[number // num_bytes, :, number % num_bytes] = np.asarray(row)[0]
    words = planes.view(f">u{num_bytes}").reshape(header.samples, header.rows, header.columns)
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    return native[0] if header.samples == 1 else native.transpose(1, 2, 0)


def _decode(header: _Header, data: bytes) -> Stored:
    """JPEG of every kind. The data's own depth counts, which is not always the header's."""
    import imagecodecs

    ycc = header.photometric in _YCC
    if header.syntax in _JPEG_2000:
        stream, data = read_jpeg_2000(data)
        stream.require(header.columns, header.rows, header.samples)
        codes: Any = imagecodecs.jpeg2k_decode(data, numthreads=1)
    else:
        stream = read_jpeg(data)
        stream.require(header.columns, header.rows, header.samples)
        if header.syntax in _JPEG_LS:
            codes = imagecodecs.jpegls_decode(data)
        elif header.samples == 1:
            codes = imagecodecs.jpeg8_decode(data)
        else:
            codes = imagecodecs.jpeg8_decode(data, colorspace="RGB", outcolorspace="RGB")  # that is, as they are
            ycc = ycc if stream.ycc is None else stream.ycc
    shape = (header.rows, header.columns, 3)[: 2 if header.samples == 1 else 3]
    if codes.shape != shape or codes.dtype.kind not in "ui" or not 1 <= stream.bits <= 8 * codes.dtype.itemsize:
        raise UnreadableImage("damaged: the compressed data is of another size than the picture")
    codes = codes.view(f"u{codes.dtype.itemsize}")
    codes &= codes.dtype.type((1 << stream.bits) - 1)
    return Stored(codes, stream.bits, header.signed, ycc)


# ---- what the header says of the shades


def _shades_of(header: _Header, index: int) -> Shades:
    groups = [*_functional_groups(header, index), header.dataset]  # what is said of a frame comes before the rest
    window = next((group for group in groups if _number(group, "WindowCenter") is not None), header.dataset)
    rescale = next((group for group in groups if _number(group, "RescaleSlope") is not None), header.dataset)
    modality = _table(header, header.dataset.get("ModalityLUTSequence"))
    voi: Callable[[Any], Any] | None = _voi_table(header, window) or _window(window)
    shape = str(header.dataset.get("PresentationLUTShape") or "").strip().upper()
    return Shades(
        slope=_number(rescale, "RescaleSlope") or 1.0,  # 0 would be no picture, and is a slip
        intercept=_number(rescale, "RescaleIntercept") or 0.0,
        modality=modality,
        voi=voi,
        inverted=header.photometric == "MONOCHROME1" or shape == "INVERSE",  # files say the same thing twice
        padding=_padding(header),
    )


def _functional_groups(header: _Header, index: int) -> list[Any]:
    """The transformations of an enhanced object (PS3.3 C.7.6.16): this frame's, then all frames'."""
    frames = header.dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.dataset.get("SharedFunctionalGroupsSequence") or []
    found: list[Any] = []
    for group in (*frames[index : index + 1], *shared[:1]):
        for keyword in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
            found.extend((group.get(keyword) or [])[:1])
    return found


def _number(dataset: Any, keyword: str) -> float | None:
    """A number, or None where there is none or it is none: a picture can be had without a window."""
    try:
        value = float(_first(dataset.get(keyword)))
    except (TypeError, ValueError, OverflowError):
        return None
    return value if np.isfinite(value) else None


def _window(dataset: Any) -> Window | None:
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    function = str(_first(dataset.get("VOILUTFunction")) or "LINEAR").strip().upper()
    if centre is None or width is None or width <= 0 or (width < 1 and function == "LINEAR"):
        return None
    return Window(centre, width, function)


def _voi_table(header: _Header, dataset: Any) -> Table | None:
    """A VOI LUT whose own lowest and highest entry are 0 and 1: its stated depth is often not the real one."""
    table = _table(header, dataset.get("VOILUTSequence"))
    if table is None:
        return None
    low, high = table.entries.min(), table.entries.max()
    return Table(table.first, (table.entries - low) / (high - low)) if high > low else None


def _table(header: _Header, sequence: Any) -> Table | None:
    if not sequence:
        return None
    descriptor, data = sequence[0].get("LUTDescriptor"), sequence[0].get("LUTData")
    if descriptor is None or data is None:
        return None
    entries = _entries(header, data, int(descriptor[0]) or 65536).astype(np.float64)
    return Table(_start(header, descriptor), entries) if len(entries) else None


def _entries(header: _Header, data: Any, count: int) -> Any:
    """(count,) of 8 or 16 bits; pydicom gives numbers or bytes, as the file's VR has it."""
    if not isinstance(data, bytes):
        return np.asarray(data if hasattr(data, "__len__") else [data], np.int64)[:count] & 0xFFFF
    order = ">" if header.syntax == _BIG_ENDIAN else "<"
    deep = len(data) >= 2 * count
    return np.frombuffer(data, f"{order}u2" if deep else np.uint8, count=min(count, len(data) // (2 if deep else 1)))


def _start(header: _Header, descriptor: Any) -> int:
    first = int(descriptor[1])
    return first - 65536 if header.signed and first > 32767 else first


def _padding(header: _Header) -> tuple[float, float] | None:
    """Smallest and largest stored value that is padding (PS3.3 C.7.5.1.1.2), where the pixels can hold it."""
    value = _number(header.dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = _number(header.dataset, "PixelPaddingRangeLimit")
    ends = []
    for end in (value, value if limit is None else limit):
        whole = int(end) % (1 << header.bits_allocated)  # US where SS is due, and the other way round
        ends.append(
            whole - (1 << header.bits_allocated) if header.signed and whole >> header.bits_allocated - 1 else whole
        )
    return min(ends), max(ends)


# ---- colour


def _fill_range(stored: Stored) -> Any:
    """Colours of any depth (H, W, 3) -> RGB (H, W, 3) uint8, or uint16 where they have more than 8 bits."""
    if stored.bits > 16:
        raise UnreadableImage(f"colours of {stored.bits} bits; expected up to 16")
    full, dtype = (255, np.uint8) if stored.bits <= 8 else (65535, np.uint16)
    top = (1 << stored.bits) - 1
    if top == full:
        pixels = stored.codes.astype(dtype, copy=False)
    else:
        pixels = Stored(stored.codes, stored.bits, False).look_up(
            lambda values: np.rint(values * (full / top)).astype(dtype)
        )
    if not stored.ycc:
        return pixels
    return cv2.cvtColor(np.ascontiguousarray(pixels[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)  # PS3.3 C.7.6.3.1.2


def _palette_of(header: _Header) -> tuple[Any, int]:
    """The palette (N, 3) uint8 or uint16 and the stored value of its first entry (PS3.3 C.7.6.3.1.5)."""
    if header.bits_stored > 16:
        raise UnreadableImage("a palette for values of more than 16 bits")
    descriptor = header.dataset.get(f"{_PALETTE[0]}Descriptor")
    if descriptor is None or len(descriptor) != 3:
        raise UnreadableImage("damaged: a palette picture without its palette")
    count = int(descriptor[0]) or 65536
    columns = []
    for table in _PALETTE:
        plain, segmented = header.dataset.get(f"{table}Data"), header.dataset.get(f"Segmented{table}Data")
        if plain:
            columns.append(_entries(header, plain, count))
        elif segmented:
            width = 1 if int(descriptor[2]) <= 8 else 2
            columns.append(_expanded(_entries(header, segmented, len(segmented) // width).tolist(), count))
    if len({len(column) for column in columns}) != 1 or len(columns) != 3 or not len(columns[0]):
        raise UnreadableImage("damaged: a palette picture without its palette")
    palette = np.stack(columns, axis=1)
    if palette.max() > 255 and not (palette & 255).any():
        palette = palette >> 8  # 8 bits of colour in the upper byte
    return palette.astype(np.uint8 if palette.max() < 256 else np.uint16), _start(header, descriptor)


def _expanded(data: list[int], count: int) -> NDArray[np.uint16]:
    """Discrete and linear segments (PS3.3 C.7.9.2) -> (count,)."""
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
            raise UnreadableImage("no decoder for a palette that repeats its own segments")
    return np.asarray(out[:count], np.uint16)
