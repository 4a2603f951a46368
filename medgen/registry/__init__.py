"""A trained model and its prior become a registered version, in the MLflow run that trained them.

medgen register     medgen generate --model models:/medgen@candidate --n 25 --out outputs/first
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout
from rich.console import Console

from medgen import bundle
from medgen.bundle import BundleInfo
from medgen.config import Project, Registry, Tracking
from medgen.errors import UserError
from medgen.models import MODELS
from medgen.registry.packing import CONTENT_TAG, PYFUNC, content_hash, pack
from medgen.registry.page import ui
from medgen.registry.serving import serve
from medgen.registry.versions import CANDIDATE, Version, answering, load
from medgen.tracking import RunRecord, Tracker, lineage, mirror_run, read_run
from medgen.tracking.mirror import connect

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["PYFUNC", "Version", "find_model", "load", "register_if_wanted", "run", "serve", "ui"]


def run(project: Project, *, tracking: Tracking, registry: Registry) -> Version:
    """Registers artifacts/model and artifacts/prior and points the alias `candidate` at them.

    The same content again is the same version.

    Raises:
        UserError: a part is missing, tracking is off, or the store does not answer.
    """
    if not tracking.enabled:
        raise UserError("tracking.enabled: false, so there is no MLflow to register with; set it to true")
    info = bundle.load_info(project.model)
    if not project.prior.is_dir():
        raise UserError(f"{project.prior}: no prior here; run `medgen prior` (or `dvc repro`) first")
    with answering(project, tracking, "nothing is registered: run `medgen register` later"):
        client, _ = connect(project, tracking)  # first of all: a store that is away ends it here
        record, run_id = _run_of(project, tracking, info)
        content = content_hash(project.model, project.prior)
        number = _registered(client, registry.model_name, content)
        is_new = number is None
        if number is None:
            number = pack(client, project, tracking, registry, info, run_id, content)
        _describe(client, registry.model_name, number, project, record, info)
        client.set_registered_model_alias(registry.model_name, CANDIDATE, str(number))
    version = Version(registry.model_name, number, run_id, is_new=is_new)
    word = "registered as" if is_new else "already registered as"
    Console(highlight=False).print(f"{word} {version.uri}, alias models:/{version.name}@{CANDIDATE}")
    return version


def register_if_wanted(project: Project, *, tracking: Tracking, registry: Registry) -> Version | None:
    """What follows evaluate by itself: registers unless switched off; a store that is away is only a warning."""
    if not (registry.register_after_evaluate and tracking.enabled):
        return None
    try:
        return run(project, tracking=tracking, registry=registry)
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"warning: {error}", style="yellow", markup=False)
        return None


def find_model(project: Project, *, tracking: Tracking, place: str | None) -> Path:
    """The folder that holds model/ and prior/.

    Args:
        place: a folder, a registry URI such as "models:/medgen@candidate", or None for artifacts/.

    Raises:
        UserError: there is no such folder or version, or the store does not answer.
    """
    if place is not None and place.startswith("models:/"):
        return load(place, project, tracking)
    folder = project.model.parent if place is None else Path(place)
    for part in ("model", "prior"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder / part}: not found; run `dvc repro` first, or name a folder with model/ and prior/ in it"
            )
    return folder


def _run_of(project: Project, tracking: Tracking, info: BundleInfo) -> tuple[RunRecord, str]:
    """The record and the MLflow run that trained the model; a record begun here where the training's is absent."""
    scratch = project.runs / info.run
    if read_run(scratch) is None:  # the model came from a DVC remote
        with Tracker.open(scratch, tracking, project, f"{info.model.name}-{info.run[:6]}") as tracker:
            tracker.tags(lineage(project) | {"dataset.fingerprint": info.dataset})
            tracker.note("The model came without its training record; this run was made to register it.")
    try:
        mirror = mirror_run(scratch, project, tracking)
    except Timeout:
        raise UserError(f"{scratch}: another process is writing this run; register when it has ended") from None
    record = read_run(scratch)
    assert record is not None
    assert mirror.run_id is not None
    return record, mirror.run_id


def _registered(client: "MlflowClient", name: str, content: str) -> int | None:
    """The newest version with this content."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{CONTENT_TAG}` = '{content}'")
    return max((int(version.version) for version in found), default=None)


def _describe(
    client: "MlflowClient", name: str, number: int, project: Project, record: RunRecord, info: BundleInfo
) -> None:
    """Lineage and metrics as tags of the version, and a few words on it."""
    tags = {key: value for key, value in record.tags.items() if not key.startswith("mlflow.")}
    tags |= {"run": info.run, "dataset.fingerprint": info.dataset}
    tags |= {key: f"{value:.6g}" for key, value in _metrics(project).items()}
    for key, value in tags.items():
        client.set_model_version_tag(name, str(number), key, value)
    classes = ", ".join(info.classes) or "none"
    channels, height, width = info.image_shape
    about = (
        f"{info.model.name}, images {height}x{width}x{channels} uint8, classes: {classes}. "
        "Input: n, label (optional), seed (optional); or image (a file in base64)."
    )
    if MODELS[info.model.name].target == "mask":
        about = (
            f"{info.model.name}, masks {height}x{width} uint8 of {info.preprocess.mask_classes} classes. "
            f"Input: images uint8 of any size, N x H x W x {channels}."
        )
    client.update_model_version(name, str(number), about)


def _metrics(project: Project) -> dict[str, float]:
    """reports/metrics.json, where it judges the model that is here: provenance.json beside it says which it does."""
    try:
        provenance = json.loads((project.reports / "provenance.json").read_text(encoding="utf-8"))
        metrics: dict[str, float] = json.loads((project.reports / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return metrics if provenance.get("model") == bundle.digest(project.model) else {}
