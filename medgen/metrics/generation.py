"""How close a set of generated images comes to a set of real ones, mostly seen through features (N, D).

Whole sets are compared, never an image with its twin, so every value carries the sampling error of both
sets: read KID with its interval, and all of them beside the same comparison of two real sets.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS_PER_BLOCK = 1024  # of a kernel or distance matrix held at once
_NORMAL_QUANTILE = 1.959964  # two-sided 95 %
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest scale first
_SSIM_WINDOW = 11
_PAIRS_PER_BATCH = 128


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Manifold(NamedTuple):
    """How two sets lie in each other's neighbourhoods; 1 is best, density may exceed it."""

    precision: float
    recall: float
    density: float
    coverage: float


def kid(real: Tensor, generated: Tensor, real_groups: Sequence[Hashable] | None = None) -> Interval:
    """Kernel Inception Distance: unbiased squared MMD under the kernel (x·y / D + 1)³, over the whole sets.

    The interval is value ± 1.96 jackknife standard errors: each generated image, and each real one (or group
    of real ones), is left out in turn. It says how far the value would move with another draw of test images
    and of samples from the same model, not with another training. It needs no random numbers and no subset
    size (the spread of an average over random subsets follows from their size). The jackknife errs on the
    wide side (Efron and Stein, The jackknife estimate of variance, 1981), most where the sets hardly differ.

    Args:
        real: (N, D) features.
        generated: (M, D) features.
        real_groups: N keys, such as each image's patient. Images of one patient resemble one another: they
            are left out together, since as independent ones they would make the interval too narrow.

    Returns:
        The value, slightly negative now and then where the sets are alike, and its interval.

    Raises:
        ValueError: fewer than three images in a set, or a group that leaves fewer than two.

    Source: Bińkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, 2018, section 4.
    """
    if min(len(real), len(generated)) < 3:
        raise ValueError(f"kid: expected at least 3 images in each set, found {len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()
    between, between_transposed = _kernel_row_sums(real, generated), _kernel_row_sums(generated, real)
    within_real, within_generated = _kernel_row_sums(real, real), _kernel_row_sums(generated, generated)
    mean_real = within_real.sum() / (len(real) * (len(real) - 1))
    mean_generated = within_generated.sum() / (len(generated) * (len(generated) - 1))
    value = float(mean_real + mean_generated - 2 * between.mean() / len(generated))

    real_keys = range(len(real)) if real_groups is None else real_groups
    variance = _jackknife_variance(real, real_keys, within_real, between / len(generated))
    variance += _jackknife_variance(generated, range(len(generated)), within_generated, between_transposed / len(real))
    error = _NORMAL_QUANTILE * variance**0.5
    return Interval(value, value - error, value + error)


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of the Gaussians with the two sets' means and covariances, float64.

    Biased upward in small sets, the more the fewer images per feature: compare only sets of the same sizes.

    Args:
        real: (N, D) features, N > 1.
        generated: (M, D) features, M > 1.

    Returns:
        |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), at least 0.

    Source: Heusel et al.: GANs trained by a two time-scale update rule, 2017, eq. 6.
    """
    real, generated = real.double(), generated.double()
    shift = (real.mean(dim=0) - generated.mean(dim=0)).square().sum()
    covariance_real, covariance_generated = torch.cov(real.T), torch.cov(generated.T)
    # tr (Σ₁ Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½: symmetric, so no complex square root and no failing iteration.
    values, vectors = torch.linalg.eigh(covariance_real)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_generated @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(shift + covariance_real.trace() + covariance_generated.trace() - 2 * cross))


def manifold(real: Tensor, generated: Tensor, precision_neighbours: int = 3, density_neighbours: int = 5) -> Manifold:
    """Precision, recall, density and coverage from balls around each image up to its k-th nearest neighbour.

    All four change with the sizes of the sets, so the larger one is thinned evenly to the smaller one's size.

    Args:
        real: (N, D) features.
        generated: (M, D) features.
        precision_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage. Either is capped at the number of other images.

    Returns:
        precision: share of generated images inside a real image's ball; recall: the other way round;
        density: mean number of real balls around a generated image, over k; coverage: share of real balls
        that hold a generated image.

    Raises:
        ValueError: fewer than two images in a set.

    Sources: Kynkäänniemi et al.: Improved precision and recall metric, 2019, eq. 1-3 (k = 3);
    Naeem et al.: Reliable fidelity and diversity metrics, 2020, eq. 3 and 5 (k = 5).
    """
    size = min(len(real), len(generated))
    if size < 2:
        raise ValueError(f"manifold: expected at least 2 images in each set, found {len(real)} and {len(generated)}")
    real, generated = thin(real.double(), size), thin(generated.double(), size)
    distances = _distances(real, generated)  # (N, N): row real, column generated
    within_real, within_generated = _distances(real, real), _distances(generated, generated)
    k = min(precision_neighbours, size - 1)
    # The balls are closed in the first paper and open in the second.
    inside_real = distances <= _radii(within_real, k)[:, None]
    inside_generated = distances <= _radii(within_generated, k)[None, :]
    k = min(density_neighbours, size - 1)
    inside = distances < _radii(within_real, k)[:, None]
    return Manifold(
        precision=float(inside_real.any(dim=0).double().mean()),
        recall=float(inside_generated.any(dim=1).double().mean()),
        density=float(inside.double().sum(dim=0).mean() / k),
        coverage=float(inside.any(dim=1).double().mean()),
    )


def ms_ssim_diversity(images: Tensor, num_pairs: int = 1000, seed: int = 0) -> float:
    """Mean MS-SSIM over random pairs of a set: near the real set's value is good, above it the set is too alike.

    As many of the five scales are used as the image holds an 11-pixel window at (five above 160 pixels, four
    above 80, three above 40, two above 20), their weights rescaled to a sum of 1: compare at equal size only.

    Args:
        images: (N, C, H, W) in [0, 1], N > 1; a pair's value is the mean over its channels.
        num_pairs: pairs of two different images, drawn with replacement.
        seed: of the draw.

    Source: Odena, Olah, Shlens: Conditional image synthesis with auxiliary classifier GANs, 2017, section 4.2.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(images), (num_pairs,), generator=generator)
    second = (first + torch.randint(1, len(images), (num_pairs,), generator=generator)) % len(images)
    side = min(images.shape[-2:])
    num_scales = max(1, sum((_SSIM_WINDOW - 1) * 2**scale < side for scale in range(len(_MS_SSIM_WEIGHTS))))
    weights = _MS_SSIM_WEIGHTS[:num_scales]
    betas = tuple(weight / sum(weights) for weight in weights)
    channels = images.float().transpose(0, 1).unsqueeze(2)  # (C, N, 1, H, W)
    values = [
        multiscale_structural_similarity_index_measure(
            channel[a], channel[b], data_range=1.0, betas=betas, reduction="none"
        ).reshape(-1)
        for channel in channels
        for a, b in torch.split(torch.stack([first, second]), _PAIRS_PER_BATCH, dim=1)
    ]
    return float(torch.cat(values).double().mean())


def thin(rows: Tensor, size: int) -> Tensor:
    """`size` of the rows, spread evenly over all of them, so that a set sorted by class keeps its mix."""
    return rows[torch.arange(size) * len(rows) // size]


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T / left.shape[1] + 1.0) ** 3


def _kernel_row_sums(left: Tensor, right: Tensor) -> Tensor:
    """Sum over `right` of the kernel with each of `left`, without an image's kernel with itself: (N,)."""
    sums = torch.cat([_kernel(rows, right).sum(dim=1) for rows in torch.split(left, _ROWS_PER_BLOCK)])
    if left is right:
        sums -= (left.square().sum(dim=1) / left.shape[1] + 1.0) ** 3
    return sums


def _jackknife_variance(images: Tensor, keys: Sequence[Hashable], within: Tensor, between: Tensor) -> float:
    """What one of the two sets adds to the variance of squared MMD.

    `within` (N,) sums an image's kernel over the others of its set, `between` (N,) averages it over the other
    set. The other set's own mean is the same in every leave-out, so it is left away.
    """
    members: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        members.setdefault(key, []).append(position)
    num_left = len(images) - torch.tensor([len(rows) for rows in members.values()])
    if int(num_left.min()) < 2:
        raise ValueError(f"real_groups: one group leaves {num_left.min()} of {len(images)} images, expected 2 or more")
    # An image's row sum goes twice, as row and as column, and with it the pairs inside its group: those go once.
    lost = torch.stack([2 * within[rows].sum() - _inner_sum(images[rows]) for rows in members.values()])
    lost_between = torch.stack([between[rows].sum() for rows in members.values()])
    estimates = (within.sum() - lost) / (num_left * (num_left - 1)) - 2 * (between.sum() - lost_between) / num_left
    return float((len(estimates) - 1) * estimates.var(correction=0))


def _inner_sum(group: Tensor) -> Tensor:
    return _kernel_row_sums(group, group).sum() if len(group) > 1 else group.new_zeros(())


def _distances(left: Tensor, right: Tensor) -> Tensor:
    # Not through inner products: equal images must be at distance 0 exactly.
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(within: Tensor, neighbours: int) -> Tensor:
    """Distance of each image to its k-th nearest other one, from (N, N) to (N,)."""
    return within.kthvalue(neighbours + 1, dim=1).values  # the first is the image itself
