"""Dice and IoU, compared with torchmetrics and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.segmentation import dice_score, mean_iou

from medgen.metrics.segmentation import (
    class_indices,
    class_means,
    count_classes,
    dice_and_iou,
    foreground_mean,
    foreground_scores,
    update_old_keys,
)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_scores_agree_with_scikit_learn_and_torchmetrics(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    true, predicted = (torch.randint(num_classes, (3, 9, 11), generator=generator) for _ in range(2))
    dice, iou = dice_and_iou(predicted, true, num_classes)
    for image in range(3):
        a, b = true[image].ravel().numpy(), predicted[image].ravel().numpy()
        np.testing.assert_allclose(dice[image], f1_score(a, b, average=None), rtol=1e-12)
        np.testing.assert_allclose(iou[image], jaccard_score(a, b, average=None), rtol=1e-12)
        independent = MulticlassJaccardIndex(num_classes, average=None)(predicted[image][None], true[image][None])
        torch.testing.assert_close(iou[image].float(), independent)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_the_foreground_mean_agrees_with_torchmetrics(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    true, predicted = (torch.randint(num_classes, (4, 9, 11), generator=generator) for _ in range(2))
    for found, reference in zip(dice_and_iou(predicted, true, num_classes), (dice_score, mean_iou), strict=True):
        options = {"average": None} if reference is dice_score else {"per_class": True}
        each = reference(predicted, true, num_classes, include_background=False, input_format="index", **options)
        assert foreground_mean(found) == pytest.approx(float(each.mean()), rel=1e-6)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_scores_of_an_image_are_means_over_its_classes_but_the_background(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    true, predicted = (torch.randint(num_classes, (3, 9, 11), generator=generator) for _ in range(2))
    true[0], predicted[0] = 0, 0  # an empty mask that is predicted empty
    true[1][true[1] == 2], predicted[1][predicted[1] == 2] = 0, 0  # neither mask of this image has class 2
    expected = [[1.0, 1.0]]
    for a, b in zip(true[1:].flatten(1).numpy(), predicted[1:].flatten(1).numpy(), strict=True):
        labels = sorted({*a, *b} - {0})
        expected.append([score(a, b, labels=labels, average="macro") for score in (f1_score, jaccard_score)])
    np.testing.assert_allclose(foreground_scores(predicted, true, num_classes), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"dice": 0.7, "iou": 0.6}, {"dice_foreground": 0.7, "iou_foreground": 0.6}),
        (
            {"dice": 0.8, "dice_0": 1.0, "dice_1": 0.9, "dice_2": 0.5},
            {"dice_0": 1.0, "dice_1": 0.9, "dice_2": 0.5, "dice_foreground": 0.7},
        ),
        ({"dice_foreground": 0.7, "dice_1": 0.7}, {"dice_foreground": 0.7, "dice_1": 0.7}),
        ({}, {}),
    ],
)
def test_keys_of_an_older_medgen_are_updated(old: dict[str, float], expected: dict[str, float]) -> None:
    found = update_old_keys({f"segmentation/{name}": value for name, value in old.items()})
    assert found == pytest.approx({f"segmentation/{name}": value for name, value in expected.items()})


def test_scores_accept_uint8_class_indices() -> None:
    true, predicted = (torch.randint(3, (2, 5, 5), generator=torch.Generator().manual_seed(i)) for i in range(2))
    expected = dice_and_iou(predicted, true, 3)
    for found, wanted in zip(dice_and_iou(predicted.byte(), true.byte(), 3), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_class_in_neither_mask_is_not_counted() -> None:
    true, predicted = torch.zeros(2, 4, 4, dtype=torch.long), torch.zeros(2, 4, 4, dtype=torch.long)
    true[0, 0, :2], predicted[0, 0, 1:3] = 1, 1
    dice, iou = dice_and_iou(predicted, true, 3)
    assert dice[0, 1] == pytest.approx(2 * 1 / (2 + 2)) and iou[0, 1] == pytest.approx(1 / 3)
    assert math.isnan(dice[1, 1]) and math.isnan(iou[1, 1])
    means = class_means(dice)
    assert means[1] == dice[0, 1] and math.isnan(means[2])
    missed, _ = dice_and_iou(predicted[1:], true[:1], 3)
    assert missed[0, 1] == 0.0


def test_class_indices_of_probabilities() -> None:
    assert class_indices(torch.tensor([0.2, 0.5, 0.6]).reshape(1, 1, 1, 3)).tolist() == [[[0, 0, 1]]]
    assert class_indices(torch.tensor([0.2, 0.5, 0.3]).reshape(1, 3, 1, 1)).tolist() == [[[1]]]


def test_most_common_class_of_each_pixel() -> None:
    masks = torch.tensor([[[0, 1, 2]], [[0, 2, 2]], [[1, 2, 0]]])
    assert count_classes(masks, 3).argmax(0).tolist() == [[0, 2, 2]]
