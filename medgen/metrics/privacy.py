"""Search for copies of train images among samples, by features and by pixels.

The nearest train image of each image is searched by two distances:

- features: Euclidean distance of the domain extractor's content features, standardised over the train split. It finds
  nearly exact copies, and misses blurred and mirrored ones.
- pixels: 1 - r, with r the largest Pearson correlation over 14 x 14 cells (a cell is 1/16 of each side) between the
  centre of the train image or of its mirror image and any window of the other image, shifted by up to one cell. Images
  are resized to a side of 32 to 128 pixels, a multiple of 16, and windows move in steps of one pixel: at 64 and 128
  pixels that covers every whole-pixel shift of up to 1/16 of the side. Brightness and contrast have no effect. The
  distance is divided by the mean distance to the next 50 train images (Carlini et al. 2023). Without this, any blurred
  or average image would be near all train images and counted as a copy; a copy is near one image and far from the
  others.

Held-out real images, which cannot be copies, give the limit. Images of one patient resemble each other, so each patient
counts once, with the smallest distance of the patient's images; of g patients the limit is the distance of rank
(g + 1) / 100, rounded down and at least 1. Samples below the limit count as copies. If samples are distributed like the
held-out images, the expected rate is at most rank / (g + 1): 1 % from 99 patients on.

`plausible` is the largest copy rate that chance explains. With one image per patient, samples and held-out images are
exchangeable (Vovk, Gammerman, Shafer 2005), and the number of samples below the limit has a negative hypergeometric
distribution (Johnson, Kotz, Kemp 1992). Further images of a patient can only lower the limit, whatever their
dependence, so the bound holds for them too.

A single sample below a quarter of the limit (`CERTAIN_COPY`) is a copy at any rate.

The search misses rotated copies, and changes other than blur, shift, mirroring and tone. Partial copies are searched in
the same way by parts of the image, with limits of their own.

Sources: Carlini et al., Extracting training data from diffusion models, 2023; Johnson, Kotz, Kemp, Univariate discrete
distributions, 1992; Vovk, Gammerman, Shafer, Algorithmic learning in a random world, 2005.
Shapes: N images, M train images, C channels, H W height and width, D features or C·14·14 cells, S shifts, K candidates.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.data.images import Images
from medgen.metrics.intervals import Groups, group_indices

CERTAIN_COPY = 0.25  # of the limit: no image of an unseen patient was nearer in 72,000 simulated evaluations
MIN_HELD_OUT_LIMIT = 0.2  # of the held-out images' median distance; below, test images are copies of train images

_CELLS = 16  # per side
_WINDOW = 14  # cells per side of a window, which leaves one cell of shift in each direction
_SIDES = (32, 128)  # pixels; a copy shifted by half a pixel of 128 is still within a quarter of the limit
_NEIGHBOURS = 50
_PRINCIPAL = 31  # principal components of windows that the first pass compares; a 32nd number stands for the rest
_CANDIDATES = 512  # minimum number of train images that are compared under every shift; otherwise 1/32 of all
_CANDIDATE_SHARE = 32
_QUANTILE = 0.01
_CHANCE = 0.005  # probability that a model without copies exceeds `plausible`, by each of the two distances
_VALUES_PER_BLOCK = 1 << 22  # of a distance matrix in memory at once
_TRAIN_IMAGES_PER_BLOCK = 1 << 16  # at 14 x 14 in memory at once: 100 MB grey, 300 MB colour
_IMAGES_PER_BATCH = 256  # read from the split at once
_TINY = 1e-6


class Region(NamedTuple):
    """A part of an image, in quarters of its height and width."""

    top: int = 0
    left: int = 0
    size: int = 4

    def cut(self, images: Tensor, is_mirrored: bool = False) -> Tensor:
        """This part of images (..., H, W); or the part that shows the same place in their mirror images."""
        left = 4 - self.left - self.size if is_mirrored else self.left
        for dim, start in ((-2, self.top), (-1, left)):
            first, last = (edge * images.shape[dim] // 4 for edge in (start, start + self.size))
            images = images.narrow(dim, first, last - first)
        return images


WHOLE = Region()
PARTS = [Region(top, left, 2) for top in range(3) for left in range(3)]  # of half the height and width


class Nearest(NamedTuple):
    """Distance (N,) of each image to its nearest train image, and the row (N,) of that train image."""

    distance: Tensor
    row: Tensor


class Copies(NamedTuple):
    """Result of the search by one distance."""

    nearest: Nearest
    limit: float  # samples below it count as copies
    rate: float  # share of samples below the limit
    plausible: float  # largest rate that chance explains
    ratio: float  # median distance of the samples over that of the held-out images
    limit_ratio: float  # the limit over the median distance of the held-out images

    @property
    def relative_distance(self) -> Tensor:
        """Distance (N,) of each sample in units of the limit."""
        return self.nearest.distance / max(self.limit, _TINY)


class ClosestPairs(NamedTuple):
    """K samples and their nearest train images, by increasing relative distance."""

    sample: Tensor  # (K,) row of the sample
    train: Tensor  # (K,) row of the train image
    relative_distance: Tensor  # (K,) distance over the limit; a sample below 1 counts as a copy
    by_pixels: Tensor  # (K,) True: distance by pixels; False: by features


def find_copies(samples: Nearest, held_out: Nearest, patients: Groups = None) -> Copies:
    """Compare the distances of samples and of held-out real images, each with its patient, to the same train images."""
    smallest = _smallest_by_patient(held_out.distance, patients)
    limit, median = float(smallest.kthvalue(_rank(len(smallest))).values), float(held_out.distance.median())
    median = max(median, _TINY)
    return Copies(
        nearest=samples,
        limit=limit,
        rate=float((samples.distance < limit).double().mean()),
        plausible=plausible_rate(len(samples.distance), len(smallest)),
        ratio=float(samples.distance.median()) / median,
        limit_ratio=limit / median,
    )


def metrics(by_features: Copies, by_pixels: Copies) -> dict[str, float]:
    """The `privacy/` metrics; docs/contract.md explains each.

    Returns:
        copy_rate: share of samples below the limit, the larger of copy_rate_features and copy_rate_pixels;
        copy_rate_plausible: largest rate that chance explains; nearest_over_limit: smallest distance of a sample in
        units of its limit, by either distance (below `CERTAIN_COPY` the sample is a copy); nearest_train_ratio and
        nearest_train_ratio_pixels: median distance of the samples over that of the held-out images, about 1 without
        copies and near 0 for copies; held_out_limit: the smaller of the two limits over the held-out images' median
        distance (below `MIN_HELD_OUT_LIMIT` held-out images are copies of train images themselves, and samples cannot
        be tested).
    """
    return {
        "copy_rate": max(by_features.rate, by_pixels.rate),
        "copy_rate_features": by_features.rate,
        "copy_rate_pixels": by_pixels.rate,
        "copy_rate_plausible": by_features.plausible,
        "nearest_over_limit": min(float(copies.relative_distance.min()) for copies in (by_features, by_pixels)),
        "nearest_train_ratio": by_features.ratio,
        "nearest_train_ratio_pixels": by_pixels.ratio,
        "held_out_limit": min(by_features.limit_ratio, by_pixels.limit_ratio),
    }


def part_metrics(by_parts: Copies) -> dict[str, float]:
    """The `privacy/` metrics of parts, as `metrics` has them of whole images."""
    return {
        "partial_copy_rate": by_parts.rate,
        "partial_copy_rate_plausible": by_parts.plausible,
        "nearest_part_over_limit": float(by_parts.relative_distance.min()),
    }


def closest_pairs(by_features: Copies, by_pixels: Copies, count: int) -> ClosestPairs:
    """The `count` samples nearest to a train image, by the smaller of the two relative distances."""
    both = (by_features, by_pixels)
    relative = torch.stack([copies.relative_distance for copies in both])  # (2, N)
    rows = torch.stack([copies.nearest.row for copies in both])
    smallest, which = relative.min(dim=0)
    sample = smallest.argsort(stable=True)[:count]
    which = which[sample]
    return ClosestPairs(sample, rows[which, sample], smallest[sample], which == 1)


def plausible_rate(num_samples: int, num_patients: int) -> float:
    """Largest copy rate that chance explains; a model without copies exceeds it with a probability of at most 0.5 %.

    With the limit at rank r of g patients, P(k of m samples below) = C(k+r-1, k) C(m-k+g-r, m-k) / C(m+g, m).
    """
    rank, below = _rank(num_patients), torch.arange(num_samples + 1, dtype=torch.float64)
    above = num_samples - below
    log_probability = _log_choose(below + rank - 1, below) + _log_choose(above + num_patients - rank, above)
    probability = (log_probability - log_probability.logsumexp(dim=0)).exp()
    at_least = probability.flip(0).cumsum(0).flip(0)  # (m+1,) P(k or more)
    return int((at_least > _CHANCE).sum() - 1) / num_samples


def _log_choose(total: Tensor, chosen: Tensor) -> Tensor:
    return torch.lgamma(total + 1) - torch.lgamma(chosen + 1) - torch.lgamma(total - chosen + 1)


def _rank(num_patients: int) -> int:
    """Rank of the limit among the smallest distances of the patients."""
    return max(1, int(_QUANTILE * (num_patients + 1) + _TINY))


def _smallest_by_patient(distances: Tensor, patients: Groups) -> Tensor:
    """Smallest of the distances (N,) of each patient, (number of patients,)."""
    indices = group_indices(len(distances), patients)
    smallest = distances.new_full((int(indices.max()) + 1,), torch.inf)
    return smallest.scatter_reduce(0, indices, distances, "amin")


def nearest_by_features(images: Tensor, train: Iterable[Tensor]) -> Nearest:
    """Nearest train image of each image by Euclidean distance of features (N, D) and, in blocks, (M, D)."""
    nearest = Nearest(torch.full((len(images),), torch.inf).double(), torch.zeros(len(images), dtype=torch.int64))
    images, first = images.double(), 0
    for block in train:
        for rows in torch.split(torch.arange(len(images)), max(1, _VALUES_PER_BLOCK // len(block))):
            # By inner products, which are fast; in float64 equal images are still within 1e-6 of each other.
            distances = torch.cdist(images[rows], block.double(), compute_mode="use_mm_for_euclid_dist")
            distance, row = distances.min(dim=1)
            nearer = distance < nearest.distance[rows]
            nearest.distance[rows[nearer]], nearest.row[rows[nearer]] = distance[nearer], row[nearer] + first
        first += len(block)
    return nearest


def nearest_by_parts(images: Images, train: Images, device: torch.device | str = "cpu") -> Nearest:
    """Smallest distance of a part of each image to the same part of a train image, and the row of that image.

    The parts are the nine of `PARTS`; the distance is that of `nearest_by_pixels`, with shifts of up to 1/32 of the
    side. It takes nine times as long.
    """
    found = [nearest_by_pixels(images, train, device, part) for part in PARTS]
    distance, part = torch.stack([each.distance for each in found]).min(dim=0)
    return Nearest(distance, torch.stack([each.row for each in found]).gather(0, part[None])[0])


def nearest_by_pixels(
    images: Images, train: Images, device: torch.device | str = "cpu", region: Region = WHOLE
) -> Nearest:
    """Nearest train image of each image (N, C, H, W) by shifted correlation with train (M, C, H, W).

    With a region only that part of the images is compared; the mirror image of a train image is cut in the same place.

    The first pass bounds the correlation of all train images and their mirror images from above (`_coordinates`), under
    shifts in steps of about 1/32 of the side (25 shifts at 64 and 128 pixels). The second compares 1/32 of them, at
    least 512, the highest bounds, under every shift. The first pass takes N·M·1600 multiplications. Train images are
    read in blocks of 65,536; of more, the second pass gets 2,048 of each block. Memory: a few times 4 million
    values, and two copies of a block at 14 x 14.

    Raises:
        ValueError: fewer than 2 train images; the distance is relative to those of other train images.
    """
    num_train = len(train)
    if num_train < 2:
        raise ValueError(f"train: expected at least 2 images, found {num_train}")
    cell = _cell(max(train.shape[-2:]) * region.size // 4)
    shifts = torch.arange(2 * cell + 1)
    coarse = shifts[:: max(1, cell // 2)]
    coarse = (coarse[:, None] * len(shifts) + coarse).flatten().to(device)
    kept = min(_NEIGHBOURS, num_train - 1) + 1
    correlation = torch.full((len(images), kept), -torch.inf, device=device)  # highest first
    nearest = torch.zeros(len(images), kept, dtype=torch.int64, device=device)
    for first in range(0, num_train, _TRAIN_IMAGES_PER_BLOCK):
        block = range(first, min(first + _TRAIN_IMAGES_PER_BLOCK, num_train))
        targets = _targets(train, block, cell, device, region)  # (2·B, D)
        basis = torch.linalg.eigh(targets.T @ targets).eigenvectors[:, -_PRINCIPAL:]
        coordinates = _coordinates(targets, basis).T  # (K+1, 2·B)
        num_candidates = min(len(block), max(_CANDIDATES, len(block) // _CANDIDATE_SHARE))
        values_per_image = max(len(coarse) * len(targets), targets.shape[1] * (2 * num_candidates + len(shifts) ** 2))
        for rows in torch.split(torch.arange(len(images)), max(1, _VALUES_PER_BLOCK // values_per_image)):
            windows = _windows(_resized(region.cut(images[rows]).to(device), cell), cell)  # (n, D, S)
            bounds = (_coordinates(windows[:, :, coarse].transpose(1, 2), basis) @ coordinates).amax(dim=1)  # (n, 2·B)
            found = bounds.view(-1, 2, len(block)).amax(dim=1).topk(num_candidates).indices  # (n, K)
            candidates = targets[torch.cat([found, found + len(block)], dim=1)]  # (n, 2·K, D)
            best = (candidates @ windows).amax(dim=2).view(-1, 2, num_candidates).amax(dim=1)  # (n, K)
            best, order = torch.cat([correlation[rows], best], dim=1).topk(kept)
            correlation[rows], nearest[rows] = best, torch.cat([nearest[rows], found + first], dim=1).gather(1, order)
    distances = (1.0 - correlation).clamp_min(0.0).cpu()
    relative = distances[:, 0] / distances[:, 1:].mean(dim=1).clamp_min(_TINY)
    return Nearest(relative, nearest[:, 0].cpu())


def _cell(side: int) -> int:
    """Pixels per side of a cell after resizing to the next multiple of 16 within `_SIDES`."""
    least, most = _SIDES
    return min(most, max(least, side + _CELLS - 1)) // _CELLS


def _resized(images: Tensor, cell: int) -> Tensor:
    """Images (N, C, H, W) averaged over areas to floats (N, C, 16·cell, 16·cell)."""
    return F.adaptive_avg_pool2d(images.float(), _CELLS * cell)


def _targets(train: Images, block: range, cell: int, device: torch.device | str, region: Region) -> Tensor:
    """Central windows (2·B, D) of the train images of a block, then those of their mirror images."""
    centre = slice(cell, -cell)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(block.start, block.stop, _IMAGES_PER_BATCH):
        part = train[start : min(start + _IMAGES_PER_BATCH, block.stop)].to(device)
        for is_mirrored, windows in enumerate(parts):
            cut = region.cut(part, bool(is_mirrored))
            windows.append(_windows(_resized(cut, cell)[..., centre, centre], cell)[:, :, 0])
    plain, other = map(torch.cat, parts)
    mirrored = other.view(len(other), -1, _WINDOW, _WINDOW).flip(-1).flatten(1)
    return torch.cat([plain, mirrored])


def _coordinates(windows: Tensor, basis: Tensor) -> Tensor:
    """Coordinates (..., P+1) of windows (..., D), whose inner products are at least those of the windows.

    P of them are along the orthonormal basis (D, P), the last is the length of the rest, since the product of two rests
    is at most that of their lengths (Cauchy-Schwarz). Of equal windows the inner product stays 1, so no copy is missed.
    """
    inside = windows @ basis
    rest = windows.square().sum(dim=-1, keepdim=True) - inside.square().sum(dim=-1, keepdim=True)
    return torch.cat([inside, rest.clamp_min(0.0).sqrt()], dim=-1)


def _windows(images: Tensor, cell: int) -> Tensor:
    """Windows (N, D, S) of images under every shift that fits, in row-major order of shifts.

    They have mean 0 and length 1, so their inner products are Pearson correlations. A constant window becomes 0, which
    has no correlation with any other.
    """
    windows = F.unfold(F.avg_pool2d(images, cell, stride=1), _WINDOW, dilation=cell)
    centred = windows - windows.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    varies = length > 1e-5 * windows.norm(dim=1, keepdim=True).clamp_min(_TINY)  # above the rounding of the mean
    return centred * torch.where(varies, 1.0 / length.clamp_min(_TINY), 0.0)
