"""Principal axes of flattened latents: the coordinates in which the fitted priors work.

Shapes: N latents, D numbers in a latent, R axes (R <= N - 1, D).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medgen.errors import UserError

LOG_TAU = 1.8378770664093453  # log 2π
_VARIANCE_FLOOR = 1e-2  # of the mean variance of a coordinate; only densities need it, never draws
_TINY = 1e-12  # least variance of a coordinate in densities, where latents do not vary at all


@dataclass(frozen=True)
class PrincipalAxes:
    """latent = mean + (white * scales) @ directions, with uncorrelated unit-variance `white` (R,)."""

    mean: Tensor  # (D,)
    directions: Tensor  # (R, D) orthonormal rows, most variance first
    scales: Tensor  # (R,) standard deviations

    @classmethod
    def fit(cls, flat: Tensor, share: float = 1.0) -> Self:
        """Axes that hold `share` of the variance of `flat` (N, D); with 1.0 the moments match exactly.

        An eigendecomposition of the smaller of the two inner-product matrices, in float64: the same
        axes as the singular value decomposition of the centred latents at a fraction of its time.

        Latents that do not vary have no axes: all draws are their mean.

        Raises:
            UserError: the latents are not finite.
        """
        flat = flat.double()
        check_finite(flat)
        num, size = flat.shape
        mean = flat.mean(0)
        centred = flat - mean
        if num > size:
            values, vectors = torch.linalg.eigh(centred.T @ centred)
            directions = vectors.T
        else:
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            directions = vectors.T @ centred
        values, directions = values.flip(0), directions.flip(0)
        # Relative to the squared norms themselves: equal latents leave rounding errors only.
        varies = num > 1 and bool(values[0] > 1e-12 * flat.square().sum())
        rank = int((values > 1e-10 * values[0]).sum()) if varies else 0
        kept = num_axes(values[:rank], share)
        values, directions = values[:kept], directions[:kept]
        directions = directions / directions.norm(dim=1, keepdim=True)
        # The sign of an eigenvector is arbitrary; fixed here so that a seed means the same picture elsewhere.
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return cls(mean, directions * largest.sign(), (values / max(1, num - 1)).sqrt())

    def whiten(self, flat: Tensor) -> Tensor:
        """Latents (N, D) -> coordinates (N, R)."""
        return (flat.to(self.mean) - self.mean) @ self.directions.T / self.scales

    def colour(self, white: Tensor) -> Tensor:
        """Coordinates (N, R) -> latents (N, D)."""
        return self.mean + (white * self.scales) @ self.directions

    def residual_log_likelihood(self, flat: Tensor, means: Tensor, scales: Tensor) -> Tensor:
        """Log densities in nats (N, M) of `flat` (N, D), without its first coordinates, under M diagonal Gaussians.

        Directions without variance in the train split get a floor of 1 % of the mean variance, as
        unseen latents do vary there.

        Args:
            flat: (N, D) latents.
            means, scales: (M, S) means and standard deviations of the last S whitened coordinates.
        """
        mean, directions, widths = self.mean.double(), self.directions.double(), self.scales.double()
        size, rank, skip = len(mean), len(widths), len(widths) - means.shape[1]
        floor = (_VARIANCE_FLOOR * widths.square().sum() / size).clamp_min(_TINY)
        centred = flat.double() - mean
        along = centred @ directions.T  # (N, R)
        off = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0.0) / floor + (size - rank) * floor.log()
        columns = []
        for centre, variances in zip(means * widths[skip:], (scales * widths[skip:]).square(), strict=True):
            variances = variances.clamp_min(floor)
            squares = ((along[:, skip:] - centre).square() / variances).sum(1)
            columns.append(-0.5 * (squares + variances.log().sum() + off + (size - skip) * LOG_TAU))
        return torch.stack(columns, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` takes: float32, contiguous."""
        return {name: getattr(self, name).float().contiguous() for name in ("mean", "directions", "scales")}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The axes whose `tensors` these are."""
        return cls(tensors["mean"], tensors["directions"], tensors["scales"])


def num_axes(variances: Tensor, share: float) -> int:
    """How many of the falling `variances` (R,) hold at least `share` of their sum."""
    if share >= 1.0 or len(variances) == 0:
        return len(variances)
    cumulative = variances.cumsum(0) / variances.sum()
    return int((cumulative < share).sum()) + 1


def check_finite(latents: Tensor) -> None:
    """Raises UserError where there is a latent that is not finite."""
    if not bool(torch.isfinite(latents).all()):
        raise UserError("prior: the encoder gave NaN or infinite latents; run `medgen train` again")


def all_alike(latents: Tensor, mend: str = "lower beta.end in train.phases, or set loss.free_bits") -> UserError:
    """The error for latents (N, ...) that do not vary; `mend` is what to do about a collapsed model."""
    return UserError(
        f"prior: the latents of {len(latents)} training images do not vary, so there is nothing to learn: too few "
        f"images, or the latent collapsed ({mend})"
    )
