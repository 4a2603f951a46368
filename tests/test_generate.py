"""`medgen generate` and `medgen reconstruct`: pictures on disk, the same for the same seed, and clear refusals."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from medgen import bundle, generate
from medgen.bundle import BundleInfo
from medgen.config import Model, Preprocess, Prior, Project
from medgen.data.images import read_image
from medgen.data.squares import to_square
from medgen.errors import UserError
from medgen.models import build_model
from medgen.priors import PRIORS, save_prior

MODEL = Model(base_channels=8, max_channels=16, latent_channels=4, latent_size=4, attention_resolutions=())
CLASSES = ("COVID19", "NORMAL", "PNEU/../MONIA")
INFO = BundleInfo(
    model=MODEL,
    preprocess=Preprocess(image_size=32, clahe_tiles=2),
    image_shape=(1, 32, 32),
    classes=CLASSES,
    dataset="d" * 12,
    run="r" * 12,
    torch=torch.__version__,
)


def build(root, prior="gmm", classes=CLASSES):
    """A project with an untrained model and a prior whose classes lie far apart."""
    project = Project(root)
    torch.manual_seed(0)
    bundle.save(
        project.model, build_model(MODEL, (1, 32, 32), len(classes)), dataclasses.replace(INFO, classes=classes)
    )
    labels = torch.arange(180) % 2 * 2 if classes else torch.full((180,), -1)  # no image of class 1
    latents = torch.randn(180, 4, 4, 4) + 5.0 * labels[:, None, None, None]
    fitted = PRIORS[prior].fit(latents, labels, len(classes), Prior(components=(1,)))
    save_prior(project.prior, fitted, bundle.digest(project.model))
    return project


@pytest.fixture
def project(tmp_path):
    return build(tmp_path)


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_writes_every_image_and_a_grid(project, tmp_path):
    paths = generate.run(project, n=130, label=None, seed=0, model=None, out=tmp_path / "new")
    found = pixels(tmp_path / "new")
    assert len(paths) == 130
    assert {path.name for path in paths} | {"grid.png"} == set(found)
    assert {found[path.name].shape for path in paths} == {(32, 32)}
    assert {path.name.rsplit("_", 1)[0] for path in paths} == {"COVID19", "PNEU_.._MONIA"}


def test_seed_decides(project, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate.run(project, n=5, label="COVID19", seed=seed, model=None, out=tmp_path / name)
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert all((a[name] == b[name]).all() for name in a)
    assert any((a[name] != c[name]).any() for name in a)


@pytest.mark.parametrize(("label", "name"), [("COVID19", "COVID19"), ("0", "COVID19"), ("2", "PNEU_.._MONIA")])
def test_label_by_name_or_index(project, tmp_path, label, name):
    paths = generate.run(project, n=3, label=label, seed=0, model=None, out=tmp_path / "new")
    assert [path.name for path in paths] == [f"{name}_{i:05d}.png" for i in range(3)]


def test_another_folder_is_used_when_named(project, tmp_path):
    place = tmp_path / "elsewhere"
    shutil.move(project.root / "artifacts", place)
    assert generate.run(project, n=2, label=None, seed=0, model=place, out=tmp_path / "new")
    with pytest.raises(UserError, match="medgen train"):
        generate.run(project, n=2, label=None, seed=0, model=None, out=tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "label", "message"),
    [
        ({}, "COVID", "did you mean 'COVID19'.*Known: COVID19, NORMAL"),
        ({}, "3", "Known: COVID19"),
        ({}, "NORMAL", "no image of 'NORMAL'"),
        ({"prior": "gaussian"}, "COVID19", "does not tell classes apart"),
        ({"classes": ()}, "COVID19", "without labels"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, label, message):
    project = build(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        generate.run(project, n=2, label=label, seed=0, model=None, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unlabelled_images_are_plainly_named(tmp_path):
    paths = generate.run(build(tmp_path, classes=()), n=2, label=None, seed=0, model=None, out=tmp_path / "new")
    assert [path.name for path in paths] == ["image_00000.png", "image_00001.png"]


def test_missing_prior_says_so(project, tmp_path):
    shutil.rmtree(project.prior)
    with pytest.raises(UserError, match="medgen prior"):
        generate.run(project, n=2, label=None, seed=0, model=None, out=tmp_path / "new")


@pytest.fixture
def files(tmp_path):
    """Two pictures of one name, and a file that is none."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a" / "chest.png", tmp_path / "b" / "chest.png"]
    for path, (height, width) in zip(paths, [(90, 60), (40, 50)], strict=True):
        path.parent.mkdir()
        Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8)).save(path)
    (tmp_path / "note.png").write_text("no picture")
    return paths, tmp_path / "note.png"


def test_reconstructions_beside_originals_with_their_scores(project, files, tmp_path):
    paths, _ = files
    rows = generate.reconstruct(project, files=paths, model=None, out=tmp_path / "out")
    assert [row["picture"] for row in rows] == ["chest.png", "chest_2.png"]
    assert all((tmp_path / "out" / row["picture"]).exists() for row in rows)
    with (tmp_path / "out" / "reconstructions.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    model, info = bundle.load(project.model)
    square = to_square(read_image(paths[0], info.preprocess).pixels, info.preprocess)
    original = torch.from_numpy(square)[None] / 255.0
    with torch.no_grad():
        error = ((model.reconstruct(original) - original) ** 2).mean().item()
    assert float(rows[0]["psnr"]) == pytest.approx(-10 * np.log10(error), abs=0.01)
    assert -1 <= float(rows[0]["ssim"]) <= 1


def test_an_unreadable_file_is_named_after_the_others_are_done(project, files, tmp_path):
    paths, broken = files
    with pytest.raises(UserError, match=r"note\.png"):
        generate.reconstruct(project, files=[broken, paths[0]], model=None, out=tmp_path / "out")
    assert (tmp_path / "out" / "chest.png").exists()


@pytest.mark.parametrize("prior", ["normal", "gaussian"])
def test_images_of_a_prior_that_knows_no_classes_are_not_named_after_one(tmp_path, prior):
    paths = generate.run(build(tmp_path, prior=prior), n=2, label=None, seed=0, model=None, out=tmp_path / "new")
    assert [path.name for path in paths] == ["image_00000.png", "image_00001.png"]
