"""Likeness: copies are found re-encoded, resized and brightened; different pictures are not taken for one."""

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from medgen.config import Preprocess
from medgen.ingest import near_duplicates
from medgen.ingest.images import read_image
from medgen.ingest.near_duplicates import Near, grey, near_pairs, outliers, perceptual_hash, thumbnail

Thumb = NDArray[np.uint8]


def picture(seed: int, height: int = 180, width: int = 240) -> Thumb:
    """Soft shapes with a little noise, as a film has them."""
    generator = np.random.default_rng(seed)
    soft = cv2.GaussianBlur(generator.normal(0.0, 1.0, (height, width)), (0, 0), 12)
    return np.asarray((soft / soft.std() * 40 + 110 + generator.normal(0, 3, soft.shape)).clip(0, 255), np.uint8)


def near(thumbs: list[Thumb], **changed: Any) -> list[Near]:
    """`near_pairs` of large pictures of as many patients, none left out."""
    number = len(thumbs)
    settings = {
        "skip": np.zeros(number, bool),
        "patients": np.arange(number),
        "sides": np.full(number, 224, np.int32),
    } | changed
    hashes = np.array([perceptual_hash(thumb) for thumb in thumbs], np.uint64)
    return near_pairs(hashes, np.stack([grey(thumb) for thumb in thumbs]), **settings)


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
def test_a_copy_is_found_among_others_and_nothing_else(change: Callable[[Thumb], Any]) -> None:
    originals = [picture(seed) for seed in range(12)]
    found = near([thumbnail(p) for p in [*originals, change(originals[5])]])
    assert [(pair.one, pair.other) for pair in found] == [(5, 12)]
    assert near_duplicates._MIN_CORRELATION <= found[0].correlation <= 1.0


def test_pairs_are_those_of_a_plain_loop_over_numpys_correlation() -> None:
    generator = np.random.default_rng(0)
    thumbs = []
    for seed in range(30):  # families of pictures that are more and less alike
        base = thumbnail(picture(seed % 6)).astype(float)
        thumbs.append((base + generator.normal(0, 2 * (seed // 6), base.shape)).clip(0, 255).astype(np.uint8))
    expected = []
    for one, other in itertools.combinations(range(30), 2):
        correlation = np.corrcoef(thumbs[one].ravel(), thumbs[other].ravel())[0, 1]
        bits = (perceptual_hash(thumbs[one]) ^ perceptual_hash(thumbs[other])).bit_count()
        if bits <= 8 and correlation >= 0.99:
            expected.append((one, other, pytest.approx(correlation, abs=1e-4)))
    assert 10 < len(expected) < 60
    assert sorted(near(thumbs)) == expected


def test_the_hash_is_the_signs_of_a_cosine_transform() -> None:
    """Zauner 2010, with the transform (DCT-II) as its formula."""
    thumb = thumbnail(picture(3))
    small = cv2.resize(thumb, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    k, n = np.arange(32)[:, None], np.arange(32)[None]
    basis = np.cos(np.pi * (2 * n + 1) * k / 64)
    lowest = (basis @ small @ basis.T)[1:9, 1:9]
    bits = "".join("1" if value else "0" for value in (lowest > np.median(lowest)).ravel())
    assert perceptual_hash(thumb) == int(bits, 2)


def test_a_patients_own_pictures_blank_ones_and_further_copies_are_not_compared() -> None:
    thumbs = [thumbnail(picture(0))] * 3
    assert len(near(thumbs)) == 3
    assert near(thumbs, patients=np.array([7, 7, 7])) == []
    assert [(p.one, p.other) for p in near(thumbs, patients=np.array([7, 7, 8]))] == [(0, 2), (1, 2)]
    assert [(p.one, p.other) for p in near(thumbs, skip=np.array([False, True, False]))] == [(0, 2)]


def test_small_pictures_must_be_more_alike() -> None:
    first = thumbnail(picture(0)).astype(float)
    noise = np.random.default_rng(0).normal(0, 5.0, first.shape)
    thumbs = [first.astype(np.uint8), (first + noise).clip(0, 255).astype(np.uint8)]
    assert 0.99 <= near(thumbs)[0].correlation < 0.995
    assert near(thumbs, sides=np.array([28, 224], np.int32)) == []


def test_many_pictures_with_one_hash_cost_little_and_stay_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_MAX_PARTNERS", 2)
    monkeypatch.setattr(near_duplicates, "_CHUNK", 100)  # several rounds
    found = near([thumbnail(picture(0))] * 40)
    assert [(pair.one, pair.other) for pair in found[:3]] == [(0, 1), (0, 2), (1, 2)]
    assert {pair.other for pair in found} == set(range(1, 40))
    assert len(found) == 2 * 40 - 3
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 10)
    assert near([thumbnail(picture(0))] * 40) == found[:10]


def test_none_and_one_picture_have_no_pairs() -> None:
    empty = np.zeros((0, 64, 64), np.uint8)
    assert near_pairs(np.zeros(0, np.uint64), empty, *(np.zeros(0, kind) for kind in (bool, np.int64, np.int32))) == []
    assert near([thumbnail(picture(0))]) == []
    assert outliers(empty, np.zeros(0, np.float32)) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (28, 28), (64, 64), (2000, 30), (300, 300, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_thumbnails_are_of_one_size_and_keep_colour(shape: tuple[int, ...], kind: type) -> None:
    thumb = thumbnail(np.full(shape, np.iinfo(kind).max, kind))
    assert thumb.shape == (64, 64, *shape[2:])
    assert thumb.dtype == np.uint8
    assert (thumb == 255).all()
    assert 0 <= perceptual_hash(thumb) < 1 << 64


@pytest.mark.parametrize(
    ("level", "spread", "blank"), [(0, 0, True), (255, 0, True), (90, 1, True), (90, 6, False), (4, 30, False)]
)
def test_blank_is_what_shows_nothing(level: int, spread: int, blank: bool) -> None:
    noise = np.random.default_rng(0).normal(level, spread, (64, 64)).clip(0, 255).astype(np.uint8)
    assert near_duplicates.is_blank(np.array([near_duplicates.contrast(noise)], np.float32)).tolist() == [blank]


def flock(number: int) -> list[Thumb]:
    """Pictures of one kind: the same body, each a little different."""
    body = picture(100).astype(float)
    return [thumbnail((0.8 * body + 0.2 * picture(seed)).astype(np.uint8)) for seed in range(number)]


def test_a_picture_of_another_kind_is_found_among_one_kind_and_nothing_else() -> None:
    alike = flock(80)
    grey_levels = np.zeros(81, np.float32)
    assert outliers(np.stack(alike), grey_levels[:80]) == []
    strange = thumbnail(np.random.default_rng(5).integers(0, 255, (4, 4)).astype(np.uint8))  # coarse squares
    assert outliers(np.stack([*alike[:30], strange, *alike[30:]]), grey_levels) == [30]


def test_colour_is_odd_only_where_the_others_have_none() -> None:
    thumbs = np.stack(flock(40))
    generator = np.random.default_rng(0)
    among_grey = generator.uniform(0, 0.02, 40).astype(np.float32)
    among_grey[7] = 0.25
    assert outliers(thumbs, among_grey) == [7]
    among_colour = generator.uniform(0.1, 0.5, 40).astype(np.float32)
    assert outliers(thumbs, among_colour) == []


def test_a_handful_of_pictures_has_no_kind() -> None:
    thumbs = [thumbnail(picture(seed)) for seed in range(10)]
    assert outliers(np.stack(thumbs), np.linspace(0, 1, 10).astype(np.float32)) == []


def test_saturation_is_the_range_of_a_pixels_channels() -> None:
    thumb = np.zeros((64, 64, 3), np.uint8)
    assert near_duplicates.saturation(thumb) == 0.0
    thumb[:32, :, 0] = 255
    assert near_duplicates.saturation(thumb) == 0.5
    assert near_duplicates.saturation(grey(thumb)) == 0.0


def test_one_film_in_two_collections_is_found(shared_data: Callable[[str], Path]) -> None:
    """844 x 480 and squashed to 224 x 224, under COVID-19 in one and PNEUMONIA in the other."""
    files = sorted(shared_data("quirks").glob("cross_dataset_conflict/*.jp*g"))
    thumbs = [thumbnail(read_image(file, Preprocess()).pixels) for file in files]
    assert [(pair.one, pair.other) for pair in near(thumbs)] == [(0, 1)]


def test_digits_of_different_hands_are_not_one(shared_data: Callable[[str], Path]) -> None:
    content = gzip.decompress((shared_data("mnist_idx") / "t10k-images-idx3-ubyte.gz").read_bytes())
    digits = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:5000]
    assert near([thumbnail(digit) for digit in digits], sides=np.full(len(digits), 28, np.int32)) == []
