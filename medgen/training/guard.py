"""Detect non-finite losses and gradients before the update, and report on them.

The check does not wait for the device: a flag on the device latches at the first non-finite step and makes the fused
optimizer skip that update and every later one, until the host reads the flag. The weights are then still those before
the step, so that its batch can be run again and examined (averages in buffers, such as BatchNorm's, have changed).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen.io import to_json, write_atomic


class Guard:
    """Flag of the first non-finite step, over all processes.

    The host reads it every `read_every` steps: at each step on a CPU, where reading is free.
    """

    def __init__(self, device: torch.device, any_process: Callable[[Tensor], Tensor]) -> None:
        self.read_every = 1 if device.type == "cpu" else 20
        self.any_process = any_process
        self.flag = torch.zeros((), device=device)  # 1.0 from the first bad step on
        self.bad_position = torch.full((), -1, dtype=torch.int64, device=device)

    def check(self, total: Tensor, gradient_norm: Tensor, position: int) -> Tensor:
        """Return the flag that makes the optimizer skip a step with this loss and gradient norm."""
        finite = torch.isfinite(total.detach()) & torch.isfinite(gradient_norm)
        bad = self.any_process((~finite).float())
        self.bad_position = torch.where((bad > 0) & (self.flag == 0), position, self.bad_position)
        self.flag = torch.maximum(self.flag, bad)
        return self.flag

    def read(self, position: int, force: bool) -> int | None:
        """Position of the first non-finite step, if there is one and the host reads the flag now; `force` reads it."""
        if not force and position % self.read_every:
            return None
        bad = int(self.bad_position.item())
        return None if bad < 0 else bad

    def reset(self) -> None:
        """Clear the flag, after a rollback."""
        self.flag = torch.zeros_like(self.flag)
        self.bad_position = torch.full_like(self.bad_position, -1)


def first_nonfinite(terms: Mapping[str, Tensor]) -> str:
    """Name of the first loss term that is not finite; 'gradient' if all are finite."""
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
    images: Tensor,
    files: list[str],
) -> None:
    """Write a report on a non-finite step as JSON, with non-finite values as the strings "inf", "-inf" and "nan"."""
    report: dict[str, Any] = {
        **facts,
        "terms": {name: _plain(term) for name, term in terms.items()},
        "gradient_norm_per_module": dict(gradient_norms),
        "input": {
            "min": _plain(images.min()),
            "max": _plain(images.max()),
            "mean": _plain(images.mean()),
            "num_nonfinite": int((~torch.isfinite(images)).sum()),
        },
        "files": files,
    }
    write_atomic(path, to_json(report))


def _plain(value: Tensor) -> float | str:
    number = float(value)
    return number if bool(torch.isfinite(value)) else str(number)
