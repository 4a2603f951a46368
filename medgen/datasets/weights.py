"""Pretrained weights: `medgen weights fetch` downloads and checks them; nothing else downloads weights.

For a file whose publisher gives no SHA-256, that of its first download is recorded, and later files are checked
against it.

medgen weights list
medgen weights fetch vgg16
medgen weights verify vgg16
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from medgen.config import unknown_name
from medgen.console import say, show
from medgen.datasets.download import cache_folder, check, download_file
from medgen.errors import UserError
from medgen.io import hash_file, to_json, write_atomic

CHECKSUMS = "checksums.json"  # in the weights folder: SHA-256 of files whose publisher gives none


@dataclass(frozen=True)
class WeightsFile:
    """A file of pretrained weights."""

    url: str
    sha256: str  # "": the publisher gives none
    size: int  # bytes; about, without a SHA-256
    use: str
    file: str = ""  # name in the weights folder; "": as in the address
    model: Mapping[str, Any] = field(default_factory=dict)  # section `model` of an autoencoder to start from

    @property
    def file_name(self) -> str:
        """File name in the weights folder."""
        return self.file or self.url.rsplit("/", 1)[-1]

    def has_size(self, size: int) -> bool:
        """Return True if a complete file may have that many bytes."""
        return not self.sha256 or size == self.size


def _medvae(compression: int, channels: int, size: int) -> WeightsFile:
    """MedVAE of a compression of each side and a number of latent channels (Varma et al. 2025)."""
    return WeightsFile(
        url="https://huggingface.co/stanfordmimi/MedVAE/resolve/main/model_weights/"
        f"vae_{compression}x_{channels}c_2D.ckpt",
        sha256="",
        size=size,
        use="train.init_from (MedVAE, radiographs and mammograms, MIT)",
        model={"base_channels": 128, "max_channels": 512, "blocks_per_stage": 2, "latent_channels": channels},
    )


WEIGHTS = {
    "vgg16": WeightsFile(
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        size=553_433_881,
        use="perceptual loss (torchvision, ImageNet, BSD-3-Clause)",
    ),
    "inception": WeightsFile(
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        use="Inception Score, FID (torch-fidelity, ImageNet, Apache-2.0)",
    ),
    "sd-vae-ft-mse": WeightsFile(
        url="https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/"
        "diffusion_pytorch_model.safetensors",
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        size=334_643_276,
        use="train.init_from (diffusers' AutoencoderKL of Stable Diffusion, photographs, MIT)",
        file="sd-vae-ft-mse-a1d99348.safetensors",
        model={"base_channels": 128, "max_channels": 512, "blocks_per_stage": 2, "latent_channels": 4},
    ),
    "medvae_4_1_2d": _medvae(4, 1, 223_000_000),
    "medvae_4_3_2d": _medvae(4, 3, 223_000_000),
    "medvae_8_1_2d": _medvae(8, 1, 335_000_000),
    "medvae_8_4_2d": _medvae(8, 4, 335_000_000),
}


def weights_folder() -> Path:
    """Folder of the weights: $MEDGEN_WEIGHTS, or ~/.cache/medgen/weights."""
    return cache_folder("weights")


def weights_path(name: str) -> Path:
    """The local file of weights; checks its size, but not its hash.

    Raises:
        UserError: unknown name, missing file (the message says how to get it), or wrong size.
    """
    weight, path = _find(name)
    if not path.is_file():
        raise UserError(
            f"{path}: weights {name!r} are not on this machine. Run `medgen weights fetch {name}`; without a network, "
            f"download {weight.url} on another machine and copy it to that path, or set MEDGEN_WEIGHTS to its folder"
        )
    size = path.stat().st_size
    if not weight.has_size(size):
        raise UserError(
            f"{path}: {size} bytes; expected {weight.size}. Remove it and run `medgen weights fetch {name}`"
        )
    return path


def checked_weights(name: str) -> Path:
    """The local file of weights, after a check of its SHA-256.

    Raises:
        UserError: as `weights_path`, or SHA-256 mismatch.
    """
    path = weights_path(name)
    checksum = _checksum(name)
    if checksum is None:
        raise UserError(f"{path}: its SHA-256 is not recorded; run `medgen weights fetch {name}`, which records it")
    check(path, checksum)
    return path


def fetch_weights(name: str, base_url: str | None = None) -> Path:
    """Download weights to the weights folder if they are not there yet, and return the file.

    `base_url` is the address of a folder that holds the file under the same name; default: the publisher's.

    Raises:
        UserError: unknown name, or as `download_file`.
    """
    weight, path = _find(name)
    url = f"{base_url.rstrip('/')}/{weight.file_name}" if base_url else weight.url
    download_file(url, path, _checksum(name), weight.size)
    if _checksum(name) is None:
        recorded = _recorded() | {weight.file_name: hash_file(path)}
        write_atomic(weights_folder() / CHECKSUMS, to_json(recorded))
    say(f"{name}: {path}")
    return path


def list_weights() -> dict[str, Path | None]:
    """Local file of all weights by name; None if it is missing or has another size."""
    found: dict[str, Path | None] = {}
    for name in WEIGHTS:
        weight, path = _find(name)
        found[name] = path if path.is_file() and weight.has_size(path.stat().st_size) else None
    return found


def verify_weights(name: str | None = None) -> None:
    """Check the SHA-256 of the named weights, or of all weights on this machine, and print the result.

    Raises:
        UserError: as `checked_weights`, or there are no weights on this machine.
    """
    names = [name] if name else [name for name, path in list_weights().items() if path]
    if not names:
        raise UserError(
            f"{weights_folder()}: no weights found. Download some with `medgen weights fetch NAME` "
            "(`medgen weights list` shows the names)"
        )
    for name in names:
        path = checked_weights(name)
        say(f"{name}: {path}: SHA-256 {hash_file(path)[:12]}… is correct")


def show_weights() -> None:
    """Print name, size, use and local file of all weights."""
    table = Table("name", "size", "use", "file")
    for name, path in list_weights().items():
        file = str(path) if path else f"missing; run `medgen weights fetch {name}`"
        table.add_row(name, f"{WEIGHTS[name].size / 1e6:.0f} MB", WEIGHTS[name].use, file)
    show(table)


def _recorded() -> dict[str, str]:
    """SHA-256 by file name of the first downloads."""
    path = weights_folder() / CHECKSUMS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _checksum(name: str) -> str | None:
    """The SHA-256 that a file must have: the publisher's, or that of the first download; None before it."""
    weight, _ = _find(name)
    return weight.sha256 or _recorded().get(weight.file_name)


def _find(name: str) -> tuple[WeightsFile, Path]:
    if name not in WEIGHTS:
        raise unknown_name("weights", name, WEIGHTS)
    return WEIGHTS[name], weights_folder() / WEIGHTS[name].file_name
