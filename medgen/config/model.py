"""Section `model`."""

from typing import ClassVar, Literal

from medgen.config.base import Depth, FamilySection, Positive, Width

_DIMS = frozenset({"dims"})
_GRID = frozenset({"latent_size", "latent_channels"})
_RESIDUAL = _GRID | {"blocks_per_stage", "attention_resolutions"}
_RESAMPLING = frozenset({"down", "up"})


class Model(FamilySection):
    """Network and its sizes. Image size and number of classes come from the store."""

    name: str = "spatial_vae"
    dims: Literal[2, 3] = 2  # sides of the items: images, or volumes of preprocess.image_size [D, H, W]
    base_channels: Width = 32  # channels after the first convolution; doubled at each stage
    max_channels: Width = 512
    blocks_per_stage: Depth = 1
    # shorter side of the latent grid, which sets the number of stages; None: by image size
    latent_size: Width | None = None
    latent_channels: Width | None = None  # None: the latent has a quarter as many dimensions as the image has pixels
    attention_resolutions: tuple[int, ...] = (16,)  # shorter sides of the grids with self-attention
    logvar_bound: Positive = 10.0  # log-variance is bound * tanh(x / bound)
    num_embeddings: Width = 512  # vqvae: size of the codebook
    codebook: Literal["ema", "gradient", "cosine"] = "ema"  # vqvae: how codes are updated; cosine: nearest by angle
    label_channels: Width = 32  # cvae: dimensions of the embedding of label and conditions
    down: Literal["maxpool", "strided"] = "maxpool"  # autoencoder, unet
    up: Literal["transposed", "upsample"] = "transposed"  # autoencoder, unet

    family_keys: ClassVar = {
        "autoencoder": _DIMS | _GRID | _RESAMPLING,
        "autoencoder_kl": _GRID | {"blocks_per_stage"},
        "vae": _DIMS | _GRID | {"logvar_bound"},
        "cvae": _DIMS | _GRID | {"logvar_bound", "label_channels"},
        "spatial_vae": _DIMS | _RESIDUAL | {"logvar_bound"},
        "vqvae": _DIMS | _RESIDUAL | {"num_embeddings", "codebook"},
        "unet": _DIMS | _RESAMPLING,
    }
    new_keys: ClassVar = ("dims",)
    renamed: ClassVar = {"num_codes": "num_embeddings"}
