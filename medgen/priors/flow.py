"""`flow`: class-conditional flow matching, which moves noise to latents along a learnt velocity.

Between noise x0 and a latent x1 lies x_t = (1 - t) x0 + t x1, whose velocity is x1 - x0 (the conditional
optimal-transport path of Lipman et al. 2023, eq. 20-23, σ_min = 0). The network learns the mean of that velocity given
x_t, t and the class; integrating it moves noise to latents. Times are logit-normal (Esser et al. 2024, section 3.1),
because those near 0 and 1 are easy.

The network predicts only the difference to the velocity of Gaussian latents (path.py), in units of the path's scale
(the preconditioning of Karras et al. 2022). So it need not pass the noise through its layers nor learn the covariance
of the latents and the centres of the classes, and an untrained flow draws from those Gaussians. The sampler integrates
y, which is x_t minus its mean and divided by its deviations along the principal axes: its steps are exact where the
network's output is 0.

Shapes: N latents, B batch, D dimensions of a flattened latent.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen import config
from medgen.data.conditions import ConditionSpace
from medgen.nn.conditions import Conditions, drop_conditions, grid_channels
from medgen.nn.parallel import randn
from medgen.nn.velocity import VelocityNetwork
from medgen.priors.axes import LOG_TAU, LatentArray
from medgen.priors.gaussian import add_noise, class_frequencies, posterior_noise
from medgen.priors.neural import NeuralPrior, conditioning_classes
from medgen.priors.path import GaussianPath, expand

DEFAULT_SAMPLING_STEPS = 25
INVERSION_STEPS = 50  # of the midpoint rule; there and back, the error is then far below the deviation of a latent
DENSITY_STEPS = 20
_BATCH_SIZE = 256  # latents integrated at once: bounds the memory of a large draw


class Flow(NeuralPrior):
    """Flow matching on standardised latents, class-conditional if `conditional`."""

    name: ClassVar[str] = "flow"

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        buffers: Mapping[str, Tensor],
        network: nn.Module,
        params: config.Prior,
        space: ConditionSpace | None = None,
    ) -> None:
        super().__init__(latent_shape, buffers, network, params, space)
        self.path = GaussianPath.restore(buffers)
        self.noise = buffers["noise"]  # (D,) root of the mean posterior variance; empty without one

    @classmethod
    def create(
        cls,
        latents: LatentArray,
        labels: Tensor | None,
        num_classes: int,
        params: config.Prior,
        variance: Tensor | None = None,
        codebook: Tensor | None = None,
        space: ConditionSpace | None = None,
    ) -> Self:
        """See `NeuralPrior.create`; a codebook is not used."""
        frequencies = class_frequencies(labels, num_classes)
        num_classes = conditioning_classes(params, frequencies)
        used = labels.cpu() if labels is not None and num_classes else torch.full((len(latents),), -1)
        path = GaussianPath.fit(latents, used, num_classes)
        buffers = {**vars(path), "noise": posterior_noise(variance), "frequencies": frequencies}
        return cls.initialise(tuple(latents.shape[1:]), buffers, params, space)

    @staticmethod
    def build_network(
        latent_shape: tuple[int, ...],
        buffers: Mapping[str, Tensor],
        params: config.Prior,
        space: ConditionSpace | None = None,
    ) -> VelocityNetwork:
        """See `NeuralPrior.build_network`."""
        num_classes = conditioning_classes(params, buffers["frequencies"])
        return VelocityNetwork(
            latent_shape,
            num_classes,
            params.channels,
            params.blocks,
            params.dropout,
            context_channels=grid_channels(space, grid_sides(latent_shape)),
            num_values=0 if space is None else space.size,
        )

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Mean velocity of standardised latents (B, *latent_shape) at times (B,), given labels (B,), -1 for none."""
        scale = _path_scale(time, x)
        if conditions is not None:
            conditions = conditions.on_grid(grid_sides(self.latent_shape))
        difference = self._output(x / scale, time, labels, conditions)
        return self.path.velocity(x, time, labels) + difference / scale

    def loss(
        self, latents: Tensor, labels: Tensor, generator: torch.Generator, conditions: Conditions | None = None
    ) -> Tensor:
        """Mean squared error of the velocity over all dimensions; see `NeuralPrior.loss`."""
        noise = randn(*latents.shape, generator=generator).to(latents.device)
        time = randn(len(latents), generator=generator).sigmoid().to(latents.device)
        labels, conditions = drop_conditions(labels, conditions, self.conditional, self.space, generator)
        self.path = self.path.to(latents.device)
        standard = self.path.standardise(latents)
        x = torch.lerp(noise, standard, expand(time, noise))
        return F.mse_loss(self.velocity(x, time, labels, conditions), standard - noise)

    @torch.no_grad()
    def invert(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Noise (B, *latent_shape) that `transport` moves to latents of labels (B,): the flow backwards in time."""
        self.network.eval()
        y = self._to_y(latents, labels)
        return integrate(lambda y, time: -self._y_velocity(y, 1.0 - time, labels), y, INVERSION_STEPS, "midpoint")

    def transport(self, noise: Tensor, labels: Tensor, num_steps: int = INVERSION_STEPS) -> Tensor:
        """Latents of labels (B,) that the flow moves noise (B, *latent_shape) to, without posterior noise."""
        self.network.eval()
        self.path = self.path.to(noise.device)
        y = integrate(lambda y, time: self._y_velocity(y, time, labels), noise, num_steps, "midpoint")
        return self._from_y(y, labels)

    def log_density(self, latents: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Log density in nats of posterior means (B, *latent_shape) of labels (B,), as a share of each dimension.

        The sum over the dimensions is the log density: that of the noise minus the divergence along the path, which a
        random vector at each step estimates without bias. The Gaussian part of the velocity is in y, so its divergence
        is exact. Where it was trained, the density is that of the samples before `add_noise`.

        Source: Chen et al., Neural ordinary differential equations, 2018, eq. 8; Grathwohl et al., FFJORD, 2019, eq. 7.
        """
        self.network.eval()
        y, step = self._to_y(latents, labels), 1.0 / DENSITY_STEPS
        divergence = torch.zeros_like(y)
        for number in range(DENSITY_STEPS, 0, -1):
            time = y.new_full((len(y),), number * step)
            with torch.no_grad():
                middle = y - 0.5 * step * self._y_velocity(y, time, labels)
            with torch.enable_grad():
                middle.requires_grad_()
                velocity = self._y_velocity(middle, time - 0.5 * step, labels)
                probe = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2.0 - 1.0
                (product,) = torch.autograd.grad((velocity * probe).sum(), middle)
            divergence += step * probe * product
            y = y - step * velocity.detach()
        kept = self.path.variances[:-1]
        volume = self.path.scale.log().sum() + 0.5 * kept.log().sum()
        volume = volume + 0.5 * (y[0].numel() - len(kept)) * self.path.variances[-1].log()
        return -0.5 * (y.square() + LOG_TAU) - divergence - volume / y[0].numel()

    def _sample(
        self, labels: Tensor, conditions: Conditions | None, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        noise = torch.randn(len(labels), *self.latent_shape, generator=generator)
        self.path = self.path.to(device)
        parts = []
        for rows in torch.split(torch.arange(len(labels)), _BATCH_SIZE):
            own = None
            if conditions is not None:
                own = conditions[rows].to(device).on_grid(grid_sides(self.latent_shape))
            parts.append(self._integrate(noise[rows].to(device), labels[rows].to(device), own).cpu())
        latents = torch.cat(parts)
        return add_noise(latents.flatten(1), self.noise, generator).view(latents.shape)

    def _integrate(self, noise: Tensor, labels: Tensor, conditions: Conditions | None) -> Tensor:
        """Noise (B, *latent_shape) -> latents of labels (B,) and conditions on the network's grid."""
        num_steps = self.params.sampling_steps or DEFAULT_SAMPLING_STEPS
        y = integrate(
            lambda y, time: self._y_velocity(y, time, labels, conditions), noise, num_steps, self.params.solver
        )
        return self._from_y(y, labels)

    def _from_y(self, y: Tensor, labels: Tensor) -> Tensor:
        """Latents of `y` (B, *latent_shape) at time 1."""
        return self.path.unstandardise(self._to_x(y, y.new_ones(len(y)), labels))

    def _to_y(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Inverse of `_from_y`."""
        self.path = self.path.to(latents.device)
        x = self.path.standardise(latents) - self.params.guidance * self.path.centres[labels + 1]
        return self.path.scale_axes(x, self.path.variances_at(x.new_ones(len(x))).rsqrt())

    def _to_x(self, y: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """x_t of `y` (B, *latent_shape) at times (B,), with the class's centre scaled by the guidance."""
        centre = self.params.guidance * self.path.centres[labels + 1]
        return expand(time, y) * centre + self.path.scale_axes(y, self.path.variances_at(time).sqrt())

    def _y_velocity(self, y: Tensor, time: Tensor, labels: Tensor, conditions: Conditions | None = None) -> Tensor:
        """dy/dt at `y` (B, *latent_shape): the network's part of the velocity, divided by the path's deviations."""
        x = self._to_x(y, time, labels)
        scale = _path_scale(time, x)
        difference = self._guided_output(x / scale, time, labels, conditions) / scale
        return self.path.scale_axes(difference, self.path.variances_at(time).rsqrt())

    def _guided_output(self, x: Tensor, time: Tensor, labels: Tensor, conditions: Conditions | None) -> Tensor:
        """Network output with guidance: unconditional + guidance · (conditional - unconditional)."""
        guidance, none = self.params.guidance, torch.full_like(labels, -1)
        if guidance == 1.0 or (conditions is None and (guidance == 0.0 or bool((labels < 0).all()))):
            return self._output(x, time, none if guidance == 0.0 else labels, conditions)
        twice = x.repeat(2, *[1] * (x.dim() - 1))
        both = None if conditions is None else conditions.then(conditions.cleared())
        conditional, unconditional = self._output(twice, time.repeat(2), torch.cat([labels, none]), both).chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    def _output(self, x: Tensor, time: Tensor, labels: Tensor, conditions: Conditions | None) -> Tensor:
        """Output of the network for scaled latents (B, *latent_shape) and conditions on its grid; None: unknown."""
        if self.space is None:
            output: Tensor = self.network(x, time, labels)
            return output.float()
        if conditions is None:
            conditions = Conditions.unknown(self.space, len(x), x.device).on_grid(grid_sides(self.latent_shape))
        output = self.network(x, time, labels, conditions.maps, values=conditions.values)
        return output.float()


def grid_sides(latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of a latent's grid; a flat latent is a grid (1, 1) of one position."""
    return latent_shape[1:] or (1, 1)


def _path_scale(time: Tensor, x: Tensor) -> Tensor:
    """Deviation (B, 1 ...) of x_t at times (B,) if all variances of the latents were 1."""
    return expand(((1.0 - time).square() + time.square()).sqrt(), x)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_steps: int, solver: str) -> Tensor:
    """Integrate `velocity(x, time)` from `x` (B, ...) over times (B,) from 0 to 1 in equal steps.

    Euler's rule evaluates the velocity once a step, the midpoint rule twice.
    """
    for step in range(num_steps):
        time, at = x.new_full((len(x),), step / num_steps), x
        if solver == "midpoint":
            at = x + 0.5 / num_steps * velocity(x, time)
            time = time + 0.5 / num_steps
        x = x + velocity(at, time) / num_steps
    return x
