"""Evaluate the masks that a model predicts.

Shapes: N test images, C image channels, K mask classes, H W height and width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medgen.data.images import StoredImages, to_floats
from medgen.data.store import Split, Store
from medgen.errors import UserError
from medgen.evaluation.context import labels_of, own_batches
from medgen.evaluation.data import EvaluationData, EvaluationInfo
from medgen.metrics.intervals import group_indices, select_groups
from medgen.metrics.segmentation import class_indices, class_means, count_classes, dice_and_iou, foreground_mean
from medgen.models import ImageModel
from medgen.training.distributed import World


class HeldOutMasks:
    """A model and the images of a held-out split that have a mask."""

    def __init__(self, store: Store, model: ImageModel, split: str) -> None:
        held_out = store.split(split)
        self.rows = torch.from_numpy(held_out.masked_rows)
        self.split, self.model, self.num_classes = held_out, model, store.preprocess.mask_classes
        self._images, self._labels = StoredImages(held_out, self.rows), labels_of(held_out)[self.rows]

    @torch.no_grad()
    def predict(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) as stored, and their true and predicted class indices (B, H, W) uint8, on the CPU."""
        assert self.split.masks is not None
        images, device = self._images[rows], next(self.model.parameters()).device
        inputs = to_floats(images.to(device))
        indices = class_indices(self.model.predict(inputs, self._labels[rows].to(device)).prediction.float())
        true = torch.from_numpy(self.split.masks[self.rows[rows].numpy()][:, 0])
        return images, true, indices.to(torch.uint8).cpu()


@dataclass(frozen=True)
class SegmentationResult:
    """Metrics of the predicted masks of a held-out split."""

    metrics: dict[str, float]
    dice: Tensor  # (N,) mean Dice of each image over its classes except the background
    masks: HeldOutMasks


def evaluate_masks(
    store: Store, model: ImageModel, batch_size: int, world: World, split: str = "test"
) -> SegmentationResult:
    """Predict the masks of the images of a held-out split that have one, batch by batch, and compare them.

    Raises:
        UserError: no image has a mask, or all masks are empty.
    """
    held_out, train = HeldOutMasks(store, model, split), store.split("train")
    num_classes, count = held_out.num_classes, len(held_out.rows)
    if not count or not len(train.masked_rows):
        raise UserError(
            f"{store.folder}: {len(train.masked_rows)} train and {count} {split} images have a "
            f"mask; expected at least one of each. Change preprocess.{split}_fraction or add masks"
        )
    constant = mean_mask(train, num_classes, world, batch_size)
    scores = [torch.empty(0, 5, num_classes, dtype=torch.float64)]
    for rows in own_batches(world, count, batch_size):
        _, true, predicted = held_out.predict(rows)
        pairs = [dice_and_iou(masks, true, num_classes) for masks in (predicted, constant.expand_as(true))]
        has_foreground = (true > 0).flatten(1).any(dim=1)[:, None].expand(-1, num_classes).double()
        scores.append(torch.stack([*pairs[0], *pairs[1], has_foreground], dim=1))
    dice, iou, reference, _, has_foreground = world.concat(torch.cat(scores)).unbind(dim=1)  # (N, K) each
    if not bool(has_foreground.any()):
        raise UserError(
            f"{store.folder}: all masks of the {split} split are empty, expected at least one that is not; "
            "change preprocess.seed or add masks"
        )
    metrics = {
        "segmentation/dice_foreground": foreground_mean(dice),
        "segmentation/iou_foreground": foreground_mean(iou),
        "segmentation/dice_foreground_mean_mask": foreground_mean(reference),
    }
    if num_classes > 2:
        for name, values in (("dice", dice), ("iou", iou)):
            means = class_means(values).tolist()
            metrics |= {f"segmentation/{name}_{k}": mean for k, mean in enumerate(means) if math.isfinite(mean)}
    metrics |= {"run/num_train": len(train.masked_rows), "run/num_test": count}
    by_image = torch.nanmean(dice[:, 1:], dim=1).nan_to_num(1.0)  # 1 for an empty mask that is predicted empty
    return SegmentationResult(metrics, by_image, held_out)


def mean_mask(train: Split, num_classes: int, world: World, batch_size: int) -> Tensor:
    """Most common class (H, W) of the train masks at each pixel: the best prediction without the image."""
    assert train.masks is not None
    rows, counts = train.masked_rows, torch.zeros(num_classes, *train.masks.shape[2:], dtype=torch.int64)
    for batch in own_batches(world, len(rows), batch_size):
        counts += count_classes(torch.from_numpy(train.masks[rows[batch.numpy()]][:, 0]), num_classes)
    return world.concat(counts[None]).sum(dim=0).argmax(dim=0)


def mask_data(store: Store, result: SegmentationResult, split: str) -> EvaluationData:
    """The values for a later comparison with another model that predicts masks."""
    groups = group_indices(len(result.dice), select_groups(result.masks.split.patients, result.masks.rows))
    return EvaluationData(EvaluationInfo(store.fingerprint, "", split, 0, 0, 0.0), result.dice, groups)
