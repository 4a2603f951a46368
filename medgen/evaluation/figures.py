"""Figures of an evaluation: selected samples, reconstructions, closest pairs, label swaps and masks.

Shapes: N images, C channels, H W height and width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.evaluation.context import EvaluationContext, load_images
from medgen.evaluation.label_accuracy import LabelSwap
from medgen.evaluation.segmentation import SegmentationResult
from medgen.metrics.generation import subsample
from medgen.metrics.privacy import ClosestPairs
from medgen.priors import sample_images
from medgen.reports.evaluation import CLOSEST_PAIRS, LABEL_SWAPS, UNREFINED_SAMPLES
from medgen.reports.figures import overlay, write_grid, write_stacks
from medgen.reports.fonts import class_captions

NUM_RECONSTRUCTIONS = 16
NUM_SWAPS, SWAP_COLUMNS = 25, 9  # as many as in the published experiment
NUM_MASKS = 16
MAX_COLUMNS = 12
MAX_MASK_COLUMNS = 8


def write_samples(figures: Path, context: EvaluationContext) -> None:
    """Write samples.png with equally many samples of each class, and with a refiner samples_decoded.png before it."""
    num_images, seed = context.params.grid_images, seed_of(context.params.seed, 1)
    labels = captions = columns = None
    if context.conditional:
        known = context.prior.frequencies.nonzero().flatten()
        labels = known.repeat_interleave(max(1, num_images // len(known)))
        names = class_captions(context.store.classes)
        captions = [names[label] for label in labels.tolist()]
        columns = len(labels) // len(known)
        while columns > MAX_COLUMNS:
            columns = (columns + 1) // 2
        num_images = len(labels)
    refiners = {"samples.png": context.refiner} | ({UNREFINED_SAMPLES: None} if context.refiner else {})
    for name, refiner in refiners.items():
        images = sample_images(
            context.prior, context.model, num_images, labels, seed, context.params.batch_size, refiner
        )
        write_grid(figures / name, images, columns, captions)


def write_reconstructions(
    figures: Path, context: EvaluationContext, reconstructions: Tensor, refined: Tensor | None
) -> None:
    """Write reconstructions.png: test images over their reconstructions (N, C, H, W), over the refined ones."""
    rows = {"original": load_images(context.held_out), "reconstruction": reconstructions}
    if refined is not None:
        rows["refined"] = refined
    size = min(NUM_RECONSTRUCTIONS, len(reconstructions))
    write_stacks(figures / "reconstructions.png", {name: subsample(images, size) for name, images in rows.items()})


def write_closest_pairs(figures: Path, samples: Tensor, train: Tensor, pairs: ClosestPairs) -> None:
    """Write nearest_train.png: the samples nearest to a train image over that image. It must not be published."""
    distances = ["pixels" if by_pixels else "features" for by_pixels in pairs.by_pixels.tolist()]
    captions = [
        f"{relative:.2f} of limit\nby {distance}"
        for relative, distance in zip(pairs.relative_distance.tolist(), distances, strict=True)
    ]
    rows = {"sample": samples[pairs.sample], "nearest train": train[pairs.train]}
    write_stacks(figures / CLOSEST_PAIRS, rows, columns=len(captions), captions=captions)


def write_label_swaps(figures: Path, swap: LabelSwap, classes: Sequence[str]) -> None:
    """Write wrong_labels.png: test images over their decoding with a wrong label, captioned with both labels."""
    size = min(NUM_SWAPS, len(swap.true))
    pairs = zip(subsample(swap.true, size).tolist(), subsample(swap.given, size).tolist(), strict=True)
    names = class_captions(classes)
    captions = [f"true: {names[true]}\ngiven: {names[given]}" for true, given in pairs]
    rows = {"original": subsample(swap.original, size), "decoded": subsample(swap.decoded, size)}
    write_stacks(figures / LABEL_SWAPS, rows, columns=SWAP_COLUMNS, captions=captions)


def write_masks(figures: Path, result: SegmentationResult, num_images: int) -> None:
    """Write reconstructions.png (image, mask, prediction) and samples.png (worst, middle and best images by Dice)."""
    size = min(NUM_MASKS, len(result.images))
    rows = torch.linspace(0, len(result.images) - 1, size).long()
    stacks = {
        "image": result.images[rows],
        "mask": _greys(result.true[rows], result.num_classes),
        "predicted": _greys(result.predicted[rows], result.num_classes),
    }
    write_stacks(figures / "reconstructions.png", stacks)
    order = result.dice.argsort(stable=True)
    third = max(1, min(num_images // 3, len(order) // 3, MAX_MASK_COLUMNS))
    middle = (len(order) - third) // 2
    chosen = torch.cat([order[:third], order[middle : middle + third], order[len(order) - third :]])
    overlays = overlay(result.images[chosen], result.true[chosen], result.predicted[chosen])
    captions = [f"Dice {score:.3f}" for score in result.dice[chosen].tolist()]
    write_grid(figures / "samples.png", overlays, columns=third, captions=captions)


def _greys(masks: Tensor, num_classes: int) -> Tensor:
    """Class indices (N, H, W) as greys (N, 1, H, W) in [0, 1], from black for the first to white for the last."""
    return masks[:, None].float() / (num_classes - 1)
