"""`flow`: latents flow from noise along a velocity that a network learns, class-conditionally.

Flow matching with the conditional optimal-transport path (Lipman et al. 2023, eq. 20-23, σ_min = 0): between noise x0
and a latent x1 lies x_t = (1 - t) x0 + t x1, whose velocity is x1 - x0. The network learns that velocity's mean given
x_t, t and the class, and moving noise along the mean gives latents. Times are logit-normal (Esser et al. 2024, section
3.1): those near 0 and 1 are easy. Labels are dropped now and then, so that a label's strength can be chosen when
sampling (Ho & Salimans 2022).

The network gives only what differs from the velocity of Gaussian latents (path.py), in units of the path's own scale
(the preconditioning of Karras et al. 2022): it need neither carry the noise through its layers nor find the latents'
covariance and the classes' centres, and untrained the flow draws from those Gaussians. Steps are taken in y, which is
x_t less its mean and over its deviations along the principal axes: exact where the network says nothing.

Shapes: N latents, B of them in a batch, D numbers in a flattened latent.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen import config
from medgen.config import seed_of
from medgen.priors.gaussian import add_noise, class_frequencies, posterior_noise
from medgen.priors.path import GaussianPath, expand
from medgen.priors.velocity import VelocityNetwork

SAMPLING_STEPS = 25
LABEL_DROPOUT = 0.1
_BATCH_SIZE = 256  # latents that move together: bounds the memory of a large draw
_SETTINGS = {"channels", "blocks", "dropout", "sampling_steps", "solver", "guidance"}


class Flow:
    """Flow matching on standardised latents; told the class where `conditional`."""

    name: ClassVar[str] = "flow"

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        tensors: Mapping[str, Tensor],
        network: nn.Module,
        conditional: bool,
        prior: config.Prior,
    ) -> None:
        self.latent_shape = latent_shape
        self.path = GaussianPath.restore(tensors)
        self.noise = tensors["noise"]  # (D,) root of the mean posterior variance; empty without one
        self.frequencies = tensors["frequencies"]  # (num_classes,)
        self.network = network
        self.conditional = conditional
        self.prior = prior

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
        conditional = prior.conditional and len(frequencies) > 0
        known = labels.cpu() if labels is not None and conditional else torch.full((len(latents),), -1)
        path = GaussianPath.fit(latents.cpu(), known, len(frequencies) if conditional else 0)
        tensors = {**vars(path), "noise": posterior_noise(variance), "frequencies": frequencies}
        latent_shape = tuple(latents.shape[1:])
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(prior.seed))
            network = _build(latent_shape, len(frequencies) if conditional else 0, prior)
        return cls(latent_shape, tensors, network, conditional, prior)

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Mean velocity of standardised latents (B, *latent_shape) at times (B,), given labels (B,), -1 for none."""
        scale = _scale(time, x)
        rest: Tensor = self.network(x / scale, time, labels).float()
        return self.path.velocity(x, time, labels) + rest / scale

    def loss(self, latents: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity over all numbers; see `medgen.priors.LearnedPrior.loss`."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        time = torch.randn(len(latents), generator=generator).sigmoid().to(latents.device)
        dropped = (torch.rand(len(latents), generator=generator) < LABEL_DROPOUT).to(latents.device)
        labels = labels.masked_fill(dropped, -1) if self.conditional else torch.full_like(labels, -1)
        self.path = self.path.to(latents.device)
        standard = self.path.standardise(latents)
        x = torch.lerp(noise, standard, expand(time, noise))
        return F.mse_loss(self.velocity(x, time, labels), standard - noise)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """`n` latents (n, *latent_shape) of the classes `labels` (n,), or of the train split's mix.

        Raises:
            ValueError: no training image has one of the labels.
        """
        if labels is None or not self.conditional:
            labels = torch.full((n,), -1)
        self._check(labels)
        device = next(self.network.parameters()).device
        noise = torch.randn(n, *self.latent_shape, generator=generator)
        self.path = self.path.to(device)
        training = self.network.training
        self.network.eval()
        parts = [
            self._move(noise[rows].to(device), labels[rows].to(device)).cpu()
            for rows in (slice(start, start + _BATCH_SIZE) for start in range(0, n, _BATCH_SIZE))
        ]
        self.network.train(training)
        return add_noise(torch.cat(parts).flatten(1), self.noise, generator).view(n, *self.latent_shape)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that `restore` takes."""
        own = {**vars(self.path), "noise": self.noise, "frequencies": self.frequencies}
        learnt = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in {**own, **learnt}.items()}
        settings = self.prior.model_dump(mode="json", include=_SETTINGS)
        return tensors, {"latent_shape": list(self.latent_shape), "conditional": self.conditional, "prior": settings}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """The prior whose `state` this is."""
        latent_shape, conditional = tuple(meta["latent_shape"]), bool(meta["conditional"])
        prior = config.Prior(name=cls.name, conditional=conditional, **meta["prior"])
        with torch.device("meta"):  # no random weights that would be overwritten
            network = _build(latent_shape, len(tensors["frequencies"]) if conditional else 0, prior)
        network = network.to_empty(device="cpu")
        network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()})
        return cls(latent_shape, tensors, network.eval(), conditional, prior)

    def _move(self, y: Tensor, labels: Tensor) -> Tensor:
        """Noise (B, *latent_shape) -> latents, by steps of Euler's or the midpoint rule."""
        num_steps = self.prior.sampling_steps or SAMPLING_STEPS
        for step in range(num_steps):
            time, ahead = y.new_full((len(y),), step / num_steps), y
            if self.prior.solver == "midpoint":
                ahead = y + 0.5 / num_steps * self._slope(y, time, labels)
                time = time + 0.5 / num_steps
            y = y + self._slope(ahead, time, labels) / num_steps
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

    def _check(self, labels: Tensor) -> None:
        known = (self.frequencies > 0).nonzero()[:, 0].tolist()
        missing = sorted(set(labels.tolist()) - {-1, *known})
        if missing:
            raise ValueError(f"labels: found {missing}, expected classes with training images: {known}")


def _build(latent_shape: tuple[int, ...], num_classes: int, prior: config.Prior) -> VelocityNetwork:
    return VelocityNetwork(latent_shape, num_classes, prior.channels, prior.blocks, prior.dropout)


def _scale(time: Tensor, x: Tensor) -> Tensor:
    """Deviation of x_t at times (B,) were all variances 1: (B, 1 ...)."""
    return expand(((1.0 - time).square() + time.square()).sqrt(), x)
