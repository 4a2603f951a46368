"""Section `compute`: how a machine runs the stages, which does not change their results."""

from typing import Literal

from medgen.config.base import Count, Section


class Compute(Section):
    """Processes of a stage."""

    # on each machine, for features, train, prior, refiner and evaluate; auto: one per GPU, and one on a CPU
    processes: Literal["auto"] | Count = "auto"
