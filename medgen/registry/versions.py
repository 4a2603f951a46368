"""Registered versions: asking the store for them, and fetching one."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.tracking.mirror import REFUSALS, connect, first_line, load_mlflow, store_uri, unreachable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"  # aliases
METRIC_GROUPS = ("reconstruction/", "latent/", "generation/", "privacy/", "segmentation/", "run/")


@dataclass(frozen=True)
class Version:
    """A registered version."""

    name: str
    number: int
    run_id: str  # MLflow run that trained it
    tags: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0  # seconds since 1970
    is_new: bool = False  # made by this very call: no version held the same model and prior

    @property
    def uri(self) -> str:
        """What `medgen generate --model` and `mlflow.pyfunc.load_model` take."""
        return f"models:/{self.name}/{self.number}"

    @property
    def metrics(self) -> dict[str, float]:
        """What it was judged by: the keys of metrics.json."""
        return {name: float(text) for name, text in self.tags.items() if name.startswith(METRIC_GROUPS)}


def all_versions(client: "MlflowClient", name: str) -> list[Version]:
    """Every version of a registered model, oldest first; none where there is no such model."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        if not (token := page.token):
            return sorted((_version(one) for one in found), key=lambda version: version.number)


def aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    """Alias to version number; empty where there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _version(found: "ModelVersion") -> Version:
    created = found.creation_timestamp / 1000
    return Version(found.name, int(found.version), found.run_id or "", dict(found.tags), created)


@contextmanager
def answering(project: Project, tracking: Tracking, otherwise: str) -> Iterator[None]:
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


def load(uri: str, project: Project, tracking: Tracking) -> Path:
    """Fetches a registered version; its folder holds model/ and prior/.

    Raises:
        UserError: there is no such version, or the store does not answer.
    """
    folder = tempfile.mkdtemp(prefix="medgen-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with answering(project, tracking, "the model cannot be fetched: start the server first"):
        client, _ = connect(project, tracking)
        import mlflow
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        store = store_uri(project, tracking)
        mlflow.set_tracking_uri(store)  # whatever registry the call names, MLflow 3.17 looks models:/ up in its own
        try:
            return Path(download_artifacts(f"{uri}/artifacts", dst_path=folder, tracking_uri=store, registry_uri=store))
        except MlflowException as error:
            if error.error_code not in REFUSALS | {"RESOURCE_DOES_NOT_EXIST"}:
                raise
            known = ", ".join(f"models:/{model.name}" for model in client.search_registered_models()) or "none"
            raise UserError(
                f"--model {uri}: no such version; expected models:/NAME@{CANDIDATE} or models:/NAME/1. "
                f"Registered: {known}"
            ) from None
