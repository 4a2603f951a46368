"""`medgen refiner`: from store and model to a trained refiner, its record, and clear words when a part is missing."""

import dataclasses
import json
import shutil

import pytest
import torch

from medgen.config import Model, Preprocess, Prior, Refiner, Tracking
from medgen.data.store import open_store
from medgen.errors import NonFiniteError, UserError
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors.refiner import load_refiner
from medgen.tracking import REFINER_ORIGIN, history, read_run
from medgen.training import prior, refiner
from medgen.training.distributed import World
from medgen.training.loader import Loader

RUN = "0123456789ab"
SPATIAL = Model(base_channels=8, max_channels=16, latent_channels=4, latent_size=4, attention_resolutions=())
MODELS = {
    "spatial VAE": SPATIAL,
    "flat VAE": Model(name="vae", base_channels=4, max_channels=8, latent_channels=6),
    "conditional VAE": Model(name="cvae", base_channels=4, max_channels=8, latent_channels=6),
    "autoencoder": Model(name="autoencoder", base_channels=4, latent_channels=3, latent_size=8),
    "VQ-VAE": Model(name="vqvae", base_channels=8, latent_channels=4, latent_size=8, num_embeddings=16),
}
SMALL = Refiner(enabled=True, channels=8, blocks=1, epochs=2, batch_size=8, sampling_steps=2)
QUIET = Tracking(enabled=False)


def save_model(project, model=SPATIAL):
    store = open_store(project.dataset)
    torch.manual_seed(0)
    info = BundleInfo(
        model=model,
        preprocess=Preprocess(image_size=32, clahe_tiles=2),
        image_shape=store.image_shape,
        classes=store.classes,
        dataset=store.fingerprint,
        run=RUN,
        torch=torch.__version__,
    )
    bundle.save(project.model, build_model(model, store.image_shape, len(store.classes)), info)
    prior.run(project, prior=Prior(name="gaussian"), tracking=QUIET)
    return project


@pytest.fixture
def project(tiny_project):
    """The tiny store, an untrained model of it and its prior."""
    return save_model(tiny_project)


def trained(project, params=SMALL):
    refiner.run(project, refiner=params, tracking=QUIET)
    return {path.name: path.read_bytes() for path in project.refiner.iterdir()}


def test_a_refiner_is_trained_kept_and_recorded(project):
    trained(project)
    made = load_refiner(project.refiner, bundle.digest(project.model))
    assert made is not None
    assert made.params == SMALL and made.image_shape == (1, 32, 32) and made.num_classes == 3
    run = project.runs / RUN
    (metrics,) = history(run)
    assert {"refiner/train_loss", "refiner/val_loss"} == {key for key in metrics if key.startswith("refiner/")}
    assert str(read_run(run).params["refiner.epochs"]) == "2"
    (scratch,) = run.glob("refiner_*")
    losses = [record["val/loss"] for record in history(scratch)]
    assert metrics["refiner/val_loss"] == pytest.approx(min(losses)), "the epoch that fits the val split best"
    assert (scratch / "refiner_loss.png").stat().st_size > 0
    origin = json.loads((run / REFINER_ORIGIN).read_text())
    assert "git.commit" in origin["lineage"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_that_decodes_can_be_refined(tiny_project, name):
    project = save_model(tiny_project, MODELS[name])
    made = refiner.run(project, refiner=SMALL.model_copy(update={"epochs": 1}), tracking=QUIET)
    assert made is not None
    model, _ = bundle.load_generative(project.model)
    latents, labels = torch.randn(3, *model.latent_shape), torch.tensor([0, 1, 2])
    images = made.sample(model, latents, labels, torch.Generator().manual_seed(0))
    assert images.shape == (3, 1, 32, 32) and bool(images.isfinite().all())


def test_a_refiner_without_classes_is_one_of_all_images(project):
    made = refiner.run(project, refiner=SMALL.model_copy(update={"conditional": False}), tracking=QUIET)
    assert made is not None and made.num_classes == 0


def test_the_scales_are_those_of_the_train_split(project):
    """By a slow path: without noise on the latents the residual is that of the reconstructions."""
    made = refiner.run(
        project, refiner=SMALL.model_copy(update={"latent_noise": 0.0, "sampling_noise": 0.0}), tracking=QUIET
    )
    model, _ = bundle.load_generative(project.model)
    split = open_store(project.dataset).split("train")
    images = torch.from_numpy(split.images[:]).float() / 255
    with torch.no_grad():
        means = model.encode(images).mean
    torch.testing.assert_close(made.latent_scale, means.std(0, correction=0), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        expected = (images - model.decode(means)).square().mean().sqrt()
    assert float(made.residual_scale) == pytest.approx(float(expected), rel=0.2)  # posterior draws, not means


def test_disabled_it_says_so_and_trains_nothing(project, capsys):
    trained(project)
    assert set(trained(project, Refiner())) == {"refiner.json"}, "the weights of an earlier one are gone"
    assert "no refiner: refiner.enabled is false" in capsys.readouterr().out
    assert load_refiner(project.refiner, bundle.digest(project.model)) is None


def test_same_input_gives_the_same_bytes(project):
    first = trained(project)
    shutil.rmtree(project.refiner)
    shutil.rmtree(project.runs)
    assert trained(project) == first
    assert trained(project, SMALL.model_copy(update={"seed": 1})) != first


def test_an_interrupted_refiner_ends_as_an_uninterrupted_one(project, monkeypatch):
    whole = trained(project)
    shutil.rmtree(project.refiner)
    shutil.rmtree(project.runs)
    objective, number = refiner.RefinerTask.objective, iter(range(100))
    num_batches = Loader(open_store(project.dataset).split("train"), 8, torch.device("cpu")).num_batches

    def killed(self, *arguments):
        if next(number) == num_batches + 1:  # in the second epoch
            raise KeyboardInterrupt
        return objective(self, *arguments)

    monkeypatch.setattr(refiner.RefinerTask, "objective", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(project)
    assert not project.refiner.exists()
    assert trained(project) == whole


def test_how_it_draws_does_not_train_it_anew(project, monkeypatch):
    trained(project)
    monkeypatch.setattr(refiner.RefinerTask, "forward", lambda *_: pytest.fail("trained again"))
    changes = {"sampling_steps": 3, "solver": "euler", "sampling_noise": 0.1, "guidance": 2.0}
    trained(project, SMALL.model_copy(update=changes))
    made = load_refiner(project.refiner, bundle.digest(project.model))
    assert made is not None and {key: getattr(made.params, key) for key in changes} == changes


def test_a_refiner_that_goes_infinite_is_stopped_and_named(project, monkeypatch):
    objective = refiner.RefinerTask.objective

    def infinite(self, output, batch, phase, epoch):
        found = objective(self, output, batch, phase, epoch)
        is_third = round(epoch * self.num_batches) == 3
        return dataclasses.replace(found, total=found.total * torch.inf) if is_third else found

    monkeypatch.setattr(refiner.RefinerTask, "objective", infinite)
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        trained(project)
    (report,) = project.runs.glob("*/refiner_*/nonfinite_step_3_*.json")
    assert len(json.loads(report.read_text())["files"]) == 8


def other_dataset(project):
    path = project.model / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": "ffffffffffff"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p.dataset), "medgen preprocess"),
        (lambda p: shutil.rmtree(p.model), "medgen train"),
        (other_dataset, "trained on dataset ffffffffffff.*medgen train"),
    ],
)
@pytest.mark.parametrize("params", [SMALL, Refiner()])
def test_says_what_to_do(project, damage, message, params):
    damage(project)
    with pytest.raises(UserError, match=message):
        refiner.run(project, refiner=params, tracking=QUIET)


def test_without_a_prior_it_says_what_to_do_before_it_trains(project, monkeypatch):
    shutil.rmtree(project.prior)
    monkeypatch.setattr(refiner.RefinerTask, "forward", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="medgen prior"):
        refiner.run(project, refiner=SMALL, tracking=QUIET)


@pytest.mark.parametrize(("contrast", "gain"), [(0.9, 1 / 0.9), (1.1, 1 / 1.1), (0.5, refiner.MAX_GAIN)])
def test_the_gain_brings_samples_to_the_contrast_of_train_images(project, monkeypatch, contrast, gain):
    made = refiner.run(project, refiner=SMALL, tracking=QUIET)
    store = open_store(project.dataset)
    images = torch.from_numpy(store.split("train").images[:]).float() / 255
    mean = images.mean((2, 3), keepdim=True)
    monkeypatch.setattr(refiner, "sample_images", lambda *_, **__: mean + contrast * (images - mean))
    found = refiner.fit_gain(made, None, None, store)
    assert found[0, 0] == 1.0, "the mean stays"
    found[0, 0] = gain
    torch.testing.assert_close(found, torch.full((32, 17), gain))


def test_more_noise_than_it_learnt_is_refused():
    with pytest.raises(ValueError, match="sampling_noise: found 2, expected at most latent_noise, 1"):
        Refiner(sampling_noise=2.0)


def test_two_processes_have_half_of_every_batch_each(project, monkeypatch):
    """tests/training/test_distributed.py trains on these shares, with two processes."""
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor)  # there is no second process here
    store = open_store(project.dataset)
    model, _ = bundle.load_for(store, project.model)

    def files(rank, size):
        world = World(rank, size, torch.device("cpu"))
        task = refiner.RefinerTask(model, store, torch.ones(model.latent_shape), SMALL, world)
        return [task.inputs(position)[1] for position in range(task.num_batches + 1)]

    for whole, first, second in zip(files(0, 1), files(0, 2), files(1, 2), strict=True):
        assert len(first) == len(second) == SMALL.batch_size // 2
        assert sorted(first + second) == sorted(whole)
