"""The exported model: model.safetensors and model.json. Loading runs no code from the file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from medgen.config import Model, Preprocess, unknown_name
from medgen.data.store import Store
from medgen.errors import UserError
from medgen.io import hash_file, write_folder
from medgen.models import GenerativeModel, ImageModel, build_model

SCHEMA = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


@dataclass(frozen=True)
class BundleInfo:
    """All that is needed to rebuild a model and to know where it comes from.

    The git commit and the tracking run are not in here: they would make equal models differ byte
    for byte. They are found through `run`, which names the folder in runs/.
    """

    model: Model
    preprocess: Preprocess  # how an image file becomes the model's input
    image_shape: tuple[int, int, int]  # C, H, W; values in [0, 1]
    classes: tuple[str, ...]  # empty for unlabelled data
    dataset: str  # fingerprint of the store it was trained on
    run: str  # fingerprint of the training run
    torch: str  # version that wrote the weights
    schema: int = SCHEMA


def save(folder: Path, model: ImageModel, info: BundleInfo) -> None:
    """Writes the bundle; it is whole or absent."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    text = json.dumps(TypeAdapter(BundleInfo).dump_python(info, mode="json"), indent=2) + "\n"
    write_folder(folder, {WEIGHTS: serialise(tensors), DESCRIPTION: text.encode()})


def digest(folder: Path) -> str:
    """SHA-256 of the weights: what a prior was fitted to, and what a report judged."""
    return hash_file(folder / WEIGHTS)


def load_info(folder: Path) -> BundleInfo:
    """Reads model.json.

    Raises:
        UserError: there is no bundle, or it is damaged.
    """
    path = folder / DESCRIPTION
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        info = TypeAdapter(BundleInfo).validate_python(plain)
    except FileNotFoundError:
        raise UserError(f"{path}: no model here; run `medgen train` (or `dvc repro`) first") from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: not a medgen model description ({error}); run `medgen train` again") from None
    if info.schema != SCHEMA:
        raise UserError(f"{path}: schema {info.schema}, this medgen reads {SCHEMA}; use the medgen that wrote it")
    return info


def load_for(store: Store, folder: Path, device: torch.device | str = "cpu") -> tuple[ImageModel, BundleInfo]:
    """As `load`, for a model that must have been trained on this very store.

    Raises:
        UserError: there is no bundle, it is damaged, or it was trained on other data.
    """
    model, info = load(folder, device)
    if info.dataset != store.fingerprint:
        raise UserError(
            f"{folder / DESCRIPTION}: trained on dataset {info.dataset}, but {store.folder} is now "
            f"{store.fingerprint}; run `medgen train` (or `dvc repro`) first"
        )
    return model, info


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[ImageModel, BundleInfo]:
    """The model in evaluation mode and its description.

    Raises:
        UserError: there is no bundle, or it is damaged.
    """
    info = load_info(folder)
    model = build_model(info.model, info.image_shape, len(info.classes), info.preprocess.mask_classes)
    path = folder / WEIGHTS
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `medgen train` again") from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: does not hold the weights model.json describes: {error}") from None
    return model.to(device).eval(), info


def load_generative(folder: Path, device: torch.device | str = "cpu") -> tuple[GenerativeModel, BundleInfo]:
    """As `load`, for what only a model with a latent can do.

    Raises:
        UserError: there is no bundle, it is damaged, or its model makes no images.
    """
    model, info = load(folder, device)
    if not isinstance(model, GenerativeModel):
        raise UserError(
            f"{folder / DESCRIPTION}: model.name {info.model.name} finds masks and makes no images; expected a model "
            "with a latent, such as spatial_vae"
        )
    return model, info


def label_to_encode(model: GenerativeModel, info: BundleInfo, label: str | None) -> int | None:
    """The index of the class, given by its name or its index, that an image is encoded and decoded as.

    None for a model that does not look at labels.

    Raises:
        UserError: the label is missing, unknown, or of no use.
    """
    if not model.conditional:
        if label is not None:
            raise UserError(f"label: found {label!r}, but {info.model.name} does not look at labels; leave it out")
        return None
    if label is None:
        raise UserError(f"label: {info.model.name} looks at labels; give one. Known: {', '.join(info.classes)}")
    return class_index(label, info.classes)


def class_index(label: str, classes: Sequence[str]) -> int:
    """The index of a class given by its name or its index.

    Raises:
        UserError: there is no such class.
    """
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise unknown_name("label", label, classes)
