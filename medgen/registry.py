"""A trained model and its prior become a registered version, in the MLflow run that trained them.

medgen register     medgen generate --model models:/medgen@candidate --n 25 --out outputs/first
"""

import atexit
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from filelock import Timeout
from rich.console import Console

from medgen import bundle
from medgen.bundle import BundleInfo
from medgen.config import Project, Registry, Tracking
from medgen.errors import UserError
from medgen.models import MODELS
from medgen.tracking import RunRecord, Tracker, lineage, mirror_run, read_run
from medgen.tracking.mirror import REFUSALS, connect, first_line, load_mlflow, store_uri, unreachable, without_password

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

ALIAS = "candidate"
# by what the model is trained towards; MLflow wants the file, not a module
PYFUNC = {"image": Path(__file__).with_name("pyfunc.py"), "mask": Path(__file__).with_name("pyfunc_masks.py")}
CONTENT_TAG = "medgen.content"
# What the code imports that loads and generates (tests/test_registry.py holds it to that).
REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "pandas", "pydantic", "ruamel.yaml")
MASK_REQUIREMENTS = ("opencv-python-headless",)  # besides: what turns a picture into the model's input


@dataclass(frozen=True)
class Version:
    """A registered version."""

    name: str
    number: int
    run_id: str  # MLflow run that trained it
    is_new: bool  # False: the same model and prior were registered before

    @property
    def uri(self) -> str:
        """What `medgen generate --model` and `mlflow.pyfunc.load_model` take."""
        return f"models:/{self.name}/{self.number}"


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
    with _answering(project, tracking, "nothing is registered: run `medgen register` later"):
        client, _ = connect(project, tracking)  # first of all: a store that is away ends it here
        record, run_id = _run_of(project, tracking, info)
        content = _content_hash(project.model, project.prior)
        number = _registered(client, registry.model_name, content)
        is_new = number is None
        if number is None:
            number = _register(client, project, tracking, registry, info, run_id, content)
        _describe(client, registry.model_name, number, project, record, info)
        client.set_registered_model_alias(registry.model_name, ALIAS, str(number))
    version = Version(registry.model_name, number, run_id, is_new)
    word = "registered as" if is_new else "already registered as"
    Console(highlight=False).print(f"{word} {version.uri}, alias models:/{version.name}@{ALIAS}")
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


def load(uri: str, project: Project, tracking: Tracking) -> Path:
    """Fetches a registered version; its folder holds model/ and prior/.

    Raises:
        UserError: there is no such version, or the store does not answer.
    """
    folder = tempfile.mkdtemp(prefix="medgen-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with _answering(project, tracking, "the model cannot be fetched: start the server first"):
        client, _ = connect(project, tracking)
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        store = store_uri(project, tracking)
        try:
            return Path(download_artifacts(f"{uri}/artifacts", dst_path=folder, tracking_uri=store, registry_uri=store))
        except MlflowException as error:
            if error.error_code not in REFUSALS | {"RESOURCE_DOES_NOT_EXIST"}:
                raise
            known = ", ".join(f"models:/{model.name}" for model in client.search_registered_models()) or "none"
            raise UserError(
                f"--model {uri}: no such version; expected models:/NAME@{ALIAS} or models:/NAME/1. Registered: {known}"
            ) from None


def ui(project: Project, *, tracking: Tracking, port: int = 5000) -> NoReturn:
    """Shows MLflow's page on this project's store at 127.0.0.1:`port`; this process becomes the server.

    Raises:
        UserError: the store is a server with a page of its own, or the port is taken.
    """
    uri = store_uri(project, tracking)
    if urlsplit(uri).scheme in ("http", "https"):
        raise UserError(f"tracking.uri: {without_password(uri)} is a server with its own page; open it in a browser")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"--port {port}: something answers there already; choose another port")
    connect(project, tracking)  # an empty project gets its store first
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(project.root / "mlartifacts")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    # Without its job runner the server is 2 processes in place of 15.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    Console(highlight=False).print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)")
    os.chdir(project.root)
    os.execve(sys.executable, command, environment)  # in place of this process: signals reach the server


@contextmanager
def _answering(project: Project, tracking: Tracking, otherwise: str) -> Iterator[None]:
    """Turns what MLflow and the network raise into one message for the user."""
    load_mlflow(tracking)
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except MlflowException as error:
        if error.error_code in REFUSALS:
            raise UserError(f"MLflow refused: {first_line(error)}") from error
        raise unreachable(project, tracking, error, otherwise) from error
    except RequestException as error:
        raise unreachable(project, tracking, error, otherwise) from error


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


def _register(
    client: "MlflowClient",
    project: Project,
    tracking: Tracking,
    registry: Registry,
    info: BundleInfo,
    run_id: str,
    content: str,
) -> int:
    """Logs the model with code, model/ and prior/ to its run, and makes it a version."""
    import mlflow

    makes = MODELS[info.model.name].target
    requirements = REQUIREMENTS if makes == "image" else (*REQUIREMENTS, *MASK_REQUIREMENTS)
    mlflow.set_tracking_uri(store_uri(project, tracking))
    try:
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(PYFUNC[makes]),
                artifacts={"model": str(project.model), "prior": str(project.prior)},
                # the whole package: a version loads where medgen is not installed
                code_paths=[str(Path(__file__).parent)],
                signature=_signature(info) if makes == "image" else _mask_signature(info),
                input_example=_example() if makes == "image" else _mask_example(info),
                pip_requirements=[f"{name}=={_public_version(name)}" for name in requirements],
                registered_model_name=registry.model_name,
                tags={CONTENT_TAG: content},
            )
    except BaseException:
        client.set_terminated(run_id, "FINISHED")  # leaving start_run said FAILED, but the training is none the worse
        raise
    return int(logged.registered_model_version)


def _signature(info: BundleInfo) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    channels, height, width = info.image_shape
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.long, "n"),
                ColSpec(DataType.string, "label", required=False),
                ColSpec(DataType.long, "seed", required=False),
            ]
        ),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, height, width, channels))]),
    )


def _example() -> Any:
    """Without a label: it may be left out, and a prior or model that tells no classes apart refuses one."""
    import pandas as pd  # type: ignore[import-untyped]

    return pd.DataFrame({"n": [2], "seed": [0]})


def _mask_signature(info: BundleInfo) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    channels, height, width = info.image_shape
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, channels))]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, height, width, 1))]),
    )


def _mask_example(info: BundleInfo) -> Any:
    import numpy as np

    channels, height, width = info.image_shape
    return np.zeros((1, height, width, channels), np.uint8)


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
        "Input: n, label (optional), seed (optional)."
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


def _content_hash(*folders: Path) -> str:
    """SHA-256 of names and bytes of all files."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _public_version(name: str) -> str:
    """The version without a local part such as +cu128, which no registry has."""
    return importlib.metadata.version(name).partition("+")[0]
