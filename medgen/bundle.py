"""The exported model: model.safetensors and model.json. Loading runs no code from the file."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from medgen import refinement
from medgen.config import Model, Preprocess
from medgen.data.store import Store
from medgen.errors import UserError
from medgen.files import hash_file, write_folder
from medgen.models import GenerativeModel, ImageModel, build_model
from medgen.priors import Prior, class_index, load_prior
from medgen.refinement import Refiner, load_refiner

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


def content(model: Path, prior: Path, refiner: Path) -> str:
    """SHA-256 of the names and bytes of all files of a model, its prior and its refiner: what a version is.

    A folder that says that there is no refiner counts for nothing, as none did before there were refiners.
    """
    digest = hashlib.sha256()
    parts = [(model, "model"), (prior, "prior")]
    if (refiner / refinement.WEIGHTS).exists():
        parts.append((refiner, "refiner"))
    for folder, name in parts:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{name}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


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
