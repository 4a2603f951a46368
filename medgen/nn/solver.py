"""Fixed-step solvers of the ordinary differential equations along which flows draw."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Solver = Literal["euler", "midpoint"]


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, num_steps: int, solver: Solver) -> Tensor:
    """Moves `x` (B, ...) along `velocity(x, time)` from time 0 to 1 in equal steps; times are (B,).

    Euler's rule evaluates the velocity once a step, the midpoint rule twice.
    """
    for step in range(num_steps):
        time, ahead = x.new_full((len(x),), step / num_steps), x
        if solver == "midpoint":
            ahead = x + 0.5 / num_steps * velocity(x, time)
            time = time + 0.5 / num_steps
        x = x + velocity(ahead, time) / num_steps
    return x
