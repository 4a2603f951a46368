"""Section `tune`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from medgen.config.base import Count, Fraction, Positive, Section, Seed, Url


class Searched(Section):
    """Search range of a parameter: from `low` to `high`, both included, or one of `choices`."""

    low: Annotated[float, Field(allow_inf_nan=False)] | None = None
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None
    log: bool = False  # uniform in the logarithm
    step: Positive | None = None
    choices: Annotated[tuple[str | int | float | bool, ...], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _is_a_range_or_choices(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("expected choices, or low and high, found both")
            if len(set(self.choices)) < len(self.choices):
                raise ValueError(f"choices must differ, found {list(self.choices)}")
            return self
        if self.low is None or self.high is None:
            raise ValueError("expected low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"the range is empty: low must lie below high, found {self.low:g} and {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0 and no step")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is longer than the range")
        return self


class TrialBudget(Section):
    """Limits of a trial, cheaper than a full training."""

    epochs: Count | None = None  # sum over all phases, which shrink in proportion, with their ramps and schedules
    subset: Count | None = None  # only this many training images, spread over the split
    num_generated: Annotated[int, Field(ge=3)] = 2000  # below 2000 samples the ranking is rough


class Tune(Section):
    """Parameter search; every trial is evaluated on the val split."""

    space: dict[str, Searched] = Field(default_factory=dict)  # dotted key -> range; empty: see tune/space.py
    # a key of docs/contract.md, or pareto: 1 - MS-SSIM (1 - SSIM of small images) against MMD. None:
    # generation/mmd_domain; segmentation/dice_foreground of segmentation models
    objective: str | None = None
    ssim_floor: Fraction | None = None  # least reconstruction/ssim of a winner; None: that of params.yaml
    pruner: Literal["median", "hyperband", "none"] = "median"  # by val/ssim (val/dice) after each epoch
    storage: Url = "optuna.journal"  # a file, relative to the project's folder, or postgresql://…
    seed: Seed = 0
    trial: TrialBudget = TrialBudget()
