"""One picture -> one square of the store: contrast, size, borders.

square = to_square(raw.pixels, preprocess)     # (C, S, S) uint8

Shapes: H W height and width of the picture, C channels, S side of the square.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest.formats.raw import Pixels, RawImage, UnreadableImage

_ASPECT_TOLERANCE = 0.02  # a mask of another resolution may be rounded; one of another shape belongs elsewhere
_LIMITED_BIN = 16  # CLAHE's limit is a whole number of pixels a bin; below this its rounding would show


def to_square(pixels: Pixels, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Picture (H, W) or RGB (H, W, 3) -> (C, S, S) uint8: CLAHE at full size, resize, black borders for the fit `pad`.

    CLAHE as in Zuiderveld, Graphics Gems IV (1994), of colour on the luma alone, so that hues stay; `clahe_clip` 0
    leaves it out. `preprocess.channels` is C: grey becomes three equal channels, colour becomes luma.
    """
    picture: Any = pixels
    if picture.ndim == 3 and preprocess.channels == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    if preprocess.clahe_clip > 0:
        equalise = _equalise if picture.ndim == 2 else _equalise_luma
        picture = equalise(picture, preprocess.clahe_clip, preprocess.clahe_tiles)
    square: Any = _fit(picture, preprocess.image_size, preprocess.fit)
    if square.dtype == np.uint16:
        square = np.rint(square / np.float32(257)).astype(np.uint8)  # 65535 / 255
    square = square[None] if square.ndim == 2 else square.transpose(2, 0, 1)
    repeated: NDArray[np.uint8] = np.repeat(square, preprocess.channels // len(square), axis=0)
    return repeated


def mask_to_square(pixels: Pixels, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Mask (H, W) -> (1, S, S) uint8 of class numbers, laid out as `to_square` lays out its image.

    Without `preprocess.mask_values` masks are on or off, 0/1 or 0..255, and a pixel of the square is 1 where at least
    half of what it covers is. With them it has the class that most of what it covers has; borders are of class 0.

    Raises:
        UnreadableImage: the values are neither 0/1 nor dark and bright, or not among `preprocess.mask_values`.
    """
    if preprocess.mask_values is not None:
        return _square_of_classes(pixels, preprocess.mask_values, preprocess)
    top = int(pixels.max())
    full = int(np.iinfo(pixels.dtype).max)
    if 1 < top <= full // 2:
        raise UnreadableImage(
            f"mask values reach {top}; expected 0 and 1, or 0 to {full}. A mask of more classes needs "
            "preprocess.mask_values, the grey value of each"
        )
    binary = pixels > (0 if top <= 1 else full // 2)  # published masks are smoothed at the edge
    square: Any = _fit(binary.astype(np.uint8) * np.uint8(255), preprocess.image_size, preprocess.fit)
    return np.where(square > 127, np.uint8(1), np.uint8(0))[None]


def _square_of_classes(pixels: Pixels, values: tuple[int, ...], preprocess: Preprocess) -> NDArray[np.uint8]:
    if strange := sorted(set(np.unique(pixels).tolist()) - set(values)):
        shown = ", ".join(map(str, strange[:4]))
        raise UnreadableImage(f"mask values {shown}; expected those of preprocess.mask_values, {list(values)}")
    shares = [
        _fit(np.where(pixels == value, np.float32(1), np.float32(0)), preprocess.image_size, preprocess.fit)
        for value in values
    ]
    numbers: NDArray[np.uint8] = np.argmax(shares, axis=0).astype(np.uint8)[None]  # of a tie the first
    return numbers


def square_of_mask(mask: RawImage, image: RawImage, name: str, preprocess: Preprocess) -> NDArray[np.uint8]:
    """As `mask_to_square`, of the mask file `name` that belongs to `image`.

    Raises:
        UnreadableImage: the mask has another shape than its image, or is none; `name` is in the reason.
    """
    (height, width), (image_height, image_width) = mask.pixels.shape[:2], image.pixels.shape[:2]
    if abs(width / height / (image_width / image_height) - 1) > _ASPECT_TOLERANCE:
        raise UnreadableImage(f"mask {name} is {width} x {height}, the image {image.size[0]} x {image.size[1]}")
    try:
        return mask_to_square(mask.pixels, preprocess)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None


def _equalise_luma(pixels: Any, clip: float, tiles: int) -> Any:
    parts = cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb)
    parts[:, :, 0] = _equalise(np.ascontiguousarray(parts[:, :, 0]), clip, tiles)
    return cv2.cvtColor(parts, cv2.COLOR_YCrCb2RGB)


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
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale))) if fit == "pad" else (size, size)
    shrinks = inner[0] <= width and inner[1] <= height
    resized = cv2.resize(pixels, inner, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if inner == (size, size):
        return resized
    square = np.zeros((size, size, *pixels.shape[2:]), pixels.dtype)
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    square[top : top + inner[1], left : left + inner[0]] = resized
    return square
