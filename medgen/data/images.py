"""One file -> one grey picture; one picture -> one square of the store.

raw = read_image(Path("chest.png"))
square = to_square(raw.pixels, image_size=64, fit="pad", clahe_clip=2.0, clahe_tiles=8)  # (64, 64) uint8

Shapes: H W height and width of the file's picture, S side of the square.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff"})
MAX_PIXELS = 100_000_000  # 10,000 x 10,000; the largest detectors have a fifth of it
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF")  # Pillow knows dozens more, some of which start programs
_REDUCED = {
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_REDUCED_SIDE = 512  # a picture is not reduced below this: CLAHE's tiles need their pixels (see benchmarks/README.md)
_LIMITED_BIN = 16  # CLAHE's limit is a whole number of pixels a bin; below this its rounding would show

# The size is judged here, and a file over the limit is refused: no second opinion on the terminal.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(ValueError):
    """A file that gives no picture; the message is the reason that rejected.csv shows."""


@dataclass(frozen=True)
class RawImage:
    """A file's picture: grey, upright, in the file's own bit depth."""

    pixels: Pixels  # (H, W) uint8 or uint16
    size: tuple[int, int]  # width, height as stored in the file
    mode: str  # Pillow's name of the file's pixels, such as "L", "RGB", "I;16"


def looks_like_image(path: Path) -> bool:
    """True for a name or, where the name says nothing, a beginning that a readable format has."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(8)
    return start.startswith(_SIGNATURES) and not (start.startswith(b"BM") and path.suffix)


def read_image(path: Path, reduce_to: int | None = None) -> RawImage:
    """Reads a PNG, JPEG, BMP or TIFF file; its content decides the format, not its name.

    `reduce_to` is the side wanted in the end: a JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves at least 4 times
    that side.

    Raises:
        UnreadableImage: the file is no such picture, is cut short, or is too large.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None
    return decode(data, reduce_to)


def decode(data: bytes, reduce_to: int | None = None) -> RawImage:
    """As `read_image`, of a file's bytes."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _decode(image, data, reduce_to)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_describe_unknown(data)) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {MAX_PIXELS // 1_000_000} megapixels") from None
    except Exception as error:  # a decoder on damaged bytes raises anything; the file is to blame, not the run
        raise UnreadableImage(f"damaged: {error}" if str(error) else f"damaged: {type(error).__name__}") from None


def to_square(
    pixels: Pixels, image_size: int, fit: Literal["pad", "squash"], clahe_clip: float, clahe_tiles: int
) -> NDArray[np.uint8]:
    """Grey picture (H, W) -> (S, S) uint8: CLAHE at full size, then resize, then black borders where `fit` is pad.

    CLAHE as in Zuiderveld, Graphics Gems IV (1994); `clahe_clip` 0 leaves it out.
    """
    if pixels.dtype == np.uint16:
        pixels = _fill_depth(pixels)
    if clahe_clip > 0:
        pixels = _equalise(pixels, clahe_clip, clahe_tiles)
    square: Any = _fit(pixels, image_size, fit)
    if square.dtype == np.uint16:
        square = np.rint(square / np.float32(257)).astype(np.uint8)  # 65535 / 255
    return np.ascontiguousarray(square)


def mask_to_square(pixels: Pixels, image_size: int, fit: Literal["pad", "squash"]) -> NDArray[np.uint8]:
    """Mask (H, W) of 0/1 or 0..255 -> (S, S) uint8 of 0 and 1, laid out as `to_square` lays out its image.

    A pixel of the square is 1 where at least half of what it covers is.

    Raises:
        UnreadableImage: the values are neither 0/1 nor dark and bright.
    """
    top = int(pixels.max())
    full = int(np.iinfo(pixels.dtype).max)
    if 1 < top <= full // 2:
        raise UnreadableImage(f"mask values reach {top}; expected 0 and 1, or 0 to {full}")
    binary = pixels > (0 if top <= 1 else full // 2)  # published masks are smoothed at the edge
    square: Any = _fit(binary.astype(np.uint8) * np.uint8(255), image_size, fit)
    return np.where(square > 127, np.uint8(1), np.uint8(0))


def _decode(image: Image.Image, data: bytes, reduce_to: int | None) -> RawImage:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} megapixels")
    mode, orientation = image.mode, _orientation(image)
    opencv = _opencv_flags(image, data, reduce_to)
    colours = None if opencv is None else cv2.imdecode(np.frombuffer(data, np.uint8), opencv)
    # Pillow takes what OpenCV refuses or reads differently, and gives the reason for a damaged file
    pixels = _pillow_grey(image) if colours is None else _grey(colours, bgr=True)
    if image.format != "TIFF":  # both libraries turn TIFFs upright themselves
        pixels = _UPRIGHT.get(orientation, np.asarray)(pixels)
    return RawImage(np.ascontiguousarray(pixels), (width, height), mode)


def _opencv_flags(image: Image.Image, data: bytes, reduce_to: int | None) -> int | None:
    """How OpenCV is to read this file, or None where Pillow has to."""
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        # OpenCV fills what is missing with grey; Pillow tells a cut file from one that lacks only its end marker
        if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            return None
        scale = 1
        while reduce_to is not None and scale < 8 and min(image.size) >= 2 * scale * max(4 * reduce_to, _REDUCED_SIDE):
            scale *= 2
        return int(_REDUCED.get(scale, cv2.IMREAD_GRAYSCALE)) | int(cv2.IMREAD_IGNORE_ORIENTATION)
    if image.format == "PNG" and image.mode in ("L", "LA", "RGB", "RGBA", "I;16") and "transparency" not in image.info:
        return int(cv2.IMREAD_UNCHANGED)
    if image.format == "TIFF" and _is_deep_colour(image):
        return int(cv2.IMREAD_UNCHANGED)
    return None


def _is_deep_colour(image: Any) -> bool:
    """16 bits a channel and several channels: Pillow keeps only 8 of them."""
    bits = image.tag_v2.get(258, (1,))
    return len(bits) > 1 and max(bits) == 16


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # EXIF is a guest in the file; a broken one does not make the picture unreadable
        return 1


_UPRIGHT: dict[int, Callable[[Any], Any]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}


def _pillow_grey(image: Image.Image) -> Any:
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
        return _grey(colours, bgr=False)
    raise UnreadableImage(f"pixels of kind {image.mode!r}; expected grey, colour or palette of 8 or 16 bits")


def _grey(pixels: Any, bgr: bool) -> Any:
    """(H, W) or (H, W, 3 or 4) -> (H, W), luma as in ITU-R BT.601.

    What is transparent becomes black: it is no picture, like the borders that padding adds. Alpha that is 0
    everywhere was never set (32-bit BMP) and is ignored.
    """
    if pixels.ndim == 2:
        return pixels
    luma = cv2.cvtColor(pixels[:, :, :3], cv2.COLOR_BGR2GRAY if bgr else cv2.COLOR_RGB2GRAY)
    if pixels.shape[2] == 3:
        return luma
    alpha = pixels[:, :, 3]
    full = np.iinfo(alpha.dtype).max
    if alpha.min() == full or alpha.max() == 0:
        return luma
    return np.rint(luma * (alpha / float(full))).astype(luma.dtype)


def _fill_depth(pixels: Any) -> Any:
    """12-bit detectors write 16-bit files: read as 16 bits these would be black."""
    return pixels << 4 if pixels.max(initial=0) < 4096 else pixels


def _equalise(pixels: Any, clip: float, tiles: int) -> Any:
    height, width = pixels.shape
    tiles = min(tiles, height, width)
    clahe = cv2.createCLAHE(clip, (tiles, tiles))
    if pixels.dtype == np.uint16:
        # As many bins as the limit allows: with 65,536 it would be below one pixel a bin, and so no limit at all.
        per_bin = clip * -(-height // tiles) * -(-width // tiles) / _LIMITED_BIN
        bits = int(np.clip(np.log2(max(per_bin, 1.0)), 8, 16))
        clahe.setBitShift(16 - bits)
    return clahe.apply(pixels)


def _fit(pixels: Any, size: int, fit: str) -> Any:
    height, width = pixels.shape
    scale = size / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale))) if fit == "pad" else (size, size)
    shrinks = inner[0] <= width and inner[1] <= height
    resized = cv2.resize(pixels, inner, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if inner == (size, size):
        return resized
    square = np.zeros((size, size), pixels.dtype)
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    square[top : top + inner[1], left : left + inner[0]] = resized
    return square


def _describe_unknown(data: bytes) -> str:
    if not data:
        return "empty file"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the picture itself (run: git lfs pull)"
    return "no PNG, JPEG, BMP or TIFF"
