"""The straight path from noise to latents, and how it moves where latents are Gaussian.

Between noise x0 and a standardised latent x1 lies x_t = (1 - t) x0 + t x1. Were the latents of a class Gaussian, around
a centre μ and with variances λ along principal axes that all classes share, then x_t would have the mean t μ and the
variances (1 - t)² + t² λ, and the mean velocity, given x_t, would along each axis be
μ + (t λ - (1 - t)) / ((1 - t)² + t² λ) · (x_t - t μ).

Shapes: N latents, B of them in a batch, D numbers in a flattened latent, K axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medgen.priors.axes import PrincipalAxes, all_alike, check_finite

_MAX_AXES = 256  # bounds the matrix; the directions beyond share one variance
_IMAGES_PER_AXIS = 12  # with more axes, unseen latents are less likely: the last ones are chance
_SCALE_FLOOR = 0.1  # of the channel's root-mean-square deviation, and of all numbers' for a channel
_VARIANCE_FLOOR = 1e-2  # of a standardised number's variance, 1


@dataclass(frozen=True)
class GaussianPath:
    """Scales of the latents; centres of standardised latents, and their variances along principal axes."""

    mean: Tensor  # (*latent_shape)
    scale: Tensor  # (*latent_shape)
    centres: Tensor  # (num_classes + 1, *latent_shape), the first one, 0, that of latents without a label
    directions: Tensor  # (K, D) orthonormal rows
    variances: Tensor  # (K + 1,), the last one that of every other direction

    @classmethod
    def fit(cls, latents: Tensor, labels: Tensor, num_classes: int) -> Self:
        """The path to latents (N, *latent_shape) with labels (N,), -1 where unlabelled, on the CPU.

        Raises:
            UserError: the latents are not finite, or do not vary.
        """
        mean, scale = _mean_and_scale(latents.double())
        standard = (latents.double() - mean) / scale
        centres = _centres(standard, labels, num_classes)
        flat = (standard - centres[labels + 1]).flatten(1)
        num, size = flat.shape
        axes = PrincipalAxes.fit(flat)
        kept = min(_MAX_AXES, max(1, num // _IMAGES_PER_AXIS), len(axes.scales))
        variances = axes.scales.square()
        others = variances[kept:].sum() / max(1, size - kept)
        variances = torch.cat([variances[:kept], others[None]]).clamp_min(_VARIANCE_FLOOR)
        directions = axes.directions[:kept].contiguous()
        return cls(*(tensor.float() for tensor in (mean, scale, centres, directions, variances)))

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents (B, *latent_shape) in units of their own scales."""
        return (latents.float() - self.mean) / self.scale

    def restore_scale(self, x: Tensor) -> Tensor:
        """Standardised latents (B, *latent_shape) -> latents."""
        return self.mean + self.scale * x

    def spread(self, time: Tensor) -> Tensor:
        """Variances (B, K + 1) of x_t at times (B,)."""
        t = time[:, None]
        return (1.0 - t).square() + t.square() * self.variances

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Mean velocity of Gaussian latents of classes (B,) that are at `x` (B, *latent_shape) at times (B,)."""
        t, centre = time[:, None], self.centres[labels + 1]
        factors = (t * self.variances - (1.0 - t)) / self.spread(time)
        return centre + self.stretch(x - expand(time, x) * centre, factors)

    def stretch(self, x: Tensor, factors: Tensor) -> Tensor:
        """`x` (B, *latent_shape) times `factors` (B, K + 1) along each axis and in all other directions."""
        with torch.autocast(x.device.type, enabled=False):  # half precision would blur what is not learnt
            flat, others = x.flatten(1), factors[:, -1:]
            along = (factors[:, :-1] - others) * (flat @ self.directions.T)  # (B, K)
            return (others * flat + along @ self.directions).view(x.shape)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The path whose fields are among `tensors`."""
        return cls(**{name: tensors[name] for name in ("mean", "scale", "centres", "directions", "variances")})


def expand(time: Tensor, x: Tensor) -> Tensor:
    """Times (B,) as (B, 1 ...), to go with `x` (B, *latent_shape)."""
    return time.view(-1, *[1] * (x.dim() - 1))


def _centres(standard: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Centres (num_classes + 1, *latent_shape) of standardised latents, those of rare classes drawn towards 0.

    A mean of few latents is mostly chance; it is shrunk by chance's share of its square (James & Stein 1961).
    """
    centres = standard.new_zeros(num_classes + 1, *standard.shape[1:])
    for label in range(num_classes):
        rows = standard[labels == label]
        if len(rows) > 1:  # one latent alone does not say how far its class spreads
            centre = rows.mean(0)
            chance = rows.var(0).sum() / len(rows)
            centres[label + 1] = centre * (1.0 - chance / centre.square().sum()).clamp_min(0.0)
    return centres


def _mean_and_scale(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (*latent_shape) of each number of the latents (N, *latent_shape), float64.

    A number that hardly varies (a corner that is always black) gets a tenth of its channel's deviation at least, and a
    channel a tenth of the whole latent's: the flow would spend itself on what the decoder does not notice.

    Raises:
        UserError: the latents are not finite, or do not vary.
    """
    check_finite(latents)
    mean = latents.mean(0)
    variance = (latents - mean).square().mean(0)
    # relative to the squares themselves: equal latents leave rounding errors only
    if bool(variance.sum() <= 1e-12 * latents.square().mean(0).sum()):
        raise all_alike(latents)
    channels = variance.flatten(1).mean(1) if variance.dim() > 1 else variance
    floor = _SCALE_FLOOR**2 * channels.clamp_min(_SCALE_FLOOR**2 * variance.mean())
    floor = floor.view(-1, *[1] * (variance.dim() - 1))
    return mean, variance.clamp_min(floor).sqrt()
