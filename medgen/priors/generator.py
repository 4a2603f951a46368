"""A model with its prior and refiner, which together generate images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from medgen.data.conditions import ConditionSpace
from medgen.errors import UserError
from medgen.models import GenerativeModel
from medgen.models.bundle import BundleInfo, digest, load_generative
from medgen.priors import Prior, load_prior
from medgen.priors.refiner import WEIGHTS, Refiner, load_refiner


@dataclass(frozen=True)
class Generator:
    """A loaded model with its prior and, if there is one, its refiner."""

    model: GenerativeModel
    info: BundleInfo
    prior: Prior
    refiner: Refiner | None


def load_generator(model: Path, prior: Path, refiner: Path, device: torch.device | str = "cpu") -> Generator:
    """Load a model, its prior and its refiner from their folders.

    Raises:
        UserError: one of them is missing or damaged, or the prior or refiner belongs to another model.
    """
    network, info = load_generative(model, device)
    weights = digest(model)
    fitted = load_prior(prior, weights, device)
    found = (tuple(fitted.latent_shape), len(fitted.frequencies) or len(info.classes))
    if found != (expected := (tuple(network.latent_shape), len(info.classes))):
        raise UserError(
            f"{prior}: latents and number of classes are {found}, expected {expected} as in {model}; run "
            "`medgen prior` again"
        )
    refines = load_refiner(refiner, weights, device)
    for folder, part in ((prior, fitted), (refiner, refines)):
        space: ConditionSpace | None = getattr(part, "space", None)
        if space is not None and space != info.space:
            raise UserError(
                f"{folder}: made for other conditions than {model}; run `medgen prior` and `medgen refiner`"
            )
    return Generator(network, info, fitted, refines)


def content_hash(model: Path, prior: Path, refiner: Path) -> str:
    """SHA-256 of the names and bytes of all files of a model, its prior and its refiner, which identifies a version.

    The folder of a disabled refiner is left out, so that versions from before refiners keep their hash.
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
