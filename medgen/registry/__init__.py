"""Register trained models in MLflow, promote, serve and reproduce the versions; entry functions: `register`, `serve`.

`promote`, `rollback` and `history` are in medgen.registry.promotion, `reproduce` in medgen.registry.reproduce.

medgen register     medgen generate --model models:/medgen@candidate --n 25 --out outputs/first
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from medgen.config import Params, Project, Registry, Tracking
from medgen.console import say, warn
from medgen.errors import UserError
from medgen.models.bundle import BundleInfo
from medgen.registry.artifacts import Artifacts
from medgen.registry.evaluations import upload_evaluation
from medgen.registry.measurements import new_measurement
from medgen.registry.mlflow_ui import FOLDER, describe_run, describe_version, ui, write_preview
from medgen.registry.model_package import create_version
from medgen.registry.origin import is_known
from medgen.registry.serve import serve
from medgen.registry.versions import (
    CANDIDATE,
    CONTENT_TAG,
    EVALUATION_DIGEST,
    METRIC_GROUPS,
    Version,
    download_version,
    find_version,
    mlflow_client,
    update_tags,
)
from medgen.tracking import RunRecord, Tracker, lineage, read_run, sync_run
from medgen.tracking.mlflow_descriptions import NOTE_TAG, hash_tags, is_replaceable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

__all__ = [
    "Version",
    "fetch_for_evaluation",
    "fetcher",
    "find_model",
    "register",
    "register_if_enabled",
    "serve",
    "ui",
    "update_metrics",
]


def register(project: Project, *, params: Params) -> Version:
    """Register artifacts/model, artifacts/prior and artifacts/refiner as a version, and make it the candidate.

    If a version has the same content, that version becomes the candidate; it gets the origin of this model if it has
    none. The version is added to the MLflow run that trained the model. It stores the parameters it was made with:
    `params`, with the values that each part records.

    Raises:
        UserError: a part is missing, tracking is disabled, or the MLflow store does not answer.
    """
    tracking, name = params.tracking, params.registry.model_name
    if not tracking.enabled:
        raise UserError("tracking.enabled: false, so there is no MLflow store to register in; set it to true")
    artifacts = Artifacts.load(project)
    later = "nothing is registered: run `medgen register` later"
    with mlflow_client(project, tracking, later) as (client, experiment):
        record, run_id = _training_run(project, tracking, artifacts.info)
        _describe_run(artifacts, tracking, record, run_id)
        same = client.search_model_versions(f"name = '{name}' and tags.`{CONTENT_TAG}` = '{artifacts.content}'")
        version = max(same, key=lambda found: int(found.version), default=None)
        is_new = version is None
        if version is None:
            measured = artifacts.metric_tags()
            tags = artifacts.lineage_tags(record) | measured | {CONTENT_TAG: artifacts.content}
            tags |= new_measurement({}, measured)
            made_with = artifacts.params_made_with(params)
            version = create_version(client, artifacts, made_with, experiment, run_id, tags)
        elif not is_known(version.tags) and is_known(tags := artifacts.lineage_tags(record)):
            update_tags(client, version, tags)
            say(f"its origin is now commit {tags['git.commit'][:12]}")
        if is_new or artifacts.metrics:
            _update_version(client, version, artifacts)
        client.set_registered_model_alias(name, CANDIDATE, version.version)
    result = Version(name, int(version.version), run_id, is_new=is_new)
    state = "registered as" if is_new else "already registered as"
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


def fetcher(project: Project, *, tracking: Tracking) -> Callable[[str], tuple[str, Path]]:
    """A function from the URI of a version to its URI by number and a folder with its model, whose files it checks.

    The function raises UserError if there is no such version, the MLflow store does not answer, or a file was changed.
    """

    def fetch(uri: str) -> tuple[str, Path]:
        with mlflow_client(project, tracking, "no initial weights: start the server first") as (client, _):
            version = find_version(client, "", uri)
        return version.uri, download_version(version.uri, project, tracking) / "model"

    return fetch


@contextmanager
def fetch_for_evaluation(
    project: Project, *, tracking: Tracking, registry: Registry, source: str
) -> Iterator[tuple[Version, Path]]:
    """Download a version for `medgen evaluate --model`; other processes that evaluate it wait until the block ends.

    Yields:
        The version, and a folder in runs/ with its model/, prior/ and refiner/ in artifacts/.

    Raises:
        UserError: there is no such version of the project's registered model, or the MLflow store does not answer.
    """
    with mlflow_client(project, tracking, "nothing was downloaded: start the server first") as (client, _):
        version = find_version(client, registry.model_name, source)
    folder = project.runs / "versions" / f"{version.name}-{version.number}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(download_version(version.uri, project, tracking), folder / "artifacts")
        yield version, folder


def update_metrics(project: Project, *, tracking: Tracking, version: Version, folder: Path) -> None:
    """Replace a version's metrics by those that `medgen evaluate --model` wrote to the folder."""
    artifacts = Artifacts.load(Project(project.root, apart=folder))
    later = f"{version.uri} keeps its metrics: run the same command later"
    with mlflow_client(project, tracking, later) as (client, _):
        _update_version(client, client.get_model_version(version.name, str(version.number)), artifacts)
    say(f"{version.uri} now has the {len(artifacts.metrics)} metrics of this evaluation")


def _training_run(project: Project, tracking: Tracking, info: BundleInfo) -> tuple[RunRecord, str]:
    """The record and the MLflow run that trained the model; creates a record if the training left none here."""
    scratch = project.runs / info.run
    if read_run(scratch) is None:  # the model came from a DVC remote
        with Tracker.open(scratch, tracking, project, f"{info.model.name}-{info.run[:6]}") as tracker:
            # `lineage` describes this machine's work tree, which is not the one that trained the model.
            keys = ("git.commit", "git.branch", "git.dirty", "files", "data.md5", "dataset.name")
            unknown = dict.fromkeys(keys, "unknown")
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


def _update_version(client: "MlflowClient", version: "ModelVersion", artifacts: Artifacts) -> None:
    """Replace the metrics, per-image values, description and image of samples of a registered version."""
    assert version.source
    measured = artifacts.metric_tags()
    if EVALUATION_DIGEST in measured:  # even if the tag is the same: the stored values may be damaged or missing
        upload_evaluation(client, version, artifacts.project)
    kept = {key: value for key, value in version.tags.items() if not key.startswith((*METRIC_GROUPS, "evaluated."))}
    tags = kept | measured
    update_tags(client, version, new_measurement(version.tags, measured))  # first: a crash loses no earlier metrics
    text = describe_version(version.name, int(version.version), artifacts, tags)
    if not update_tags(client, version, tags) and version.description == text:
        return
    if artifacts.samples:
        with tempfile.TemporaryDirectory() as folder:
            preview = write_preview(artifacts.samples, Path(folder))
            client.log_model_artifact(version.source.removeprefix("models:/"), str(preview))
    if is_replaceable(version.description, version.tags):
        client.update_model_version(version.name, version.version, text)
        update_tags(client, version, hash_tags(text))


def _describe_run(artifacts: Artifacts, tracking: Tracking, record: RunRecord, run_id: str) -> None:
    """Add the metrics of the evaluation and its image of samples to the run's description."""
    if not artifacts.metrics:
        return
    written = record.tags.get(NOTE_TAG, "")
    training = written.partition("\n\n")[0]  # the rest is of an earlier evaluation
    text = describe_run(training, artifacts, run_id)
    if text == written:
        return
    scratch = artifacts.project.runs / artifacts.info.run
    with Tracker.open(scratch, tracking, artifacts.project, record.name) as tracker:
        if artifacts.samples:
            tracker.artifact(write_preview(artifacts.samples, scratch / FOLDER), FOLDER)
        tracker.note(text)
