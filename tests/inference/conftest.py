"""A linear model of the drawn images, whose answers have a closed form."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from medgen.config import Prior
from medgen.data.images import to_floats
from medgen.data.store import open_store
from medgen.models.base import GenerativeModel, Latent
from medgen.priors import ANALYTIC
from medgen.priors import Prior as AnyPrior

NUM_COMPONENTS = 16


class LinearModel(GenerativeModel):
    """Images (B, 1, H, W) = mean + weights z, with z (B, D) found by least squares and the posterior variance given."""

    def __init__(self, mean: Tensor, weights: Tensor, variance: Tensor | None = None) -> None:
        super().__init__()
        self.mean, self.weights = nn.Parameter(mean), nn.Parameter(weights)  # (1, H, W), (H·W, D)
        self.variance = variance  # (D,)
        self.latent_shape = (weights.shape[1],)

    def encode(self, image: Tensor, label: Tensor | None = None, conditions: Any = None) -> Latent:
        mean = (image - self.mean).flatten(1) @ torch.linalg.pinv(self.weights).T
        logvar = None if self.variance is None else self.variance.log().expand_as(mean)
        return Latent(value=mean, mean=mean, logvar=logvar)

    def decode(self, latent: Tensor, label: Tensor | None = None, conditions: Any = None) -> Tensor:
        return self.mean + (latent @ self.weights.T).view(-1, *self.mean.shape)


class Linear(NamedTuple):
    """Principal components of the train split, as many of the test images, and a prior that is close to N(0, I)."""

    model: LinearModel
    prior: AnyPrior
    train: Tensor  # (N, 1, 32, 32)
    test: Tensor


@pytest.fixture(scope="session")
def linear(tiny_store: Path) -> Linear:
    store = open_store(tiny_store)
    train, test = (to_floats(torch.from_numpy(store.split(name).images[:])) for name in ("train", "test"))
    mean = train.mean(dim=0)
    _, scales, directions = torch.linalg.svd((train - mean).flatten(1), full_matrices=False)
    weights = (directions[:NUM_COMPONENTS] * scales[:NUM_COMPONENTS, None] / len(train) ** 0.5).T
    model = LinearModel(mean, weights.contiguous()).eval()
    with torch.no_grad():
        latents = model.encode(train).mean
    prior = ANALYTIC["gaussian"].fit(latents, torch.full((len(train),), -1), 0, Prior())
    return Linear(model, prior, train, test)
