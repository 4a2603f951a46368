"""`normal`: N(0, I), the prior of a variational model's KL term. `gaussian`: moments of the aggregate posterior."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from medgen.config import Prior
from medgen.priors.axes import LOG_TAU, LatentArray, PrincipalAxes


class Normal:
    """Standard normal latents, for every label."""

    name: ClassVar[str] = "normal"
    conditional = False

    def __init__(self, latent_shape: tuple[int, ...], frequencies: Tensor) -> None:
        self.latent_shape = latent_shape
        self.frequencies = frequencies  # (num_classes,)

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
        """See `medgen.priors.AnalyticPrior.fit`; only shape and class frequencies come from the data."""
        return cls(tuple(latents.shape[1:]), class_frequencies(labels, num_classes))

    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape)."""
        return torch.randn(n, *self.latent_shape, generator=generator)

    def log_likelihood(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log density in nats (N,) of latents (N, *latent_shape)."""
        return -0.5 * (latents.flatten(1).double().square() + LOG_TAU).sum(1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values for `restore`."""
        return {"frequencies": self.frequencies}, {"latent_shape": list(self.latent_shape)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Return the prior that `state` describes."""
        return cls(tuple(meta["latent_shape"]), tensors["frequencies"])


class Gaussian:
    """One Gaussian with the mean and full covariance of the aggregate posterior, for every label.

    The covariance is that of the encoder's means plus the mean posterior variance (law of total variance).
    """

    name: ClassVar[str] = "gaussian"
    conditional = False

    def __init__(self, latent_shape: tuple[int, ...], frequencies: Tensor, axes: PrincipalAxes, noise: Tensor) -> None:
        self.latent_shape = latent_shape
        self.frequencies = frequencies  # (num_classes,)
        self.axes = axes
        self.noise = noise  # (D,) root of the mean posterior variance; empty without one

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
        """See `medgen.priors.AnalyticPrior.fit`; `params.variance_kept` is not used: all of the covariance is kept."""
        axes = PrincipalAxes.fit(latents)
        frequencies = class_frequencies(labels, num_classes)
        return cls.restore(
            {**axes.tensors(), "frequencies": frequencies, "noise": posterior_noise(variance)},
            {"latent_shape": latents.shape[1:]},
        )

    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape)."""
        flat = self.axes.colour(torch.randn(n, len(self.axes.scales), generator=generator))
        return add_noise(flat, self.noise, generator).view(n, *self.latent_shape)

    def log_likelihood(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log density in nats (N,) of posterior means (N, *latent_shape); see `PrincipalAxes`."""
        rank = len(self.axes.scales)
        return self.axes.residual_log_likelihood(latents.flatten(1), torch.zeros(1, rank), torch.ones(1, rank))[:, 0]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values for `restore`."""
        tensors = {**self.axes.tensors(), "frequencies": self.frequencies, "noise": self.noise}
        return tensors, {"latent_shape": list(self.latent_shape)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Return the prior that `state` describes."""
        return cls(
            tuple(meta["latent_shape"]), tensors["frequencies"], PrincipalAxes.restore(tensors), tensors["noise"]
        )


def class_frequencies(labels: Tensor | None, num_classes: int) -> Tensor:
    """Share (num_classes,) of each class among the labels (N,), without -1; empty for unlabelled data."""
    if labels is None or num_classes == 0 or not bool((labels >= 0).any()):
        return torch.empty(0)
    counts = torch.bincount(labels[labels >= 0].cpu(), minlength=num_classes).double()
    return (counts / counts.sum()).float()


def posterior_noise(variance: Tensor | None) -> Tensor:
    """Root (D,) of the mean posterior variance (*latent_shape); empty without one."""
    return torch.empty(0) if variance is None else variance.cpu().flatten().float().sqrt()


def add_noise(flat: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Latents (n, D) plus Gaussian noise of deviation `noise` (D,), if that is not empty."""
    return flat if len(noise) == 0 else flat + noise * torch.randn(flat.shape, generator=generator)
