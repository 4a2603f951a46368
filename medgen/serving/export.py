"""Write a trained model in the formats of other programs: ONNX, or a folder of diffusers.

medgen export --format onnx --out outputs/onnx
"""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medgen.console import say
from medgen.errors import UserError
from medgen.io import to_json, write_atomic
from medgen.models import GenerativeModel, ImageModel, bundle
from medgen.models.autoencoder_kl import AutoencoderKL, block_channels, norm_groups
from medgen.models.bundle import BundleInfo
from medgen.models.published import BLOCKS, CONFIG, DIFFUSERS_WEIGHTS, READ_ONLY
from medgen.serving.output import new_files

ONNX_PACKAGES = ("onnx", "onnxscript")
OPSET = 20


def export(model: Path, out: Path, *, format: str) -> list[Path]:
    """Write the model, without prior and refiner, to `out`; return the files.

    Args:
        model: folder with model/.
        out: folder of the files; created if it does not exist. They replace those of an earlier call.
        format: "onnx": encoder.onnx and decoder.onnx, or model.onnx of a model that predicts masks, with model.json.
            "diffusers": config.json and weights that diffusers' AutoencoderKL.from_pretrained reads.

    Raises:
        UserError: the model is missing, the format does not fit it, packages are missing, or `out` contains other files
            or cannot be written.
    """
    network, info = bundle.load(model / "model")
    with new_files(out) as folder:
        if format == "diffusers":
            _write_diffusers(folder, network, info)
        else:
            _write_onnx(folder, network, info)
            write_atomic(folder / bundle.DESCRIPTION, (model / "model" / bundle.DESCRIPTION).read_bytes())
        paths = [out / path.name for path in sorted(folder.iterdir())]
    say(f"{', '.join(path.name for path in paths)} in {out}")
    return paths


def _write_diffusers(folder: Path, network: ImageModel, info: BundleInfo) -> None:
    if not isinstance(network, AutoencoderKL):
        raise UserError(
            f"--format diffusers: model.name {info.model.name} is no architecture of diffusers; expected "
            "autoencoder_kl, or use --format onnx"
        )
    channels = block_channels(info.model, info.image_shape)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": info.image_shape[0],
        "out_channels": info.image_shape[0],
        "sample_size": info.image_shape[1],
        "block_out_channels": channels,
        "layers_per_block": info.model.blocks_per_stage,
        "latent_channels": network.latent_shape[0],
        "norm_num_groups": norm_groups(channels),
        "scaling_factor": 1.0,  # of pipelines; encode and decode do not use it
        **READ_ONLY,
        **{key: [kind] * len(channels) for key, kind in BLOCKS.items()},
    }
    write_atomic(folder / CONFIG, to_json(config))
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / DIFFUSERS_WEIGHTS, {"format": "pt"})


def _write_onnx(folder: Path, network: ImageModel, info: BundleInfo) -> None:
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise UserError(f"--format onnx: needs {' and '.join(missing)}; install them with `pip install medgen[onnx]`")
    image, label = torch.rand(2, *info.image_shape), torch.zeros(2, dtype=torch.int64)
    if not isinstance(network, GenerativeModel):
        _save(folder / "model.onnx", Masks(network), {"image": image}, ["probabilities"])
        return
    labels = {"label": label} if network.conditional else {}
    outputs = ["latent"] + ["codes"] * (network.codebook is not None)
    _save(folder / "encoder.onnx", Encoder(network), {"image": image, **labels}, outputs)
    latent = torch.randn(2, *network.latent_shape)
    _save(folder / "decoder.onnx", Decoder(network), {"latent": latent, **labels}, ["image"])


def _save(path: Path, module: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> None:
    """Write a module with inputs of any batch size."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes on its own internals
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


class Encoder(nn.Module):
    """Images (B, C, S, S) in [0, 1], labels (B,) of a conditional model -> latents, and codes with a codebook."""

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The posterior mean, as `medgen reconstruct` uses it."""
        latent = self.model.encode(image, label)
        return latent.mean if latent.codes is None else (latent.mean, latent.codes)


class Decoder(nn.Module):
    """Latents, labels (B,) of a conditional model -> images (B, C, S, S) in [0, 1]."""

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Decoded images, without refiner."""
        return self.model.decode(latent, label)


class Masks(nn.Module):
    """Images (B, C, S, S) in [0, 1] -> probabilities (B, K, S, S)."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """The model's probabilities."""
        return self.model.predict(image).prediction
