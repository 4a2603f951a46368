"""The search finds copies of train images despite blur, shift, mirroring and tone, and does not accuse new images."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.metrics import privacy


def draw_images(count: int, seed: int, side: int = 64) -> Tensor:
    """Images (N, 1, side, side) in [0, 1] of one layout, each with its own smooth details and noise."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, side)
    layout = 0.5 + 0.3 * torch.cos(3 * axis)[:, None] * torch.cos(5 * axis)[None, :]
    coarse = torch.randn(count, 1, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    grain = torch.randn(count, 1, side, side, generator=generator)
    return (layout + 0.07 * smooth + 0.02 * grain).clamp(0, 1)


def blurred(images: Tensor, width: int = 5) -> Tensor:
    """Two box filters, which are about a Gaussian blur of 2 px at width 5."""
    for _ in range(2):
        images = F.avg_pool2d(F.pad(images, [width // 2] * 4, mode="replicate"), width, 1)
    return images


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    side, most = images.shape[-1], images.shape[-1] // 16
    wide = F.pad(images, [most] * 4, mode="replicate")
    return wide[..., most - down : most - down + side, most - right : most - right + side]


TRAIN, HELD_OUT, NEW = draw_images(150, seed=0), draw_images(200, seed=1), draw_images(200, seed=2)
LIMITS = privacy.nearest_by_pixels(HELD_OUT, TRAIN)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda images: images,
    "blurred": blurred,
    "mirrored": lambda images: images.flip(-1),
    "shifted": lambda images: shifted(images, 3, -4),
    "darker and flatter": lambda images: 0.1 + 0.6 * images**1.1,
    "all of it": lambda images: 0.1 + 0.6 * blurred(shifted(images.flip(-1), -2, 3), 3) ** 1.1,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copies_are_found_and_new_images_are_not(change: Callable[[Tensor], Tensor]) -> None:
    found = privacy.nearest_by_pixels(change(TRAIN), TRAIN)
    copies = privacy.find_copies(found, LIMITS)
    assert copies.rate > 0.95
    assert copies.ratio < 0.6
    assert (found.row == torch.arange(len(TRAIN))).double().mean() > 0.95
    result = privacy.find_copies(privacy.nearest_by_pixels(change(NEW), TRAIN), LIMITS)
    assert result.rate <= 0.03
    assert result.ratio == pytest.approx(1.0, abs=0.1)


PART_LIMITS = privacy.nearest_by_parts(HELD_OUT[:100], TRAIN)
PARTS = {
    "left half": (slice(0, 64), slice(0, 32)),
    "lower half": (slice(32, 64), slice(0, 64)),
    "quarter in the middle": (slice(16, 48), slice(16, 48)),
    "quarter at the right border": (slice(0, 32), slice(32, 64)),
}


@pytest.mark.parametrize("mirrored", [False, True])
def test_copied_parts_are_found_and_new_images_are_not(mirrored: bool) -> None:
    source = TRAIN[:20].flip(-1) if mirrored else TRAIN[:20]
    for name, (rows, columns) in PARTS.items():
        images = NEW[:20].clone()
        images[..., rows, columns] = 0.1 + 0.7 * source[..., rows, columns]
        found = privacy.nearest_by_parts(images, TRAIN)
        assert privacy.find_copies(found, PART_LIMITS).rate > 0.95, name
        assert (found.row == torch.arange(20)).double().mean() > 0.95
    assert privacy.find_copies(privacy.nearest_by_parts(NEW[100:], TRAIN), PART_LIMITS).rate <= 0.03


def test_a_region_is_cut_in_the_same_place_of_the_mirror_image() -> None:
    images = torch.rand(2, 1, 20, 32)
    for region in (privacy.WHOLE, *privacy.PARTS):
        assert region.cut(images.flip(-1)).equal(region.cut(images, is_mirrored=True).flip(-1))
    assert privacy.WHOLE.cut(images).equal(images)
    assert privacy.PARTS[5].cut(images).shape[-2:] == (10, 16)


def test_samples_near_the_average_are_not_copies() -> None:
    average = TRAIN.mean(dim=0) + 0.1 * (NEW - TRAIN.mean(dim=0))
    assert privacy.find_copies(privacy.nearest_by_pixels(average, TRAIN), LIMITS).rate <= 0.03


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("side", "step"), [(64, 1), (128, 3)])
def test_copies_are_found_under_every_shift_of_up_to_a_sixteenth_of_the_side(
    side: int, step: int, mirrored: bool
) -> None:
    """Includes shifts by odd numbers of pixels; at 128 px every third shift is tested."""
    train, held_out, new = (draw_images(count, seed, side) for count, seed in ((100, 0), (100, 1), (4, 2)))
    shifts = list(product(range(-side // 16, side // 16 + 1, step), repeat=2))
    copies = torch.cat([shifted(train[i % 100][None], *shift) for i, shift in enumerate(shifts)])
    others = torch.cat([shifted(new[i % 4][None], *shift) for i, shift in enumerate(shifts)])
    if mirrored:
        copies, others = copies.flip(-1), others.flip(-1)
    limits, found = privacy.nearest_by_pixels(held_out, train), privacy.nearest_by_pixels(copies, train)
    assert found.row.tolist() == [i % 100 for i in range(len(shifts))]
    assert float(privacy.find_copies(found, limits).relative_distance.max()) < privacy.CERTAIN_COPY
    assert privacy.find_copies(privacy.nearest_by_pixels(others, train), limits).rate <= 0.01


def test_the_first_pass_of_the_search_misses_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift of one pixel is farthest from the shifts of the first pass."""
    train = draw_images(600, seed=0)
    images = torch.cat([shifted(train[:100], 1, 1), NEW[:50]])
    monkeypatch.setattr(privacy, "_CANDIDATES", 100)
    found = privacy.nearest_by_pixels(images, train)
    monkeypatch.setattr(privacy, "_CANDIDATES", len(train))
    exhaustive = privacy.nearest_by_pixels(images, train)
    assert found.row[:100].equal(exhaustive.row[:100])
    assert torch.allclose(found.distance, exhaustive.distance, rtol=0.03, atol=1e-5)


def test_the_first_pass_bounds_correlations_from_above() -> None:
    windows = F.normalize(torch.randn(60, 196, generator=torch.Generator().manual_seed(0)), dim=1)
    basis = torch.linalg.eigh(windows.T @ windows).eigenvectors[:, -31:]
    coordinates = privacy._coordinates(windows, basis)
    assert coordinates.shape == (60, 32)
    bounds = coordinates @ coordinates.T
    assert (bounds >= windows @ windows.T - 1e-6).all()
    torch.testing.assert_close(bounds.diagonal(), torch.ones(60))


def slow_distance(image: Tensor, train: Tensor) -> tuple[float, int]:
    """The definition at 64 px by loops over pairs of windows, with NumPy's correlation."""

    def cells(window: Tensor) -> Any:
        return window.reshape(-1, 14, 4, 14, 4).mean(dim=(2, 4)).flatten().double().numpy()

    correlations = []
    for other in train:
        targets = [cells(turned[:, 4:60, 4:60]) for turned in (other.double(), other.double().flip(-1))]
        windows = [cells(image[:, top : top + 56, left : left + 56]) for top in range(9) for left in range(9)]
        correlations.append(max(np.corrcoef(window, target)[0, 1] for window in windows for target in targets))
    distances = sorted(1.0 - value for value in correlations)
    return distances[0] / float(np.mean(distances[1:51])), int(np.argmax(correlations))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pixel_distance_agrees_with_loops_over_the_definition(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train = (torch.rand(55, channels, 64, 64, generator=generator) * 255).to(torch.uint8)
    image = shifted(train[:1].flip(-1).float() / 255, 3, -1) + 0.3 * torch.rand(64, 64, generator=generator)
    found = privacy.nearest_by_pixels(image, train)
    distance, row = slow_distance(image[0], train)
    assert float(found.distance) == pytest.approx(distance, rel=1e-4)
    assert int(found.row) == row == 0


def by_features(images: Tensor, train: Tensor) -> privacy.Nearest:
    return privacy.nearest_by_features(images, [train])


@pytest.mark.parametrize("nearest", [privacy.nearest_by_pixels, by_features])
def test_the_size_of_blocks_does_not_change_results(
    nearest: Callable[[Tensor, Tensor], privacy.Nearest], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 32, 32) if nearest is privacy.nearest_by_pixels else (8,)
    images, train = (torch.rand(20, *shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    whole = nearest(images, train)
    monkeypatch.setattr(privacy, "_VALUES_PER_BLOCK", 20_000)
    parts = nearest(images, train)
    assert parts.row.equal(whole.row)
    assert torch.allclose(parts.distance, whole.distance, atol=1e-5)


def test_every_block_of_train_images_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks give the result of one, up to the mean of the neighbours, which are chosen by a coarse search."""
    train = draw_images(300, seed=0)
    images = torch.cat([shifted(train[::3], 1, 1), NEW[:50]])
    whole, features = privacy.nearest_by_pixels(images, train), (images.flatten(1), train.flatten(1))
    assert whole.row[:100].equal(torch.arange(0, 300, 3))
    monkeypatch.setattr(privacy, "_TRAIN_IMAGES_PER_BLOCK", 80)
    blocks = privacy.nearest_by_pixels(images, train)
    assert blocks.row.equal(whole.row)
    assert torch.allclose(blocks.distance, whole.distance, rtol=0.03, atol=1e-5)
    found, expected = privacy.nearest_by_features(features[0], features[1].split(70)), by_features(*features)
    assert found.row.equal(expected.row)
    torch.testing.assert_close(found.distance, expected.distance)


def test_the_feature_distance_is_euclidean() -> None:
    images, train = (torch.randn(count, 5, generator=torch.Generator().manual_seed(count)) for count in (7, 9))
    images[2] = train[4]
    found = by_features(images, train)
    for i, image in enumerate(images):
        distances = [float((image - other).norm()) for other in train]
        assert float(found.distance[i]) == pytest.approx(min(distances), abs=1e-5)
        assert int(found.row[i]) == distances.index(min(distances))
    assert int(found.row[2]) == 4


@pytest.mark.parametrize("side", [28, 32, 50])
@pytest.mark.parametrize("grey", [0, 77, 255])
def test_blank_images_give_finite_values(side: int, grey: int) -> None:
    blank = torch.full((4, 1, side, side), grey, dtype=torch.uint8)
    noise = (torch.rand(6, 1, side, side, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    for images, train in ((blank, noise), (noise, blank), (blank, blank), (noise, noise[:1].repeat(3, 1, 1, 1))):
        found = privacy.nearest_by_pixels(images, train)
        assert found.distance.isfinite().all()
        assert all(math.isfinite(value) for value in list(privacy.find_copies(found, found))[1:])
    assert privacy.nearest_by_pixels(blank, noise).distance.tolist() == pytest.approx([1.0] * 4)  # equally far from all


def test_a_single_train_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        privacy.nearest_by_pixels(NEW[:2], TRAIN[:1])


def nearest(distances: Tensor) -> privacy.Nearest:
    return privacy.Nearest(distances, torch.zeros(len(distances), dtype=torch.long))


@pytest.mark.parametrize(("count", "rank"), [(3, 1), (98, 1), (99, 1), (199, 2), (342, 3), (998, 9), (999, 10)])
def test_at_most_one_percent_of_held_out_patients_is_below_the_limit(count: int, rank: int) -> None:
    distances = nearest(torch.arange(1.0, count + 1).flip(0))
    assert privacy.find_copies(distances, distances).limit == rank
    assert rank / (count + 1) <= 0.01 or rank == 1


def test_a_patient_with_several_images_counts_once_by_the_nearest_image() -> None:
    """The first of 200 patients has five images, four of which are the nearest of all."""
    held_out = nearest(torch.cat([torch.arange(1.0, 5.0), torch.arange(10.0, 210.0)]))
    patients = ["first"] * 5 + [f"patient{i}" for i in range(199)]
    assert privacy.find_copies(held_out, held_out).limit == 2
    assert privacy.find_copies(held_out, held_out, patients).limit == 11


@pytest.mark.parametrize(("num_patients", "num_samples"), [(5, 10), (99, 30), (250, 80), (342, 400)])
def test_the_plausible_rate_follows_from_counts_of_orderings(num_patients: int, num_samples: int) -> None:
    """All orderings of m + g exchangeable distances are equally probable; computed with exact fractions."""
    rank = max(1, (num_patients + 1) // 100)
    whole = math.comb(num_samples + num_patients, num_samples)

    def exceeding(nearer: int) -> Fraction:
        """P(more than `nearer` samples are below the limit), which is the r-th smallest distance of the patients."""
        below = sum(  # r - 1 patients among the first k + r - 1 distances, then the limit
            math.comb(k + rank - 1, k) * math.comb(num_samples - k + num_patients - rank, num_samples - k)
            for k in range(nearer + 1)
        )
        return 1 - Fraction(below, whole)

    found = round(privacy.plausible_rate(num_samples, num_patients) * num_samples)
    assert exceeding(found) <= Fraction(5, 1000) < exceeding(found - 1)


@pytest.mark.parametrize("num_samples", [50, 1000])
@pytest.mark.parametrize(("num_patients", "num_images", "correlation"), [(95, 1, 0.0), (48, 2, 0.6), (30, 20, 0.5)])
def test_a_model_without_copies_rarely_exceeds_the_plausible_rate(
    num_patients: int, num_images: int, correlation: float, num_samples: int
) -> None:
    """The distances of a patient's images are correlated; the copy rate is the larger of two."""
    repetitions, random = 400, np.random.default_rng(num_patients)
    patients = np.repeat(np.arange(num_patients), num_images).astype(str).tolist()
    accused = 0
    for _ in range(repetitions):
        found = []
        for _ in range(2):
            own, common = random.normal(size=(num_patients, num_images)), random.normal(size=(num_patients, 1))
            held_out = (math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own).ravel() + 10
            samples = random.normal(size=num_samples) + 10
            found.append(privacy.find_copies(*(nearest(torch.from_numpy(d)) for d in (samples, held_out)), patients))
        accused += any(copies.rate > copies.plausible for copies in found)
    assert accused / repetitions <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / repetitions)


def test_one_exact_copy_among_many_samples_is_found() -> None:
    """15 of 500 copies do not exceed the plausible rate for 95 held-out images, but the distance of one is enough."""
    held_out, samples = draw_images(95, seed=3), draw_images(485, seed=4)
    limits = privacy.nearest_by_pixels(held_out, TRAIN)
    for copies, certain in ((0, False), (1, True), (15, True)):
        found = privacy.nearest_by_pixels(torch.cat([samples, TRAIN[:copies]]), TRAIN)
        by_pixels = privacy.find_copies(found, limits)
        values = privacy.metrics(by_pixels, by_pixels)
        assert values["copy_rate"] <= values["copy_rate_plausible"]
        assert (values["nearest_over_limit"] < privacy.CERTAIN_COPY) == certain


def test_closest_pairs_are_sorted_by_relative_distance() -> None:
    def copies(distances: list[float], limit: float, rows: list[int]) -> privacy.Copies:
        return privacy.Copies(privacy.Nearest(torch.tensor(distances), torch.tensor(rows)), limit, 0.25, 0.1, 1.0, 0.5)

    by_features = copies([4.0, 1.0, 9.0, 8.0], 2.0, [10, 11, 12, 13])
    by_pixels = copies([0.8, 0.9, 0.1, 0.8], 0.4, [20, 21, 22, 23])
    pairs = privacy.closest_pairs(by_features, by_pixels, 3)
    assert pairs.sample.tolist() == [2, 1, 0]  # 0 and 3 are equal: in the order of samples
    assert pairs.train.tolist() == [22, 11, 10]
    assert pairs.relative_distance.tolist() == pytest.approx([0.25, 0.5, 2.0])
    assert pairs.by_pixels.tolist() == [True, False, False]


def test_metrics_take_the_larger_rate_and_the_smaller_relative_distance() -> None:
    sample = nearest(torch.tensor([0.5]))
    found = privacy.metrics(
        privacy.Copies(sample, 1.0, 0.25, 0.1, 0.9, 0.5), privacy.Copies(sample, 2.0, 0.75, 0.1, 0.1, 0.6)
    )
    assert found == {
        "copy_rate": 0.75,
        "copy_rate_features": 0.25,
        "copy_rate_pixels": 0.75,
        "copy_rate_plausible": 0.1,
        "nearest_over_limit": 0.25,
        "nearest_train_ratio": 0.9,
        "nearest_train_ratio_pixels": 0.1,
        "held_out_limit": 0.5,
    }
