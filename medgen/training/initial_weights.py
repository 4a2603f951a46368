"""Weights that a training starts from, as `train.init_from` names them.

A resolved source has the number of a version in place of an alias, and ends in #sha256= and the SHA-256 of its weights.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from medgen.config import Project
from medgen.console import say
from medgen.errors import UserError
from medgen.models import bundle

PIN = "#sha256="
REGISTERED = "models:/"
Fetch = Callable[[str], tuple[str, Path]]  # URI of a version -> URI with its number, and the folder of its model

NUM_NAMES = 5  # tensors that an error names


def find_weights(project: Project, source: str, fetch: Fetch | None) -> tuple[str, Path]:
    """The resolved source, and the folder with its model.

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
        name, folder = fetch(name)
    else:
        folder = project.home / name
        if folder.resolve() == project.model.resolve():
            raise UserError(
                f"train.init_from: {name} is the folder that the training writes; copy it, or register the model and "
                "name its version"
            )
    bundle.load_info(folder)  # an error that names what is missing
    found = bundle.digest(folder)
    if expected and found != expected:
        raise UserError(
            f"train.init_from: {name}: its weights have the SHA-256 {found}, expected {expected}; restore the weights, "
            f"or remove {PIN}… to start from these"
        )
    return f"{name}{PIN}{found}", folder


def load_weights(model: nn.Module, source: str, folder: Path, strict: bool) -> list[str]:
    """Copy the weights of the model in a folder; return the tensors that were not taken, with the reasons.

    Raises:
        UserError: the source is damaged; tensors do not fit and `strict` is set; no weight of a layer fits.
    """
    given = bundle.load(folder)[0].state_dict()
    own = model.state_dict()
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


def _reason(name: str, given: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    if name not in given:
        return f"{name} (not in the source)"
    if name not in own:
        return f"{name} (not in this model)"
    return f"{name} ({tuple(given[name].shape)}, here {tuple(own[name].shape)})"
