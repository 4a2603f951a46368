"""Distances and diversity of sets of generated and real images, mostly by features (N, D).

Sets are compared, not pairs of images, so each value has the sampling error of both sets: read it with its interval and
next to the same comparison of two real sets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from medgen.data.images import Images, to_floats
from medgen.metrics.intervals import Groups, Interval, largest_block, select_groups, two_set_intervals

_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest scale first
_SSIM_WINDOW = 11
_PAIRS_PER_BATCH = 128
NEIGHBOURS = 3  # k of precision and recall
_DENSITY_NEIGHBOURS = 5  # k of density and coverage


class PRDC(NamedTuple):
    """Precision, recall, density and coverage; 1 is best, density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of features (N, D) and (M, D); N, M > 1.

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), at least 0. Biased upward in small sets, more so with fewer images per
    feature: compare only sets of equal sizes.

    Source: Heusel et al.: GANs trained by a two time-scale update rule, 2017, eq. 6.
    """
    real, generated = real.double(), generated.double()
    shift = (real.mean(dim=0) - generated.mean(dim=0)).square().sum()
    covariance_real, covariance_generated = torch.cov(real.T), torch.cov(generated.T)
    # tr (Σ₁ Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, whose argument is symmetric: real eigenvalues, no iteration.
    values, vectors = torch.linalg.eigh(covariance_real)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_generated @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(shift + covariance_real.trace() + covariance_generated.trace() - 2 * cross))


def prdc(real: Tensor, generated: Tensor) -> PRDC:
    """Precision, recall, density and coverage of features (N, D) and (M, D).

    They count images inside balls around each image up to its k-th nearest neighbour; k is at most the number of other
    images. All four depend on the sizes of the sets, so the larger set is subsampled evenly to the size of the smaller.

    Returns:
        precision: share of generated images inside the ball of a real image; recall: share of real images inside the
        ball of a generated image; density: mean number of real balls around a generated image, divided by k; coverage:
        share of real balls with a generated image inside.

    Raises:
        ValueError: fewer than two images in a set.

    Sources: Kynkäänniemi et al.: Improved precision and recall metric, 2019, eq. 1-3 (k = 3);
    Naeem et al.: Reliable fidelity and diversity metrics, 2020, eq. 3 and 5 (k = 5).
    """
    size = min(len(real), len(generated))
    if size < 2:
        raise ValueError(f"prdc: expected at least 2 images in each set, found {len(real)} and {len(generated)}")
    real, generated, rows = subsample(real, size), subsample(generated, size), torch.arange(size)
    return PRDC(*_prdc(_distances(real, generated), _Neighbours(real), _Neighbours(generated), rows, rows).tolist())


def prdc_intervals(
    real: Tensor, generated: Tensor, real_groups: Groups = None, generated_groups: Groups = None
) -> dict[str, Interval]:
    """`prdc` with intervals by `two_set_intervals`; the keys are the fields of `PRDC`."""
    size = min(len(real), len(generated))
    real_rows, generated_rows = (subsample(torch.arange(len(images)), size) for images in (real, generated))
    real, real_groups = real[real_rows], select_groups(real_groups, real_rows)
    generated, generated_groups = generated[generated_rows], select_groups(generated_groups, generated_rows)
    between = _distances(real, generated)
    near_real = _Neighbours(real, largest_block(size, real_groups))
    near_generated = _Neighbours(generated, largest_block(size, generated_groups))

    def statistic(kept_real: Tensor, kept_generated: Tensor) -> Tensor:
        return _prdc(between[kept_real[:, None], kept_generated], near_real, near_generated, kept_real, kept_generated)

    intervals = two_set_intervals(statistic, size, size, real_groups, generated_groups)
    return dict(zip(PRDC._fields, intervals, strict=True))


def frechet_interval(
    real: Tensor, generated: Tensor, real_groups: Groups = None, generated_groups: Groups = None
) -> Interval:
    """`frechet_distance` with an interval by `two_set_intervals`, around the upward biased value."""

    def statistic(kept_real: Tensor, kept_generated: Tensor) -> Tensor:
        return torch.tensor([frechet_distance(real[kept_real], generated[kept_generated])])

    return two_set_intervals(statistic, len(real), len(generated), real_groups, generated_groups)[0]


def ms_ssim_diversity(images: Images, num_pairs: int = 400, seed: int = 0) -> float:
    """Mean MS-SSIM over random pairs of images; above the real set's value, the images are too similar.

    Images are (N, C, H, W), N > 1, as stored or floats in [0, 1]; a pair has different images, drawn with replacement,
    and its value is the mean over channels. Uses as many of the five scales as fit an 11-pixel window (five above 160
    pixels, four above 80, three above 40, two above 20) and rescales their weights to a sum of 1, so compare only
    images of equal size.

    Source: Odena, Olah, Shlens: Conditional image synthesis with auxiliary classifier GANs, 2017, section 4.2.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # slow to import

    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(images), (num_pairs,), generator=generator)
    second = (first + torch.randint(1, len(images), (num_pairs,), generator=generator)) % len(images)
    side = min(images.shape[-2:])
    num_scales = max(1, sum((_SSIM_WINDOW - 1) * 2**scale < side for scale in range(len(_MS_SSIM_WEIGHTS))))
    weights = _MS_SSIM_WEIGHTS[:num_scales]
    betas = tuple(weight / sum(weights) for weight in weights)
    values = []
    for rows in torch.split(torch.stack([first, second]), _PAIRS_PER_BATCH, dim=1):
        pair = [images[own] for own in rows]
        one, other = map(to_floats, pair)
        for channel in range(images.shape[1]):
            own = slice(channel, channel + 1)
            value = multiscale_structural_similarity_index_measure(
                one[:, own], other[:, own], data_range=1.0, betas=betas, reduction="none"
            )
            values.append(value.reshape(-1))
    return float(torch.cat(values).double().mean())


def subsample(rows: Tensor, size: int) -> Tensor:
    """`size` of the rows (N, ...), spread evenly, so that a set sorted by class keeps its class proportions."""
    return rows[torch.arange(size) * len(rows) // size]


class _Neighbours:
    """Distances from each image of a set, with features (N, D), to its nearest images, itself included.

    Up to `num_left_out` of the images may be left out later.
    """

    def __init__(self, features: Tensor, num_left_out: int = 0) -> None:
        count = min(len(features), 1 + max(NEIGHBOURS, _DENSITY_NEIGHBOURS) + num_left_out)
        self.distances, self.rows = _distances(features, features).topk(count, largest=False)  # (N, count)

    def radii(self, kept: Tensor, k: int) -> Tensor:
        """Distance (n,) of each image in rows `kept` (n,) to the k-th nearest other image in them."""
        is_kept = torch.zeros(len(self.rows), dtype=torch.bool)
        is_kept[kept] = True
        places = (is_kept[self.rows[kept]].cumsum(dim=1) <= k).sum(dim=1)  # k and not k - 1: the nearest is itself
        return self.distances[kept, places]


def _prdc(
    between: Tensor, real: _Neighbours, generated: _Neighbours, kept_real: Tensor, kept_generated: Tensor
) -> Tensor:
    """The fields of `PRDC` (4,) of some rows; `between` (n, m) are their distances from real to generated images."""
    num_others = min(between.shape) - 1
    k = min(NEIGHBOURS, num_others)
    # The balls are closed in the first paper (precision and recall) and open in the second.
    inside_real = between <= real.radii(kept_real, k)[:, None]
    inside_generated = between <= generated.radii(kept_generated, k)[None, :]
    k = min(_DENSITY_NEIGHBOURS, num_others)
    inside = between < real.radii(kept_real, k)[:, None]
    shares = (inside_real.any(dim=0), inside_generated.any(dim=1), inside.sum(dim=0) / k, inside.any(dim=1))
    return torch.stack([share.double().mean() for share in shares])


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Euclidean distances (N, M) of features (N, D) and (M, D), float64."""
    # Not by inner products, whose rounding would give equal images a distance above 0.
    return torch.cdist(left.double(), right.double(), compute_mode="donot_use_mm_for_euclid_dist")
