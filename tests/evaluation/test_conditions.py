"""Conditions from files to a report: all stages, agreement of samples with their conditions, and requests."""

import base64
import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image, ImageOps

import medgen
from medgen.config import (
    Augment,
    Data,
    Evaluate,
    Features,
    Loss,
    Model,
    Preprocess,
    Prior,
    Project,
    Refiner,
    Tracking,
    Train,
    Utility,
)
from medgen.data.images import StoredImages
from medgen.data.store import StoreWriter, open_store
from medgen.datasets.sample import draw
from medgen.errors import UserError
from medgen.evaluation import conditions, context, evaluate, utility
from medgen.ingest import preprocess
from medgen.metrics.features import ExtractorSizes
from medgen.models import bundle
from medgen.nn.conditions import StoredConditions, read_conditions
from medgen.priors import find_conditions, load_prior
from medgen.serving import generate, pyfunc
from medgen.training import extractor, prior, refiner, train

OFF = Tracking(enabled=False)
KINDS = {
    "findings": {"kind": "multilabel"},
    "sex": {"kind": "category"},
    "age": {"kind": "number", "low": 0, "high": 100},
    "mask": {"kind": "mask"},
    "negative": {"kind": "image", "folder": "negative"},
}
SIZES = Model(base_channels=8, latent_size=8, latent_channels=2, attention_resolutions=())
FLOW = Prior(channels=8, blocks=1, epochs=1, batch_size=8, sampling_steps=2)
FINDINGS = {"NORMAL": "No Finding", "PNEUMONIA": "opacity|pneumonia", "COVID19": "opacity"}


def describe(folder: Path) -> None:
    """Write a manifest.csv with findings, sex and age of drawn images."""
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "patient", "findings", "sex", "age"])
        writer.writeheader()
        for number, path in enumerate(sorted((folder / "images").rglob("*.jpg"))):
            patient = path.stem.split("_")[0]
            cells = {"findings": FINDINGS[path.parent.name], "sex": "FM"[number % 2], "age": str(number)}
            writer.writerow({"path": path.relative_to(folder).as_posix(), "patient": patient, **cells})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with all stages up to the refiner, each trained for a few steps."""
    made = Project(tmp_path_factory.mktemp("conditions"))
    draw(made.root / "data", num_images=72, size=64, seed=0)
    describe(made.root / "data")
    for path in (made.root / "data" / "images").rglob("*.jpg"):
        other = (made.root / "data" / "negative" / path.parent.name / path.name).with_suffix(".png")
        other.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path).convert("L")).save(other)
    sizes = Preprocess(image_size=32, clahe_tiles=2, val_fraction=0.1, test_fraction=0.4, conditions=KINDS)
    preprocess.run(made, data=Data(), preprocess=sizes)
    one = Train(batch_size=8, phases={"one": {"epochs": 1}})  # type: ignore[arg-type]
    train.run(made, model=SIZES, loss=Loss(), train=one, tracking=OFF)
    extractor.run(made, features=Features(width=8, epochs=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior, "STEPS_PER_EPOCH", 5)
        assert prior.run(made, prior=FLOW, tracking=OFF) is not None
    small = Refiner(enabled=True, channels=8, blocks=1, epochs=1, sampling_steps=2)
    refiner.run(made, refiner=small, tracking=OFF)
    return made


@pytest.fixture(scope="module")
def metrics(project: Project) -> dict[str, float]:
    few = Utility(enabled=True, fractions=(0.2,), repetitions=2, steps=2, num_generated=12)
    used = utility.run(project, features=Features(width=4, batch_size=8), utility=few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditions, "STEPS", 5)
        patch.setattr(conditions, "MAP_STEPS", 5)
        found = evaluate.run(project, evaluate=Evaluate(num_generated=40, grid_images=6), tracking=OFF)
    assert found is not None and used is not None
    assert used == pytest.approx({key: value for key, value in found.items() if key.startswith("utility/")}, rel=1e-5)
    return found


def test_the_prior_is_the_one_that_takes_conditions(project: Project) -> None:
    store = open_store(project.dataset)
    fitted: Any = load_prior(project.prior, bundle.digest(project.model))
    assert fitted.name == "flow"
    assert fitted.space == bundle.load_info(project.model).space == store.conditions


@pytest.mark.parametrize("name", ["normal", "gaussian", "gmm"])
def test_a_prior_that_takes_only_the_class_is_refused(project: Project, name: str) -> None:
    with pytest.raises(UserError, match=f"prior.name {name} takes only the class; set prior.name to one of flow"):
        prior.run(project, prior=Prior(name=name), tracking=OFF)


def test_agreement_with_each_condition_is_measured(project: Project, metrics: dict[str, float]) -> None:
    keys = {"findings_auc", "findings_opacity_auc", "findings_pneumonia_auc", "sex_accuracy", "age_mae"}
    keys |= {"mask_dice", "mask_iou", "negative_correlation", "negative_ssim"}
    ends = ("", "_ci_low", "_ci_high", "_real", "_real_ci_low", "_real_ci_high", "_baseline")
    expected = {f"condition/{key}{end}" for key in keys for end in ends}
    assert {key for key in metrics if key.startswith("condition/")} == expected
    assert metrics["condition/sex_accuracy_baseline"] == metrics["condition/findings_auc_baseline"] == 0.5
    page = (project.reports / "index.html").read_text()
    assert "Agreement with conditions" in page and "findings: pneumonia" in page
    assert (project.figures / "conditions.png").stat().st_size > 0


def test_samples_train_classifiers_and_u_nets(project: Project, metrics: dict[str, float]) -> None:
    names = ("accuracy_{}", "gain_{}", "dice_{}", "gain_dice_{}")
    keys = {name.format(kind) for name in names for kind in ("both", "both_20", "synthetic")}
    keys |= {f"{measure}_{kind}" for measure in ("accuracy", "dice") for kind in ("real", "real_20")}
    expected = {f"utility/{key}{end}" for key in keys for end in ("", "_ci_low", "_ci_high")}
    assert {key for key in metrics if key.startswith("utility/")} == expected
    page = (project.reports / "index.html").read_text()
    assert "Use of samples for training of a U-Net" in page
    assert all((project.figures / name).stat().st_size for name in ("utility.png", "utility_masks.png"))
    assert "utility/gain_dice_both" in json.loads((project.reports / "summary.json").read_text())


def test_samples_get_the_conditions_of_held_out_images_of_their_class() -> None:
    labels, wanted = torch.tensor([0, 1, 0, -1]), torch.tensor([0, 0, 0, 1, 2])
    assert context.matching_rows(labels, wanted, 5).tolist() == [0, 2, 0, 1, -1]
    assert context.matching_rows(labels, None, 6).tolist() == [0, 1, 2, 3, 0, 1]


def test_generate_takes_conditions(project: Project, tmp_path: Path) -> None:
    mask = next((project.root / "data" / "masks").rglob("*.png"))
    paired = next((project.root / "data" / "negative").rglob("*.png"))
    texts = ["", "sex=F,age=40", "sex=M,age=40", "findings=opacity+pneumonia", f"age=40,mask={mask}"]
    texts += [f"age=40,negative={paired}", f"age=40,mask={mask},negative={paired}"]
    images = []
    for number, text in enumerate(texts):
        paths = generate.run(project.model.parent, tmp_path / str(number), n=3, label="NORMAL", condition=text)
        images.append([path.read_bytes() for path in paths])
    for number, one in enumerate(images):
        assert all(one != other for other in images[:number])
    text = f"mask={project.root / 'data' / 'manifest.csv'}"
    with pytest.raises(UserError, match=r"condition: .*manifest.csv: not readable as a mask"):
        generate.run(project.model.parent, tmp_path / "wrong", n=1, condition=text)
    text = text.replace("mask=", "negative=")
    with pytest.raises(UserError, match=r"condition: .*manifest.csv: not readable as an image"):
        generate.run(project.model.parent, tmp_path / "wrong", n=1, condition=text)


def test_the_python_api_gives_the_images_of_the_command(project: Project, tmp_path: Path) -> None:
    model = medgen.load(project.model.parent)
    assert model.conditions == {
        "findings": "any of opacity, pneumonia, joined by +; or no finding",
        "sex": "one of F, M",
        "age": "a number from 0 to 100",
        "mask": "a mask of 2 classes",
        "negative": "an image",
    }
    path = next((project.root / "data" / "masks").rglob("*.png"))
    other = project.root / "data" / "negative" / path.parent.name / path.name
    text = f"sex=F,age=40,mask={path},negative={other}"
    written = generate.run(project.model.parent, tmp_path / "new", n=2, seed=3, condition=text)
    pixels = np.stack([np.asarray(Image.open(each)) for each in written])
    classes = (np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BOX)) > 127).astype(np.uint8)
    greys = cv2.resize(np.asarray(Image.open(other)), (32, 32), interpolation=cv2.INTER_AREA)
    same = {"sex": "F", "age": 40}
    for wanted in (text, {**same, "mask": str(path), "negative": other}, {**same, "mask": classes, "negative": greys}):
        assert (model.sample(2, seed=3, condition=wanted)[:, 0] == pixels).all()
    with pytest.raises(UserError, match=r"condition: mask: found uint8 \(2, 2\); expected a file, or class numbers"):
        model.sample(1, condition={"mask": np.zeros((2, 2), np.uint8)})
    with pytest.raises(UserError, match=r"condition: negative: found float64 .* grey values \(32, 32\) from 0 to 255"):
        model.sample(1, condition={"negative": np.zeros((32, 32))})


def test_a_served_version_takes_conditions(project: Project) -> None:
    served: Any = pyfunc.Generator()
    parts = {name: str(getattr(project, name)) for name in ("model", "prior", "refiner")}
    served.load_context(SimpleNamespace(artifacts=parts))
    mask = base64.b64encode(next((project.root / "data" / "masks").rglob("*.png")).read_bytes()).decode()

    def answer(**row: object) -> np.ndarray:
        return served.predict(None, pd.DataFrame([{"n": 2, "seed": 1, **row}]))  # type: ignore[no-any-return]

    model = medgen.load(project.model.parent)
    assert (answer(condition="sex=F")[..., 0] == model.sample(2, seed=1, condition="sex=F")[:, 0]).all()
    assert not (answer(condition=f"sex=F,mask={mask}") == answer(condition="sex=F")).all()
    assert not (answer(condition=f"sex=F,negative={mask}") == answer(condition="sex=F")).all()
    assert (answer(condition="") == answer()).all()
    for text, message in (
        ("sex=x", "sex: unknown value"),
        ("mask=!", "invalid base64"),
        (f"mask={base64.b64encode(b'no image').decode()}", "condition: not readable as a mask"),
        (f"negative={base64.b64encode(b'no image').decode()}", "condition: not readable as an image"),
        (5, "condition: found 5; expected a text"),
    ):
        with pytest.raises(MlflowException, match=message):
            answer(condition=text)


def test_parts_of_other_conditions_do_not_belong_together(project: Project, tmp_path: Path) -> None:
    path = project.prior / "prior.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before.replace('"high": 100.0', '"high": 99.0'))))
        with pytest.raises(UserError, match=r"prior: made for other conditions than .*run `medgen prior`"):
            generate.run(project.model.parent, tmp_path / "new", n=1)
    finally:
        path.write_text(before)


SIDE = 32


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An evaluation of drawn images: a bright disc (its size is the number), a bar (a finding), and a mask of the disc.

    The category is the side of the disc. The paired image is brightest in the middle of the disc.
    """
    generator, grid = np.random.default_rng(0), np.mgrid[:SIDE, :SIDE]
    folder = tmp_path_factory.mktemp("shapes") / "dataset"
    kinds = {
        "finding": {"kind": "multilabel"},
        "side": {"kind": "category"},
        "size": {"kind": "number", "low": 0, "high": 10},
        "mask": {"kind": "mask"},
        "glow": {"kind": "image", "folder": "glow"},
    }
    settings = Preprocess(image_size=SIDE, conditions=kinds).model_dump(mode="json")
    count, columns = 300, ("finding", "side", "size", "glow")
    with StoreWriter(folder, (1, SIDE, SIDE), with_masks=True, columns=columns, num_paired=1) as writer:
        for number in range(count):
            size, left, has_bar = generator.uniform(3, 7), generator.random() < 0.5, generator.random() < 0.5
            square = (grid[0] - 18) ** 2 + (grid[1] - (9 if left else 23)) ** 2
            mask, glow = square < size**2, 255 * np.exp(-square / size**2)
            image = 40 + 120 * mask + generator.integers(0, 30, (SIDE, SIDE))
            image[:5] += 80 * has_bar
            row = {"path": f"{number}.png", "patient": str(number), "mask": "m.png", "size": f"{size:.3f}"}
            row |= {"finding": "bar" if has_bar else "No Finding", "side": "left" if left else "right"}
            row["glow"] = "" if number % 10 == 9 else "g.png"
            writer.add(image[None].astype(np.uint8), mask[None].astype(np.uint8), row, glow[None].astype(np.uint8))
        store = writer.commit(["train"] * 200 + ["test"] * (count - 200), [], settings, "0" * 12)
    test = store.split("test")
    rows = torch.arange(len(test))
    return SimpleNamespace(
        store=store,
        held_out=test,
        compared_rows=rows,
        compared=StoredImages(test),
        groups=None,
        patients=None,
        device=torch.device("cpu"),
        extractor=SimpleNamespace(sizes=ExtractorSizes(1, SIDE, 8, 2)),
        params=SimpleNamespace(seed=0, batch_size=64),
        sample_conditions=StoredConditions(test, rows),
    )


@pytest.mark.slow
def test_agreement_tells_samples_with_their_conditions_from_others(
    shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images with their own conditions agree as real ones do; with those of other images they are at the baseline."""
    monkeypatch.setattr(conditions, "STEPS", 200)
    monkeypatch.setattr(conditions, "MAP_STEPS", 80)
    images = shapes.compared[:]
    right = {each.key: each for each in conditions.evaluate_conditions(shapes, images)}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    wrong = {each.key: each for each in conditions.evaluate_conditions(shapes, images[order])}
    for key, each in right.items():
        assert each.samples.value == pytest.approx(each.real.value), key
        assert wrong[key].real.value == pytest.approx(each.real.value), key
    for key in ("finding_auc", "finding_bar_auc", "side_accuracy", "mask_dice", "glow_correlation"):
        assert right[key].real.value > 0.9, key
        assert wrong[key].samples.value < 0.7, key
    assert right["glow_ssim"].real.value > wrong["glow_ssim"].samples.value
    assert right["glow_correlation"].counts == (90, 90), "images without a paired one are left out"
    assert right["size_mae"].real.value < 0.7 * right["size_mae"].baseline < wrong["size_mae"].samples.value
    sizes, train_sizes = (
        torch.tensor([float(row["size"]) for row in split.rows()])
        for split in (shapes.held_out, shapes.store.split("train"))
    )
    expected = float((sizes - train_sizes.median()).abs().mean())
    assert right["size_mae"].baseline == pytest.approx(expected, rel=1e-4)
    assert "less clearly than real images" in conditions.condition_findings(list(wrong.values()))[0]
    assert "as clearly as real images" in conditions.condition_findings(list(right.values()))[0]
    assert conditions.condition_findings([]) == []


def test_the_correlation_is_that_of_numpy() -> None:
    first, second = torch.rand(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    expected = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(first, second, strict=True)]
    assert conditions.correlation(first, second).tolist() == pytest.approx(expected)
    assert conditions.correlation(first, torch.full_like(first, 0.3)).tolist() == [0.0] * 5


@pytest.mark.parametrize("kind", ["mask", "image"])
def test_the_baseline_is_the_best_map_without_the_image(shapes: Any, kind: str) -> None:
    field = next(field for field in shapes.store.conditions.fields if field.kind == kind)
    train = shapes.store.split("train")
    found = conditions._constant_map(train, field, 64)
    stored = np.asarray(train.masks if kind == "mask" else train.paired)[train.has_map(field.name), 0]
    expected = stored.mean(0) > 0.5 if kind == "mask" else stored.mean(0) / 255
    assert np.allclose(found[0].numpy(), expected, atol=1e-6)


def test_a_rare_finding_has_no_auc(shapes: Any) -> None:
    field = shapes.store.conditions.fields[0]
    targets = [torch.tensor([[1.0]] * 4 + [[0.0]] * 20)] * 2
    answers = [torch.randn(24, 1, generator=torch.Generator().manual_seed(0))] * 2
    assert conditions._areas(field, targets, answers, [None, None], (24, 24)) == []


def test_a_request_without_conditions_draws_as_before(project: Project) -> None:
    store = open_store(project.dataset)
    fitted, network = load_prior(project.prior, bundle.digest(project.model)), bundle.load_generative(project.model)[0]
    assert find_conditions("", store.conditions, fitted, network, lambda *_: np.zeros(())) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "flow"])
def test_a_conditional_vae_is_trained_and_asked_with_conditions(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With any prior, since the decoder takes the conditions; each stage after it gives the decoder those of images."""
    made = Project(tmp_path / "cvae")
    made.root.mkdir()
    shutil.copytree(project.dataset, made.dataset)
    shutil.copytree(project.features, made.features)
    one = Train(batch_size=8, horizontal_flip=True, phases={"one": {"epochs": 2}})  # type: ignore[arg-type]
    family = Model(name="cvae", base_channels=8, latent_channels=4)
    train.run(made, model=family, loss=Loss(), train=one, tracking=OFF)
    monkeypatch.setattr(prior, "STEPS_PER_EPOCH", 5)
    sizes = {} if name == "gaussian" else {"channels": 8, "blocks": 1, "epochs": 1, "batch_size": 8}
    assert prior.run(made, prior=Prior(name=name, **sizes), tracking=OFF) is not None  # type: ignore[arg-type]
    refiner.run(made, refiner=Refiner(enabled=True, channels=8, blocks=1, epochs=1, sampling_steps=2), tracking=OFF)
    monkeypatch.setattr(conditions, "STEPS", 5)
    monkeypatch.setattr(conditions, "MAP_STEPS", 5)
    found = evaluate.run(made, evaluate=Evaluate(num_generated=40, grid_images=6), tracking=OFF)
    assert found is not None and {"condition/sex_accuracy", "condition/negative_ssim"} <= found.keys()
    model = medgen.load(made.model.parent)
    plain, asked = (model.sample(2, "NORMAL", 0, refine=False, condition=text) for text in ("", "sex=F,age=90"))
    assert not (plain == asked).all()
    split, space = open_store(made.dataset).split("test"), bundle.load_info(made.model).space
    network, _ = bundle.load_generative(made.model)
    assert network.space == space
    with torch.no_grad():
        images, labels = torch.from_numpy(split.images[:8]) / 255, torch.from_numpy(split.labels[:8].copy())
        given = read_conditions(split, torch.arange(8))
        known, unknown = network.reconstruct(images, labels, given), network.reconstruct(images, labels)
    assert not torch.allclose(known, unknown)
    changed = one.model_copy(update={"augment": Augment(vertical_flip=True)})
    with pytest.raises(UserError, match=r"train.augment: does not change the conditions mask, negative"):
        train.run(made, model=family, loss=Loss(), train=changed, tracking=OFF)
