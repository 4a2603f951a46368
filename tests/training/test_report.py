"""What a training draws: samples made for labels where labels count, curves of every loss, masks over their images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medgen.data.store import ShardedArray, Split
from medgen.models import GenerativeModel, ImageModel
from medgen.models.base import Latent, ModelOutput
from medgen.training import report
from medgen.training.loader import Loader
from medgen.training.report import CURVES, draw_epoch, write_report


def loader(labels: list[int], channels: int = 1) -> Loader:
    """Images of noise with these labels."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), channels, 16, 16), dtype=np.uint8)
    return Loader(Split("train", ShardedArray([images]), np.array(labels), None, Path()), 4, "cpu")


class Labelled(GenerativeModel):
    """Keeps the labels its decoder is given."""

    conditional = True
    latent_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.given: list[Tensor | None] = []

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Any = None) -> Latent:
        mean = image.flatten(2).mean(-1).expand(-1, 2)
        return Latent(value=mean, mean=mean)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Any = None) -> Tensor:
        self.given.append(label)
        return torch.zeros(len(latent), 1, 16, 16)


@pytest.mark.parametrize(
    ("labels", "expected"), [([0, 2, 2, 0, -1], {0, 2}), ([-1] * 5, None)], ids=["labelled", "unlabelled"]
)
def test_samples_of_a_model_that_looks_at_labels_are_made_for_some(
    labels: list[int], expected: set[int] | None, tmp_path: Path
) -> None:
    model = Labelled()
    draw_epoch(model, loader(labels), loader(labels), tmp_path, epoch=1, seed=0)
    given = model.given[-1]
    assert (given if given is None else set(given.tolist())) == expected


class Segmenter(ImageModel):
    """Finds nothing."""

    target = "mask"

    def forward(self, image: Tensor, label: Tensor | None = None) -> ModelOutput:
        return ModelOutput(prediction=torch.zeros(len(image), 1, 16, 16), latent=None)

    predict = forward


def test_colour_images_stand_in_colour_over_their_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    masks = ShardedArray([np.ones((4, 1, 16, 16), np.uint8)])
    monkeypatch.setattr(Split, "masked_rows", np.arange(4))
    split = Split("val", ShardedArray([images]), np.full(4, -1), masks, Path())
    validation = Loader(split, 4, "cpu", with_masks=True)
    path = draw_epoch(Segmenter(), validation, validation, tmp_path, epoch=1, seed=0)["masks"]
    with Image.open(path) as picture:
        drawn = np.asarray(picture).astype(int)
    assert (drawn.max(axis=-1) != drawn.min(axis=-1)).any()


def test_curves_mark_where_each_phase_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = {"reconstruct": {"epochs": 3}, "skipped": {"epochs": 0}, "regularise": {"epochs": 2}}
    marked: dict[str, dict[str, int]] = {}
    monkeypatch.setattr(report, "write_curves", lambda path, series, *, phases, **_: marked.update({path.name: phases}))
    monkeypatch.setattr(report, "write_gif", lambda *_, **__: None)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "params.json").write_text(json.dumps({"loss": {}, "train": {"phases": phases}}))
    write_report(tmp_path / "training", scratch, [{"train/kl": 1.0, "train/loss": 1.0}] * 5, [1])
    assert marked == {name: {"reconstruct": 1, "regularise": 4} for name in ("loss.png", "kl.png")}


def test_the_figure_of_a_segmenter_is_named_after_dice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_gif", lambda *_, **__: None)
    paths = write_report(tmp_path, tmp_path / "scratch", [{"val/dice": 0.5}] * 2, [1])
    assert {path.name for path in paths} == {"curves.csv", "dice.png", "progress.gif"}


def test_every_loss_has_a_curve_and_an_earlier_models_figures_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[str]] = {}
    monkeypatch.setattr(report, "write_curves", lambda path, series, **_: drawn.update({path.name: list(series)}))
    monkeypatch.setattr(report, "write_gif", lambda *_, **__: None)
    folder = tmp_path / "training"
    folder.mkdir()
    for name, _, _ in CURVES:
        (folder / f"{name}.png").touch()
    names = ("train/loss", "train/mse", "train/commitment", "train/codebook", "val/codebook_perplexity", "val/ssim")
    write_report(folder, tmp_path / "scratch", [dict.fromkeys(names, 1.0)] * 2, [1])
    assert drawn == {
        "loss.png": ["train/loss", "train/mse", "train/commitment", "train/codebook"],
        "codebook.png": ["val/codebook_perplexity"],
        "ssim.png": ["val/ssim"],
    }
    assert {path.name for path in folder.iterdir()} == {"curves.csv", *drawn}, "the KL of an earlier model"
