"""A hole is filled with the most probable content; all other pixels keep their bits."""

from typing import Any

import pytest
import torch

from medgen.config import Model, Prior
from medgen.errors import UserError
from medgen.inference.inpainting import MIN_VARIANCE, inpaint
from medgen.models import GenerativeModel, build_model
from medgen.priors import ANALYTIC
from medgen.priors.flow import Flow

HOLE = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
HOLE[..., 10:20, 8:18] = True


def test_the_result_is_the_posterior_mode_in_closed_form(linear: Any) -> None:
    """With a linear decoder and a Gaussian prior, it is the solution of a linear system."""
    model, image = linear.model, linear.test[:1]
    found = inpaint(model, linear.prior, image, HOLE, None)
    known = ~HOLE.flatten()
    with torch.no_grad():
        filled = torch.where(HOLE, image[~HOLE].mean(), image)
        error = (model.reconstruct(filled) - image).flatten()[known].square().mean()
        axes = linear.prior.axes
        inverse = torch.linalg.inv((axes.directions.T * axes.scales.square()) @ axes.directions).double()
        weights, target = model.weights[known].double(), (image - model.mean).flatten()[known].double()
        precision = 1.0 / max(float(error), MIN_VARIANCE)
        system = precision * weights.T @ weights + inverse
        latent = torch.linalg.solve(system, precision * weights.T @ target + inverse @ axes.mean.double())
        expected = model.decode(latent[None].float())
    torch.testing.assert_close(found[HOLE], expected[HOLE], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["normal", "gaussian", "gmm", "flow"])
def test_the_hole_is_closer_to_the_truth_than_the_mean_and_known_pixels_stay(linear: Any, kind: str) -> None:
    labels = torch.full((len(linear.train),), -1)
    with torch.no_grad():
        latents = linear.model.encode(linear.train).mean
    if kind == "flow":
        prior: Any = Flow.create(latents, None, 0, Prior(name="flow", channels=8, blocks=1))
    else:
        prior = ANALYTIC[kind].fit(latents, labels, 0, Prior(components=(1,)))
    errors, of_mean = [], []
    for image in linear.test[:6]:
        filled = inpaint(linear.model, prior, image[None], HOLE, None)
        assert filled[~HOLE].equal(image[None][~HOLE])
        errors.append((filled - image)[HOLE].square().mean())
        of_mean.append((image[None][~HOLE].mean() - image[None][HOLE]).square().mean())
    assert torch.stack(errors).mean() < 0.5 * torch.stack(of_mean).mean()


@pytest.mark.parametrize("family", ["spatial_vae", "cvae", "autoencoder"])
def test_networks_keep_known_pixels_too(linear: Any, family: str) -> None:
    torch.manual_seed(0)
    sizes = Model(name=family, base_channels=8, latent_size=4, latent_channels=2)
    model = build_model(sizes, (1, 32, 32), 2).eval()
    assert isinstance(model, GenerativeModel)
    with torch.no_grad():
        latents = model.encode(linear.train, torch.zeros(len(linear.train), dtype=torch.int64)).mean
    prior = ANALYTIC["gmm"].fit(latents, torch.arange(len(latents)) % 2, 2, Prior(components=(1,)))
    image, label = linear.test[:1], torch.tensor([1])
    filled = inpaint(model, prior, image, HOLE, label)
    assert filled[~HOLE].equal(image[~HOLE]) and torch.isfinite(filled).all()
    assert filled.equal(inpaint(model, prior, image, HOLE, label))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_codebook_and_a_wrong_hole_are_refused(linear: Any) -> None:
    for hole, message in ((torch.zeros_like(HOLE), "covers no pixel"), (torch.ones_like(HOLE), "covers all pixels")):
        with pytest.raises(UserError, match=message):
            inpaint(linear.model, linear.prior, linear.test[:1], hole, None)
    vqvae = build_model(Model(name="vqvae", base_channels=8, latent_size=4), (1, 32, 32), 0)
    assert isinstance(vqvae, GenerativeModel)
    with pytest.raises(UserError, match=r"codebook.*spatial_vae"):
        inpaint(vqvae, linear.prior, linear.test[:1], HOLE, None)
