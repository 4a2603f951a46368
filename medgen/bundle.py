"""The exported model: model.safetensors and model.json. Loading runs no code from the file."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medgen.config import Model, Preprocess
from medgen.data.store import Store
from medgen.errors import UserError
from medgen.models import GenerativeModel, build_model

SCHEMA = 1


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


def save(folder: Path, model: GenerativeModel, info: BundleInfo) -> None:
    """Writes the bundle beside its place and moves it there, so that it is whole or absent."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, temporary / "model.safetensors")
    plain = TypeAdapter(BundleInfo).dump_python(info, mode="json")
    (temporary / "model.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_info(folder: Path) -> BundleInfo:
    """Reads model.json.

    Raises:
        UserError: there is no bundle, or it is damaged.
    """
    path = folder / "model.json"
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


def load_for(store: Store, folder: Path, device: torch.device | str = "cpu") -> tuple[GenerativeModel, BundleInfo]:
    """As `load`, for a model that must have been trained on this very store.

    Raises:
        UserError: there is no bundle, it is damaged, or it was trained on other data.
    """
    model, info = load(folder, device)
    if info.dataset != store.fingerprint:
        raise UserError(
            f"{folder / 'model.json'}: trained on dataset {info.dataset}, but {store.folder} is now "
            f"{store.fingerprint}; run `medgen train` (or `dvc repro`) first"
        )
    return model, info


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[GenerativeModel, BundleInfo]:
    """The model in evaluation mode and its description.

    Raises:
        UserError: there is no bundle, or it is damaged.
    """
    info = load_info(folder)
    model = build_model(info.model, info.image_shape, len(info.classes))
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `medgen train` again") from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: does not hold the weights model.json describes: {error}") from None
    return model.to(device).eval(), info
