"""Model families. A new one is one file, one entry in MODELS, one recipe and one row in tests/models."""

from typing import Any

from medgen.config import Model, unknown_name
from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError
from medgen.models.autoencoder import Autoencoder
from medgen.models.autoencoder_kl import AutoencoderKL
from medgen.models.base import GenerativeModel, ImageModel
from medgen.models.spatial_vae import SpatialVAE
from medgen.models.unet import UNet
from medgen.models.vae import VAE, ConditionalVAE
from medgen.models.vqvae import VQVAE

__all__ = ["MODELS", "GenerativeModel", "ImageModel", "build_model"]

MODELS: dict[str, type[ImageModel]] = {
    "autoencoder": Autoencoder,
    "autoencoder_kl": AutoencoderKL,
    "vae": VAE,
    "cvae": ConditionalVAE,
    "spatial_vae": SpatialVAE,
    "vqvae": VQVAE,
    "unet": UNet,
}


def build_model(
    params: Model,
    image_shape: tuple[int, ...],
    num_classes: int,
    mask_classes: int = 2,
    space: ConditionSpace | None = None,
) -> ImageModel:
    """Build the model `params.name` for images (C, H, W) or volumes (C, D, H, W), and masks of `mask_classes`.

    Only a `cvae` takes the conditions of `space`.

    Raises:
        UserError: the name is unknown, or a size does not fit the images.
    """
    if params.name not in MODELS:
        raise unknown_name("model.name", params.name, MODELS)
    if params.dims != len(image_shape) - 1:
        shown = " x ".join(map(str, image_shape[1:]))
        raise UserError(
            f"model.dims: {params.dims}, but the dataset has items of {shown}; set model.dims to "
            f"{len(image_shape) - 1} (autoencoder_kl has no volumes), or change preprocess.image_size"
        )
    family: Any = MODELS[params.name]  # the abstract ImageModel declares no constructor
    if family.target == "mask":
        return family(params, image_shape, num_classes, mask_classes)  # type: ignore[no-any-return]
    if family is ConditionalVAE:
        return ConditionalVAE(params, image_shape, num_classes, space)
    return family(params, image_shape, num_classes)  # type: ignore[no-any-return]
