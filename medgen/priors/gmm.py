"""`gmm`: a Gaussian mixture fitted to the latents of the train split after the model's training.

Ex-post density estimation: Ghosh et al., From Variational to Deterministic Autoencoders, 2020, section 4.
Latents have too many dimensions to fit a mixture in all of them. The mixture is fitted in the first K principal axes,
whitened; the residual axes are independent Gaussians with each class's own mean and variances, which keep the fine
detail of the images.

Clusters are found by k-means in the leading axes, unwhitened: in whitened axes they are no wider apart than noise. A
component's covariance is the mean of its own and the class's pooled one, shrunk slightly towards the diagonal so that
it stays invertible. Alone, a cluster's own covariance overfits, and a class would get a single component, whose draws
mix the clusters: MRI slices of different planes, for example (docs/results.md). The number of components is chosen per
class by the likelihood of a held-out fifth of the patients' images; then all images of the class are fitted.

Shapes: N latents, D dimensions of a latent, R axes, of which K under the mixture and S = R - K residual ones,
M components over all classes.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from medgen.config import Prior
from medgen.console import say, warn
from medgen.priors.axes import (
    LOG_TAU,
    LatentArray,
    PrincipalAxes,
    chunk_size,
    chunks,
    constant_latents_error,
    num_axes,
    spread,
)
from medgen.priors.gaussian import add_noise, class_frequencies, posterior_noise

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

RARE = 50  # a class with fewer images gets its own mean and the covariance of all classes
_FOLDS = 5  # one part in so many is held out to choose the number of components
_ROWS_PER_COMPONENT = 10  # fewer are too few even for variances
_STARTS = 4  # of k-means
_LEADING = 50  # axes that decide clusters and their number: in more, a held-out likelihood mostly measures noise
_POOLING = 0.5  # weight of the class's pooled covariance in that of a component
_SHRINKAGE = 0.05  # of a covariance towards its diagonal
_VARIANCE_FLOOR = 1e-2  # of a whitened coordinate, whose variance is 1
_MAX_CLUSTERED = 100_000  # images of a class that k-means works on
_MAX_FACTORS = 1 << 26  # values of the covariances of all components: 256 MB
_RESIDUAL_SHARE = 0.999  # of the variance; the axes after that would double the file and change nothing visible
_TENSORS = ("noise", "frequencies", "weights", "owners", "centres", "factors", "residual_means", "residual_scales")


@dataclass(frozen=True)
class _Mixture:
    """The mixture of one class in whitened coordinates, float64."""

    weights: Tensor  # (M,)
    centres: Tensor  # (M, K)
    scatters: Tensor  # (M, K, K)

    def covariances(self) -> Tensor:
        diagonal = torch.diag_embed(self.scatters.diagonal(dim1=1, dim2=2) + _VARIANCE_FLOOR)
        return (1.0 - _SHRINKAGE) * self.scatters + _SHRINKAGE * diagonal


class _Moments:
    """Sums over the rows of one class, by cluster: one pass over latents that are not in memory at once."""

    def __init__(self, clusters: int, num_axes: int, kept: int) -> None:
        self.counts = torch.zeros(clusters, dtype=torch.float64)
        self.sums = torch.zeros(clusters, num_axes, dtype=torch.float64)
        self.squares = torch.zeros(num_axes, dtype=torch.float64)
        self.products = torch.zeros(clusters, kept, kept, dtype=torch.float64)

    def add(self, white: Tensor, clusters: Tensor) -> None:
        """Add whitened coordinates (n, R) and the clusters (n,) that they belong to."""
        self.squares += white.square().sum(0)
        kept = self.products.shape[1]
        for cluster in range(len(self.counts)):
            rows = white[clusters == cluster]
            self.counts[cluster] += len(rows)
            self.sums[cluster] += rows.sum(0)
            self.products[cluster] += rows[:, :kept].T @ rows[:, :kept]

    def mixture(self) -> _Mixture:
        """The mixture of the clusters that have rows."""
        rows, kept = self.counts > 0, self.products.shape[1]
        counts = self.counts[rows]
        centres, weights = self.sums[rows, :kept] / counts[:, None], counts / counts.sum()
        scatters = self.products[rows] / counts[:, None, None] - centres[:, :, None] * centres[:, None, :]
        pooled = (weights[:, None, None] * scatters).sum(0)
        return _Mixture(weights, centres, torch.lerp(scatters, pooled.expand_as(scatters), _POOLING))

    def mean(self) -> Tensor:
        """Mean (R,) of all rows."""
        return self.sums.sum(0) / self.counts.sum()

    def scatter(self) -> Tensor:
        """Sum (K, K) over all rows of the products of their differences from the mean."""
        mean = self.mean()[: self.products.shape[1]]
        return self.products.sum(0) - self.counts.sum() * mean[:, None] * mean

    def deviations(self) -> Tensor:
        """Sum (R,) over all rows of the squares of their differences from the mean."""
        return (self.squares - self.counts.sum() * self.mean().square()).clamp_min(0.0)


@dataclass(frozen=True)
class _ClassFit:
    """The fit of one class."""

    mixture: _Mixture
    residual_mean: Tensor  # (S,)
    residual_scale: Tensor  # (S,)
    choice: dict[str, Any]  # class, rows, components, held_out


class GaussianMixture:
    """Gaussian mixture over principal coordinates; one per class if `conditional`."""

    name: ClassVar[str] = "gmm"

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        tensors: Mapping[str, Tensor],
        choices: list[dict[str, Any]],
    ) -> None:
        self.latent_shape = latent_shape
        self.choices = choices  # one entry per fitted class: class, rows, components, held_out
        self.axes = PrincipalAxes.restore(tensors)
        self.noise = tensors["noise"]  # (D,) root of the mean posterior variance; empty without one
        self.frequencies = tensors["frequencies"]  # (num_classes,)
        self.weights = tensors["weights"]  # (M,) over all classes, sum 1
        self.owners = tensors["owners"]  # (M,) int64, the class of a component; -1 if not conditional
        self.centres = tensors["centres"]  # (M, K)
        self.factors = tensors["factors"]  # (M, K, K) Cholesky factors, lower
        shape = len(self.centres), len(self.axes.scales) - self.centres.shape[1]
        # older files lack the tensors of the residual axes and have one Gaussian for all classes there
        self.residual_means = tensors.get("residual_means", torch.zeros(shape))  # (M, S)
        self.residual_scales = tensors.get("residual_scales", torch.ones(shape))  # (M, S) standard deviations

    @property
    def conditional(self) -> bool:
        """True if samples depend on the label."""
        return bool((self.owners >= 0).any())

    @classmethod
    def fit(
        cls,
        latents: LatentArray,
        labels: Tensor | None,
        num_classes: int,
        params: Prior,
        variance: Tensor | None = None,
        patients: Sequence[str] | None = None,
    ) -> Self:
        """See `medgen.priors.AnalyticPrior.fit`. Unlabelled rows only affect the axes if other rows are labelled."""
        axes = PrincipalAxes.fit(latents, max(_RESIDUAL_SHARE, params.variance_kept))
        if len(axes.scales) == 0:
            raise constant_latents_error(latents)
        kept = num_axes(axes.scales.square(), params.variance_kept)
        patient_ids = torch.arange(len(latents))
        if patients is not None:
            patient_ids = torch.from_numpy(np.unique(np.array(patients), return_inverse=True)[1])
        frequencies = class_frequencies(labels, num_classes)
        owners = torch.full((len(latents),), -1)
        if params.conditional and labels is not None and len(frequencies):
            owners = torch.where(labels < 0, num_classes, labels).cpu()  # unlabelled images belong to no mixture
        names = [c for c in range(-1, num_classes) if bool((owners == c).any())]
        leading = axes.first(min(kept, _LEADING))
        found = {name: _Clusters.fit(name, latents, owners, patient_ids, leading, params) for name in names}
        kept = _affordable_axes(kept, sum(clusters.number for clusters in found.values()))
        sums = {name: _Moments(clusters.number, len(axes.scales), kept) for name, clusters in found.items()}
        for rows, part in chunks(latents):
            white, members = axes.whiten(part.flatten(1)), owners[rows]
            for name, clusters in found.items():
                own = white[members == name]
                sums[name].add(own, clusters.assign(own))
        fits = [_fit_class(clusters, sums[name], list(sums.values())) for name, clusters in found.items()]
        total = sum(fit.choice["rows"] for fit in fits)
        tensors = {
            **axes.tensors(),
            "noise": posterior_noise(variance),
            "frequencies": frequencies,
            "weights": torch.cat([fit.mixture.weights * fit.choice["rows"] / total for fit in fits]),
            "owners": torch.tensor([fit.choice["class"] for fit in fits for _ in fit.mixture.weights]),
            "centres": torch.cat([fit.mixture.centres for fit in fits]),
            "factors": torch.linalg.cholesky(torch.cat([fit.mixture.covariances() for fit in fits])),
            "residual_means": torch.cat([fit.residual_mean.expand(len(fit.mixture.weights), -1) for fit in fits]),
            "residual_scales": torch.cat([fit.residual_scale.expand(len(fit.mixture.weights), -1) for fit in fits]),
        }
        # contiguous, as after loading: the rounding of a matrix product depends on the memory layout
        plain = {name: (t if name == "owners" else t.float()).contiguous() for name, t in tensors.items()}
        return cls(tuple(latents.shape[1:]), plain, [fit.choice for fit in fits])

    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape) of the classes `labels` (n,), or of the train split's mix.

        Raises:
            ValueError: a label has no component.
        """
        component = torch.multinomial(self._weights_for(n, labels), 1, generator=generator)[:, 0]
        kept = self.centres.shape[1]
        white = torch.randn(n, len(self.axes.scales), generator=generator)
        for m in sorted(set(component.tolist())):
            rows = component == m
            white[rows, :kept] = self.centres[m] + white[rows, :kept] @ self.factors[m].T
            white[rows, kept:] = self.residual_means[m] + white[rows, kept:] * self.residual_scales[m]
        return add_noise(self.axes.colour(white), self.noise, generator).view(n, *self.latent_shape)

    def log_likelihood(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log density in nats (N,) of posterior means (N, *latent_shape), given labels (N,) if there are any."""
        flat = latents.flatten(1)
        kept = self.centres.shape[1]
        white = self.axes.whiten(flat)[:, :kept].double()
        densities = _component_densities(white, self.centres.double(), self.factors.double())
        residual = self.axes.residual_log_likelihood(flat, self.residual_means.double(), self.residual_scales.double())
        weights = self._weights_for(len(flat), labels).double()
        mixture = torch.logsumexp(weights.log() + densities + residual, dim=1)
        return mixture - self.axes.scales[:kept].double().log().sum()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values for `restore`."""
        tensors = {**self.axes.tensors(), **{name: getattr(self, name) for name in _TENSORS}}
        return tensors, {"latent_shape": list(self.latent_shape), "choices": self.choices}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Return the prior that `state` describes."""
        return cls(tuple(meta["latent_shape"]), tensors, meta["choices"])

    def _weights_for(self, n: int, labels: Tensor | None) -> Tensor:
        """Component weights (n, M), 0 for components of other classes than a row's label; label -1 keeps all."""
        weights = self.weights.expand(n, -1)
        if labels is None or not self.conditional:
            return weights
        labels = labels.cpu()[:, None]
        weights = weights * ((labels == self.owners) | (labels < 0))
        sums = weights.sum(1, keepdim=True)
        if bool((sums == 0).any()):
            missing = sorted(set(labels[sums == 0].tolist()))
            known = sorted(set(self.owners.tolist()))
            raise ValueError(f"labels: found {missing}, expected classes with training images: {known}")
        return weights / sums


@dataclass(frozen=True)
class _Clusters:
    """Clusters of one class, found by k-means in the leading axes."""

    choice: dict[str, Any]  # class, rows, components, held_out
    scales: Tensor  # of the leading axes
    means: "KMeans | None"  # None for a single cluster

    @property
    def number(self) -> int:
        return int(self.choice["components"])

    @classmethod
    def fit(
        cls, owner: int, latents: LatentArray, owners: Tensor, patients: Tensor, axes: PrincipalAxes, params: Prior
    ) -> Self:
        """Choose the number of clusters of one class and find them, in at most _MAX_CLUSTERED of its images.

        Args:
            owner: the class, -1 for all images together.
            latents: (N, *latent_shape) of all classes.
            owners: (N,) the class of each.
            patients: (N,) int64, index of each image's patient.
            axes: the leading axes.
            params: the parameters.
        """
        rows = (owners == owner).nonzero()[:, 0]
        choice: dict[str, Any] = {"class": owner, "rows": len(rows)}
        if len(rows) < RARE:
            return cls(choice | {"components": 1, "held_out": None}, axes.scales, None)
        used = rows[spread(len(rows), _MAX_CLUSTERED)]
        if len(used) < len(rows):
            say(f"prior gmm: clusters are found in {len(used)} of {len(rows)} images, and fitted to all")
        parts = torch.split(used, chunk_size(latents))
        white = torch.cat([axes.whiten(latents[part].flatten(1)) for part in parts])
        components, score = _choose_number(white, axes.scales, patients[used], params)
        means = _k_means(white * axes.scales, components, params.seed)
        return cls(choice | {"components": components, "held_out": score}, axes.scales, means)

    def assign(self, white: Tensor) -> Tensor:
        """Cluster (n,) of whitened coordinates (n, R)."""
        if self.means is None or not len(white):
            return torch.zeros(len(white), dtype=torch.int64)
        leading = white[:, : len(self.scales)] * self.scales
        return torch.from_numpy(self.means.predict(leading.numpy()))


def _affordable_axes(kept: int, components: int) -> int:
    """Number of axes under the mixture, at most `kept`, whose covariances fit into _MAX_FACTORS values."""
    affordable = max(1, math.isqrt(_MAX_FACTORS // components))
    if affordable < kept:
        warn(
            f"prior gmm: covariances of {components} components in {kept} axes exceed {_MAX_FACTORS} values; they are "
            f"reduced to {affordable} axes, and the others are independent. Lower prior.components or "
            "prior.variance_kept to choose otherwise, or set prior.name: flow"
        )
    return min(kept, affordable)


def _fit_class(clusters: _Clusters, own: _Moments, all_classes: Sequence[_Moments]) -> _ClassFit:
    """Fit one class from its sums; a rare class has its own mean and borrows the covariance of all classes."""
    mean, kept = own.mean(), own.products.shape[1]
    if clusters.choice["rows"] >= RARE:
        mixture, used = own.mixture(), [own]
    else:
        used = list(all_classes)
        scatter = torch.stack([sums.scatter() for sums in used]).sum(0) / _count(used)
        mixture = _Mixture(torch.ones(1, dtype=torch.float64), mean[None, :kept], scatter[None])
    deviations = torch.stack([sums.deviations() for sums in used]).sum(0) / _count(used)
    return _ClassFit(mixture, mean[kept:], deviations[kept:].sqrt(), clusters.choice)


def _count(classes: Sequence[_Moments]) -> float:
    return sum(float(sums.counts.sum()) for sums in classes)


def _choose_number(white: Tensor, scales: Tensor, patients: Tensor, params: Prior) -> tuple[int, float]:
    """Number of components of the highest held-out likelihood of `white` (N, K), and that likelihood per axis."""
    chosen, num_axes = _hold_out(patients, params.seed), white.shape[1]
    held_out, used = white[chosen], white[~chosen]
    scores: dict[int, float] = {}  # number of components -> mean log density of held-out rows
    affordable = {c for c in params.components if c * _ROWS_PER_COMPONENT <= len(used)} or {1}
    for components in sorted(affordable):
        moments = _Moments(components, num_axes, num_axes)
        moments.add(used, torch.from_numpy(_k_means(used * scales, components, params.seed).labels_))
        mixture = moments.mixture()
        factors = torch.linalg.cholesky(mixture.covariances())
        densities = mixture.weights.log() + _component_densities(held_out, mixture.centres, factors)
        scores[components] = float(torch.logsumexp(densities, dim=1).mean())
    best = max(scores, key=lambda number: scores[number])
    return best, round(scores[best] / num_axes, 4)


def _hold_out(patients: Tensor, seed: int) -> Tensor:
    """Mask (N,) of about a fifth of the images: all images of randomly drawn patients (N,) int64.

    Images of one patient are similar, so a patient on both sides would favour too many components. If patients with
    many images leave less than half of the wanted fifth, images are drawn individually instead.
    """
    wanted = len(patients) // _FOLDS
    for groups in (patients, torch.arange(len(patients))):
        _, groups, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        held_out, left = torch.zeros(len(counts), dtype=torch.bool), wanted
        for group in torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist():
            if counts[group] <= left:
                held_out[group] = True
                left -= int(counts[group])
        if 2 * left <= wanted:
            break
    return held_out[groups]


def _k_means(points: Tensor, components: int, seed: int) -> "KMeans":
    """Clusters of `points` (N, K)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than components
        return KMeans(components, n_init=_STARTS, random_state=seed).fit(points.numpy())


def _component_densities(rows: Tensor, centres: Tensor, factors: Tensor) -> Tensor:
    """Log densities (N, M) of `rows` (N, K) under Gaussians with Cholesky `factors` (M, K, K)."""
    columns = []
    for centre, factor in zip(centres, factors, strict=True):
        whitened = torch.linalg.solve_triangular(factor, (rows - centre).T, upper=False)  # (K, N)
        columns.append(-0.5 * (whitened.square().sum(0) + len(centre) * LOG_TAU) - factor.diagonal().log().sum())
    return torch.stack(columns, dim=1)
