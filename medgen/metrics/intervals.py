"""Confidence intervals of statistics over images, where images of one patient are left out together."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORMAL_QUANTILE = 1.959964  # two-sided 95 %
MAX_BLOCKS = 50  # of a set that are left out in turn, where recomputing the statistic takes time

Groups = Sequence[Hashable] | None  # a key for each image, such as its patient; None: every image is its own group


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, standard_error: float) -> "Interval":
        """Estimate ± 1.96 standard errors."""
        return cls(value, value - NORMAL_QUANTILE * standard_error, value + NORMAL_QUANTILE * standard_error)


def group_rows(count: int, groups: Groups) -> list[Tensor]:
    """Row numbers of each group of `count` images, in order of first appearance."""
    numbers = _group_numbers(count, groups)
    return list(torch.split(numbers.argsort(stable=True), torch.bincount(numbers).tolist()))


def _group_numbers(count: int, groups: Groups) -> Tensor:
    """The number of each image's group (count,), in order of first appearance."""
    keys = range(count) if groups is None else groups
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def leave_out_variance(estimates: Tensor) -> Tensor:
    """Jackknife variance from the statistic (G, ...) with each of G groups left out once.

    Source: Efron and Stein, The jackknife estimate of variance, 1981.
    """
    return (len(estimates) - 1) * estimates.var(dim=0, correction=0)


def mean_variance(values: Tensor, groups: Groups = None) -> float:
    """Jackknife variance of the mean of values (N,) over images, by group; 0 of a single group."""
    values, numbers = values.double(), _group_numbers(len(values), groups)
    sizes = torch.bincount(numbers)
    if len(sizes) < 2:
        return 0.0
    sums = torch.zeros(len(sizes), dtype=values.dtype).index_add_(0, numbers, values)
    return float(leave_out_variance((values.sum() - sums) / (len(values) - sizes)))


def mean_interval(values: Tensor, groups: Groups = None) -> Interval:
    """Mean of values (N,) over images, with an interval by group."""
    return Interval.of(float(values.double().mean()), mean_variance(values, groups) ** 0.5)


def two_set_intervals(
    statistic: Callable[[Tensor, Tensor], Tensor],
    num_real: int,
    num_generated: int,
    real_groups: Groups = None,
    generated_groups: Groups = None,
) -> list[Interval]:
    """Intervals of statistics of two sets of images by a delete-a-group jackknife over each.

    Groups are put into at most 50 blocks a set, by order of appearance in turn, and a block is left out at a time.

    Args:
        statistic: row numbers of real (n,) and of generated images (m,) -> the statistics' values (S,).
        num_real: N images.
        num_generated: M images.
        real_groups: N keys, such as each image's patient.
        generated_groups: M keys, where the second set is another set of real images.

    Returns:
        S intervals around the statistics of all images.

    Source: Kott, The delete-a-group jackknife, 2001.
    """
    sets = (torch.arange(num_real), torch.arange(num_generated))
    value = statistic(*sets).double()
    variance = torch.zeros_like(value)
    for which, groups in enumerate((real_groups, generated_groups)):
        members = group_rows(len(sets[which]), groups)
        num_blocks = min(MAX_BLOCKS, len(members))
        if num_blocks < 2:
            continue
        estimates = []
        for block in range(num_blocks):
            kept = torch.ones(len(sets[which]), dtype=torch.bool)
            kept[torch.cat(members[block::num_blocks])] = False
            rows = kept.nonzero()[:, 0]
            estimates.append(statistic(rows, sets[1]) if which == 0 else statistic(sets[0], rows))
        variance += leave_out_variance(torch.stack(estimates).double())
    return [Interval.of(float(v), float(e)) for v, e in zip(value, variance.sqrt(), strict=True)]
