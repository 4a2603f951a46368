"""Sections `tracking` and `registry`."""

import warnings
from typing import Annotated, Any

from pydantic import Field, model_validator

from medgen.config.base import Fraction, NonNegative, Positive, Section, Url

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9_. -]*$"


class Tracking(Section):
    """Recording of runs."""

    uri: Url = "sqlite:///mlflow.db"  # a relative sqlite path is in the project's folder
    experiment: str = "medgen"
    enabled: bool = True
    system_metrics: bool = True
    timeout_seconds: Positive = 5.0  # of one call to a tracking server


class Gates(Section):
    """Conditions for a version to become champion (docs/registry.md). Segmentation models have those on Dice alone."""

    ssim_floor: Fraction = 0.6  # least reconstruction/ssim
    ssim_margin: NonNegative = 0.01  # and at most this much below the champion's on the same images
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = (
        0.05  # a candidate that is worse than the champion with a smaller p-value is refused
    )
    copy_rate_ceiling: Annotated[float, Field(ge=0.0, le=1.0)] | None = (
        None  # largest privacy/copy_rate; None: privacy/copy_rate_plausible
    )
    # least utility/gain_both and utility/gain_dice_both, of those that are measured; None: no gate
    utility_floor: Annotated[float, Field(gt=-1.0, lt=1.0)] | None = None
    dice_floor: Fraction = 0.6  # least segmentation/dice_foreground
    dice_margin: NonNegative = 0.01  # and at most this much below the champion's on the same images

    @model_validator(mode="before")
    @classmethod
    def _ignore_kid_margin(cls, values: Any) -> Any:
        if isinstance(values, dict) and "kid_margin" in values:
            warnings.warn("registry.gates.kid_margin: no longer used; the gates are paired tests now", stacklevel=2)
            return {key: value for key, value in values.items() if key != "kid_margin"}
        return values


class Registry(Section):
    """Registration and promotion of models."""

    model_name: Annotated[str, Field(pattern=MODEL_NAME)] = "medgen"  # in a params file, data.name if that is given
    register_after_evaluate: bool = True
    gates: Gates = Gates()
