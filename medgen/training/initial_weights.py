"""Weights that a training starts from, as `train.init_from` names them.

A resolved source has the number of a version in place of an alias, and ends in #sha256= and the SHA-256 of its weights.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from medgen.config import Project, unknown_name
from medgen.console import say
from medgen.datasets.weights import WEIGHTS, checked_weights
from medgen.errors import UserError
from medgen.io import hash_file
from medgen.models import ImageModel, bundle
from medgen.models.autoencoder_kl import AutoencoderKL
from medgen.models.published import CONFIG, DIFFUSERS_WEIGHTS, from_published, read_diffusers, read_file

PIN = "#sha256="
REGISTERED = "models:/"  # a version
FETCHED = "weights:/"  # a file of `medgen weights fetch`
Fetch = Callable[[str], tuple[str, Path]]  # URI of a version -> URI with its number, and the folder of its model

NUM_NAMES = 5  # tensors that an error names


def find_weights(project: Project, source: str, fetch: Fetch | None) -> tuple[str, Path]:
    """The resolved source, and the folder of its model or the file of its weights.

    Args:
        project: its model is what the training writes, and relative folders are in its home.
        source: train.init_from.
        fetch: downloads a registered version and checks its files.

    Raises:
        UserError: there is no such model, or its weights have another SHA-256 than the source asks for.
    """
    name, _, expected = source.partition(PIN)
    if name.startswith(REGISTERED):
        if fetch is None:
            raise UserError(f"train.init_from: {name}: only `medgen train` and `medgen tune` read the registry")
        name, place = fetch(name)
    elif name.startswith(FETCHED):
        place = _find_fetched(name.removeprefix(FETCHED))
    else:
        place = project.home / name
        if place.is_file():
            raise UserError(
                f"train.init_from: {name} is a file; expected a folder with {bundle.DESCRIPTION} or {CONFIG}"
            )
        if place.resolve() == project.model.resolve():
            raise UserError(
                f"train.init_from: {name} is the folder that the training writes; copy it, or register the model and "
                "name its version"
            )
    found = _digest(place)
    if expected and found != expected:
        raise UserError(
            f"train.init_from: {name}: its weights have the SHA-256 {found}, expected {expected}; restore the weights, "
            f"or remove {PIN}… to start from these"
        )
    return f"{name}{PIN}{found}", place


def load_weights(model: ImageModel, source: str, place: Path, strict: bool) -> list[str]:
    """Copy the weights of `find_weights`; return the tensors that were not taken, with the reasons.

    Raises:
        UserError: the source is damaged; tensors do not fit and `strict` is set; no weight of a layer fits.
    """
    own = model.state_dict()
    given = _read(place, model)
    taken = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    left = [_reason(name, given, own) for name in {**own, **given} if name not in taken]
    if (left and strict) or not taken:
        named = ", ".join(left[:NUM_NAMES]) + (f" and {len(left) - NUM_NAMES} more" if len(left) > NUM_NAMES else "")
        advice = "give section model the values of the source"
        advice += ", or set train.init_strict: false to take the tensors that fit" if taken else ""
        raise UserError(f"train.init_from: {source}: {len(left)} tensors do not fit: {named}; {advice}")
    model.load_state_dict({**own, **taken})
    say(f"{len(taken)} of {len(own)} tensors start from {source}")
    if left:
        say(f"not taken: {', '.join(left)}")
    return left


def _find_fetched(name: str) -> Path:
    autoencoders = {key: weight for key, weight in WEIGHTS.items() if weight.model}
    if name not in autoencoders:
        raise unknown_name("train.init_from", name, autoencoders)
    return checked_weights(name)


def _digest(place: Path) -> str:
    """SHA-256 of the weights."""
    if place.is_file():
        return hash_file(place)
    if _is_diffusers(place):
        if not (place / DIFFUSERS_WEIGHTS).is_file():
            raise UserError(f"{place / DIFFUSERS_WEIGHTS}: not found; expected it beside {CONFIG}")
        return hash_file(place / DIFFUSERS_WEIGHTS)
    bundle.load_info(place)  # an error that names what is missing
    return bundle.digest(place)


def _read(place: Path, model: ImageModel) -> dict[str, Tensor]:
    """Tensors under the names of the model's family."""
    if not place.is_file() and not _is_diffusers(place):
        return bundle.load_trained(place)[0].state_dict()
    if not isinstance(model, AutoencoderKL):
        raise UserError(f"train.init_from: {place}: weights of an AutoencoderKL; set model.name: autoencoder_kl")
    groups = model.encoder.conv_norm_out.num_groups
    tensors = read_file(place) if place.is_file() else read_diffusers(place, groups)
    return from_published(tensors, model.state_dict())


def _is_diffusers(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / bundle.DESCRIPTION).exists()


def _reason(name: str, given: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    if name not in given:
        return f"{name} (not in the source)"
    if name not in own:
        return f"{name} (not in this model)"
    return f"{name} ({tuple(given[name].shape)}, here {tuple(own[name].shape)})"
