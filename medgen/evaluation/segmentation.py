"""Evaluate the masks that a model predicts.

Shapes: N test images, C image channels, K mask classes, H W height and width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medgen.data.store import Store
from medgen.errors import UserError
from medgen.evaluation.data import EvaluationData, EvaluationInfo
from medgen.metrics.intervals import group_indices, select_groups
from medgen.metrics.segmentation import class_indices, class_means, dice_and_iou, foreground_mean, most_common_class
from medgen.models import ImageModel
from medgen.training.loader import Loader


@dataclass(frozen=True)
class SegmentationResult:
    """Predicted masks of a held-out split and their metrics."""

    metrics: dict[str, float]
    images: Tensor  # (N, C, H, W) uint8
    true: Tensor  # (N, H, W) class indices, uint8
    predicted: Tensor  # (N, H, W) uint8
    dice: Tensor  # (N,) mean Dice of each image over its classes except the background
    num_classes: int


@torch.no_grad()
def evaluate_masks(store: Store, model: ImageModel, batch_size: int, split: str = "test") -> SegmentationResult:
    """Predict the masks of the images of a held-out split that have one, and compare them.

    Raises:
        UserError: no image has a mask, or all masks are empty.
    """
    num_classes = store.preprocess.mask_classes
    held_out, train = store.split(split), store.split("train")
    if not len(held_out.masked_rows) or not len(train.masked_rows):
        raise UserError(
            f"{store.folder}: {len(train.masked_rows)} train and {len(held_out.masked_rows)} {split} images have a "
            f"mask; expected at least one of each. Change preprocess.{split}_fraction or add masks"
        )
    images, true, predicted = [], [], []
    for batch in Loader(held_out, batch_size, next(model.parameters()).device, with_masks=True).sequential():
        assert batch.mask is not None
        images.append((batch.image.cpu() * 255.0).round().to(torch.uint8))
        true.append(batch.mask[:, 0].to(torch.uint8).cpu())
        indices = class_indices(model.predict(batch.image, batch.label).prediction.float())
        predicted.append(indices.to(torch.uint8).cpu())
    masks, predictions = torch.cat(true), torch.cat(predicted)
    if not bool((masks > 0).any()):
        raise UserError(
            f"{store.folder}: all masks of the {split} split are empty, expected at least one that is not; "
            "change preprocess.seed or add masks"
        )
    dice, iou = dice_and_iou(predictions, masks, num_classes)
    assert train.masks is not None
    mean_mask = most_common_class(torch.from_numpy(train.masks[train.masked_rows][:, 0]), num_classes)
    reference, _ = dice_and_iou(mean_mask.expand_as(masks), masks, num_classes)
    metrics = {
        "segmentation/dice_foreground": foreground_mean(dice),
        "segmentation/iou_foreground": foreground_mean(iou),
        "segmentation/dice_foreground_mean_mask": foreground_mean(reference),
    }
    if num_classes > 2:
        for name, scores in (("dice", dice), ("iou", iou)):
            means = class_means(scores).tolist()
            metrics |= {f"segmentation/{name}_{k}": mean for k, mean in enumerate(means) if math.isfinite(mean)}
    metrics |= {"run/num_train": len(train.masked_rows), "run/num_test": len(masks)}
    by_image = torch.nanmean(dice[:, 1:], dim=1).nan_to_num(1.0)  # 1 for an empty mask that is predicted empty
    return SegmentationResult(metrics, torch.cat(images), masks, predictions, by_image, num_classes)


def mask_data(store: Store, result: SegmentationResult, split: str) -> EvaluationData:
    """The values for a later comparison with another model that predicts masks."""
    held_out = store.split(split)
    groups = group_indices(len(result.dice), select_groups(held_out.patients, torch.from_numpy(held_out.masked_rows)))
    return EvaluationData(EvaluationInfo(store.fingerprint, "", split, 0, 0, 0.0), result.dice, groups)
