"""`medgen compare`: a table of several runs, without a server."""

import json

import pytest

from medgen import console
from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.tracking import Tracker
from medgen.tracking.compare import compare

OFF = Tracking(enabled=False)


@pytest.fixture
def project(tmp_path):
    """A project with two runs, of which bbb started before aaa."""
    project = Project(tmp_path)
    for run, channels, losses in (("bbb", 32, (0.5, 0.25)), ("aaa", 64, (0.4, float("inf")))):
        with Tracker.open(project.runs / run, OFF, project, f"vae-{run}") as tracker:
            tracker.params({"model": {"base_channels": channels}, "train": {"seed": 0}})
            for step, loss in enumerate(losses):
                tracker.metrics({"val/loss": loss}, step=step)
            tracker.metrics({"generation/mmd_domain": 0.125, "generation/mmd_domain_floor": 0.0625}, step=1)
    (project.runs / "killed-before-its-first-line").mkdir()
    return project


def test_runs_are_shown_side_by_side(project, capsys):
    rows = compare(project)
    assert [(row.run, row.name, row.status) for row in rows] == [
        ("bbb", "vae-bbb", "finished"),
        ("aaa", "base_channels=64 (aaa)", "finished"),
    ]
    # parameters that are equal in all runs are left out
    assert [row.params for row in rows] == [{"model.base_channels": 32}, {"model.base_channels": 64}]
    assert [row.metrics["val/loss"] for row in rows] == [0.25, 0.4]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("bbb", "aaa", "model.base_channels", "0.25", "0.4", "0.125"))
    assert "mmd_domain_floor" not in printed, "references are in the JSON output only"
    assert "train.seed" not in printed


def test_minutes_are_those_of_the_training(tmp_path):
    """A stage that adds its results days later does not count, nor does the time between a kill and its resume."""
    day = 86400.0
    events = [
        {"kind": "run", "time": 0.0, "id": "0" * 32, "name": "vae", "key": ""},
        {"kind": "status", "time": 0.0, "status": "RUNNING", "process": 1, "key": ""},
        {"kind": "metrics", "time": 60.0, "step": 1, "values": {"val/loss": 0.5}},  # then killed
        {"kind": "status", "time": day, "status": "RUNNING", "process": 2, "key": ""},
        {"kind": "metrics", "time": day + 120.0, "step": 2, "values": {"val/loss": 0.25}},
        {"kind": "status", "time": day + 120.0, "status": "FINISHED", "key": ""},
        {"kind": "status", "time": 3 * day, "status": "RUNNING", "process": 3, "key": ""},
        {"kind": "metrics", "time": 3 * day, "step": 2, "values": {"generation/kid_domain": 1.0}},
        {"kind": "status", "time": 3 * day, "status": "FINISHED", "key": ""},
    ]
    folder = tmp_path / "runs" / "aaa"
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    (row,) = compare(Project(tmp_path))
    assert row.minutes == 3.0


def test_a_process_that_continues_a_killed_one_records_its_begin(tmp_path, monkeypatch):
    """A killed process leaves no end in the record."""
    for process in (1, 2):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        Tracker.open(tmp_path / "aaa", OFF, Project(tmp_path), "vae").finish("RUNNING")
    events = map(json.loads, (tmp_path / "aaa" / "history.jsonl").read_text().splitlines())
    assert [event["process"] for event in events if "process" in event] == [1, 2]


def test_json_output(project, capsys):
    compare(project, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in rows] == ["bbb", "aaa"]
    assert rows[0]["metrics"]["val/loss"] == 0.25
    assert rows[0]["metrics"]["generation/mmd_domain_floor"] == 0.0625


def test_many_runs_fit_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console.OUT, "width", 80)
    project = Project(tmp_path)
    for run in range(7):
        with Tracker.open(project.runs / f"run{run}", OFF, project, "vae") as tracker:
            tracker.params({"model": {"base_channels": run}})
            tracker.metrics({"val/loss": 0.5 + run}, step=0)
    compare(project)
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert all(f"run{run}" in printed for run in range(7))
    assert all(str(0.5 + run) in printed for run in range(7))


def test_no_runs_yet(tmp_path):
    with pytest.raises(UserError, match="no runs yet; run `medgen train`"):
        compare(Project(tmp_path))


def test_hostile_names_of_parameters_and_runs_are_shown_literally(tmp_path, capsys):
    project = Project(tmp_path)
    for run, epochs in (("aaa", 1), ("bbb", 2)):
        with Tracker.open(project.runs / run, OFF, project, "vae") as tracker:
            tracker.params({"train": {"phases": {"[/x]": {"epochs": epochs}, "\x1b[31m": {"epochs": f"[/{epochs}]"}}}})
    compare(project)
    printed = capsys.readouterr().out
    assert "[/x]" in printed and "[/2]" in printed
    assert "\x1b" not in printed
