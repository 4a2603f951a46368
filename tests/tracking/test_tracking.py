"""A run's record: no event is lost or repeated, and training never waits for MLflow."""

import hashlib
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import sqlalchemy
from filelock import Timeout
from PIL import Image

from medgen import tracking
from medgen.config import Model, Params, Project, Tracking
from medgen.errors import UserError
from medgen.tracking import Tracker, history, lineage, mlflow_sync, read_run, sync, uploader
from medgen.tracking.history import HISTORY, History, read

OFF = Tracking(enabled=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """One project with one SQLite store for all tests: creating a store takes seconds."""
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def scratch(project, request):
    return project.runs / request.node.name


@pytest.fixture
def dead_server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def stalled_server():
    """A server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def record(scratch, project, settings, steps, scale=1.0):
    with Tracker.open(scratch, settings, project, "a-run") as tracker:
        tracker.params({"train": {"batch_size": 16}})
        for step in steps:
            tracker.metrics({"loss": scale / (step + 1)}, step=step)


def mlflow_run(project, scratch):
    client, _ = mlflow_sync.connect(project, Tracking())
    run_id = json.loads((scratch / mlflow_sync.STATE_FILE).read_text())["run_id"]
    return client, run_id


def points(project, scratch, name):
    client, run_id = mlflow_run(project, scratch)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def kinds(scratch):
    return [event["kind"] for event, _ in read(scratch / HISTORY)]


def test_history_needs_no_mlflow(project, scratch):
    with Tracker.open(scratch, OFF, project, "a-run") as tracker:
        tracker.params({"model": Model(), "phases": [{"epochs": 3}, {"epochs": 5}], "size": None})
        tracker.tags({"git.commit": "abc"})
        tracker.metrics({"loss": 1.0}, step=1)
        tracker.metrics({"ssim": 0.5}, step=1)
        tracker.metrics({"loss": 0.5}, step=2)
    assert history(scratch) == [{"step": 1, "loss": 1.0, "ssim": 0.5}, {"step": 2, "loss": 0.5}]
    run = read_run(scratch)
    assert (run.name, run.status, run.tags) == ("a-run", "FINISHED", {"git.commit": "abc"})
    assert run.params["model.latent_channels"] == Model().latent_channels
    assert (run.params["phases.0.epochs"], run.params["phases.1.epochs"], run.params["size"]) == (3, 5, None)


def test_a_folder_without_a_record_has_an_empty_history(tmp_path):
    assert history(tmp_path / "nothing") == []
    assert read_run(tmp_path / "nothing") is None


def test_an_incomplete_last_line_is_dropped(project, scratch):
    record(scratch, project, OFF, range(3))
    path = scratch / HISTORY
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "metrics", "step": 3, "val')
    assert [r["step"] for r in history(scratch)] == [0, 1, 2]
    record(scratch, project, OFF, range(4))
    assert [r["step"] for r in history(scratch)] == [0, 1, 2, 3]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize(
    "changed", [{"time": 10**400}, {"time": -1e300}, {"time": 1e300}, {"step": 2**70}, {"values": {"loss": 10**400}}]
)
def test_numbers_that_cannot_be_stored_are_left_out(project, scratch, changed):
    record(scratch, project, OFF, range(2))
    event = {"kind": "metrics", "time": 1e9, "step": 9, "values": {"loss": 1.0}}
    with (scratch / HISTORY).open("a") as file:
        file.write(json.dumps(event | changed) + "\n")
    assert [step["step"] for step in history(scratch)] == [0, 1]
    assert read_run(scratch).status == "FINISHED"


def test_repeated_values_are_dropped_and_changed_values_are_appended(project, scratch):
    record(scratch, project, OFF, range(5))
    once = kinds(scratch)
    record(scratch, project, OFF, range(5))
    assert [kind for kind in kinds(scratch) if kind != "status"] == [kind for kind in once if kind != "status"]
    record(scratch, project, OFF, range(4, 5), scale=2.0)
    assert kinds(scratch).count("metrics") == 6
    assert history(scratch)[4] == {"step": 4, "loss": 0.4}


def test_a_duration_of_a_repeated_step_is_recorded_once(project, scratch):
    """A training that was killed after it recorded an epoch and before it saved the checkpoint repeats the epoch."""
    for speed in (100.0, 90.0):
        with Tracker.open(scratch, OFF, project, "a-run") as tracker:
            tracker.durations({"run/images_per_second": speed}, step=1)
    assert history(scratch) == [{"step": 1, "run/images_per_second": 100.0}]
    assert kinds(scratch).count("metrics") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "FINISHED"), (None, "FINISHED")],
)
def test_status_after_each_kind_of_end(project, scratch, error, status):
    with nullcontext() if error is None else pytest.raises(error), Tracker.open(scratch, OFF, project, "a-run"):
        if error:
            raise error
    run = read_run(scratch)
    assert run.status == status


@pytest.mark.slow
def test_a_store_whose_creation_was_killed_is_created_by_the_next_process(tmp_path):
    """MLflow cannot continue a migration: `_alembic_tmp_experiment_tags already exists`."""

    def kill(_connection, _cursor, statement, *_):
        if statement.strip() == "DROP TABLE experiment_tags":
            os._exit(9)

    project = Project(tmp_path)
    mlflow_sync.load_mlflow(Tracking())
    if (child := os.fork()) == 0:
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", kill)
        try:
            mlflow_sync.connect(project, Tracking())
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    client, experiment = mlflow_sync.connect(project, Tracking())
    assert client.get_experiment(experiment).name == "medgen"
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_second_process_cannot_write_the_same_run(project, scratch, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "LOCK_TIMEOUT_SECONDS", 0.05)
    with Tracker.open(scratch, OFF, project, "a-run"):
        with pytest.raises(UserError, match="another process is writing this run"):
            Tracker.open(scratch, OFF, project, "a-run")
        run = read_run(scratch)
        assert run.status == "RUNNING"
        assert scratch.name in sync(project, Tracking()).live
    assert scratch.name in capsys.readouterr().out


def test_mlflow_receives_all_events(project, scratch):
    with Tracker.open(scratch, Tracking(), project, "a-run") as tracker:
        tracker.params({"train": {"batch_size": 16}})
        tracker.tags({"git.commit": "abc"})
        tracker.note("# A run")
        tracker.dataset("phantom", "0123456789ab", "data", {"train": 3, "test": 1})
        for step in range(3):
            path = scratch / "samples" / f"{step}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (300, 100), step * 80).save(path)
            tracker.image("samples/prior", path, step=step)
            tracker.metrics({"loss": 1.0 - step}, step=step)
        tracker.artifact(path, "figures")
    client, run_id = mlflow_run(project, scratch)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.batch_size": "16"}
    assert run.data.tags["git.commit"] == "abc"
    assert run.data.tags["mlflow.note.content"] == "# A run"
    assert [(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs] == [("phantom", "0123456789ab")]
    sent = {event["step"]: event["time"] for event, _ in read(scratch / HISTORY) if event["kind"] == "metrics"}
    received = client.get_metric_history(run_id, "loss")
    assert {m.step: m.timestamp for m in received} == {step: int(when * 1000) for step, when in sent.items()}
    assert [m.value for m in received] == [1.0, 0.0, -1.0]
    # MLflow's image grid needs an image and a thumbnail for each step, and a tag.
    images = sorted(Path(item.path).name for item in client.list_artifacts(run_id, "images"))
    assert [name.split("+")[:3] for name in images[::2]] == [["samples~prior", "step", str(step)] for step in range(3)]
    assert len(images) == 6
    assert run.data.tags["mlflow.loggedImages"] == "True"
    assert [item.path for item in client.list_artifacts(run_id, "figures")] == ["figures/2.png"]
    # Artifacts are in the project, whatever the current directory is.
    assert (project.root / "mlartifacts" / run_id / "artifacts" / "figures" / "2.png").is_file()


def sent_file(project, scratch, key):
    """The content of an artifact as MLflow's store has it."""
    _, run_id = mlflow_run(project, scratch)
    return (project.root / "mlartifacts" / run_id / "artifacts" / key).read_bytes()


def sent_grey(project, scratch):
    """The grey value of each image of a run in MLflow, which has one colour here."""
    client, run_id = mlflow_run(project, scratch)
    folder = project.root / "mlartifacts" / run_id / "artifacts"
    found = [folder / item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    return [Image.open(path).getpixel((0, 0)) for path in found]


def record_reports(scratch, project, value, settings=OFF):
    """Record a training and an evaluation, whose files in reports/ the next run replaces."""
    project.figures.mkdir(parents=True, exist_ok=True)
    (project.reports / "metrics.json").write_text(f'{{"reconstruction/ssim": {value}}}')
    Image.new("L", (8, 8), value).save(project.figures / "samples.png")
    with Tracker.open(scratch, settings, project, "a-run") as tracker:
        tracker.metrics({"reconstruction/ssim": value}, step=1)
        tracker.artifact(project.reports / "metrics.json", "reports")
        tracker.artifact(project.figures / "samples.png", "figures")
        tracker.image("samples", project.figures / "samples.png", step=0)


def test_each_run_gets_its_own_files_after_an_outage_and_a_move(project, tmp_path):
    """Both runs recorded files at the same paths in reports/; nothing had been sent before the project was moved."""
    mlflow_sync.connect(project, Tracking())  # creates the store
    store = Tracking(uri=f"sqlite:///{project.root}/mlflow.db")
    before = Project(tmp_path / "before")
    record_reports(before.runs / "first", before, 100)
    record_reports(before.runs / "second", before, 200)
    before.root.rename(tmp_path / "after")
    after = Project(tmp_path / "after")
    sync(after, store)
    for name, value in (("first", 100), ("second", 200)):
        scratch = after.runs / name
        assert points(project, scratch, "reconstruction/ssim") == [(0, value)]
        assert json.loads(sent_file(project, scratch, "reports/metrics.json")) == {"reconstruction/ssim": value}
        assert sent_grey(project, scratch) == [value]


def test_a_removed_or_overwritten_file_is_sent_as_it_was_recorded(project, scratch, capsys):
    """DVC removes a stage's outputs before it runs the stage again, and other programs write into files in place."""
    record_reports(scratch, project, 100)
    (project.figures / "samples.png").unlink()
    with (project.reports / "metrics.json").open("r+") as file:
        file.write("overwritten")
    sync(project, Tracking())
    assert json.loads(sent_file(project, scratch, "reports/metrics.json")) == {"reconstruction/ssim": 100}
    assert sent_grey(project, scratch) == [100]
    assert "not sent" not in capsys.readouterr().err


def files_of(scratch):
    """Size by name of the files that a run keeps."""
    return {path.name: path.stat().st_size for path in (scratch / tracking.FILES).glob("*")}


def test_a_run_keeps_each_content_once_and_only_the_latest_of_a_file(project, scratch, capsys):
    record_reports(scratch, project, 100)
    first = files_of(scratch)
    assert sorted(Path(name).suffix for name in first) == [".json", ".png"]  # the figure and the image are one file
    record_reports(scratch, project, 100)
    assert files_of(scratch) == first
    record_reports(scratch, project, 200)
    assert len(files_of(scratch)) == 2
    assert not files_of(scratch).keys() & first.keys()
    sync(project, Tracking())
    assert json.loads(sent_file(project, scratch, "reports/metrics.json")) == {"reconstruction/ssim": 200}
    assert sent_grey(project, scratch) == [200]
    assert not capsys.readouterr().err
    with Tracker.open(scratch, OFF, project, "a-run") as tracker:  # a file in the run's folder stays where it is
        Image.new("L", (8, 8)).save(scratch / "epoch_0001.png")
        tracker.image("samples", scratch / "epoch_0001.png", step=1)
    assert len(files_of(scratch)) == 2


def test_a_record_sends_no_file_from_outside_the_project(project, scratch, tmp_path_factory, capsys):
    """A record that came from elsewhere may name any file of this machine, also with its right hash."""
    record_reports(scratch, project, 100)
    secret = tmp_path_factory.mktemp("home") / "secret.txt"
    secret.write_text("secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    for path in (str(secret), os.path.relpath(secret, scratch)):
        event = {"kind": "artifact", "time": 1.0, "key": f"stolen/{len(path)}.txt", "folder": "stolen", "path": path}
        with (scratch / HISTORY).open("a") as file:
            file.write(json.dumps(event | {"sha256": digest}) + "\n")
    sync(project, Tracking())
    client, run_id = mlflow_run(project, scratch)
    assert not client.list_artifacts(run_id, "stolen") and client.list_artifacts(run_id, "reports")
    assert "2 recorded files" in " ".join(capsys.readouterr().err.split())


def test_a_record_of_an_earlier_version_is_sent_only_with_the_file_it_describes(project, scratch, capsys):
    """Earlier versions recorded the path in reports/ and the hash, without a copy."""
    record_reports(scratch, project, 100)
    lines = [json.loads(line) for line in (scratch / HISTORY).read_text().splitlines()]
    paths = {"reports/metrics.json": "reports/metrics.json", "figures/samples.png": "reports/figures/samples.png"}
    for line in lines:
        if "path" in line:
            line["path"] = f"../../{paths.get(line['key'], 'reports/figures/samples.png')}"
    (scratch / HISTORY).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (project.reports / "metrics.json").write_text('{"reconstruction/ssim": 200}')
    sync(project, Tracking())
    printed = capsys.readouterr()
    warning = " ".join(printed.err.split())
    expected = next(line["sha256"] for line in lines if line.get("key") == "reports/metrics.json")
    assert "1 recorded files are gone or have changed" in warning
    assert f"reports/metrics.json ({expected[:8]})" in warning and "params.json" in warning
    assert "1 refused" in printed.out
    client, run_id = mlflow_run(project, scratch)
    assert not client.list_artifacts(run_id, "reports")
    assert [item.path for item in client.list_artifacts(run_id, "figures")] == ["figures/samples.png"]
    assert sent_grey(project, scratch) == [100]


def test_a_killed_run_continues_in_the_same_mlflow_run(project, scratch):
    script = f"""
import os, signal, sys
from pathlib import Path
from medgen.config import Project, Tracking
from medgen.tracking import Tracker
tracker = Tracker.open(Path({str(scratch)!r}), Tracking(enabled=False), Project(Path({str(project.root)!r})), "a-run")
for step in range(8):
    tracker.metrics({{"loss": 1.0 / (step + 1)}}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [r["step"] for r in history(scratch)] == list(range(8))
    run = read_run(scratch)
    assert run.status == "INTERRUPTED"
    sync(project, Tracking())
    _, first = mlflow_run(project, scratch)
    record(scratch, project, Tracking(), range(5, 12))  # resumed from a checkpoint at step 5: the same values again
    _, second = mlflow_run(project, scratch)
    assert first == second
    assert points(project, scratch, "loss") == [(step, 1.0 / (step + 1)) for step in range(12)]


@pytest.mark.parametrize("state", [None, {"offset": 0}, {"run_id": "0" * 32}, "no json"])
def test_sending_again_changes_nothing_in_mlflow(project, scratch, state):
    """A process may be killed after it sends events and before it saves the offset."""
    scratch.mkdir(parents=True)
    image = scratch / "image.png"
    Image.new("L", (8, 8)).save(image)
    with Tracker.open(scratch, Tracking(), project, "a-run") as tracker:
        tracker.params({"a": 1})
        tracker.metrics({"loss": 1.0}, step=0)
        tracker.image("samples", image, step=0)
        tracker.dataset("phantom", "0123456789ab", "data", {"train": 3})
    client, run_id = mlflow_run(project, scratch)
    saved = scratch / mlflow_sync.STATE_FILE
    if state is None:
        saved.unlink()
    elif isinstance(state, str):
        saved.write_text(state)
    else:
        saved.write_text(json.dumps(json.loads(saved.read_text()) | state))
    sync(project, Tracking())
    assert mlflow_run(project, scratch)[1] == run_id
    assert points(project, scratch, "loss") == [(0, 1.0)]
    assert len(client.list_artifacts(run_id, "images")) == 2
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 1


def test_inf_and_nan_are_not_sent_to_mlflow(project, scratch):
    with Tracker.open(scratch, Tracking(), project, "a-run") as tracker:
        tracker.metrics({"loss": 1.0, "kl": 2.0}, step=0)
        tracker.metrics({"loss": math.nan, "kl": math.inf, "l1": 0.5}, step=1)
        tracker.metrics({"loss": -math.inf}, step=2)
    kept = history(scratch)
    assert math.isnan(kept[1]["loss"])
    assert (kept[1]["kl"], kept[2]["loss"]) == (math.inf, -math.inf)
    assert points(project, scratch, "loss") == [(0, 1.0)]
    assert points(project, scratch, "kl") == [(0, 2.0)]
    assert points(project, scratch, "l1") == [(1, 0.5)]
    client, run_id = mlflow_run(project, scratch)
    tags = client.get_run(run_id).data.tags
    assert (tags["nonfinite_step"], tags["nonfinite_metrics"]) == ("1", "kl, loss")


def test_changed_params_show_as_tags(project, scratch):
    """MLflow never changes a param: a run that continues with more epochs keeps the first value there."""
    for epochs in (10, 10, 20):
        with Tracker.open(scratch, Tracking(), project, "a-run") as tracker:
            tracker.params({"epochs": epochs, "rate": 0.1})
    client, run_id = mlflow_run(project, scratch)
    run = client.get_run(run_id)
    assert run.data.params == {"epochs": "10", "rate": "0.1"}
    assert {k: v for k, v in run.data.tags.items() if k.startswith("changed.")} == {"changed.epochs": "20"}
    kept = read_run(scratch)
    assert kept.params["epochs"] == 20


def test_refused_events_do_not_block_the_others(project, scratch, capsys):
    with Tracker.open(scratch, Tracking(), project, "a-run") as tracker:
        gone = scratch / "gone.png"
        Image.new("L", (8, 8)).save(gone)
        tracker.image("samples", gone, step=0)
        gone.unlink()
        tracker.metrics({"bad?name": 1.0, "good": 2.0}, step=0)
    assert points(project, scratch, "good") == [(0, 2.0)]
    warnings = " ".join(capsys.readouterr().err.split())
    assert "MLflow refused 1 records" in warnings
    assert "1 recorded files are gone or have changed" in warnings
    assert "gone.png" in warnings


@pytest.mark.parametrize("server", ["dead_server", "stalled_server"])
def test_an_unreachable_server_does_not_block_training(project, scratch, server, request, capsys):
    unreachable = Tracking(uri=request.getfixturevalue(server), timeout_seconds=1)
    begin = time.monotonic()
    with Tracker.open(scratch, unreachable, project, "a-run") as tracker:
        for step in range(2000):
            tracker.metrics({"loss": 1.0 / (step + 1)}, step=step)
        trained = time.monotonic() - begin
    assert trained < 20  # by default MLflow would block 246 s on the first call alone
    assert time.monotonic() - begin < 60
    assert "2003 records are not in MLflow yet: run `medgen sync`" in " ".join(capsys.readouterr().err.split())
    assert len(history(scratch)) == 2000
    with pytest.raises(UserError, match=r"does not answer.*medgen sync"):
        sync(project, unreachable)
    assert sync(project, Tracking()).num_sent >= 2003
    assert points(project, scratch, "loss") == [(step, 1.0 / (step + 1)) for step in range(2000)]
    assert sync(project, Tracking()).num_sent == 0


def test_the_load_of_the_machine_is_recorded_under_mlflows_names(tmp_path, monkeypatch):
    monkeypatch.setattr(uploader, "SAMPLE_SECONDS", 0.0)
    sampler = uploader.LoadSampler(History(tmp_path / HISTORY), Tracking())
    for _ in range(2):
        sampler.sample_if_due()
    events = [event for event, _ in read(tmp_path / HISTORY)]
    assert [event["step"] for event in events] == [0, 1]
    names = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"}
    assert {f"system/{name}" for name in names} <= events[0]["values"].keys()


def test_sync_waits_for_the_request_of_a_tracker_that_has_given_up(project, scratch, monkeypatch, capsys):
    """If both sent at once, the record would have two MLflow runs."""
    answers, connect = threading.Event(), mlflow_sync.connect
    monkeypatch.setattr(mlflow_sync, "connect", lambda *args: answers.wait(60) and connect(*args))
    monkeypatch.setattr(uploader, "CONNECT_SECONDS", 0.1)
    record(scratch, project, Tracking(), range(3))
    assert "records are not in MLflow yet" in capsys.readouterr().err
    monkeypatch.setattr(mlflow_sync, "SENDING_SECONDS", 0.1)
    with pytest.raises(Timeout):
        tracking.sync_run(scratch, project, Tracking())
    monkeypatch.setattr(mlflow_sync, "SENDING_SECONDS", 60)
    answers.set()
    synced = tracking.sync_run(scratch, project, Tracking())
    client, experiment = connect(project, Tracking())
    runs = client.search_runs([experiment], filter_string=f"tags.`medgen.run` = '{scratch.name}'")
    assert [run.info.run_id for run in runs] == [synced.run_id]
    assert points(project, scratch, "loss") == [(step, 1.0 / (step + 1)) for step in range(3)]


def test_sync_fills_an_emptied_store(tmp_path, project, scratch):
    """Another experiment stands in for a deleted store: all events are sent again."""
    record(scratch, project, Tracking(), range(3))
    other = Tracking(uri=Tracking().uri, experiment="another")
    assert sync(project, other).num_sent >= 3
    client, run_id = mlflow_run(project, scratch)
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == "another"
    assert points(project, scratch, "loss") == [(step, 1.0 / (step + 1)) for step in range(3)]


def test_the_error_names_a_deleted_experiment(project, scratch):
    gone = Tracking(experiment="gone")
    client, experiment = mlflow_sync.connect(project, gone)
    client.delete_experiment(experiment)
    record(scratch, project, OFF, range(1))
    with pytest.raises(UserError, match=r"tracking\.experiment: 'gone' was deleted in MLflow"):
        tracking.sync_run(scratch, project, gone)


def test_sync_without_tracking_is_refused(project):
    with pytest.raises(UserError, match=r"tracking\.enabled: is false"):
        sync(project, OFF)


@pytest.mark.parametrize(
    ("uri", "variable", "expected"),
    [
        ("sqlite:///mlflow.db", None, "sqlite:///{root}/mlflow.db"),
        ("sqlite:///sub/runs.db", None, "sqlite:///{root}/sub/runs.db"),
        ("sqlite:////abs/runs.db", None, "sqlite:////abs/runs.db"),
        ("http://host:5000", None, "http://host:5000"),
        ("sqlite:///mlflow.db", "http://env:5000", "http://env:5000"),
        ("http://host:5000", "http://env:5000", "http://host:5000"),
    ],
)
def test_store_uri(tmp_path, monkeypatch, uri, variable, expected):
    if variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    found = mlflow_sync.store_uri(Project(tmp_path), Tracking(uri=uri))
    assert found == expected.format(root=tmp_path.resolve())


@pytest.mark.slow
def test_processes_can_create_a_store_at_the_same_time(tmp_path):
    """Without the lock, processes that create MLflow's tables at once fail and break the database."""
    script = """
import sys
from pathlib import Path
from medgen.config import Project, Tracking
from medgen.tracking import mlflow_sync
mlflow_sync.load_mlflow(Tracking())
import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
sys.stdin.readline()
mlflow_sync.connect(Project(Path(sys.argv[1])), Tracking())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3, "\n".join(errors)


def test_mlflow_prints_no_traceback_of_a_database_that_fails(tmp_path, capfd):
    project, tracking = Project(tmp_path), Tracking()
    client, experiment = mlflow_sync.connect(project, tracking)
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("ALTER TABLE runs RENAME TO moved")  # as on a full disk, SQLite raises OperationalError
    database.commit()
    with pytest.raises(Exception, match="OperationalError"):
        client.create_run(experiment)
    assert capfd.readouterr() == ("", "")


LINEAGE = {
    *("git.commit", "git.branch", "git.dirty", "dataset.fingerprint", "data.md5", "params.fingerprint"),
    *("device", "gpu", "precision", "version.python", "version.torch", "version.torchvision", "version.medgen"),
    *("version.dvc", "version.mlflow", "dataset.name", "files"),
}


def make_repository(folder):
    for command in (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)


def test_lineage_is_complete(tmp_path):
    project = Project(tmp_path)
    make_repository(tmp_path)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    project.dataset.mkdir(parents=True)
    (project.dataset / "dataset.json").write_text('{"fingerprint": "0123456789ab", "name": "x"}')
    (tmp_path / ".gitignore").write_text("artifacts\n")
    (tmp_path / "data.dvc").write_text("outs:\n- md5: abcdef.dir\n  path: data\n")
    found = lineage(project, Params(), device="cpu", precision="fp32")
    assert set(found) == LINEAGE
    assert "unknown" not in found.values()
    assert found["git.commit"] == head.stdout.strip()
    assert (found["git.branch"], found["git.dirty"]) == ("main", "true")
    assert (found["dataset.fingerprint"], found["data.md5"]) == ("0123456789ab", "abcdef.dir")
    assert found["params.fingerprint"] != lineage(project, Params(model=Model(base_channels=8)))["params.fingerprint"]


def test_files_that_the_pipeline_writes_do_not_count_as_dirty(tmp_path):
    make_repository(tmp_path)
    (tmp_path / "dvc.lock").write_text("x")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "metrics.json").write_text("{}")
    assert lineage(Project(tmp_path))["git.dirty"] == "false"


def test_lineage_without_git_and_data(tmp_path):
    found = lineage(Project(tmp_path))
    assert set(found) == LINEAGE
    assert (found["git.commit"], found["git.dirty"], found["data.md5"]) == ("unknown", "unknown", "unknown")


@pytest.mark.parametrize(
    ("code", "message"),
    [(401, "requires a login; set MLFLOW_TRACKING_USERNAME"), (403, "denies access to this account")],
)
def test_a_server_that_denies_access_has_its_own_error(tmp_path, code, message):
    class Closed(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(code)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    project = Project(tmp_path)
    with Tracker.open(project.runs / "0123456789ab", Tracking(enabled=False), project, "a run") as tracker:
        tracker.metrics({"val/ssim": 0.5}, step=1)
    with HTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        closed = Tracking(uri=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match=message):
            sync(project, closed)
        server.shutdown()
