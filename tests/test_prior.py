"""`medgen prior`: from store and model to a fitted prior, its record, and clear words when something is missing."""

import json
import shutil
import warnings

import pytest
import torch

from medgen import bundle, prior
from medgen.bundle import BundleInfo
from medgen.config import Model, Preprocess, Prior, Tracking
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.models import build_model
from medgen.priors import PRIORS, load_prior
from medgen.tracking import history, read_run

MODEL = Model(base_channels=8, max_channels=16, latent_channels=4, latent_size=4, attention_resolutions=())
QUIET = Tracking(enabled=False)


@pytest.fixture
def project(tiny_project):
    """The tiny store and an untrained model of it."""
    store = open_store(tiny_project.dataset)
    torch.manual_seed(0)
    info = BundleInfo(
        model=MODEL,
        preprocess=Preprocess(image_size=32, clahe_tiles=2),
        image_shape=store.image_shape,
        classes=store.classes,
        dataset=store.fingerprint,
        run="0123456789ab",
        torch=torch.__version__,
    )
    bundle.save(tiny_project.model, build_model(MODEL, store.image_shape, len(store.classes)), info)
    return tiny_project


@pytest.mark.parametrize("name", PRIORS)
def test_fits_and_records(project, name):
    fitted = prior.run(project, prior=Prior(name=name), tracking=QUIET)
    assert load_prior(project.prior, bundle.digest(project.model)).name == fitted.name == name
    assert fitted.latent_shape == (4, 4, 4)
    run = read_run(project.runs / "0123456789ab")
    assert run is not None
    assert run.params["prior.name"] == name
    (metrics,) = history(project.runs / "0123456789ab")
    assert {"prior/train_log_likelihood", "prior/val_log_likelihood"} < set(metrics)


def test_rare_classes_are_named(project, capsys):
    prior.run(project, prior=Prior(), tracking=QUIET)
    said = capsys.readouterr().out
    for name in open_store(project.dataset).classes:
        assert f"warning: {name}: " in said


def test_same_input_gives_the_same_bytes(project):
    prior.run(project, prior=Prior(), tracking=QUIET)
    first = {path.name: path.read_bytes() for path in project.prior.iterdir()}
    shutil.rmtree(project.prior)
    prior.run(project, prior=Prior(), tracking=QUIET)
    assert {path.name: path.read_bytes() for path in project.prior.iterdir()} == first


def test_encoding_keeps_order_and_averages_the_posterior_variance(project):
    model, _ = bundle.load(project.model)
    split = open_store(project.dataset).split("train")
    encoded = prior.encode(model, split)
    image = torch.from_numpy(split.images[:].copy()).float() / 255
    with torch.no_grad():
        latent = model.encode(image)
    torch.testing.assert_close(encoded.means, latent.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.variance, latent.logvar.exp().mean(0), rtol=1e-4, atol=1e-5)
    assert encoded.labels.tolist() == split.labels.tolist()
    assert encoded.files == split.paths


def test_too_many_latents_are_thinned(project, monkeypatch):
    monkeypatch.setattr(prior, "MAX_LATENT_NUMBERS", 10 * 64)
    model, _ = bundle.load(project.model)
    split = open_store(project.dataset).split("train")
    encoded = prior.encode(model, split)
    assert encoded.means.shape == (10, 4, 4, 4)
    assert len(set(encoded.labels.tolist())) > 1
    assert [split.paths.index(path) for path in encoded.files] == sorted(split.paths.index(p) for p in encoded.files)


def test_unsplit_classes_do_not_break_the_check():
    latents, labels = torch.randn(120, 5), torch.arange(120) % 2
    fitted = PRIORS["gmm"].fit(latents, labels, 3, Prior())  # class 2 has no training image
    seen = prior.Encoded(torch.randn(6, 5), torch.tensor([0, 1, 2, 2, 1, 0]), None, [])
    value = prior.mean_log_likelihood(fitted, seen)
    assert value == value


def other_dataset(project):
    path = project.model / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": "ffffffffffff"}))


@pytest.mark.parametrize(
    ("damage", "params", "message"),
    [
        (lambda p: shutil.rmtree(p.dataset), Prior(), "medgen preprocess"),
        (lambda p: shutil.rmtree(p.model), Prior(), "medgen train"),
        (other_dataset, Prior(), "trained on dataset ffffffffffff.*medgen train"),
        (lambda p: None, Prior(name="gm"), "did you mean 'gmm'"),
    ],
)
def test_says_what_to_do(project, damage, params, message):
    damage(project)
    with pytest.raises(UserError, match=message):
        prior.run(project, prior=params, tracking=QUIET)


def test_no_warning_escapes(project):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.run(project, prior=Prior(components=(1, 2)), tracking=QUIET)
