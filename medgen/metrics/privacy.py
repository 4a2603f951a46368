"""Whether samples are copies of train images: each one's nearest train image, by features and by pixels.

An image's nearest train image is looked for in two ways:

- features: Euclidean distance of the domain extractor's features, which are standardised over the train split.
  It sees a copy that is nearly exact; blur or a mirror leads it astray.
- pixels: 1 - r, where r is Pearson's correlation after alignment: both images brought to 32 x 32, the middle 28 x 28
  of the train image against every 28 x 28 window of the other one and of its mirror image, both averaged over
  2 x 2. That is a correlation at the detail of 16 x 16 with shifts of up to 1/16 of the side; brightness and contrast
  do not enter. The distance is then divided by the mean distance to the next 50 train images. Without that, whatever is
  blurred or near the average is near everything, and an honest but soft model would be called a copier; a copy
  is near one image and far from the others.

The yardstick are held-out real images, which nobody can have copied. The limit is their 1 % quantile: of their n
distances the one of rank (n + 1) / 100, rounded down. A sample that is nearer counts as a copy. Of a model that draws
like the held-out images rank / (n + 1) are expected, at most 1 %. Below 99 held-out images the limit is the smallest
of their distances, and one in n + 1 is expected, more than 1 %. `plausible` says from where on a rate is more than
chance.

The copy rate is the larger of the two shares. What it does not see: a film that is copied in part, turned, or changed
beyond what these two look at.

Sources: Carlini et al., Extracting training data from diffusion models, 2023 (a distance held against those to the
next 50); Vovk, Gammerman, Shafer, Algorithmic learning in a random world, 2005 (the limit's rank).
Shapes: N images, M train images, C channels, H W height and width, D features.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_SIDE = 32
_MAX_SHIFT = 2  # of 32: 1/16 of the side
_POOLED = 2
_NEIGHBOURS = 50
_QUANTILE = 0.01
_TOLERATED = 0.05  # copy rate that calls for a look, where there are held-out images enough
_CHANCE = 0.005  # of an honest model above `plausible`, by each of the two measures
_NUMBERS_PER_BLOCK = 1 << 22  # of a distance matrix held at once
_TINY = 1e-6


class Nearest(NamedTuple):
    """Each image's distance (N,) to its nearest train image, and which that is (N,)."""

    distance: Tensor
    row: Tensor


class Copies(NamedTuple):
    """How near samples come to train images, by one measure."""

    nearest: Nearest
    limit: float  # nearer ones count as copies
    rate: float
    ratio: float  # the samples' median distance over that of the held-out images
    limit_ratio: float  # the limit over the held-out images' median distance


class Pairs(NamedTuple):
    """Samples beside the train images they are nearest to, the nearest first; K pairs."""

    sample: Tensor  # (K,) row of the sample
    train: Tensor  # (K,) row of the train image
    nearness: Tensor  # (K,) distance over its limit: below 1 it counts as a copy
    by_pixels: Tensor  # (K,) by which measure: by pixels, else by features


def judge(samples: Nearest, held_out: Nearest) -> Copies:
    """Distances of samples held against those of held-out real images to the same train images, by the same measure."""
    limit, middle = quantile(held_out.distance), max(float(held_out.distance.median()), _TINY)
    rate = float((samples.distance < limit).double().mean())
    return Copies(samples, limit, rate, float(samples.distance.median()) / middle, limit / middle)


def metrics(by_features: Copies, by_pixels: Copies) -> dict[str, float]:
    """What is said of a model.

    Returns:
        copy_rate: the larger share of samples nearer to a train image than the limit; copy_rate_features and
        copy_rate_pixels: the two shares; nearest_train_ratio: the samples' median distance to the nearest train image
        over that of the held-out images, by features, nearest_train_ratio_pixels by pixels: about 1 for an honest
        model, near 0 for copies; held_out_limit: the smaller of the two limits over the held-out images' median
        distance: near 0 the held-out images are copies of train images themselves, and nothing can be told.
    """
    return {
        "copy_rate": max(by_features.rate, by_pixels.rate),
        "copy_rate_features": by_features.rate,
        "copy_rate_pixels": by_pixels.rate,
        "nearest_train_ratio": by_features.ratio,
        "nearest_train_ratio_pixels": by_pixels.ratio,
        "held_out_limit": min(by_features.limit_ratio, by_pixels.limit_ratio),
    }


def closest_pairs(by_features: Copies, by_pixels: Copies, count: int) -> Pairs:
    """The `count` samples nearest to a train image, by whichever measure calls them nearer in units of its limit."""
    both = (by_features, by_pixels)
    nearness = torch.stack([copies.nearest.distance / max(copies.limit, _TINY) for copies in both])  # (2, N)
    rows = torch.stack([copies.nearest.row for copies in both])
    smallest, measure = nearness.min(dim=0)
    sample = smallest.argsort(stable=True)[:count]
    measure = measure[sample]
    return Pairs(sample, rows[measure, sample], smallest[sample], measure == 1)


def quantile(distances: Tensor) -> float:
    """The limit that n held-out distances (n,) set: that of rank (n + 1) / 100 rounded down, at least the smallest."""
    rank = max(1, int(_QUANTILE * (len(distances) + 1) + _TINY))
    return float(distances.kthvalue(rank).values)


def plausible(num_held_out: int) -> float:
    """The copy rate up to which an honest model may well be: 0.05, and more below about 100 held-out images.

    The share of honest samples below the smallest of n distances exceeds x with probability (1 - x)^n.
    """
    return max(_TOLERATED, 1.0 - math.pow(_CHANCE, 1.0 / num_held_out))


def nearest_by_features(images: Tensor, train: Tensor) -> Nearest:
    """By Euclidean distance of features: (N, D) against (M, D)."""
    parts = []
    for part in torch.split(images, max(1, _NUMBERS_PER_BLOCK // len(train))):
        # Through inner products, which are quick; in float64 equal images are still within 1e-6 of each other.
        distances = torch.cdist(part.double(), train.double(), compute_mode="use_mm_for_euclid_dist")
        parts.append(distances.min(dim=1))
    return Nearest(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def nearest_by_pixels(images: Tensor, train: Tensor) -> Nearest:
    """By aligned correlation, as the module describes it: (N, C, H, W) against (M, C, H, W), uint8 or floats.

    Takes N·M·C·2·10⁴ multiplications and memory for 4 million correlations and one small copy of the train images.

    Raises:
        ValueError: a single train image has no others that its distance could be held against.
    """
    if len(train) < 2:
        raise ValueError(f"train: expected at least 2 images, found {len(train)}")
    middle = _windows(_small(train))[_MAX_SHIFT][_MAX_SHIFT]
    directions = _directions(middle).T  # (C·14·14, M)
    neighbours = min(_NEIGHBOURS, len(train) - 1)
    parts = []
    for part in torch.split(images, max(1, _NUMBERS_PER_BLOCK // len(train))):
        likeness = part.new_full((len(part), len(train)), -1.0, dtype=torch.float32)
        for window in _aligned(part):
            torch.maximum(likeness, window @ directions, out=likeness)
        best, rows = likeness.topk(neighbours + 1, dim=1)
        distances = (1.0 - best).clamp_min(0.0)
        parts.append(Nearest(distances[:, 0] / distances[:, 1:].mean(dim=1).clamp_min(_TINY), rows[:, 0]))
    return Nearest(torch.cat([part.distance for part in parts]), torch.cat([part.row for part in parts]))


def _small(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 32, 32) floats, by area; a part at a time, as large images take room."""
    return torch.cat([F.adaptive_avg_pool2d(part.float(), _SIDE) for part in torch.split(images, 256)])


def _windows(small: Tensor) -> list[list[Tensor]]:
    """The 28 x 28 windows of (N, C, 32, 32), by the row and column they start at."""
    starts, side = range(2 * _MAX_SHIFT + 1), _SIDE - 2 * _MAX_SHIFT
    return [[small[..., top : top + side, left : left + side] for left in starts] for top in starts]


def _aligned(images: Tensor) -> Iterator[Tensor]:
    """Directions (N, C·14·14) of the images under each shift, mirrored and not."""
    small = _small(images)
    for turned in (small, small.flip(-1)):
        for row in _windows(turned):
            yield from map(_directions, row)


def _directions(windows: Tensor) -> Tensor:
    """(N, C, 28, 28) -> (N, C·14·14) of mean 0 and length 1: their inner products are Pearson's correlations.

    What shows nothing becomes 0, which correlates with nothing.
    """
    pooled = F.avg_pool2d(windows, _POOLED).flatten(1)
    centred = pooled - pooled.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    shows = length > 1e-5 * pooled.norm(dim=1, keepdim=True).clamp_min(_TINY)  # above the rounding of the mean
    return torch.where(shows, centred / length.clamp_min(_TINY), 0.0)
