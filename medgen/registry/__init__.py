"""A trained model and its prior become a registered version, in the MLflow run that trained them.

medgen register     medgen generate --model models:/medgen@candidate --n 25 --out outputs/first
"""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout
from rich.console import Console

from medgen import bundle
from medgen.bundle import BundleInfo
from medgen.config import Project, Registry, Tracking
from medgen.errors import UserError
from medgen.registry import page
from medgen.registry.packing import CONTENT_TAG, PYFUNC, content_hash, pack
from medgen.registry.page import ui
from medgen.registry.versions import CANDIDATE, Version, answering, load
from medgen.tracking import RunRecord, Tracker, lineage, mirror_run, read_run
from medgen.tracking.mirror import connect
from medgen.tracking.notes import NOTE, is_ours, marked

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

__all__ = ["PYFUNC", "Version", "find_model", "load", "register_if_wanted", "run", "ui"]


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
        client, experiment = connect(project, tracking)  # first of all: a store that is away ends it here
        record, run_id = _run_of(project, tracking, info)
        metrics = _metrics(project)
        content = content_hash(project.model, project.prior)
        tags = _tags(record, info, metrics) | {CONTENT_TAG: content}
        _describe_run(project, tracking, info, record, metrics, run_id)
        found = _registered(client, registry.model_name, content)
        made = found or pack(client, project, tracking, registry, info, experiment, run_id, record.params, tags)
        if metrics or found is None:  # else it may have been judged before, and says so
            _describe(client, made, project, info, tags, metrics)
        client.set_registered_model_alias(registry.model_name, CANDIDATE, made.version)
    version = Version(registry.model_name, int(made.version), run_id, is_new=found is None)
    word = "registered as" if version.is_new else "already registered as"
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


def _registered(client: "MlflowClient", name: str, content: str) -> "ModelVersion | None":
    """The newest version with this content."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{CONTENT_TAG}` = '{content}'")
    return max(found, key=lambda version: int(version.version), default=None)


def _tags(record: RunRecord, info: BundleInfo, metrics: Mapping[str, float]) -> dict[str, str]:
    """What a version is found and judged by: lineage and metrics."""
    tags = {key: value for key, value in record.tags.items() if not key.startswith("mlflow.")}
    tags |= {"run": info.run, "dataset.fingerprint": info.dataset}
    return tags | {key: f"{value:.6g}" for key, value in metrics.items()}


def _describe(
    client: "MlflowClient",
    version: "ModelVersion",
    project: Project,
    info: BundleInfo,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> None:
    """A version's tags, description and picture, and the metrics of its logged model."""
    from mlflow.entities import Metric

    assert version.source and version.run_id
    has_picture = bool(metrics) and page.picture_of(project).exists()
    text = page.about_version(version.name, int(version.version), info, _prior_name(project), tags, has_picture)
    news = {key: value for key, value in tags.items() if version.tags.get(key) != value}
    if version.description == text and not news:
        return
    model_id = version.source.removeprefix("models:/")
    if metrics:
        now = int(time.time() * 1000)
        of_model = [Metric(name, value, now, 0, model_id=model_id) for name, value in metrics.items()]
        client.log_batch(version.run_id, metrics=of_model)
    if has_picture:
        with tempfile.TemporaryDirectory() as folder:
            client.log_model_artifact(model_id, str(page.preview(project, Path(folder))))
    if is_ours(version.description, version.tags):
        client.update_model_version(version.name, version.version, text)
        news |= marked(text)
    for key, value in news.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def _describe_run(
    project: Project,
    tracking: Tracking,
    info: BundleInfo,
    record: RunRecord,
    metrics: Mapping[str, float],
    run_id: str,
) -> None:
    """Completes the run's description with what its model was judged to be."""
    if not metrics:
        return
    has_picture = page.picture_of(project).exists()
    written = record.tags.get(NOTE, "")
    made = written.partition("\n\n")[0]  # what follows is of an earlier judgement
    text = page.about_run(made, _prior_name(project), _tags(record, info, metrics), run_id, has_picture)
    if text == written:
        return
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, record.name) as tracker:
        if has_picture:
            tracker.artifact(page.preview(project, scratch / page.FOLDER), page.FOLDER)
        tracker.note(text)


def _prior_name(project: Project) -> str | None:
    """The prior's name; None where a model needs none."""
    name: str | None = json.loads((project.prior / "prior.json").read_text(encoding="utf-8"))["name"]
    return name


def _metrics(project: Project) -> dict[str, float]:
    """reports/metrics.json, where it judges what is here: provenance.json beside it says which model and prior."""
    try:
        provenance = json.loads((project.reports / "provenance.json").read_text(encoding="utf-8"))
        metrics: dict[str, float] = json.loads((project.reports / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    judged = provenance.get("model"), provenance.get("prior")
    return metrics if judged == (bundle.digest(project.model), _prior_name(project)) else {}
