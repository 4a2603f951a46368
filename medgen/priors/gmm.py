"""`gmm`: a Gaussian mixture fitted after training to what the encoder says of the train split.

Ex-post density estimation: Ghosh et al., From Variational to Deterministic Autoencoders, 2020, section 4.
Latents have many more numbers than a mixture can be fitted in, so it lives in the first K principal
axes, whitened; the remaining axes are independent Gaussians, which keep the fine detail in the picture.

A component's covariance is its own full scatter, shrunk a little towards the diagonal so that it stays
invertible. More shrinkage would have the better held-out likelihood in so many axes, and samples farther
from real films: it forgets how the axes go together within a class (docs/results.md). The number of
components is chosen, per class, by the likelihood of a held-out fifth; then all its images are fitted.

Shapes: N latents, D numbers in a latent, R axes, K of them under the mixture, M components over all classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from medgen.config import Prior
from medgen.priors.axes import LOG_TAU, PrincipalAxes, all_alike, num_axes
from medgen.priors.gaussian import add_noise, class_frequencies, posterior_noise

RARE = 50  # a class with fewer images gets its own mean and the covariance all classes share
_ROWS_PER_COMPONENT = 10  # at least; fewer do not even give variances
_STARTS = 4  # of EM; whitening makes clusters no wider apart than noise is, and a single start often misses them
_SHRINKAGE = 0.05  # of a covariance towards its diagonal
_VARIANCE_FLOOR = 1e-2  # of a whitened coordinate's variance, 1
_RESIDUAL_SHARE = 0.999  # of the variance; the axes after that would double the file and show nothing


@dataclass(frozen=True)
class _Mixture:
    """The mixture of one class in whitened coordinates, float64."""

    weights: Tensor  # (M,)
    centres: Tensor  # (M, K)
    scatters: Tensor  # (M, K, K)

    def covariances(self) -> Tensor:
        diagonal = torch.diag_embed(self.scatters.diagonal(dim1=1, dim2=2) + _VARIANCE_FLOOR)
        return (1.0 - _SHRINKAGE) * self.scatters + _SHRINKAGE * diagonal


class GaussianMixture:
    """Gaussian mixture over principal coordinates; one per class where `conditional`."""

    name: ClassVar[str] = "gmm"

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        tensors: Mapping[str, Tensor],
        choices: list[dict[str, Any]],
    ) -> None:
        self.latent_shape = latent_shape
        self.choices = choices  # one entry per fitted class: class, rows, components, shrinkage, held_out
        self.axes = PrincipalAxes.restore(tensors)
        self.noise = tensors["noise"]  # (D,) root of the mean posterior variance; empty without one
        self.frequencies = tensors["frequencies"]  # (num_classes,)
        self.weights = tensors["weights"]  # (M,) over all classes, sum 1
        self.owners = tensors["owners"]  # (M,) int64, the class of a component; -1 where not conditional
        self.centres = tensors["centres"]  # (M, K)
        self.factors = tensors["factors"]  # (M, K, K) Cholesky factors, lower

    @property
    def conditional(self) -> bool:
        """Whether a label changes what is drawn."""
        return bool((self.owners >= 0).any())

    @classmethod
    def fit(
        cls, latents: Tensor, labels: Tensor | None, num_classes: int, prior: Prior, variance: Tensor | None = None
    ) -> Self:
        """See `medgen.priors.Prior.fit`. Rows labelled -1 shape the axes only, where others are labelled."""
        flat = latents.flatten(1).double().cpu()
        axes = PrincipalAxes.fit(flat, max(_RESIDUAL_SHARE, prior.variance_kept))
        if len(axes.scales) == 0:
            raise all_alike(latents)
        kept = num_axes(axes.scales.square(), prior.variance_kept)
        white = axes.whiten(flat)[:, :kept]
        frequencies = class_frequencies(labels, num_classes)
        groups = {-1: white}
        if prior.conditional and labels is not None and len(frequencies):
            groups = {c: white[labels.cpu() == c] for c in range(num_classes) if bool(frequencies[c] > 0)}
        total = sum(len(rows) for rows in groups.values())
        shared = _shared_covariance(list(groups.values()))
        fits = [_fit_group(owner, rows, shared, prior) for owner, rows in groups.items()]
        tensors = {
            **axes.tensors(),
            "noise": posterior_noise(variance),
            "frequencies": frequencies,
            "weights": torch.cat([fit[0] * len(rows) / total for fit, rows in zip(fits, groups.values(), strict=True)]),
            "owners": torch.tensor([owner for owner, fit in zip(groups, fits, strict=True) for _ in fit[0]]),
            "centres": torch.cat([fit[1] for fit in fits]),
            "factors": torch.linalg.cholesky(torch.cat([fit[2] for fit in fits])),
        }
        # Contiguous, as they will be when loaded: a matrix product rounds by its operands' layout.
        plain = {name: (t if name == "owners" else t.float()).contiguous() for name, t in tensors.items()}
        return cls(tuple(latents.shape[1:]), plain, [fit[3] for fit in fits])

    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape) of the classes `labels` (n,), or of the train split's mix.

        Raises:
            ValueError: a label has no component.
        """
        component = torch.multinomial(self._weights_for(n, labels), 1, generator=generator)[:, 0]
        size = self.centres.shape[1]
        white = torch.randn(n, len(self.axes.scales), generator=generator)
        for m in sorted(set(component.tolist())):
            rows = component == m
            white[rows, :size] = self.centres[m] + white[rows, :size] @ self.factors[m].T
        return add_noise(self.axes.colour(white), self.noise, generator).view(n, *self.latent_shape)

    def log_likelihood(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log density in nats (N,) of posterior means (N, *latent_shape), given their labels where there are any."""
        flat = latents.flatten(1)
        size = self.centres.shape[1]
        white = self.axes.whiten(flat)[:, :size].double()
        factors = self.factors.double()
        densities = _component_densities(white, self.centres.double(), factors)
        weights = self._weights_for(len(flat), labels).double()
        mixture = torch.logsumexp(weights.log() + densities, dim=1)
        volume = self.axes.scales[:size].double().log().sum()
        return mixture - volume + self.axes.residual_log_likelihood(flat, skip=size)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that `restore` takes."""
        names = ("noise", "frequencies", "weights", "owners", "centres", "factors")
        tensors = {**self.axes.tensors(), **{name: getattr(self, name) for name in names}}
        return tensors, {"latent_shape": list(self.latent_shape), "choices": self.choices}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """The prior whose `state` this is."""
        return cls(tuple(meta["latent_shape"]), tensors, meta["choices"])

    def _weights_for(self, n: int, labels: Tensor | None) -> Tensor:
        """Component weights (n, M); those of other classes than a row's label are 0. Label -1 leaves all."""
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


def _fit_group(owner: int, rows: Tensor, shared: Tensor, prior: Prior) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Weights (M,), centres (M, K), covariances (M, K, K) of one class's `rows` (N, K), and what was chosen."""
    choice: dict[str, Any] = {"class": owner, "rows": len(rows)}
    if len(rows) < RARE:
        choice |= {"components": 1, "held_out": None}
        return torch.ones(1, dtype=rows.dtype), rows.mean(0, keepdim=True), shared[None], choice
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(prior.seed))
    held, used = rows[order[: len(rows) // 5]], rows[order[len(rows) // 5 :]]
    scores: dict[int, Tensor] = {}  # components -> log density of held-out rows (N,)
    affordable = {c for c in prior.components if c * _ROWS_PER_COMPONENT <= len(used)} or {1}
    for components in sorted(affordable):
        mixture = _expectation_maximisation(used, components, prior.seed)
        factors = torch.linalg.cholesky(mixture.covariances())
        densities = mixture.weights.log() + _component_densities(held, mixture.centres, factors)
        scores[components] = torch.logsumexp(densities, dim=1)
    components = _fewest_good(scores)
    held_out = float(scores[components].mean()) / rows.shape[1]
    mixture = _expectation_maximisation(rows, components, prior.seed)
    choice |= {"components": components, "held_out": round(held_out, 4)}
    return mixture.weights, mixture.centres, mixture.covariances(), choice


def _fewest_good(scores: Mapping[int, Tensor]) -> int:
    """The fewest components within one standard error of the best held-out likelihood.

    The one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, on paired
    differences: a larger mixture must be better by more than chance.
    """
    best = max(scores.values(), key=lambda score: float(score.mean()))
    for components in sorted(scores):
        loss = best - scores[components]
        if float(loss.mean()) <= float(loss.std()) / len(loss) ** 0.5:
            return components
    raise AssertionError("the best is within its own error")


def _expectation_maximisation(rows: Tensor, components: int, seed: int) -> _Mixture:
    """Responsibilities from sklearn's diagonal mixture (stable with few rows), then each component's full scatter."""
    import warnings

    from sklearn import mixture
    from sklearn.exceptions import ConvergenceWarning

    model = mixture.GaussianMixture(
        components,
        covariance_type="diag",
        reg_covar=_VARIANCE_FLOOR,
        max_iter=200,
        n_init=_STARTS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out likelihood judges the result
        responsibilities = torch.from_numpy(model.fit(rows.numpy()).predict_proba(rows.numpy()))  # (N, M)
    counts = responsibilities.sum(0).clamp_min(1e-9)
    centres = responsibilities.T @ rows / counts[:, None]
    scatters = []
    for m in range(components):
        centred = rows - centres[m]
        scatters.append((centred.T * responsibilities[:, m]) @ centred / counts[m])
    return _Mixture(counts / counts.sum(), centres, torch.stack(scatters))


def _shared_covariance(groups: list[Tensor]) -> Tensor:
    """Covariance (K, K) around each group's own mean, pooled: rows of rare classes borrow it."""
    centred = torch.cat([rows - rows.mean(0) for rows in groups])
    pooled = _Mixture(torch.ones(1), torch.zeros(1, centred.shape[1]), (centred.T @ centred / len(centred))[None])
    return pooled.covariances()[0]


def _component_densities(rows: Tensor, centres: Tensor, factors: Tensor) -> Tensor:
    """Log densities (N, M) of `rows` (N, K) under Gaussians with Cholesky `factors` (M, K, K)."""
    columns = []
    for centre, factor in zip(centres, factors, strict=True):
        whitened = torch.linalg.solve_triangular(factor, (rows - centre).T, upper=False)  # (K, N)
        columns.append(-0.5 * (whitened.square().sum(0) + len(centre) * LOG_TAU) - factor.diagonal().log().sum())
    return torch.stack(columns, dim=1)
