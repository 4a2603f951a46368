"""Pretrained weights: fetched only when asked for, checked, and never half there.

medgen weights list
medgen weights fetch vgg16
medgen weights verify vgg16
"""

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medgen.config import unknown_name
from medgen.datasets.download import check, fetch
from medgen.errors import UserError


@dataclass(frozen=True)
class Weight:
    """One file of pretrained weights."""

    url: str
    sha256: str
    size: int  # bytes
    use: str

    @property
    def file(self) -> str:
        """Its name in the weights folder."""
        return self.url.rsplit("/", 1)[-1]


WEIGHTS = {
    "vgg16": Weight(
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        size=553_433_881,
        use="perceptual loss (torchvision, ImageNet, BSD-3-Clause)",
    ),
    "inception": Weight(
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        use="Inception Score, FID (torch-fidelity, ImageNet, Apache-2.0)",
    ),
}


def weights_folder() -> Path:
    """Where weights are kept: $MEDGEN_WEIGHTS, or ~/.cache/medgen/weights."""
    chosen = os.environ.get("MEDGEN_WEIGHTS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "medgen" / "weights"


def weights_path(name: str) -> Path:
    """The file of known weights on this machine. Never downloads; looks at the size, not at the hash.

    Raises:
        UserError: unknown name, no such file here (says how to get it), or a file of another size.
    """
    weight, path = _known(name)
    if not path.is_file():
        raise UserError(
            f"{path}: weights {name!r} are not here. Run `medgen weights fetch {name}`; on a machine without network, "
            f"fetch {weight.url} elsewhere and put it at that path, or set MEDGEN_WEIGHTS to the folder that holds it"
        )
    size = path.stat().st_size
    if size != weight.size:
        raise UserError(
            f"{path}: {size} bytes; expected {weight.size}. Remove it and run `medgen weights fetch {name}`"
        )
    return path


def checked_weights(name: str) -> Path:
    """The file of known weights on this machine, after a look at its SHA-256. Never downloads.

    Raises:
        UserError: as `weights_path`, or the hash differs.
    """
    path = weights_path(name)
    check(path, WEIGHTS[name].sha256)
    return path


def verify_weights(name: str) -> Path:
    """Checks weights against their SHA-256, prints the outcome and returns the file.

    Raises:
        UserError: as `checked_weights`.
    """
    path = checked_weights(name)
    Console().print(f"{name}: {path} is whole (SHA-256 {WEIGHTS[name].sha256[:12]}…)", soft_wrap=True, highlight=False)
    return path


def fetch_weights(name: str, base_url: str | None = None) -> Path:
    """Downloads known weights into the weights folder, unless they are there, and returns the file.

    Args:
        name: a key of WEIGHTS.
        base_url: folder of a mirror that holds the file under its own name.

    Raises:
        UserError: as `fetch`.
    """
    weight, path = _known(name)
    url = f"{base_url.rstrip('/')}/{weight.file}" if base_url else weight.url
    fetch(url, path, weight.sha256)
    Console().print(f"{name}: {path}", soft_wrap=True, highlight=False)
    return path


def list_weights() -> dict[str, Path | None]:
    """The file of each known name, None where it is not here (or is not whole)."""
    found: dict[str, Path | None] = {}
    for name in WEIGHTS:
        weight, path = _known(name)
        found[name] = path if path.is_file() and path.stat().st_size == weight.size else None
    return found


def verify(name: str | None) -> None:
    """Checks the named weights, or all that are here, against their SHA-256.

    Raises:
        UserError: as `verify_weights`, or none are here.
    """
    names = [name] if name else [known for known, path in list_weights().items() if path]
    if not names:
        raise UserError("weights: none are here; get them with `medgen weights fetch NAME` (see `medgen weights list`)")
    for known in names:
        verify_weights(known)


def show_weights() -> None:
    """Prints the known weights, what they are for and whether they are here."""
    table = Table("name", "size", "for", "file")
    for name, path in list_weights().items():
        here = str(path) if path else f"not here; medgen weights fetch {name}"
        table.add_row(name, f"{WEIGHTS[name].size / 1e6:.0f} MB", WEIGHTS[name].use, here)
    Console().print(table)


def _known(name: str) -> tuple[Weight, Path]:
    if name not in WEIGHTS:
        raise unknown_name("weights", name, WEIGHTS)
    return WEIGHTS[name], weights_folder() / WEIGHTS[name].file
