"""Dice and intersection over union (IoU) of predicted and true masks. Class 0 is the background.

Shapes: B or N images, K classes (2 for a mask of 0 and 1), H W height and width.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


def class_indices(probabilities: Tensor) -> Tensor:
    """Class indices (B, H, W) int64 from probabilities of class 1 (B, 1, H, W) or of each class (B, K, H, W)."""
    return (probabilities[:, 0] > 0.5).long() if probabilities.shape[1] == 1 else probabilities.argmax(dim=1)


def dice_and_iou(predicted: Tensor, true: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Dice (B, K) and intersection over union (B, K) of each image, from class indices (B, H, W).

    2·|A ∩ B| / (|A| + |B|) (Dice 1945) and |A ∩ B| / |A ∪ B| (Jaccard 1901). NaN if neither mask of an image has the
    class, since a perfect score there would raise the mean.
    """
    overlaps, totals = [], []
    for index in range(num_classes):  # class by class: one-hot masks of a whole split take K times 16 bytes per pixel
        a, b = ((mask == index).flatten(1) for mask in (predicted, true))
        overlaps.append((a & b).sum(1))
        totals.append(a.sum(1) + b.sum(1))
    overlap, total = (torch.stack(counts, dim=1).double() for counts in (overlaps, totals))  # (B, K)
    return 2.0 * overlap / total, overlap / (total - overlap)  # 0 / 0 is NaN


def foreground_scores(predicted: Tensor, true: Tensor, num_classes: int) -> Tensor:
    """Dice and IoU (B, 2) of each image, mean over its classes but the background, from class indices (B, H, W).

    1 for an empty mask that is predicted empty.
    """
    scores = torch.stack(dice_and_iou(predicted, true, num_classes), dim=2)[:, 1:]
    return scores.nanmean(dim=1).nan_to_num(1.0)


def class_means(scores: Tensor) -> Tensor:
    """Mean scores (K,) over the images that have the class, from scores (N, K); NaN if no image has it."""
    return torch.nanmean(scores, dim=0)


def foreground_mean(scores: Tensor) -> float:
    """Mean of scores (N, K) over the images that have a class, then over all classes except the background.

    The background covers most of any image. With it, an empty prediction of three classes would score 0.33, and one
    that misses one of two organs 0.67.
    """
    return float(torch.nanmean(class_means(scores[:, 1:])))


def update_old_keys(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics with today's keys, from metrics that an older medgen may have written.

    An older `segmentation/dice` is the Dice of the foreground for two classes, and for more the mean over all classes
    with the background, with `segmentation/dice_CLASS` for each. The same applies to `iou`.
    """
    updated = dict(metrics)
    for old in ("segmentation/dice", "segmentation/iou"):
        if old in updated:
            mean = updated.pop(old)
            foreground = [value for key, value in metrics.items() if re.fullmatch(rf"{old}_[1-9][0-9]*", key)]
            updated[f"{old}_foreground"] = sum(foreground) / len(foreground) if foreground else mean
    return updated


def count_classes(masks: Tensor, num_classes: int) -> Tensor:
    """Number of masks (N, H, W) that have each class at each pixel, (K, H, W)."""
    return torch.stack([(masks == index).sum(0) for index in range(num_classes)])
