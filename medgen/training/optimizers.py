"""Optimizers, learning-rate schedules as functions of progress, gradient clipping and averaged weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medgen.config import Phase, Schedule


def build_optimizer(phase: Phase, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The phase's optimizer, fused, so that its step does nothing if `found_inf` is 1 (see guard.py)."""
    rate, decay = phase.learning_rate, phase.weight_decay
    if phase.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=0.9, fused=True)
    kind = torch.optim.AdamW if phase.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=decay, fused=True)


def rate_factor(phase: Phase, epoch: float, step: int) -> float:
    """Factor of the phase's learning rate at `epoch` (with a fraction) and `step`, both from the phase's start.

    Warm-up, times cosine annealing with warm restarts (Loshchilov & Hutter 2017). The factor of the plateau schedule
    depends on results: see `Plateau`.
    """
    warmup = min(1.0, (step + 1) / phase.warmup_steps) if phase.warmup_steps else 1.0
    schedule = phase.schedule
    if schedule.name != "cosine_restarts":
        return warmup
    start, period = 0.0, float(schedule.period)
    while epoch - start >= period:
        start, period = start + period, period * schedule.period_factor
    cosine = 0.5 * (1.0 + math.cos(math.pi * (epoch - start) / period))
    return warmup * (schedule.min_factor + (1.0 - schedule.min_factor) * cosine)


@dataclass
class Plateau:
    """Lower the learning rate when the validation objective stops falling, as torch's ReduceLROnPlateau does.

    Its state is three numbers, separate from the optimizer.
    """

    best: float = math.inf
    bad_epochs: int = 0
    factor: float = 1.0

    def update(self, objective: float, schedule: Schedule) -> None:
        """Update with an epoch's validation objective; lower by more than 0.01 % is better."""
        if schedule.name != "plateau":
            return
        if objective + 1e-4 * abs(objective) < self.best:  # an objective may be negative, where torch's rule is wrong
            self.best, self.bad_epochs = objective, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > schedule.patience:
            self.factor = max(self.factor * schedule.factor, schedule.min_factor)
            self.bad_epochs = 0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a total norm of at most `max_norm`; return the norm before, a scalar.

    A non-finite norm makes the gradients NaN: the caller must skip the step.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class AveragedWeights:
    """Exponential moving average of a model's parameters, without skipped updates.

    Buffers such as BatchNorm's statistics or a codebook's are averaged too, since those of the live weights do not
    match the averaged ones.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
        self.average = [parameter.detach().clone() for parameter in self.live]
        self.num_updates = 0

    def update(self, skipped: Tensor) -> None:
        """Update after an optimizer step; `skipped` is 1 if that step was skipped."""
        self.num_updates += 1
        # a smaller decay at first, so that the random initial weights fade quickly
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        step = torch._foreach_sub([p.detach() for p in self.live], self.average)
        torch._foreach_mul_(step, (1.0 - decay) * (1.0 - skipped))
        torch._foreach_add_(self.average, step)

    def swap(self) -> None:
        """Exchange the averaged and the live weights; a second call undoes it."""
        for average, live in zip(self.average, self.live, strict=True):
            kept = live.detach().clone()
            live.data.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, object]:
        """State for the checkpoint."""
        return {"average": self.average, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore a state from `state_dict`."""
        for average, saved in zip(self.average, state["average"], strict=True):  # type: ignore[call-overload]
            average.copy_(saved)
        self.num_updates = state["num_updates"]  # type: ignore[assignment]
