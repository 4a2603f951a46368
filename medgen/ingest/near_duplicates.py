"""Find near-duplicate images and outliers from thumbnails.

thumb = thumbnail(raw.pixels)                                  # (64, 64) or (64, 64, 3) uint8
hashes[i], thumbs[i] = perceptual_hash(thumb), to_grey(thumb)
pairs = find_near_duplicates(hashes, thumbs, …)                # re-encoded, resized or brightened copies

Thumbnails are squares without padding, so that copies of another size or aspect ratio can be compared.
Shapes: N images, M pairs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

THUMBNAIL_SIZE = 64
# Thresholds chosen by inspecting pairs at every correlation among 3,600 brain MRI slices, 1,962 chest X-rays and 10,000
# MNIST digits. A copy saved as JPEG of quality 20, resized to a square, brightened by 20 % or with a gamma of 0.8
# differs in at most 8 bits of its hash and correlates by 0.991 or more. X-rays of different patients stay below 0.97,
# as do different MRI slices; pairs from 0.97 to 0.99 are copies with changed contrast. Digits by different writers
# reach 0.992 in 50 million pairs, because a small image has few distinctive pixels.
_MAX_BITS = 8
_MIN_CORRELATION = 0.99
_MIN_CORRELATION_SMALL = 0.995  # for images with a side below 64 px
_MIN_CONTRAST = 2.0  # standard deviation of 8-bit grey levels; images below it are blank
_MAX_PARTNERS = 256  # comparisons per image; if thousands share one hash, each is still linked to the next
MAX_PAIRS = 100_000  # pairs reported per dataset
_CHUNK = 1 << 22  # hashes compared at a time
_BATCH = 512  # thumbnails

# An image is an outlier if its distance to its neighbours is _MAX_DEVIATION robust standard deviations above the
# median, or if its saturation is and also exceeds the median by _MAX_SATURATION. Measured distances: 8.8 to 14.8 for
# food photographs among brain MRI, above 8 for 9 of 3,600 slices (3 are CT, one has a white frame) and for none of
# 1,743 X-rays. Measured saturations: 0.23 to 0.56 for food, 0.02 for the others.
_MAX_DEVIATION = 8.0
_MAX_SATURATION = 0.1
_NUM_NEIGHBOURS = 5
_NUM_REFERENCES = 2000  # images that all others are compared with, so that the time is linear in N
_OUTLIER_SIZE = 16  # pixels per side in the comparison


class NearDuplicate(NamedTuple):
    """Two rows that show the same image."""

    first: int
    second: int
    correlation: float


def thumbnail(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3), uint8 or uint16 -> the same in 64 x 64, uint8."""
    shrinks = min(pixels.shape[:2]) >= THUMBNAIL_SIZE
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    thumb: Any = cv2.resize(pixels, (THUMBNAIL_SIZE, THUMBNAIL_SIZE), interpolation=interpolation)
    return np.asarray(thumb if thumb.dtype == np.uint8 else thumb >> 8, np.uint8)


def to_grey(thumb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The luma (64, 64) of a thumbnail."""
    return thumb if thumb.ndim == 2 else np.asarray(cv2.cvtColor(thumb, cv2.COLOR_RGB2GRAY), np.uint8)


def saturation(thumb: NDArray[np.uint8]) -> float:
    """Mean range of a pixel's channels in a thumbnail: 0 (grey) to 1."""
    return 0.0 if thumb.ndim == 2 else float((thumb.max(axis=2) - thumb.min(axis=2)).mean()) / 255.0


def contrast(thumb: NDArray[np.uint8]) -> float:
    """Standard deviation of grey levels, 0 to 127.5."""
    return float(to_grey(thumb).std())


def is_blank(contrasts: NDArray[np.float32]) -> NDArray[np.bool_]:
    """True where a contrast (N,) is that of a blank image."""
    return np.asarray(contrasts < _MIN_CONTRAST)


def perceptual_hash(thumb: NDArray[np.uint8]) -> int:
    """64 bits, one for each of the 8 x 8 lowest frequencies: set if above the median (Zauner 2010, pHash)."""
    small = cv2.resize(to_grey(thumb), (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    lowest = cv2.dct(small)[1:9, 1:9].ravel()  # without row and column means, to ignore brightness
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


def find_near_duplicates(
    hashes: NDArray[np.uint64],
    thumbs: NDArray[np.uint8],
    skip: NDArray[np.bool_],
    patients: NDArray[np.int64],
    sides: NDArray[np.int32],
) -> list[NearDuplicate]:
    """Pairs of rows (first < second) with similar hashes and grey thumbnails that correlate by 0.99 or more.

    Images smaller than a thumbnail need 0.995. Even then a pair may be two different images, such as two handwritten
    ones. Images of the same patient are not compared: neighbouring slices are similar and share a split anyway. All
    pairs of hashes are compared in bounded memory, in about a minute for 100,000 images; at most MAX_PAIRS are
    returned.

    Args:
        hashes: (N,) perceptual hashes.
        thumbs: (N, 64, 64) uint8; only batches of rows are read, so it may be a memory-mapped file.
        skip: (N,) rows to leave out: blank images, and further copies of an image that is compared already.
        patients: (N,) integer identifiers.
        sides: (N,) shorter side of each image in pixels.
    """
    rows = np.flatnonzero(~skip)
    least = np.where(sides < THUMBNAIL_SIZE, _MIN_CORRELATION_SMALL, _MIN_CORRELATION)
    found: list[NearDuplicate] = []
    for firsts, seconds in _candidate_pairs(hashes[rows], patients[rows]):
        for start in range(0, len(firsts), _BATCH):
            first, second = rows[firsts[start : start + _BATCH]], rows[seconds[start : start + _BATCH]]
            correlation = _correlation(thumbs[first], thumbs[second])
            for i in np.flatnonzero(correlation >= np.maximum(least[first], least[second])):
                found.append(NearDuplicate(int(first[i]), int(second[i]), round(float(correlation[i]), 4)))
        if len(found) >= MAX_PAIRS:
            return found[:MAX_PAIRS]
    return found


def find_outliers(thumbs: NDArray[np.uint8], saturations: NDArray[np.float32]) -> list[int]:
    """Rows of images that are far from their nearest neighbours, or far more colourful than the others."""
    if len(thumbs) <= 2 * _NUM_NEIGHBOURS:
        return []
    chosen = np.sort(np.random.default_rng(0).permutation(len(thumbs))[:_NUM_REFERENCES])
    references = _points(thumbs[chosen])
    batches = (thumbs[start : start + _BATCH] for start in range(0, len(thumbs), _BATCH))
    distances = np.concatenate([_neighbour_distances(_points(batch), references) for batch in batches])
    is_colourful = saturations - np.median(saturations) > _MAX_SATURATION
    is_outlier = (_deviations(distances) > _MAX_DEVIATION) | (
        is_colourful & (_deviations(saturations) > _MAX_DEVIATION)
    )
    return [int(row) for row in np.flatnonzero(is_outlier)]


def _candidate_pairs(
    hashes: NDArray[np.uint64], patients: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of rows of different patients whose hashes are similar, sorted by the first row, in chunks."""
    step = max(1, _CHUNK // max(len(hashes), 1))
    for start in range(0, len(hashes), step):
        bits = np.bitwise_count(hashes[start : start + step, None] ^ hashes[None, start:])
        firsts, seconds = np.nonzero(bits <= _MAX_BITS)
        wanted = (firsts < seconds) & (patients[start + firsts] != patients[start + seconds])
        firsts, seconds = start + firsts[wanted], start + seconds[wanted]
        rank = np.arange(len(firsts)) - np.searchsorted(firsts, firsts)  # position among the partners of one row
        yield firsts[rank < _MAX_PARTNERS], seconds[rank < _MAX_PARTNERS]


def _correlation(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pearson correlations (M,) of thumbnails (M, 64, 64) and (M, 64, 64)."""
    a, b = (batch.reshape(len(batch), -1).astype(np.float32) for batch in (first, second))
    a -= a.mean(axis=1, keepdims=True)
    b -= b.mean(axis=1, keepdims=True)
    dot, aa, bb = (np.einsum("ij,ij->i", *pair) for pair in ((a, b), (a, a), (b, b)))
    return np.asarray(dot / np.maximum(np.sqrt(aa * bb), 1e-6))


def _points(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnails (N, 64, 64) -> (N, 256) in [0, 1], downsampled to 16 x 16."""
    size = (_OUTLIER_SIZE, _OUTLIER_SIZE)
    small = [cv2.resize(np.asarray(thumb), size, interpolation=cv2.INTER_AREA) for thumb in thumbs]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255.0


def _neighbour_distances(points: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean distance (N,) to the nearest references, without the very nearest: a reference's nearest is itself."""
    squares = (points**2).sum(1)[:, None] + (references**2).sum(1)[None] - 2.0 * points @ references.T
    nearest = np.partition(squares.clip(0.0), _NUM_NEIGHBOURS, axis=1)[:, : _NUM_NEIGHBOURS + 1]
    return np.asarray(np.sqrt(np.sort(nearest, axis=1)[:, 1:]).mean(axis=1))


def _deviations(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Deviations from the median in robust standard deviations (1.4826 x the median absolute deviation)."""
    centred = values.astype(np.float64) - np.median(values)
    return np.asarray(centred / max(1.4826 * float(np.median(np.abs(centred))), 1e-3))
