"""One process or many: `torchrun --nproc-per-node 2 -m medgen train`, the same under Slurm."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from medgen.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one process that writes files, logs and prints."""
        return self.rank == 0

    def mean_of(self, values: dict[str, float]) -> dict[str, float]:
        """Each value's mean over processes, which all hold the same names."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def any(self, flag: Tensor) -> Tensor:
        """The largest of a flag over processes."""
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the main one's values."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Waits for the others."""
        if self.size > 1:
            dist.barrier()


class StopRequest:
    """Whether a signal asked this process to stop; it is noticed between two steps, so that nothing is left half done.

    SIGTERM and SIGUSR1 come from a cluster that takes its machine back. Ctrl-C asks too; a second one stops at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes these signals instead of dying of them."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread alone
            return
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)  # a shell's background job ignores Ctrl-C and goes on doing so
        earlier = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: object) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def join(device: str) -> Iterator[World]:
    """Joins the process group that torchrun or Slurm announces in the environment.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    if size > 1 and "MASTER_ADDR" not in os.environ:
        size = 1  # sbatch with several tasks, but not a training launched as such
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) if size > 1 else 0
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) if size > 1 else 0
    chosen = pick_device(device, local)
    if size == 1:
        yield World(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """The device asked for; "auto" takes the GPU where there is one.

    Raises:
        UserError: CUDA is asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: 'cuda' asked for, but torch sees no GPU; use 'auto', or run `medgen doctor`")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """bf16 on GPUs that have it, float32 elsewhere: on CPUs autocast gained nothing (benchmarks/train.py)."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
