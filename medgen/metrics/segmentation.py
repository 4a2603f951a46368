"""How well predicted masks lie on true ones.

Shapes: B images, K classes (2 for a mask of 0 and 1), H W height and width.
"""

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


def commonest_class(masks: Tensor, num_classes: int) -> Tensor:
    """The class (H, W) that most of the masks (N, H, W) have at each place: the best guess without the image."""
    counts = torch.stack([(masks == number).sum(0) for number in range(num_classes)])
    return counts.argmax(dim=0)
