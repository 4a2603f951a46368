"""The model zoo. A new family is one file, one line in MODELS, one recipe and one row in tests/models."""

from collections.abc import Callable

from medgen.config import Model, unknown_name
from medgen.models.base import GenerativeModel
from medgen.models.autoencoder import Autoencoder
from medgen.models.spatial_vae import SpatialVAE
from medgen.models.vae import VAE, ConditionalVAE
from medgen.models.vqvae import VQVAE

__all__ = ["MODELS", "GenerativeModel", "build_model"]

MODELS: dict[str, Callable[[Model, tuple[int, int, int], int], GenerativeModel]] = {
    "autoencoder": Autoencoder,
    "vae": VAE,
    "cvae": ConditionalVAE,
    "spatial_vae": SpatialVAE,
    "vqvae": VQVAE,
}


def build_model(params: Model, image_shape: tuple[int, int, int], num_classes: int) -> GenerativeModel:
    """The model that `params.name` names, for images of `image_shape` (C, H, W).

    Raises:
        UserError: the name is unknown, or a size does not fit the images.
    """
    if params.name not in MODELS:
        raise unknown_name("model.name", params.name, MODELS)
    return MODELS[params.name](params, image_shape, num_classes)
