"""Copies of train images among samples: each sample's nearest train image, by features and by pixels.

An image's nearest train image is searched in two ways:

- features: Euclidean distance of the domain extractor's content features, standardised over the train split.
  It finds a copy that is nearly exact, and loses one that is blurred or mirrored.
- pixels: 1 - r, where r is Pearson's correlation of 14 x 14 cells, a cell being 1/16 of the side: the middle of the
  train image and of its mirror image against every window of the other image, shifted by up to one cell. Images are
  brought to a side of 32 to 128 pixels, a multiple of 16, and windows move by one of those pixels: at 64 and 128 pixels
  that is every whole-pixel shift of up to 1/16 of the side. Brightness and contrast do not enter. The distance is then
  divided by the mean distance to the next 50 train images (Carlini et al. 2023). Without that, whatever is blurred or
  near the average is near everything, and an honest but soft model would be accused; a copy is near one image and far
  from the others.

Held-out real images, which cannot be copies, set the limit. Images of one patient resemble each other, so every patient
counts once, by the smallest distance of the patient's images: of g patients the distance of rank (g + 1) / 100, rounded
down and at least 1. A sample that is nearer counts as a copy. A model that draws like the held-out images has an
expected rate of at most rank / (g + 1): 1 % from 99 patients on.

`plausible` is the largest rate that chance explains. With one image of each patient, samples and held-out images are
exchangeable (Vovk, Gammerman, Shafer 2005), and the number of samples below the limit has a negative hypergeometric
distribution (Johnson, Kotz, Kemp 1992). More images of a patient only lower the limit, however much they depend on each
other, so the bound holds for them too.

A single sample below a quarter of the limit (`CERTAIN`) is a copy whatever the rate.

The search misses images that are copied in part, turned, or changed beyond blur, shift, mirror and tone.

Sources: Carlini et al., Extracting training data from diffusion models, 2023; Johnson, Kotz, Kemp, Univariate discrete
distributions, 1992; Vovk, Gammerman, Shafer, Algorithmic learning in a random world, 2005.
Shapes: N images, M train images, C channels, H W height and width, D features or C·14·14 cells, S shifts, K candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CERTAIN = 0.25  # of the limit: no real image of an unseen patient came as near in 72,000 simulated evaluations

_CELLS = 16  # along a side
_WINDOW = 14  # cells of a window's side, which leaves one cell of shift on either side
_SIDES = (32, 128)  # pixels; a copy half a step of 1/128 away is still within a quarter of the limit
_NEIGHBOURS = 50
_CANDIDATES = 64  # train images that are compared under every shift, where an eighth of all is fewer
_QUANTILE = 0.01
_CHANCE = 0.005  # of an honest model above `plausible`, by each of the two measures
_NUMBERS_PER_BLOCK = 1 << 22  # of a distance matrix held at once
_TINY = 1e-6


class Nearest(NamedTuple):
    """Each image's distance (N,) to its nearest train image, and that image's row (N,)."""

    distance: Tensor
    row: Tensor


class Copies(NamedTuple):
    """How near samples come to train images, by one measure."""

    nearest: Nearest
    limit: float  # nearer ones count as copies
    rate: float
    plausible: float  # the largest rate that chance explains
    ratio: float  # the samples' median distance over that of the held-out images
    limit_ratio: float  # the limit over the held-out images' median distance

    @property
    def nearness(self) -> Tensor:
        """Each sample's distance (N,) in units of the limit."""
        return self.nearest.distance / max(self.limit, _TINY)


class Pairs(NamedTuple):
    """Samples and the train images they are nearest to, the nearest first; K pairs."""

    sample: Tensor  # (K,) row of the sample
    train: Tensor  # (K,) row of the train image
    nearness: Tensor  # (K,) distance over its limit: below 1 it counts as a copy
    by_pixels: Tensor  # (K,) True: distance by pixels; False: by features


def find_copies(samples: Nearest, held_out: Nearest, patients: Sequence[str] | None = None) -> Copies:
    """Compare samples with held-out real images by their distances to the same train images.

    Args:
        samples: of the generated images, by one measure.
        held_out: of real images, by the same measure.
        patients: each held-out image's patient; None counts every image as a patient.
    """
    smallest = _smallest_by_patient(held_out.distance, patients)
    limit, middle = float(smallest.kthvalue(_rank(len(smallest))).values), float(held_out.distance.median())
    middle = max(middle, _TINY)
    return Copies(
        nearest=samples,
        limit=limit,
        rate=float((samples.distance < limit).double().mean()),
        plausible=plausible(len(samples.distance), len(smallest)),
        ratio=float(samples.distance.median()) / middle,
        limit_ratio=limit / middle,
    )


def metrics(by_features: Copies, by_pixels: Copies) -> dict[str, float]:
    """The `privacy/` metrics; docs/contract.md explains each.

    Returns:
        copy_rate: the larger share of samples nearer to a train image than the limit; copy_rate_features and
        copy_rate_pixels: the two shares; copy_rate_plausible: the largest rate that chance explains;
        nearest_over_limit: the smallest distance of a sample in units of its limit, by either measure: below `CERTAIN`
        that sample is a copy; nearest_train_ratio: the samples' median distance to the nearest train image over that of
        the held-out images, by features, nearest_train_ratio_pixels by pixels: about 1 for an honest model, near 0 for
        copies; held_out_limit: the smaller of the two limits over the held-out images' median distance: near 0 the
        held-out images are copies of train images themselves, and samples cannot be tested.
    """
    return {
        "copy_rate": max(by_features.rate, by_pixels.rate),
        "copy_rate_features": by_features.rate,
        "copy_rate_pixels": by_pixels.rate,
        "copy_rate_plausible": by_features.plausible,
        "nearest_over_limit": min(float(copies.nearness.min()) for copies in (by_features, by_pixels)),
        "nearest_train_ratio": by_features.ratio,
        "nearest_train_ratio_pixels": by_pixels.ratio,
        "held_out_limit": min(by_features.limit_ratio, by_pixels.limit_ratio),
    }


def closest_pairs(by_features: Copies, by_pixels: Copies, count: int) -> Pairs:
    """The `count` samples nearest to a train image, by the measure that gives the smaller distance over its limit."""
    both = (by_features, by_pixels)
    nearness = torch.stack([copies.nearness for copies in both])  # (2, N)
    rows = torch.stack([copies.nearest.row for copies in both])
    smallest, measure = nearness.min(dim=0)
    sample = smallest.argsort(stable=True)[:count]
    measure = measure[sample]
    return Pairs(sample, rows[measure, sample], smallest[sample], measure == 1)


def plausible(num_samples: int, num_patients: int) -> float:
    """The largest copy rate of `num_samples` that chance explains: an honest model exceeds it in at most 0.5 %.

    With the limit at rank r of g patients, P(k of m samples are nearer) = C(k+r-1, k) C(m-k+g-r, m-k) / C(m+g, m).
    """
    rank, nearer = _rank(num_patients), torch.arange(num_samples + 1, dtype=torch.float64)
    farther = num_samples - nearer
    log_probability = _log_choose(nearer + rank - 1, nearer) + _log_choose(farther + num_patients - rank, farther)
    probability = (log_probability - log_probability.logsumexp(dim=0)).exp()
    at_least = probability.flip(0).cumsum(0).flip(0)  # (m+1,) P(k or more)
    return int((at_least > _CHANCE).sum() - 1) / num_samples


def _log_choose(total: Tensor, chosen: Tensor) -> Tensor:
    return torch.lgamma(total + 1) - torch.lgamma(chosen + 1) - torch.lgamma(total - chosen + 1)


def _rank(num_patients: int) -> int:
    """The limit's rank among the patients' smallest distances."""
    return max(1, int(_QUANTILE * (num_patients + 1) + _TINY))


def _smallest_by_patient(distances: Tensor, patients: Sequence[str] | None) -> Tensor:
    """(N,) -> (number of patients,)"""
    if patients is None:
        return distances
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    groups = torch.tensor([numbers[patient] for patient in patients])
    return distances.new_full((len(numbers),), torch.inf).scatter_reduce(0, groups, distances, "amin")


def nearest_by_features(images: Tensor, train: Tensor) -> Nearest:
    """Nearest train image of each image by Euclidean distance of features: (N, D) against (M, D)."""
    parts = []
    for part in torch.split(images, max(1, _NUMBERS_PER_BLOCK // len(train))):
        # Through inner products, which are quick; in float64 equal images are still within 1e-6 of each other.
        distances = torch.cdist(part.double(), train.double(), compute_mode="use_mm_for_euclid_dist")
        parts.append(distances.min(dim=1))
    return Nearest(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def nearest_by_pixels(images: Tensor, train: Tensor) -> Nearest:
    """Nearest train image of each image by shifted correlation: (N, C, H, W) against (M, C, H, W), uint8 or floats.

    A first pass compares all train images, mirrored and not, under shifts of about 1/32 of the side (25 of them at 64
    and 128 pixels). The second compares the nearest eighth of them, at least 64, under every shift. Takes N·M·C·10⁴
    multiplications in the first pass, and memory for a few times 4 million numbers and two copies of the train images
    at 14 x 14.

    Raises:
        ValueError: fewer than 2 train images: the distance is relative to those of others.
    """
    if len(train) < 2:
        raise ValueError(f"train: expected at least 2 images, found {len(train)}")
    cell, num_train = _cell(train), len(train)
    shifts = torch.arange(2 * cell + 1)
    coarse = shifts[:: max(1, cell // 2)]
    coarse = (coarse[:, None] * len(shifts) + coarse).flatten()
    targets = _targets(train, cell)  # (2·M, D)
    num_candidates, neighbours = min(num_train, max(_CANDIDATES, num_train // 8)), min(_NEIGHBOURS, num_train - 1)
    numbers = max(len(coarse) * len(targets), targets.shape[1] * (2 * num_candidates + len(shifts) ** 2))  # of an image
    parts = []
    for part in torch.split(images, max(1, _NUMBERS_PER_BLOCK // numbers)):
        windows = _windows(_resized(part, cell), cell)  # (N, D, S)
        first = (windows[:, :, coarse].transpose(1, 2) @ targets.T).amax(dim=1)  # (N, 2·M)
        rows = first.view(-1, 2, num_train).amax(dim=1).topk(num_candidates).indices  # (N, K)
        candidates = targets[torch.cat([rows, rows + num_train], dim=1)]  # (N, 2·K, D)
        likeness = (candidates @ windows).amax(dim=2).view(-1, 2, num_candidates).amax(dim=1)  # (N, K)
        best, order = likeness.topk(neighbours + 1)
        distances = (1.0 - best).clamp_min(0.0)
        relative = distances[:, 0] / distances[:, 1:].mean(dim=1).clamp_min(_TINY)
        parts.append(Nearest(relative, rows.gather(1, order[:, :1])[:, 0]))
    return Nearest(torch.cat([part.distance for part in parts]), torch.cat([part.row for part in parts]))


def _cell(train: Tensor) -> int:
    """Pixels of a cell's side, at the side that images are brought to: the next multiple of 16, within `_SIDES`."""
    least, most = _SIDES
    return min(most, max(least, train.shape[-1] + _CELLS - 1)) // _CELLS


def _resized(images: Tensor, cell: int) -> Tensor:
    """(N, C, H, W) -> (N, C, 16·cell, 16·cell) floats, by area."""
    return F.adaptive_avg_pool2d(images.float(), _CELLS * cell)


def _targets(train: Tensor, cell: int) -> Tensor:
    """The middle windows (2·M, D) of the train images, then those of their mirror images."""
    middle = slice(cell, -cell)
    parts = [_windows(_resized(part, cell)[..., middle, middle], cell)[:, :, 0] for part in torch.split(train, 256)]
    plain = torch.cat(parts)
    mirrored = plain.view(len(plain), -1, _WINDOW, _WINDOW).flip(-1).flatten(1)
    return torch.cat([plain, mirrored])


def _windows(images: Tensor, cell: int) -> Tensor:
    """Images -> windows (N, D, S) under every shift that fits, the rows of shifts in turn.

    They have mean 0 and length 1: their inner products are Pearson's correlations. A window of one grey becomes 0,
    which correlates with nothing.
    """
    windows = F.unfold(F.avg_pool2d(images, cell, stride=1), _WINDOW, dilation=cell)
    centred = windows - windows.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    shows = length > 1e-5 * windows.norm(dim=1, keepdim=True).clamp_min(_TINY)  # above the rounding of the mean
    return centred * torch.where(shows, 1.0 / length.clamp_min(_TINY), 0.0)
