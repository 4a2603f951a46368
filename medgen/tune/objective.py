"""The objective of a search: one metric of the val split, or two whose Pareto front is searched."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medgen.config import Evaluate
from medgen.console import warn
from medgen.errors import UserError
from medgen.metrics.reconstruction import ms_ssim_window

Direction = Literal["minimize", "maximize"]

PARETO = "pareto"
SSIM = "reconstruction/ssim"
MS_SSIM = "reconstruction/ms_ssim"
MMD = "generation/mmd_domain"
RECALL = "generation/recall"
DICE = "segmentation/dice_foreground"
LABEL_KEY, OLD_LABEL_KEY = "generation/label_accuracy", "generation/label_agreement"
# keys of docs/contract.md whose higher or lower values are better; the other metrics only describe a model
DIRECTIONS: dict[str, Direction] = {
    "reconstruction/(l1|mse)": "minimize",
    "reconstruction/(psnr|ssim|ms_ssim)": "maximize",
    "generation/(kid|mmd|fd)_(domain|inception|local)": "minimize",
    "(reconstruction|generation)/spectrum_distance": "minimize",
    "generation/inception_score": "maximize",
    "generation/(precision|recall|density|coverage)": "maximize",
    "generation/label_accuracy(_wrong)?": "maximize",
    "latent/(active_units|codebook_usage|codebook_perplexity)": "maximize",
    "privacy/copy_rate(_features|_pixels)?": "minimize",
    "segmentation/(dice|iou)_(foreground|[0-9]+)": "maximize",
}
CHOICES = f"{MMD} (the default), {SSIM}, {DICE} for masks, {PARETO}, or another key of docs/contract.md"


@dataclass(frozen=True)
class Objective:
    """One metric or two, with the direction of better values."""

    name: str  # in tune.objective
    keys: tuple[str, ...]
    directions: tuple[Direction, ...]

    def __str__(self) -> str:
        return ", ".join(f"{direction} {label}" for direction, label in zip(self.directions, self.labels, strict=True))

    @property
    def is_pareto(self) -> bool:
        """True if the Pareto front of two metrics is searched."""
        return self.name == PARETO

    @property
    def has_floor(self) -> bool:
        """True if a trial must reach a minimum SSIM: a model can draw good samples and reconstruct badly."""
        return not self.is_pareto and self.keys[0].startswith(("generation/", "latent/", "privacy/"))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the values in figures and tables."""
        return tuple(f"1 − {key}" if self.is_pareto and key != MMD else key for key in self.keys)

    def values(self, metrics: Mapping[str, float]) -> list[float]:
        """The objective values of a trial, from its metrics; some may not be finite.

        Raises:
            UserError: the metric is missing, because this model or dataset does not have it.
        """
        if missing := [key for key in self.keys if key not in metrics]:
            raise UserError(
                f"tune.objective: {missing[0]} is not among this model's metrics; expected one of {', '.join(metrics)}"
            )
        values = [metrics[key] for key in self.keys]
        return [1.0 - values[0], values[1]] if self.is_pareto else values


def choose_objective(name: str | None, target: str, image_side: int, evaluate: Evaluate) -> Objective:
    """The objective that `tune.objective` names.

    Args:
        name: key of a metric, "pareto", or None for the default.
        target: output of the model, "image" or "mask".
        image_side: shorter side of the images, in pixels.
        evaluate: the evaluate section, which lists the extractors in use.

    Raises:
        UserError: the name is a loss, unknown, has no direction, or does not apply to this model.
    """
    if name and name.startswith(OLD_LABEL_KEY):
        renamed = name.replace(OLD_LABEL_KEY, LABEL_KEY)
        warn(f"tune.objective: {name} was renamed to {renamed} (a mean over classes); use the new name")
        name = renamed
    name = name or (MMD if target == "image" else DICE)
    if name == "loss" or name.startswith(("train/", "val/")):
        raise UserError(
            f"tune.objective: {name!r} is a training loss. It depends on β and on the searched weights, so it is "
            f"lowest with all of them at their lower bounds, whatever the images look like. Expected {CHOICES}"
        )
    if name == PARETO and target == "image":
        similarity = SSIM if ms_ssim_window(image_side) is None else MS_SSIM
        return Objective(name, (similarity, MMD), ("minimize", "minimize"))
    direction = next((value for pattern, value in DIRECTIONS.items() if re.fullmatch(pattern, name)), None)
    if direction is None:
        raise UserError(
            f"tune.objective: {name!r} is not a metric that can be maximized or minimized; expected {CHOICES}"
        )
    if (target == "mask") != name.startswith("segmentation/"):
        raise UserError(f"tune.objective: {name!r} does not apply to a model of {target}s; expected {CHOICES}")
    if name == MS_SSIM and ms_ssim_window(image_side) is None:
        raise UserError(f"tune.objective: {name} needs larger images than {image_side} px; expected {SSIM}")
    for extractor in ("inception", "local"):
        if extractor in name and extractor not in evaluate.extractors:
            raise UserError(f"tune.objective: {name} needs evaluate.extractors: [domain, {extractor}]")
    return Objective(name, (name,), (direction,))
