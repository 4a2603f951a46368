"""PNG, JPEG, BMP and TIFF files -> grey or colour pictures.

with PictureFile(Path("chest.png"), preprocess) as file:
    raw = file.read(0)

The content decides the format, not the name. Shapes: H W height and width of the file's picture.
"""

import io
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from medgen.config import Preprocess
from medgen.ingest.formats.raw import MAX_PIXELS, Contents, RawImage, UnreadableImage
from medgen.ingest.formats.signatures import EMPTY, LFS_POINTER, NUM_BYTES, describe_start, kind_of_start

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"})
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF")  # Pillow knows dozens more, some of which start programs
_REDUCED = {
    1: (cv2.IMREAD_GRAYSCALE, cv2.IMREAD_COLOR),
    2: (cv2.IMREAD_REDUCED_GRAYSCALE_2, cv2.IMREAD_REDUCED_COLOR_2),
    4: (cv2.IMREAD_REDUCED_GRAYSCALE_4, cv2.IMREAD_REDUCED_COLOR_4),
    8: (cv2.IMREAD_REDUCED_GRAYSCALE_8, cv2.IMREAD_REDUCED_COLOR_8),
}
_REDUCED_SIDE = 512  # a picture is not reduced below this: CLAHE's tiles need their pixels (see benchmarks/README.md)
_MAX_FILE_BYTES = 8 * MAX_PIXELS  # four 16-bit channels, uncompressed
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where orientation may stand
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_SUBFILE_TYPE, _SMALLER_OR_MASK = 254, 1 | 4  # of a page: its bits for a smaller copy and a transparency mask
_MAX_COPIES = 16  # pages that are looked at: more than any pyramid of smaller copies has

_LARGE = MAX_PIXELS // 4
_large_pictures = threading.BoundedSemaphore(2)  # of 2 GB each at worst, however many threads there are

# What is wrong with a file is its reason in rejected.csv: no second opinion on the terminal.
warnings.filterwarnings("ignore", module="PIL")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """One picture; whether it can be read shows only when it is."""
    return Contents((0,))


class PictureFile:
    """A file of one picture, see `formats.raw.ImageFile`; of a mask with `mask`: grey, its values as they are."""

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        self.path, self.preprocess, self.mask = path, preprocess, mask

    @property
    def num_pictures(self) -> int:
        """One, as files of several pages are refused."""
        return 1

    def read(self, index: int) -> RawImage:
        """The picture; `index` is 0.

        Raises:
            UnreadableImage: the file is no such picture, is cut short, or is too large, or has several pages.
        """
        return decode(_read_bytes(self.path), self.preprocess, self.mask)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing stays open."""


def decode(data: bytes, preprocess: Preprocess, mask: bool = False, max_pixels: int = MAX_PIXELS) -> RawImage:
    """As `PictureFile.read`, of a file's bytes; of more than `max_pixels` pixels none is decoded.

    With `preprocess.reduced_decode` a JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves at least 4 times the side
    of the square.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _decode(image, data, preprocess, mask, max_pixels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_describe(data[:NUM_BYTES])) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {max_pixels // 1_000_000} megapixels") from None
    except Exception as error:  # a decoder on damaged bytes raises anything; the file is to blame, not the run
        raise UnreadableImage(f"damaged: {error}" if str(error) else f"damaged: {type(error).__name__}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UnreadableImage("not a regular file")  # to open a pipe would wait for its writer
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > _MAX_FILE_BYTES:
                most = MAX_PIXELS // 1_000_000
                raise UnreadableImage(f"{size // 1_000_000} MB, more than any picture of {most} megapixels")
            return file.read()
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from None


def _decode(image: Image.Image, data: bytes, preprocess: Preprocess, mask: bool, max_pixels: int) -> RawImage:
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} is more than {max_pixels // 1_000_000} megapixels")
    if image.format == "TIFF" and _tile_pixels(image) > max_pixels:  # OpenCV takes memory for a whole one
        raise UnreadableImage(f"its tiles have more than {max_pixels // 1_000_000} megapixels")
    if image.format == "TIFF" and _has_pages(data):
        raise UnreadableImage("several pages; expected one picture a file: split it (tiffsplit)")
    mode = image.mode  # Pillow may change it on loading
    with _large_pictures if width * height > _LARGE else nullcontext():
        return RawImage(_decode_pixels(image, data, preprocess, mask), (width, height), mode)


def _decode_pixels(image: Image.Image, data: bytes, preprocess: Preprocess, mask: bool) -> Any:
    orientation = _orientation(image, data)
    colour = preprocess.channels == 3 and not mask
    reduce_to = preprocess.image_size if preprocess.reduced_decode and not mask else None
    opencv = _opencv_flags(image, data, colour, reduce_to)
    decoded = None if opencv is None else cv2.imdecode(np.frombuffer(data, np.uint8), opencv)
    # Pillow takes what OpenCV refuses or reads differently, and gives the reason for a damaged file
    pixels = _pillow(image, colour) if decoded is None else _flat(decoded, colour, bgr=True)
    if image.format != "TIFF":  # both libraries turn TIFFs upright themselves
        pixels = _UPRIGHT.get(orientation, np.asarray)(pixels)
    if pixels.dtype == np.uint16 and not mask:  # a mask of 0 and 1 is no dark picture
        pixels = _fill_depth(pixels)
    return np.ascontiguousarray(pixels)


def _opencv_flags(image: Image.Image, data: bytes, colour: bool, reduce_to: int | None) -> int | None:
    """How OpenCV is to read this file, or None where Pillow has to."""
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        # OpenCV fills what is missing with grey; Pillow tells a cut file from one that lacks only its end marker
        if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            return None
        scale = 1
        while reduce_to is not None and scale < 8 and min(image.size) >= 2 * scale * max(4 * reduce_to, _REDUCED_SIDE):
            scale *= 2
        return int(_REDUCED[scale][colour and image.mode == "RGB"]) | int(cv2.IMREAD_IGNORE_ORIENTATION)
    if image.format == "PNG" and image.mode in ("L", "LA", "RGB", "RGBA", "I;16") and "transparency" not in image.info:
        return int(cv2.IMREAD_UNCHANGED) if _has_whole_chunks(data) else None
    if image.format == "TIFF":
        return _opencv_tiff_flags(image)
    return None


def _has_whole_chunks(png: bytes) -> bool:
    """False where a chunk is longer than the file: OpenCV takes that much memory, up to 4 GB, before it looks."""
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(png) and png[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(png[at : at + 4], "big")  # length, name, content, checksum
    return at + 12 <= len(png)


def _opencv_tiff_flags(image: Any) -> int | None:
    """OpenCV reads 16 bits in several channels, of which Pillow would keep only 8."""
    bits = image.tag_v2.get(258, (1,))
    return int(cv2.IMREAD_UNCHANGED) if len(bits) > 1 and max(bits) == 16 else None


def _tile_pixels(image: Any) -> int:
    return int(image.tag_v2.get(_TILE_WIDTH, 0) * image.tag_v2.get(_TILE_LENGTH, 0))


def _has_pages(data: bytes) -> bool:
    """True where a TIFF has a second picture, which is no smaller copy and no mask of the first."""
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        pages: Any = image  # apart from the one that is decoded, as to go on changes it
        for page in range(1, _MAX_COPIES):
            try:
                pages.seek(page)
            except Exception:  # the end, or what follows the picture is none
                return False
            if not int(pages.tag_v2.get(_SUBFILE_TYPE, 0)) & _SMALLER_OR_MASK:
                return True
    return False


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG" and not any(mark in data for mark in _PNG_EXIF):
        return 1  # to find none Pillow would decode the whole picture
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # EXIF is a guest in the file; a broken one does not make the picture unreadable
        return 1


_UPRIGHT: dict[int, Callable[[Any], Any]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.swapaxes(np.rot90(pixels, 2), 0, 1),
    8: np.rot90,
}


def _pillow(image: Image.Image, colour: bool) -> Any:
    image.load()
    if image.mode.startswith("I;16"):
        deep: NDArray[np.uint16] = np.array(image, dtype=np.uint16)
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0:
            np.invert(deep, out=deep)  # 0 is white there; Pillow turns only 8 bits round
        return deep
    if image.mode == "I":
        wide: NDArray[np.int32] = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise UnreadableImage(f"values from {wide.min()} to {wide.max()}; expected 8 or 16 bits")
        return wide.astype(np.uint16)
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.asarray(image.convert("L"), dtype=np.uint8)
    if image.mode in ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"):
        transparent = "transparency" in image.info or image.mode in ("PA", "LA", "La", "RGBA", "RGBa")
        colours: NDArray[np.uint8] = np.asarray(image.convert("RGBA" if transparent else "RGB"))
        return _flat(colours, colour, bgr=False)
    raise UnreadableImage(f"pixels of kind {image.mode!r}; expected grey, colour or palette of 8 or 16 bits")


def _flat(pixels: Any, colour: bool, bgr: bool) -> Any:
    """(H, W) or (H, W, 3 or 4) -> (H, W), luma as in ITU-R BT.601, or RGB (H, W, 3) where there is and shall be colour.

    What is transparent becomes black: it is no picture, like the borders that padding adds. Alpha that is 0
    everywhere was never set (32-bit BMP) and is ignored.
    """
    if pixels.ndim == 2:
        return pixels
    opaque = pixels[:, :, :3]
    if not colour:
        opaque = cv2.cvtColor(opaque, cv2.COLOR_BGR2GRAY if bgr else cv2.COLOR_RGB2GRAY)
    elif bgr:
        opaque = cv2.cvtColor(opaque, cv2.COLOR_BGR2RGB)
    if pixels.shape[2] == 3:
        return opaque
    alpha = pixels[:, :, 3]
    full = np.iinfo(alpha.dtype).max
    if alpha.min() == full or alpha.max() == 0:
        return opaque
    share = alpha / float(full)
    blended = np.empty_like(opaque)
    for plane, source in zip(_planes(blended), _planes(opaque), strict=True):  # one by one: these are 8 bytes a pixel
        plane[...] = np.rint(source * share)
    return blended


def _planes(pixels: Any) -> list[Any]:
    """Views of each channel, (H, W)."""
    return [pixels] if pixels.ndim == 2 else [pixels[:, :, channel] for channel in range(pixels.shape[2])]


def _fill_depth(pixels: Any) -> Any:
    """Shifts 16 bits so that the highest one that is used becomes the 16th.

    Detectors of 10, 12 and 14 bits write 16-bit files, which read as 16 bits would be black; and a 14-bit film whose
    maximum is 4200 must not be darker than one of 4095. Below 8 bits of use a picture counts as 8: it is blank or
    nearly so, and is to stay dark.
    """
    return pixels << 16 - max(8, int(pixels.max(initial=0)).bit_length())


def _describe(start: bytes) -> str:
    """Why Pillow knows no format, from the file's first bytes."""
    if kind_of_start(start) == "picture":
        return "damaged: its header cannot be read"
    found = describe_start(start)
    if found in (EMPTY, LFS_POINTER):
        return found
    return f"no PNG, JPEG, BMP or TIFF but {found}" if found else "no PNG, JPEG, BMP or TIFF"
