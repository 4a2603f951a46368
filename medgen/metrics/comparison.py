"""Whether one generative model is worse than another, by the same held-out images.

Sample i of one model is paired with sample i of the other, made for the same label. Were both models the same, the two
of a pair could be swapped, so the difference of a statistic is compared with its values under random swaps. That is an
exact test for any statistic at any number of samples, and the noise of the held-out images, which are the same for
both models, mostly cancels.

Shapes: N held-out images, M samples of either model, D features, R radial frequencies, P permutations.
Source: Good, Permutation, parametric and bootstrap tests of hypotheses, 2005, chapter 3 (matched pairs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medgen.metrics.c2st import NUM_FOLDS, assign_folds, discriminant, placements
from medgen.metrics.features import NUM_CONTENT
from medgen.metrics.intervals import MAX_BLOCKS, NORMAL_QUANTILE, Groups, group_rows, leave_out_variance, mean_interval
from medgen.metrics.mmd import gaussian, mmd
from medgen.metrics.spectrum import log_power

NUM_PERMUTATIONS = 999
NEIGHBOURS = 3  # of recall, as in `medgen.metrics.generation.manifold`
_LISTED = 32  # nearest pooled samples of which NEIGHBOURS are of one model (all but surely)
_DETECTABLE = 1.645 + 0.842  # standard errors at which a one-sided test at 5 % refuses 80 % of the time
_PERMUTATIONS_PER_BLOCK = 100


@dataclass(frozen=True)
class ImageSet:
    """A set of images as the comparison sees them."""

    features: Tensor  # (N, D) by the domain extractor
    power: Tensor  # (N, R) radial power

    @property
    def content(self) -> Tensor:
        """The features (N, 96) that describe what the images show, and not how sharp they are."""
        return self.features[:, :NUM_CONTENT]


@dataclass(frozen=True)
class Comparison:
    """How much worse a candidate is than a reference model in one statistic."""

    name: str
    candidate: float
    reference: float
    difference: float  # positive where the candidate is worse
    low: float  # of the 95 % interval over other patients and samples
    high: float
    p: float  # one-sided, corrected for the number of statistics
    detectable: float  # the smallest difference that the test would find 4 times out of 5, uncorrected


class Statistic(Protocol):
    """A statistic of both models, whose difference under swaps is asked for."""

    higher_is_worse: bool

    def differences(self, signs: Tensor, kept: Tensor) -> Tensor:
        """Candidate minus reference (P,) after the swaps `signs` (P, M; 1 as it is, -1 swapped).

        `kept` (n,) are the rows of the held-out images that count.
        """
        ...

    def both(self) -> tuple[float, float]:
        """The statistic of the candidate and of the reference, as they are."""
        ...


def compare(
    candidate: ImageSet,
    reference: ImageSet,
    held_out: ImageSet,
    bandwidth: float,
    groups: Groups = None,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> list[Comparison]:
    """Tests whether the candidate's samples are farther from the held-out images than those of the reference model.

    Four statistics: squared RBF-MMD, the log-spectrum distance, the AUC of a linear classifier and recall. The last two
    look at the content alone: by their quality a classifier tells the samples of most models from real images every
    time, and both models would have the same AUC of 1 and recall of 0. p-values are Holm-corrected: where any is below
    0.05 the candidate is worse, and of two equal models that happens in at most 5 % of cases.

    Args:
        candidate, reference: M samples each, pair by pair.
        held_out: real images.
        bandwidth: of the MMD's kernel.
        groups: N keys, each held-out image's patient.
        num_permutations: random swaps.
        seed: of the swaps.

    Raises:
        ValueError: the models have different numbers of samples.
    """
    size = len(candidate.features)
    if size != len(reference.features):
        raise ValueError(f"compare: expected as many samples of each model, found {size}, {len(reference.features)}")
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (num_permutations + 1, size), generator=generator).float() - 1.0
    signs[0] = 1.0
    statistics: dict[str, Statistic] = {
        "mmd": _MMD(candidate, reference, held_out, bandwidth, groups),
        "spectrum": _Spectrum(candidate, reference, held_out),
        "c2st": _C2ST(candidate, reference, held_out, groups),
        "recall": _Recall(candidate, reference, held_out),
    }
    found = [_test(name, statistic, signs, len(held_out.features), groups) for name, statistic in statistics.items()]
    corrected = holm([one.p for one in found])
    return [Comparison(**{**vars(one), "p": p}) for one, p in zip(found, corrected, strict=True)]


def compare_means(name: str, candidate: Tensor, reference: Tensor, groups: Groups = None) -> Comparison:
    """Compares the means of a score of each held-out image (N,), where higher is better, such as SSIM.

    p is one-sided and from the interval by patient, without a permutation: both models rebuild the same images.
    """
    own, other = mean_interval(candidate), mean_interval(reference)
    paired = mean_interval(reference.double() - candidate.double(), groups)
    error = (paired.high - paired.value) / NORMAL_QUANTILE
    p = float(torch.special.ndtr(torch.tensor(-paired.value / error))) if error > 0 else float(paired.value <= 0)
    return Comparison(name, own.value, other.value, *paired, p, _DETECTABLE * error)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        corrected[index] = highest
    return corrected


def _test(name: str, statistic: Statistic, signs: Tensor, num_held_out: int, groups: Groups) -> Comparison:
    """One statistic, p not yet corrected."""
    everyone, way = torch.arange(num_held_out), 1.0 if statistic.higher_is_worse else -1.0
    parts = torch.split(signs, _PERMUTATIONS_PER_BLOCK)
    values = way * torch.cat([statistic.differences(part, everyone) for part in parts])
    difference, under_swaps = float(values[0]), values[1:]
    p = (1 + int((under_swaps >= difference - 1e-12).sum())) / len(values)
    spread = float(under_swaps.std(correction=0))
    members = group_rows(num_held_out, groups)
    num_blocks = min(MAX_BLOCKS, len(members))
    without = []
    for block in range(num_blocks):
        kept = torch.ones(num_held_out, dtype=torch.bool)
        kept[torch.cat(members[block::num_blocks])] = False
        without.append(statistic.differences(signs[:1], kept.nonzero()[:, 0]))
    error = (spread**2 + float(leave_out_variance(torch.cat(without)))) ** 0.5
    low, high = difference - NORMAL_QUANTILE * error, difference + NORMAL_QUANTILE * error
    return Comparison(name, *statistic.both(), difference, low, high, p, _DETECTABLE * spread)


class _MMD:
    """Squared RBF-MMD, in which the real images' own term cancels.

    With x the candidate's samples, y the reference's and s = ±1 their swaps, the difference is linear in s: the terms
    in s_i s_j are the same for both models.
    """

    higher_is_worse = True

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
        of_pair = self.within - 2.0 * self.to_real[:, kept].mean(1) / len(self.within)
        found: Tensor = signs.double() @ of_pair
        return found

    def both(self) -> tuple[float, float]:
        real, *models = self.sets
        own, other = (mmd(real, model.features, self.bandwidth, self.groups).interval.value for model in models)
        return own, other


class _Both:
    """A statistic whose values are had for both models at once."""

    num_samples: int
    num_held_out: int

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        """Values (2, P) of candidate and reference; arguments as of `Statistic.differences`."""
        raise NotImplementedError

    def differences(self, signs: Tensor, kept: Tensor) -> Tensor:
        own, other = self.values(signs, kept).unbind()
        return own - other

    def both(self) -> tuple[float, float]:
        own, other = self.values(torch.ones(1, self.num_samples), torch.arange(self.num_held_out))[:, 0].tolist()
        return own, other


class _Spectrum(_Both):
    """`spectrum_distance` of each model."""

    higher_is_worse = True

    def __init__(self, candidate: ImageSet, reference: ImageSet, held_out: ImageSet) -> None:
        self.total = (candidate.power.double() + reference.power.double()).mean(0)  # (R,) of both together
        self.difference = (candidate.power.double() - reference.power.double()) / len(candidate.power)  # (M, R)
        self.real = held_out.power.double()
        self.num_samples, self.num_held_out = len(candidate.power), len(self.real)

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        moved = signs.double() @ self.difference
        real = log_power(self.real[kept].mean(0))
        spectra = [log_power(0.5 * (self.total + way * moved)) for way in (1.0, -1.0)]
        return torch.stack([(spectrum - real).square().mean(1).sqrt() for spectrum in spectra])


class _C2ST(_Both):
    """Cross-validated AUC of a linear discriminant on features of the content.

    Sums and second moments of a model's samples are linear in the swaps, so that each fold's are added up once.
    """

    higher_is_worse = True

    def __init__(self, candidate: ImageSet, reference: ImageSet, held_out: ImageSet, groups: Groups) -> None:
        scale = held_out.content.std(0, correction=0).clamp_min(1e-6)
        self.x, self.y, self.real = (images.content / scale for images in (candidate, reference, held_out))
        self.real_folds = assign_folds(len(self.real), groups)
        self.folds = [torch.arange(fold, len(self.x), NUM_FOLDS) for fold in range(NUM_FOLDS)]
        self.num_samples, self.num_held_out = len(self.x), len(self.real)

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        real, real_folds = self.real[kept], self.real_folds[kept]
        moments = [_moments(self.x[rows], self.y[rows], signs[:, rows]) for rows in self.folds]
        totals = [torch.stack(parts).sum(0) for parts in zip(*moments, strict=True)]
        auc = torch.zeros(2, len(signs), dtype=torch.float64)
        for fold, rows in enumerate(self.folds):
            held = real_folds == fold
            mean_real, cov_real = real[~held].mean(0), torch.cov(real[~held].T, correction=0)
            mean, mean_way, square, square_way = (
                (total - own) / (len(self.x) - len(rows)) for total, own in zip(totals, moments[fold], strict=True)
            )
            swapped = signs[:, rows] < 0
            for model, way in enumerate((1.0, -1.0)):
                centre = mean + way * mean_way  # (P, D)
                cov = square + way * square_way - centre[:, :, None] * centre[:, None, :]
                direction = discriminant(mean_real, cov_real, centre, cov)
                of_x, of_y = direction @ self.x[rows].T, direction @ self.y[rows].T  # (P, m)
                scores = torch.where(swapped == (way > 0), of_y, of_x)
                auc[model] += placements(direction @ real[held].T, scores)[0].sum(1) / len(real)
        return auc


def _moments(x: Tensor, y: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over pairs of (x + y) / 2 (D,) and signs (x - y) / 2 (P, D), and the same of outer products."""
    squares = torch.stack([(x.T * row) @ x - (y.T * row) @ y for row in signs])
    return 0.5 * (x + y).sum(0), 0.5 * signs @ (x - y), 0.5 * (x.T @ x + y.T @ y), 0.5 * squares


class _Recall(_Both):
    """Recall of the content by balls around samples, at all M of them."""

    higher_is_worse = False

    def __init__(self, candidate: ImageSet, reference: ImageSet, held_out: ImageSet) -> None:
        pooled = torch.cat([candidate.content, reference.content])
        nearest = torch.cdist(pooled, pooled)
        nearest.fill_diagonal_(torch.inf)
        self.distances, self.listed = nearest.topk(min(_LISTED, len(pooled) - 1), dim=1, largest=False)
        to_real = torch.cdist(pooled, held_out.content)  # (2M, N)
        # A ball reaches no farther than its last listed sample, so few pairs can ever count.
        self.sample, self.covered = (to_real <= self.distances[:, -1:]).nonzero().unbind(1)
        self.to_real = to_real[self.sample, self.covered]
        self.num_samples, self.num_held_out = len(candidate.features), len(held_out.features)

    def values(self, signs: Tensor, kept: Tensor) -> Tensor:
        values = []
        for row in signs > 0:
            own = torch.cat([row, ~row])  # pooled samples of the candidate, after the swaps
            values.append(torch.stack([self._recall(own, kept), self._recall(~own, kept)]))
        return torch.stack(values, dim=1)

    def _recall(self, own: Tensor, kept: Tensor) -> Tensor:
        count = own[self.listed].cumsum(1)
        position = (count < NEIGHBOURS).sum(1).clamp(max=count.shape[1] - 1)
        radii = self.distances.gather(1, position[:, None])[:, 0]
        inside = own[self.sample] & (self.to_real <= radii[self.sample])
        reached = torch.zeros(self.num_held_out, dtype=torch.bool)
        reached[self.covered[inside]] = True
        return reached[kept].double().mean()
