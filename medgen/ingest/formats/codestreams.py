"""Headers of JPEG, JPEG-LS and JPEG 2000 data: size, samples and bit depth.

header = read_jpeg_header(data)
header.check_size(columns=512, rows=512, samples=1)

A decoder allocates memory for the size in the compressed data, so that size is compared with the DICOM header first.
"""

import struct
from dataclasses import dataclass

from medgen.ingest.formats.raw import UnreadableImage

_START, _END, _SCAN, _LS_PARAMETERS = 0xD8, 0xD9, 0xDA, 0xF8
_FRAMES = {0xC0, 0xC1, 0xC3, 0xF7}  # baseline, extended sequential, lossless, JPEG-LS: all that DICOM allows
_OTHER_FRAMES = {0xC2, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_LOSSLESS = 0xC3
_JFIF, _ADOBE = 0xE0, 0xEE
_OVERSIZE = 4  # type of a JPEG-LS parameter segment that replaces the size of the frame
_JP2_SIGNATURE = b"\0\0\0\x0cjP  "
_JPEG_2000_START = b"\xff\x4f\xff\x51"
_MIN_TILE = 1024  # pixels; encoders make tiles of at least 4,096, and a decoder needs kilobytes for each


@dataclass(frozen=True, slots=True)
class CodestreamHeader:
    """Size and sample format of a compressed image."""

    width: int
    height: int
    samples: int  # per pixel
    bits: int  # per sample
    is_ycc: bool | None = None  # the colours are YCbCr; None: not stated

    def check_size(self, columns: int, rows: int, samples: int) -> None:
        """Compare with the DICOM header.

        Raises:
            UnreadableImage: they differ.
        """
        if (self.width, self.height) != (columns, rows):
            raise UnreadableImage(
                f"the header has {columns} x {rows} pixels, the compressed data {self.width} x {self.height}"
            )
        if self.samples != samples:
            raise UnreadableImage(f"the header has {samples} samples per pixel, the compressed data {self.samples}")


def read_jpeg_header(data: bytes) -> CodestreamHeader:
    """Read the frame header of JPEG or JPEG-LS data (ITU-T T.81 B.2, T.87 C.2).

    Raises:
        UnreadableImage: there is no header, its type is not allowed in DICOM, or the data ends early.
    """
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):  # decoders fill missing pixels with grey
        raise UnreadableImage("damaged: the compressed data ends early")
    size, is_ycc, is_lossless = None, None, False
    for marker, segment in _segments(data):
        if marker in _FRAMES and size is None:
            bits, height, width, samples = struct.unpack_from(">BHHB", segment)
            size, is_lossless = (width, height, samples, bits), marker == _LOSSLESS
            if is_ycc is None and segment[6::3][:samples] in (b"RGB", b"rgb"):
                is_ycc = False
        elif marker in _OTHER_FRAMES:
            raise UnreadableImage("no decoder for progressive, hierarchical or arithmetic JPEG")
        elif marker in _FRAMES or (marker == _LS_PARAMETERS and segment[:1] == bytes([_OVERSIZE])):
            raise UnreadableImage("damaged: the compressed data has two sizes")
        elif marker == _ADOBE and segment.startswith(b"Adobe") and len(segment) >= 12:
            is_ycc = segment[11] == 1
        elif marker == _JFIF and segment.startswith(b"JFIF") and is_ycc is None:
            is_ycc = True
    if size is None:
        raise UnreadableImage("damaged: the compressed data is not JPEG")
    return CodestreamHeader(*size, is_ycc=None if is_lossless else is_ycc)  # lossless data: the DICOM header counts


def _segments(data: bytes) -> list[tuple[int, bytes]]:
    """Markers and contents of the segments before the first scan."""
    found: list[tuple[int, bytes]] = []
    if data[:2] != bytes([0xFF, _START]):
        return found
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # a fill byte
            offset += 1
            continue
        if marker in (_SCAN, _END):
            break
        length = int.from_bytes(data[offset + 2 : offset + 4], "big")
        if length < 2:
            break
        found.append((marker, data[offset + 4 : offset + 2 + length]))
        offset += 2 + length
    return found


def read_jpeg_2000_header(data: bytes) -> tuple[CodestreamHeader, bytes]:
    """Read the size header of JPEG 2000 data (ISO/IEC 15444-1 A.5.1); return it and the data without JP2 boxes.

    Raises:
        UnreadableImage: there is no header, the samples differ, or the tiles are smaller than encoders make them.
    """
    data = _strip_boxes(data)
    if not data.startswith(_JPEG_2000_START) or len(data) < 45:
        raise UnreadableImage("damaged: the compressed data is not JPEG 2000")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, samples = struct.unpack_from(
        ">8IH", data, offset=8
    )
    width, height = right - left, bottom - top
    components = [data[offset : offset + 3] for offset in range(42, 42 + 3 * min(samples, 4), 3)]
    if len({bytes(component) for component in components}) != 1 or components[0][1:] != b"\x01\x01":
        raise UnreadableImage("damaged: the samples of the compressed data differ in size or depth")
    if not tile_width or not tile_height or width <= 0 or height <= 0:
        raise UnreadableImage("damaged: the compressed data has no size")
    num_tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if num_tiles > 64 + width * height // _MIN_TILE:
        raise UnreadableImage("damaged: the compressed data has too many tiles for its size")
    return CodestreamHeader(width, height, samples, bits=(components[0][0] & 0x7F) + 1), data


def _strip_boxes(data: bytes) -> bytes:
    """Return the codestream of a JP2 file; other data as it is."""
    offset = 0
    while data.startswith(_JP2_SIGNATURE) and offset + 8 <= len(data):
        length = int.from_bytes(data[offset : offset + 4], "big")
        if data[offset + 4 : offset + 8] == b"jp2c":
            return data[offset + 8 :]
        if length < 8:
            break
        offset += length
    return data
