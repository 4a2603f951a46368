"""A training batch in parts: each process has one at a time, and with gradient accumulation one after another.

A part makes the random draws of the whole batch and keeps those of its own rows. Statistics of a batch are taken over
all processes. So several processes train the model that one would. Outside of `batch_part` a batch is whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BatchPart:
    """Rows `index`, `index + count`, … of a batch, while `processes - 1` other processes have other parts."""

    index: int = 0
    count: int = 1
    processes: int = 1


_part = BatchPart()
_eager_all_reduce: Callable[[Tensor], Tensor] | None = None  # torch's, with a gradient, left as it is by torch.compile


@contextmanager
def batch_part(part: BatchPart) -> Iterator[None]:
    """Compute on this part of a batch within the block."""
    global _part
    earlier, _part = _part, part
    try:
        yield
    finally:
        _part = earlier


def rand(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniform draws of this shape for the rows of the part, on the CPU."""
    return torch.rand(_part.count * shape[0], *shape[1:], generator=generator)[_part.index :: _part.count]


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal draws of this shape for the rows of the part, on the CPU."""
    return torch.randn(_part.count * shape[0], *shape[1:], generator=generator)[_part.index :: _part.count]


def randn_like(rows: Tensor) -> Tensor:
    """Normal draws for the rows of the part from torch's global generator, on their device."""
    if _part.count == 1:
        return torch.randn_like(rows)
    return torch.randn_like(torch.cat([rows] * _part.count))[_part.index :: _part.count]


def draw_vectors(vectors: Tensor, num: int) -> Tensor:
    """`num` vectors (num, Z) drawn with replacement from those of all processes (B, P, Z); the same on each."""
    size, positions = vectors.shape[:2]
    drawn = torch.randint(_part.processes * size * positions, (num,), device=vectors.device)
    image, position = drawn // positions, drawn % positions
    own = image % _part.processes == _part.index % _part.processes
    chosen = torch.where(own[:, None], vectors[image // _part.processes, position], 0.0)
    if _part.processes > 1:
        torch.distributed.all_reduce(chosen)
    return chosen


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum of the parts' values over processes, with its gradient."""
    return value if _part.processes == 1 else _all_reduce(value)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of the parts' values over processes, with its gradient."""
    return value if _part.processes == 1 else _all_reduce(value) / _part.processes


def _all_reduce(value: Tensor) -> Tensor:
    global _eager_all_reduce
    if _eager_all_reduce is None:  # at the first use: `disable` imports the compiler, which takes as long as torch
        from torch.distributed.nn.functional import all_reduce

        _eager_all_reduce = torch.compiler.disable(all_reduce)  # type: ignore[no-untyped-call]
    return _eager_all_reduce(value)


class Dropout(nn.Dropout):
    """Dropout with the draws of the whole batch."""

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (B, ...) -> the same shape."""
        if _part.count == 1 or not self.training:
            return super().forward(rows)
        kept = F.dropout(torch.ones_like(torch.cat([rows] * _part.count)), self.p)
        return rows * kept[_part.index :: _part.count]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of images or volumes with the statistics of all processes, on every device."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C, D, H, W) -> the same shape."""
        if _part.processes == 1 or not self.training:
            return super().forward(x)
        wide, others = x.float(), (0, *range(2, x.dim()))
        ones = [1] * (x.dim() - 2)
        mean = mean_over_processes(wide.mean(others))
        centred = wide - mean.view(-1, *ones)
        variance = mean_over_processes(centred.square().mean(others))
        self._update_running(mean.detach(), variance.detach(), _part.processes * x.numel() // x.shape[1])
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(-1, *ones) + self.bias.view(-1, *ones)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any number of sides."""

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: int) -> None:
        momentum = self.momentum or 0.0
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1), momentum)
        self.num_batches_tracked += 1
