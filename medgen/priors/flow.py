"""`flow`: latents flow from noise along a velocity that a network learns, class-conditionally.

Flow matching with the conditional optimal-transport path (Lipman et al. 2023, eq. 20-23, σ_min = 0): between noise x0
and a latent x1 lies x_t = (1 - t) x0 + t x1, whose velocity is x1 - x0. The network learns that velocity's mean given
x_t, t and the class, and moving noise along the mean gives latents. Times are logit-normal (Esser et al. 2024, section
3.1): those near 0 and 1 are easy.

The network gives only what differs from the velocity of Gaussian latents (path.py), in units of the path's own scale
(the preconditioning of Karras et al. 2022): it need neither carry the noise through its layers nor find the latents'
covariance and the classes' centres, and untrained the flow draws from those Gaussians. Steps are taken in y, which is
x_t less its mean and over its deviations along the principal axes: exact where the network says nothing.

Shapes: N latents, B of them in a batch, D numbers in a flattened latent.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen import config
from medgen.nn.velocity import VelocityNetwork
from medgen.priors.gaussian import add_noise, class_frequencies, posterior_noise
from medgen.priors.learned import NetworkPrior, tells_classes
from medgen.priors.path import GaussianPath, expand

SAMPLING_STEPS = 25
_BATCH_SIZE = 256  # latents that move together: bounds the memory of a large draw


class Flow(NetworkPrior):
    """Flow matching on standardised latents; told the class where `conditional`."""

    name: ClassVar[str] = "flow"

    def __init__(
        self, latent_shape: tuple[int, ...], known: Mapping[str, Tensor], network: nn.Module, prior: config.Prior
    ) -> None:
        super().__init__(latent_shape, known, network, prior)
        self.path = GaussianPath.restore(known)
        self.noise = known["noise"]  # (D,) root of the mean posterior variance; empty without one

    @classmethod
    def start(
        cls,
        latents: Tensor,
        labels: Tensor | None,
        num_classes: int,
        prior: config.Prior,
        variance: Tensor | None = None,
        codebook: Tensor | None = None,
    ) -> Self:
        """See `medgen.priors.LearnedPrior.start`; a codebook is not used."""
        frequencies = class_frequencies(labels, num_classes)
        conditional = tells_classes(prior, frequencies)
        used = labels.cpu() if labels is not None and conditional else torch.full((len(latents),), -1)
        path = GaussianPath.fit(latents.cpu(), used, len(frequencies) if conditional else 0)
        known = {**vars(path), "noise": posterior_noise(variance), "frequencies": frequencies}
        return cls.begin(tuple(latents.shape[1:]), known, prior)

    @staticmethod
    def build(
        latent_shape: tuple[int, ...], known: Mapping[str, Tensor], num_classes: int, prior: config.Prior
    ) -> VelocityNetwork:
        """See `NetworkPrior.build`."""
        return VelocityNetwork(latent_shape, num_classes, prior.channels, prior.blocks, prior.dropout)

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Mean velocity of standardised latents (B, *latent_shape) at times (B,), given labels (B,), -1 for none."""
        scale = _scale(time, x)
        rest: Tensor = self.network(x / scale, time, labels).float()
        return self.path.velocity(x, time, labels) + rest / scale

    def loss(self, latents: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity over all numbers; see `medgen.priors.LearnedPrior.loss`."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        time = torch.randn(len(latents), generator=generator).sigmoid().to(latents.device)
        labels = self.told(labels, generator)
        self.path = self.path.to(latents.device)
        standard = self.path.standardise(latents)
        x = torch.lerp(noise, standard, expand(time, noise))
        return F.mse_loss(self.velocity(x, time, labels), standard - noise)

    def _draw(self, labels: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        noise = torch.randn(len(labels), *self.latent_shape, generator=generator)
        self.path = self.path.to(device)
        parts = zip(torch.split(noise, _BATCH_SIZE), torch.split(labels, _BATCH_SIZE), strict=True)
        moved = torch.cat([self._move(part.to(device), of.to(device)).cpu() for part, of in parts])
        return add_noise(moved.flatten(1), self.noise, generator).view(moved.shape)

    def _move(self, y: Tensor, labels: Tensor) -> Tensor:
        """Noise (B, *latent_shape) -> latents, by steps of Euler's or the midpoint rule."""
        num_steps = self.prior.sampling_steps or SAMPLING_STEPS
        y = integrate(lambda y, time: self._slope(y, time, labels), y, num_steps, self.prior.solver)
        return self.path.restore_scale(self._place(y, y.new_ones(len(y)), labels))

    def _place(self, y: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """x_t where Gaussian latents of the class, its strength counted in, would come to from the noise `y`."""
        centre = self.prior.guidance * self.path.centres[labels + 1]
        return expand(time, y) * centre + self.path.stretch(y, self.path.spread(time).sqrt())

    def _slope(self, y: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """dy/dt of `y` (B, *latent_shape), where x_t = _place(y, t): what the network adds to the Gaussian's way."""
        x = self._place(y, time, labels)
        scale = _scale(time, x)
        return self.path.stretch(self._guided(x / scale, time, labels) / scale, self.path.spread(time).rsqrt())

    def _guided(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The network's say with the label's strength of `prior.guidance`: untold + guidance · (told - untold)."""
        guidance, none = self.prior.guidance, torch.full_like(labels, -1)
        if guidance in (0.0, 1.0) or bool((labels < 0).all()):
            told: Tensor = self.network(x, time, none if guidance == 0.0 else labels)
            return told.float()
        twice = x.repeat(2, *[1] * (x.dim() - 1))
        told, untold = self.network(twice, time.repeat(2), torch.cat([labels, none])).float().chunk(2)
        return torch.lerp(untold, told, guidance)


def _scale(time: Tensor, x: Tensor) -> Tensor:
    """Deviation of x_t at times (B,) were all variances 1: (B, 1 ...)."""
    return expand(((1.0 - time).square() + time.square()).sqrt(), x)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_steps: int, solver: str) -> Tensor:
    """Moves `x` (B, ...) along `velocity(x, time)` from time 0 to 1 in equal steps; times are (B,).

    Euler's rule evaluates the velocity once a step, the midpoint rule twice.
    """
    for step in range(num_steps):
        time, ahead = x.new_full((len(x),), step / num_steps), x
        if solver == "midpoint":
            ahead = x + 0.5 / num_steps * velocity(x, time)
            time = time + 0.5 / num_steps
        x = x + velocity(ahead, time) / num_steps
    return x
