"""Near-duplicates: re-encoded, resized and brightened copies are found, different images are not."""

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from medgen.ingest import near_duplicates
from medgen.ingest.near_duplicates import (
    NearDuplicate,
    find_near_duplicates,
    find_outliers,
    perceptual_hash,
    thumbnail,
    to_grey,
)

Thumb = NDArray[np.uint8]


def make_image(seed: int, height: int = 180, width: int = 240) -> Thumb:
    """Soft shapes with a little noise, similar to a radiograph."""
    generator = np.random.default_rng(seed)
    soft = cv2.GaussianBlur(generator.normal(0.0, 1.0, (height, width)), (0, 0), 12)
    return np.asarray((soft / soft.std() * 40 + 110 + generator.normal(0, 3, soft.shape)).clip(0, 255), np.uint8)


def find_pairs(thumbs: list[Thumb], **changed: Any) -> list[NearDuplicate]:
    """`find_near_duplicates` with one large image per patient and none skipped."""
    number = len(thumbs)
    settings = {
        "skip": np.zeros(number, bool),
        "patients": np.arange(number),
        "sides": np.full(number, 224, np.int32),
    } | changed
    hashes = np.array([perceptual_hash(thumb) for thumb in thumbs], np.uint64)
    return find_near_duplicates(hashes, np.stack([to_grey(thumb) for thumb in thumbs]), **settings)


COPIES: dict[str, Callable[[Thumb], Any]] = {
    "JPEG": lambda p: cv2.imdecode(cv2.imencode(".jpg", p, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], cv2.IMREAD_GRAYSCALE),
    "half the size": lambda p: cv2.resize(p, (p.shape[1] // 2, p.shape[0] // 2), interpolation=cv2.INTER_AREA),
    "squashed to a square": lambda p: cv2.resize(p, (224, 224), interpolation=cv2.INTER_CUBIC),
    "brighter": lambda p: (p * 1.2).clip(0, 255).astype(np.uint8),
    "another gamma": lambda p: (255 * (p / 255) ** 0.8).astype(np.uint8),
    "16 bits": lambda p: p.astype(np.uint16) << 8,
    "in colour": lambda p: np.repeat(p[..., None], 3, axis=2),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES.keys())
def test_only_the_copy_is_found_among_other_images(change: Callable[[Thumb], Any]) -> None:
    originals = [make_image(seed) for seed in range(12)]
    found = find_pairs([thumbnail(p) for p in [*originals, change(originals[5])]])
    assert [(pair.first, pair.second) for pair in found] == [(5, 12)]
    assert near_duplicates._MIN_CORRELATION <= found[0].correlation <= 1.0


def test_pairs_match_a_loop_over_numpy_correlations() -> None:
    generator = np.random.default_rng(0)
    thumbs = []
    for seed in range(30):  # six originals, each with copies of increasing noise
        base = thumbnail(make_image(seed % 6)).astype(float)
        thumbs.append((base + generator.normal(0, 2 * (seed // 6), base.shape)).clip(0, 255).astype(np.uint8))
    expected = []
    for first, second in itertools.combinations(range(30), 2):
        correlation = np.corrcoef(thumbs[first].ravel(), thumbs[second].ravel())[0, 1]
        bits = (perceptual_hash(thumbs[first]) ^ perceptual_hash(thumbs[second])).bit_count()
        if bits <= 8 and correlation >= 0.99:
            expected.append((first, second, pytest.approx(correlation, abs=1e-4)))
    assert 10 < len(expected) < 60
    assert sorted(find_pairs(thumbs)) == expected


def test_the_hash_matches_the_formula_of_the_cosine_transform() -> None:
    """Zauner 2010, with the transform (DCT-II) as its formula."""
    thumb = thumbnail(make_image(3))
    small = cv2.resize(thumb, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    k, n = np.arange(32)[:, None], np.arange(32)[None]
    basis = np.cos(np.pi * (2 * n + 1) * k / 64)
    lowest = (basis @ small @ basis.T)[1:9, 1:9]
    bits = "".join("1" if value else "0" for value in (lowest > np.median(lowest)).ravel())
    assert perceptual_hash(thumb) == int(bits, 2)


def test_images_of_one_patient_and_skipped_rows_are_not_compared() -> None:
    thumbs = [thumbnail(make_image(0))] * 3
    assert len(find_pairs(thumbs)) == 3
    assert find_pairs(thumbs, patients=np.array([7, 7, 7])) == []
    assert [(p.first, p.second) for p in find_pairs(thumbs, patients=np.array([7, 7, 8]))] == [(0, 2), (1, 2)]
    assert [(p.first, p.second) for p in find_pairs(thumbs, skip=np.array([False, True, False]))] == [(0, 2)]


def test_small_images_need_a_higher_correlation() -> None:
    first = thumbnail(make_image(0)).astype(float)
    noise = np.random.default_rng(0).normal(0, 5.0, first.shape)
    thumbs = [first.astype(np.uint8), (first + noise).clip(0, 255).astype(np.uint8)]
    assert 0.99 <= find_pairs(thumbs)[0].correlation < 0.995
    assert find_pairs(thumbs, sides=np.array([28, 224], np.int32)) == []


def test_images_with_one_hash_are_linked_with_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_MAX_PARTNERS", 2)
    monkeypatch.setattr(near_duplicates, "_CHUNK", 100)  # several chunks
    found = find_pairs([thumbnail(make_image(0))] * 40)
    assert [(pair.first, pair.second) for pair in found[:3]] == [(0, 1), (0, 2), (1, 2)]
    assert {pair.second for pair in found} == set(range(1, 40))
    assert len(found) == 2 * 40 - 3
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 10)
    assert find_pairs([thumbnail(make_image(0))] * 40) == found[:10]


def test_no_image_and_one_image_have_no_pairs() -> None:
    empty = np.zeros((0, 64, 64), np.uint8)
    no_rows = (np.zeros(0, kind) for kind in (bool, np.int64, np.int32))
    assert find_near_duplicates(np.zeros(0, np.uint64), empty, *no_rows) == []
    assert find_pairs([thumbnail(make_image(0))]) == []
    assert find_outliers(empty, np.zeros(0, np.float32)) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (28, 28), (64, 64), (2000, 30), (300, 300, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_thumbnails_have_one_size_and_keep_colour(shape: tuple[int, ...], kind: type) -> None:
    thumb = thumbnail(np.full(shape, np.iinfo(kind).max, kind))
    assert thumb.shape == (64, 64, *shape[2:])
    assert thumb.dtype == np.uint8
    assert (thumb == 255).all()
    assert 0 <= perceptual_hash(thumb) < 1 << 64


@pytest.mark.parametrize(
    ("level", "spread", "blank"), [(0, 0, True), (255, 0, True), (90, 1, True), (90, 6, False), (4, 30, False)]
)
def test_images_without_contrast_are_blank(level: int, spread: int, blank: bool) -> None:
    noise = np.random.default_rng(0).normal(level, spread, (64, 64)).clip(0, 255).astype(np.uint8)
    assert near_duplicates.is_blank(np.array([near_duplicates.contrast(noise)], np.float32)).tolist() == [blank]


def similar_images(number: int) -> list[Thumb]:
    """Thumbnails of variations of one image."""
    base = make_image(100).astype(float)
    return [thumbnail((0.8 * base + 0.2 * make_image(seed)).astype(np.uint8)) for seed in range(number)]


def test_only_the_outlier_is_found_among_similar_images() -> None:
    alike = similar_images(80)
    grey_levels = np.zeros(81, np.float32)
    assert find_outliers(np.stack(alike), grey_levels[:80]) == []
    strange = thumbnail(np.random.default_rng(5).integers(0, 255, (4, 4)).astype(np.uint8))  # coarse squares
    assert find_outliers(np.stack([*alike[:30], strange, *alike[30:]]), grey_levels) == [30]


def test_colour_is_an_outlier_only_among_grey_images() -> None:
    thumbs = np.stack(similar_images(40))
    generator = np.random.default_rng(0)
    among_grey = generator.uniform(0, 0.02, 40).astype(np.float32)
    among_grey[7] = 0.25
    assert find_outliers(thumbs, among_grey) == [7]
    among_colour = generator.uniform(0.1, 0.5, 40).astype(np.float32)
    assert find_outliers(thumbs, among_colour) == []


def test_few_images_have_no_outliers() -> None:
    thumbs = [thumbnail(make_image(seed)) for seed in range(10)]
    assert find_outliers(np.stack(thumbs), np.linspace(0, 1, 10).astype(np.float32)) == []


def test_saturation_is_the_mean_range_of_the_channels() -> None:
    thumb = np.zeros((64, 64, 3), np.uint8)
    assert near_duplicates.saturation(thumb) == 0.0
    thumb[:32, :, 0] = 255
    assert near_duplicates.saturation(thumb) == 0.5
    assert near_duplicates.saturation(to_grey(thumb)) == 0.0
