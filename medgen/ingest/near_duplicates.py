"""Which pictures are alike, and which are not of the others' kind.

thumb = thumbnail(raw.pixels)                              # (64, 64) or (64, 64, 3) uint8
hashes[i], thumbs[i] = perceptual_hash(thumb), grey(thumb)
near = near_pairs(hashes, thumbs, …)                       # re-encoded, resized, brightened copies

Thumbnails are squashed to a square: a copy of another size or aspect still lies on its original.
Shapes: N pictures.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

THUMB = 64
# Chosen on 3,600 brain slices, 1,962 chest films and 10,000 MNIST digits, by looking at pairs of every correlation. A
# copy saved as JPEG of quality 20, resized to a square, brightened by 20 % or with a gamma of 0.8 differs in at most 8
# bits of its hash and correlates by 0.991 or more. Films of different patients stay below 0.97, and different slices
# were not seen above it; from 0.97 to 0.99 are slices with another contrast, by whoever made that collection. Strokes
# of different hands reach 0.992 in 50 million pairs: a picture of few pixels has little to tell it from another.
_MAX_BITS = 8
_MIN_CORRELATION = 0.99
_SMALL_MIN_CORRELATION = 0.995  # for pictures with a side below 64 px
_MIN_CONTRAST = 2.0  # standard deviation of grey levels in 255; a picture below it shows nothing
_MAX_PARTNERS = 256  # compared with one picture; where thousands have one hash, each is still linked to the next
MAX_PAIRS = 100_000  # of one set: more say no more
_CHUNK = 1 << 22  # hashes compared at a time
_BATCH = 512  # thumbnails

# A picture is an outlier this many robust standard deviations beyond the others (food among brain slices: 8.8 to 14.8,
# beside 9 of 3,600 slices, of which 3 are CT and one has a white frame, and none of 1,743 chest films), or this much
# more colourful (0.23 to 0.56, others 0.02).
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


def near_pairs(
    hashes: NDArray[np.uint64],
    thumbs: NDArray[np.uint8],
    skip: NDArray[np.bool_],
    patients: NDArray[np.int64],
    sides: NDArray[np.int32],
) -> list[Near]:
    """Pairs of rows (one before other) whose hashes are near and whose grey thumbnails correlate by 0.99 or more.

    Pictures smaller than a thumbnail need 0.995, and still mean less: two hands write the same 1. Pictures of one
    patient are not compared: neighbouring slices are alike, and stay together anyway. All pairs of hashes are
    compared in bounded memory, a minute for 100,000 pictures; at most MAX_PAIRS are given.

    Args:
        hashes: (N,) perceptual hashes.
        thumbs: (N, 64, 64) uint8; read row by row, so it may be a file.
        skip: (N,) rows left out: blank pictures, and further copies of one already compared.
        patients: (N,) a number for each patient.
        sides: (N,) shorter side of each picture in pixels.
    """
    rows = np.flatnonzero(~skip)
    least = np.where(sides < THUMB, _SMALL_MIN_CORRELATION, _MIN_CORRELATION)
    found: list[Near] = []
    for ones, others in _candidates(hashes[rows], patients[rows]):
        for start in range(0, len(ones), _BATCH):
            one, other = rows[ones[start : start + _BATCH]], rows[others[start : start + _BATCH]]
            correlation = _correlation(thumbs[one], thumbs[other])
            for i in np.flatnonzero(correlation >= np.maximum(least[one], least[other])):
                found.append(Near(int(one[i]), int(other[i]), round(float(correlation[i]), 4)))
        if len(found) >= MAX_PAIRS:
            return found[:MAX_PAIRS]
    return found


def outliers(thumbs: NDArray[np.uint8], saturations: NDArray[np.float32]) -> list[int]:
    """Rows that are not of the others' kind: far from their nearest neighbours, or far more colourful."""
    if len(thumbs) <= 2 * _NEIGHBOURS:
        return []
    chosen = np.sort(np.random.default_rng(0).permutation(len(thumbs))[:_REFERENCES])
    references = _outline(thumbs[chosen])
    parts = (thumbs[start : start + _BATCH] for start in range(0, len(thumbs), _BATCH))
    distances = np.concatenate([_nearest(_outline(part), references) for part in parts])
    colourful = saturations - np.median(saturations)
    odd = (_robust(distances) > _MAX_DISTANCE) | (
        (colourful > _MAX_SATURATION) & (_robust(saturations) > _MAX_DISTANCE)
    )
    return [int(row) for row in np.flatnonzero(odd)]


def _candidates(
    hashes: NDArray[np.uint64], patients: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of different patients that may be near, by their first."""
    step = max(1, _CHUNK // max(len(hashes), 1))
    for start in range(0, len(hashes), step):
        bits = np.bitwise_count(hashes[start : start + step, None] ^ hashes[None, start:])
        ones, others = np.nonzero(bits <= _MAX_BITS)
        wanted = (ones < others) & (patients[start + ones] != patients[start + others])
        ones, others = start + ones[wanted], start + others[wanted]
        rank = np.arange(len(ones)) - np.searchsorted(ones, ones)  # how manyth partner of its first
        yield ones[rank < _MAX_PARTNERS], others[rank < _MAX_PARTNERS]


def _correlation(ones: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pearson's, of (M, 64, 64) with (M, 64, 64)."""
    a, b = (part.reshape(len(part), -1).astype(np.float32) for part in (ones, others))
    a -= a.mean(axis=1, keepdims=True)
    b -= b.mean(axis=1, keepdims=True)
    dot, aa, bb = (np.einsum("ij,ij->i", *pair) for pair in ((a, b), (a, a), (b, b)))
    return np.asarray(dot / np.maximum(np.sqrt(aa * bb), 1e-6))


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
