"""Non-finite losses and gradients: caught before the update, named, and written down.

The check costs no wait for the device: a flag on the device latches at the first bad step and
makes the fused optimizer skip that update and every later one, until the host reads the flag.
The weights are then still those before the bad step, so its batch can be run again and looked at (averages kept in
buffers, such as BatchNorm's, have moved on).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen.io import write_atomic


class Guard:
    """Latches the first non-finite step, over all processes.

    The host looks every `read_every` steps: each one on a CPU, where looking is free.
    """

    def __init__(self, device: torch.device, any_process: Callable[[Tensor], Tensor]) -> None:
        self.read_every = 1 if device.type == "cpu" else 20
        self.any_process = any_process
        self.flag = torch.zeros((), device=device)  # 1.0 from the first bad step on
        self.bad_position = torch.full((), -1, dtype=torch.int64, device=device)

    def check(self, total: Tensor, gradient_norm: Tensor, position: int) -> Tensor:
        """Takes a step's loss and gradient norm; returns the flag that skips the update."""
        finite = torch.isfinite(total.detach()) & torch.isfinite(gradient_norm)
        bad = self.any_process((~finite).float())
        self.bad_position = torch.where((bad > 0) & (self.flag == 0), position, self.bad_position)
        self.flag = torch.maximum(self.flag, bad)
        return self.flag

    def read(self, position: int, force: bool) -> int | None:
        """The bad position if there is one and it is time to look; `force` looks now."""
        if not force and position % self.read_every:
            return None
        bad = int(self.bad_position.item())
        return None if bad < 0 else bad

    def reset(self) -> None:
        """After a rollback."""
        self.flag = torch.zeros_like(self.flag)
        self.bad_position = torch.full_like(self.bad_position, -1)


def first_nonfinite(terms: Mapping[str, Tensor]) -> str:
    """Name of the first loss term that is not finite; 'gradient' where all of them are."""
    return next((name for name, term in terms.items() if not bool(torch.isfinite(term))), "gradient")


def gradient_norms(model: nn.Module) -> dict[str, float | str]:
    """Gradient norm of every module that owns parameters."""
    norms = {}
    for name, module in model.named_modules():
        gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        if gradients:
            norms[name] = _plain(nn.utils.get_total_norm(gradients))
    return norms


def write_forensics(
    path: Path,
    *,
    facts: Mapping[str, object],
    terms: Mapping[str, Tensor],
    gradient_norms: Mapping[str, float | str],
    given: Tensor,
    files: list[str],
) -> None:
    """Writes what is known of a bad step as JSON.

    Non-finite numbers are written as the strings "inf", "-inf" and "nan": JSON has no others.
    """
    report: dict[str, Any] = {
        **facts,
        "terms": {name: _plain(term) for name, term in terms.items()},
        "gradient_norm_per_module": dict(gradient_norms),
        "input": {
            "min": _plain(given.min()),
            "max": _plain(given.max()),
            "mean": _plain(given.mean()),
            "num_nonfinite": int((~torch.isfinite(given)).sum()),
        },
        "files": files,
    }
    write_atomic(path, (json.dumps(report, indent=2) + "\n").encode())


def _plain(value: Tensor) -> float | str:
    number = float(value)
    return number if bool(torch.isfinite(value)) else str(number)
