"""Send history.jsonl to an MLflow run. Only this module and the registry import MLflow.

Sending an event twice has the same result as sending it once: MLflow merges equal metric points, and the names of
images and artifacts are derived from their content. So a process that is killed after it sends an event and before it
saves the offset does no harm.
"""

import getpass
import hashlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from medgen.config import Project, Tracking, without_credentials
from medgen.console import warn
from medgen.errors import UserError
from medgen.io import write_atomic
from medgen.tracking.history import HISTORY, Event, FactKey, facts, read
from medgen.tracking.mlflow_descriptions import (
    EXPERIMENT_DESCRIPTION,
    EXPERIMENT_VIEW,
    HASH_TAG,
    NOTE_TAG,
    VIEW_HASH_TAG,
    VIEW_TAG,
    hash_tags,
    is_replaceable,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, Run, RunTag
    from mlflow.tracking import MlflowClient

STATE_FILE = "mirror.json"  # in a run's folder: MLflow run and how much of history.jsonl it has received
SENDING = "mirror.lock"  # in a run's folder: held while the run is sent
SENDING_SECONDS = 30.0  # enough for a stopped `send` to end its request
BATCHED = {"params", "tags", "metrics", "system"}
BATCH_ENTITIES = 500
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # MLflow will never accept this event: do not send it again
# Metrics of the finished model, not of an epoch: sent as step 0, because MLflow draws a bar chart of runs only for
# metrics that have nothing but step 0.
FINAL_PREFIXES = (
    *("reconstruction/", "latent/", "generation/", "privacy/", "utility/", "fairness/", "segmentation/"),
    *("refined/", "decoded/", "prior/", "refiner/", "run/num_"),
)
# Values that other metrics are compared with, and intervals: not sent, as they would fill MLflow's lists of metrics.
REFERENCE_SUFFIXES = (
    *("_floor", "_real", "_ci_low", "_ci_high", "_plausible", "_mean_mask"),
    *("/pca_ssim", "/held_out_limit"),
)
ACCESS_ERRORS = {
    "UNAUTHENTICATED": "requires a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and run it again",
    "PERMISSION_DENIED": "denies access to this account, or to this host name of the server (its --allowed-hosts)",
}
MAX_PARAM, MAX_TAG = 6000, 8000  # characters that MLflow stores


class _ChangedFileError(Exception):
    """A recorded file is missing or has changed."""


class MlflowSync:
    """Sends history.jsonl to an MLflow run, starting where the last call of `send` ended."""

    def __init__(self, scratch: Path, tracking: Tracking, project: Project) -> None:
        self._scratch = scratch
        self._tracking = tracking
        self._project = project
        self._client: MlflowClient | None = None
        self._params: dict[str, str] = {}  # those that MLflow has, which it never changes
        state = _read_state(scratch)
        self._store = f"{without_credentials(store_uri(project, tracking))} {tracking.experiment}"
        same_store = state.get("store") == self._store
        self.run_id: str | None = state.get("run_id") if same_store else None
        self._offset: int = state.get("offset", 0) if same_store else 0
        self.num_sent = 0
        self.refused: list[str] = []  # MLflow's reasons
        self.changed: list[str] = []  # files that are missing or not those that were recorded
        self._stopped = False
        self.progress_time = time.monotonic()  # of the last successful call

    @property
    def is_connected(self) -> bool:
        """True if the store answered the last call."""
        return self._client is not None

    def num_pending(self) -> int:
        """The number of events that MLflow has not received."""
        return sum(1 for _ in read(self._scratch / HISTORY, self._offset))

    def send(self) -> None:
        """Send all new events.

        Raises:
            filelock.Timeout: another thread or process is still sending this run after `SENDING_SECONDS`.
            Exception: any error of the store or the network; the events that are not sent stay pending.
        """
        with FileLock(self._scratch / SENDING, timeout=SENDING_SECONDS):
            start = next((event for event, _ in read(self._scratch / HISTORY) if event["kind"] == "run"), None)
            if start is None:
                return  # the process was killed before the record began
            try:
                self._send_new(self._client or self._connect(start))
            except BaseException:
                self._client = None  # the next call looks up store, experiment and run again
                raise

    def warn_unsent(self) -> None:
        """Print which records `send` has left out and why."""
        if self.refused:
            warn(f"MLflow refused {len(self.refused)} records, the first: {self.refused[0]}")
        if self.changed:
            warn(
                f"{self._scratch}: {len(self.changed)} recorded files are gone or have changed, and are not sent to "
                f"MLflow: {', '.join(self.changed)} (expected: the SHA-256 that begins so). An earlier medgen recorded "
                "files in reports/, which later runs replace: run the pipeline again with the parameters in this "
                "folder's params.json to record them"
            )

    def stop(self) -> None:
        """Let a `send` in another thread end after its present request, for another one to continue."""
        self._stopped = True

    def _send_new(self, client: "MlflowClient") -> None:
        batch: list[Event] = []
        size, end = 0, self._offset
        for event, after in read(self._scratch / HISTORY, self._offset):
            batched = event["kind"] in BATCHED
            if not batched or size + len(event["values"]) > BATCH_ENTITIES:
                self._send_batch(client, batch, end)
                batch, size = [], 0
            if self._stopped:
                return
            if batched:
                batch.append(event)
                size += len(event["values"])
            else:
                self._send_single(client, event)
                self._record_sent(1, after)
            end = after
        self._send_batch(client, batch, end)

    def _connect(self, start: Event) -> "MlflowClient":
        load_mlflow(self._tracking)
        self.progress_time = time.monotonic()
        client, experiment = connect(self._project, self._tracking)
        run = self._find_run(client, experiment, start)
        if run.info.run_id != self.run_id:
            self.run_id, self._offset = run.info.run_id, 0
            self._save()
        if run.info.lifecycle_stage == "deleted" and self.num_pending():
            client.restore_run(run.info.run_id)  # the user trains it again
        self._params = dict(run.data.params)
        self._client = client
        self.progress_time = time.monotonic()
        return client

    def _find_run(self, client: "MlflowClient", experiment: str, start: Event) -> "Run":
        """The run that mirror.json names, else one that a process created before it was killed, else a new one."""
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                return client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if (found := _find_by_id(client, experiment, start["id"])) is not None:
            return found
        tags = {"medgen.id": start["id"], "medgen.run": self._scratch.name, "mlflow.source.name": "medgen"}
        tags |= {"mlflow.source.type": "LOCAL", "mlflow.user": current_user()}
        if "parent" in start and (parent := _find_by_id(client, experiment, start["parent"])) is not None:
            tags["mlflow.parentRunId"] = parent.info.run_id
        return client.create_run(experiment, int(start["time"] * 1000), tags, start["name"])

    def _send_batch(self, client: "MlflowClient", events: list[Event], end: int) -> None:
        if not events:
            return
        from mlflow.entities import Metric, Param, RunTag

        entities: list[Metric | Param | RunTag] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for event in events:
            values = event["values"]
            if event["kind"] == "params":
                params |= {name: str(value)[:MAX_PARAM] for name, value in values.items()}
            elif event["kind"] == "tags":
                tags |= {name: value[:MAX_TAG] for name, value in values.items()}
            else:
                when, step = int(event["time"] * 1000), event["step"]
                for name, value in values.items():
                    is_finite = not isinstance(value, str)  # NaN and infinities are text
                    if is_finite and not name.endswith(REFERENCE_SUFFIXES):
                        entities.append(Metric(name, value, when, 0 if name.startswith(FINAL_PREFIXES) else step))
        new = {name: value for name, value in params.items() if name not in self._params}
        # MLflow keeps the first params of a run that continues with other values, such as more epochs: tags show those.
        changed = {name: value for name, value in params.items() if self._params.get(name, value) != value}
        tags |= {f"changed.{name}": value[:MAX_TAG] for name, value in changed.items()}
        entities += [*itertools.starmap(Param, new.items()), *itertools.starmap(RunTag, tags.items())]
        self._log(client, entities)
        self._params |= new
        self._record_sent(len(events), end)

    def _log(self, client: "MlflowClient", entities: "Sequence[Metric | Param | RunTag]") -> None:
        """Send one request; if MLflow refuses it, send each entity alone, to lose only the refused ones."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        assert self.run_id is not None
        metrics = [entity for entity in entities if isinstance(entity, Metric)]
        params = [entity for entity in entities if isinstance(entity, Param)]
        tags = [entity for entity in entities if isinstance(entity, RunTag)]
        try:
            client.log_batch(self.run_id, metrics, params, tags)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            if len(entities) == 1:
                self.refused.append(summarize_error(error))
                return
            for entity in entities:
                self._log(client, [entity])

    def _send_single(self, client: "MlflowClient", event: Event) -> None:
        from mlflow.exceptions import MlflowException

        assert self.run_id is not None
        when = int(event["time"] * 1000)
        try:
            if event["kind"] == "status" and event["status"] == "RUNNING":
                client.update_run(self.run_id, status="RUNNING")
            elif event["kind"] == "status":
                client.set_terminated(self.run_id, event["status"], end_time=when)
            elif event["kind"] == "dataset":
                _log_dataset(client, self.run_id, event)
            elif event["kind"] == "artifact":
                self._log_artifact(client, event)
            elif event["kind"] == "image":
                _log_image(client, self.run_id, event, self._read_file(event))
        except _ChangedFileError as error:
            if not self._is_replaced(event):
                self.changed.append(str(error))
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            self.refused.append(summarize_error(error))

    def _log_artifact(self, client: "MlflowClient", event: Event) -> None:
        assert self.run_id is not None
        content = self._read_file(event)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, PurePosixPath(event["key"]).name)
            path.write_bytes(content)
            client.log_artifact(self.run_id, str(path), event["folder"] or None)

    def _read_file(self, event: Event) -> bytes:
        """The content of an image or artifact as it was recorded."""
        path, expected = self._scratch / str(event["path"]), str(event["sha256"])
        is_inside = path.resolve().is_relative_to(self._project.home.resolve())  # a record may come from elsewhere
        content = path.read_bytes() if is_inside and path.is_file() else b""
        if not is_inside or hashlib.sha256(content).hexdigest() != expected:
            raise _ChangedFileError(f"{os.path.relpath(path)} ({expected[:8]})")
        return content

    def _is_replaced(self, event: Event) -> bool:
        """True if a later record has the same key and step; only its file counts."""
        last: dict[FactKey, Any] = {}
        for each, _ in read(self._scratch / HISTORY):
            last |= facts(each)
        return any(last[key] != content for key, content in facts(event).items())

    def _record_sent(self, count: int, offset: int) -> None:
        self.num_sent += count
        self._offset = offset
        self.progress_time = time.monotonic()
        self._save()

    def _save(self) -> None:
        state = {"store": self._store, "run_id": self.run_id, "offset": self._offset}
        write_atomic(self._scratch / STATE_FILE, json.dumps(state).encode())


def store_error(project: Project, tracking: Tracking, error: Exception, consequence: str) -> UserError:
    """The error message for a store that does not answer or denies access.

    `consequence` says what was not done, and what to do next.
    """
    uri = without_credentials(store_uri(project, tracking))
    denial = ACCESS_ERRORS.get(getattr(error, "error_code", ""))
    if denial:
        return UserError(f"tracking.uri: {uri} {denial}")
    return UserError(f"tracking.uri: {uri} does not answer ({summarize_error(error)}); {consequence}")


def store_uri(project: Project, tracking: Tracking) -> str:
    """The URI of the tracking store; relative SQLite paths are relative to the project's folder.

    MLFLOW_TRACKING_URI replaces tracking.uri if that has its default value.
    """
    uri = tracking.uri
    if uri == Tracking().uri:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{(project.home / path).resolve()}"


@contextmanager
def mlflow_store(uri: str) -> Iterator[None]:
    """Send MLflow's calls without a client to this store within the block, then restore the former one.

    `mlflow.set_tracking_uri` also sets MLFLOW_TRACKING_URI: without the restore, this process would record later
    projects in this store too.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None resets both


def load_mlflow(tracking: Tracking) -> None:
    """Configure MLflow: short timeouts, no telemetry, no log output. Call it before any import of MLflow."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, math.ceil(tracking.timeout_seconds)))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"  # by default each call to a dead server takes 246 s
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_UV_AUTO_DETECT"] = "false"  # otherwise MLflow copies uv.lock into each model
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    import mlflow.tracking  # noqa: F401

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # it logs the traceback of each error that it raises too
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def connect(project: Project, tracking: Tracking) -> tuple["MlflowClient", str]:
    """A client and the ID of the experiment; creates the store and the experiment on first use.

    Raises:
        ConnectionError, mlflow.exceptions.MlflowException: the store does not answer.
    """
    load_mlflow(tracking)
    from mlflow.tracking import MlflowClient

    uri = store_uri(project, tracking)
    path = sqlite_path(uri)
    if uri.startswith("postgresql"):
        check_database(uri, tracking.timeout_seconds)
    if path is None:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return client, _experiment(client, tracking.experiment, None)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # If two processes create the tables at once, both fail and the database is broken.
    with FileLock(f"{path}.lock", timeout=120):
        if not Path(path).exists():
            _create_database(Path(path))
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return client, _experiment(client, tracking.experiment, (project.home / "mlartifacts").resolve().as_uri())


def _create_database(path: Path) -> None:
    """Create MLflow's tables in another file and rename it: what a killed process has begun, MLflow cannot continue."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = path.with_name(f"{path.name}.tmp")
    for left in (temporary, path.with_name(f"{temporary.name}-journal")):
        left.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"sqlite:///{temporary}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)  # type: ignore[no-untyped-call]
    store.engine.dispose()
    os.replace(temporary, path)


def check_database(uri: str, seconds: float) -> None:
    """Connect to a database once: MLflow would try for two minutes.

    Raises:
        ConnectionError: it does not answer within `seconds`, or its driver is not installed.
    """
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(
            uri, poolclass=sqlalchemy.pool.NullPool, connect_args={"connect_timeout": math.ceil(seconds)}
        )
        engine.connect().close()
    except ModuleNotFoundError as error:
        raise ConnectionError(f"{error.name} is not installed; run `uv sync --extra postgres`") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise ConnectionError(str(getattr(error, "orig", error))) from None


def _find_by_id(client: "MlflowClient", experiment: str, identity: str) -> "Run | None":
    """The run that a record of this ID was sent to."""
    found = client.search_runs([experiment], filter_string=f"tags.`medgen.id` = '{identity}'")
    return found[0] if found else None


def _log_dataset(client: "MlflowClient", run_id: str, event: Event) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=event["key"],
        digest=event["fingerprint"][:36],
        source_type="local",
        source=json.dumps({"uri": event["source"]}),
        profile=json.dumps(event["counts"]),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _log_image(client: "MlflowClient", run_id: str, event: Event, content: bytes) -> None:
    """Do what `MlflowClient.log_image` does, with a name derived from the content instead of a random one."""
    from PIL import Image

    series = event["key"].replace("/", "~")
    when = int(event["time"] * 1000)
    name = f"{series}+step+{event['step']}+timestamp+{when}+{event['sha256'][:32]}"
    with tempfile.TemporaryDirectory() as folder, Image.open(io.BytesIO(content)) as image:
        image.save(Path(folder, f"{name}.png"))
        thumbnail = image.convert("RGB")
        thumbnail.thumbnail((256, 256))
        thumbnail.save(Path(folder, f"{name}+compressed.webp"))
        client.log_artifacts(run_id, folder, "images")
    client.set_tag(run_id, "mlflow.loggedImages", "True")


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """The ID of the experiment, which is created with a description and a saved view if it is missing.

    `artifacts` is the URI of the artifact folder of a new experiment; by default it depends on the current directory.
    An old description or view is updated unless a person has edited it or has created the experiment.
    """
    from mlflow.exceptions import MlflowException

    note = {NOTE_TAG: EXPERIMENT_DESCRIPTION, **hash_tags(EXPERIMENT_DESCRIPTION)}
    view = {VIEW_TAG: EXPERIMENT_VIEW, **hash_tags(EXPERIMENT_VIEW, VIEW_HASH_TAG)}
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=note | view)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process created it at the same time
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment: {name!r} was deleted in MLflow; "
            "choose another name, or restore it with `mlflow experiments restore`"
        )
    by_person = HASH_TAG not in found.tags
    for tags, key, hash_tag in ((note, NOTE_TAG, HASH_TAG), (view, VIEW_TAG, VIEW_HASH_TAG)):
        is_current = tags.items() <= found.tags.items()
        if not (by_person or is_current) and is_replaceable(found.tags.get(key), found.tags, hash_tag):
            for tag, value in tags.items():
                client.set_experiment_tag(found.experiment_id, tag, value)
    return str(found.experiment_id)


def _read_state(scratch: Path) -> dict[str, Any]:
    try:
        state = json.loads((scratch / STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}  # everything is sent again, which does no harm
    match state:
        case {"run_id": str() | None, "offset": int()}:
            return dict(state)
    return {}


def sqlite_path(uri: str) -> str | None:
    """The database file of an SQLite URI; None for other URIs."""
    return uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None


def summarize_error(error: Exception) -> str:
    """The first line of an error, shortened."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.rpartition("Caused by ")[2][:200]  # of urllib3's errors only the root cause


def current_user() -> str:
    """The user name for the MLflow server, or that of the account."""
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user in a container may have no name
        return "unknown"
