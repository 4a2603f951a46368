"""Evaluate how near samples come to train images.

Shapes: N images, C channels, H W height and width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from medgen.data.images import Images, StoredImages, split_images
from medgen.data.store import Split
from medgen.evaluation.context import EvaluationContext, FeatureSets, extract_features, own_share
from medgen.metrics import privacy
from medgen.metrics.features import NUM_CONTENT
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import select_groups

NUM_CLOSEST = 10  # pairs in nearest_train.png
MAX_PAIRS, MIN_SEARCHED = 10**9, 2000  # held-out images by train images; held-out images searched at least
_IMAGES_PER_BLOCK = 4096  # train images whose features are in memory at once


class NearestTrain(NamedTuple):
    """The nearest train image of each sample and of each searched held-out image, by both distances."""

    samples_by_features: privacy.Nearest
    held_out_by_features: privacy.Nearest
    samples_by_pixels: privacy.Nearest
    held_out_by_pixels: privacy.Nearest
    held_out_rows: Tensor  # of the compared images


def search_train(context: EvaluationContext, features: FeatureSets, samples: Tensor) -> NearestTrain:
    """Search all train images for the nearest of each sample (N, C, H, W) uint8 and of held-out images.

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
    return NearestTrain(
        privacy.Nearest(*(values[: len(samples)] for values in by_features)),
        privacy.Nearest(*(values[len(samples) :] for values in by_features)),
        _nearest_by_pixels(context, samples[own_share(context.world, len(samples))], train),
        _nearest_by_pixels(context, StoredImages(context.held_out, held_out), train),
        rows,
    )


def evaluate_privacy(
    context: EvaluationContext, nearest: NearestTrain
) -> tuple[dict[str, float], privacy.ClosestPairs]:
    """The `privacy/` metrics of samples relative to held-out images, and the closest pairs."""
    patients = select_groups(context.groups, nearest.held_out_rows)
    by_features = privacy.find_copies(nearest.samples_by_features, nearest.held_out_by_features, patients)
    by_pixels = privacy.find_copies(nearest.samples_by_pixels, nearest.held_out_by_pixels, patients)
    metrics = {f"privacy/{name}": value for name, value in privacy.metrics(by_features, by_pixels).items()}
    return metrics, privacy.closest_pairs(by_features, by_pixels, NUM_CLOSEST)


def _nearest_by_features(context: EvaluationContext, searched: Tensor, train: Split) -> privacy.Nearest:
    """Nearest train image by content features (N, 96); each process computes those of its part of the train images."""
    own = own_share(context.world, len(train))
    blocks = split_images(StoredImages(train, torch.arange(own.start, own.stop)), _IMAGES_PER_BLOCK)
    found = privacy.nearest_by_features(
        searched,
        (extract_features(context.extractor, part, context.params.batch_size)[:, :NUM_CONTENT] for part in blocks),
    )
    distances, rows = (context.world.concat(values[None]) for values in (found.distance, found.row + own.start))
    distance, process = distances.min(dim=0)
    return privacy.Nearest(distance, rows.gather(0, process[None])[0])


def _nearest_by_pixels(context: EvaluationContext, images: Images, train: Split) -> privacy.Nearest:
    """Nearest train image by pixels; each process searches for its own images."""
    found = privacy.nearest_by_pixels(images, StoredImages(train), context.device)
    return privacy.Nearest(*(context.world.concat(values) for values in found))
