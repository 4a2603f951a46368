"""Convert an image or mask to the size of the store: contrast, resize, borders.

image = preprocess_image(raw.pixels, preprocess)     # (C, H, W) uint8 or uint16

Shapes: C channels, H W height and width of the result, h w of the original.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest.formats.raw import Pixels, RawImage, UnreadableImage

Stored = NDArray[np.uint8] | NDArray[np.uint16]

_ASPECT_TOLERANCE = 0.02  # a mask may have another resolution, and so a rounded aspect ratio, but no other shape
_MIN_BIN_LIMIT = 16  # CLAHE's contrast limit is a whole number of pixels per bin; smaller ones would be rounded visibly


def preprocess_image(pixels: Pixels, preprocess: Preprocess) -> Stored:
    """Image (h, w) or RGB (h, w, 3) -> (C, H, W): CLAHE at full size, resize, black borders for the fit `pad`.

    The result is uint8, or uint16 with `preprocess.bits` 16.

    CLAHE as in Zuiderveld, Graphics Gems IV (1994). On RGB it is applied to the luma only, which keeps the hue.
    `clahe_clip` 0 disables it. `preprocess.channels` is C: grey is copied to three channels, RGB is reduced to luma.
    """
    image: Any = pixels
    if preprocess.bits == 16 and image.dtype == np.uint8:
        image = image.astype(np.uint16) * np.uint16(257)  # 65535 / 255
    if image.ndim == 3 and preprocess.channels == 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if preprocess.clahe_clip > 0:
        equalise = _equalise if image.ndim == 2 else _equalise_luma
        image = equalise(image, preprocess.clahe_clip, preprocess.clahe_tiles)
    resized: Any = _resize(image, preprocess.sides, preprocess.fit)
    if resized.dtype == np.uint16 and preprocess.bits == 8:
        resized = np.rint(resized / np.float32(257)).astype(np.uint8)  # 65535 / 255
    resized = resized[None] if resized.ndim == 2 else resized.transpose(2, 0, 1)
    repeated: Stored = np.repeat(resized, preprocess.channels // len(resized), axis=0)
    return repeated


def preprocess_mask(mask: RawImage, image: RawImage, name: str, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Resize the mask file `name` of `image` as `resize_mask`, after a check that both have the same aspect ratio.

    Raises:
        UnreadableImage: the aspect ratios differ, or the values are wrong; the message contains `name`.
    """
    (height, width), (image_height, image_width) = mask.pixels.shape[:2], image.pixels.shape[:2]
    if abs(width / height / (image_width / image_height) - 1) > _ASPECT_TOLERANCE:
        raise UnreadableImage(f"mask {name} is {width} x {height}, the image {image.size[0]} x {image.size[1]}")
    try:
        return resize_mask(mask.pixels, preprocess)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None


def resize_mask(pixels: Pixels, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Mask (h, w) -> (1, H, W) uint8 class numbers, with the geometry of `preprocess_image`.

    Without `preprocess.mask_values` a mask is binary, with values 0/1 or 0..255, and an output pixel is 1 if at least
    half of the area it covers is. With `mask_values` it has the class that covers most of the area. Borders are 0.

    Raises:
        UnreadableImage: the values are neither 0/1 nor dark and bright, or not among `preprocess.mask_values`.
    """
    if preprocess.mask_values is not None:
        return _resize_classes(pixels, preprocess.mask_values, preprocess)
    top = int(pixels.max())
    full = int(np.iinfo(pixels.dtype).max)
    if 1 < top <= full // 2:
        raise UnreadableImage(
            f"mask values reach {top}; expected 0 and 1, or 0 to {full}. A mask of more classes needs "
            "preprocess.mask_values, the grey value of each"
        )
    binary = pixels > (0 if top <= 1 else full // 2)  # edges of published masks are smoothed
    resized: Any = _resize(binary.astype(np.uint8) * np.uint8(255), preprocess.sides, preprocess.fit)
    return np.where(resized > 127, np.uint8(1), np.uint8(0))[None]


def _resize_classes(pixels: Pixels, values: tuple[int, ...], preprocess: Preprocess) -> NDArray[np.uint8]:
    if unknown := sorted(set(np.unique(pixels).tolist()) - set(values)):
        shown = ", ".join(map(str, unknown[:4]))
        raise UnreadableImage(f"mask values {shown}; expected those of preprocess.mask_values, {list(values)}")
    shares = [
        _resize(np.where(pixels == value, np.float32(1), np.float32(0)), preprocess.sides, preprocess.fit)
        for value in values
    ]
    classes: NDArray[np.uint8] = np.argmax(shares, axis=0).astype(np.uint8)[None]  # the first class in a tie
    return classes


def _equalise_luma(pixels: Any, clip: float, tiles: int) -> Any:
    ycrcb = cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb)
    ycrcb[:, :, 0] = _equalise(np.ascontiguousarray(ycrcb[:, :, 0]), clip, tiles)
    return cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB)


def _equalise(pixels: Any, clip: float, tiles: int) -> Any:
    height, width = pixels.shape
    tiles = min(tiles, height, width)
    clahe = cv2.createCLAHE(clip, (tiles, tiles))
    if pixels.dtype == np.uint16:
        # With 65,536 bins the limit would be below one pixel per bin, so use as many bins as the limit allows.
        per_bin = clip * -(-height // tiles) * -(-width // tiles) / _MIN_BIN_LIMIT
        bits = int(np.clip(np.log2(max(per_bin, 1.0)), 8, 16))
        clahe.setBitShift(16 - bits)
    return clahe.apply(pixels)


def _resize(pixels: Any, sides: tuple[int, int], fit: str) -> Any:
    (height, width), (rows, columns) = pixels.shape[:2], sides
    scale = min(rows / height, columns / width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale))) if fit == "pad" else (columns, rows)
    shrinks = inner[0] <= width and inner[1] <= height
    resized = cv2.resize(pixels, inner, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if inner == (columns, rows):
        return resized
    padded = np.zeros((rows, columns, *pixels.shape[2:]), pixels.dtype)
    left, top = (columns - inner[0]) // 2, (rows - inner[1]) // 2
    padded[top : top + inner[1], left : left + inner[0]] = resized
    return padded
