"""Scores of predicted masks against true ones. Class 0 is the background.

Shapes: B images, K classes (2 for a mask of 0 and 1), H W height and width.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


def decide(probabilities: Tensor) -> Tensor:
    """Probabilities (B, 1, H, W) of 1, or (B, K, H, W) of each class -> class numbers (B, H, W) int64."""
    return (probabilities[:, 0] > 0.5).long() if probabilities.shape[1] == 1 else probabilities.argmax(dim=1)


def dice_and_iou(predicted: Tensor, true: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Dice (B, K) and intersection over union (B, K) of class numbers (B, H, W), each image for itself.

    2·|A ∩ B| / (|A| + |B|) (Dice 1945) and |A ∩ B| / |A ∪ B| (Jaccard 1901). NaN where an image has the class in
    neither mask: there is nothing to find, and to call that perfect would lift the mean.
    """
    overlaps, totals = [], []
    for number in range(num_classes):  # class by class: a whole split one-hot would be K times 16 bytes a pixel
        a, b = ((mask == number).flatten(1) for mask in (predicted, true))
        overlaps.append((a & b).sum(1))
        totals.append(a.sum(1) + b.sum(1))
    overlap, total = (torch.stack(counts, dim=1).double() for counts in (overlaps, totals))  # (B, K)
    return 2.0 * overlap / total, overlap / (total - overlap)  # 0 / 0 is NaN


def class_means(scores: Tensor) -> Tensor:
    """Scores (N, K) -> mean over the images that have the class (K,); NaN where none has it."""
    return torch.nanmean(scores, dim=0)


def foreground_mean(scores: Tensor) -> float:
    """Scores (N, K) -> mean over the images that have a class, then over all classes but the background.

    The background, most of any image, is left out: with it a mask of three classes in which nothing is found scores
    0.33, and one that misses one of two organs 0.67.
    """
    return float(torch.nanmean(class_means(scores[:, 1:])))


def with_foreground(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics with the keys of now, such as those of a version registered by an older medgen.

    There `segmentation/dice` is the foreground's with two classes, and with more the mean over all, background
    included, beside `segmentation/dice_CLASS` of each. The same goes for `iou`.
    """
    found = dict(metrics)
    for old in ("segmentation/dice", "segmentation/iou"):
        if old in found:
            mean = found.pop(old)
            foreground = [value for key, value in metrics.items() if re.fullmatch(rf"{old}_[1-9][0-9]*", key)]
            found[f"{old}_foreground"] = sum(foreground) / len(foreground) if foreground else mean
    return found


def commonest_class(masks: Tensor, num_classes: int) -> Tensor:
    """The class (H, W) that most of the masks (N, H, W) have at each place: the best guess without the image."""
    counts = torch.stack([(masks == number).sum(0) for number in range(num_classes)])
    return counts.argmax(dim=0)
