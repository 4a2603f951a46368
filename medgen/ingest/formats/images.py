"""Reader of PNG, JPEG, BMP and TIFF files: grey or colour images.

with RasterFile(Path("chest.png"), preprocess) as file:
    raw = file.read(0)

The content decides the format, not the name. Shapes: H W height and width of the image.
"""

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from medgen.config import Preprocess
from medgen.ingest.formats.raw import MAX_PIXELS, Contents, ImageFile, RawImage, UnreadableImage
from medgen.ingest.formats.signatures import EMPTY, LFS_POINTER, NUM_BYTES, describe_start, kind_of_start
from medgen.ingest.formats.windowing import apply_window

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"})
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF")  # Pillow reads dozens more, and some start external programs
_REDUCED = {
    1: (cv2.IMREAD_GRAYSCALE, cv2.IMREAD_COLOR),
    2: (cv2.IMREAD_REDUCED_GRAYSCALE_2, cv2.IMREAD_REDUCED_COLOR_2),
    4: (cv2.IMREAD_REDUCED_GRAYSCALE_4, cv2.IMREAD_REDUCED_COLOR_4),
    8: (cv2.IMREAD_REDUCED_GRAYSCALE_8, cv2.IMREAD_REDUCED_COLOR_8),
}
_REDUCED_SIDE = 512  # smallest side after reduction: CLAHE's tiles need enough pixels (see benchmarks/README.md)
_MAX_FILE_BYTES = 8 * MAX_PIXELS  # four 16-bit channels, uncompressed
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # chunks that may hold the orientation
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags
_SUBFILE_TYPE, _SMALLER_OR_MASK = 254, 1 | 4  # TIFF tag, and its bits for a smaller copy and a transparency mask
_START_OF_SCAN = b"\xff\xda"  # JPEG marker
_MAX_SCANS = 100  # of a progressive JPEG: encoders write about ten, and each visits all pixels, however short it is
_MAX_PAGES = 16  # pages that are checked: more than any pyramid of smaller copies has

_LARGE = MAX_PIXELS // 4
_large_images = threading.BoundedSemaphore(2)  # each takes up to 2 GB, however many threads there are

# rejected.csv holds the reason for every file, so warnings on the terminal would only repeat it.
warnings.filterwarnings("ignore", module="PIL")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def inspect(path: Path, preprocess: Preprocess) -> Contents:
    """One image, without opening the file: `read` reports a damaged file."""
    return Contents((0,))


class RasterFile(ImageFile):
    """A file of one image, as `formats.raw.ImageFile`; with `mask` it is read as grey and keeps its values."""

    num_images = 1  # files of several pages are refused

    def __init__(self, path: Path, preprocess: Preprocess, mask: bool = False) -> None:
        self.path, self.preprocess, self.mask = path, preprocess, mask

    def read(self, index: int) -> RawImage:
        """Read the image; `index` is 0.

        Raises:
            UnreadableImage: the file has another format, is cut short or too large, or has several pages.
        """
        return decode(_read_bytes(self.path), self.preprocess, self.mask)


def decode(data: bytes, preprocess: Preprocess, mask: bool = False, max_pixels: int = MAX_PIXELS) -> RawImage:
    """Decode the bytes of a file, as `RasterFile.read`; an image of more than `max_pixels` pixels is refused.

    With `preprocess.reduced_decode` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves sides of at least
    4 times `preprocess.image_size`.
    """
    with _open(data, max_pixels) as image:
        return _decode(image, data, preprocess, mask, max_pixels)


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the image in the bytes of a file, without decoding it; raises as `decode`."""
    with _open(data, max_pixels) as image:
        return image.size


@contextmanager
def _open(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read; errors of the decoders within the block become UnreadableImage."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(f"{width} x {height} is more than {max_pixels // 1_000_000} megapixels")
            yield image
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_describe(data[:NUM_BYTES])) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {max_pixels // 1_000_000} megapixels") from None
    except Exception as error:  # decoders raise errors of any type on damaged bytes
        raise UnreadableImage(f"damaged: {error}" if str(error) else f"damaged: {type(error).__name__}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UnreadableImage("not a regular file")  # opening a pipe would wait for its writer
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > _MAX_FILE_BYTES:
                most = MAX_PIXELS // 1_000_000
                raise UnreadableImage(f"{size // 1_000_000} MB, more than any image of {most} megapixels")
            return file.read()
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from None


def _decode(image: Image.Image, data: bytes, preprocess: Preprocess, mask: bool, max_pixels: int) -> RawImage:
    width, height = image.size
    if image.format in ("JPEG", "MPO") and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise UnreadableImage(f"more than {_MAX_SCANS} scans; expected a JPEG that an encoder wrote")
    if image.format == "TIFF":
        tags = cast(Any, image).tag_v2
        if tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0) > max_pixels:  # OpenCV allocates a whole tile
            raise UnreadableImage(f"its tiles have more than {max_pixels // 1_000_000} megapixels")
        if _has_pages(data):
            raise UnreadableImage("several pages; expected one image per file: split it (tiffsplit)")
    mode = image.mode  # Pillow may change it on loading
    with _large_images if width * height > _LARGE else nullcontext():
        return RawImage(_decode_pixels(image, data, preprocess, mask), (width, height), mode)


def _decode_pixels(image: Image.Image, data: bytes, preprocess: Preprocess, mask: bool) -> Any:
    orientation = _orientation(image, data)
    colour = preprocess.channels == 3 and not mask
    reduce_to = max(preprocess.sides) if preprocess.reduced_decode and not mask else None
    opencv = _opencv_flags(image, data, colour, reduce_to)
    decoded = None if opencv is None else cv2.imdecode(np.frombuffer(data, np.uint8), opencv)
    # Pillow reads what OpenCV refuses or reads differently, and names the error in a damaged file
    pixels = (
        _decode_with_pillow(image, colour, preprocess.window is not None)
        if decoded is None
        else _to_grey_or_rgb(decoded, colour, bgr=True)
    )
    if image.format != "TIFF":  # both libraries apply the orientation of TIFFs themselves
        pixels = _UPRIGHT.get(orientation, np.asarray)(pixels)
    if preprocess.window is not None and not mask:  # the values of a mask must not change
        pixels = apply_window(pixels, preprocess.window)
    elif pixels.dtype == np.uint16 and not mask:
        pixels = _fill_bit_depth(pixels)
    return np.ascontiguousarray(pixels)


def _opencv_flags(image: Image.Image, data: bytes, colour: bool, reduce_to: int | None) -> int | None:
    """Flags for OpenCV to read this file; None if Pillow has to read it."""
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        # OpenCV fills missing pixels with grey; Pillow distinguishes a cut file from one without only its end marker
        if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            return None
        scale = 1
        while reduce_to is not None and scale < 8 and min(image.size) >= 2 * scale * max(4 * reduce_to, _REDUCED_SIDE):
            scale *= 2
        return int(_REDUCED[scale][colour and image.mode == "RGB"]) | int(cv2.IMREAD_IGNORE_ORIENTATION)
    if image.format == "PNG" and image.mode in ("L", "LA", "RGB", "RGBA", "I;16") and "transparency" not in image.info:
        return int(cv2.IMREAD_UNCHANGED) if _has_whole_chunks(data) else None
    if image.format == "TIFF":
        bits = cast(Any, image).tag_v2.get(258, (1,))
        return int(cv2.IMREAD_UNCHANGED) if len(bits) > 1 and max(bits) == 16 else None  # Pillow keeps 8 of 16
    return None


def _has_whole_chunks(png: bytes) -> bool:
    """False if a chunk claims to be longer than the file: OpenCV would allocate that much memory, up to 4 GB."""
    start = len(_PNG_SIGNATURE)
    while start + 12 <= len(png) and png[start + 4 : start + 8] != b"IEND":
        start += 12 + int.from_bytes(png[start : start + 4], "big")  # length, name, content, checksum
    return start + 12 <= len(png)


def _has_pages(data: bytes) -> bool:
    """True if a TIFF has a second image that is neither a smaller copy nor a mask of the first."""
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        pages: Any = image  # opened again, because `seek` changes the image
        for page in range(1, _MAX_PAGES):
            try:
                pages.seek(page)
            except Exception:  # the end, or the next page is damaged
                return False
            if not int(pages.tag_v2.get(_SUBFILE_TYPE, 0)) & _SMALLER_OR_MASK:
                return True
    return False


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8."""
    if image.format == "PNG" and not any(name in data for name in _PNG_EXIF):
        return 1  # Pillow would decode the whole image to find no EXIF
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block does not make the image unreadable
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


def _decode_with_pillow(image: Image.Image, colour: bool, any_values: bool) -> Any:
    """Pixels of an image; with `any_values` also negative, large and fractional ones."""
    image.load()
    if any_values and image.mode in ("I", "F"):
        return np.asarray(image)
    if image.mode.startswith("I;16"):
        deep: NDArray[np.uint16] = np.array(image, dtype=np.uint16)
        if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0:
            np.invert(deep, out=deep)  # WhiteIsZero, which Pillow applies only to 8 bits
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
        return _to_grey_or_rgb(colours, colour, bgr=False)
    raise UnreadableImage(f"pixels of mode {image.mode!r}; expected grey, colour or palette of 8 or 16 bits")


def _to_grey_or_rgb(pixels: Any, colour: bool, bgr: bool) -> Any:
    """(H, W) or (H, W, 3 or 4) -> (H, W), luma of ITU-R BT.601, or RGB (H, W, 3) if `colour` is set and not grey.

    Transparent pixels become black, like the borders that padding adds. An alpha channel of zeros was never set
    (32-bit BMP) and is ignored.
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
    planes = np.atleast_3d(opaque).astype(opaque.dtype)
    for channel in range(planes.shape[2]):  # one by one: floats take 8 bytes a pixel
        planes[:, :, channel] = np.rint(planes[:, :, channel] * share)
    return planes.reshape(opaque.shape)


def _fill_bit_depth(pixels: Any) -> Any:
    """Shift 16-bit values so that the highest used bit becomes bit 16; at least 8 bits count as used.

    Detectors of 10, 12 and 14 bits write 16-bit files, which would be almost black without the shift. With fewer than
    8 used bits an image is blank or nearly blank, and stays dark.
    """
    return pixels << 16 - max(8, int(pixels.max(initial=0)).bit_length())


def _describe(start: bytes) -> str:
    """Description of a file that Pillow does not recognise, by its first bytes."""
    if kind_of_start(start) == "raster":
        return "damaged: its header cannot be read"
    found = describe_start(start)
    if found in (EMPTY, LFS_POINTER):
        return found
    return f"{found or 'an unknown format'}; expected PNG, JPEG, BMP or TIFF"
