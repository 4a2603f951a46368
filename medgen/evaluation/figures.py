"""Figures of an evaluation: selected samples, reconstructions, closest pairs, label swaps and masks.

Shapes: N images, C channels, H W height and width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.data.images import Images, StoredPlanes, middle_planes, to_floats
from medgen.evaluation.context import EvaluationContext, proportional_labels
from medgen.evaluation.label_accuracy import LabelSwap
from medgen.evaluation.reconstruction import reconstruct_rows, refine_rows
from medgen.evaluation.segmentation import SegmentationResult
from medgen.metrics.generation import subsample
from medgen.metrics.privacy import ClosestPairs
from medgen.priors import sample_images
from medgen.priors.axes import PrincipalAxes
from medgen.reports.evaluation import CASES, CLOSEST_PAIRS, CONDITIONS, LABEL_SWAPS, LATENTS, UNREFINED_SAMPLES
from medgen.reports.figures import differences, overlay, write_grid, write_scatter, write_stacks
from medgen.reports.fonts import class_captions

NUM_RECONSTRUCTIONS = 16
NUM_SWAPS, SWAP_COLUMNS = 25, 9  # as many as in the published experiment
NUM_MASKS = 16
MAX_COLUMNS = 12
MAX_MASK_COLUMNS = 8
NUM_CASES = 4  # of each kind
MAX_LATENTS, MAX_PRIOR_LATENTS = 1000, 300  # points in latents.png


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
            context.prior,
            context.model,
            num_images,
            labels,
            seed,
            context.params.batch_size,
            refiner,
            context.conditions_of(labels, num_images),
        )
        write_grid(figures / name, images, columns, captions)


def write_reconstructions(figures: Path, context: EvaluationContext) -> None:
    """Write reconstructions.png: test images over their reconstructions, over the refined ones."""
    rows = subsample(context.compared_rows, min(NUM_RECONSTRUCTIONS, len(context.compared_rows)))
    originals, _, decoded = reconstruct_rows(context, rows)
    stacks = {"original": originals, "reconstruction": context.to_stored(decoded)}
    if context.refiner:
        stacks["refined"] = context.to_stored(refine_rows(context, rows, decoded))
    write_stacks(figures / "reconstructions.png", stacks)


def write_conditions(figures: Path, context: EvaluationContext, samples: Tensor) -> None:
    """Write conditions.png: test images, their maps if these are conditions, and drawn samples with the same.

    There is no figure for a model without conditions.
    """
    requested = context.sample_conditions
    if requested is None:
        return
    known = (requested.rows >= 0).nonzero()[:, 0]
    numbers = subsample(known, min(NUM_RECONSTRUCTIONS, len(known)))
    rows, split, space = requested.rows[numbers], context.held_out, context.store.conditions
    images = to_floats(StoredPlanes(split)[rows])
    stacks = {"test image": images}
    for field, _ in space.map_fields.values() if space else ():
        stored = middle_planes(torch.from_numpy(split.read_map(field, rows.numpy())))  # (N, P, H, W)
        maps = _greys(stored, field.channels)[:, 0] if field.kind == "mask" else to_floats(stored)
        stacks[field.name] = maps.repeat_interleave(images.shape[1] // maps.shape[1], dim=1)
    drawn = {name: context.to_drawn(planes) for name, planes in stacks.items()}
    write_stacks(figures / CONDITIONS, {**drawn, "sample": to_floats(samples[numbers])})


def write_cases(figures: Path, context: EvaluationContext, ssim: Tensor) -> None:
    """Write cases.png: the worst, median and best test images by SSIM (N,) with reconstructions and difference maps."""
    chosen, kinds = select_cases(ssim)
    originals, _, decoded = reconstruct_rows(context, chosen)
    real, other = (to_floats(images) for images in (originals, context.to_stored(decoded)))
    captions = [f"{kind}\nSSIM {score:.3f}" for kind, score in zip(kinds, ssim[chosen].tolist(), strict=True)]
    stacks = {"original": real, "reconstruction": other, "difference": differences(real, other)}
    write_stacks(figures / CASES, stacks, columns=len(chosen) // 3, captions=captions)


def select_cases(scores: Tensor, most: int = NUM_CASES) -> tuple[Tensor, list[str]]:
    """Rows of the lowest, middle and highest scores (N,), at most `most` of each, and the kind of each row."""
    order = scores.argsort(stable=True)
    size = max(1, min(most, len(order) // 3))
    middle = (len(order) - size) // 2
    rows = torch.cat([order[:size], order[middle : middle + size], order[len(order) - size :]])
    return rows, [kind for kind in ("worst", "median", "best") for _ in range(size)]


def write_latents(figures: Path, context: EvaluationContext) -> None:
    """Write latents.png: latents of up to 1,000 held-out images by class, over samples of the prior.

    Both are projected on the first two principal axes of the held-out latents. There is no figure if they have fewer.
    """
    rows = subsample(torch.arange(len(context.held_out)), min(len(context.held_out), MAX_LATENTS))
    batches = torch.split(rows, context.params.batch_size)
    latents = torch.cat([reconstruct_rows(context, batch)[1].mean.cpu() for batch in batches])
    flat, labels = latents.flatten(1), context.labels[rows]
    axes = PrincipalAxes.fit(flat)
    if len(axes.scales) < 2:
        return
    count = min(MAX_PRIOR_LATENTS, context.params.num_generated)
    known = proportional_labels(context.prior.frequencies, count) if context.conditional else None
    generator = torch.Generator().manual_seed(seed_of(context.params.seed, 5))
    drawn = context.prior.sample(count, known, generator).flatten(1)
    plane, samples = ((axes.whiten(points) * axes.scales)[:, :2].numpy() for points in (flat, drawn))
    names = class_captions(context.store.classes)
    groups = {name: plane[labels == label] for label, name in enumerate(names) if bool((labels == label).any())}
    if bool((labels < 0).any()):
        groups["no label" if names else "test images"] = plane[labels < 0]
    shares = axes.scales.square() / axes.scales.square().sum()
    first, second = (f"principal axis ({share:.0%} of the variance)" for share in shares[:2].tolist())
    axis_labels = (f"first {first}", f"second {second}")
    write_scatter(figures / LATENTS, groups, {"samples of the prior": samples}, axis_labels)


def write_closest_pairs(figures: Path, samples: Tensor, train: Images, pairs: ClosestPairs) -> None:
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
    rows = torch.linspace(0, len(result.dice) - 1, min(NUM_MASKS, len(result.dice))).long()
    images, true, predicted = result.masks.predict(rows)
    stacks = {
        "image": images,
        "mask": _greys(true, result.masks.num_classes),
        "predicted": _greys(predicted, result.masks.num_classes),
    }
    write_stacks(figures / "reconstructions.png", stacks)
    chosen, _ = select_cases(result.dice, min(num_images // 3, MAX_MASK_COLUMNS))
    captions = [f"Dice {score:.3f}" for score in result.dice[chosen].tolist()]
    overlays = overlay(*result.masks.predict(chosen))
    write_grid(figures / "samples.png", overlays, columns=len(chosen) // 3, captions=captions)


def _greys(masks: Tensor, num_classes: int) -> Tensor:
    """Class indices (N, H, W) as greys (N, 1, H, W) in [0, 1], from black for the first to white for the last."""
    return masks[:, None].float() / (num_classes - 1)
