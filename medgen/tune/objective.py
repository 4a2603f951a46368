"""The objective of a search: one metric of the val split by its key, or two that are traded for each other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from medgen.config import Evaluate
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
# keys of docs/contract.md for which higher or lower is better; the others describe
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
    """One metric or two, and which way is better."""

    name: str  # as tune.objective says it
    keys: tuple[str, ...]
    directions: tuple[Direction, ...]

    def __str__(self) -> str:
        return ", ".join(f"{way} {label}" for way, label in zip(self.directions, self.labels, strict=True))

    @property
    def is_pareto(self) -> bool:
        """True if two metrics are traded for each other."""
        return self.name == PARETO

    @property
    def has_floor(self) -> bool:
        """True if a trial's SSIM must reach a floor: a model that reconstructs nothing can still draw good samples."""
        return not self.is_pareto and self.keys[0].startswith(("generation/", "latent/", "privacy/"))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the values, for figures and tables."""
        return tuple(f"1 − {key}" if self.is_pareto and key != MMD else key for key in self.keys)

    def values(self, metrics: Mapping[str, float]) -> list[float]:
        """The values of a trial, from its metrics; some may not be finite.

        Raises:
            UserError: this model or data has no such metric.
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
        name: a metric's key, "pareto", or None for the default.
        target: what the model learns, "image" or "mask".
        image_side: shorter side of the images, in pixels.
        evaluate: names the extractors in use.

    Raises:
        UserError: it is a loss, no metric, one without a direction, or not one of this model's.
    """
    if name and name.startswith(OLD_LABEL_KEY):
        renamed = name.replace(OLD_LABEL_KEY, LABEL_KEY)
        warning = f"warning: tune.objective: {name} is now {renamed} (a mean over classes); name that one"
        Console(stderr=True, highlight=False).print(warning, style="yellow", markup=False, soft_wrap=True)
        name = renamed
    name = name or (MMD if target == "image" else DICE)
    if name == "loss" or name.startswith(("train/", "val/")):
        raise UserError(
            f"tune.objective: {name!r} is what training lowers, and no objective: the loss is weighed by β and by the "
            "weights that are searched, so it is lowest with all of them at their lower bounds, whatever the images "
            f"look like. Expected {CHOICES}"
        )
    if name == PARETO and target == "image":
        similarity = SSIM if ms_ssim_window(image_side) is None else MS_SSIM
        return Objective(name, (similarity, MMD), ("minimize", "minimize"))
    direction = next((way for pattern, way in DIRECTIONS.items() if re.fullmatch(pattern, name)), None)
    if direction is None:
        raise UserError(
            f"tune.objective: {name!r} is not a metric that can be maximized or minimized; expected {CHOICES}"
        )
    if (target == "mask") != name.startswith("segmentation/"):
        raise UserError(f"tune.objective: {name!r} does not apply to a model that learns {target}s; expected {CHOICES}")
    if name == MS_SSIM and ms_ssim_window(image_side) is None:
        raise UserError(f"tune.objective: {name} needs larger images than {image_side} px; expected {SSIM}")
    for extractor in ("inception", "local"):
        if extractor in name and extractor not in evaluate.extractors:
            raise UserError(f"tune.objective: {name} needs evaluate.extractors: [domain, {extractor}]")
    return Objective(name, (name,), (direction,))
