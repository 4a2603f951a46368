"""A team's set-up, less the containers: MLflow on PostgreSQL as compose.yaml starts it, and medgen as its client.

The server dies in the middle of a training, and is restored from a backup; what it then holds is compared exactly with
what the runs wrote down.
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

from medgen.config import Project, Tracking
from medgen.registry.evaluations import read_evaluation
from medgen.registry.versions import find
from medgen.tracking.mlflow_sync import FINAL

TIMEOUT = 300  # seconds after which something that should have come will not come


@dataclass
class Team:
    """What was made once for this file."""

    folder: Path
    server: Any
    database: str
    artifacts: Path
    said: dict[str, str] = field(default_factory=dict)  # what each command printed

    @property
    def records(self) -> list[Path]:
        """Folders of runs that have a record."""
        return sorted(path.parent for path in (self.folder / "runs").glob("*/history.jsonl"))


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def events(record: Path) -> list[dict[str, Any]]:
    """Whole lines: the file may be read while it is written."""
    lines = (record / "history.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def environment_of(root: Path, uri: str, **more: str) -> dict[str, str]:
    """What the service `trainer` has: the server is named by environment."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    return inherited | {"PYTHONPATH": str(root), "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"} | more


def begin(folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medgen", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def medgen(folder: Path, environment: dict[str, str], *words: str) -> str:
    process = begin(folder, environment, *words)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def team(
    root: Path,
    small_params: dict[str, Any],
    postgres: Callable[[], str],
    mlflow_server: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Team:
    """A project through all stages over HTTP; while it trained the server was killed, and came back afterwards."""
    from medgen.datasets.sample import draw

    folder = tmp_path_factory.mktemp("project")
    phases = {"sample_every": 20, "phases": [{"name": "one", "epochs": 80, "learning_rate": 1e-3}]}
    params = small_params | {"train": small_params["train"] | phases}
    (folder / "params.yaml").write_text(json.dumps(params))
    draw(folder / "data", num_images=48, size=64, seed=3)
    database, artifacts = postgres(), tmp_path_factory.mktemp("server") / "artifacts"
    team = Team(folder, mlflow_server(database, artifacts), database, artifacts)
    environment = environment_of(root, team.server.uri)
    for stage in ("preprocess", "features"):
        medgen(folder, environment, stage)

    before = set(team.records)
    training = begin(folder, environment, "train")
    wait_until(lambda: bool(set(team.records) - before), training)
    (record,) = set(team.records) - before

    def half_way() -> bool:
        """Some of it is in MLflow, and it has learnt something."""
        state = record / "mirror.json"
        sent = json.loads(state.read_text())["offset"] if state.exists() else 0
        return sent > 0 and any("val/ssim" in event.get("values", {}) for event in events(record))

    wait_until(half_way, training)
    team.server.kill()
    assert training.poll() is None, "it ended before the server was killed: give it more epochs"
    known = len(events(record))
    team.said["train"], _ = training.communicate(timeout=TIMEOUT)
    assert training.returncode == 0, team.said["train"]
    assert len(events(record)) > known + 5, "nothing happened after the server was killed"

    team.server.restart()
    for word in ("sync", "prior", "refiner", "evaluate"):
        team.said[word] = medgen(folder, environment, word)
    return team


@pytest.mark.slow
def test_a_training_whose_server_is_killed_ends_well_and_says_what_to_do(team: Team) -> None:
    assert "are not in MLflow yet: run `medgen sync`" in team.said["train"]
    sent = re.search(r"(\d+) records of \d+ runs sent to MLflow$", team.said["sync"].strip())
    assert sent and int(sent[1]) > 5


def points(client: Any, run_id: str) -> Counter[tuple[Any, ...]]:
    """Each metric point that MLflow holds of a run, and how often."""
    found: Counter[tuple[Any, ...]] = Counter()
    for name in client.get_run(run_id).data.metrics:
        history = client.get_metric_history(run_id, name)
        found.update((name, point.step, point.timestamp, point.value) for point in history)
    return found


def files(folder: Path) -> dict[str, str]:
    """SHA-256 by path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def pixels(path: Path) -> tuple[Any, ...]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size, image.mode, image.tobytes()


@pytest.mark.slow
def test_mlflow_holds_every_record_exactly_and_once(team: Team, tmp_path: Path) -> None:
    client = client_of(team.server.uri)
    assert team.records
    for record in team.records:
        told = events(record)
        run = client.get_run(json.loads((record / "mirror.json").read_text())["run_id"])
        assert run.info.status == "FINISHED"

        numbers = [event for event in told if event["kind"] in ("metrics", "system")]
        expected = Counter(
            (name, 0 if name.startswith(FINAL) else event["step"], int(event["time"] * 1000), value)
            for event in numbers
            for name, value in event["values"].items()
            if not isinstance(value, str)  # infinite ones are words, and not sent
        )
        assert len(expected) > 80
        assert points(client, run.info.run_id) == expected

        said: dict[str, dict[str, Any]] = {"params": {}, "tags": {}}
        for event in told:
            if event["kind"] in said:
                said[event["kind"]] |= event["values"]
        assert run.data.params == {name: str(value) for name, value in said["params"].items()}
        assert run.data.tags.items() >= said["tags"].items()
        (dataset,) = (event for event in told if event["kind"] == "dataset")
        assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == [dataset["fingerprint"]]

        there = tmp_path / record.name
        client.download_artifacts(run.info.run_id, "", str(there))
        assert {path: digest for path, digest in files(there).items() if not path.startswith("images/")} == {
            event["key"]: event["sha256"] for event in told if event["kind"] == "artifact"
        }
        images = [event for event in told if event["kind"] == "image"]
        found = {tuple(path.name.split("+")[:3:2]): path for path in (there / "images").glob("*.png")}
        assert len(list((there / "images").iterdir())) == 2 * len(found)  # each with its thumbnail
        assert len(found) == len(images) >= 8
        for event in images:
            path = found[event["key"].replace("/", "~"), str(event["step"])]
            assert pixels(path) == pixels(record / event["path"])


@pytest.mark.slow
def test_sync_again_has_nothing_to_send(team: Team, root: Path) -> None:
    assert medgen(team.folder, environment_of(root, team.server.uri), "sync").startswith("0 records of ")


def version_files(uri: str, folder: Path) -> dict[str, str]:
    """What the candidate is made of, as the server gives it."""
    from mlflow.artifacts import download_artifacts

    client = client_of(uri)
    source = client.get_model_version_by_alias("medgen", "candidate").source  # models:/ID of the logged model
    model = client.get_logged_model(source.removeprefix("models:/"))
    return files(Path(download_artifacts(model.artifact_location, dst_path=str(folder), tracking_uri=uri)))


@pytest.mark.slow
def test_the_candidate_lies_on_the_server_and_nowhere_else(team: Team, tmp_path: Path) -> None:
    client = client_of(team.server.uri)
    version = client.get_model_version_by_alias("medgen", "candidate")
    assert version.run_id in {json.loads((record / "mirror.json").read_text())["run_id"] for record in team.records}
    ours = {
        f"artifacts/{part}/{path}": digest
        for part in ("model", "prior", "refiner")
        for path, digest in files(team.folder / "artifacts" / part).items()
    }
    assert version_files(team.server.uri, tmp_path).items() >= ours.items()
    assert sum(path.name == "model.safetensors" for path in team.artifacts.rglob("*")) == 1
    assert not [path for path in team.folder.iterdir() if path.name.startswith(("mlflow", "mlartifacts", "mlruns"))]


@pytest.mark.slow
def test_values_that_a_server_lacks_are_told_from_a_server_that_is_away(team: Team) -> None:
    project, tracking = Project(team.folder), Tracking(uri=team.server.uri)
    version = find(client_of(team.server.uri), "medgen", "candidate")
    assert read_evaluation(version, project, tracking) is not None
    lacking = team.artifacts / "lacking"  # out of the server's sight, and back
    kept = next(team.artifacts.rglob("evaluation.json")).parent
    kept.rename(lacking)
    try:
        assert read_evaluation(version, project, tracking) is None
    finally:
        lacking.rename(kept)


@pytest.mark.slow
@pytest.mark.parametrize(("host", "status"), [("mlflow:5000", 200), ("localhost:1234", 200), ("example.org", 403)])
def test_the_server_answers_to_its_names_only(team: Team, host: str, status: int) -> None:
    assert status_of(f"{team.server.uri}/api/2.0/mlflow/experiments/search?max_results=1", host) == status


@pytest.mark.slow
def test_a_client_fetches_the_candidate_from_a_server_that_params_name(team: Team, root: Path, tmp_path: Path) -> None:
    """Without MLFLOW_TRACKING_URI, which would also lead a call that asks the wrong place to the right one."""
    shutil.copy(team.folder / "params.yaml", tmp_path)
    environment = environment_of(root, "")
    words = ["--model", "models:/medgen@candidate", "--n", "2", "--out", "out"]
    medgen(tmp_path, environment, "generate", *words, "--set", f"tracking.uri={team.server.uri}")
    medgen(team.folder, environment, "generate", "--n", "2", "--out", str(tmp_path / "ours"))
    assert len(files(tmp_path / "out")) == 3
    assert files(tmp_path / "out") == files(tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"params.yaml", "out", "ours"}


def status_of(url: str, host: str | None = None) -> int:
    request = urllib.request.Request(url, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


def holdings(uri: str, folder: Path) -> dict[str, Any]:
    """All that a server keeps of the project: to be compared with another's."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name("medgen")
    runs = client.search_runs([experiment.experiment_id])
    held: dict[str, Any] = {run.info.run_id: (run.to_dictionary(), points(client, run.info.run_id)) for run in runs}
    for run in runs:
        client.download_artifacts(run.info.run_id, "", str(folder / run.info.run_id))
    held["versions"] = [dict(version) for version in client.search_model_versions("name = 'medgen'")]
    held["aliases"] = client.get_registered_model("medgen").aliases
    held["candidate"] = version_files(uri, folder / "candidate")
    return held | files(folder)


@pytest.mark.slow
def test_a_backup_restored_elsewhere_is_the_same(
    team: Team,
    postgres: Callable[[], str],
    postgres_programs: Path,
    mlflow_server: Callable[..., Any],
    tmp_path: Path,
) -> None:
    empty = postgres()

    def call(program: str, database: str, *words: str) -> None:
        """The password by environment: a command line is there for all to see."""
        parts = urlsplit(database)
        where = ["--host", parts.hostname, "--port", str(parts.port), "--username", parts.username]
        command = [postgres_programs / program, *where, "--dbname", parts.path[1:], *words]
        subprocess.run(command, env=os.environ | {"PGPASSWORD": unquote(parts.password or "")}, check=True)

    call("pg_dump", team.database, "--format=custom", f"--file={tmp_path / 'mlflow.dump'}")
    call("pg_restore", empty, "--exit-on-error", str(tmp_path / "mlflow.dump"))
    shutil.copytree(team.artifacts, tmp_path / "artifacts")
    restored = mlflow_server(empty, tmp_path / "artifacts")
    before = holdings(team.server.uri, tmp_path / "before")
    assert len(before) > 30
    assert holdings(restored.uri, tmp_path / "after") == before
    restored.stop()


@pytest.fixture(scope="module")
def accounts(
    postgres: Callable[[], str], mlflow_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server that asks who you are, as .env switches it on."""
    variables = {
        "MLFLOW_OPTIONS": "--app-name=basic-auth",
        "MLFLOW_ADMIN_PASSWORD": "for the admin: $%@",
        "MLFLOW_SECRET_KEY": "some secret",
    }
    server = mlflow_server(postgres(), tmp_path_factory.mktemp("accounts") / "artifacts", variables=variables)
    yield server
    server.stop()


@pytest.mark.slow
def test_with_accounts_only_they_are_let_in(
    team: Team, accounts: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import get_app_client

    search = f"{accounts.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    artifacts = f"{accounts.uri}/api/2.0/mlflow-artifacts/artifacts?path=1"
    assert [status_of(url) for url in (search, artifacts, f"{accounts.uri}/health")] == [401, 401, 200]

    def log_in(name: str, password: str) -> dict[str, str]:
        words = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
        for word, value in words.items():
            monkeypatch.setenv(word, value)
        return words

    log_in("admin", "for the admin: $%@")
    for name in ("alice", "robert"):
        get_app_client("basic-auth", accounts.uri).create_user(name, f"{name}'s own password")
    project = tmp_path / "project"
    shutil.copytree(team.folder, project)

    stranger = begin(project, environment_of(root, accounts.uri, **log_in("alice", "a wrong password")), "register")
    said, _ = stranger.communicate(timeout=TIMEOUT)
    assert stranger.returncode == 2
    assert "a wrong password" not in said
    said = medgen(project, environment_of(root, accounts.uri, **log_in("alice", "alice's own password")), "register")
    assert "registered as models:/medgen/1" in said

    log_in("robert", "robert's own password")  # colleagues share the experiment and the registered model
    client = client_of(accounts.uri)
    version = client.get_model_version_by_alias("medgen", "candidate")
    client.set_registered_model_alias("medgen", "champion", version.version)
    client.set_tag(version.run_id, "seen.by", "robert")
    assert client.get_run(version.run_id).data.tags["seen.by"] == "robert"


@pytest.fixture(scope="module")
def example(root: Path) -> dict[str, str]:
    """.env.example: each variable has a comment above it."""
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


def test_env_is_for_neither_git_nor_the_image(root: Path) -> None:
    assert subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=root).returncode == 0
    allowed = (root / ".dockerignore").read_text().split()
    assert allowed[0] == "*" and "!.env" not in allowed


def test_images_are_pinned(root: Path, compose: Callable[..., dict[str, Any]]) -> None:
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    images = {name: service["image"] for name, service in compose({"POSTGRES_PASSWORD": "x"})["services"].items()}
    assert re.fullmatch(r"postgres:\d+", images.pop("postgres"))
    assert set(images.values()) == {f"medgen:{version}", f"medgen:{version}-cuda"}
    assert len({images[name] for name in ("mlflow", "trainer", "serve")}) == 1


@pytest.mark.parametrize("options", ["", "--app-name=basic-auth"])
def test_the_servers_command_is_one_mlflow_knows(compose: Callable[..., dict[str, Any]], options: str) -> None:
    from mlflow.cli import cli

    service = compose({"POSTGRES_PASSWORD": "a secret", "MLFLOW_OPTIONS": options})["services"]["mlflow"]
    program, command, *words = shlex.split(service["command"])
    assert (program, command) == ("mlflow", "server")
    parsed = cli.commands[command].make_context(command, words).params
    assert parsed["serve_artifacts"] and parsed["app_name"] == (options.partition("=")[2] or None)
    assert "a secret" not in service["command"] + service["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert service["ports"] == ["127.0.0.1:5000:5000"]


@pytest.mark.parametrize("name", ["trainer", "trainer-gpu", "serve"])
def test_the_projects_services_run_commands_that_exist(compose: Callable[..., dict[str, Any]], name: str) -> None:
    from medgen.cli import app

    service = compose({"POSTGRES_PASSWORD": "x"})["services"][name]
    program, command, *_ = shlex.split(service["command"])
    commands = {entry.name or entry.callback.__name__ for entry in app.registered_commands}
    if name == "serve" and "serve" not in commands:
        pytest.skip("medgen serve is not here yet")
    assert (program, command) in {("dvc", "repro"), *(("medgen", known) for known in commands)}
    assert service["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert service["volumes"] == [".:/project"]


def test_the_page_names_only_services_and_variables_there_are(
    root: Path, example: dict[str, str], compose: Callable[..., dict[str, Any]]
) -> None:
    text = (root / "docs" / "operations.md").read_text() + (root / "compose.yaml").read_text().split("name:")[0]
    services = compose({"POSTGRES_PASSWORD": "x"})["services"]
    named = re.findall(r"docker compose (?:--profile \w+ )?(?:run|exec|logs|stop|restart)((?: -\S+)*) ([\w-]+)", text)
    assert {name for _, name in named} and {name for _, name in named} <= set(services)
    assert set(re.findall(r"--profile (\w+)", text)) <= {
        word for one in services.values() for word in one.get("profiles", ())
    }
    in_env = re.findall(r"`(\w+)(?:=[^`]*)?` in `?\.env", text)
    assert in_env and set(in_env) <= set(example)
