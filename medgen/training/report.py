"""Figures of a training: image grids by epoch, curves, and an animation of the samples."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from medgen.config import Loss, Phase, Prior, Train
from medgen.io import write_atomic
from medgen.models import GenerativeModel, ImageModel
from medgen.priors import ANALYTIC, sample_images
from medgen.reports.figures import write_curves, write_gif, write_grid, write_stacks
from medgen.training.loader import Loader

NUM_RECONSTRUCTIONS = 8
NUM_SAMPLES = 16
MAX_LATENTS = 1024  # enough for a preview; the prior stage uses all of them
LOSSES = ("mse", "bce", "dice_loss", "commitment", "codebook")  # drawn with l1, if they are part of the objective
ON_LOG_AXES = ("loss", "kl")  # drawn on logarithmic axes too
CURVES = (  # figure, label of its axis, series; KL is thousands of nats, so it has its own figure
    ("loss", "loss", ("train/loss", "val/loss", "train/l1", "val/l1", *(f"train/{name}" for name in LOSSES))),
    ("kl", "nats per image", ("train/kl",)),
    ("codebook", "evenly used codes", ("val/codebook_perplexity",)),
    ("ssim", "SSIM", ("val/ssim",)),
    ("dice", "Dice", ("val/dice",)),
)


def draw_epoch(
    model: ImageModel, train: Loader, validation: Loader, scratch: Path, epoch: int, seed: int
) -> dict[str, Path]:
    """Write the grids of an epoch to samples/ and reconstructions/ or masks/ in `scratch`; return paths by name."""
    model.eval()
    if isinstance(model, GenerativeModel):
        return _draw_images(model, train, validation, scratch, epoch, seed)
    return _draw_masks(model, validation, scratch, epoch)


@torch.no_grad()
def _draw_masks(model: ImageModel, validation: Loader, scratch: Path, epoch: int) -> dict[str, Path]:
    """Write validation images above their masks and the predicted masks."""
    batch = validation.gather(torch.arange(min(NUM_RECONSTRUCTIONS, validation.num_images)))
    image, label = batch.image, batch.label
    assert batch.mask is not None
    probabilities = model.predict(image, label).prediction.float().cpu()  # (B, K, H, W), K = 1 for binary masks
    num_classes = max(2, probabilities.shape[1])
    # of a binary mask the probability is drawn
    found = probabilities if num_classes == 2 else probabilities.argmax(dim=1, keepdim=True) / (num_classes - 1)
    mask = batch.mask.cpu() / (num_classes - 1)
    path = _grid(scratch, "masks", epoch)
    write_stacks(path, {"image": image.cpu(), "mask": mask, "found": found})
    return {"masks": path}


@torch.no_grad()
def _draw_images(
    model: GenerativeModel, train: Loader, validation: Loader, scratch: Path, epoch: int, seed: int
) -> dict[str, Path]:
    """Write samples and reconstructions.

    Samples come from a Gaussian fitted to train latents, since N(0, I) does not fit a model whose β is still 0.
    """
    paths = {name: _grid(scratch, name, epoch) for name in ("samples", "reconstructions")}
    batch = validation.gather(torch.arange(min(NUM_RECONSTRUCTIONS, validation.num_images)))
    rebuilt = model.reconstruct(batch.image, batch.label, batch.conditions).float().cpu()
    pairs = {"original": batch.image.cpu(), "reconstruction": rebuilt}
    write_stacks(paths["reconstructions"], pairs)

    rows = torch.arange(min(-(-MAX_LATENTS // train.batch_size) * train.batch_size, train.num_images))
    latents, labels = [], []
    for part in torch.split(rows, train.batch_size):
        batch = train.gather(part)
        latents.append(model.encode(batch.image, batch.label, batch.conditions).mean.cpu())
        labels.append(batch.label.cpu())
    known = torch.cat(labels)
    # a conditional model gets labels in the proportions of the train split
    num_classes = int(known.max()) + 1 if model.conditional else 0
    prior = ANALYTIC["gaussian"].fit(torch.cat(latents), known, num_classes, Prior())
    write_grid(paths["samples"], sample_images(prior, model, NUM_SAMPLES, None, seed))
    return paths


def write_report(
    folder: Path, scratch: Path, records: Sequence[Mapping[str, float]], drawn_epochs: Sequence[int]
) -> list[Path]:
    """Write curves.csv, curves and progress.gif from a run's records by epoch to `folder`; return their paths.

    The files hold no durations, so that the same training writes the same bytes. Other files of the folder, such as
    curves of an earlier model, are removed.
    """
    names = sorted({name for record in records for name in record if name.startswith(("train/", "val/"))})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["epoch", *names])
    writer.writerows([i, *(format(r[n], ".6g") if n in r else "" for n in names)] for i, r in enumerate(records, 1))
    written = [folder / "curves.csv"]
    write_atomic(written[0], table.getvalue().encode())

    settings = read_settings(scratch)
    phases = first_epochs(settings.train.phases) if settings else {}
    series = {name: [record.get(name, float("nan")) for record in records] for name in names}
    for name, label, shown in CURVES:
        path = folder / f"{name}.png"
        if drawn := {key: series[key] for key in shown if key in series}:
            write_curves(path, drawn, log=name in ON_LOG_AXES, y_label=label, phases=phases)
            written.append(path)
    # only the grids of this run: an earlier, shorter one has left its last grid
    grids = [_grid(scratch, name, epoch) for name in ("samples", "masks") for epoch in drawn_epochs]
    frames = [grid for grid in grids if grid.exists()]
    if records:  # none without epochs
        written.append(folder / "progress.gif")
        write_gif(written[-1], frames, seconds_per_frame=0.5)
    for path in set(folder.iterdir()) - set(written):
        path.unlink()
    return written


class Settings(NamedTuple):
    """The parameters that a model was trained with."""

    loss: Loss
    train: Train


def read_settings(scratch: Path) -> Settings | None:
    """The settings of the run in `scratch`; None if the folder has none that this version of medgen can read."""
    try:
        content = json.loads((scratch / "params.json").read_text(encoding="utf-8"))
        return Settings(Loss.model_validate(content["loss"]), Train.model_validate(content["train"]))
    except (OSError, ValueError, KeyError):
        return None


def first_epochs(phases: Sequence[Phase]) -> dict[str, int]:
    """First epoch of each phase by name, counted from 1, without phases of no epochs."""
    lengths = [phase.epochs for phase in phases]
    return {phase.name: 1 + sum(lengths[:at]) for at, phase in enumerate(phases) if phase.epochs}


def _grid(scratch: Path, name: str, epoch: int) -> Path:
    return scratch / name / f"epoch_{epoch:04d}.png"
