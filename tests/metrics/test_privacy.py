"""Copies of train images are found through blur, shift, mirror and tone; honest images, even soft ones, are not."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.metrics import privacy


def films(count: int, seed: int, side: int = 64) -> Tensor:
    """Pictures (N, 1, side, side) in [0, 1] of one layout, each with its own smooth details and grain."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, side)
    layout = 0.5 + 0.3 * torch.cos(3 * axis)[:, None] * torch.cos(5 * axis)[None, :]
    coarse = torch.randn(count, 1, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    grain = torch.randn(count, 1, side, side, generator=generator)
    return (layout + 0.07 * smooth + 0.02 * grain).clamp(0, 1)


def blurred(images: Tensor, width: int = 5) -> Tensor:
    """About a Gaussian of 2 px at width 5: a box, twice."""
    for _ in range(2):
        images = F.avg_pool2d(F.pad(images, [width // 2] * 4, mode="replicate"), width, 1)
    return images


def moved(images: Tensor, down: int, right: int) -> Tensor:
    side = images.shape[-1]
    wide = F.pad(images, [4] * 4, mode="replicate")
    return wide[..., 4 - down : 4 - down + side, 4 - right : 4 - right + side]


TRAIN, HELD_OUT, FRESH = films(150, seed=0), films(200, seed=1), films(200, seed=2)
LIMITS = privacy.nearest_by_pixels(HELD_OUT, TRAIN)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda images: images,
    "blurred": blurred,
    "mirrored": lambda images: images.flip(-1),
    "shifted": lambda images: moved(images, 3, -4),
    "darker and flatter": lambda images: 0.1 + 0.6 * images**1.1,
    "all of it": lambda images: 0.1 + 0.6 * blurred(moved(images.flip(-1), -2, 3), 3) ** 1.1,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copies_are_found_and_honest_images_are_not_accused(change: Callable[[Tensor], Tensor]) -> None:
    found = privacy.nearest_by_pixels(change(TRAIN), TRAIN)
    copies = privacy.judge(found, LIMITS)
    assert copies.rate > 0.95
    assert copies.ratio < 0.6
    assert (found.row == torch.arange(len(TRAIN))).double().mean() > 0.95
    honest = privacy.judge(privacy.nearest_by_pixels(change(FRESH), TRAIN), LIMITS)
    assert honest.rate <= 0.03
    assert honest.ratio == pytest.approx(1.0, abs=0.1)


def test_a_model_that_only_draws_the_average_is_no_copier() -> None:
    average = TRAIN.mean(dim=0) + 0.1 * (FRESH - TRAIN.mean(dim=0))
    assert privacy.judge(privacy.nearest_by_pixels(average, TRAIN), LIMITS).rate <= 0.03


def slow_distance(image: Tensor, train: Tensor) -> tuple[float, int]:
    """The docstring, one pair of windows after another, with NumPy's correlation."""

    def reduced(window: Tensor) -> Any:
        return window.reshape(-1, 14, 2, 14, 2).mean(dim=(2, 4)).flatten().numpy()

    def small(picture: Tensor) -> Tensor:
        size = picture.shape[-1] // 32
        return picture.double().reshape(-1, 32, size, 32, size).mean(dim=(2, 4))

    likeness = []
    for other in train:
        target = reduced(small(other)[:, 2:30, 2:30])
        likeness.append(
            max(
                np.corrcoef(reduced(turned[:, top : top + 28, left : left + 28]), target)[0, 1]
                for turned in (small(image), small(image).flip(-1))
                for top in range(5)
                for left in range(5)
            )
        )
    distances = sorted(1.0 - value for value in likeness)
    return distances[0] / float(np.mean(distances[1:51])), int(np.argmax(likeness))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_distance_is_the_loops_of_its_definition(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train = (torch.rand(60, channels, 64, 64, generator=generator) * 255).to(torch.uint8)
    images = train[:2].flip(-1).float() / 255 + 0.3 * torch.rand(2, channels, 64, 64, generator=generator)
    found = privacy.nearest_by_pixels(images, train)
    for i, image in enumerate(images):
        distance, row = slow_distance(image, train)
        assert float(found.distance[i]) == pytest.approx(distance, rel=1e-4)
        assert int(found.row[i]) == row


@pytest.mark.parametrize("nearest", [privacy.nearest_by_pixels, privacy.nearest_by_features])
def test_by_parts_is_the_same(
    nearest: Callable[[Tensor, Tensor], privacy.Nearest], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 32, 32) if nearest is privacy.nearest_by_pixels else (8,)
    images, train = (torch.rand(20, *shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    whole = nearest(images, train)
    monkeypatch.setattr(privacy, "_NUMBERS_PER_BLOCK", 3 * len(train))
    parts = nearest(images, train)
    assert parts.row.equal(whole.row)
    assert torch.allclose(parts.distance, whole.distance, atol=1e-5)


def test_features_are_at_their_euclidean_distance() -> None:
    images, train = (torch.randn(count, 5, generator=torch.Generator().manual_seed(count)) for count in (7, 9))
    images[2] = train[4]
    found = privacy.nearest_by_features(images, train)
    for i, image in enumerate(images):
        distances = [float((image - other).norm()) for other in train]
        assert float(found.distance[i]) == pytest.approx(min(distances), abs=1e-5)
        assert int(found.row[i]) == distances.index(min(distances))
    assert int(found.row[2]) == 4


@pytest.mark.parametrize("side", [28, 32, 50])
@pytest.mark.parametrize("grey", [0, 77, 255])
def test_what_shows_nothing_gives_numbers(side: int, grey: int) -> None:
    blank = torch.full((4, 1, side, side), grey, dtype=torch.uint8)
    noise = (torch.rand(6, 1, side, side, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    for images, train in ((blank, noise), (noise, blank), (blank, blank), (noise, noise[:1].repeat(3, 1, 1, 1))):
        found = privacy.nearest_by_pixels(images, train)
        assert found.distance.isfinite().all()
        assert all(math.isfinite(value) for value in privacy.judge(found, found)[1:])
    assert privacy.nearest_by_pixels(blank, noise).distance.tolist() == pytest.approx([1.0] * 4)  # near none of them


def test_one_train_image_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        privacy.nearest_by_pixels(FRESH[:2], TRAIN[:1])


@pytest.mark.parametrize(("count", "rank"), [(3, 1), (98, 1), (99, 1), (199, 2), (342, 3), (998, 9), (999, 10)])
def test_the_limit_lets_at_most_one_in_a_hundred_through(count: int, rank: int) -> None:
    distances = torch.arange(1.0, count + 1).flip(0)
    assert privacy.quantile(distances) == rank
    assert rank / (count + 1) <= 0.01 or rank == 1


@pytest.mark.parametrize("count", [5, 30, 99, 400])
def test_chance_alone_rarely_looks_like_copying(count: int) -> None:
    """Distances of honest samples and held-out images come from one distribution."""
    generator = torch.Generator().manual_seed(count)
    above = 0
    for _ in range(300):
        limit = privacy.quantile(torch.rand(count, generator=generator))
        above += bool((torch.rand(1000, generator=generator) < limit).double().mean() > privacy.plausible(count))
    assert above <= 8
    assert 0.05 <= privacy.plausible(count) < 0.7


def test_pairs_come_by_nearness_to_either_limit() -> None:
    def copies(distances: list[float], limit: float, rows: list[int]) -> privacy.Copies:
        return privacy.Copies(privacy.Nearest(torch.tensor(distances), torch.tensor(rows)), limit, 0.25, 1.0, 0.5)

    by_features = copies([4.0, 1.0, 9.0, 8.0], 2.0, [10, 11, 12, 13])
    by_pixels = copies([0.8, 0.9, 0.1, 0.8], 0.4, [20, 21, 22, 23])
    pairs = privacy.closest_pairs(by_features, by_pixels, 3)
    assert pairs.sample.tolist() == [2, 1, 0]  # the last two are level: in their order
    assert pairs.train.tolist() == [22, 11, 10]
    assert pairs.nearness.tolist() == pytest.approx([0.25, 0.5, 2.0])
    assert pairs.by_pixels.tolist() == [True, False, False]


def test_the_larger_share_is_the_copy_rate() -> None:
    none = privacy.Nearest(torch.tensor([1.0]), torch.tensor([0]))
    found = privacy.metrics(privacy.Copies(none, 1.0, 0.25, 0.9, 0.5), privacy.Copies(none, 1.0, 0.75, 0.1, 0.6))
    assert found == {
        "copy_rate": 0.75,
        "copy_rate_features": 0.25,
        "copy_rate_pixels": 0.75,
        "nearest_train_ratio": 0.9,
        "nearest_train_ratio_pixels": 0.1,
        "held_out_limit": 0.5,
    }
