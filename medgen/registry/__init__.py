"""Register trained models in MLflow, promote, serve and reproduce the versions; entry functions: `register`, `serve`.

`promote`, `rollback` and `history` are in medgen.registry.promotion, `reproduce` in medgen.registry.reproduce.

medgen register     medgen generate --model models:/medgen@candidate --n 25 --out outputs/first
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from medgen.config import Params, Project, Registry, Tracking
from medgen.console import say, warn
from medgen.errors import UserError
from medgen.evaluation.data import load_evaluation
from medgen.io import hash_file
from medgen.models import bundle
from medgen.models.bundle import BundleInfo
from medgen.priors.generator import content_hash
from medgen.priors.refiner import load_refiner
from medgen.registry import mlflow_ui
from medgen.registry.evaluations import upload_evaluation
from medgen.registry.mlflow_ui import ui
from medgen.registry.model_package import CONTENT_TAG, PARAMS_TAG, create_version
from medgen.registry.serve import serve
from medgen.registry.versions import (
    CANDIDATE,
    EVALUATION_DIGEST,
    METRIC_GROUPS,
    Version,
    download_version,
    find_version,
    metric_tags,
    mlflow_errors,
    update_tags,
)
from medgen.tracking import PRIOR_ORIGIN, REFINER_ORIGIN, RunRecord, Tracker, lineage, read_run, sync_run
from medgen.tracking.mlflow_descriptions import NOTE_TAG, hash_tags, is_replaceable
from medgen.tracking.mlflow_sync import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

__all__ = [
    "Version",
    "fetch_for_evaluation",
    "find_model",
    "register",
    "register_if_enabled",
    "serve",
    "ui",
    "update_metrics",
]


def register(project: Project, *, params: Params) -> Version:
    """Register artifacts/model, artifacts/prior and artifacts/refiner as a version, and make it the candidate.

    If a version has the same content, that version becomes the candidate. The version is added to the MLflow run that
    trained the model. It stores the parameters it was made with: `params`, with the values that each part records.

    Raises:
        UserError: a part is missing, tracking is disabled, or the MLflow store does not answer.
    """
    tracking, name = params.tracking, params.registry.model_name
    if not tracking.enabled:
        raise UserError("tracking.enabled: false, so there is no MLflow store to register in; set it to true")
    info = bundle.load_info(project.model)
    if not project.prior.is_dir():
        raise UserError(f"{project.prior}: there is no prior; run `medgen prior` (or `dvc repro`) first")
    load_refiner(project.refiner, bundle.digest(project.model))  # raises if it is missing or damaged
    with mlflow_errors(project, tracking, "nothing is registered: run `medgen register` later"):
        client, experiment = connect(project, tracking)  # first, so that a store that does not answer changes nothing
        record, run_id = _training_run(project, tracking, info)
        content = content_hash(project.model, project.prior, project.refiner)
        metrics, provenance = _read_metrics(project, content)
        measured = metric_tags(metrics, provenance)
        _describe_run(project, tracking, info, record, metrics, run_id)
        existing = _version_with_content(client, name, content)
        if existing is None:
            tags = _lineage_tags(project, record, info, provenance) | measured | {CONTENT_TAG: content}
            made_with = _params_made_with(project, params, info, provenance)
            version = create_version(client, project, made_with, info, experiment, run_id, tags)
            if EVALUATION_DIGEST in tags:
                upload_evaluation(client, version, project)
            _describe_version(client, version, project, info, tags, is_evaluated=bool(metrics))
        else:
            version = existing  # its lineage stays as it was registered first
            if metrics:
                _replace_metrics(client, version, project, info, measured)
        client.set_registered_model_alias(name, CANDIDATE, version.version)
    result = Version(name, int(version.version), run_id, is_new=existing is None)
    state = "registered as" if result.is_new else "already registered as"
    say(f"{state} {result.uri}, alias models:/{name}@{CANDIDATE}")
    return result


def register_if_enabled(project: Project, *, params: Params) -> Version | None:
    """Register after an evaluation unless it is disabled; a store that does not answer is only a warning."""
    if not (params.registry.register_after_evaluate and params.tracking.enabled):
        return None
    try:
        return register(project, params=params)
    except UserError as error:
        warn(str(error))
        return None


def find_model(project: Project, *, tracking: Tracking, source: str | None) -> Path:
    """The folder that holds model/, prior/ and refiner/.

    Args:
        source: a folder, a registry URI such as "models:/medgen@candidate", or None for artifacts/.

    Raises:
        UserError: there is no such folder or version, or the MLflow store does not answer.
    """
    if source is not None and source.startswith("models:/"):
        return download_version(source, project, tracking)
    folder = project.model.parent if source is None else Path(source)
    for part in ("model", "prior", "refiner"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder / part}: not found; run `dvc repro` first, or give a folder that contains model/, prior/ "
                "and refiner/"
            )
    return folder


def fetch_for_evaluation(
    project: Project, *, tracking: Tracking, registry: Registry, source: str
) -> tuple[Version, Path]:
    """Download a version for `medgen evaluate --model`.

    Returns:
        The version, and a folder in runs/ with its model/, prior/ and refiner/ in artifacts/.

    Raises:
        UserError: there is no such version of the project's registered model, or the MLflow store does not answer.
    """
    with mlflow_errors(project, tracking, "nothing was downloaded: start the server first"):
        client, _ = connect(project, tracking)
        version = find_version(client, registry.model_name, source)
    folder = project.runs / "versions" / f"{version.name}-{version.number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(download_version(version.uri, project, tracking), folder / "artifacts")
    return version, folder


def update_metrics(project: Project, *, tracking: Tracking, version: Version, folder: Path) -> None:
    """Replace a version's metrics by those that `medgen evaluate --model` wrote to the folder."""
    evaluated = Project(project.root, apart=folder)
    content = content_hash(evaluated.model, evaluated.prior, evaluated.refiner)
    metrics, provenance = _read_metrics(evaluated, content)
    with mlflow_errors(project, tracking, f"{version.uri} keeps its metrics: run the same command later"):
        client, _ = connect(project, tracking)
        found = client.get_model_version(version.name, str(version.number))
        info = bundle.load_info(evaluated.model)
        _replace_metrics(client, found, evaluated, info, metric_tags(metrics, provenance))
    say(f"{version.uri} now has the {len(metrics)} metrics of this evaluation")


def _training_run(project: Project, tracking: Tracking, info: BundleInfo) -> tuple[RunRecord, str]:
    """The record and the MLflow run that trained the model; creates a record if the training left none here."""
    scratch = project.runs / info.run
    if read_run(scratch) is None:  # the model came from a DVC remote
        with Tracker.open(scratch, tracking, project, f"{info.model.name}-{info.run[:6]}") as tracker:
            # `lineage` describes this machine's work tree, which is not the one that trained the model.
            unknown = dict.fromkeys(("git.commit", "git.branch", "git.dirty", "data.md5"), "unknown")
            tracker.tags(lineage(project) | unknown | {"dataset.fingerprint": info.dataset})
            tracker.note("The model came without its training record. This run was created to register it.")
    try:
        synced = sync_run(scratch, project, tracking)
    except Timeout:
        raise UserError(f"{scratch}: another process is writing this run; register when it has ended") from None
    record = read_run(scratch)
    assert record is not None
    assert synced.run_id is not None
    return record, synced.run_id


def _version_with_content(client: "MlflowClient", name: str, content: str) -> "ModelVersion | None":
    """The newest version with this content."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{CONTENT_TAG}` = '{content}'")
    return max(found, key=lambda version: int(version.version), default=None)


def _lineage_tags(
    project: Project, record: RunRecord, info: BundleInfo, provenance: Mapping[str, Any]
) -> dict[str, str]:
    """The tags of the training, with the commit of the last stage; git.dirty is "true" if any stage had changed files.

    The hash of the training's parameters is left out, because a version has the hash of all parameters.
    """
    tags = {key: value for key, value in record.tags.items() if not key.startswith("mlflow.") and key != PARAMS_TAG}
    stages = [tags]
    if _prior_name(project) is not None:
        stages.append(_read_origin(project, info, PRIOR_ORIGIN, project.prior / "prior.json").get("lineage", {}))
    if _refiner_params(project) is not None:
        stages.append(_read_origin(project, info, REFINER_ORIGIN, project.refiner / "refiner.json").get("lineage", {}))
    if provenance:
        stages.append(provenance["lineage"])
    commits = [stage.get("git.commit", "unknown") for stage in stages]
    states = {stage.get("git.dirty", "unknown") for stage in stages}
    tags["git.commit"] = "unknown" if "unknown" in commits else commits[-1]
    tags["git.dirty"] = next((state for state in ("true", "unknown") if state in states), "false")
    return tags | {"run": info.run, "dataset.fingerprint": info.dataset}


def _params_made_with(project: Project, params: Params, info: BundleInfo, provenance: Mapping[str, Any]) -> Params:
    """The parameters of each part: params.yaml may have changed since, or been overridden with `--set`."""
    values = params.model_dump(mode="json")
    training = project.runs / info.run / "params.json"
    if training.is_file():
        values |= json.loads(training.read_text(encoding="utf-8"))
    if prior := _read_origin(project, info, PRIOR_ORIGIN, project.prior / "prior.json").get("prior"):
        values["prior"] = prior
    values["refiner"] = _refiner_params(project) or {**values["refiner"], "enabled": False}
    if provenance:
        values["evaluate"] = provenance["evaluate"]
    extractor = project.features / "extractor.json"
    if extractor.is_file():
        values["features"] = json.loads(extractor.read_text(encoding="utf-8")).get("features", values["features"])
    own = {"model": info.model.model_dump(mode="json"), "preprocess": info.preprocess.model_dump(mode="json")}
    return Params.model_validate(values | own)


def _read_origin(project: Project, info: BundleInfo, name: str, artifact: Path) -> dict[str, Any]:
    """The provenance of a prior or refiner in the run's folder; {} if the artifact is not the one described there."""
    path = project.runs / info.run / name
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["sha256"] == hash_file(artifact) else {}


def _replace_metrics(
    client: "MlflowClient", version: "ModelVersion", project: Project, info: BundleInfo, measured: Mapping[str, str]
) -> None:
    """Replace the metrics, per-image values and description of a registered version."""
    kept = {key: value for key, value in version.tags.items() if not key.startswith((*METRIC_GROUPS, "evaluated."))}
    if EVALUATION_DIGEST in measured:  # even if the tag is the same: the stored values may be damaged or missing
        upload_evaluation(client, version, project)
    _describe_version(client, version, project, info, {**kept, **measured}, is_evaluated=True)


def _describe_version(
    client: "MlflowClient",
    version: "ModelVersion",
    project: Project,
    info: BundleInfo,
    tags: Mapping[str, str],
    is_evaluated: bool,
) -> None:
    """Set a version's tags, its description and its image of samples."""
    assert version.source
    prior, is_refined = _prior_name(project), _refiner_params(project) is not None
    has_samples = is_evaluated and mlflow_ui.samples_path(project).exists()
    number = int(version.version)
    text = mlflow_ui.describe_version(version.name, number, info, prior, is_refined, tags, has_samples)
    if not update_tags(client, version, tags) and version.description == text:
        return
    if has_samples:
        with tempfile.TemporaryDirectory() as folder:
            preview = mlflow_ui.write_preview(project, Path(folder))
            client.log_model_artifact(version.source.removeprefix("models:/"), str(preview))
    if is_replaceable(version.description, version.tags):
        client.update_model_version(version.name, version.version, text)
        update_tags(client, version, hash_tags(text))


def _describe_run(
    project: Project,
    tracking: Tracking,
    info: BundleInfo,
    record: RunRecord,
    metrics: Mapping[str, float],
    run_id: str,
) -> None:
    """Add the metrics of the evaluation and its image of samples to the run's description."""
    if not metrics:
        return
    prior, is_refined = _prior_name(project), _refiner_params(project) is not None
    has_samples = mlflow_ui.samples_path(project).exists()
    written = record.tags.get(NOTE_TAG, "")
    training = written.partition("\n\n")[0]  # the rest is of an earlier evaluation
    text = mlflow_ui.describe_run(training, prior, is_refined, metric_tags(metrics), run_id, has_samples)
    if text == written:
        return
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, record.name) as tracker:
        if has_samples:
            tracker.artifact(mlflow_ui.write_preview(project, scratch / mlflow_ui.FOLDER), mlflow_ui.FOLDER)
        tracker.note(text)


def _prior_name(project: Project) -> str | None:
    """The prior's name; None for a segmentation model, which needs none."""
    name: str | None = json.loads((project.prior / "prior.json").read_text(encoding="utf-8"))["name"]
    return name


def _refiner_params(project: Project) -> dict[str, Any] | None:
    """The parameters of the refiner; None if there is none."""
    found = json.loads((project.refiner / "refiner.json").read_text(encoding="utf-8"))
    return found["refiner"] if found["enabled"] else None


def _read_metrics(project: Project, content: str) -> tuple[dict[str, float], dict[str, Any]]:
    """metrics.json and provenance.json of the reports; both empty if they do not belong to this content.

    git tracks metrics.json but not provenance.json, so metrics.json may be that of another commit.
    """
    path = project.reports / "metrics.json"
    try:
        provenance: dict[str, Any] = json.loads((project.reports / "provenance.json").read_text(encoding="utf-8"))
        if (provenance.get("content"), provenance.get("metrics")) != (content, hash_file(path)):
            return {}, {}
        if "evaluation" in provenance and load_evaluation(project.evaluation).digest != provenance["evaluation"]:
            return {}, {}
        return json.loads(path.read_text(encoding="utf-8")), provenance
    except (FileNotFoundError, ValueError, UserError):
        return {}, {}
