"""Confidence intervals of statistics over images; the images of one patient are left out together."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORMAL_QUANTILE = 1.959964  # two-sided 95 %
DETECTABLE_ERRORS = 1.645 + 0.842  # difference, in standard errors, that a one-sided 5 % test finds 4 times out of 5
MAX_BLOCKS = 50  # jackknife blocks of a set, where recomputing the statistic is slow

Groups = Sequence[Hashable] | None  # one key for each image, such as its patient; None: every image is its own group


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def from_error(cls, value: float, standard_error: float) -> "Interval":
        """The estimate ± 1.96 standard errors."""
        return cls(value, value - NORMAL_QUANTILE * standard_error, value + NORMAL_QUANTILE * standard_error)


def interval_metrics(prefix: str, intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Metrics PREFIX/NAME, PREFIX/NAME_ci_low and PREFIX/NAME_ci_high of each interval."""
    return {
        f"{prefix}/{name}{suffix}": value
        for name, interval in intervals.items()
        for suffix, value in zip(("", "_ci_low", "_ci_high"), interval, strict=True)
    }


def group_rows(count: int, groups: Groups) -> list[Tensor]:
    """Row indices of each group of `count` images, in order of first appearance."""
    indices = group_indices(count, groups)
    return list(torch.split(indices.argsort(stable=True), torch.bincount(indices).tolist()))


def group_indices(count: int, groups: Groups) -> Tensor:
    """Index (count,) of each image's group, in order of first appearance."""
    keys = range(count) if groups is None else groups
    indices: dict[Hashable, int] = {}
    return torch.tensor([indices.setdefault(key, len(indices)) for key in keys])


def select_groups(groups: Groups, rows: Tensor) -> Groups:
    """Group keys of some rows; None if the images have none."""
    return None if groups is None else [groups[row] for row in rows.tolist()]


def leave_out_blocks(count: int, groups: Groups) -> Iterator[Tensor]:
    """Yield the rows of `count` images without one of at most 50 blocks, to which the groups are dealt in turn."""
    members = group_rows(count, groups)
    num_blocks = min(MAX_BLOCKS, len(members))
    for block in range(num_blocks):
        kept = torch.ones(count, dtype=torch.bool)
        kept[torch.cat(members[block::num_blocks])] = False
        yield kept.nonzero()[:, 0]


def largest_block(count: int, groups: Groups) -> int:
    """Largest number of images that `leave_out_blocks` leaves out at once."""
    return max(count - len(rows) for rows in leave_out_blocks(count, groups))


def leave_out_variance(estimates: Tensor) -> Tensor:
    """Jackknife variance (...) from the statistic (G, ...) with each of G groups left out once.

    Source: Efron and Stein, The jackknife estimate of variance, 1981.
    """
    return (len(estimates) - 1) * estimates.var(dim=0, correction=0)


def mean_variance(values: Tensor, groups: Groups = None) -> float:
    """Jackknife variance of the mean of values (N,) over images, by group; 0 for a single group."""
    values, indices = values.double(), group_indices(len(values), groups)
    sizes = torch.bincount(indices)
    if len(sizes) < 2:
        return 0.0
    sums = torch.zeros(len(sizes), dtype=values.dtype).index_add_(0, indices, values)
    return float(leave_out_variance((values.sum() - sums) / (len(values) - sizes)))


def mean_interval(values: Tensor, groups: Groups = None) -> Interval:
    """Mean of values (N,) over images, with its interval by group."""
    return Interval.from_error(float(values.double().mean()), mean_variance(values, groups) ** 0.5)


def two_set_intervals(
    statistic: Callable[[Tensor, Tensor], Tensor],
    num_real: int,
    num_generated: int,
    real_groups: Groups = None,
    generated_groups: Groups = None,
) -> list[Interval]:
    """Intervals around S statistics of two sets of images, by a delete-a-group jackknife over each set.

    `statistic` maps row indices of real (n,) and of generated images (m,) to the values of the statistics (S,); the
    generated images have groups if they are real images too.

    Source: Kott, The delete-a-group jackknife, 2001.
    """
    real, generated = torch.arange(num_real), torch.arange(num_generated)
    value = statistic(real, generated).double()
    variance = torch.zeros_like(value)
    for estimates in (
        [statistic(rows, generated) for rows in leave_out_blocks(num_real, real_groups) if len(rows)],
        [statistic(real, rows) for rows in leave_out_blocks(num_generated, generated_groups) if len(rows)],
    ):
        if estimates:  # none for a single group
            variance += leave_out_variance(torch.stack(estimates).double())
    return [Interval.from_error(float(v), float(e)) for v, e in zip(value, variance.sqrt(), strict=True)]
