"""Principal axes of flattened latents, the coordinates of the analytic priors.

Shapes: N latents, D dimensions of a latent, R axes (R <= N - 1, D).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from medgen.errors import UserError

LOG_TAU = 1.8378770664093453  # log 2π
_MIN_VARIANCE = 1e-2  # in densities, relative to the mean variance of a coordinate; draws do not need it
_TINY = 1e-12  # least variance of a coordinate in densities if latents do not vary


@dataclass(frozen=True)
class PrincipalAxes:
    """latent = mean + (white * scales) @ directions, with uncorrelated unit-variance `white` (R,)."""

    mean: Tensor  # (D,)
    directions: Tensor  # (R, D) orthonormal rows, most variance first
    scales: Tensor  # (R,) standard deviations

    @classmethod
    def fit(cls, flat: Tensor, share: float = 1.0) -> Self:
        """Fit axes that explain `share` of the variance of `flat` (N, D); with 1.0 the moments match exactly.

        The eigendecomposition of the smaller of the two inner-product matrices, in float64, gives the same axes as the
        singular value decomposition of the centred latents in a fraction of its time. Latents that do not vary have no
        axes: all draws are their mean.

        Raises:
            UserError: the latents are not finite.
        """
        flat = flat.double()
        check_finite(flat)
        num, dim = flat.shape
        mean = flat.mean(0)
        centred = flat - mean
        if num > dim:
            values, vectors = torch.linalg.eigh(centred.T @ centred)
            directions = vectors.T
        else:
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            directions = vectors.T @ centred
        values, directions = values.flip(0), directions.flip(0)
        # relative to the squared norms: equal latents leave only rounding errors
        varies = num > 1 and bool(values[0] > 1e-12 * flat.square().sum())
        rank = int((values > 1e-10 * values[0]).sum()) if varies else 0
        kept = num_axes(values[:rank], share)
        values, directions = values[:kept], directions[:kept]
        directions = directions / directions.norm(dim=1, keepdim=True)
        # fix the arbitrary sign of an eigenvector, so that a seed gives the same image on every machine
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return cls(mean, directions * largest.sign(), (values / max(1, num - 1)).sqrt())

    def whiten(self, flat: Tensor) -> Tensor:
        """Latents (N, D) -> whitened coordinates (N, R)."""
        return (flat.to(self.mean) - self.mean) @ self.directions.T / self.scales

    def colour(self, white: Tensor) -> Tensor:
        """Whitened coordinates (N, R) -> latents (N, D)."""
        return self.mean + (white * self.scales) @ self.directions

    def residual_log_likelihood(self, flat: Tensor, means: Tensor, scales: Tensor) -> Tensor:
        """Log densities in nats (N, M) of the last coordinates of `flat` (N, D) under M diagonal Gaussians.

        A coordinate's variance is at least 1 % of the mean variance, because unseen latents vary even where the train
        split does not.

        Args:
            flat: (N, D) latents.
            means, scales: (M, S) means and standard deviations of the last S whitened coordinates.
        """
        mean, directions, widths = self.mean.double(), self.directions.double(), self.scales.double()
        dim, rank, skip = len(mean), len(widths), len(widths) - means.shape[1]
        least = (_MIN_VARIANCE * widths.square().sum() / dim).clamp_min(_TINY)
        centred = flat.double() - mean
        along = centred @ directions.T  # (N, R)
        off = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0.0) / least + (dim - rank) * least.log()
        columns = []
        for centre, variances in zip(means * widths[skip:], (scales * widths[skip:]).square(), strict=True):
            variances = variances.clamp_min(least)
            squares = ((along[:, skip:] - centre).square() / variances).sum(1)
            columns.append(-0.5 * (squares + variances.log().sum() + off + (dim - skip) * LOG_TAU))
        return torch.stack(columns, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for `restore`: float32, contiguous."""
        return {name: getattr(self, name).float().contiguous() for name in ("mean", "directions", "scales")}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the axes that `tensors` describe."""
        return cls(tensors["mean"], tensors["directions"], tensors["scales"])


def num_axes(variances: Tensor, share: float) -> int:
    """Number of the falling `variances` (R,) that hold at least `share` of their sum."""
    if share >= 1.0 or len(variances) == 0:
        return len(variances)
    cumulative = variances.cumsum(0) / variances.sum()
    return int((cumulative < share).sum()) + 1


def check_finite(latents: Tensor) -> None:
    """Raise UserError if a latent is not finite."""
    if not bool(torch.isfinite(latents).all()):
        raise UserError("prior: the encoder's latents contain NaN or infinity; run `medgen train` again")


def constant_latents_error(
    latents: Tensor, fix: str = "lower beta.end in train.phases, or set loss.free_bits"
) -> UserError:
    """Return the error for latents (N, ...) that do not vary; `fix` says how to prevent a collapsed latent."""
    return UserError(
        f"prior: the latents of {len(latents)} training images do not vary, so no prior can be fitted: there are too "
        f"few images, or the latent collapsed ({fix})"
    )
