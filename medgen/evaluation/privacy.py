"""Evaluate how near samples come to train images, and whether the model reveals which images it was trained on.

Shapes: N images, C channels, H W height and width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from medgen.data.images import Images, StoredImages, StoredPlanes, middle_planes, split_images, to_floats
from medgen.data.store import Split
from medgen.evaluation.context import (
    EvaluationContext,
    FeatureSets,
    extract_features,
    labels_of,
    map_rows,
    own_share,
)
from medgen.metrics import privacy
from medgen.metrics.features import NUM_CONTENT
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import interval_metrics, select_groups
from medgen.metrics.membership import ATTACKS, AttackedImages, attack, can_be_attacked
from medgen.metrics.spectrum import radial_power
from medgen.nn.conditions import read_conditions

NUM_CLOSEST = 10  # pairs in nearest_train.png
MAX_PAIRS, MIN_SEARCHED = 10**9, 2000  # held-out images by train images; held-out images searched at least
# by parts, which takes nine times as long
MAX_PART_PAIRS, MIN_PART_SEARCHED = 2 * 10**7, 200
MAX_ATTACKED = 2000  # images of a split that the membership attacks use
_IMAGES_PER_BLOCK = 4096  # train images whose features are in memory at once


class NearestTrain(NamedTuple):
    """The nearest train image of each sample and of each searched held-out image, by both distances."""

    samples_by_features: privacy.Nearest
    held_out_by_features: privacy.Nearest
    samples_by_pixels: privacy.Nearest
    held_out_by_pixels: privacy.Nearest
    held_out_rows: Tensor  # of the compared images
    by_parts: "NearestParts | None" = None  # None in a search


class NearestParts(NamedTuple):
    """The train image with the nearest part for some samples and some held-out images."""

    samples: privacy.Nearest
    held_out: privacy.Nearest
    held_out_rows: Tensor  # of the compared images


def search_train(context: EvaluationContext, features: FeatureSets, samples: Tensor) -> NearestTrain:
    """Search all train images for the nearest of each sample (N, C, H, W) as stored and of held-out images.

    All samples are searched. If compared images times train images exceed 10⁹, at least 2,000 compared images are,
    spread evenly. Processes share the train images whose features they compute, and the images that they compare by
    pixels.
    """
    train, num_compared = context.store.split("train"), len(context.compared_rows)
    size = min(num_compared, max(MIN_SEARCHED, MAX_PAIRS // len(train)))
    rows = subsample(torch.arange(num_compared), size)
    # the content features alone, since a blurred copy is a copy
    searched = torch.cat([features.samples.content, features.held_out.content[rows]])
    by_features = _nearest_by_features(context, searched, train)
    held_out = context.compared_rows[rows][own_share(context.world, size)]
    stored = StoredPlanes(train)
    return NearestTrain(
        privacy.Nearest(*(values[: len(samples)] for values in by_features)),
        privacy.Nearest(*(values[len(samples) :] for values in by_features)),
        _nearest(context, privacy.nearest_by_pixels, samples[own_share(context.world, len(samples))], stored),
        _nearest(context, privacy.nearest_by_pixels, StoredPlanes(context.held_out, held_out), stored),
        rows,
        _search_parts(context, samples, stored) if context.held_out.name == "test" else None,
    )


def _search_parts(context: EvaluationContext, samples: Tensor, train: StoredPlanes) -> NearestParts:
    """Search all train images for parts of samples and of compared images: of large sets, of at least 200 of each."""
    most = max(MIN_PART_SEARCHED, MAX_PART_PAIRS // len(train))
    chosen = subsample(samples, min(len(samples), most))
    rows = subsample(torch.arange(len(context.compared_rows)), min(len(context.compared_rows), most))
    held_out = StoredPlanes(context.held_out, context.compared_rows[rows][own_share(context.world, len(rows))])
    own = chosen[own_share(context.world, len(chosen))]
    found = [_nearest(context, privacy.nearest_by_parts, images, train) for images in (own, held_out)]
    return NearestParts(found[0], found[1], rows)


def evaluate_privacy(
    context: EvaluationContext, nearest: NearestTrain
) -> tuple[dict[str, float], privacy.ClosestPairs]:
    """The `privacy/` metrics of samples relative to held-out images, and the closest pairs."""
    patients = select_groups(context.groups, nearest.held_out_rows)
    by_features = privacy.find_copies(nearest.samples_by_features, nearest.held_out_by_features, patients)
    by_pixels = privacy.find_copies(nearest.samples_by_pixels, nearest.held_out_by_pixels, patients)
    metrics = {f"privacy/{name}": value for name, value in privacy.metrics(by_features, by_pixels).items()}
    if parts := nearest.by_parts:
        of_parts = select_groups(context.groups, parts.held_out_rows)
        by_parts = privacy.find_copies(parts.samples, parts.held_out, of_parts)
        metrics |= {f"privacy/{name}": value for name, value in privacy.part_metrics(by_parts).items()}
    return metrics, privacy.closest_pairs(by_features, by_pixels, NUM_CLOSEST)


def _nearest_by_features(context: EvaluationContext, searched: Tensor, train: Split) -> privacy.Nearest:
    """Nearest train image by content features (N, 96); each process computes those of its part of the train images."""
    own = own_share(context.world, len(train))
    blocks = split_images(StoredPlanes(train, torch.arange(own.start, own.stop)), _IMAGES_PER_BLOCK)
    found = privacy.nearest_by_features(
        searched,
        (extract_features(context.extractor, part, context.params.batch_size)[:, :NUM_CONTENT] for part in blocks),
    )
    distances, rows = (context.world.concat(values[None]) for values in (found.distance, found.row + own.start))
    distance, process = distances.min(dim=0)
    return privacy.Nearest(distance, rows.gather(0, process[None])[0])


def _nearest(
    context: EvaluationContext,
    search: Callable[[Images, Images, torch.device], privacy.Nearest],
    images: Images,
    others: Images,
) -> privacy.Nearest:
    """The nearest of `others` to each image; each process searches for its own images."""
    return privacy.Nearest(*(context.world.concat(values) for values in search(images, others, context.device)))


@torch.no_grad()
def attack_splits(context: EvaluationContext, samples: Tensor) -> dict[str, AttackedImages]:
    """Images of each split, by its name, as an attacker sees them who has the model or its samples (N, C, H, W) uint8.

    At most 2,000 images of a split, spread evenly.
    """
    found = {}
    for name, count in context.store.counts.items():
        split = context.store.split(name)
        rows = subsample(torch.arange(count), min(count, MAX_ATTACKED))
        if count == 0:
            continue
        columns = map_rows(context, len(rows), partial(_measure_reconstruction, context, split, labels_of(split), rows))
        own = StoredPlanes(split, rows[own_share(context.world, len(rows))])
        distance = _nearest(context, privacy.nearest_by_pixels, own, samples).distance
        found[name] = AttackedImages(columns[:, 0], columns[:, 1:], distance, select_groups(split.patients, rows))
    return found


def evaluate_membership(attacked: Mapping[str, AttackedImages]) -> dict[str, float]:
    """The `privacy/membership_auc` metrics: train images against val and against test images; empty without enough.

    A split of another population differs from the train split by more than membership. So each attack counts with the
    split that it separates less clearly from the train split.
    """
    others = [images for name, images in attacked.items() if name != "train" and can_be_attacked(images)]
    if not others or not can_be_attacked(attacked["train"]):
        return {}
    found = [attack(attacked["train"], images) for images in others]
    least = {f"membership_auc_{name}": min((each[name] for each in found), key=lambda auc: auc.low) for name in ATTACKS}
    return interval_metrics("privacy", least)


def _measure_reconstruction(
    context: EvaluationContext, split: Split, labels: Tensor, rows: Tensor, numbers: Tensor
) -> Tensor:
    """Squared error of the reconstruction and radial power (n, 1 + R) of some of the split's rows."""
    images, given = StoredImages(split)[rows[numbers]], labels[rows[numbers]].to(context.device)
    real = to_floats(images.to(context.device))
    conditions = None if context.model.space is None else read_conditions(split, rows[numbers])
    latent = context.model.encode(real, given, conditions).mean
    decoded = context.model.decode(latent, given, conditions).float()
    error = (decoded - real).square().flatten(1).mean(dim=1, keepdim=True).cpu()
    return torch.cat([error, radial_power(middle_planes(images))], dim=1)
