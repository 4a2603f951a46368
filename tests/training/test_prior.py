"""`medgen prior`: from store and model to a fitted prior, its record, and clear words when something is missing."""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch

from medgen.config import Model, Preprocess, Prior, Tracking
from medgen.data.store import open_store
from medgen.errors import NonFiniteError, UserError
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import ANALYTIC, gmm, load_prior
from medgen.tracking import history, read_run
from medgen.training import prior
from medgen.training.latents import Encoded

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


@pytest.mark.parametrize("name", ANALYTIC)
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
    warnings = capsys.readouterr().err
    for name in open_store(project.dataset).classes:
        assert f"warning: {name}: " in warnings


def test_same_input_gives_the_same_bytes(project):
    prior.run(project, prior=Prior(), tracking=QUIET)
    first = {path.name: path.read_bytes() for path in project.prior.iterdir()}
    shutil.rmtree(project.prior)
    prior.run(project, prior=Prior(), tracking=QUIET)
    assert {path.name: path.read_bytes() for path in project.prior.iterdir()} == first


def test_the_mixture_is_given_the_patients_of_its_rows(project, monkeypatch):
    given = []
    hold_out = gmm._hold_out
    monkeypatch.setattr(gmm, "_hold_out", lambda patients, seed: given.append(patients) or hold_out(patients, seed))
    monkeypatch.setattr(gmm, "RARE", 10)
    prior.run(project, prior=Prior(name="gmm", conditional=False), tracking=QUIET)
    names = open_store(project.dataset).split("train").patients
    (patients,) = given
    assert len(set(zip(names, patients.tolist(), strict=True))) == len(set(names)) == len(set(patients.tolist()))


def test_unsplit_classes_do_not_break_the_check():
    latents, labels = torch.randn(120, 5), torch.arange(120) % 2
    fitted = ANALYTIC["gmm"].fit(latents, labels, 3, Prior())  # class 2 has no training image
    seen = Encoded(torch.randn(6, 5), torch.tensor([0, 1, 2, 2, 1, 0]), None, None)
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


SMALL_FLOW = Prior(name="flow", channels=8, blocks=1, epochs=2, batch_size=4, sampling_steps=2)


@pytest.fixture
def short_epochs(monkeypatch):
    monkeypatch.setattr(prior.LatentTask, "num_batches", 4)


def trained(project, params=SMALL_FLOW):
    prior.run(project, prior=params, tracking=QUIET)
    return {path.name: path.read_bytes() for path in project.prior.iterdir()}


def test_a_learned_prior_is_trained_kept_and_recorded(project, short_epochs):
    trained(project)
    made = load_prior(project.prior, bundle.digest(project.model))
    assert made.name == "flow" and made.conditional
    run = project.runs / "0123456789ab"
    (metrics,) = history(run)
    assert {"prior/train_loss", "prior/val_loss"} == set(metrics) - {"step"}
    assert read_run(run).params["prior.epochs"] == "2" or read_run(run).params["prior.epochs"] == 2
    (scratch,) = run.glob("prior_*")
    losses = [record["val/loss"] for record in history(scratch)]
    assert metrics["prior/val_loss"] == pytest.approx(min(losses)), "the epoch that fits held-out latents best"
    assert (scratch / "prior_samples.png").stat().st_size > 0 and (scratch / "prior_loss.png").stat().st_size > 0


def test_an_interrupted_prior_ends_as_an_uninterrupted_one(project, short_epochs, monkeypatch):
    whole = trained(project)
    shutil.rmtree(project.prior)
    shutil.rmtree(project.runs)
    objective, number = prior.LatentTask.objective, iter(range(100))

    def killed(self, *arguments):
        if next(number) == 6:
            raise KeyboardInterrupt
        return objective(self, *arguments)

    monkeypatch.setattr(prior.LatentTask, "objective", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(project)
    assert trained(project) == whole


def test_how_it_is_sampled_does_not_train_it_anew(project, short_epochs, monkeypatch):
    trained(project)
    monkeypatch.setattr(prior.LatentTask, "forward", lambda *_: pytest.fail("trained again"))
    trained(project, SMALL_FLOW.model_copy(update={"sampling_steps": 3, "solver": "euler", "guidance": 2.0}))
    meta = json.loads((project.prior / "prior.json").read_text())
    assert meta["prior"]["sampling_steps"] == 3 and meta["prior"]["guidance"] == 2.0


def test_a_prior_that_goes_infinite_is_stopped_and_named(project, short_epochs, monkeypatch):
    objective = prior.LatentTask.objective

    def infinite(self, output, batch, phase, epoch):
        found = objective(self, output, batch, phase, epoch)
        is_fifth = round(epoch * self.num_batches) == 5
        return dataclasses.replace(found, total=found.total * torch.inf) if is_fifth else found

    monkeypatch.setattr(prior.LatentTask, "objective", infinite)
    with pytest.raises(NonFiniteError, match="not finite at step 5"):
        trained(project)
    (report,) = project.runs.glob("*/prior_*/nonfinite_step_5_*.json")
    assert len(json.loads(report.read_text())["files"]) == 4


def test_tokens_are_refused_where_latents_are_no_codes(project):
    with pytest.raises(UserError, match=r"prior\.name: tokens needs a model with a codebook"):
        prior.run(project, prior=Prior(name="tokens"), tracking=QUIET)
