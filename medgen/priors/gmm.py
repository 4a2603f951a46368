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

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from medgen.config import Prior
from medgen.priors.axes import LOG_TAU, PrincipalAxes, constant_latents_error, num_axes
from medgen.priors.gaussian import add_noise, class_frequencies, posterior_noise

RARE = 50  # a class with fewer images gets its own mean and the covariance of all classes
_FOLDS = 5  # one part in so many is held out to choose the number of components
_ROWS_PER_COMPONENT = 10  # fewer are too few even for variances
_STARTS = 4  # of k-means
_LEADING = 50  # axes that decide clusters and their number: in more, a held-out likelihood mostly measures noise
_POOLING = 0.5  # weight of the class's pooled covariance in that of a component
_SHRINKAGE = 0.05  # of a covariance towards its diagonal
_VARIANCE_FLOOR = 1e-2  # of a whitened coordinate, whose variance is 1
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
        latents: Tensor,
        labels: Tensor | None,
        num_classes: int,
        params: Prior,
        variance: Tensor | None = None,
        patients: Sequence[str] | None = None,
    ) -> Self:
        """See `medgen.priors.AnalyticPrior.fit`. Unlabelled rows only affect the axes if other rows are labelled."""
        flat = latents.flatten(1).double().cpu()
        axes = PrincipalAxes.fit(flat, max(_RESIDUAL_SHARE, params.variance_kept))
        if len(axes.scales) == 0:
            raise constant_latents_error(latents)
        kept = num_axes(axes.scales.square(), params.variance_kept)
        white = axes.whiten(flat)
        patient_ids = torch.arange(len(white))
        if patients is not None:
            patient_ids = torch.from_numpy(np.unique(np.array(patients), return_inverse=True)[1])
        frequencies = class_frequencies(labels, num_classes)
        members = {-1: torch.ones(len(white), dtype=torch.bool)}
        if params.conditional and labels is not None and len(frequencies):
            members = {c: labels.cpu() == c for c in range(num_classes) if bool(frequencies[c] > 0)}
        pooled = torch.cat([white[rows] - white[rows].mean(0) for rows in members.values()])  # (N, R)
        fits = [
            _fit_class(owner, white[rows], patient_ids[rows], pooled, axes.scales[:kept], params)
            for owner, rows in members.items()
        ]
        tensors = {
            **axes.tensors(),
            "noise": posterior_noise(variance),
            "frequencies": frequencies,
            "weights": torch.cat([fit.mixture.weights * fit.choice["rows"] / len(pooled) for fit in fits]),
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


def _fit_class(owner: int, rows: Tensor, patients: Tensor, pooled: Tensor, scales: Tensor, params: Prior) -> _ClassFit:
    """Fit one class.

    Args:
        owner: the class, -1 for all images together.
        rows: (N, R) whitened coordinates of its images.
        patients: (N,) int64, index of each image's patient.
        pooled: (all images, R) differences from their own class's mean, whose covariance a rare class borrows.
        scales: (K,) standard deviations of the mixture's axes.
        params: the parameters.
    """
    choice: dict[str, Any] = {"class": owner, "rows": len(rows)}
    kept = len(scales)
    mean, own = rows.mean(0), rows - rows.mean(0)
    if len(rows) < RARE:
        own = pooled
        scatter = own[:, :kept].T @ own[:, :kept] / len(own)
        mixture = _Mixture(torch.ones(1).to(rows), mean[None, :kept], scatter[None])
        choice |= {"components": 1, "held_out": None}
    else:
        mixture, chosen = _fit_mixture(rows[:, :kept], scales, patients, params)
        choice |= chosen
    return _ClassFit(mixture, mean[kept:], own[:, kept:].square().mean(0).sqrt(), choice)


def _fit_mixture(rows: Tensor, scales: Tensor, patients: Tensor, params: Prior) -> tuple[_Mixture, dict[str, Any]]:
    """Fit a mixture to `rows` (N, K) and choose its number of components; see `_fit_class`."""
    chosen = _hold_out(patients, params.seed)
    held_out, used = rows[chosen, :_LEADING], rows[~chosen, :_LEADING]
    scores: dict[int, Tensor] = {}  # number of components -> log density of held-out rows (N,)
    affordable = {c for c in params.components if c * _ROWS_PER_COMPONENT <= len(used)} or {1}
    for components in sorted(affordable):
        mixture = _cluster(used, scales[:_LEADING], components, params.seed)
        factors = torch.linalg.cholesky(mixture.covariances())
        densities = mixture.weights.log() + _component_densities(held_out, mixture.centres, factors)
        scores[components] = torch.logsumexp(densities, dim=1)
    components = max(scores, key=lambda number: float(scores[number].mean()))
    score = float(scores[components].mean()) / held_out.shape[1]
    mixture = _cluster(rows, scales, components, params.seed)
    return mixture, {"components": components, "held_out": round(score, 4)}


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


def _cluster(rows: Tensor, scales: Tensor, components: int, seed: int) -> _Mixture:
    """Mixture of the clusters that k-means finds in the leading axes of `rows` (N, K), scaled by `scales` (K,)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than components
        leading = (rows * scales)[:, :_LEADING].numpy()
        labels = torch.from_numpy(KMeans(components, n_init=_STARTS, random_state=seed).fit(leading).labels_)
    clusters = [rows[labels == label] for label in sorted(set(labels.tolist()))]
    weights = torch.tensor([len(cluster) / len(rows) for cluster in clusters]).double()
    centres = torch.stack([cluster.mean(0) for cluster in clusters])
    centred = [cluster - cluster.mean(0) for cluster in clusters]
    scatters = torch.stack([cluster.T @ cluster / len(cluster) for cluster in centred])
    pooled = torch.cat(centred)
    return _Mixture(weights, centres, torch.lerp(scatters, pooled.T @ pooled / len(rows), _POOLING))


def _component_densities(rows: Tensor, centres: Tensor, factors: Tensor) -> Tensor:
    """Log densities (N, M) of `rows` (N, K) under Gaussians with Cholesky `factors` (M, K, K)."""
    columns = []
    for centre, factor in zip(centres, factors, strict=True):
        whitened = torch.linalg.solve_triangular(factor, (rows - centre).T, upper=False)  # (K, N)
        columns.append(-0.5 * (whitened.square().sum(0) + len(centre) * LOG_TAU) - factor.diagonal().log().sum())
    return torch.stack(columns, dim=1)
