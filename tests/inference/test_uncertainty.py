"""The deviation of a linear decoder's draws has a closed form; a model without a variance is refused."""

from typing import Any

import pytest
import torch

from medgen.errors import UserError
from medgen.inference.uncertainty import VARIATIONAL, reconstruction_deviation
from medgen.models import MODELS


def test_the_deviation_is_that_of_the_decoded_posterior(linear: Any) -> None:
    model = type(linear.model)(linear.model.mean, linear.model.weights, torch.linspace(0.01, 1.0, 16)).eval()
    found = reconstruction_deviation(model, linear.test[:2], None, 3000, torch.Generator().manual_seed(0))
    expected = (model.weights.square() @ model.variance).sqrt().view(1, 1, 32, 32).detach()
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0.06, atol=1e-6)
    again = reconstruction_deviation(model, linear.test[:2], None, 3000, torch.Generator().manual_seed(0))
    assert again.equal(found)


def test_a_model_without_a_variance_is_refused_with_those_that_have_one(linear: Any) -> None:
    with pytest.raises(UserError, match=r"no variance.*vae, cvae, spatial_vae, autoencoder_kl"):
        reconstruction_deviation(linear.model, linear.test[:1], None, 2, torch.Generator())
    assert set(VARIATIONAL) == set(MODELS) - {"autoencoder", "vqvae", "unet"}
