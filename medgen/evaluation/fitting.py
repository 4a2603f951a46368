"""Train the small networks of an evaluation for a fixed number of steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WARMUP = 0.1  # of the steps
CLIP_NORM = 10.0


def fit(weights: Sequence[nn.Parameter], loss_of: Callable[[int], Tensor], steps: int, learning_rate: float) -> None:
    """Minimise the loss that `loss_of` gives for each step with AdamW, on a one-cycle schedule (Smith & Topin 2019)."""
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        optimizer.step()
        schedule.step()
