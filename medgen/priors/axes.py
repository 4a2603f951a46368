"""Latents in memory or on disk, and their principal axes, the coordinates of the analytic priors.

Shapes: N latents, D dimensions of a latent, R axes (R <= N - 1, D).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from medgen.console import warn
from medgen.errors import UserError

LOG_TAU = 1.8378770664093453  # log 2π
CHUNK_VALUES = 1 << 22  # values of latents read at once: 32 MB in float64
MAX_SIDE = 8192  # of a matrix whose eigenvectors are computed: 512 MB in float64
MAX_VALUES = 1 << 27  # of latents whose inner products are computed, and of the axes: 1 GB in float64
_MIN_VARIANCE = 1e-2  # in densities, relative to the mean variance of a coordinate; draws do not need it
_TINY = 1e-12  # least variance of a coordinate in densities if latents do not vary


class LatentArray(Protocol):
    """Latents (N, *latent_shape), float32 on the CPU: a tensor, or files of which only the rows asked for are read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *latent_shape)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """Latents (n, *latent_shape) of a slice or of row numbers (n,)."""
        ...


def chunk_size(latents: LatentArray) -> int:
    """Number of latents (N, *latent_shape) to read at once."""
    return max(1, CHUNK_VALUES // math.prod(latents.shape[1:]))


def chunks(latents: LatentArray) -> Iterator[tuple[slice, Tensor]]:
    """Yield all latents in order, a bounded number at once: their rows and their values (n, *latent_shape)."""
    size = chunk_size(latents)
    for start in range(0, len(latents), size):
        rows = slice(start, min(start + size, len(latents)))
        yield rows, latents[rows]


def spread(num: int, most: int) -> Tensor:
    """At most `most` row numbers, evenly spread over `num` rows."""
    return torch.linspace(0, num - 1, min(num, most), dtype=torch.float64).long()


@dataclass(frozen=True)
class PrincipalAxes:
    """latent = mean + (white * scales) @ directions, with uncorrelated unit-variance `white` (R,)."""

    mean: Tensor  # (D,)
    directions: Tensor  # (R, D) orthonormal rows, most variance first
    scales: Tensor  # (R,) standard deviations

    @classmethod
    def fit(cls, latents: LatentArray, share: float = 1.0) -> Self:
        """Fit axes that explain `share` of the variance of `latents` (N, ...); with 1.0 the moments match exactly.

        The eigendecomposition of the smaller of the two inner-product matrices, in float64, gives the same axes as the
        singular value decomposition of the centred latents in a fraction of its time. If that matrix would be larger
        than MAX_SIDE, or the latents of its rows more than MAX_VALUES, the axes are those of fewer latents, spread over
        all, and a warning says so. Latents that do not vary have no axes: all draws are their mean.

        Raises:
            UserError: the latents are not finite.
        """
        num, dim = len(latents), math.prod(latents.shape[1:])
        if dim < num and dim <= MAX_SIDE:
            mean, squares = moments(latents)
            matrix = torch.zeros(dim, dim, dtype=torch.float64)
            for _, part in chunks(latents):
                centred = part.flatten(1).double() - mean
                matrix += centred.T @ centred
            values, vectors = torch.linalg.eigh(matrix)
            values, directions = values.flip(0), vectors.T.flip(0)
            kept = num_axes(values[: _rank(values, num, squares)], share)
            directions = directions[:kept]
        else:
            used = min(num, MAX_SIDE, max(2, MAX_VALUES // dim))
            if used < num:
                warn(
                    f"prior: principal axes are fitted to {used} of {num} latents, as many as {dim} dimensions allow; "
                    "prior.name flow, or tokens for a model with a codebook, trains on all of them"
                )
                latents = latents[spread(num, used)]
            centred = latents[:].flatten(1).double()
            check_finite(centred)
            mean, squares = centred.mean(0), float(centred.square().sum())
            centred = centred - mean
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            values, vectors = values.flip(0), vectors.flip(1)
            kept = num_axes(values[: _rank(values, used, squares)], share)
            directions, num = vectors[:, :kept].T @ centred, used
        directions = directions / directions.norm(dim=1, keepdim=True)
        # fix the arbitrary sign of an eigenvector, so that a seed gives the same image on every machine
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return cls(mean, directions * largest.sign(), (values[:kept] / max(1, num - 1)).sqrt())

    def first(self, num: int) -> Self:
        """The first axes only."""
        return type(self)(self.mean, self.directions[:num], self.scales[:num])

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


def moments(latents: LatentArray) -> tuple[Tensor, float]:
    """Mean (D,) and sum of squares of the latents (N, ...), float64.

    Raises:
        UserError: the latents are not finite.
    """
    total, squares = torch.zeros(math.prod(latents.shape[1:]), dtype=torch.float64), 0.0
    for _, part in chunks(latents):
        flat = part.flatten(1).double()
        check_finite(flat)
        total += flat.sum(0)
        squares += float(flat.square().sum())
    return total / len(latents), squares


def _rank(values: Tensor, num: int, squares: float) -> int:
    """Number of falling eigenvalues that are not only rounding errors, for `num` latents with a sum of squares."""
    varies = num > 1 and bool(values[0] > 1e-12 * squares)  # relative to the squared norms
    return int((values > 1e-10 * values[0]).sum()) if varies else 0


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
    latents: LatentArray, fix: str = "lower beta.end in train.phases, or set loss.free_bits"
) -> UserError:
    """Return the error for latents (N, ...) that do not vary; `fix` says how to prevent a collapsed latent."""
    return UserError(
        f"prior: the latents of {len(latents)} training images do not vary, so no prior can be fitted: there are too "
        f"few images, or the latent collapsed ({fix})"
    )
