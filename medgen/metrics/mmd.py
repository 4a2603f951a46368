"""Squared maximum mean discrepancy (MMD) of two sets of features, with an interval by patient.

Two kernels: the cubic one of the Kernel Inception Distance (KID), and a Gaussian (RBF) one whose bandwidth is fixed by
the train images. The Gaussian kernel detects small faults of a generative model with far fewer images.

Images of one patient are not independent: their pairs would bias the value upward and are left out of it, and the
jackknife leaves them out together.

Shapes: N real images, M generated images, D features.
Sources: Gretton et al., A kernel two-sample test, 2012, eq. 3; Bińkowski et al., Demystifying MMD GANs, 2018.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.data.images import join_rows
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import Groups, Interval, group_rows, leave_out_variance, mean_variance

_VALUES_PER_BLOCK = 1 << 20  # of the kernel matrix in memory at once
MAX_BANDWIDTH_IMAGES = 1000  # train images whose distances give the bandwidth

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Discrepancy:
    """Squared MMD of a model's samples and real images, with the terms that `mmd_difference` needs."""

    interval: Interval
    to_samples: Tensor  # (N,) mean kernel value of each real image with the samples
    among_samples: float  # mean kernel value of two samples
    sampling_variance: float  # of the squared MMD over other draws of M samples


def kid(real: Tensor, generated: Tensor, real_groups: Groups = None, generated_groups: Groups = None) -> Interval:
    """Kernel Inception Distance: unbiased squared MMD under the kernel (x·y / D + 1)³ of features (N, D) and (M, D).

    The interval is the value ± 1.96 jackknife standard errors; each generated image and each real image (or group of
    real images) is left out in turn. It covers other draws of test images and of samples from the same model, not other
    trainings. The jackknife overestimates the variance (Efron and Stein, The jackknife estimate of variance, 1981),
    most if the sets hardly differ. The value may be slightly negative for similar sets. The second set has groups if it
    consists of real images too.

    Raises:
        ValueError: fewer than three images or groups in a set.

    Source: Bińkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, 2018, section 4.
    """
    return _squared_mmd(real, generated, _cubic, real_groups, generated_groups).interval


def mmd(
    real: Tensor, generated: Tensor, bandwidth: float, real_groups: Groups = None, generated_groups: Groups = None
) -> Discrepancy:
    """Unbiased squared MMD under the kernel exp(-|x - y|² / (2 bandwidth²)); arguments and errors as in `kid`."""
    return _squared_mmd(real, generated, gaussian(bandwidth), real_groups, generated_groups)


def paired_mmd(real: Tensor, images: Tensor, bandwidth: float, groups: Groups = None) -> float:
    """Unbiased squared MMD of features (N, D) of images and of their reconstructions, with the kernel of `mmd`.

    An image resembles its reconstruction, so pairs of one image or of one group are left out of all terms. The expected
    value is 0 if both sets have the same distribution.

    Raises:
        ValueError: fewer than two groups.

    Source: Gretton et al., A kernel two-sample test, 2012, eq. 4.
    """
    members, kernel, real, images = group_rows(len(real), groups), gaussian(bandwidth), real.double(), images.double()
    if len(members) < 2:
        raise ValueError(f"groups: found {len(members)}, expected at least 2")

    def kernel_sum(x: Tensor, y: Tensor) -> float:
        within = _row_sums(x, x, kernel).sum() + _row_sums(y, y, kernel).sum()
        return float(within - 2.0 * _row_sums(x, y, kernel).sum())

    total = kernel_sum(real, images) - sum(kernel_sum(real[rows], images[rows]) for rows in members)
    return total / (len(real) ** 2 - sum(len(rows) ** 2 for rows in members))


def mmd_difference(first: Discrepancy, second: Discrepancy, real_groups: Groups = None) -> tuple[float, float]:
    """Squared MMD of one model minus another's over the same real images, and the standard error of the difference.

    The term of the real images alone cancels. The error adds the sampling variance of both models, whose samples are
    taken as independent, to the jackknife variance over patients of the other terms.
    """
    to_samples = first.to_samples - second.to_samples
    difference = first.among_samples - second.among_samples - 2.0 * float(to_samples.mean())
    variance = 4.0 * mean_variance(to_samples, real_groups) + first.sampling_variance + second.sampling_variance
    return difference, variance**0.5


def median_distance(features: Tensor) -> float:
    """Median Euclidean distance between the features (N, D) of two images; of train images, the bandwidth of `mmd`.

    The mean where more than half of the distances are 0, and 1 where all are, as a bandwidth cannot be 0.
    """
    distances = F.pdist(subsample(features, min(len(features), MAX_BANDWIDTH_IMAGES)).double())
    return float(distances.median()) or float(distances.mean()) or 1.0


def gaussian(bandwidth: float) -> Kernel:
    """The kernel exp(-|x - y|² / (2 bandwidth²)), a function of rows (A, D) and (B, D) to (A, B)."""

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        squared = left.square().sum(1)[:, None] + right.square().sum(1)[None, :] - 2.0 * left @ right.T
        return torch.exp(squared.clamp_min(0.0) * (-0.5 / bandwidth**2))

    return kernel


def _cubic(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T / left.shape[1] + 1.0) ** 3


def _squared_mmd(
    real: Tensor, generated: Tensor, kernel: Kernel, real_groups: Groups, generated_groups: Groups
) -> Discrepancy:
    if min(len(real), len(generated)) < 3:
        raise ValueError(f"mmd: expected at least 3 images in each set, found {len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()
    to_samples = _row_sums(real, generated, kernel) / len(generated)
    to_real = _row_sums(generated, real, kernel) / len(real)
    mean_real, variance_real = _within_set(real, kernel, group_rows(len(real), real_groups), to_samples)
    members = group_rows(len(generated), generated_groups)
    mean_generated, variance_generated = _within_set(generated, kernel, members, to_real)
    value = mean_real + mean_generated - 2.0 * float(to_samples.mean())
    interval = Interval.from_error(value, (variance_real + variance_generated) ** 0.5)
    return Discrepancy(interval, to_samples, mean_generated, variance_generated)


def _within_set(images: Tensor, kernel: Kernel, members: list[Tensor], between: Tensor) -> tuple[float, float]:
    """Mean kernel value of two images of different groups, and the set's part of the variance of the squared MMD.

    `between` (N,) is the mean kernel value of each image with the other set. The mean within the other set is the same
    in every jackknife estimate and is omitted.
    """
    if len(members) < 3:
        raise ValueError(f"groups: found {len(members)}, expected at least 3, of which one is left out at a time")
    sums = _row_sums(images, images, kernel)  # includes images of the same group
    inside = torch.stack([kernel(images[rows], images[rows]).sum() for rows in members])
    sizes = torch.tensor([float(len(rows)) for rows in members], dtype=sums.dtype)
    total, pairs = sums.sum() - inside.sum(), sizes.sum() ** 2 - sizes.square().sum()
    # A group's pairs with other groups are in the matrix twice, as rows and as columns.
    lost = 2.0 * (torch.stack([sums[rows].sum() for rows in members]) - inside)
    lost_between = torch.stack([between[rows].sum() for rows in members])
    num_left = sizes.sum() - sizes
    pairs_left = num_left**2 - (sizes.square().sum() - sizes.square())
    estimates = (total - lost) / pairs_left - 2.0 * (between.sum() - lost_between) / num_left
    return float(total / pairs), float(leave_out_variance(estimates))


def _row_sums(left: Tensor, right: Tensor, kernel: Kernel) -> Tensor:
    """Sums (N,) over `right` (M, D) of the kernel with each row of `left` (N, D)."""
    blocks = torch.split(left, max(1, _VALUES_PER_BLOCK // len(right)))
    return join_rows((kernel(rows, right).sum(dim=1) for rows in blocks), len(left))
