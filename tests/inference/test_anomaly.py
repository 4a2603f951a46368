"""Scores and maps of anomalies find a bright spot that no train image has, and follow their definitions."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import multivariate_normal
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.image import structural_similarity_index_measure

from medgen.config import Model, Prior
from medgen.inference.anomaly import SCORES, SMOOTHING, _smooth, find_anomalies
from medgen.models import GenerativeModel, build_model
from medgen.priors.flow import Flow
from medgen.priors.tokens import Tokens

SPOT = (slice(6, 11), slice(18, 23))


def find(model: GenerativeModel, prior: Any, images: torch.Tensor, label: int | None = None) -> Any:
    labels = None if label is None else torch.full((len(images),), label)
    return find_anomalies(model, prior, images, labels, torch.Generator().manual_seed(0))


def test_scores_and_maps_follow_their_definitions(linear: Any) -> None:
    images = linear.test[:3]
    found = find(linear.model, linear.prior, images)
    with torch.no_grad():
        rebuilt = linear.model.reconstruct(images)
        latents = linear.model.encode(images).mean
    torch.testing.assert_close(found.error, (images - rebuilt).abs())
    full = structural_similarity_index_measure(
        rebuilt, images, data_range=1.0, return_full_image=True, reduction="none"
    )[1]
    torch.testing.assert_close(found.dissimilarity, 1.0 - full, atol=1e-3, rtol=0)
    gaussian = multivariate_normal(linear.prior.axes.mean, covariance(linear.prior))
    expected = torch.stack(
        [
            (images - rebuilt).abs().mean(dim=(1, 2, 3)).double(),
            1.0 - full.mean(dim=(1, 2, 3)).double(),
            torch.from_numpy(-gaussian.logpdf(latents.numpy()) / latents.shape[1]),
        ],
        dim=1,
    )
    assert SCORES == ("l1", "ssim", "nll")
    torch.testing.assert_close(found.scores, expected, atol=2e-3, rtol=1e-3)


def covariance(prior: Any) -> np.ndarray:
    axes = prior.axes
    return np.asarray((axes.directions.T * axes.scales.square()) @ axes.directions, dtype=np.float64)


def test_the_likelihood_map_is_the_smoothed_gradient_of_the_density(linear: Any) -> None:
    """In closed form: the score of a linear model is quadratic in the image."""
    image = linear.test[:1]
    found = find(linear.model, linear.prior, image)
    with torch.no_grad():
        latent = linear.model.encode(image).mean.double()
        inverse = torch.linalg.inv(torch.from_numpy(covariance(linear.prior)))
        slope = (latent - linear.prior.axes.mean) @ inverse @ torch.linalg.pinv(linear.model.weights).double()
    expected = gaussian_filter(slope.abs().view(32, 32).numpy() / latent.shape[1], 2.0, mode="mirror")
    np.testing.assert_allclose(found.likelihood[0, 0], expected, rtol=0.02)


def test_a_spot_that_no_train_image_has_is_found(linear: Any) -> None:
    healthy = linear.test
    sick = healthy.clone()
    sick[:, :, *SPOT] = 1.0
    found = [find(linear.model, linear.prior, images) for images in (healthy, sick)]
    scores = torch.cat([each.scores for each in found])
    truth = [0] * len(healthy) + [1] * len(sick)
    for name, column in zip(SCORES, scores.T, strict=True):
        assert roc_auc_score(truth, column) > (0.5 if name == "nll" else 0.75), name
    change = (found[1].error - found[0].error).mean(dim=0)[0]
    inside = change[SPOT].mean()
    assert inside > 5 * (change.sum() - change[SPOT].sum()) / (change.numel() - 25)


@pytest.mark.parametrize(
    ("family", "prior_name", "has_map"),
    [("spatial_vae", "flow", True), ("vae", "flow", False), ("vqvae", "tokens", True), ("vqvae", "flow", True)],
)
def test_networks_as_priors_give_a_score_and_a_map_of_a_grid(
    linear: Any, family: str, prior_name: str, has_map: bool
) -> None:
    torch.manual_seed(0)
    sizes = Model(name=family, base_channels=8, latent_size=4, latent_channels=2, num_embeddings=8)
    model = build_model(sizes, (1, 32, 32), 0).eval()
    assert isinstance(model, GenerativeModel)
    with torch.no_grad():
        latents = model.encode(linear.train).mean
    kind = {"flow": Flow, "tokens": Tokens}[prior_name]
    params = Prior(name=prior_name, channels=8, blocks=1)
    prior = kind.create(latents, None, 0, params, None, model.codebook)
    found = find(model, prior, linear.test[:2])
    assert torch.isfinite(found.scores).all()
    assert (found.likelihood is not None) == has_map
    if has_map:
        assert found.likelihood.shape == (2, 1, 32, 32) and torch.isfinite(found.likelihood).all()
        assert found.likelihood.std() > 0
    again = find(model, prior, linear.test[:2])
    assert again.scores.equal(found.scores)


@pytest.mark.parametrize("sides", [(32, 48), (48, 32, 32)])
def test_gradients_are_smoothed_along_all_sides(sides: tuple[int, ...]) -> None:
    values = torch.rand(2, 1, *sides, generator=torch.Generator().manual_seed(0))
    found = _smooth(values)
    for each, smooth in zip(values, found, strict=True):
        expected = gaussian_filter(each[0].double().numpy(), 32 * SMOOTHING, mode="mirror", truncate=4.0)
        np.testing.assert_allclose(smooth[0], expected, atol=1e-5)
