"""A model with its prior and its refiner: all that generating images takes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from medgen.models import GenerativeModel
from medgen.models.bundle import BundleInfo, digest, load_generative
from medgen.priors import Prior, load_prior
from medgen.priors.refiner import WEIGHTS, Refiner, load_refiner


@dataclass(frozen=True)
class Generator:
    """All that generating takes."""

    model: GenerativeModel
    info: BundleInfo
    prior: Prior
    refiner: Refiner | None


def load_generator(model: Path, prior: Path, refiner: Path, device: torch.device | str = "cpu") -> Generator:
    """Reads a model, the prior fitted to its latents and the refiner of its images from their folders.

    Raises:
        UserError: one of them is missing or damaged, or belongs to another model.
    """
    network, info = load_generative(model, device)
    weights = digest(model)
    return Generator(network, info, load_prior(prior, weights, device), load_refiner(refiner, weights, device))


def content_hash(model: Path, prior: Path, refiner: Path) -> str:
    """SHA-256 of the names and bytes of all files of a model, its prior and its refiner: what a version is.

    A folder that says that there is no refiner counts for nothing, as none did before there were refiners.
    """
    total = hashlib.sha256()
    parts = [(model, "model"), (prior, "prior")]
    if (refiner / WEIGHTS).exists():
        parts.append((refiner, "refiner"))
    for folder, name in parts:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            total.update(f"{name}/{path.relative_to(folder).as_posix()}\n".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
