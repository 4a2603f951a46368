"""`flow`: latents flow from noise along a velocity that a network learns, class-conditionally.

Flow matching with the conditional optimal-transport path (Lipman et al. 2023, eq. 20-23, σ_min = 0): between noise x0
and a latent x1 lies x_t = (1 - t) x0 + t x1, whose velocity is x1 - x0. The network learns that velocity's mean given
x_t, t and the class, and moving noise along the mean gives latents. Times are logit-normal (Esser et al. 2024, section
3.1): those near 0 and 1 are easy. Labels are dropped now and then, so that a label's strength can be chosen when
sampling (Ho & Salimans 2022).

Were the standardised latents white noise, the velocity would be (2t - 1) x_t / s² with s² = (1 - t)² + t², the
variance of x_t. The network gives the rest, in units of the rest's own scale (the preconditioning of Karras et al.
2022): it need not carry the noise through its layers. In y = x_t / s, which is x at both ends, the same way is
dy/dt = network(y, t) / s². Steps are taken in y: exact where the network says nothing.

Shapes: N latents, B of them in a batch, D numbers in a flattened latent.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medgen import config
from medgen.config import seed_of
from medgen.errors import UserError
from medgen.priors.gaussian import add_noise, class_frequencies, posterior_noise
from medgen.priors.velocity import VelocityNetwork

SAMPLING_STEPS = 25
LABEL_DROPOUT = 0.1
_SCALE_FLOOR = 0.1  # of the channel's root-mean-square deviation, and of all numbers' for a channel
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
        self.mean = tensors["mean"]  # (*latent_shape)
        self.scale = tensors["scale"]  # (*latent_shape)
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
        mean, scale = _mean_and_scale(latents.cpu())
        frequencies = class_frequencies(labels, num_classes)
        tensors = {"mean": mean, "scale": scale, "noise": posterior_noise(variance), "frequencies": frequencies}
        latent_shape = tuple(latents.shape[1:])
        conditional = prior.conditional and len(frequencies) > 0
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(prior.seed))
            network = _build(latent_shape, len(frequencies) if conditional else 0, prior)
        return cls(latent_shape, tensors, network, conditional, prior)

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Mean velocity of standardised latents (B, *latent_shape) at times (B,), given labels (B,), -1 for none."""
        t = time.view(-1, *[1] * len(self.latent_shape))
        square = (1.0 - t).square() + t.square()
        scale = square.sqrt()
        rest: Tensor = self.network(x / scale, time, labels).float()
        return (2.0 * t - 1.0) / square * x + rest / scale

    def loss(self, latents: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity over all numbers; see `medgen.priors.LearnedPrior.loss`."""
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        time = torch.randn(len(latents), generator=generator).sigmoid().to(latents.device)
        dropped = (torch.rand(len(latents), generator=generator) < LABEL_DROPOUT).to(latents.device)
        labels = labels.masked_fill(dropped, -1) if self.conditional else torch.full_like(labels, -1)
        white = (latents.float() - self.mean.to(latents.device)) / self.scale.to(latents.device)
        x = torch.lerp(noise, white, time.view(-1, *[1] * len(self.latent_shape)))
        return F.mse_loss(self.velocity(x, time, labels), white - noise)

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
        training = self.network.training
        self.network.eval()
        parts = [
            self._move(noise[rows].to(device), labels[rows].to(device)).cpu()
            for rows in (slice(start, start + _BATCH_SIZE) for start in range(0, n, _BATCH_SIZE))
        ]
        self.network.train(training)
        flat = (self.mean + self.scale * torch.cat(parts)).flatten(1)
        return add_noise(flat, self.noise, generator).view(n, *self.latent_shape)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that `restore` takes."""
        own = {name: getattr(self, name) for name in ("mean", "scale", "noise", "frequencies")}
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

    def _move(self, x: Tensor, labels: Tensor) -> Tensor:
        """Noise (B, *latent_shape) -> standardised latents, by steps of Euler's or the midpoint rule."""
        num_steps = self.prior.sampling_steps or SAMPLING_STEPS
        for step in range(num_steps):
            ahead = x
            if self.prior.solver == "midpoint":
                ahead = x + 0.5 / num_steps * self._slope(x, step / num_steps, labels)
            middle = 0.5 if self.prior.solver == "midpoint" else 0.0
            x = x + self._slope(ahead, (step + middle) / num_steps, labels) / num_steps
        return x

    def _slope(self, y: Tensor, time: float, labels: Tensor) -> Tensor:
        """dy/dt of latents y = x / s (B, *latent_shape), with the label's strength of `prior.guidance`."""
        guidance, times = self.prior.guidance, y.new_full((len(y),), time)
        if guidance == 1.0 or not bool((labels >= 0).any()):
            rest: Tensor = self.network(y, times, labels)
        elif guidance == 0.0:
            rest = self.network(y, times, torch.full_like(labels, -1))
        else:
            both = torch.cat([labels, torch.full_like(labels, -1)])
            told, untold = self.network(y.repeat(2, *[1] * (y.dim() - 1)), times.repeat(2), both).chunk(2)
            rest = torch.lerp(untold, told, guidance)
        return rest.float() / ((1.0 - time) ** 2 + time**2)

    def _check(self, labels: Tensor) -> None:
        known = (self.frequencies > 0).nonzero()[:, 0].tolist()
        missing = sorted(set(labels.tolist()) - {-1, *known})
        if missing:
            raise ValueError(f"labels: found {missing}, expected classes with training images: {known}")


def _build(latent_shape: tuple[int, ...], num_classes: int, prior: config.Prior) -> VelocityNetwork:
    return VelocityNetwork(latent_shape, num_classes, prior.channels, prior.blocks, prior.dropout)


def _mean_and_scale(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (*latent_shape) of each number of the latents (N, *latent_shape).

    A number that hardly varies (a corner that is always black) gets a tenth of its channel's deviation at least, and a
    channel a tenth of the whole latent's: the flow would spend itself on what the decoder does not notice.

    Raises:
        UserError: the latents are not finite, or do not vary.
    """
    latents = latents.double()
    if not bool(torch.isfinite(latents).all()):
        raise UserError("prior: the encoder gave NaN or infinite latents; run `medgen train` again")
    mean = latents.mean(0)
    variance = (latents - mean).square().mean(0)
    # relative to the squares themselves: equal latents leave rounding errors only
    if bool(variance.sum() <= 1e-12 * latents.square().mean(0).sum()):
        raise UserError(
            f"prior: the latents of {len(latents)} training images do not vary, so there is nothing to learn: too few "
            "images, or the posterior collapsed (lower beta.end in train.phases, or set loss.free_bits)"
        )
    channels = variance.flatten(1).mean(1) if variance.dim() > 1 else variance
    floor = _SCALE_FLOOR**2 * channels.clamp_min(_SCALE_FLOOR**2 * variance.mean())
    floor = floor.view(-1, *[1] * (variance.dim() - 1))
    return mean.float(), variance.clamp_min(floor).sqrt().float()
