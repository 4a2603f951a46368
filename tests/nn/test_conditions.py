"""Batches of conditions: masks and images as channels of a grid, rows of a split, and dropout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.config import Preprocess
from medgen.data.conditions import ConditionField, ConditionSpace
from medgen.data.store import ShardedArray, Split
from medgen.nn.conditions import (
    DROPOUT,
    Conditions,
    StoredConditions,
    drop_conditions,
    encode_map,
    grid_channels,
)

KINDS = {"sex": {"kind": "category"}, "mask": {"kind": "mask"}, "age": {"kind": "number", "low": 0, "high": 100}}
SPACE = ConditionSpace.from_rows(Preprocess(conditions=KINDS), [{"sex": "F"}, {"sex": "M"}])
assert SPACE is not None


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(classes: int) -> ConditionField:
    return ConditionField("mask", "mask", channels=classes)


def batch(count: int = 4, side: int = 32) -> Conditions:
    mask = torch.rand(count, 1, side, side, generator=generator()) > 0.5
    return Conditions(torch.ones(count, SPACE.size), encode_map(mask_of(2), mask, torch.ones(count)))


def test_a_mask_has_a_channel_that_tells_that_it_is_known_and_one_for_each_class() -> None:
    classes = torch.tensor([[[[0, 1], [2, 1]]], [[[0, 0], [0, 0]]]])
    known = encode_map(mask_of(3), classes, torch.tensor([True, True]))
    assert known[0].tolist() == [[[1, 1], [1, 1]], [[0, 1], [0, 1]], [[0, 0], [1, 0]]]
    assert known[1].tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], "known to be empty"
    assert not encode_map(mask_of(3), classes, torch.tensor([False, False])).any()


@pytest.mark.parametrize(("sides", "factor"), [((8, 8), 2), ((16, 16), 1), ((4, 8), 4), ((1, 1), 16), ((5, 7), 4)])
def test_a_grid_gets_the_mean_of_the_mask_at_each_of_its_positions(sides: tuple[int, int], factor: int) -> None:
    """Compared with means over rectangles; each position of a small grid has factor² of them."""
    conditions = batch(side=sides[0] * factor * 2) if sides[0] == sides[1] else batch(side=32)
    context = conditions.on_grid(sides).maps
    assert context is not None and conditions.maps is not None
    assert context.shape == (4, grid_channels(SPACE, sides), *sides) == (4, 2 * factor**2, *sides)
    assert torch.allclose(context[:, : factor**2], torch.ones(()))
    if sides[0] == sides[1]:
        block = conditions.maps[:, 1].unflatten(1, (sides[0], factor, 2)).unflatten(4, (sides[1], factor, 2))
        expected = block.mean(dim=(3, 6)).permute(0, 2, 4, 1, 3).flatten(1, 2)  # (B, factor², h, w)
        assert torch.allclose(context[:, factor**2 :], expected)


def test_an_image_has_a_channel_that_tells_that_it_is_known_and_its_grey_values() -> None:
    pixels = torch.tensor([[[[0, 51], [102, 255]]]], dtype=torch.uint8)
    field = ConditionField("edges", "image", channels=2)
    (known,) = encode_map(field, pixels, torch.tensor([True]))
    assert torch.allclose(known, torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.2], [0.4, 1.0]]]))
    assert not encode_map(field, pixels, torch.tensor([False])).any()


@pytest.mark.parametrize(("sides", "factor"), [((4, 4, 6), 2), ((8, 8, 8), 1), ((2, 4, 4), 4)])
def test_the_grid_of_a_volume_gets_the_mean_of_the_mask(sides: tuple[int, ...], factor: int) -> None:
    mask = torch.rand(2, 1, *(2 * factor * side for side in sides), generator=generator()) > 0.5
    conditions = Conditions(torch.ones(2, SPACE.size), encode_map(mask_of(2), mask, torch.ones(2)))
    maps = conditions.on_grid(sides).maps
    assert maps is not None and maps.shape == (2, grid_channels(SPACE, sides), *sides)
    blocks = mask[:, 0].float()
    for number, side in enumerate(sides):  # every position becomes (side, factor, 2)
        blocks = blocks.unflatten(1 + 3 * number, (side, factor, 2))
    expected = blocks.mean(dim=(3, 6, 9)).permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3)
    assert torch.allclose(maps[:, factor**3 :], expected)
    unknown = Conditions.unknown(SPACE, 2).on_grid(sides).maps
    assert unknown is not None and unknown.shape == maps.shape and not unknown.any()


def test_maps_are_given_at_every_pixel() -> None:
    known, unknown = batch(side=8).on_image((8, 8)), Conditions.unknown(SPACE, 4).on_image((2, 4, 6))
    assert known is not None and torch.equal(known, batch(side=8).maps)  # type: ignore[arg-type]
    assert unknown is not None and unknown.shape == (4, 2, 2, 4, 6)
    assert Conditions(torch.ones(4, 3)).on_image((8, 8)) is None


def test_conditions_of_a_grid_and_of_unknown_masks_have_the_same_shape() -> None:
    unknown = Conditions.unknown(SPACE, 4).on_grid((8, 8))
    known = batch().on_grid((8, 8))
    assert unknown.maps is not None and known.maps is not None
    assert unknown.maps.shape == known.maps.shape and not unknown.maps.any()
    assert torch.equal(known.cleared().maps, unknown.maps)
    both = known.then(known.cleared())
    assert len(both) == 8 and torch.equal(both[slice(4, 8)].maps, unknown.maps)


def test_rows_of_a_split_are_read_when_they_are_indexed(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    names = ["split", "path", "index", "sha256", "label", "patient", "width", "height", "mode", "mask", "sex", "age"]
    rows = [("m.png", "F", "25"), ("", "M", ""), ("m.png", "", "100")]
    lines = [["train", *[""] * 8, *row] for row in rows]
    manifest.write_text("\n".join(",".join(f'"{cell}"' for cell in line) for line in [names, *lines]) + "\n")
    masks = ShardedArray([np.ones((3, 1, 8, 8), np.uint8)])
    split = Split("train", ShardedArray([np.zeros((3, 1, 8, 8), np.uint8)]), np.zeros(3, int), masks, manifest, SPACE)
    found = StoredConditions(split, torch.tensor([2, 0, -1, 1]))[torch.arange(4)]
    assert found.values.tolist() == [[0, 0, 0, 1, 1], [1, 1, 0, 1, 0.25], [0] * 5, [1, 0, 1, 0, 0]]
    assert found.maps is not None
    assert [bool(each.all()) for each in found.maps] == [True, True, False, False]
    assert not found.maps[2:].any(), "unknown, and an image without a mask"


def test_each_condition_is_dropped_alone_and_all_of_them_together() -> None:
    count = 20_000
    conditions = Conditions(torch.ones(count, SPACE.size), torch.ones(count, 2, 1, 1))
    labels, dropped = drop_conditions(torch.zeros(count, dtype=torch.long), conditions, True, SPACE, generator())
    assert dropped is not None and dropped.maps is not None
    kept = [labels == 0, dropped.values[:, 0] > 0, dropped.maps[:, 0, 0, 0] > 0, dropped.values[:, 3] > 0]
    for each in kept:
        assert float(each.float().mean()) == pytest.approx((1 - DROPOUT) ** 2, abs=0.01)
    none = ~torch.stack(kept).any(dim=0)
    assert float(none.float().mean()) == pytest.approx(DROPOUT + (1 - DROPOUT) * DROPOUT**4, abs=0.01)
    assert torch.equal(dropped.values[:, 0], dropped.values[:, 2]), "a condition is dropped as a whole"
    assert torch.equal(dropped.maps[:, 0], dropped.maps[:, 1])
    assert bool((conditions.values == 1).all()), "the batch is unchanged"


def test_without_conditions_the_labels_are_dropped_as_before() -> None:
    """The draws of earlier versions, so that trainings without conditions give the same weights."""
    labels = torch.arange(100)
    expected = labels.masked_fill(torch.rand(100, generator=generator(3)) < 0.1, -1)
    assert torch.equal(drop_conditions(labels, None, True, None, generator(3))[0], expected)
    assert bool((drop_conditions(labels, None, False, None, generator(3))[0] == -1).all())
