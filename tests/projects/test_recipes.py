"""Tests of the recipes: every recipe is valid and documented, builds its model, and trains."""

import json
import math
import subprocess
import sys

import pytest
import torch

from medgen.config import Model, Prior, Project, load
from medgen.datasets import catalog
from medgen.datasets.sample import draw
from medgen.errors import TrainingInterrupted, UserError
from medgen.ingest import preprocess
from medgen.models import MODELS, build_model
from medgen.projects import recipes
from medgen.projects.recipes import list_recipes, read
from medgen.tracking import history
from medgen.training import prior, refiner, train

NAMES = sorted(list_recipes())
TINY = [  # overrides that make every recipe small
    "preprocess.clahe_tiles=2",
    "preprocess.max_rejected=0",
    "model.base_channels=2",
    "model.max_channels=8",
    "train.subset=8",
    "train.batch_size=4",
    "train.sample_every=1000",
    "tracking.enabled=false",
]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory, draw_volumes):
    """Drawn NIfTI volumes."""
    return draw_volumes(tmp_path_factory.mktemp("volumes"), 24)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Drawn X-rays with masks."""
    folder = tmp_path_factory.mktemp("images")
    draw(folder, num_images=24, size=48, seed=0)
    return folder


def path_of(name, root):
    return root / "recipes" / f"{name}.yaml"


def head_of(name):
    """The comment at the start of a recipe, on one line."""
    lines = read(name).splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])


def test_all_model_families_and_systems_have_a_recipe(root):
    assert {load(path_of(name, root)).model.name for name in NAMES} == set(MODELS)
    heads = " ".join(map(head_of, NAMES))
    assert all(f"System {system}" in heads for system in "ABCDE")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_states_description_origin_and_dataset(name):
    head = head_of(name)
    assert len(list_recipes()[name]) <= 117
    assert any(f"medgen data fetch {dataset}" in head for dataset in catalog.load()), head
    assert "Measured: " in head


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds_its_model(name, root):
    params = load(path_of(name, root))
    shape = (params.preprocess.channels, *params.preprocess.sides)
    with torch.device("meta"):  # shapes without values
        model = build_model(params.model, shape, 10, params.preprocess.mask_classes)
        output = model(torch.rand(2, *shape), torch.zeros(2, dtype=torch.int64)).prediction
    assert output.shape[2:] == shape[1:]
    last = params.train.phases[-1]
    assert last.beta.epochs <= last.epochs, "β never reaches its end"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains(name, root, images, volumes, tmp_path):
    """Two steps of each phase, from files to a model, without the perceptual loss; then the refiner if there is one."""
    tree = load(path_of(name, root))
    size = 16 if tree.loss.weights.ssim == 0 else 32
    whole, data = min(tree.preprocess.sides), volumes if tree.preprocess.has_volumes else images
    side = None if tree.model.latent_size is None else size // (whole // tree.model.latent_size)
    phases = [
        part for phase in tree.train.phases
        for part in (f"train.phases.{phase.name}.epochs=1", f"train.phases.{phase.name}.schedule.period=1")
    ]  # fmt: skip
    sizes = {"latent_size": "null" if side is None else max(side, 4), "latent_channels": 4, "num_embeddings": 8}
    foreign = Model.foreign_keys(tree.model.name)
    fitting = [f"preprocess.image_size={[size] * 3 if tree.preprocess.has_volumes else size}"]
    fitting += [f"train.patch={[size // 2] * len(tree.train.patch)}"] if tree.train.patch else []
    fitting += [f"model.{key}={value}" for key, value in sizes.items() if key not in foreign]
    # drawn images have masks, and no columns
    kept = {name: {"kind": "mask"} for name, each in tree.preprocess.conditions.items() if each.kind == "mask"}
    fitting.append(f"preprocess.conditions={json.dumps(kept)}")
    params = load(path_of(name, root), [*TINY, *fitting, *phases, f"data.path={data}", "loss.weights.perceptual=0"])
    project = Project(tmp_path)
    preprocess.run(project, data=params.data, preprocess=params.preprocess)
    scratch = train.run(project, model=params.model, loss=params.loss, train=params.train, tracking=params.tracking)
    records = history(scratch)
    assert len(records) == len(tree.train.phases)
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert project.model.exists()
    if params.refiner.enabled:
        tiny = params.refiner.model_copy(update={"channels": 8, "blocks": 1, "epochs": 1})
        prior.run(project, prior=Prior(name="gaussian", conditional=False), tracking=params.tracking)
        assert refiner.run(project, refiner=tiny, tracking=params.tracking) is not None


def test_a_run_leaves_the_artifacts_and_reports_of_the_project_alone(images, tmp_path, monkeypatch, capsys):
    """The stage runs as a process of its own, as it does for a user."""
    for folder in ("model", "dataset"):
        (tmp_path / "artifacts" / folder).mkdir(parents=True)
        (tmp_path / "artifacts" / folder / "mine").write_text("the project's")
    monkeypatch.setattr(recipes, "_stages", lambda *_: ["preprocess"])
    results = tmp_path / "runs" / "recipes" / "chest-xray-64"
    (results / "reports").mkdir(parents=True)
    (results / "reports" / "metrics.json").write_text('{"reconstruction/ssim": 0.5}')  # of the stages left out
    recipes.run(Project(tmp_path), ["chest-xray-64"], [f"data.path={images}", "preprocess.max_rejected=0.9"])
    assert (results / "artifacts" / "dataset" / "dataset.json").exists()
    assert {path.name for path in tmp_path.rglob("mine")} == {"mine"}
    assert sorted(path.name for path in (tmp_path / "artifacts" / "dataset").iterdir()) == ["mine"]
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {"recipes.csv"}
    assert "--model runs/recipes/NAME/artifacts" in capsys.readouterr().out


STAGE_THAT_IS_STOPPED = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
os.kill(os.getppid(), signal.SIGTERM)  # a scheduler signals the parent
signal.pause()
"""


def test_signals_are_forwarded_to_the_stage():
    assert recipes._wait_for(subprocess.Popen([sys.executable, "-c", STAGE_THAT_IS_STOPPED])) == 5


@pytest.mark.parametrize(
    ("code", "error", "exit_code"),
    [(2, UserError, 2), (4, UserError, 4), (-9, UserError, 2), (5, TrainingInterrupted, 5)],
)
def test_exit_code_of_a_failed_stage(code, error, exit_code, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "_wait_for", lambda process: process.wait() and code)
    with pytest.raises(error, match=f"recipe {NAMES[0]}: `medgen") as raised:
        recipes.run(Project(tmp_path), [NAMES[0]], ["data.path=nowhere"])
    assert raised.value.exit_code == exit_code


def test_use_keeps_an_edited_params_file(tmp_path):
    path, before = tmp_path / "params.yaml", tmp_path / "params.yaml.before"
    recipes.use(NAMES[0], Project(tmp_path))
    assert not before.exists()
    path.write_text("train: {seed: 7}\n")
    for name in NAMES[:2]:
        recipes.use(name, Project(tmp_path))
    assert before.read_text() == "train: {seed: 7}\n"
    assert path.read_text() == read(NAMES[1])


def test_use_keeps_the_name_of_the_dataset(tmp_path):
    """`medgen data import` has named it; a recipe does not know which data the project has."""
    path = tmp_path / "params.yaml"
    path.write_text("data: {path: data, name: our-xrays}\n")
    for name in NAMES[:2]:
        recipes.use(name, Project(tmp_path))
        params = load(path)
        assert params.data.name == "our-xrays"
        assert params.registry.model_name == "our-xrays"
    assert (tmp_path / "params.yaml.before").read_text() == "data: {path: data, name: our-xrays}\n"


@pytest.mark.parametrize(("override", "expected"), [(None, ["data.name=our-xrays"]), ("data.path=x", ["data.path=x"])])
def test_run_keeps_the_name_of_the_dataset(tmp_path, monkeypatch, override, expected):
    (tmp_path / "params.yaml").write_text("data: {name: our-xrays}\n")
    metrics = tmp_path / "runs" / "recipes" / NAMES[0] / "reports" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("{}")
    found = []
    monkeypatch.setattr(recipes, "_run_stage", lambda project, name, stage, overrides: found.append(list(overrides)))
    recipes.run(Project(tmp_path), [NAMES[0]], [override] if override else [])
    assert all(overrides == expected for overrides in found) and found
