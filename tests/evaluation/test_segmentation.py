"""A model that predicts masks, from files to a registered version."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score

from medgen import registry
from medgen.config import Data, Evaluate, Loss, Model, Params, Phase, Preprocess, Project, Tracking, Train, Weights
from medgen.data.store import Split, Store, open_store
from medgen.errors import UserError
from medgen.evaluation import evaluate
from medgen.evaluation.segmentation import evaluate_masks
from medgen.ingest import preprocess
from medgen.models import bundle
from medgen.models.base import ModelOutput
from medgen.models.unet import UNet
from medgen.projects import recipes
from medgen.serving import generate
from medgen.tracking import history
from medgen.training import prior, refiner, train
from medgen.training.distributed import World

Evaluated = tuple[Project, dict[str, float]]  # a project and its metrics

OFF = Tracking(enabled=False)
UNET = Model(name="unet", base_channels=4, max_channels=8)
BOTH = Loss(weights=Weights(bce=1.0, dice=1.0))
TRAIN = Train(
    batch_size=8, ema_decay=0.5, horizontal_flip=True, phases=(Phase(name="a", epochs=2, learning_rate=3e-3),)
)
GREYS = (0, 100, 200)


def draw_shapes(folder: Path, num_images: int = 40) -> None:
    """Write images of a bright block and a brighter disc on noise, and masks of both; the last two images have none."""
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(num_images):
        mask = np.zeros((32, 32), np.uint8)
        left, top = (int(at) for at in generator.integers(1, 8, 2))
        mask[top : top + 9, left : left + 12] = GREYS[1]
        cv2.circle(mask, (20 + left // 2, 22), 5, GREYS[2], -1)
        image = (mask + generator.integers(0, 55, mask.shape)).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{number:02d}.png"), image)
        if number < num_images - 2:
            cv2.imwrite(str(folder / "masks" / f"{number:02d}.png"), mask)


@pytest.fixture(scope="module", params=[2, 3])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """A project after all stages, with masks of two and of three classes, and its metrics."""
    project = Project(tmp_path_factory.mktemp(f"masks{request.param}"))
    draw_shapes(project.root / "data")
    values = GREYS if request.param == 3 else None
    options = Preprocess(image_size=32, clahe_clip=0, mask_values=values, val_fraction=0.2, test_fraction=0.3)
    if request.param == 2:
        for path in (project.root / "data" / "masks").iterdir():
            cv2.imwrite(str(path), (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 0).astype(np.uint8))
    preprocess.run(project, data=Data(), preprocess=options)
    train.run(project, model=UNET, loss=BOTH, train=TRAIN, tracking=OFF)
    assert prior.run(project, prior=prior.config.Prior(), tracking=OFF) is None
    assert refiner.run(project, refiner=refiner.config.Refiner(enabled=True), tracking=OFF) is None
    return project, evaluate.run(project, evaluate=Evaluate(batch_size=5), tracking=OFF)


def test_metrics_agree_with_scikit_learn_over_test_images_with_a_mask(done: Evaluated) -> None:
    project, metrics = done
    store, (model, info) = open_store(project.dataset), bundle.load(project.model)
    classes, split = info.preprocess.mask_classes, store.split("test")
    rows = [i for i, row in enumerate(split.rows()) if row["mask"]]
    assert split.masks is not None and set(np.unique(split.masks)) == set(range(classes))
    with torch.no_grad():
        found = model.predict(torch.from_numpy(split.images[rows]).float() / 255).prediction
    found = found.argmax(1) if classes > 2 else found[:, 0] > 0.5
    for name, score in (("dice", f1_score), ("iou", jaccard_score)):
        pairs = zip(split.masks[rows, 0], found.numpy().astype(int), strict=True)
        options = {"labels": range(classes), "average": None, "zero_division": 0}
        of_class = np.mean([score(mask.ravel(), each.ravel(), **options) for mask, each in pairs], axis=0)
        assert metrics[f"segmentation/{name}_foreground"] == pytest.approx(of_class[1:].mean(), rel=1e-5, abs=1e-9)
        for number in range(classes) if classes > 2 else ():
            assert metrics[f"segmentation/{name}_{number}"] == pytest.approx(of_class[number], rel=1e-5, abs=1e-9)
    assert metrics["run/num_test"] == len(rows)
    total = sum(len(store.split(name).masked_rows) for name in ("train", "val", "test"))
    assert total == 38 and sum(store.counts.values()) == 40


def test_all_outputs_in_dvc_yaml_exist(done: Evaluated, root: Path) -> None:
    from ruamel.yaml import YAML

    project, metrics = done
    pipeline = YAML(typ="safe").load((root / "dvc.yaml").read_text())
    stages = pipeline["stages"]
    for stage in ("preprocess", "train", "prior", "refiner", "evaluate"):
        for out in stages[stage]["outs"]:
            assert (project.root / out).exists(), out
    assert json.loads((project.prior / "prior.json").read_text())["name"] is None
    assert json.loads((project.refiner / "refiner.json").read_text())["enabled"] is False
    assert json.loads((project.reports / "metrics.json").read_text()) == metrics
    page = (project.reports / "index.html").read_text()
    assert f"{metrics['segmentation/dice_foreground']:.4f}" in page and page.count("<img") == 5
    assert "drawn through the prior" not in page and "medgen generate" not in page and "medgen compare" in page
    with (project.curves / "curves.csv").open() as file:
        columns = set(next(csv.reader(file)))
    assert {"val/dice", "train/bce", "train/dice_loss"} <= columns
    for plot in (plot for plots in pipeline["plots"] if isinstance(plots, dict) for plot in plots.values()):
        assert {plot["x"], *plot["y"]["reports/training/curves.csv"]} <= columns


def test_the_loss_falls_and_results_are_recorded(done: Evaluated) -> None:
    project, metrics = done
    records = history(next(project.runs.glob("*/")))
    assert records[1]["train/loss"] < records[0]["train/loss"]
    assert records[-1]["segmentation/dice_foreground"] == metrics["segmentation/dice_foreground"]
    before = {path: path.read_bytes() for path in project.reports.rglob("*.png")}
    before[project.reports / "index.html"] = (project.reports / "index.html").read_bytes()
    assert evaluate.run(project, evaluate=Evaluate(batch_size=5), tracking=OFF) == metrics
    assert {path: path.read_bytes() for path in before} == before


class OnePixel(UNet):
    """Predicts one pixel in every image."""

    def predict(self, image: torch.Tensor, label: torch.Tensor | None = None) -> ModelOutput:
        found = torch.zeros(len(image), 1, 32, 32)
        found[:, :, 0, 0] = 1.0
        return ModelOutput(prediction=found, latent=None)


class TrueMasks(UNet):
    """Predicts the true masks without some classes."""

    true: torch.Tensor
    left_out: tuple[int, ...]

    def predict(self, image: torch.Tensor, label: torch.Tensor | None = None) -> ModelOutput:
        mask, self.true = self.true[: len(image)], self.true[len(image) :]
        for number in self.left_out:
            mask = torch.where(mask == number, 0, mask)
        return ModelOutput(torch.nn.functional.one_hot(mask, 3).movedim(-1, 1).float(), latent=None)


@pytest.mark.parametrize("done", [3], indirect=True)
@pytest.mark.parametrize(("left_out", "expected"), [((), 1.0), ((2,), 0.5), ((1, 2), 0.0)])
def test_the_background_is_not_counted(done: Evaluated, left_out: tuple[int, ...], expected: float) -> None:
    store = open_store(done[0].dataset)
    split, model = store.split("test"), TrueMasks(UNET, (1, 32, 32), 0, 3)
    assert split.masks is not None
    model.true, model.left_out = torch.from_numpy(split.masks[split.masked_rows][:, 0]).long(), left_out
    found = evaluate_masks(store, model, 5, World(0, 1, torch.device("cpu")))
    assert found.metrics["segmentation/dice_foreground"] == pytest.approx(expected)
    assert found.metrics["segmentation/iou_foreground"] == pytest.approx(expected)
    torch.testing.assert_close(found.dice, torch.full_like(found.dice, expected))


@pytest.mark.parametrize("done", [2], indirect=True)
def test_empty_masks_are_an_error(done: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    def emptied(store: Store, name: str) -> Split:
        part = split(store, name)
        return part if part.masks is None else dataclasses.replace(part, masks=np.zeros_like(part.masks[:]))

    split = Store.split
    monkeypatch.setattr(Store, "split", emptied)
    store, model = open_store(done[0].dataset), OnePixel(UNET, (1, 32, 32), 0)
    with pytest.raises(UserError, match="all masks of the test split are empty, expected"):
        evaluate_masks(store, model, 5, World(0, 1, torch.device("cpu")))


def test_commands_that_need_a_latent_are_errors(done: Evaluated, tmp_path: Path) -> None:
    model = done[0].model.parent
    for call in (
        lambda: generate.run(model, tmp_path, n=2),
        lambda: generate.interpolate(model, tmp_path, ends=(tmp_path, tmp_path)),
        lambda: generate.traverse(model, tmp_path),
        lambda: generate.reconstruct(model, tmp_path, files=[]),
    ):
        with pytest.raises(UserError, match=r"model\.json: model\.name unet predicts masks.*that generates images"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("done", [3], indirect=True)
def test_a_registered_version_predicts_the_same_masks(done: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    project, _ = done
    address = f"sqlite:///{project.root}/mlflow.db"
    mlflow.set_tracking_uri(address)
    # an earlier test may have set it to its own project
    monkeypatch.setattr("mlflow.tracking._model_registry.utils._registry_uri", address)
    version = registry.register(project, params=Params())
    segmenter: Any = mlflow.pyfunc.load_model(version.uri)
    image = cv2.imread(str(project.root / "data" / "images" / "03.png"), cv2.IMREAD_GRAYSCALE)
    masks = segmenter.predict(image[None, :, :, None])
    model, _ = bundle.load(project.model)
    with torch.no_grad():
        expected = model.predict(torch.from_numpy(image)[None, None].float() / 255).prediction.argmax(1)
    assert masks.dtype == np.uint8
    np.testing.assert_array_equal(masks[..., 0], expected.numpy())
    large = np.full((2, 50, 70, 1), 9, np.uint8)
    assert segmenter.predict(large).shape == (2, 32, 32, 1)
    with pytest.raises(Exception, match="uint8"):
        segmenter.predict(large.repeat(3, axis=3))


@pytest.mark.parametrize(
    ("loss", "message"), [(Loss(), r"loss\.weights: ssim.*bce"), (Loss(weights=Weights(perceptual=1.0)), "perceptual")]
)
def test_losses_of_images_are_errors(done: Evaluated, loss: Loss, message: str, tmp_path: Path) -> None:
    shutil.copytree(done[0].dataset, tmp_path / "artifacts" / "dataset")
    with pytest.raises(UserError, match=message):
        train.run(Project(tmp_path), model=UNET, loss=loss, train=TRAIN, tracking=OFF)


def test_data_without_masks_are_an_error(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "masks")
    preprocess.run(Project(tmp_path), data=Data(), preprocess=Preprocess(image_size=32, clahe_clip=0))
    with pytest.raises(UserError, match=r"model\.name: unet is trained on masks.* 0 in train and 0 in val"):
        train.run(Project(tmp_path), model=UNET, loss=BOTH, train=TRAIN, tracking=OFF)


def test_recipes_run_in_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ran: list[tuple[str, str]] = []

    def stage(project: Project, name: str, stage: str, overrides: Any) -> None:
        ran.append((name, stage))
        score = {"segmentation/dice_foreground": 0.5} if name.startswith("unet") else {"reconstruction/ssim": 0.75}
        reports = project.root / "runs" / "recipes" / name / "reports"
        reports.mkdir(parents=True, exist_ok=True)
        (reports / "metrics.json").write_text(json.dumps(score))

    monkeypatch.setattr(recipes, "_run_stage", stage)
    recipes.run(Project(tmp_path), ["unet-maxpool-transposed-bce", "chest-xray-64"])
    assert [of for name, of in ran if name == "chest-xray-64"] == [
        "preprocess",
        "features",
        "train",
        "prior",
        "refiner",
        "utility",
        "evaluate",
    ]
    stages = ["preprocess", "train", "prior", "refiner", "utility", "evaluate"]
    assert [of for name, of in ran if name != "chest-xray-64"] == stages
    said = capsys.readouterr().out
    assert "0.5000" in said and "0.7500" in said
    assert (tmp_path / "reports" / "recipes.csv").read_text().splitlines() == [
        "recipe,reconstruction/ssim,segmentation/dice_foreground",
        "unet-maxpool-transposed-bce,,0.5",
        "chest-xray-64,0.75,",
    ]


def test_a_failed_stage_is_an_error_that_names_it(tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(
        UserError, match="recipe unet-maxpool-transposed-bce: `medgen preprocess` ended with exit code 2"
    ):
        recipes.run(Project(tmp_path), ["unet-maxpool-transposed-bce"])
    assert "data" in capfd.readouterr().err
