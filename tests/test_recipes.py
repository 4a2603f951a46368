"""Every recipe is whole: it is read, says where it comes from, builds its model, and trains."""

import math
import subprocess
import sys

import pytest
import torch

from medgen import recipes
from medgen.config import Prior, Project, load
from medgen.datasets.catalog import KNOWN
from medgen.datasets.sample import draw
from medgen.errors import TrainingInterrupted, UserError
from medgen.ingest import preprocess
from medgen.models import MODELS, build_model
from medgen.recipes import known, read
from medgen.tracking import history
from medgen.training import prior, refiner, train

NAMES = sorted(known())
TINY = [  # what makes any of them small; the rest is the recipe's own
    "preprocess.clahe_tiles=2",
    "preprocess.max_rejected=0",
    "model.base_channels=2",
    "model.max_channels=8",
    "model.num_codes=8",
    "model.latent_channels=4",
    "train.subset=8",
    "train.batch_size=4",
    "train.sample_every=1000",
    "tracking.enabled=false",
]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Drawn films with masks."""
    folder = tmp_path_factory.mktemp("films")
    draw(folder, num_images=24, size=48, seed=0)
    return folder


def path_of(name, root):
    return root / "recipes" / f"{name}.yaml"


def head_of(name):
    """The comment a recipe starts with, on one line."""
    lines = read(name).splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])


def test_every_family_and_system_has_a_recipe(root):
    assert {load(path_of(name, root)).model.name for name in NAMES} == set(MODELS)
    heads = " ".join(map(head_of, NAMES))
    assert all(f"System {system}" in heads for system in "ABCDE")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_where_it_comes_from_and_which_data_it_wants(name):
    head = head_of(name)
    assert len(known()[name]) <= 117
    assert any(f"medgen data fetch {dataset}" in head for dataset in KNOWN), head
    assert "ours: " in head or "Expected of ours: " in head


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_the_model_it_describes_at_its_own_size(name, root):
    params = load(path_of(name, root))
    shape = (params.preprocess.channels, params.preprocess.image_size, params.preprocess.image_size)
    with torch.device("meta"):  # sizes without the numbers
        model = build_model(params.model, shape, 10, params.preprocess.mask_classes)
        made = model(torch.rand(2, *shape), torch.zeros(2, dtype=torch.int64)).reconstruction
    assert made.shape[2:] == shape[1:]
    last = params.train.phases[-1]
    assert last.beta.epochs <= last.epochs, "β never reaches its end"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name, root, films, tmp_path):
    """Two steps of each phase, from files to a model, its loss as it is but for VGG's weights; then its refiner."""
    tree = load(path_of(name, root))
    size = 16 if tree.loss.weights.ssim == 0 else 32
    side = None if tree.model.latent_size is None else size // (tree.preprocess.image_size // tree.model.latent_size)
    phases = [
        part for i in range(len(tree.train.phases))
        for part in (f"train.phases.{i}.epochs=1", f"train.phases.{i}.schedule.period=1")
    ]  # fmt: skip
    fitting = [f"preprocess.image_size={size}", f"model.latent_size={'null' if side is None else max(side, 4)}"]
    params = load(path_of(name, root), [*TINY, *fitting, *phases, f"data.path={films}", "loss.weights.perceptual=0"])
    project = Project(tmp_path)
    preprocess.run(project, data=params.data, preprocess=params.preprocess)
    scratch = train.run(project, model=params.model, loss=params.loss, train=params.train, tracking=params.tracking)
    records = history(scratch)
    assert len(records) == len(tree.train.phases)
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert project.model.exists()
    if params.refiner.enabled:
        tiny = params.refiner.model_copy(update={"channels": 8, "blocks": 1, "epochs": 1})
        prior.run(project, prior=Prior(name="gaussian"), tracking=params.tracking)
        assert refiner.run(project, refiner=tiny, tracking=params.tracking) is not None


STOPPED_WHILE_WORKING = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
os.kill(os.getppid(), signal.SIGTERM)  # as a cluster does to the command it started, which is the parent
signal.pause()
"""


def test_a_signal_reaches_the_stage_at_work_which_is_waited_for():
    assert recipes._wait_for(subprocess.Popen([sys.executable, "-c", STOPPED_WHILE_WORKING])) == 5


@pytest.mark.parametrize(
    ("code", "error", "exit_code"),
    [(2, UserError, 2), (4, UserError, 4), (-9, UserError, 2), (5, TrainingInterrupted, 5)],
)
def test_a_stage_that_stops_ends_the_command_with_its_exit_code(code, error, exit_code, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "_wait_for", lambda process: process.wait() and code)
    with pytest.raises(error, match=f"recipe {NAMES[0]}: `medgen") as raised:
        recipes.run(Project(tmp_path), [NAMES[0]], ["data.path=nowhere"])
    assert raised.value.exit_code == exit_code


def test_only_what_the_user_wrote_is_kept_when_a_recipe_takes_its_place(tmp_path):
    path, before = tmp_path / "params.yaml", tmp_path / "params.yaml.before"
    recipes.use(NAMES[0], Project(tmp_path))
    assert not before.exists()
    path.write_text("train: {seed: 7}\n")
    for name in NAMES[:2]:
        recipes.use(name, Project(tmp_path))
    assert before.read_text() == "train: {seed: 7}\n"
    assert path.read_text() == read(NAMES[1])
