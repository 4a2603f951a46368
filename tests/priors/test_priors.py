"""Analytic priors: shapes, seeds, labels, files, and the distributions that they fit."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

from medgen.config import Prior
from medgen.errors import UserError
from medgen.priors import ANALYTIC, NEURAL, load_prior, sample_images, save_prior
from medgen.priors.axes import PrincipalAxes
from medgen.priors.gmm import _hold_out

SHAPES = [(4, 3, 3), (7,)]
COUNTS = {"three classes, one rare": (200, 22, 400), "unlabelled": ()}


def make(shape, counts, seed=0):
    """Latents whose class c has its centre at 3·c, and labels."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts) or 300
    mixing = torch.randn(math.prod(shape), math.prod(shape), generator=generator)
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)]) if counts else torch.full((n,), -1)
    flat = torch.randn(n, len(mixing), generator=generator) @ mixing
    flat[:, 0] += 3.0 * labels * mixing[:, 0].norm()
    return flat.view(n, *shape), labels


def fit(name, shape=(4, 3, 3), counts=(200, 22, 400), variance=None, **params):
    latents, labels = make(shape, counts)
    return ANALYTIC[name].fit(latents, labels, len(counts), Prior(name=name, **params), variance)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ANALYTIC)
def test_draws_have_the_latent_shape_and_follow_the_seed(name, shape, counts):
    prior = fit(name, shape, counts)
    first = prior.sample(10, None, torch.Generator().manual_seed(3))
    assert first.shape == (10, *shape)
    assert first.dtype == torch.float32
    assert torch.equal(first, prior.sample(10, None, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, prior.sample(10, None, torch.Generator().manual_seed(4)))
    assert torch.isfinite(prior.log_likelihood(first)).all()


@pytest.mark.parametrize("name", ANALYTIC)
def test_a_saved_prior_loads_unchanged_and_saving_is_deterministic(name, tmp_path):
    prior = fit(name, variance=torch.full((4, 3, 3), 0.1))
    save_prior(tmp_path / "a", prior, "m")
    save_prior(tmp_path / "b", fit(name, variance=torch.full((4, 3, 3), 0.1)), "m")
    labels = torch.tensor([0, 1, 2, 2])
    loaded = load_prior(tmp_path / "a", "m")
    drawn = loaded.sample(4, labels, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, prior.sample(4, labels, torch.Generator().manual_seed(0)))
    assert torch.equal(loaded.log_likelihood(drawn, labels), prior.log_likelihood(drawn, labels))
    for file in ("prior.safetensors", "prior.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "prior.json").unlink(), "run `medgen prior`"),
        (lambda folder: (folder / "prior.safetensors").unlink(), "prior.safetensors: not found; run `medgen prior`"),
        (lambda folder: (folder / "prior.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "prior.json").write_text('{"name": "gm"}'), "gmm"),
        (lambda folder: (folder / "prior.safetensors").write_bytes(b"x"), "damaged: its SHA-256 differs"),
    ],
)
def test_the_error_names_the_damaged_file(damage, message, tmp_path):
    save_prior(tmp_path, fit("gmm"), "m")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_prior(tmp_path, "m")


def test_the_prior_of_another_model_is_refused(tmp_path):
    save_prior(tmp_path, fit("gmm"), "m")
    with pytest.raises(UserError, match="fitted to model m, expected model other"):
        load_prior(tmp_path, "other")


def test_gaussian_has_the_moments_of_the_latents():
    latents, labels = make((6,), (500,))
    prior = ANALYTIC["gaussian"].fit(latents, labels, 1, Prior())
    axes = prior.axes
    covariance = axes.directions.T @ torch.diag(axes.scales.square()) @ axes.directions
    np.testing.assert_allclose(covariance, np.cov(latents.numpy().T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(axes.mean, latents.numpy().mean(0), rtol=1e-4, atol=1e-5)
    drawn = prior.sample(200_000, None, torch.Generator().manual_seed(0)).numpy()
    scale = np.cov(latents.numpy().T).max()
    np.testing.assert_allclose(np.cov(drawn.T) / scale, np.cov(latents.numpy().T) / scale, atol=0.02)


def test_gaussian_adds_the_posterior_variance_to_the_covariance_of_the_means():
    latents, labels = make((3,), (500,))
    variance = torch.tensor([5.0, 0.0, 20.0])
    prior = ANALYTIC["gaussian"].fit(latents, labels, 1, Prior(), variance)
    drawn = prior.sample(300_000, None, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(latents.numpy().T) + np.diag(variance), rtol=0.05, atol=0.1)


def test_fewer_images_than_latent_dimensions_keep_their_covariance():
    latents = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    axes = PrincipalAxes.fit(latents)
    assert len(axes.scales) == 19
    covariance = axes.directions.T @ torch.diag(axes.scales.square()) @ axes.directions
    np.testing.assert_allclose(covariance, np.cov(latents.numpy().T), atol=1e-6)


@pytest.mark.parametrize(("name", "kept"), [("gaussian", 1.0), ("gmm", 1.0), ("gmm", 0.8)])
def test_log_likelihood_is_scipys(name, kept):
    latents = torch.randn(800, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])
    latents[:, 0] += 10.0 * (torch.arange(800) % 2)  # two clusters for the mixture
    labels = torch.arange(800) // 400
    latents[:, 2] += 2.0 * labels  # classes differ in an axis of little variance
    prior = ANALYTIC[name].fit(latents, labels, 2, Prior(variance_kept=kept, components=(2,)))
    axes = prior.axes
    scaled = axes.scales[:, None].double() * axes.directions.double()  # latent = mean + white @ scaled
    if name == "gaussian":
        parts = [(-1, 1.0, np.zeros(5), np.eye(5))]
    else:
        assert (prior.centres.shape[1] < 5) == (kept < 1.0) and len(prior.weights) == 4
        centres = torch.cat([prior.centres, prior.residual_means], dim=1).double().numpy()
        factors = [
            np.block([[a.numpy(), np.zeros((len(a), len(b)))], [np.zeros((len(b), len(a))), np.diag(b)]])
            for a, b in zip(prior.factors.double(), prior.residual_scales.double(), strict=True)
        ]
        weights = (2 * prior.weights).tolist()  # within a class; both classes have the same size
        parts = list(zip(prior.owners.tolist(), weights, centres, [each @ each.T for each in factors], strict=True))
    for label in range(2):
        rows = labels == label
        density = sum(
            weight
            * multivariate_normal(
                axes.mean.numpy() + centre @ scaled.numpy(), scaled.T.numpy() @ np.asarray(cov) @ scaled.numpy()
            ).pdf(latents[rows].numpy())
            for owner, weight, centre, cov in parts
            if owner in (-1, label)
        )
        np.testing.assert_allclose(prior.log_likelihood(latents[rows], labels[rows]), np.log(density), rtol=1e-3)


@pytest.mark.parametrize("kept", [0.3, 0.8, 1.0])
def test_draws_of_a_class_have_its_moments_in_every_axis(kept):
    """The classes differ most in axes of little variance; correlations of residual axes are not kept."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.linspace(3.0, 0.5, 12)
    labels = torch.arange(1800) % 3
    spread = torch.tensor([1.0, 0.5, 2.0])[labels][:, None]
    latents = torch.randn(1800, 12, generator=generator) * widths * spread
    latents[:, -1] += 2.0 * labels
    latents[:, -2] -= 1.5 * (labels == 1)
    prior = ANALYTIC["gmm"].fit(latents, labels, 3, Prior(variance_kept=kept, components=(1,)))
    for label in range(3):
        drawn = prior.sample(20_000, torch.full((20_000,), label), torch.Generator().manual_seed(1)).numpy()
        rows = latents[labels == label].numpy()
        assert (np.abs(drawn.mean(0) - rows.mean(0)) / rows.std(0)).max() < 0.05
        along = [each @ prior.axes.directions.numpy().T for each in (drawn, rows)]
        np.testing.assert_allclose(along[0].std(0), along[1].std(0), rtol=0.03)
        difference = np.cov(drawn.T) - np.cov(rows.T)
        assert np.linalg.norm(difference) < 0.15 * np.linalg.norm(np.cov(rows.T))


def test_an_older_file_shares_one_gaussian_in_the_residual_axes():
    prior = fit("gmm", variance_kept=0.5)
    tensors, meta = prior.state()
    size = prior.centres.shape[1]
    for name in ("residual_means", "residual_scales"):
        assert tensors.pop(name).shape == (len(prior.centres), len(prior.axes.scales) - size)
    old = type(prior).restore(tensors, meta)
    drawn = [
        each.axes.whiten(each.sample(20_000, torch.full((20_000,), 2), torch.Generator().manual_seed(0)).flatten(1))
        for each in (prior, old)
    ]
    torch.testing.assert_close(drawn[0][:, :size], drawn[1][:, :size], atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(np.cov(drawn[1][:, size:].T), np.eye(drawn[1].shape[1] - size), atol=0.05)
    assert drawn[1][:, size:].mean(0).abs().max() < 0.05 < drawn[0][:, size:].mean(0).abs().max()


@pytest.mark.parametrize(("sizes", "by_image"), [([5] * 60, False), ([120, *[3] * 40], False), ([150, 150], True)])
def test_all_images_of_a_patient_are_held_out_or_none(sizes, by_image):
    patients = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    held_out = _hold_out(patients, seed=0)
    assert 0.15 * len(patients) < held_out.sum() <= 0.2 * len(patients)
    assert bool(set(patients[held_out].tolist()) & set(patients[~held_out].tolist())) == by_image


def test_similar_images_of_a_patient_do_not_add_components():
    generator = torch.Generator().manual_seed(0)
    patients = torch.arange(240) // 12
    latents = 3.0 * torch.randn(20, 4, generator=generator)[patients] + 0.1 * torch.randn(240, 4, generator=generator)
    names = [f"p{number}" for number in patients.tolist()]
    params = Prior(variance_kept=1.0, components=(1, 8))
    chosen = [
        ANALYTIC["gmm"].fit(latents, None, 0, params, patients=known).choices[0]["components"]
        for known in (None, names)
    ]
    assert chosen == [8, 1]


@pytest.mark.parametrize("num_clusters", [1, 2, 4])
def test_held_out_likelihood_finds_the_number_of_clusters(num_clusters):
    generator = torch.Generator().manual_seed(1)
    centres = 6.0 * torch.eye(4)[:num_clusters]
    owner = torch.arange(800) % num_clusters
    latents = centres[owner] + torch.randn(800, 4, generator=generator)
    prior = ANALYTIC["gmm"].fit(latents, None, 0, Prior(variance_kept=1.0, components=(1, 2, 4, 8)))
    assert prior.choices[0]["components"] == num_clusters
    found = prior.axes.colour(prior.centres)  # (M, D)
    nearest = torch.cdist(centres, found).min(1).values
    assert nearest.max() < 0.3
    drawn = prior.sample(50_000, None, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(np.cov(drawn.T.numpy()), np.cov(latents.T.numpy()), rtol=0.1, atol=0.6)


def test_clusters_with_fewer_images_than_axes_are_found():
    """As of MRI slices in several planes: own covariances alone would overfit and leave one component."""
    generator = torch.Generator().manual_seed(1)
    owner = torch.arange(480) % 4
    latents = 8.0 * torch.eye(150)[owner] + torch.randn(480, 150, generator=generator)
    prior = ANALYTIC["gmm"].fit(latents, None, 0, Prior(variance_kept=1.0))
    assert prior.choices[0]["components"] == 4
    assert sorted(prior.axes.colour(prior.centres).argmax(1).tolist()) == [0, 1, 2, 3]


def test_mixture_beats_the_gaussian_on_unseen_clusters():
    generator = torch.Generator().manual_seed(1)
    latents = 8.0 * torch.eye(4)[torch.arange(1200) % 4] + torch.randn(1200, 4, generator=generator)
    used, unseen = latents[:800], latents[800:]
    scores = {n: ANALYTIC[n].fit(used, None, 0, Prior()).log_likelihood(unseen).mean() for n in ANALYTIC}
    assert scores["gmm"] > scores["gaussian"] > scores["normal"]


def test_labels_select_the_class_and_rare_classes_keep_their_mean():
    counts = (200, 22, 400)
    latents, labels = make((4, 3, 3), counts)
    prior = fit("gmm", counts=counts, variance_kept=1.0)
    assert prior.conditional
    for label in range(3):
        drawn = prior.sample(2000, torch.full((2000,), label), torch.Generator().manual_seed(0)).flatten(1)
        rows = latents[labels == label].flatten(1)
        error = (drawn.mean(0) - rows.mean(0)).abs() / latents.flatten(1).std(0)
        assert error.max() < 0.15
        spread = drawn.std(0) / torch.cat([latents[labels == c].flatten(1) - latents[labels == c].flatten(1).mean(0)
                                           for c in range(3)]).std(0)  # fmt: skip
        assert spread.min() > 0.7
        assert spread.max() < 1.3
    rare = prior.choices[1]
    assert (rare["rows"], rare["components"], rare["held_out"]) == (22, 1, None)


@pytest.mark.parametrize("counts", [(1, 60), (0, 60, 60), (3,)])
def test_a_class_with_hardly_any_images_is_fitted(counts):
    prior = fit("gmm", counts=counts)
    drawn = prior.sample(50, None, torch.Generator().manual_seed(0))
    assert torch.isfinite(drawn).all()
    if 0 in counts:
        with pytest.raises(ValueError, match=r"found \[0\]"):
            prior.sample(1, torch.tensor([0]), torch.Generator())


def test_an_unconditional_mixture_ignores_labels_but_has_their_frequency():
    prior = fit("gmm", conditional=False)
    assert not prior.conditional
    np.testing.assert_allclose(prior.frequencies, np.array([200, 22, 400]) / 622, rtol=1e-5)
    labels = torch.zeros(8, dtype=torch.long)
    drawn = prior.sample(8, labels, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, prior.sample(8, None, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("make_prior", [ANALYTIC["gmm"].fit, NEURAL["flow"].create], ids=["gmm", "flow"])
@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.ones(80, 5), "do not vary.*free_bits"),
        (torch.full((80, 2, 3, 3), 0.1), "do not vary"),
        (torch.randn(1, 5), "1 training images do not vary.*too few"),
        (torch.full((80, 5), torch.nan), "NaN.*run `medgen train` again"),
    ],
)
def test_constant_or_nan_latents_are_refused(make_prior, latents, message):
    with pytest.raises(UserError, match=message):
        make_prior(latents, None, 0, Prior(channels=8))


@pytest.mark.parametrize("num", [1, 40])
def test_gaussian_of_equal_latents_draws_their_value(num):
    prior = ANALYTIC["gaussian"].fit(torch.full((num, 5), 3.0), None, 0, Prior())
    assert torch.equal(prior.sample(2, None, torch.Generator()), torch.full((2, 5), 3.0))


class Recorder(nn.Module):
    """A decoder that returns an image filled with the label and records its batch sizes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sizes = []

    def decode(self, latent, label=None, conditions=None):
        self.sizes.append(len(latent))
        value = torch.zeros(len(latent)) if label is None else label.float() / 10
        return value[:, None, None, None].expand(-1, 1, 2, 2) + 0 * self.weight


def test_images_are_generated_in_batches_with_labels_by_frequency():
    decoder = Recorder()
    images = sample_images(fit("gmm"), decoder, 1000, None, seed=0, batch_size=300)
    assert decoder.sizes == [300, 300, 300, 100]
    assert images.shape == (1000, 1, 2, 2)
    assert not images.requires_grad
    share = torch.bincount((images[:, 0, 0, 0] * 10).round().long(), minlength=3) / 1000
    np.testing.assert_allclose(share, np.array([200, 22, 400]) / 622, atol=0.05)


def test_the_description_holds_the_chosen_components(tmp_path):
    save_prior(tmp_path, fit("gmm"), "m")
    plain = json.loads((tmp_path / "prior.json").read_text())
    assert [choice["rows"] for choice in plain["choices"]] == [200, 22, 400]
    assert plain["latent_shape"] == [4, 3, 3]


def test_every_prior_lists_its_keys():
    assert {*ANALYTIC, *NEURAL} == set(Prior.family_keys)
