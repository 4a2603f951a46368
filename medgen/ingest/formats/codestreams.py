"""The first bytes of JPEG, JPEG-LS and JPEG 2000 data: what size and depth a decoder is about to believe.

stream = read_jpeg(data)
stream.require(columns=512, rows=512, samples=1)

A decoder reserves memory for the size that the data claims, whatever the file around it says; so that is checked first.
"""

import struct
from dataclasses import dataclass

from medgen.ingest.formats.raw import UnreadableImage

_START, _END, _SCAN, _LS_PARAMETERS = 0xD8, 0xD9, 0xDA, 0xF8
_FRAMES = {0xC0, 0xC1, 0xC3, 0xF7}  # baseline, extended sequential, lossless; JPEG-LS. DICOM allows no other
_OTHER_FRAMES = {0xC2, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_LOSSLESS = 0xC3
_JFIF, _ADOBE = 0xE0, 0xEE
_OVERSIZE = 4  # a JPEG-LS parameter segment that replaces the frame's size
_JP2_SIGNATURE = b"\0\0\0\x0cjP  "
_JPEG_2000_START = b"\xff\x4f\xff\x51"
_MIN_TILE = 1024  # pixels; an encoder makes them 4,096 or larger, a decoder spends kilobytes on each


@dataclass(frozen=True, slots=True)
class Codestream:
    """What compressed data says of its picture."""

    width: int
    height: int
    samples: int  # a pixel
    bits: int  # a sample
    ycc: bool | None = None  # whether it says that its colours are YCbCr; None: it says nothing

    def require(self, columns: int, rows: int, samples: int) -> None:
        """Compares with what the file says.

        Raises:
            UnreadableImage: they differ.
        """
        if (self.width, self.height) != (columns, rows):
            raise UnreadableImage(
                f"the file says {columns} x {rows} pixels, its compressed data {self.width} x {self.height}"
            )
        if self.samples != samples:
            raise UnreadableImage(f"the file says {samples} samples a pixel, its compressed data {self.samples}")


def read_jpeg(data: bytes) -> Codestream:
    """The frame header of JPEG or JPEG-LS data (ITU-T T.81 B.2, T.87 C.2).

    Raises:
        UnreadableImage: there is none, it is of a kind that DICOM does not have, or the data ends early.
    """
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):  # decoders fill what is missing with grey
        raise UnreadableImage("damaged: the compressed data ends early")
    stream, ycc, lossless = None, None, False
    for marker, segment in _segments(data):
        if marker in _FRAMES and stream is None:
            bits, height, width, samples = struct.unpack_from(">BHHB", segment)
            stream, lossless = (width, height, samples, bits), marker == _LOSSLESS
            if ycc is None and segment[6::3][:samples] in (b"RGB", b"rgb"):
                ycc = False
        elif marker in _OTHER_FRAMES:
            raise UnreadableImage("no decoder for progressive, hierarchical or arithmetic JPEG")
        elif marker in _FRAMES or (marker == _LS_PARAMETERS and segment[:1] == bytes([_OVERSIZE])):
            raise UnreadableImage("damaged: the compressed data has two sizes")
        elif marker == _ADOBE and segment.startswith(b"Adobe") and len(segment) >= 12:
            ycc = segment[11] == 1
        elif marker == _JFIF and segment.startswith(b"JFIF") and ycc is None:
            ycc = True
    if stream is None:
        raise UnreadableImage("damaged: no JPEG data where it should be")
    return Codestream(*stream, ycc=None if lossless else ycc)  # lossless data is as the file says it is


def _segments(data: bytes) -> list[tuple[int, bytes]]:
    """Markers and contents up to the first scan."""
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


def read_jpeg_2000(data: bytes) -> tuple[Codestream, bytes]:
    """The size header of JPEG 2000 data (ISO/IEC 15444-1 A.5.1), and the data without the JP2 file that may wrap it.

    Raises:
        UnreadableImage: there is none, or its tiles or samples are not as any encoder makes them.
    """
    data = _without_boxes(data)
    if not data.startswith(_JPEG_2000_START) or len(data) < 45:
        raise UnreadableImage("damaged: no JPEG 2000 data where it should be")
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
        raise UnreadableImage("damaged: the compressed data has more tiles than pixels warrant")
    return Codestream(width, height, samples, bits=(components[0][0] & 0x7F) + 1), data


def _without_boxes(data: bytes) -> bytes:
    offset = 0
    while data.startswith(_JP2_SIGNATURE) and offset + 8 <= len(data):
        length = int.from_bytes(data[offset : offset + 4], "big")
        if data[offset + 4 : offset + 8] == b"jp2c":
            return data[offset + 8 :]
        if length < 8:
            break
        offset += length
    return data
