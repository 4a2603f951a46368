"""The straight path from noise to latents, and its velocity for Gaussian latents.

Between noise x0 and a standardised latent x1 lies x_t = (1 - t) x0 + t x1. If the latents of a class are Gaussian with
centre μ and with variances λ along principal axes that all classes share, then x_t has the mean t μ and the variances
(1 - t)² + t² λ, and along each axis the mean velocity given x_t is
μ + (t λ - (1 - t)) / ((1 - t)² + t² λ) · (x_t - t μ).

Shapes: N latents, B batch, D dimensions of a flattened latent, K axes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medgen.priors.axes import LatentArray, PrincipalAxes, chunks, constant_latents_error, moments

_MAX_AXES = 256  # bounds the matrix; the remaining directions share one variance
_IMAGES_PER_AXIS = 12  # with more axes the likelihood of unseen latents falls: the last axes are noise
_MIN_RELATIVE_SCALE = 0.1  # of the channel's root-mean-square deviation, and of the whole latent's for a channel
_MIN_VARIANCE = 1e-2  # of a standardised dimension, whose variance is 1


@dataclass(frozen=True)
class GaussianPath:
    """Scales of the latents; centres of standardised latents, and their variances along principal axes."""

    mean: Tensor  # (*latent_shape)
    scale: Tensor  # (*latent_shape)
    centres: Tensor  # (num_classes + 1, *latent_shape); the first one is 0, for latents without a label
    directions: Tensor  # (K, D) orthonormal rows
    variances: Tensor  # (K + 1,); the last one is shared by all other directions

    @classmethod
    def fit(cls, latents: LatentArray, labels: Tensor, num_classes: int) -> Self:
        """Fit the path to latents (N, *latent_shape) with labels (N,), -1 where unlabelled, on the CPU.

        Raises:
            UserError: the latents are not finite, or do not vary.
        """
        mean, scale = _mean_and_scale(latents)
        centres = _class_centres(latents, mean, scale, labels, num_classes)
        axes = PrincipalAxes.fit(_Centred(latents, mean, scale, centres, labels))
        num, dim = len(latents), math.prod(latents.shape[1:])
        kept = min(_MAX_AXES, max(1, num // _IMAGES_PER_AXIS), len(axes.scales))
        variances = axes.scales.square()
        others = variances[kept:].sum() / max(1, dim - kept)
        variances = torch.cat([variances[:kept], others[None]]).clamp_min(_MIN_VARIANCE)
        directions = axes.directions[:kept].contiguous()
        return cls(*(tensor.float() for tensor in (mean, scale, centres, directions, variances)))

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents (B, *latent_shape) -> standardised latents."""
        return (latents.float() - self.mean) / self.scale

    def unstandardise(self, x: Tensor) -> Tensor:
        """Standardised latents (B, *latent_shape) -> latents."""
        return self.mean + self.scale * x

    def variances_at(self, time: Tensor) -> Tensor:
        """Variances (B, K + 1) of x_t at times (B,)."""
        t = time[:, None]
        return (1.0 - t).square() + t.square() * self.variances

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Mean velocity at `x` (B, *latent_shape) and times (B,) of Gaussian latents with labels (B,)."""
        t, centre = time[:, None], self.centres[labels + 1]
        factors = (t * self.variances - (1.0 - t)) / self.variances_at(time)
        return centre + self.scale_axes(x - expand(time, x) * centre, factors)

    def scale_axes(self, x: Tensor, factors: Tensor) -> Tensor:
        """`x` (B, *latent_shape) times `factors` (B, K + 1) along each axis and in all other directions."""
        with torch.autocast(x.device.type, enabled=False):  # half precision would add an error the network cannot see
            flat, others = x.flatten(1), factors[:, -1:]
            along = (factors[:, :-1] - others) * (flat @ self.directions.T)  # (B, K)
            return (others * flat + along @ self.directions).view(x.shape)

    def to(self, device: torch.device) -> Self:
        """Return the path on a device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the path whose fields are among `tensors`."""
        return cls(**{name: tensors[name] for name in ("mean", "scale", "centres", "directions", "variances")})


def expand(time: Tensor, x: Tensor) -> Tensor:
    """Times (B,) reshaped to (B, 1 ...), to broadcast with `x` (B, *latent_shape)."""
    return time.view(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class _Centred:
    """Standardised latents minus the centre of their class, computed for the rows that are read."""

    latents: LatentArray  # (N, *latent_shape)
    mean: Tensor  # (*latent_shape)
    scale: Tensor  # (*latent_shape)
    centres: Tensor  # (num_classes + 1, *latent_shape)
    labels: Tensor  # (N,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.latents.shape

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return (self.latents[rows].double() - self.mean) / self.scale - self.centres[self.labels[rows] + 1]


def _class_centres(latents: LatentArray, mean: Tensor, scale: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Centres (num_classes + 1, *latent_shape) of standardised latents, those of rare classes shrunk towards 0.

    The mean of few latents is mostly noise; it is shrunk by the share of noise in its square (James & Stein 1961).
    """
    centres = mean.new_zeros(num_classes + 1, *mean.shape)
    sums, squares = torch.zeros_like(centres), mean.new_zeros(num_classes + 1)
    for rows, part in chunks(latents) if num_classes else ():
        standard, row_labels = (part.double() - mean) / scale, labels[rows] + 1
        sums.index_add_(0, row_labels, standard)
        squares.index_add_(0, row_labels, standard.square().flatten(1).sum(1))
    for label in range(num_classes):
        count = int((labels == label).sum())
        if count > 1:  # a single latent has no variance
            centre = sums[label + 1] / count
            size = centre.square().sum()
            noise = (squares[label + 1] / count - size).clamp_min(0.0) / (count - 1)  # variance of the centre
            centres[label + 1] = centre * (1.0 - noise / size).clamp_min(0.0)
    return centres


def _mean_and_scale(latents: LatentArray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (*latent_shape) of each dimension of the latents (N, *latent_shape), float64.

    The deviation of a dimension that hardly varies (a corner that is always black) is at least a tenth of its
    channel's, and that of a channel at least a tenth of the whole latent's: the network would otherwise spend its
    capacity on what the decoder ignores.

    Raises:
        UserError: the latents are not finite, or do not vary.
    """
    flat_mean, squares = moments(latents)
    total = torch.zeros_like(flat_mean)
    for _, part in chunks(latents):
        total += (part.flatten(1).double() - flat_mean).square().sum(0)
    # relative to the squares: equal latents leave only rounding errors
    if bool(total.sum() <= 1e-12 * squares):
        raise constant_latents_error(latents)
    mean, variance = flat_mean.view(latents.shape[1:]), total.view(latents.shape[1:]) / len(latents)
    channels = variance.flatten(1).mean(1) if variance.dim() > 1 else variance
    least = _MIN_RELATIVE_SCALE**2 * channels.clamp_min(_MIN_RELATIVE_SCALE**2 * variance.mean())
    least = least.view(-1, *[1] * (variance.dim() - 1))
    return mean, variance.clamp_min(least).sqrt()
