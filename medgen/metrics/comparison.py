"""Permutation tests of whether one generative model is worse than another on the same held-out images.

Sample i of one model is paired with sample i of the other, generated for the same label. If both models were equal, the
two samples of a pair could be swapped, so the difference of a statistic is compared with its values under random swaps.
The test is exact for any statistic and any number of samples, and most of the noise of the held-out images, which are
the same for both models, cancels.

Shapes: N held-out images, M samples of either model, D features, R radial frequencies, P permutations.
Source: Good, Permutation, parametric and bootstrap tests of hypotheses, 2005, chapter 3 (matched pairs).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medgen.metrics.c2st import NUM_FOLDS, assign_folds, discriminant, placements
from medgen.metrics.features import NUM_CONTENT
from medgen.metrics.generation import NEIGHBOURS
from medgen.metrics.intervals import (
    DETECTABLE_ERRORS,
    NORMAL_QUANTILE,
    Groups,
    leave_out_blocks,
    leave_out_variance,
    mean_interval,
)
from medgen.metrics.mmd import gaussian, mmd
from medgen.metrics.spectrum import log_power

NUM_PERMUTATIONS = 999
_NUM_NEAREST = 32  # nearest pooled samples that are kept; almost surely NEIGHBOURS of them belong to each model
_PERMUTATIONS_PER_BLOCK = 100


@dataclass(frozen=True)
class ImageSet:
    """Features and spectra of a set of images."""

    features: Tensor  # (N, D) of the domain extractor
    power: Tensor  # (N, R) radial power

    @property
    def content(self) -> Tensor:
        """The features (N, 96) of the images' content, without those of their sharpness and noise."""
        return self.features[:, :NUM_CONTENT]


@dataclass(frozen=True)
class Comparison:
    """One statistic of a candidate and a reference model, and the test of their difference."""

    name: str
    candidate: float
    reference: float
    difference: float  # positive if the candidate is worse
    low: float  # lower end of the 95 % interval over other patients and samples
    high: float
    p: float  # one-sided, corrected for the number of statistics
    detectable: float  # smallest difference that the uncorrected test finds 4 times out of 5


def compare(
    candidate: ImageSet,
    reference: ImageSet,
    held_out: ImageSet,
    bandwidth: float,
    groups: Groups = None,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> list[Comparison]:
    """Test whether the candidate's samples are farther from the held-out images than the reference model's are.

    Four statistics: squared RBF-MMD, the log-spectrum distance, the AUC of a linear classifier, and recall. The last
    two use the content features alone: by the quality features a classifier recognises the samples of most models every
    time, so both models would have an AUC of 1 and a recall of 0. p-values are Holm-corrected: if any is below 0.05 the
    candidate is worse; for two equal models this happens in at most 5 % of cases.

    Row i of the candidate is paired with row i of the reference; `groups` are N keys, such as each held-out image's
    patient; `bandwidth` is that of the MMD kernel.

    Returns:
        One `Comparison` for each of mmd, spectrum, c2st and recall.

    Raises:
        ValueError: the models have different numbers of samples.
    """
    size = len(candidate.features)
    if size != len(reference.features):
        raise ValueError(f"compare: expected as many samples of each model, found {size}, {len(reference.features)}")
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (num_permutations + 1, size), generator=generator).float() - 1.0
    signs[0] = 1.0
    statistics: dict[str, _Statistic] = {
        "mmd": _MMD(candidate, reference, held_out, bandwidth, groups),
        "spectrum": _Spectrum(candidate, reference, held_out),
        "c2st": _C2ST(candidate, reference, held_out, groups),
        "recall": _Recall(candidate, reference, held_out),
    }
    results = [
        _permutation_test(name, statistic, signs, len(held_out.features), groups)
        for name, statistic in statistics.items()
    ]
    corrected = holm([result.p for result in results])
    return [replace(result, p=p) for result, p in zip(results, corrected, strict=True)]


def compare_means(name: str, candidate: Tensor, reference: Tensor, groups: Groups = None) -> Comparison:
    """Compare the means of a score of each held-out image (N,), higher being better, such as SSIM.

    Both models reconstruct the same images, so the one-sided p comes from the paired differences and their standard
    error by patient, without permutations.
    """
    ours, theirs = mean_interval(candidate), mean_interval(reference)
    paired = mean_interval(reference.double() - candidate.double(), groups)
    error = (paired.high - paired.value) / NORMAL_QUANTILE
    p = float(torch.special.ndtr(torch.tensor(-paired.value / error))) if error > 0 else float(paired.value <= 0)
    return Comparison(name, ours.value, theirs.value, *paired, p, DETECTABLE_ERRORS * error)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests, in the order given.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        corrected[index] = highest
    return corrected


def _permutation_test(
    name: str, statistic: "_Statistic", signs: Tensor, num_held_out: int, groups: Groups
) -> Comparison:
    """The test of one statistic, with p not yet corrected; row 0 of `signs` swaps nothing."""
    all_rows, parts = torch.arange(num_held_out), torch.split(signs, _PERMUTATIONS_PER_BLOCK)
    values = torch.cat([statistic.differences(part, all_rows) for part in parts])
    values = values if statistic.higher_is_worse else -values
    difference, under_swaps = float(values[0]), values[1:]
    p = (1 + int((under_swaps >= difference - 1e-12).sum())) / len(values)
    spread = float(under_swaps.std(correction=0))
    leave_one_out = [statistic.differences(signs[:1], rows) for rows in leave_out_blocks(num_held_out, groups)]
    error = (spread**2 + float(leave_out_variance(torch.cat(leave_one_out)))) ** 0.5
    low, high = difference - NORMAL_QUANTILE * error, difference + NORMAL_QUANTILE * error
    return Comparison(name, *statistic.observed(), difference, low, high, p, DETECTABLE_ERRORS * spread)


class _Statistic:
    """A statistic of both models, and its differences after swaps."""

    higher_is_worse = True

    def __init__(self, candidate: ImageSet, held_out: ImageSet) -> None:
        self.num_samples, self.num_held_out = len(candidate.features), len(held_out.features)

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        """Values (2, P) of candidate and reference; arguments as in `differences`."""
        raise NotImplementedError

    def differences(self, signs: Tensor, kept: Tensor) -> Tensor:
        """Candidate minus reference (P,) after the swaps `signs` (P, M), 1 for unchanged and -1 for swapped.

        `kept` (n,) are the rows of the held-out images to use.
        """
        ours, theirs = self.values(signs, kept).unbind()
        return ours - theirs

    def observed(self) -> tuple[float, float]:
        """The statistic of the candidate and of the reference, without swaps."""
        ours, theirs = self.values(torch.ones(1, self.num_samples), torch.arange(self.num_held_out))[:, 0].tolist()
        return ours, theirs


class _MMD(_Statistic):
    """Squared RBF-MMD; the term of the real images alone cancels in the difference.

    With x the candidate's samples, y the reference's and s = ±1 their swaps, the difference is linear in s, since the
    terms in s_i s_j are the same for both models.
    """

    def __init__(
        self, candidate: ImageSet, reference: ImageSet, held_out: ImageSet, bandwidth: float, groups: Groups
    ) -> None:
        self.sets, self.bandwidth, self.groups = (held_out.features, candidate, reference), bandwidth, groups
        kernel, size = gaussian(bandwidth), len(candidate.features)
        x, y, real = (images.features.double() for images in (candidate, reference, held_out))
        self.to_real = kernel(x, real) - kernel(y, real)  # (M, N)
        across = kernel(x, y)
        own = kernel(x, x).sum(1) - kernel(y, y).sum(1)  # the diagonals cancel
        self.within = (own + across.sum(1) - across.sum(0)) / (size * (size - 1))

    def differences(self, signs: Tensor, kept: Tensor) -> Tensor:
        pairs = self.within - 2.0 * self.to_real[:, kept].mean(1) / len(self.within)
        differences: Tensor = signs.double() @ pairs
        return differences

    def observed(self) -> tuple[float, float]:
        real, *models = self.sets
        ours, theirs = (mmd(real, model.features, self.bandwidth, self.groups).interval.value for model in models)
        return ours, theirs


class _Spectrum(_Statistic):
    """`spectrum_distance` of each model."""

    def __init__(self, candidate: ImageSet, reference: ImageSet, held_out: ImageSet) -> None:
        super().__init__(candidate, held_out)
        self.total = (candidate.power.double() + reference.power.double()).mean(0)  # (R,) of both models
        self.difference = (candidate.power.double() - reference.power.double()) / len(candidate.power)  # (M, R)
        self.real = held_out.power.double()

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        shift = signs.double() @ self.difference
        real = log_power(self.real[kept].mean(0))
        spectra = [log_power(0.5 * (self.total + sign * shift)) for sign in (1.0, -1.0)]
        return torch.stack([(spectrum - real).square().mean(1).sqrt() for spectrum in spectra])


class _C2ST(_Statistic):
    """Cross-validated AUC of a linear discriminant on the content features.

    Sums and second moments of a model's samples are linear in the swaps, so those of each fold are computed once.
    """

    def __init__(self, candidate: ImageSet, reference: ImageSet, held_out: ImageSet, groups: Groups) -> None:
        super().__init__(candidate, held_out)
        scale = held_out.content.std(0, correction=0).clamp_min(1e-6)
        self.x, self.y, self.real = (images.content / scale for images in (candidate, reference, held_out))
        self.real_folds = assign_folds(len(self.real), groups)
        self.folds = [torch.arange(fold, len(self.x), NUM_FOLDS) for fold in range(NUM_FOLDS)]

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        real, real_folds = self.real[kept], self.real_folds[kept]
        moments = [_moments(self.x[rows], self.y[rows], signs[:, rows]) for rows in self.folds]
        totals = [torch.stack(parts).sum(0) for parts in zip(*moments, strict=True)]
        auc = torch.zeros(2, len(signs), dtype=torch.float64)
        for fold, rows in enumerate(self.folds):
            tested = real_folds == fold
            mean_real, cov_real = real[~tested].mean(0), torch.cov(real[~tested].T, correction=0)
            mean, mean_signed, square, square_signed = (
                (total - part) / (len(self.x) - len(rows)) for total, part in zip(totals, moments[fold], strict=True)
            )
            swapped = signs[:, rows] < 0
            for model, sign in enumerate((1.0, -1.0)):
                centre = mean + sign * mean_signed  # (P, D)
                cov = square + sign * square_signed - centre[:, :, None] * centre[:, None, :]
                direction = discriminant(mean_real, cov_real, centre, cov)
                scores_x, scores_y = direction @ self.x[rows].T, direction @ self.y[rows].T  # (P, m)
                scores = torch.where(swapped == (sign > 0), scores_y, scores_x)
                auc[model] += placements(direction @ real[tested].T, scores)[0].sum(1) / len(real)
        return auc


def _moments(x: Tensor, y: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over pairs of (x + y) / 2 (D,) and of signs (x - y) / 2 (P, D), and the same of outer products."""
    squares = torch.stack([(x.T * row) @ x - (y.T * row) @ y for row in signs])
    return 0.5 * (x + y).sum(0), 0.5 * signs @ (x - y), 0.5 * (x.T @ x + y.T @ y), 0.5 * squares


class _Recall(_Statistic):
    """Recall of the content features, by balls around all M samples of a model."""

    higher_is_worse = False

    def __init__(self, candidate: ImageSet, reference: ImageSet, held_out: ImageSet) -> None:
        super().__init__(candidate, held_out)
        pooled = torch.cat([candidate.content, reference.content])
        nearest = torch.cdist(pooled, pooled)
        nearest.fill_diagonal_(torch.inf)
        self.distances, self.nearest = nearest.topk(min(_NUM_NEAREST, len(pooled) - 1), dim=1, largest=False)
        to_real = torch.cdist(pooled, held_out.content)  # (2M, N)
        # No ball is larger than the distance to its last kept neighbour, so all other pairs can be dropped.
        self.sample, self.covered = (to_real <= self.distances[:, -1:]).nonzero().unbind(1)
        self.to_real = to_real[self.sample, self.covered]

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        values = []
        for row in signs > 0:
            candidate = torch.cat([row, ~row])  # (2M,) pooled samples of the candidate after the swaps
            values.append(torch.stack([self._recall(candidate, kept), self._recall(~candidate, kept)]))
        return torch.stack(values, dim=1)

    def _recall(self, members: Tensor, kept: Tensor) -> Tensor:
        """Recall of the model that has these pooled samples, (2M,) booleans."""
        count = members[self.nearest].cumsum(1)
        position = (count < NEIGHBOURS).sum(1).clamp(max=count.shape[1] - 1)
        radii = self.distances.gather(1, position[:, None])[:, 0]
        inside = members[self.sample] & (self.to_real <= radii[self.sample])
        reached = torch.zeros(self.num_held_out, dtype=torch.bool)
        reached[self.covered[inside]] = True
        return reached[kept].double().mean()
