"""Squared maximum mean discrepancy (MMD) of two sets of features, with an interval that counts patients.

Two kernels: the cubic one of the Kernel Inception Distance, the field's familiar number, and a Gaussian (RBF) one whose
bandwidth is fixed by the train images. The Gaussian one sees small faults of a generative model in far fewer images.

Images of one patient resemble one another. They are no independent draws, so pairs of one patient are left out of the
value, which they would bias upward, and a patient's images are left out of the jackknife together.

Shapes: N real images, M generated images, D features.
Sources: Gretton et al., A kernel two-sample test, 2012, eq. 3; Bińkowski et al., Demystifying MMD GANs, 2018.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.metrics.generation import thin
from medgen.metrics.intervals import Groups, Interval, group_rows, leave_out_variance, mean_variance

_ROWS_PER_BLOCK = 1024  # of a kernel matrix held at once
_MAX_BANDWIDTH_ROWS = 1000  # train images whose distances give the bandwidth

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Discrepancy:
    """Squared MMD of one model's samples and the real images, in the parts that a comparison of two models needs."""

    interval: Interval
    to_samples: Tensor  # (N,) mean kernel value of each real image with the samples
    among_samples: float  # mean kernel value of two samples
    sampling_variance: float  # of the squared MMD over draws of as many samples


def kid(real: Tensor, generated: Tensor, real_groups: Groups = None, generated_groups: Groups = None) -> Interval:
    """Kernel Inception Distance: unbiased squared MMD under the kernel (x·y / D + 1)³, over the whole sets.

    The interval is value ± 1.96 jackknife standard errors: each generated image, and each real one (or group
    of real ones), is left out in turn. It says how far the value would move with another draw of test images
    and of samples from the same model, not with another training. The jackknife errs on the wide side (Efron and
    Stein, The jackknife estimate of variance, 1981), most where the sets hardly differ.

    Args:
        real: (N, D) features.
        generated: (M, D) features.
        real_groups: N keys, such as each image's patient; None takes every image for a patient of its own.
        generated_groups: the same for the second set, where it is another set of real images.

    Returns:
        The value, slightly negative now and then where the sets are alike, and its interval.

    Raises:
        ValueError: fewer than three images or groups in a set.

    Source: Bińkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, 2018, section 4.
    """
    return _squared_mmd(real, generated, _cubic, real_groups, generated_groups).interval


def mmd(
    real: Tensor, generated: Tensor, bandwidth: float, real_groups: Groups = None, generated_groups: Groups = None
) -> Discrepancy:
    """Unbiased squared MMD under the kernel exp(-|x - y|² / (2 bandwidth²)); arguments and errors as of `kid`."""
    return _squared_mmd(real, generated, gaussian(bandwidth), real_groups, generated_groups)


def paired_mmd(real: Tensor, images: Tensor, bandwidth: float, groups: Groups = None) -> float:
    """Unbiased squared MMD of images and others made from them, such as their reconstructions; kernel as of `mmd`.

    An image resembles what is made from it, so pairs of one image, or of one group, count nowhere: 0 is expected where
    both sets have one distribution.

    Args:
        real: (N, D) features.
        images: (N, D) features, in the order of `real`.
        bandwidth: of the kernel.
        groups: N keys, such as each image's patient.

    Raises:
        ValueError: fewer than two groups.

    Source: Gretton et al., A kernel two-sample test, 2012, eq. 4.
    """
    members, kernel, real, images = group_rows(len(real), groups), gaussian(bandwidth), real.double(), images.double()
    if len(members) < 2:
        raise ValueError(f"groups: found {len(members)}, expected at least 2")

    def summed(x: Tensor, y: Tensor) -> float:
        within = _row_sums(x, x, kernel).sum() + _row_sums(y, y, kernel).sum()
        return float(within - 2.0 * _row_sums(x, y, kernel).sum())

    total = summed(real, images) - sum(summed(real[rows], images[rows]) for rows in members)
    return total / (len(real) ** 2 - sum(len(rows) ** 2 for rows in members))


def mmd_difference(first: Discrepancy, second: Discrepancy, real_groups: Groups = None) -> tuple[float, float]:
    """Squared MMD of one model minus another's over the same real images, and the standard error of the difference.

    The real images' own term cancels. The error adds a jackknife over patients of the rest to both models' sampling
    variance, which takes their samples for independent draws.
    """
    own = first.to_samples - second.to_samples
    difference = first.among_samples - second.among_samples - 2.0 * float(own.mean())
    variance = 4.0 * mean_variance(own, real_groups) + first.sampling_variance + second.sampling_variance
    return difference, variance**0.5


def median_distance(features: Tensor) -> float:
    """Median Euclidean distance of two images' features (N, D): the bandwidth of `mmd`, from train images."""
    return float(F.pdist(thin(features, min(len(features), _MAX_BANDWIDTH_ROWS)).double()).median())


def gaussian(bandwidth: float) -> Kernel:
    """The kernel exp(-|x - y|² / (2 bandwidth²)) of rows (A, D) and (B, D), as a function to (A, B)."""

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
    mean_real, variance_real = _one_set(real, kernel, group_rows(len(real), real_groups), to_samples)
    members = group_rows(len(generated), generated_groups)
    mean_generated, variance_generated = _one_set(generated, kernel, members, to_real)
    value = mean_real + mean_generated - 2.0 * float(to_samples.mean())
    interval = Interval.of(value, (variance_real + variance_generated) ** 0.5)
    return Discrepancy(interval, to_samples, mean_generated, variance_generated)


def _one_set(images: Tensor, kernel: Kernel, members: list[Tensor], between: Tensor) -> tuple[float, float]:
    """Mean kernel value of two images of different groups, and what the set adds to the variance of squared MMD.

    `between` (N,) averages an image's kernel over the other set. The other set's own mean is the same in every
    leave-out of the jackknife, so it is left away.
    """
    if len(members) < 3:
        raise ValueError(f"groups: found {len(members)}, expected at least 3, of which one is left out at a time")
    sums = _row_sums(images, images, kernel)  # with images of its own group too
    inside = torch.stack([kernel(images[rows], images[rows]).sum() for rows in members])
    sizes = torch.tensor([float(len(rows)) for rows in members], dtype=sums.dtype)
    total, pairs = sums.sum() - inside.sum(), sizes.sum() ** 2 - sizes.square().sum()
    # A group's pairs with other groups stand in the matrix twice, as rows and as columns.
    lost = 2.0 * (torch.stack([sums[rows].sum() for rows in members]) - inside)
    lost_between = torch.stack([between[rows].sum() for rows in members])
    num_left = sizes.sum() - sizes
    pairs_left = num_left**2 - (sizes.square().sum() - sizes.square())
    estimates = (total - lost) / pairs_left - 2.0 * (between.sum() - lost_between) / num_left
    return float(total / pairs), float(leave_out_variance(estimates))


def _row_sums(left: Tensor, right: Tensor, kernel: Kernel) -> Tensor:
    """Sum over `right` of the kernel with each of `left`: (N,)."""
    return torch.cat([kernel(rows, right).sum(dim=1) for rows in torch.split(left, _ROWS_PER_BLOCK)])
