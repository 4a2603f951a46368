"""Saves and loads an exported model: model.safetensors and model.json. Loading executes no code from the files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter

from medgen.config import Model, Preprocess, unknown_name
from medgen.data.conditions import ConditionField, ConditionSpace
from medgen.data.store import Store
from medgen.errors import UserError
from medgen.io import hash_file, parsing, read_description, read_tensors, save_artifact
from medgen.models import GenerativeModel, ImageModel, build_model
from medgen.models.sliding_window import by_windows

SCHEMA = 1
Side = Annotated[int, Field(ge=1, le=4096)]
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
COMMAND = "medgen train"


@dataclass(frozen=True)
class BundleInfo:
    """Everything needed to rebuild a model and to trace its origin.

    The git commit and the tracking run are left out, because equal models would then differ in their bytes. `run`,
    the name of a folder in runs/, leads to both.
    """

    model: Model
    preprocess: Preprocess  # turns an image file into the model's input
    image_shape: Annotated[tuple[Side, ...], Field(min_length=3, max_length=4)]  # C, H, W or C, D, H, W; in [0, 1]
    classes: tuple[str, ...]  # empty for unlabelled data
    dataset: str  # fingerprint of the training store
    run: str  # fingerprint of the training run
    torch: str  # version of PyTorch that wrote the weights
    init_from: str | None = None  # weights that the training started from, with their SHA-256
    patch: tuple[Side, ...] | None = None  # sides of the crops it was trained on; None: whole images
    schema: int = SCHEMA
    conditions: tuple[ConditionField, ...] = ()  # of the training store

    @property
    def space(self) -> ConditionSpace | None:
        """The conditions, as a prior takes them; None without any."""
        return ConditionSpace(self.conditions) if self.conditions else None


def save(folder: Path, model: ImageModel, info: BundleInfo) -> None:
    """Write the bundle atomically."""
    description = TypeAdapter(BundleInfo).dump_python(info, mode="json")
    for name in ("init_from", "patch", "conditions"):
        if not description[name]:
            del description[name]  # as before, so that equal models have equal bytes
    save_artifact(folder, "model", model.state_dict(), description)


def digest(folder: Path) -> str:
    """SHA-256 of the weights, by which a prior or a report names its model."""
    return hash_file(folder / WEIGHTS)


def load_info(folder: Path) -> BundleInfo:
    """Read model.json.

    Raises:
        UserError: the bundle is missing or damaged.
    """
    return _read(folder)[0]


def _read(folder: Path) -> tuple[BundleInfo, str | None]:
    """Description of a model and the SHA-256 of its weights; bundles of earlier versions have no SHA-256."""
    path = folder / DESCRIPTION
    description = read_description(folder, "model", COMMAND)
    weights = description.pop("sha256", None)
    with parsing(path, COMMAND):
        info = TypeAdapter(BundleInfo).validate_python(description)
    if info.schema != SCHEMA:
        raise UserError(
            f"{path}: found schema {info.schema}, expected {SCHEMA}; use the version of medgen that wrote the file"
        )
    return info, weights


def load_for(store: Store, folder: Path, device: torch.device | str = "cpu") -> tuple[ImageModel, BundleInfo]:
    """Load a model that was trained on `store`; see `load`.

    Raises:
        UserError: the bundle is missing, damaged, or trained on other data.
    """
    model, info = load(folder, device)
    if info.dataset != store.fingerprint:
        raise UserError(
            f"{folder / DESCRIPTION}: trained on dataset {info.dataset}, but {store.folder} is now "
            f"{store.fingerprint}; run `medgen train` (or `dvc repro`) first"
        )
    return model, info


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[ImageModel, BundleInfo]:
    """Load the model, in evaluation mode, and its description; one trained on patches works by windows.

    Raises:
        UserError: the bundle is missing or damaged.
    """
    model, info = load_trained(folder)
    return by_windows(model, info.patch, info.image_shape).to(device).eval(), info


def load_trained(folder: Path) -> tuple[ImageModel, BundleInfo]:
    """Load the model as it was trained, on the CPU, and its description; see `load`."""
    info, weights = _read(folder)
    tensors = read_tensors(folder, "model", COMMAND, weights)

    def build(space: ConditionSpace | None) -> ImageModel:
        return build_model(info.model, info.image_shape, len(info.classes), info.preprocess.mask_classes, space)

    def fits(space: ConditionSpace | None) -> bool:
        with torch.device("meta"):  # compare the sizes before any memory is allocated for them
            sizes = {name: tensor.shape for name, tensor in build(space).state_dict().items()}
        return sizes == {name: tensor.shape for name, tensor in tensors.items()}

    with parsing(folder / DESCRIPTION, COMMAND):
        space = info.space
        if not fits(space) and info.classes:
            space = None  # a cvae of earlier versions takes the class only
        if not fits(space):
            raise ValueError(f"{WEIGHTS} is of a model of other sizes")
        model = build(space)
        model.load_state_dict(tensors)
    return model, info


def load_generative(folder: Path, device: torch.device | str = "cpu") -> tuple[GenerativeModel, BundleInfo]:
    """Load a model that generates images; see `load`.

    Raises:
        UserError: the bundle is missing, damaged, or holds a segmenter.
    """
    model, info = load(folder, device)
    if not isinstance(model, GenerativeModel):
        raise UserError(
            f"{folder / DESCRIPTION}: model.name {info.model.name} predicts masks; expected a model that generates "
            "images, such as spatial_vae"
        )
    return model, info


def label_to_encode(model: GenerativeModel, info: BundleInfo, label: str | None) -> int | None:
    """Index of the class that a conditional model encodes and decodes an image as; None for any other model.

    `label` is the class's name or index.

    Raises:
        UserError: the label is missing, unknown, or given to a model that does not use labels.
    """
    if not model.conditional:
        if label is not None:
            raise UserError(f"label: found {label!r}, but {info.model.name} does not use labels; leave it out")
        return None
    if label is None:
        raise UserError(f"label: missing, but {info.model.name} needs one; expected one of {', '.join(info.classes)}")
    return class_index(label, info.classes)


def class_index(label: str, classes: Sequence[str]) -> int:
    """Index of a class given by its name or its index.

    Raises:
        UserError: there is no such class.
    """
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise unknown_name("label", label, classes)
