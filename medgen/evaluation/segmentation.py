"""How well a model finds masks, in numbers, words and pictures: what `medgen evaluate` shows of a segmenter.

Shapes: N test images, C image channels, K mask classes, H W height and width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medgen.data.store import Store
from medgen.errors import UserError
from medgen.metrics.segmentation import class_means, commonest_class, decide, dice_and_iou, foreground_mean
from medgen.models import ImageModel
from medgen.reports.figures import overlay, write_grid, write_stacks
from medgen.training.loader import Loader

NUM_TRIPLES = 16
MAX_COLUMNS = 8
PICTURES = {
    "reconstructions.png": "Test images, their masks, and the masks the model finds",
    "samples.png": "The worst, middle and best test images by Dice. Blue: found; red: missed; yellow: not in the mask",
    "progress.gif": "Masks of validation images from the first epoch to the last",
    "loss.png": "Loss by epoch, linear and logarithmic",
    "ssim.png": "Dice of the validation split by epoch",
}


@dataclass(frozen=True)
class Found:
    """The masks a model finds in a held-out split, and their scores."""

    metrics: dict[str, float]
    images: Tensor  # (N, C, H, W) uint8
    true: Tensor  # (N, H, W) class numbers, uint8
    predicted: Tensor  # (N, H, W) uint8
    dice: Tensor  # (N,) of each image: mean over its classes but the background
    num_classes: int


@torch.no_grad()
def judge(store: Store, model: ImageModel, device: torch.device, batch_size: int, split: str = "test") -> Found:
    """Runs the model over the images of a held-out split that have a mask.

    Raises:
        UserError: there is none, or no mask has anything in it.
    """
    num_classes = store.preprocess.mask_classes
    test, train = store.split(split), store.split("train")
    if not len(test.masked_rows) or not len(train.masked_rows):
        raise UserError(
            f"{store.folder}: {len(train.masked_rows)} train and {len(test.masked_rows)} {split} images have a mask; "
            f"expected some of both. Change preprocess.{split}_fraction or bring more masks"
        )
    images, true, predicted = [], [], []
    for batch in Loader(test, batch_size, device, with_masks=True).sequential():
        assert batch.mask is not None
        images.append((batch.image.cpu() * 255.0).round().to(torch.uint8))
        true.append(batch.mask[:, 0].to(torch.uint8).cpu())
        guess = decide(model.predict(batch.image, batch.label).reconstruction.float())
        predicted.append(guess.to(torch.uint8).cpu())
    masks, guessed = torch.cat(true), torch.cat(predicted)
    if not bool((masks > 0).any()):
        raise UserError(
            f"{store.folder}: every mask of the {split} split is empty, expected one at least with something in it; "
            "change preprocess.seed or bring more masks"
        )
    dice, iou = dice_and_iou(guessed, masks, num_classes)
    assert train.masks is not None
    mean_mask = commonest_class(torch.from_numpy(train.masks[train.masked_rows][:, 0]), num_classes)
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
    each = torch.nanmean(dice[:, 1:], dim=1).nan_to_num(1.0)  # an empty mask found empty
    return Found(metrics, torch.cat(images), masks, guessed, each, num_classes)


def draw(figures: Path, found: Found, num_images: int) -> None:
    """Writes reconstructions.png (image, mask, mask found) and samples.png (the worst, middle and best)."""
    size = min(NUM_TRIPLES, len(found.images))
    rows = torch.linspace(0, len(found.images) - 1, size).long()
    stacks = {
        "image": found.images[rows],
        "mask": shades(found.true[rows], found.num_classes),
        "found": shades(found.predicted[rows], found.num_classes),
    }
    write_stacks(figures / "reconstructions.png", stacks)
    order = found.dice.argsort(stable=True)
    a_third = max(1, min(num_images // 3, len(order) // 3, MAX_COLUMNS))
    middle = (len(order) - a_third) // 2
    chosen = torch.cat([order[:a_third], order[middle : middle + a_third], order[len(order) - a_third :]])
    overlays = overlay(found.images[chosen], found.true[chosen], found.predicted[chosen])
    captions = [f"Dice {score:.3f}" for score in found.dice[chosen].tolist()]
    write_grid(figures / "samples.png", overlays, columns=a_third, captions=captions)


def shades(masks: Tensor, num_classes: int) -> Tensor:
    """Class numbers (N, H, W) as greys (N, 1, H, W) in [0, 1], the first black and the last white."""
    return masks[:, None].float() / (num_classes - 1)


def key_numbers(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Rows of name, value, reference and explanation."""
    m = {name.partition("/")[2]: f"{value:.4f}" for name, value in metrics.items()}
    rows = [
        (
            "Dice of masks",
            m["dice_foreground"],
            f"{m['dice_foreground_mean_mask']} commonest train mask",
            "mean over images and classes without the background, 1 is perfect",
        ),
        ("IoU of masks", m["iou_foreground"], "", "intersection over union, as Dice but harder on errors"),
    ]
    numbers = sorted(int(name[5:]) for name in m if name[5:].isdigit() and name.startswith("dice_"))
    rows += [(f"  Dice, IoU of class {k}", f"{m[f'dice_{k}']}, {m[f'iou_{k}']}", "", "") for k in numbers]
    counts = f"{metrics['run/num_train']:.0f} train images"
    return [*rows, ("Test images with a mask", f"{metrics['run/num_test']:.0f}", counts, "")]


def findings(metrics: Mapping[str, float]) -> list[str]:
    """Sentences on the numbers, and what to try."""
    dice, reference = metrics["segmentation/dice_foreground"], metrics["segmentation/dice_foreground_mean_mask"]
    if dice <= reference:
        return [
            f"The commonest train mask, the same for every image, is as good (Dice {reference:.3f}, the model "
            f"{dice:.3f}): the model does not use the image yet. Train longer, raise the learning rate, or add a Dice "
            "term (loss.weights)."
        ]
    found = [f"Dice {dice:.3f}: better than the commonest train mask, the same for every image ({reference:.3f})."]
    classes = {name: metrics[name] for name in metrics if name.startswith("segmentation/dice_") and name[-1].isdigit()}
    if classes and min(classes.values()) < dice - 0.1:
        worst = min(classes, key=lambda name: classes[name])
        found.append(
            f"Class {worst.rpartition('_')[2]} is found much worse ({classes[worst]:.3f}): a rare or thin class gains "
            "from a Dice term beside cross-entropy (loss.weights)."
        )
    return found
