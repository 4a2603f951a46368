"""The processes that train a model together, each with its part of the data."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from medgen.console import configure
from medgen.errors import UserError
from medgen.machine import signal_handler

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that train, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the process that writes files, logs and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's range of `count` items, such as batches."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_of(self, values: dict[str, float]) -> dict[str, float]:
        """Sum of each value over processes, which all have the same names."""
        if self.size == 1:
            return values
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def mean_of(self, values: dict[str, float]) -> dict[str, float]:
        """Mean of each value over processes, which all have the same names."""
        return {name: total / self.size for name, total in self.sum_of(values).items()}

    def concat(self, tensor: Tensor) -> Tensor:
        """The rows of all processes' tensors, in the order of their ranks, on the CPU of each.

        The tensors may differ in their number of rows, which may be 0, and in nothing else.
        """
        if self.size == 1:
            return tensor.cpu()
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(tensor)
        parts = []
        for rank, count in enumerate(self.sum(counts).tolist()):  # one at a time saves device memory
            own = rank == self.rank
            part = (
                tensor.to(self.device).contiguous()
                if own
                else tensor.new_empty(count, *tensor.shape[1:], device=self.device)
            )
            # the backends have no uint16
            dist.broadcast(part.view(torch.uint8) if part.dtype == torch.uint16 else part, rank)
            parts.append(part.cpu())
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over processes, on its device."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def any(self, flag: Tensor) -> Tensor:
        """Maximum of each element of a flag over processes."""
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def check_batch_size(self, section: str, batch_size: int, num_images: int, parts: int = 1) -> None:
        """Raise UserError unless processes get equal shares of a batch, and each of its `parts` equally many images."""
        if batch_size % (self.size * parts):
            steps = f" and {section}.accumulate_steps: {parts}" if parts > 1 else ""
            raise UserError(
                f"{section}.batch_size: {batch_size} images a step, of {num_images} training images, for {self.size} "
                f"processes{steps}; expected a multiple of {self.size * parts}; change {section}.batch_size"
                f"{f', {section}.accumulate_steps' if parts > 1 else ''} or compute.processes"
            )

    def from_main(self, value: T) -> T:
        """The main process's value, in all processes."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on this process's device with those of the main process."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


class StopRequest:
    """A signal's request to stop, which the loop reads between two steps.

    Clusters send SIGTERM or SIGUSR1 before they take a machine back. Ctrl-C requests a stop too; a second one stops at
    once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # number of the signal

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record these signals instead of ending the process."""
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)  # a background job of a shell ignores Ctrl-C
        with signal_handler(numbers, self._record):
            yield

    def _record(self, number: int, _: object) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the process group that torchrun or Slurm describes in the environment.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    size = group_size() or 1
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) if size > 1 else 0
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) if size > 1 else 0
    chosen = pick_device(device, local)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if rank > 0:
        configure(quiet=True)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()


def group_size() -> int | None:
    """Number of processes in the group that this process was started in; None if it was started alone."""
    if "MASTER_ADDR" not in os.environ:  # also a Slurm job with several tasks that was not started as a group
        return None
    size = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS"))
    return None if size is None else int(size)


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """The requested device; "auto" is the GPU if there is one.

    Raises:
        UserError: CUDA is requested and torch finds no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: 'cuda', but torch finds no GPU; use 'auto', or run `medgen doctor`")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """Data type of the forward pass; "auto" is bf16 on GPUs with it, and float32 elsewhere.

    On CPUs autocast is no faster (benchmarks/train.py).
    """
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
