"""Registered versions: find them in MLflow's registry, download them, and update their tags."""

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
from medgen.console import warn
from medgen.errors import UserError
from medgen.metrics.segmentation import update_old_keys
from medgen.models import bundle
from medgen.priors.refiner import save_disabled
from medgen.registry.signatures import KEY_VARIABLE, SIGNATURE_TAG, TRUSTED_KEYS, is_trusted
from medgen.registry.verification import FILES_TAG, HASHES, LIST, check_files, signed_text
from medgen.tracking.mlflow_sync import (
    REFUSALS,
    connect,
    load_mlflow,
    mlflow_store,
    store_error,
    store_uri,
    summarize_error,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"  # aliases
CONTENT_TAG, PARAMS_TAG = "medgen.content", "params.fingerprint"  # hashes of the files and the parameters
EVALUATED_ON, EVALUATED_WITH = "evaluated.dataset", "evaluated.extractor"  # tags: hashes of the dataset and extractor
EVALUATION_DIGEST = "evaluated.values"  # tag: SHA-256 of the per-image values stored with the version
METRIC_GROUPS = (
    *("reconstruction/", "refined/", "latent/", "decoded/", "generation/", "privacy/"),
    *("utility/", "fairness/", "segmentation/", "run/"),
)
_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
_NOT_FOUND = REFUSALS | {"RESOURCE_DOES_NOT_EXIST"}  # MLflow's error codes for a version that does not exist


class NoSuchVersion(UserError):
    """The registry has no such version, or the version has no such part."""


@dataclass(frozen=True)
class Version:
    """A registered version."""

    name: str
    number: int
    run_id: str  # MLflow run that trained it
    tags: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0  # seconds since 1970
    is_new: bool = False  # created by this call; False if a version with the same content existed

    @property
    def uri(self) -> str:
        """The URI for `medgen generate --model` and `mlflow.pyfunc.load_model`."""
        return f"models:/{self.name}/{self.number}"

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of its evaluation, with the keys of metrics.json; tags that are no finite number are left out."""
        values = {name: _to_float(text) for name, text in self.tags.items() if name.startswith(METRIC_GROUPS)}
        return update_old_keys({name: value for name, value in values.items() if math.isfinite(value)})


def all_versions(client: "MlflowClient", name: str) -> dict[int, Version]:
    """All versions of a registered model by number, oldest first; empty if there is no such model."""
    page = client.search_model_versions(f"name = '{name}'")
    found = list(page)
    while page.token:
        page = client.search_model_versions(f"name = '{name}'", page_token=page.token)
        found += page
    versions = {
        int(one.version): Version(
            one.name, int(one.version), one.run_id or "", dict(one.tags), created=one.creation_timestamp / 1000
        )
        for one in found
    }
    return dict(sorted(versions.items()))


def find_version(client: "MlflowClient", name: str, reference: str | int) -> Version:
    """The version with a number or alias of the registered model `name`, or with a URI of any registered model.

    Raises:
        NoSuchVersion: it does not exist, or `reference` is not of the form models:/NAME@ALIAS or models:/NAME/NUMBER.
    """
    text = str(reference)
    uri = text if "/" in text else f"models:/{name}{'/' if text.isdecimal() else '@'}{text}"
    if (match := _URI.fullmatch(uri)) is None:
        raise _no_such_version(client, uri)
    number = int(match[3]) if match[3] else get_aliases(client, match[1]).get(match[2], 0)
    found = all_versions(client, match[1]).get(number)
    if found is None:
        raise _no_such_version(client, uri)
    return found


def metric_tags(metrics: Mapping[str, float], provenance: Mapping[str, Any]) -> dict[str, str]:
    """Metrics as tags, with tags that say what they were measured with, from provenance.json."""
    tags = {key: f"{value:.6g}" for key, value in metrics.items()}
    if not metrics or not provenance:
        return tags
    if "evaluation" in provenance:
        tags[EVALUATION_DIGEST] = provenance["evaluation"]
    if extractors := provenance["extractors"]:
        tags[EVALUATED_WITH] = extractors["domain"]["sha256"]
    return tags | {EVALUATED_ON: provenance["dataset"]}


def update_tags(client: "MlflowClient", version: "ModelVersion", tags: Mapping[str, str]) -> bool:
    """Set tags of a version; new metrics replace all earlier ones. Return True if a tag changed.

    Earlier `privacy/` and `utility/` metrics stay if the new metrics have none: the first compare samples with the
    version's own train images, which a later evaluation on another dataset does not have, and the second are those of a
    stage of their own.
    """
    changed = {key: value for key, value in tags.items() if version.tags.get(key) != value}
    stale: set[str] = set()
    if any(key.startswith(METRIC_GROUPS) for key in tags):
        kept = tuple(one for one in ("privacy/", "utility/") if not any(key.startswith(one) for key in tags))
        earlier = {key for key in version.tags if key.startswith(METRIC_GROUPS)}
        stale = {key for key in earlier if not key.startswith(kept)} - tags.keys()
    # The tags that say what the metrics were measured with are deleted first and set last, so that a crash in between
    # leaves a version that counts as not evaluated, and not a mixture of two evaluations.
    measured_with = {EVALUATED_ON, EVALUATED_WITH, EVALUATION_DIGEST}
    if stale or any(key.startswith(METRIC_GROUPS) for key in changed):
        stale |= measured_with & version.tags.keys()
        changed |= {key: tags[key] for key in measured_with & tags.keys()}
    for key in sorted(stale, key=lambda key: key not in measured_with):
        client.delete_model_version_tag(version.name, version.version, key)
    for key in sorted(changed, key=lambda key: key in measured_with):
        client.set_model_version_tag(version.name, version.version, key, changed[key])
    return bool(changed or stale)


def get_registered_model(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    """The registered model, or None if there is none of this name."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def get_aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    """Version numbers by alias; empty if there is no such model."""
    found = get_registered_model(client, name)
    return {alias: int(number) for alias, number in found.aliases.items()} if found else {}


def _to_float(text: str) -> float:
    """The number, or NaN if the text is none: anyone may edit a tag."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@contextmanager
def mlflow_client(project: Project, tracking: Tracking, consequence: str) -> Iterator[tuple["MlflowClient", str]]:
    """Yield a client and the experiment's ID; errors of MLflow and the network become a UserError.

    Args:
        consequence: the end of its message: what was not done, and what to do next.
    """
    load_mlflow(tracking)
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield connect(project, tracking)
    except (MlflowException, RequestException, ConnectionError) as error:
        if isinstance(error, MlflowException) and error.error_code in REFUSALS:
            raise UserError(f"MLflow refused: {summarize_error(error)}") from error
        raise store_error(project, tracking, error, consequence) from error


def download_version(uri: str, project: Project, tracking: Tracking) -> Path:
    """Download a registered version to a temporary folder with model/, prior/, refiner/ and params.json.

    A version that was registered before medgen had refiners gets a refiner/ which says that there is none.

    Raises:
        NoSuchVersion: there is no such version.
        UserError: the MLflow store does not answer, or a file is not the one that was registered.
    """
    folder = tempfile.mkdtemp(prefix="medgen-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = download_checked(uri, "artifacts", Path(folder), project, tracking)
    if not (found / "refiner").exists():
        save_disabled(found / "refiner", bundle.digest(found / "model"))
    return found


def download_checked(uri: str, subfolder: str, folder: Path, project: Project, tracking: Tracking) -> Path:
    """As `download_files`, and check the files against those that were registered.

    Raises:
        NoSuchVersion: there is no such version, or it has no such subfolder.
        UserError: the MLflow store does not answer, or a file is not the one that was registered.
    """
    with mlflow_client(project, tracking, "the model cannot be downloaded: start the server first") as (client, _):
        version = find_version(client, "", uri)
    files = download_files(version.uri, subfolder, folder / "files", project, tracking)
    digest, signature = version.tags.get(FILES_TAG), version.tags.get(SIGNATURE_TAG, "")
    if not is_trusted(project, signed_text(version.name, digest or ""), signature):
        raise UserError(
            f"{version.uri}: no signature by a key of {TRUSTED_KEYS}, so it is not used. Add the key of "
            f"whoever registered it, or delete the version in MLflow and register the model with {KEY_VARIABLE} set"
        )
    if digest is None:
        warn(f"{version.uri}: its files were not checked: the medgen that registered it recorded no hashes")
    else:
        hashes = download_files(version.uri, HASHES, folder / HASHES, project, tracking)
        check_files(files, subfolder, hashes / Path(LIST).name, digest, version.uri)
    return files


def download_files(uri: str, subfolder: str, folder: Path, project: Project, tracking: Tracking) -> Path:
    """Copy one subfolder of a registered version ("" for all of it) into `folder` and return its path there.

    The files are not checked; `download_checked` does.

    Raises:
        NoSuchVersion: there is no such version, or it has no such subfolder.
        UserError: the MLflow store does not answer.
    """
    with mlflow_client(project, tracking, "the model cannot be downloaded: start the server first") as (client, _):
        from mlflow.artifacts import download_artifacts, list_artifacts
        from mlflow.exceptions import MlflowException

        store = store_uri(project, tracking)
        source = f"{uri}/{subfolder}" if subfolder else uri
        try:
            with mlflow_store(store):  # MLflow 3.17 resolves models:/ in its global store, whatever registry_uri says
                # Listed first: for a missing file a server reports INTERNAL_ERROR, as for a broken download.
                if not list_artifacts(artifact_uri=source, tracking_uri=store):
                    raise _no_such_version(client, source)
                return Path(download_artifacts(source, dst_path=str(folder), tracking_uri=store, registry_uri=store))
        except MlflowException as error:
            if error.error_code not in _NOT_FOUND:
                raise
            raise _no_such_version(client, uri) from None


def _no_such_version(client: "MlflowClient", uri: str) -> NoSuchVersion:
    """The error for a URI that names no version or no part of one; it lists the registered models and aliases."""
    expected = f"expected models:/NAME@{CANDIDATE} or models:/NAME/1"
    if uri.endswith(CHAMPION):
        expected = "run `medgen promote` to make the candidate champion, or give another alias or number"
    return NoSuchVersion(f"{uri}: no such version; {expected}. {list_registered(client)}")


def list_registered(client: "MlflowClient") -> str:
    """The registered models with their aliases, for error messages."""
    registered = []
    for model in client.search_registered_models():
        listed = ", ".join(f"@{alias} is {number}" for alias, number in sorted(model.aliases.items()))
        registered.append(f"models:/{model.name} ({listed})")
    return f"Registered: {', '.join(registered) or 'none; run `medgen register` first'}"
