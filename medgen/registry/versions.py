"""Registered versions: asking the store for them, and fetching one."""

import atexit
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.metrics.segmentation import with_foreground
from medgen.models import bundle
from medgen.priors.refiner import save_none
from medgen.tracking.mlflow_sync import REFUSALS, connect, first_line, load_mlflow, mlflow_store, store_uri, unreachable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"  # aliases
_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
_UNKNOWN = REFUSALS | {"RESOURCE_DOES_NOT_EXIST"}  # what MLflow says of versions that are not there
JUDGED_ON, JUDGED_BY = "evaluated.dataset", "evaluated.extractor"  # tags: what its metrics were measured with
EVALUATION = "evaluated.values"  # tag: SHA-256 of the per-image values that are kept with the version
METRIC_GROUPS = ("reconstruction/", "latent/", "generation/", "privacy/", "segmentation/", "run/")


class NoSuchVersion(UserError):
    """A version, or the part of one that was asked for, is not in the registry."""


@dataclass(frozen=True)
class Version:
    """A registered version."""

    name: str
    number: int
    run_id: str  # MLflow run that trained it
    tags: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0  # seconds since 1970
    is_new: bool = False  # made by this very call: no version held the same content

    @property
    def uri(self) -> str:
        """What `medgen generate --model` and `mlflow.pyfunc.load_model` take."""
        return f"models:/{self.name}/{self.number}"

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of its evaluation, with the keys of metrics.json."""
        found = {name: _number(text) for name, text in self.tags.items() if name.startswith(METRIC_GROUPS)}
        return with_foreground({name: value for name, value in found.items() if math.isfinite(value)})


def all_versions(client: "MlflowClient", name: str) -> list[Version]:
    """Every version of a registered model, oldest first; none where there is no such model."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        if not (token := page.token):
            return sorted((_version(one) for one in found), key=lambda version: version.number)


def find(client: "MlflowClient", name: str, reference: str | int) -> Version:
    """One version: by its number or alias, of the registered model `name`; or by URI, of any.

    Raises:
        UserError: there is none, or `reference` is no models:/NAME@ALIAS or models:/NAME/NUMBER.
    """
    text = str(reference)
    uri = text if "/" in text else f"models:/{name}{'/' if text.isdecimal() else '@'}{text}"
    if (named := _URI.fullmatch(uri)) is None:
        raise _no_such_version(client, uri)
    number = int(named[3]) if named[3] else aliases(client, named[1]).get(named[2])
    known = {version.number: version for version in all_versions(client, named[1])}
    if number not in known:
        raise _no_such_version(client, uri)
    return known[number]


def metric_tags(metrics: Mapping[str, float], provenance: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Metrics as tags, and with what they were measured: provenance.json; nothing where there are none."""
    tags = {key: f"{value:.6g}" for key, value in metrics.items()}
    if not metrics or provenance is None:
        return tags
    extractors = {of: found["sha256"] for of, found in provenance["extractors"].items()}
    if "evaluation" in provenance:
        tags[EVALUATION] = provenance["evaluation"]
    return tags | {JUDGED_ON: provenance["dataset"], **({JUDGED_BY: extractors["domain"]} if extractors else {})}


def set_tags(client: "MlflowClient", version: "ModelVersion", tags: Mapping[str, str]) -> bool:
    """Sets a version's tags; metrics take the place of all it had. Whether anything was new.

    `privacy/` stays where it is not among the new ones: how near samples come to train images is measured against
    those, and a later evaluation on other data does not have them.
    """
    news = {key: value for key, value in tags.items() if version.tags.get(key) != value}
    stale: set[str] = set()
    if any(key.startswith(METRIC_GROUPS) for key in tags):
        stays = () if any(key.startswith("privacy/") for key in tags) else ("privacy/",)
        had = {key for key in version.tags if key.startswith(METRIC_GROUPS)}
        stale = {key for key in had if not key.startswith(stays)} - tags.keys()
    judged = {JUDGED_ON, JUDGED_BY, EVALUATION}
    if stale or any(key.startswith(METRIC_GROUPS) for key in news):
        stale |= judged & version.tags.keys()  # first to go and last to come: a kill leaves no mixture that looks whole
        news |= {key: tags[key] for key in judged & tags.keys()}
    for key in sorted(stale, key=lambda key: key not in judged):
        client.delete_model_version_tag(version.name, version.version, key)
    for key in sorted(news, key=lambda key: key in judged):
        client.set_model_version_tag(version.name, version.version, key, news[key])
    return bool(news or stale)


def registered_model(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    """The registered model, or None where there is none of the name."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    """Alias to version number; empty where there is no such model."""
    found = registered_model(client, name)
    return {alias: int(number) for alias, number in found.aliases.items()} if found else {}


def _number(text: str) -> float:
    """NaN for what is none: anyone may edit a tag."""
    try:
        return float(text)
    except ValueError:
        return math.nan


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
    """Fetches a registered version; its folder holds model/, prior/, refiner/ and params.json.

    A version of a medgen without refiners gets a refiner/ that says that there is none.

    Raises:
        UserError: there is no such version, or the store does not answer.
    """
    folder = tempfile.mkdtemp(prefix="medgen-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = fetch(uri, "artifacts", Path(folder), project, tracking)
    if not (found / "refiner").exists():
        save_none(found / "refiner", bundle.digest(found / "model"))
    return found


def fetch(uri: str, part: str, folder: Path, project: Project, tracking: Tracking) -> Path:
    """Copies one part of a registered version ("": all of it) into `folder` and returns its path there.

    Raises:
        NoSuchVersion: there is no such version, or it has no such part.
        UserError: the store does not answer.
    """
    with answering(project, tracking, "the model cannot be fetched: start the server first"):
        client, _ = connect(project, tracking)
        from mlflow.artifacts import download_artifacts, list_artifacts
        from mlflow.exceptions import MlflowException

        store = store_uri(project, tracking)
        place = f"{uri}/{part}" if part else uri
        try:
            with mlflow_store(store):  # whatever registry the call names, MLflow 3.17 looks models:/ up in its own
                # a server says INTERNAL_ERROR of a download that it does not have, as of one that broke off
                if not list_artifacts(artifact_uri=place, tracking_uri=store):
                    raise _no_such_version(client, place)
                return Path(download_artifacts(place, dst_path=str(folder), tracking_uri=store, registry_uri=store))
        except MlflowException as error:
            if error.error_code not in _UNKNOWN:
                raise
            raise _no_such_version(client, uri) from None


def _no_such_version(client: "MlflowClient", what: str) -> "NoSuchVersion":
    """The error for `what`, a URI that names no version or part of one; lists those there are."""
    registered = []
    for model in client.search_registered_models():
        called = ", ".join(f"@{alias} is {number}" for alias, number in sorted(model.aliases.items()))
        registered.append(f"models:/{model.name} ({called})")
    expected = f"models:/NAME@{CANDIDATE} or models:/NAME/1"
    if what.endswith(CHAMPION):
        expected = "a champion: `medgen promote` makes the candidate one, or name another alias or number"
    known = ", ".join(registered) or "none; run `medgen register` first"
    return NoSuchVersion(f"{what}: no such version; expected {expected}. Registered: {known}")
