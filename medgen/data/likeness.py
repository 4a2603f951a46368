"""Which pictures are alike, and which are not of the others' kind.

thumb = thumbnail(raw.pixels)                              # (64, 64) or (64, 64, 3) uint8
hashes[i], thumbs[i] = perceptual_hash(thumb), grey(thumb)
near = near_pairs(hashes, thumbs)                          # re-encoded, resized, brightened copies

Thumbnails are squashed to a square: a copy of another size or aspect still lies on its original.
Shapes: N pictures.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

THUMB = 64
# Chosen on 3,600 brain slices, 1,962 chest films and 4,000 MNIST digits. A copy saved as JPEG of quality 20, resized,
# brightened by 20 % or with a gamma of 0.8 differs in at most 8 bits of its hash and correlates by 0.991 or more. Films
# of different patients never do, and of 8 million pairs of digits one.
_MAX_BITS = 8
_MIN_CORRELATION = 0.99
_MIN_CONTRAST = 2.0  # standard deviation of grey levels in 255; a picture below it shows nothing
_MAX_PAIRS = 100_000  # of one set: more say no more
_CHUNK = 1 << 22  # pairs compared at a time

# A picture is an outlier this many robust standard deviations beyond the others (food among brain slices: 8.8 to 14.8,
# beside 9 of 3,600 slices and none of 1,743 chest films), or this much more colourful (0.23 to 0.56, others 0.02).
_MAX_DISTANCE = 8.0
_MAX_SATURATION = 0.1
_NEIGHBOURS = 5
_REFERENCES = 2000  # pictures that all are compared with, so that time grows with N only
_OUTLINE = 16  # pixels a side of what is compared


class Near(NamedTuple):
    """Two rows that show the same picture."""

    one: int
    other: int
    correlation: float


def thumbnail(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3), uint8 or uint16 -> the same in 64 x 64, uint8."""
    height, width = pixels.shape[:2]
    shrinks = height >= THUMB and width >= THUMB
    thumb: Any = cv2.resize(pixels, (THUMB, THUMB), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(thumb if thumb.dtype == np.uint8 else thumb >> 8, np.uint8)


def grey(thumb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A thumbnail's luma (64, 64)."""
    return thumb if thumb.ndim == 2 else np.asarray(cv2.cvtColor(thumb, cv2.COLOR_RGB2GRAY), np.uint8)


def saturation(thumb: NDArray[np.uint8]) -> float:
    """How colourful a thumbnail is: mean range of a pixel's channels, 0 (grey) to 1."""
    return 0.0 if thumb.ndim == 2 else float((thumb.max(axis=2) - thumb.min(axis=2)).mean()) / 255.0


def contrast(thumb: NDArray[np.uint8]) -> float:
    """Standard deviation of grey levels, 0 to 127.5."""
    return float(grey(thumb).std())


def is_blank(contrasts: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of (N,) contrasts show nothing."""
    return np.asarray(contrasts < _MIN_CONTRAST)


def perceptual_hash(thumb: NDArray[np.uint8]) -> int:
    """64 bits: which of the 8 x 8 lowest frequencies are above their median (Zauner 2010, pHash)."""
    small = cv2.resize(grey(thumb), (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    lowest = cv2.dct(small)[1:9, 1:9].ravel()  # without the means of rows and columns: brightness says nothing
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


def near_pairs(hashes: NDArray[np.uint64], thumbs: NDArray[np.uint8], skip: NDArray[np.bool_]) -> list[Near]:
    """Pairs of rows (one before other) whose hashes are near and whose grey thumbnails correlate by 0.99 or more.

    All pairs of hashes are compared, 64 bits each, in bounded memory: a minute for 100,000 pictures.

    Args:
        hashes: (N,) perceptual hashes.
        thumbs: (N, 64, 64) uint8; read row by row, so it may be a file.
        skip: (N,) rows left out: blank pictures, and further copies of one already compared.
    """
    rows = np.flatnonzero(~skip)
    found: list[Near] = []
    for one, other in _candidates(hashes[rows], rows):
        correlation = _correlation(thumbs[one], thumbs[other])
        if correlation >= _MIN_CORRELATION:
            found.append(Near(one, other, round(correlation, 4)))
            if len(found) == _MAX_PAIRS:
                break
    return found


def outliers(thumbs: NDArray[np.uint8], saturations: NDArray[np.float32]) -> list[int]:
    """Rows that are not of the others' kind: far from their nearest neighbours, or far more colourful."""
    if len(thumbs) <= 2 * _NEIGHBOURS:
        return []
    outlines = np.concatenate([_outline(thumbs[start : start + 512]) for start in range(0, len(thumbs), 512)])
    chosen = np.random.default_rng(0).permutation(len(outlines))[:_REFERENCES]
    distances = np.concatenate([_nearest(part, outlines[chosen]) for part in _parts(outlines, 512)])
    colourful = saturations - np.median(saturations)
    odd = (_robust(distances) > _MAX_DISTANCE) | (
        (colourful > _MAX_SATURATION) & (_robust(saturations) > _MAX_DISTANCE)
    )
    return [int(row) for row in np.flatnonzero(odd)]


def _candidates(hashes: NDArray[np.uint64], rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // max(len(hashes), 1))
    for start in range(0, len(hashes), step):
        bits = np.bitwise_count(hashes[start : start + step, None] ^ hashes[None, start:])
        ones, others = np.nonzero(bits <= _MAX_BITS)
        for one, other in zip(ones.tolist(), others.tolist(), strict=True):
            if one < other:
                yield int(rows[start + one]), int(rows[start + other])


def _correlation(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    a, b = (thumb.astype(np.float32).ravel() - float(thumb.mean()) for thumb in (one, other))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _outline(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    small = [cv2.resize(np.asarray(thumb), (_OUTLINE, _OUTLINE), interpolation=cv2.INTER_AREA) for thumb in thumbs]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255.0


def _nearest(points: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean distance to the nearest references but one, which for a reference is itself."""
    squares = (points**2).sum(1)[:, None] + (references**2).sum(1)[None] - 2.0 * points @ references.T
    nearest = np.partition(squares.clip(0.0), _NEIGHBOURS, axis=1)[:, : _NEIGHBOURS + 1]
    return np.asarray(np.sqrt(np.sort(nearest, axis=1)[:, 1:]).mean(axis=1))


def _robust(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """In standard deviations from the median, judged by the median deviation, which outliers do not move."""
    centred = values.astype(np.float64) - np.median(values)
    return np.asarray(centred / max(1.4826 * float(np.median(np.abs(centred))), 1e-3))


def _parts(array: NDArray[np.float32], size: int) -> Sequence[NDArray[np.float32]]:
    return [array[start : start + size] for start in range(0, len(array), size)]
