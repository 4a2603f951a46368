"""The services of compose.yaml without containers: an MLflow server on PostgreSQL, and medgen as its client.

The server is killed during a training and later restored from a backup. Its content is compared exactly with the
records of the runs. The training is a process of its own; other commands run in this one, because a new process imports
torch and MLflow for seconds.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from medgen import cli
from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.registry.evaluations import download_evaluation
from medgen.registry.versions import find_version
from medgen.tracking.mlflow_sync import FINAL_PREFIXES, REFERENCE_SUFFIXES

TIMEOUT = 300  # seconds


@dataclass
class Team:
    """A project and its MLflow server, shared by the tests of this file."""

    folder: Path
    server: Any
    database: str
    artifacts: Path
    output: dict[str, str] = field(default_factory=dict)  # of each command

    @property
    def records(self) -> list[Path]:
        """Folders of the runs that have a record."""
        return sorted(path.parent for path in (self.folder / "runs").glob("*/history.jsonl"))


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def events(record: Path) -> list[dict[str, Any]]:
    """The complete lines of a record, which may be read while it is written."""
    lines = (record / "history.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def medgen(folder: Path, uri: str, *arguments: str, code: int = 0) -> str:
    """Run `medgen` in this process, with MLFLOW_TRACKING_URI as in the service `trainer`; return its output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        result = CliRunner().invoke(cli.app, arguments)
    error = result.exception
    exit_code = error.exit_code if isinstance(error, UserError) else result.exit_code
    assert exit_code == code, f"{arguments}: {exit_code}\n{result.output}\n{error!r}"
    return result.output + (f"error: {error}" if isinstance(error, UserError) else "")


def start_training(folder: Path, root: Path, uri: str) -> subprocess.Popen[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment = inherited | {"PYTHONPATH": str(root), "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "medgen", "train"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


@pytest.fixture(scope="module")
def team(
    root: Path,
    small_params: dict[str, Any],
    postgres: Callable[[], str],
    mlflow_server: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Team:
    """A project after all stages; the server was killed during the training and restarted afterwards."""
    from medgen.datasets.sample import draw

    folder = tmp_path_factory.mktemp("project")
    phases = {"sample_every": 10, "phases": {"one": {"epochs": 40, "learning_rate": 1e-3}}}
    params = small_params | {"train": small_params["train"] | phases}
    (folder / "params.yaml").write_text(json.dumps(params))
    draw(folder / "data", num_images=48, size=64, seed=3)
    database, artifacts = postgres(), tmp_path_factory.mktemp("server") / "artifacts"
    team = Team(folder, mlflow_server(database, artifacts), database, artifacts)
    for stage in ("preprocess", "features"):
        medgen(folder, team.server.uri, stage)

    before = set(team.records)
    training = start_training(folder, root, team.server.uri)
    wait_until(lambda: bool(set(team.records) - before), training)
    (record,) = set(team.records) - before

    def is_under_way() -> bool:
        """Return True if MLflow has a part of the record and the first validation is done."""
        state = record / "mirror.json"
        sent = json.loads(state.read_text())["offset"] if state.exists() else 0
        return sent > 0 and any("val/ssim" in event.get("values", {}) for event in events(record))

    wait_until(is_under_way, training)
    team.server.kill()
    assert training.poll() is None, "the training ended before the server was killed; increase its epochs"
    num_events = len(events(record))
    team.output["train"], _ = training.communicate(timeout=TIMEOUT)
    assert training.returncode == 0, team.output["train"]
    assert len(events(record)) > num_events + 5, "the training recorded nothing after the server was killed"

    team.server.restart()
    for command in ("sync", "prior", "refiner", "evaluate"):
        team.output[command] = medgen(folder, team.server.uri, command)
    return team


@pytest.mark.slow
def test_training_survives_a_killed_server_and_names_the_command(team: Team) -> None:
    assert "are not in MLflow yet: run `medgen sync`" in team.output["train"]
    sent = re.search(r"(\d+) records of \d+ runs sent to MLflow$", team.output["sync"].strip())
    assert sent and int(sent[1]) > 5


def points(client: Any, run_id: str) -> Counter[tuple[Any, ...]]:
    """The metric points that MLflow has of a run, with their counts."""
    found: Counter[tuple[Any, ...]] = Counter()
    for name in client.get_run(run_id).data.metrics:
        history = client.get_metric_history(run_id, name)
        found.update((name, point.step, point.timestamp, point.value) for point in history)
    return found


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a folder, by path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def pixels(path: Path) -> tuple[Any, ...]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size, image.mode, image.tobytes()


@pytest.mark.slow
def test_mlflow_has_every_record_exactly_once(team: Team, tmp_path: Path) -> None:
    client = client_of(team.server.uri)
    assert team.records
    for record in team.records:
        recorded = events(record)
        run = client.get_run(json.loads((record / "mirror.json").read_text())["run_id"])
        assert run.info.status == "FINISHED"

        points_recorded = [event for event in recorded if event["kind"] in ("metrics", "system")]
        expected = Counter(
            (name, 0 if name.startswith(FINAL_PREFIXES) else event["step"], int(event["time"] * 1000), value)
            for event in points_recorded
            for name, value in event["values"].items()
            if not isinstance(value, str)  # non-finite values are text and are not sent
            and not name.endswith(REFERENCE_SUFFIXES)
        )
        assert len(expected) > 80
        assert points(client, run.info.run_id) == expected

        merged: dict[str, dict[str, Any]] = {"params": {}, "tags": {}}
        for event in recorded:
            if event["kind"] in merged:
                merged[event["kind"]] |= event["values"]
        assert run.data.params == {name: str(value) for name, value in merged["params"].items()}
        assert run.data.tags.items() >= merged["tags"].items()
        (dataset,) = (event for event in recorded if event["kind"] == "dataset")
        assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == [dataset["fingerprint"]]

        downloaded = tmp_path / record.name
        client.download_artifacts(run.info.run_id, "", str(downloaded))
        assert {path: digest for path, digest in files(downloaded).items() if not path.startswith("images/")} == {
            event["key"]: event["sha256"] for event in recorded if event["kind"] == "artifact"
        }
        images = [event for event in recorded if event["kind"] == "image"]
        found = {tuple(path.name.split("+")[:3:2]): path for path in (downloaded / "images").glob("*.png")}
        assert len(list((downloaded / "images").iterdir())) == 2 * len(found)  # each has a thumbnail
        assert len(found) == len(images) >= 8
        for event in images:
            path = found[event["key"].replace("/", "~"), str(event["step"])]
            assert pixels(path) == pixels(record / event["path"])


@pytest.mark.slow
def test_second_sync_sends_nothing(team: Team) -> None:
    assert medgen(team.folder, team.server.uri, "sync").startswith("0 records of ")


def version_files(uri: str, folder: Path) -> dict[str, str]:
    """The candidate's files, downloaded from the server."""
    from mlflow.artifacts import download_artifacts

    client = client_of(uri)
    source = client.get_model_version_by_alias("small", "candidate").source  # models:/ID of the logged model
    model = client.get_logged_model(source.removeprefix("models:/"))
    return files(Path(download_artifacts(model.artifact_location, dst_path=str(folder), tracking_uri=uri)))


@pytest.mark.slow
def test_candidate_is_stored_on_the_server_only(team: Team, tmp_path: Path) -> None:
    client = client_of(team.server.uri)
    version = client.get_model_version_by_alias("small", "candidate")
    assert version.run_id in {json.loads((record / "mirror.json").read_text())["run_id"] for record in team.records}
    local = {
        f"artifacts/{part}/{path}": digest
        for part in ("model", "prior", "refiner")
        for path, digest in files(team.folder / "artifacts" / part).items()
    }
    assert version_files(team.server.uri, tmp_path).items() >= local.items()
    assert sum(path.name == "model.safetensors" for path in team.artifacts.rglob("*")) == 1
    assert not [path for path in team.folder.iterdir() if path.name.startswith(("mlflow", "mlartifacts", "mlruns"))]


@pytest.mark.slow
def test_evaluation_that_the_server_lacks_counts_as_not_stored(team: Team) -> None:
    project, tracking = Project(team.folder), Tracking(uri=team.server.uri)
    version = find_version(client_of(team.server.uri), "small", "candidate")
    assert download_evaluation(version, project, tracking) is not None
    moved = team.artifacts / "moved"
    stored = next(team.artifacts.rglob("evaluation.json")).parent
    stored.rename(moved)
    try:
        assert download_evaluation(version, project, tracking) is None
    finally:
        moved.rename(stored)


@pytest.mark.slow
@pytest.mark.parametrize(("host", "status"), [("mlflow:5000", 200), ("localhost:1234", 200), ("example.org", 403)])
def test_server_accepts_only_its_host_names(team: Team, host: str, status: int) -> None:
    assert status_of(f"{team.server.uri}/api/2.0/mlflow/experiments/search?max_results=1", host) == status


@pytest.mark.slow
def test_client_downloads_the_candidate_from_the_server_in_params(team: Team, tmp_path: Path) -> None:
    """A call that uses MLFLOW_TRACKING_URI instead of params.yaml would fail: there is no such store."""
    shutil.copy(team.folder / "params.yaml", tmp_path)
    options = ["--model", "models:/small@candidate", "--n", "2", "--out", "out"]
    wrong = f"sqlite:///{tmp_path}/absent/mlflow.db"
    medgen(tmp_path, wrong, "generate", *options, "--set", f"tracking.uri={team.server.uri}")
    medgen(team.folder, team.server.uri, "generate", "--n", "2", "--out", str(tmp_path / "local"))
    assert len(files(tmp_path / "out")) == 4  # two images, their grid, and the record of them
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert {path.name for path in tmp_path.iterdir()} == {"params.yaml", "out", "local"}


def status_of(url: str, host: str | None = None) -> int:
    request = urllib.request.Request(url, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


def content_of(uri: str, folder: Path) -> dict[str, Any]:
    """The project's runs, metric points, versions and artifacts on a server."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name("medgen")
    runs = client.search_runs([experiment.experiment_id])
    found: dict[str, Any] = {run.info.run_id: (run.to_dictionary(), points(client, run.info.run_id)) for run in runs}
    for run in runs:
        client.download_artifacts(run.info.run_id, "", str(folder / run.info.run_id))
    found["versions"] = [dict(version) for version in client.search_model_versions("name = 'medgen'")]
    found["aliases"] = client.get_registered_model("small").aliases
    found["candidate"] = version_files(uri, folder / "candidate")
    return found | files(folder)


@pytest.mark.slow
def test_restored_backup_has_the_same_content(
    team: Team,
    postgres: Callable[[], str],
    postgres_programs: Path,
    mlflow_server: Callable[..., Any],
    tmp_path: Path,
) -> None:
    empty = postgres()

    def call(program: str, database: str, *arguments: str) -> None:
        """Pass the password by environment, because other users can read command lines."""
        parts = urlsplit(database)
        options = ["--host", parts.hostname, "--port", str(parts.port), "--username", parts.username]
        command = [postgres_programs / program, *options, "--dbname", parts.path[1:], *arguments]
        subprocess.run(command, env=os.environ | {"PGPASSWORD": unquote(parts.password or "")}, check=True)

    call("pg_dump", team.database, "--format=custom", f"--file={tmp_path / 'mlflow.dump'}")
    call("pg_restore", empty, "--exit-on-error", str(tmp_path / "mlflow.dump"))
    shutil.copytree(team.artifacts, tmp_path / "artifacts")
    restored = mlflow_server(empty, tmp_path / "artifacts")
    before = content_of(team.server.uri, tmp_path / "before")
    assert len(before) > 30
    assert content_of(restored.uri, tmp_path / "after") == before
    restored.stop()


@pytest.fixture(scope="module")
def accounts(
    postgres: Callable[[], str], mlflow_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server with accounts, with the variables of .env that enable them."""
    variables = {
        "MLFLOW_OPTIONS": "--app-name=basic-auth",
        "MLFLOW_ADMIN_PASSWORD": "for the admin: $%@",
        "MLFLOW_SECRET_KEY": "some secret",
    }
    server = mlflow_server(postgres(), tmp_path_factory.mktemp("accounts") / "artifacts", variables=variables)
    yield server
    server.stop()


@pytest.mark.slow
def test_server_with_accounts_requires_a_login(
    team: Team, accounts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import get_app_client

    search = f"{accounts.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    artifacts = f"{accounts.uri}/api/2.0/mlflow-artifacts/artifacts?path=1"
    assert [status_of(url) for url in (search, artifacts, f"{accounts.uri}/health")] == [401, 401, 200]

    def log_in(name: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    log_in("admin", "for the admin: $%@")
    for name in ("alice", "robert"):
        get_app_client("basic-auth", accounts.uri).create_user(name, f"{name}'s own password")
    project = tmp_path / "project"
    shutil.copytree(team.folder, project)

    log_in("alice", "a wrong password")
    assert "a wrong password" not in medgen(project, accounts.uri, "register", code=2)
    log_in("alice", "alice's own password")
    assert "registered as models:/small/1" in medgen(project, accounts.uri, "register")

    log_in("robert", "robert's own password")  # all accounts share the experiment and the registered model
    client = client_of(accounts.uri)
    version = client.get_model_version_by_alias("small", "candidate")
    client.set_registered_model_alias("small", "champion", version.version)
    client.set_tag(version.run_id, "seen.by", "robert")
    assert client.get_run(version.run_id).data.tags["seen.by"] == "robert"


@pytest.fixture(scope="module")
def example(root: Path) -> dict[str, str]:
    """The variables of .env.example, each of which has a comment above it."""
    lines = (root / ".env.example").read_text().splitlines()
    found = {}
    for above, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith("#"):
            assert above.startswith("# "), line
            name, value = line.split("=", 1)
            found[name] = value
    return found


def test_env_example_has_every_variable_with_its_default(root: Path, example: dict[str, str]) -> None:
    used = re.findall(r"\$\{(\w+):([-?])([^}]*)\}", (root / "compose.yaml").read_text())
    assert (root / "compose.yaml").read_text().count("$") == len(used)
    assert {name for name, _, _ in used} == set(example)
    for name, kind, default in used:
        assert example[name] == ("" if kind == "?" else default), name


def test_env_is_ignored_by_git_and_docker(root: Path) -> None:
    assert subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=root).returncode == 0
    allowed = (root / ".dockerignore").read_text().split()
    assert allowed[0] == "*" and "!.env" not in allowed


def test_images_are_pinned(root: Path, compose: Callable[..., dict[str, Any]]) -> None:
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    images = {name: service["image"] for name, service in compose({"POSTGRES_PASSWORD": "x"})["services"].items()}
    assert re.fullmatch(r"postgres:\d+(@sha256:[0-9a-f]{64})?", images.pop("postgres"))
    assert set(images.values()) == {f"medgen:{version}", f"medgen:{version}-cuda"}
    assert len({images[name] for name in ("mlflow", "trainer", "serve")}) == 1


@pytest.mark.parametrize("options", ["", "--app-name=basic-auth"])
def test_command_of_the_mlflow_service_is_valid(compose: Callable[..., dict[str, Any]], options: str) -> None:
    from mlflow.cli import cli

    service = compose({"POSTGRES_PASSWORD": "a secret", "MLFLOW_OPTIONS": options})["services"]["mlflow"]
    program, command, *arguments = shlex.split(service["command"])
    assert (program, command) == ("mlflow", "server")
    parsed = cli.commands[command].make_context(command, arguments).params
    assert parsed["serve_artifacts"] and parsed["app_name"] == (options.partition("=")[2] or None)
    assert "a secret" not in service["command"] + service["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert service["ports"] == ["127.0.0.1:5000:5000"]


@pytest.mark.parametrize("name", ["trainer", "trainer-gpu", "serve"])
def test_commands_of_the_medgen_services_exist(compose: Callable[..., dict[str, Any]], name: str) -> None:
    from medgen.cli import app

    service = compose({"POSTGRES_PASSWORD": "x"})["services"][name]
    program, command, *_ = shlex.split(service["command"])
    commands = {entry.name or entry.callback.__name__ for entry in app.registered_commands}
    assert (program, command) in {("dvc", "repro"), *(("medgen", known) for known in commands)}
    assert service["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert service["volumes"] == [".:/project"]


def test_documented_services_and_variables_exist(
    root: Path, example: dict[str, str], compose: Callable[..., dict[str, Any]]
) -> None:
    text = (root / "docs" / "operations.md").read_text() + (root / "compose.yaml").read_text().split("name:")[0]
    services = compose({"POSTGRES_PASSWORD": "x"})["services"]
    named = re.findall(r"docker compose (?:--profile \w+ )?(?:run|exec|logs|stop|restart)((?: -\S+)*) ([\w-]+)", text)
    assert {name for _, name in named} and {name for _, name in named} <= set(services)
    assert set(re.findall(r"--profile (\w+)", text)) <= {
        profile for service in services.values() for profile in service.get("profiles", ())
    }
    in_env = re.findall(r"`(\w+)(?:=[^`]*)?` in `?\.env", text)
    assert in_env and set(in_env) <= set(example)
