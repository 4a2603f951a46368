"""MLflow as a mirror of history.jsonl: the only place, with the registry, that imports it.

Sending an event twice leaves MLflow as sending it once (equal metric points fall together, images
and artifacts have names made from their content), so a process killed between sending and noting
that it sent does no harm.
"""

import getpass
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.io import write_atomic
from medgen.tracking.history import HISTORY, Event, read
from medgen.tracking.mlflow_descriptions import EXPERIMENT, MARK, NOTE, is_ours, marked

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

MIRROR = "mirror.json"
BATCHED = {"params", "tags", "metrics", "system"}
BATCH_ENTITIES = 500
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # MLflow will never take this event: do not try again
# What is said of the finished model, not of an epoch. The page draws bars, run beside run, of what it knows at step 0
# only, and a dot on an axis of epochs of anything else.
FINAL = ("reconstruction/", "latent/", "generation/", "privacy/", "segmentation/", "prior/", "refiner/", "run/num_")
NOT_LET_IN = {
    "UNAUTHENTICATED": "asks who you are; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and run it again",
    "PERMISSION_DENIED": "does not allow it: to this account, or under this name of the server (its --allowed-hosts)",
}
MAX_PARAM, MAX_TAG = 6000, 8000  # characters MLflow keeps


class Mirror:
    """Sends history.jsonl to an MLflow run, from where the last sending ended."""

    def __init__(self, scratch: Path, tracking: Tracking, project: Project) -> None:
        self._scratch = scratch
        self._tracking = tracking
        self._project = project
        self._client: MlflowClient | None = None
        self._params: dict[str, str] = {}  # as MLflow has them: it never changes a param
        state = _read_state(scratch)
        self._store = f"{without_password(store_uri(project, tracking))} {tracking.experiment}"
        same_store = state.get("store") == self._store
        self.run_id: str | None = state.get("run_id") if same_store else None
        self._offset: int = state.get("offset", 0) if same_store else 0
        self.num_sent = 0
        self.refused: list[str] = []
        self.progress = time.monotonic()  # when something last went well

    @property
    def is_connected(self) -> bool:
        """Whether the store answered when last asked."""
        return self._client is not None

    def num_pending(self) -> int:
        """Events MLflow has not got yet."""
        return sum(1 for _ in read(self._scratch / HISTORY, self._offset))

    def send(self) -> None:
        """Sends all that is new. Raises whatever the store or the network raises; nothing is lost then."""
        start = next((event for event, _ in read(self._scratch / HISTORY) if event["kind"] == "run"), None)
        if start is None:
            return  # killed before the record began
        try:
            self._send_new(self._client or self._connect(start))
        except BaseException:
            self._client = None  # the next sending looks anew for store, experiment and run
            raise

    def _send_new(self, client: "MlflowClient") -> None:
        batch: list[Event] = []
        size, end = 0, self._offset
        for event, after in read(self._scratch / HISTORY, self._offset):
            if event["kind"] in BATCHED and size + len(event["values"]) <= BATCH_ENTITIES:
                batch.append(event)
                size += len(event["values"])
                end = after
                continue
            self._send_batch(client, batch, end)
            batch, size = [], 0
            if event["kind"] in BATCHED:
                batch, size = [event], len(event["values"])
            else:
                self._send_single(client, event)
                self._note_sent(1, after)
            end = after
        self._send_batch(client, batch, end)

    def _connect(self, start: Event) -> "MlflowClient":
        load_mlflow(self._tracking)
        self.progress = time.monotonic()
        client, experiment = connect(self._project, self._tracking)
        run = self._find_run(client, experiment, start)
        if run.info.run_id != self.run_id:
            self.run_id, self._offset = run.info.run_id, 0
            self._save()
        if run.info.lifecycle_stage == "deleted" and self.num_pending():
            client.restore_run(run.info.run_id)  # the user trains it again
        self._params = dict(run.data.params)
        self._client = client
        self.progress = time.monotonic()
        return client

    def _find_run(self, client: "MlflowClient", experiment: str, start: Event) -> "Run":
        """The run noted in mirror.json, else one made by a process that died before noting it, else a new one."""
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                return client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if (made := _search(client, experiment, start["id"])) is not None:
            return made
        tags = {"medgen.id": start["id"], "medgen.run": self._scratch.name, "mlflow.source.name": "medgen"}
        tags |= {"mlflow.source.type": "LOCAL", "mlflow.user": user()}
        if "parent" in start and (parent := _search(client, experiment, start["parent"])) is not None:
            tags["mlflow.parentRunId"] = parent.info.run_id
        return client.create_run(experiment, int(start["time"] * 1000), tags, start["name"])

    def _send_batch(self, client: "MlflowClient", events: list[Event], end: int) -> None:
        if not events:
            return
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Metric] = []
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
                finite = {name: value for name, value in values.items() if not isinstance(value, str)}
                metrics += [
                    Metric(name, value, when, 0 if name.startswith(FINAL) else step) for name, value in finite.items()
                ]
        new = {name: value for name, value in params.items() if name not in self._params}
        # A run trained on with other values (more epochs, say) keeps its first params and shows the new ones as tags.
        changed = {name: value for name, value in params.items() if self._params.get(name, value) != value}
        tags |= {f"changed.{name}": value[:MAX_TAG] for name, value in changed.items()}
        self._log(client, metrics, [Param(*item) for item in new.items()], [RunTag(*item) for item in tags.items()])
        self._params |= new
        self._note_sent(len(events), end)

    def _log(self, client: "MlflowClient", metrics: list[Any], params: list[Any], tags: list[Any]) -> None:
        """One request; if MLflow refuses it, one for each entity, to lose only what it does not take."""
        from mlflow.exceptions import MlflowException

        assert self.run_id is not None
        try:
            client.log_batch(self.run_id, metrics, params, tags)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            if len(metrics) + len(params) + len(tags) == 1:
                self.refused.append(first_line(error))
                return
            for metric in metrics:
                self._log(client, [metric], [], [])
            for param in params:
                self._log(client, [], [param], [])
            for tag in tags:
                self._log(client, [], [], [tag])

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
                client.log_artifact(self.run_id, str(self._file(event)), event["folder"] or None)
            elif event["kind"] == "image":
                _log_image(client, self.run_id, event, self._file(event))
        except FileNotFoundError as error:
            self.refused.append(str(error))
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            self.refused.append(first_line(error))

    def _file(self, event: Event) -> Path:
        path = (self._scratch / str(event["path"])).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: gone before MLflow had it")
        return path

    def _note_sent(self, count: int, offset: int) -> None:
        self.num_sent += count
        self._offset = offset
        self.progress = time.monotonic()
        self._save()

    def _save(self) -> None:
        state = {"store": self._store, "run_id": self.run_id, "offset": self._offset}
        write_atomic(self._scratch / MIRROR, json.dumps(state).encode())


def unreachable(project: Project, tracking: Tracking, error: Exception, consequence: str) -> UserError:
    """The error for a store that does not answer, or lets nobody in without a word.

    Args:
        project: whose store.
        tracking: where it is.
        error: what MLflow or the network raised.
        consequence: what was not done, and what to do.
    """
    uri = without_password(store_uri(project, tracking))
    refusal = NOT_LET_IN.get(getattr(error, "error_code", ""))
    if refusal:
        return UserError(f"tracking.uri: {uri} {refusal}")
    return UserError(f"tracking.uri: {uri} does not answer ({first_line(error)}); {consequence}")


def store_uri(project: Project, tracking: Tracking) -> str:
    """The tracking store's URI; relative sqlite paths are in the project's folder.

    MLFLOW_TRACKING_URI takes the place of tracking.uri where the params file leaves it at its default.
    """
    uri = tracking.uri
    if uri == Tracking().uri:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or uri
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{(project.root / path).resolve()}"


@contextmanager
def mlflow_store(uri: str) -> Iterator[None]:
    """Leads MLflow's own calls, those without a client, to this store within the block; then restores the former one.

    `mlflow.set_tracking_uri` alone also sets MLFLOW_TRACKING_URI for good: the next project that this process records
    would go to this store too.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None takes both back


def load_mlflow(tracking: Tracking) -> None:
    """Prepares MLflow for use: calls that end soon, no telemetry, no chatter. Call before importing it."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, math.ceil(tracking.timeout_seconds)))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"  # by default a dead server holds each call for 246 s
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_UV_AUTO_DETECT"] = "false"  # else uv.lock is copied into each model
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    import mlflow.tracking  # noqa: F401

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(project: Project, tracking: Tracking) -> tuple["MlflowClient", str]:
    """A client and the experiment's id; makes the store and the experiment on first use.

    Raises:
        mlflow.exceptions.MlflowException: the store does not answer.
    """
    load_mlflow(tracking)
    from mlflow.tracking import MlflowClient

    uri = store_uri(project, tracking)
    path = sqlite_path(uri)
    if path is None:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return client, _experiment(client, tracking.experiment, None)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # The client creates the tables; two processes that do so at once break each other and the database.
    with FileLock(f"{path}.lock", timeout=120):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return client, _experiment(client, tracking.experiment, (project.root / "mlartifacts").resolve().as_uri())


def _search(client: "MlflowClient", experiment: str, identity: str) -> "Run | None":
    """The run that a record of this identity was sent to."""
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


def _log_image(client: "MlflowClient", run_id: str, event: Event, path: Path) -> None:
    """What `MlflowClient.log_image` does, with a name made from the content in place of a random one."""
    from PIL import Image

    series = event["key"].replace("/", "~")
    when = int(event["time"] * 1000)
    name = f"{series}+step+{event['step']}+timestamp+{when}+{event['sha256'][:32]}"
    with tempfile.TemporaryDirectory() as folder, Image.open(path) as image:
        image.save(Path(folder, f"{name}.png"))
        thumbnail = image.convert("RGB")
        thumbnail.thumbnail((256, 256))
        thumbnail.save(Path(folder, f"{name}+compressed.webp"))
        client.log_artifacts(run_id, folder, "images")
    client.set_tag(run_id, "mlflow.loggedImages", "True")


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """Id of the experiment, which is made, and described, where it is missing.

    Its artifact folder is fixed at that moment, and by default depends on the current directory. The description is
    kept up to date as long as it is ours: not where a person changed it, nor on an experiment that others made.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            tags = {NOTE: EXPERIMENT, **marked(EXPERIMENT)}
            return client.create_experiment(name, artifact_location=artifacts, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was quicker
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment: {name!r} was deleted in MLflow; "
            "choose another name, or restore it with `mlflow experiments restore`"
        )
    if MARK in found.tags and found.tags.get(NOTE) != EXPERIMENT and is_ours(found.tags.get(NOTE), found.tags):
        for key, value in {NOTE: EXPERIMENT, **marked(EXPERIMENT)}.items():
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def _read_state(scratch: Path) -> dict[str, Any]:
    try:
        state = json.loads((scratch / MIRROR).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}  # sending again from the start does no harm
    return state if isinstance(state, dict) else {}


def sqlite_path(uri: str) -> str | None:
    """The database file of a sqlite URI, None for other URIs."""
    return uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The URI as it may be shown and stored."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.password else uri


def first_line(error: Exception) -> str:
    """The gist of an error, for a line of its own."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.rpartition("Caused by ")[2][:200]  # urllib3's own reason, without the tale around it


def user() -> str:
    """Who works here: the name given to an MLflow server that asks for one, or the account's."""
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
