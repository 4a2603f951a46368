"""Augmentation changes an image and its mask together, and its draws depend on the image's seed only."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from medgen.config import Affine, Augment, Elastic, Intensity, Train
from medgen.data.store import ShardedArray, Split
from medgen.errors import UserError
from medgen.training.augment import augment_images, check_augment
from medgen.training.loader import Batch, Loader

ALL = Augment(
    vertical_flip=True,
    affine=Affine(degrees=20.0, translate=0.1, scale=0.2),
    elastic=Elastic(alpha=40.0, sigma=4.0),
    intensity=Intensity(brightness=0.2, contrast=0.2, gamma=0.3, noise=0.05),
)
GEOMETRY = ALL.model_copy(update={"intensity": Intensity()})
SEEDS = list(range(40))


def discs(sides: tuple[int, int] = (64, 48)) -> tuple[Tensor, Tensor]:
    """Images (40, 1, H, W) of a bright disc above the centre, and masks with class 2 there."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")
    inside = (rows - sides[0] // 2 + 12).square() + (columns - sides[1] // 2).square() < 49
    mask = 2.0 * inside.float().expand(len(SEEDS), 1, -1, -1)
    return mask / 2.0, mask


def centre(values: Tensor) -> Tensor:
    """Centre of mass (B, 2), row and column, of images (B, 1, H, W)."""
    total = values.sum(dim=(1, 2, 3))
    places = torch.meshgrid(*(torch.arange(side).float() for side in values.shape[2:]), indexing="ij")
    return torch.stack([(values[:, 0] * place).sum(dim=(1, 2)) / total for place in places], dim=1)


def test_a_mask_follows_its_image_and_keeps_its_classes() -> None:
    images, masks = discs()
    changed, moved = augment_images(images, masks, GEOMETRY, SEEDS)
    assert moved is not None
    assert set(moved.unique().tolist()) == {0.0, 2.0}
    overlap = ((changed > 0.5) & (moved > 0)).sum() / ((changed > 0.5) | (moved > 0)).sum()
    assert overlap > 0.9, "bilinear and nearest differ at the border of the disc only"
    assert (centre(changed) - centre(moved)).norm(dim=1).max() < 0.5
    assert (centre(changed) - centre(images)).norm(dim=1).median() > 3.0


@pytest.mark.parametrize(
    ("affine", "limits"),
    [
        (Affine(translate=0.1), (6.4, 4.8)),  # a tenth of 64 rows and 48 columns
        (Affine(scale=0.25), (3.1, 0.1)),  # a quarter of the 12 rows to the centre
        (Affine(degrees=30.0), (12 * (1 - 3**0.5 / 2) + 0.1, 6.1)),  # 12 · (1 - cos, sin) of 30°
    ],
)
def test_shift_scale_and_rotation_reach_their_limits_and_no_further(
    affine: Affine, limits: tuple[float, float]
) -> None:
    images, masks = discs()
    changed, _ = augment_images(images, masks, Augment(affine=affine), SEEDS)
    distance = (centre(changed) - centre(images)).abs().max(dim=0).values
    most = torch.tensor(limits)
    assert bool((distance <= most + 0.3).all())
    assert bool((distance >= 0.7 * most - 0.3).all()), "the draws of 40 images come near the limit"


def test_a_deformation_is_torchvisions() -> None:
    images = torch.rand(3, 1, 64, 48, generator=torch.Generator().manual_seed(0))
    changed, _ = augment_images(images, None, Augment(elastic=ALL.elastic), [5, 6, 7])
    for seed, image, result in zip((5, 6, 7), images, changed, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = v2.ElasticTransform(alpha=40.0, sigma=4.0, fill=None)(image)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
        assert (result - image).abs().max() > 0.1


@pytest.mark.parametrize(
    ("intensity", "low", "high"),
    [
        (Intensity(brightness=0.4), 0.3, 0.7),  # of grey 0.5
        (Intensity(gamma=1.0), 0.25, 0.5**0.5),
        (Intensity(contrast=0.4), 0.5, 0.5),
    ],
)
def test_grey_values_change_within_their_limits(intensity: Intensity, low: float, high: float) -> None:
    grey = torch.full((40, 1, 8, 8), 0.5)
    changed, masks = augment_images(grey, grey, Augment(intensity=intensity), SEEDS)
    assert masks is not None and masks.equal(grey), "a mask has no grey values"
    assert low - 1e-6 <= changed.min() <= low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) <= changed.max() <= high + 1e-6


def test_noise_and_contrast_have_their_size_and_images_stay_in_range() -> None:
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for intensity, size in ((Intensity(noise=0.1), 0.1), (Intensity(contrast=0.5), 0.5 * 12**-0.5)):
        changed, _ = augment_images(images, None, Augment(intensity=intensity), SEEDS)
        deviations = (changed - images).flatten(1).std(dim=1)
        assert 0.8 * size < deviations.max() < 1.1 * size
        assert changed.min() >= 0.0 and changed.max() <= 1.0


def loader(split: Split, params: Augment = ALL, rank: int = 0, world: int = 1) -> Loader:
    return Loader(split, 6, "cpu", seed=3, rank=rank, world=world, with_masks=True, augment=params)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Split:
    """23 images with masks."""
    monkeypatch.setattr(Split, "masked_rows", np.arange(23))
    images = np.random.default_rng(0).integers(0, 256, (23, 1, 32, 32), dtype=np.uint8)
    arrays = [ShardedArray([array]) for array in (images, (images > 127).astype(np.uint8))]
    return Split("train", arrays[0], np.zeros(23, np.int64), arrays[1], Path())


def equal(first: Batch, second: Batch) -> bool:
    assert first.mask is not None and second.mask is not None
    return first.image.equal(second.image) and first.mask.equal(second.mask)


def test_a_batch_is_the_same_after_a_restart_and_in_any_number_of_processes(split: Split) -> None:
    whole = loader(split)
    batches = [whole.batch(position) for position in range(8)]  # two epochs and more
    state = torch.random.get_rng_state()
    assert equal(loader(split).batch(7), batches[7])
    assert torch.random.get_rng_state().equal(state), "the global generator is not used"
    for rank in range(2):
        part = loader(split, rank=rank, world=2)
        assert all(equal(part.batch(position), batch.part(rank, 2)) for position, batch in enumerate(batches))
    row = int(batches[0].index[0])
    again = next(batch for batch in batches[3:] if row in batch.index.tolist())
    assert not again.image[again.index.tolist().index(row)].equal(batches[0].image[0]), "another change each epoch"


def test_without_augmentation_batches_and_fingerprints_stay_the_same(split: Split) -> None:
    plain = Loader(split, 6, "cpu", seed=3, with_masks=True)
    assert equal(loader(split, Augment()).batch(4), plain.batch(4))
    assert "augment" not in Train().model_dump(mode="json")
    changed = Train(augment=ALL)
    assert Train.model_validate(changed.model_dump(mode="json")) == changed


def test_a_deformation_that_is_smoother_than_the_image_is_refused() -> None:
    check_augment(ALL, (32, 32))
    with pytest.raises(UserError, match=r"train\.augment\.elastic\.sigma: found 4 pixels, expected at most 3\.75"):
        check_augment(ALL, (64, 16))
