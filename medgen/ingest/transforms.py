"""Convert an image or mask to the size of the store: contrast, resize, borders.

image = preprocess_image(raw.pixels, preprocess)     # (C, H, W) uint8 or uint16
volume = preprocess_raw(raw, preprocess)             # or (1, D, H, W) of a volume

Shapes: C channels, D H W depth, height and width of the result, d h w of the original.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest.formats.raw import Affine, Pixels, RawImage, UnreadableImage

Stored = NDArray[np.uint8] | NDArray[np.uint16]
Spacing = tuple[float, float, float] | None  # of a volume's voxels; None for an image

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
    resized: Any = _to_bits(_resize(image, preprocess), preprocess.bits)
    resized = resized[None] if resized.ndim == 2 else resized.transpose(2, 0, 1)
    repeated: Stored = np.repeat(resized, preprocess.channels // len(resized), axis=0)
    return repeated


def preprocess_raw(raw: RawImage, preprocess: Preprocess) -> Stored:
    """The image (C, H, W) or volume (1, D, H, W) as `preprocess_image` makes it; volumes without CLAHE.

    With the fit `pad` a volume keeps its proportions in millimetres.
    """
    if raw.spacing is None:
        return preprocess_image(raw.pixels, preprocess)
    pixels: Any = raw.pixels
    if pixels.dtype == np.uint8 and preprocess.bits == 16:
        pixels = pixels.astype(np.uint16) * np.uint16(257)  # 65535 / 255
    volume: Stored = _to_bits(_resize(pixels, preprocess, raw.spacing), preprocess.bits)[None]
    return volume


def resized_affine(raw: RawImage, preprocess: Preprocess) -> Affine | None:
    """Affine of the volume that `preprocess_raw` makes, from indices of D, H and W to mm; None if the file has none."""
    if raw.affine is None:
        return None
    inner, starts = _fit(raw.pixels.shape, raw.spacing, preprocess)
    ratios = np.divide(raw.pixels.shape, inner)
    to_raw = np.diag([*ratios, 1.0])
    to_raw[:3, 3] = ratios * (0.5 - np.array(starts)) - 0.5  # resizing keeps the outer borders of the outer voxels
    affine: Affine = raw.affine @ to_raw
    return affine


def voxel_size(affine: Affine) -> tuple[float, float, float]:
    """Lengths in mm of a voxel's sides, along the axes of the indices."""
    depth, height, width = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return depth, height, width


def _to_bits(pixels: Any, bits: int) -> Any:
    if pixels.dtype == np.uint16 and bits == 8:
        return np.rint(pixels / np.float32(257)).astype(np.uint8)  # 65535 / 255
    return pixels


def preprocess_mask(mask: RawImage, image: RawImage, name: str, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Resize the mask file `name` of `image` as `resize_mask`, after a check that both have the same aspect ratio.

    Raises:
        UnreadableImage: the aspect ratios differ, or the values are wrong; the message contains `name`.
    """
    _check_aspect(mask, image, f"mask {name}")
    try:
        return resize_mask(mask.pixels, preprocess, mask.spacing)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None


def preprocess_paired(
    paired: Sequence[RawImage | None], image: RawImage, names: Sequence[str | None], preprocess: Preprocess
) -> NDArray[np.uint8] | None:
    """The P paired images of `image` as `resize_paired` gives them, (P, H, W), 0 where there is none; None without any.

    Raises:
        UnreadableImage: an aspect ratio differs from the image's; the message contains the file's name.
    """
    if not paired:
        return None
    result = np.zeros((len(paired), *preprocess.sides), np.uint8)
    for number, (other, name) in enumerate(zip(paired, names, strict=True)):
        if other is not None:
            _check_aspect(other, image, str(name))
            result[number] = resize_paired(other, preprocess)[0]
    return result


def resize_paired(paired: RawImage, preprocess: Preprocess) -> NDArray[np.uint8]:
    """A paired image (1, H, W) or volume (1, D, H, W) with the geometry of the image."""
    return preprocess_raw(paired, paired_settings(preprocess)).astype(np.uint8, copy=False)


def paired_settings(preprocess: Preprocess) -> Preprocess:
    """Settings with which paired images are read: grey, 8 bits, without CLAHE, and no slice is too empty."""
    volume = preprocess.volume.model_copy(update={"min_foreground": 0.0})
    return preprocess.model_copy(update={"channels": 1, "bits": 8, "clahe_clip": 0.0, "volume": volume})


def _check_aspect(other: RawImage, image: RawImage, name: str) -> None:
    """Refuse a mask or paired image with another aspect ratio than its image."""
    height, *others = _extents(other)
    image_height, *image_others = _extents(image)
    ratios = [own / height / (side / image_height) for own, side in zip(others, image_others, strict=True)]
    if any(abs(ratio - 1) > _ASPECT_TOLERANCE for ratio in ratios):
        sides = other.pixels.shape[:2] if other.spacing is None else other.pixels.shape[1:]
        raise UnreadableImage(f"{name} is {sides[1]} x {sides[0]}, the image {image.size[0]} x {image.size[1]}")


def _extents(raw: RawImage) -> list[float]:
    """Sides of an image in pixels, of a volume in the unit of its spacing."""
    sides = raw.pixels.shape[:2] if raw.spacing is None else raw.pixels.shape
    return [side * size for side, size in zip(sides, raw.spacing or (1.0, 1.0), strict=True)]


def resize_mask(pixels: Pixels, preprocess: Preprocess, spacing: Spacing = None) -> NDArray[np.uint8]:
    """Mask (h, w) -> (1, H, W), or (d, h, w) -> (1, D, H, W), uint8 class numbers, with the geometry of the image.

    Without `preprocess.mask_values` a mask is binary, with values 0/1 or 0..255, and an output pixel is 1 if at least
    half of the area it covers is. With `mask_values` it has the class that covers most of the area. Borders are 0.

    Raises:
        UnreadableImage: the values are neither 0/1 nor dark and bright, or not among `preprocess.mask_values`.
    """
    if preprocess.mask_values is not None:
        return _resize_classes(pixels, preprocess.mask_values, preprocess, spacing)
    top = int(pixels.max())
    full = int(np.iinfo(pixels.dtype).max)
    if 1 < top <= full // 2:
        raise UnreadableImage(
            f"mask values reach {top}; expected 0 and 1, or 0 to {full}. A mask of more classes needs "
            "preprocess.mask_values, the grey value of each"
        )
    binary = pixels > (0 if top <= 1 else full // 2)  # edges of published masks are smoothed
    resized: Any = _resize(binary.astype(np.uint8) * np.uint8(255), preprocess, spacing)
    return np.where(resized > 127, np.uint8(1), np.uint8(0))[None]


def _resize_classes(
    pixels: Pixels, values: tuple[int, ...], preprocess: Preprocess, spacing: Spacing
) -> NDArray[np.uint8]:
    if unknown := sorted(set(np.unique(pixels).tolist()) - set(values)):
        shown = ", ".join(map(str, unknown[:4]))
        raise UnreadableImage(f"mask values {shown}; expected those of preprocess.mask_values, {list(values)}")
    shares = [_resize(np.where(pixels == value, np.float32(1), np.float32(0)), preprocess, spacing) for value in values]
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


def _resize(pixels: Any, preprocess: Preprocess, spacing: Spacing = None) -> Any:
    """Pixels (h, w), (h, w, 3) or, with a spacing, (d, h, w), resized to `preprocess.sides` by `preprocess.fit`."""
    sides = preprocess.sides
    shape, further = (pixels.shape[:2], pixels.shape[2:]) if spacing is None else (pixels.shape, ())
    inner, starts = _fit(shape, spacing, preprocess)
    resized = _resize_plane(pixels, *inner) if spacing is None else _resize_volume(pixels, inner)
    if inner == sides:
        return resized
    padded = np.zeros((*sides, *further), pixels.dtype)
    padded[tuple(slice(start, start + length) for start, length in zip(starts, inner, strict=True))] = resized
    return padded


def _fit(shape: tuple[int, ...], spacing: Spacing, preprocess: Preprocess) -> tuple[tuple[int, ...], list[int]]:
    """Sides that an image of `shape` is resized to within `preprocess.sides`, and where it starts there."""
    sides = preprocess.sides
    extents = shape if spacing is None else [side * size for side, size in zip(shape, spacing, strict=True)]
    inner = sides
    if preprocess.fit == "pad":
        scale = min(side / extent for side, extent in zip(sides, extents, strict=True))
        inner = tuple(max(1, round(extent * scale)) for extent in extents)
    return inner, [(side - length) // 2 for side, length in zip(sides, inner, strict=True)]


def _resize_volume(pixels: Any, sides: tuple[int, ...]) -> Any:
    """(d, h, w) -> (D, H, W): each slice, then the columns of all slices."""
    depth, height, width = sides
    slices = np.stack([_resize_plane(plane, height, width) for plane in pixels])  # (d, H, W)
    return np.stack([_resize_plane(slices[:, row], depth, width) for row in range(height)], axis=1)


def _resize_plane(pixels: Any, rows: int, columns: int) -> Any:
    shrinks = columns <= pixels.shape[1] and rows <= pixels.shape[0]
    pixels = np.ascontiguousarray(pixels)
    return cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
