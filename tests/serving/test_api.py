"""`medgen.load` and `medgen.open_dataset`: the images of the commands, checked arguments, lazy imports."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import medgen
from medgen.config import Model, Project, Refiner
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.models import bundle
from medgen.priors.refiner import Refiner as ImageRefiner
from medgen.priors.refiner import save_refiner
from medgen.serving import generate

CVAE = Model(name="cvae", base_channels=4, latent_channels=6)


@pytest.fixture(scope="module")
def refined(tiny_store, trained, tmp_path_factory) -> Project:
    """A project with a model and a refiner of random weights."""
    project = Project(tmp_path_factory.mktemp("refined"))
    shutil.copytree(tiny_store, project.dataset)
    trained(project)
    scales = torch.full((1,), 0.1), torch.ones(1, 32, 17), torch.ones(2, 8, 8)
    params = Refiner(enabled=True, channels=8, blocks=1, sampling_steps=2)
    save_refiner(project.refiner, ImageRefiner.create(params, (1, 32, 32), 3, *scales), bundle.digest(project.model))
    return project


@pytest.fixture(scope="module")
def model(refined):
    return medgen.load(refined.model.parent)


@pytest.fixture(scope="module")
def conditional(tiny_store, trained, tmp_path_factory):
    """A model whose encoder and decoder use labels."""
    project = Project(tmp_path_factory.mktemp("conditional"))
    shutil.copytree(tiny_store, project.dataset)
    return medgen.load(trained(project, CVAE).model.parent)


@pytest.fixture
def images(refined):
    return medgen.open_dataset(refined.dataset).split("test").images


def files(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*_0*.png"))])


@pytest.mark.parametrize("refine", [True, False])
def test_samples_are_the_images_that_generate_writes(refined, model, tmp_path, refine):
    options = {"n": 5, "label": "NORMAL", "seed": 3, "refine": refine}
    generate.run(refined.model.parent, tmp_path, **options)
    found = model.sample(**options)
    assert found.shape == (5, 1, 32, 32)
    assert found.dtype == np.uint8
    assert (found[:, 0] == files(tmp_path)).all()


def test_without_a_seed_each_call_gives_other_images(model):
    assert (model.sample(2) != model.sample(2)).any()


def test_labels_may_be_given_for_each_image(model):
    given = model.sample(4, label=["NORMAL", "0", 2, np.int64(1)], seed=1)
    assert given.shape == (4, 1, 32, 32)
    by_index = model.sample(4, label=[model.classes.index("NORMAL"), 0, 2, 1], seed=1)
    assert (given == by_index).all()


def test_reconstructions_are_those_of_the_network(refined, model, images):
    network, _ = bundle.load(refined.model)
    pixels = torch.from_numpy(images[:3].copy()) / 255.0
    with torch.no_grad():
        latents, expected = network.encode(pixels).mean, network.reconstruct(pixels)
    np.testing.assert_allclose(model.encode(images[:3]), latents.numpy(), atol=1e-5)
    expected = (expected * 255).round().to(torch.uint8).numpy()
    for result in (model.reconstruct(images[:3]), model.decode(model.encode(images[:3]))):
        assert (result == expected).all()


def test_floats_and_left_out_axes_give_the_same_latents(model, images):
    latents = model.encode(images[:2])
    assert latents.dtype == np.float32
    np.testing.assert_allclose(model.encode(images[:2] / 255.0), latents, atol=1e-5)
    np.testing.assert_allclose(model.encode(images[:2, 0]), latents, atol=1e-5)
    np.testing.assert_allclose(model.encode(images[0, 0]), latents[:1], atol=1e-4)
    assert (model.decode(latents[0]) == model.decode(latents[:1])).all()


def test_a_batch_larger_than_one_pass_keeps_its_order(model, images):
    many = np.concatenate([images] * 8)
    assert len(many) > generate.BATCH_SIZE
    np.testing.assert_allclose(model.encode(many)[-1:], model.encode(images[-1]), atol=1e-4)


def test_interpolation_begins_and_ends_with_the_reconstructions(model, images):
    path = model.interpolate(images[0], images[1], n=5)
    ends = model.reconstruct(images[:2])
    assert (path[[0, -1]] == ends).all()
    assert (path[2] != ends).any()


def test_a_file_is_read_as_the_train_images_were(refined, model, tmp_path):
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(40, 30)).save(tmp_path / "chest.png")
    found = model.read(tmp_path / "chest.png")
    expected = generate.load_image(tmp_path / "chest.png", bundle.load_info(refined.model).preprocess)
    assert (found == (expected.numpy() * 255).round()).all()
    assert found.shape == (1, *model.image_shape)


def test_labels_of_a_conditional_model_change_its_images(conditional, images):
    first = conditional.reconstruct(images[:2], label="NORMAL")
    assert (first != conditional.reconstruct(images[:2], label="PNEUMONIA")).any()
    both = conditional.encode(images[:2], label=["NORMAL", "PNEUMONIA"])
    np.testing.assert_allclose(both[:1], conditional.encode(images[0], label="NORMAL"), atol=1e-4)
    np.testing.assert_allclose(both[1:], conditional.encode(images[1], label="PNEUMONIA"), atol=1e-4)
    assert (both != conditional.encode(images[:2], label="NORMAL")).any()
    assert conditional.interpolate(images[0], images[1], n=3, label=["NORMAL", "PNEUMONIA"]).shape == (3, 1, 32, 32)


def test_a_model_describes_itself(model):
    assert model.classes == ("COVID19", "NORMAL", "PNEUMONIA")
    assert model.image_shape == (1, 32, 32)
    assert model.latent_shape == (2, 8, 8)
    for part in ("spatial_vae", "(1, 32, 32)", "(2, 8, 8)", "NORMAL", "prior='gmm'", "refiner=True", "device='cpu'"):
        assert part in repr(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.sample(0), r"n: found 0; expected a whole number from 1$"),
        (lambda m, x: m.sample(2.5), r"n: found 2\.5"),
        (lambda m, x: m.sample(True), r"n: found True"),
        (lambda m, x: m.sample(1, seed=-1), r"seed: found -1; expected a whole number from 0"),
        (lambda m, x: m.sample(1, label="NORMA"), r"label: unknown name 'NORMA'; did you mean 'NORMAL'"),
        (lambda m, x: m.sample(1, label=3), r"label: unknown name '3'"),
        (lambda m, x: m.sample(1, label=1.0), r"label: found 1\.0; expected a class by name or index"),
        (lambda m, x: m.sample(1, label=True), r"label: found True"),
        (lambda m, x: m.sample(3, label=["NORMAL"]), r"label: found 1; expected one, or one for each of the 3 images"),
        (lambda m, x: m.encode(x, label="NORMAL"), r"spatial_vae does not use labels"),
        (lambda m, x: m.encode(x.astype(int)), r"images: found int64"),
        (lambda m, x: m.reconstruct(x[..., ::2]), r"images: found images of shape 2 x 1 x 32 x 16"),
        (lambda m, x: m.interpolate(x, x[0]), r"first: found 2 images; expected one"),
        (lambda m, x: m.interpolate(x[0], x[1], n=1), r"n: found 1; expected a whole number from 2 to 200"),
        (lambda m, x: m.decode(np.zeros((1, 2, 8))), r"latents: found float64 \(1, 2, 8\); expected floats \(N, 2, 8"),
        (lambda m, x: m.decode(np.zeros((1, 2, 8, 8), int)), r"latents: found int64"),
        (lambda m, x: m.decode(np.full((1, 2, 8, 8), np.inf)), r"latents: hold values that are not finite"),
        (lambda m, x: m.read(__file__), r"test_api\.py: not readable as an image"),
    ],
)
def test_invalid_arguments_are_errors(model, images, call, message):
    with pytest.raises(UserError, match=message):
        call(model, images[:2])


def test_a_conditional_model_needs_a_label(conditional, images):
    with pytest.raises(UserError, match=r"label: missing, but cvae needs one; expected one of COVID19, NORMAL"):
        conditional.encode(images[:2])


def test_the_projects_model_and_dataset_are_the_default(refined, model, monkeypatch):
    monkeypatch.chdir(refined.root)
    assert (medgen.load().sample(2, seed=1) == model.sample(2, seed=1)).all()
    assert (medgen.load(project=refined.root).sample(2, seed=1) == model.sample(2, seed=1)).all()
    assert medgen.open_dataset() == open_store(medgen.open_dataset().folder)


def test_a_missing_model_or_registry_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"artifacts/model: not found; run `dvc repro` first"):
        medgen.load()
    with pytest.raises(
        UserError, match=r"params\.yaml: not found, and models:/medgen@champion needs its tracking\.uri"
    ):
        medgen.load("models:/medgen@champion")
    assert os.listdir(tmp_path) == []


def test_a_registered_version_is_found_by_the_projects_params(refined, model, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text("tracking: {uri: 'sqlite:///other.db'}\n")
    seen = []

    def download(uri, project, tracking):
        seen.append((uri, project.root, tracking.uri))
        return refined.model.parent

    monkeypatch.setattr("medgen.registry.download_version", download)
    found = medgen.load("models:/medgen@champion", project=tmp_path)
    assert seen == [("models:/medgen@champion", tmp_path, "sqlite:///other.db")]
    assert (found.sample(2, seed=1) == model.sample(2, seed=1)).all()


def test_a_dataset_is_memory_mapped_and_read_only(refined):
    dataset = medgen.open_dataset(str(refined.dataset))
    test = dataset.split("test")
    first = test.images[:8]
    assert isinstance(first, np.ndarray) and first.shape == (8, *test.images.shape[1:])
    np.testing.assert_array_equal(test.images[np.arange(8)], first)
    with pytest.raises(TypeError, match="item assignment"):
        test.images[0] = 0
    assert len(test) == len(test.images) == dataset.counts["test"]
    assert [row["label"] for row in test.rows()] == [dataset.classes[label] for label in test.labels]
    assert "counts" in repr(dataset)
    assert repr(test) == f"Split('test', images={test.images.shape}, masks=True)"


def test_import_medgen_is_fast_and_typed(root):
    """It imports neither torch nor numpy; its names are listed; type checkers read its annotations."""
    code = "import sys, medgen; print(sorted({'torch', 'numpy', 'mlflow'} & set(sys.modules)), *dir(medgen))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    assert {"load", "open_dataset", "evaluate", "Model"} <= set(done.stdout.split())
    assert (root / "medgen" / "py.typed").exists()
    assert all(getattr(medgen, name) is not None for name in medgen.__all__)
    with pytest.raises(AttributeError, match="module 'medgen' has no attribute 'lode'"):
        medgen.lode  # noqa: B018
