"""A trained model, its prior and its refiner become a registered version, in the MLflow run that trained them.

medgen register     medgen generate --model models:/medgen@candidate --n 25 --out outputs/first
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from rich.console import Console

from medgen.config import Params, Project, Registry, Tracking
from medgen.errors import UserError
from medgen.evaluation.data import load_evaluation
from medgen.io import hash_file
from medgen.models import bundle
from medgen.models.bundle import BundleInfo
from medgen.priors.generator import content_hash
from medgen.priors.refiner import load_refiner
from medgen.registry import mlflow_ui
from medgen.registry.evaluations import keep_evaluation
from medgen.registry.mlflow_ui import ui
from medgen.registry.model_package import CONTENT_TAG, PARAMS_TAG, PYFUNC, pack
from medgen.registry.serving import serve
from medgen.registry.versions import (
    CANDIDATE,
    EVALUATION,
    METRIC_GROUPS,
    Version,
    answering,
    find,
    load,
    metric_tags,
    set_tags,
)
from medgen.tracking import PRIOR_ORIGIN, REFINER_ORIGIN, RunRecord, Tracker, lineage, mirror_run, read_run
from medgen.tracking.mlflow_descriptions import NOTE, is_ours, marked
from medgen.tracking.mlflow_sync import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

__all__ = [
    "PYFUNC",
    "Version",
    "fetch_to_judge",
    "find_model",
    "load",
    "register_if_wanted",
    "run",
    "serve",
    "take_metrics",
    "ui",
]


def run(project: Project, *, params: Params) -> Version:
    """Registers artifacts/model, artifacts/prior and artifacts/refiner and points the alias `candidate` at them.

    The same content again is the same version. `params` are kept in it, with what these say of themselves.

    Raises:
        UserError: a part is missing, tracking is off, or the store does not answer.
    """
    tracking, name = params.tracking, params.registry.model_name
    if not tracking.enabled:
        raise UserError("tracking.enabled: false, so there is no MLflow to register with; set it to true")
    info = bundle.load_info(project.model)
    if not project.prior.is_dir():
        raise UserError(f"{project.prior}: no prior here; run `medgen prior` (or `dvc repro`) first")
    load_refiner(project.refiner, bundle.digest(project.model))  # says so where it is missing or damaged
    with answering(project, tracking, "nothing is registered: run `medgen register` later"):
        client, experiment = connect(project, tracking)  # first of all: a store that is away ends it here
        record, run_id = _run_of(project, tracking, info)
        content = content_hash(project.model, project.prior, project.refiner)
        metrics, provenance = _metrics(project, content)
        judged = metric_tags(metrics, provenance)
        _describe_run(project, tracking, info, record, metrics, run_id)
        if (found := _registered(client, name, content)) is None:
            tags = _origin(project, record, info, provenance) | judged | {CONTENT_TAG: content}
            made = pack(client, project, _made_with(project, params, info, provenance), info, experiment, run_id, tags)
            if EVALUATION in tags:
                keep_evaluation(client, made, project)
            _describe(client, made, project, info, tags, has_picture=bool(metrics))
        elif metrics:  # what made it stays as it was said first
            _judged_again(client, found, project, info, judged)
        made = found or made
        client.set_registered_model_alias(name, CANDIDATE, made.version)
    version = Version(name, int(made.version), run_id, is_new=found is None)
    word = "registered as" if version.is_new else "already registered as"
    Console(highlight=False).print(f"{word} {version.uri}, alias models:/{version.name}@{CANDIDATE}")
    return version


def register_if_wanted(project: Project, *, params: Params) -> Version | None:
    """What follows evaluate by itself: registers unless switched off; a store that is away is only a warning."""
    if not (params.registry.register_after_evaluate and params.tracking.enabled):
        return None
    try:
        return run(project, params=params)
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"warning: {error}", style="yellow", markup=False)
        return None


def find_model(project: Project, *, tracking: Tracking, place: str | None) -> Path:
    """The folder that holds model/, prior/ and refiner/.

    Args:
        place: a folder, a registry URI such as "models:/medgen@candidate", or None for artifacts/.

    Raises:
        UserError: there is no such folder or version, or the store does not answer.
    """
    if place is not None and place.startswith("models:/"):
        return load(place, project, tracking)
    folder = project.model.parent if place is None else Path(place)
    for part in ("model", "prior", "refiner"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder / part}: not found; run `dvc repro` first, or name a folder with model/, prior/ and refiner/ "
                "in it"
            )
    return folder


def fetch_to_judge(project: Project, *, tracking: Tracking, registry: Registry, place: str) -> tuple[Version, Path]:
    """A version, and a folder of runs/ with its model/, prior/ and refiner/ in it, for `medgen evaluate --model`.

    Raises:
        UserError: `place` is no version of the project's registered model, or the store does not answer.
    """
    with answering(project, tracking, "nothing was fetched: start the server first"):
        client, _ = connect(project, tracking)
        version = find(client, registry.model_name, place)
    folder = project.runs / "versions" / f"{version.name}-{version.number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(load(version.uri, project, tracking), folder / "artifacts")
    return version, folder


def take_metrics(project: Project, *, tracking: Tracking, version: Version, folder: Path) -> None:
    """Makes what `medgen evaluate --model` left in a folder of `fetch_to_judge` the version's metrics."""
    judged = Project(project.root, apart=folder)
    metrics, provenance = _metrics(judged, content_hash(judged.model, judged.prior, judged.refiner))
    with answering(project, tracking, f"{version.uri} keeps its metrics: run the same command later"):
        client, _ = connect(project, tracking)
        found = client.get_model_version(version.name, str(version.number))
        _judged_again(client, found, judged, bundle.load_info(judged.model), metric_tags(metrics, provenance))
    Console(highlight=False).print(f"{len(metrics)} metrics are now those of {version.uri}")


def _run_of(project: Project, tracking: Tracking, info: BundleInfo) -> tuple[RunRecord, str]:
    """The record and the MLflow run that trained the model; a record begun here where the training's is absent."""
    scratch = project.runs / info.run
    if read_run(scratch) is None:  # the model came from a DVC remote
        with Tracker.open(scratch, tracking, project, f"{info.model.name}-{info.run[:6]}") as tracker:
            # of this machine, not of the one that trained it
            unknown = dict.fromkeys(("git.commit", "git.branch", "git.dirty", "data.md5"), "unknown")
            tracker.tags(lineage(project) | unknown | {"dataset.fingerprint": info.dataset})
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


def _origin(project: Project, record: RunRecord, info: BundleInfo, provenance: Mapping[str, Any]) -> dict[str, str]:
    """Where a version comes from: what its training says, with the commit of the last stage and changes in any.

    The hash of the training's own parameters is left out: the version has that of all.
    """
    tags = {key: value for key, value in record.tags.items() if not key.startswith("mlflow.") and key != PARAMS_TAG}
    stages = [tags]
    if _prior_name(project) is not None:
        stages.append(_origin_of(project, info, PRIOR_ORIGIN, project.prior / "prior.json").get("lineage", {}))
    if _refiner_params(project) is not None:
        stages.append(_origin_of(project, info, REFINER_ORIGIN, project.refiner / "refiner.json").get("lineage", {}))
    if provenance:
        stages.append(provenance["lineage"])
    commits = [stage.get("git.commit", "unknown") for stage in stages]
    changes = {stage.get("git.dirty", "unknown") for stage in stages}
    tags["git.commit"] = "unknown" if "unknown" in commits else commits[-1]
    tags["git.dirty"] = next((state for state in ("true", "unknown") if state in changes), "false")
    return tags | {"run": info.run, "dataset.fingerprint": info.dataset}


def _made_with(project: Project, params: Params, info: BundleInfo, provenance: Mapping[str, Any]) -> Params:
    """The parameters that made what is registered: the file may have changed since, or `--set` overruled it."""
    plain = params.model_dump(mode="json")
    training = project.runs / info.run / "params.json"
    if training.is_file():
        plain |= json.loads(training.read_text(encoding="utf-8"))
    if prior := _origin_of(project, info, PRIOR_ORIGIN, project.prior / "prior.json").get("prior"):
        plain["prior"] = prior
    plain["refiner"] = _refiner_params(project) or {**plain["refiner"], "enabled": False}
    if provenance:
        plain["evaluate"] = provenance["evaluate"]
    extractor = project.features / "extractor.json"
    if extractor.is_file():
        plain["features"] = json.loads(extractor.read_text(encoding="utf-8")).get("features", plain["features"])
    own = {"model": info.model.model_dump(mode="json"), "preprocess": info.preprocess.model_dump(mode="json")}
    return Params.model_validate(plain | own)


def _origin_of(project: Project, info: BundleInfo, note: str, made: Path) -> dict[str, Any]:
    """The run's file `note`, in which a stage recorded how it wrote `made`; {} for a file from elsewhere."""
    path = project.runs / info.run / note
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["sha256"] == hash_file(made) else {}


def _judged_again(
    client: "MlflowClient", version: "ModelVersion", project: Project, info: BundleInfo, judged: Mapping[str, str]
) -> None:
    """Replaces the metrics, per-image values and description of a registered version."""
    kept = {key: value for key, value in version.tags.items() if not key.startswith((*METRIC_GROUPS, "evaluated."))}
    if EVALUATION in judged:  # even if the tag is the same: the values may be damaged, or were never sent
        keep_evaluation(client, version, project)
    _describe(client, version, project, info, {**kept, **judged}, has_picture=True)


def _describe(
    client: "MlflowClient",
    version: "ModelVersion",
    project: Project,
    info: BundleInfo,
    tags: Mapping[str, str],
    has_picture: bool,
) -> None:
    """A version's tags, description and picture."""
    assert version.source
    has_picture = has_picture and mlflow_ui.picture_of(project).exists()
    text = mlflow_ui.about_version(
        version.name,
        int(version.version),
        info,
        _prior_name(project),
        _refiner_params(project) is not None,
        tags,
        has_picture,
    )
    if not set_tags(client, version, tags) and version.description == text:
        return
    if has_picture:
        with tempfile.TemporaryDirectory() as folder:
            client.log_model_artifact(
                version.source.removeprefix("models:/"), str(mlflow_ui.preview(project, Path(folder)))
            )
    if is_ours(version.description, version.tags):
        client.update_model_version(version.name, version.version, text)
        set_tags(client, version, marked(text))


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
    has_picture = mlflow_ui.picture_of(project).exists()
    written = record.tags.get(NOTE, "")
    made = written.partition("\n\n")[0]  # what follows is of an earlier judgement
    is_refined = _refiner_params(project) is not None
    text = mlflow_ui.about_run(made, _prior_name(project), is_refined, metric_tags(metrics), run_id, has_picture)
    if text == written:
        return
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, record.name) as tracker:
        if has_picture:
            tracker.artifact(mlflow_ui.preview(project, scratch / mlflow_ui.FOLDER), mlflow_ui.FOLDER)
        tracker.note(text)


def _prior_name(project: Project) -> str | None:
    """The prior's name; None where a model needs none."""
    name: str | None = json.loads((project.prior / "prior.json").read_text(encoding="utf-8"))["name"]
    return name


def _refiner_params(project: Project) -> dict[str, Any] | None:
    """The parameters of the refiner; None where there is none."""
    found = json.loads((project.refiner / "refiner.json").read_text(encoding="utf-8"))
    return found["refiner"] if found["enabled"] else None


def _metrics(project: Project, content: str) -> tuple[dict[str, float], dict[str, Any]]:
    """metrics.json and provenance.json of the reports, where they belong together, and to this content.

    Else nothing: git keeps metrics.json, so another commit's may stand there, and not provenance.json.
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
