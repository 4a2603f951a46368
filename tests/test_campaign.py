"""`make campaign`: its short form finds nothing, and what it checks is what it says it checks."""

import faulthandler
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.campaign import faults, mutations, project, scenarios
from benchmarks.campaign.lab import Lab
from benchmarks.campaign.process import MARK, Violation, start_function


@pytest.mark.slow
@pytest.mark.parametrize("names", ["kills,full disk,clock jumps,files"])
def test_one_round_of_some_scenarios_finds_no_violation(root: Path, tmp_path: Path, names: str) -> None:
    command = [sys.executable, "-m", "benchmarks.campaign", "--rounds", "1", "--only", names, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "out" / "campaign.md").read_text()
    assert re.search(r"\| all \| [34] \|(.* \| 0){4} \|", table), table
    assert [path.name for path in tmp_path.glob("out/*")] == ["campaign.md"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs another one as the campaign does, and returns its output; its folder is tmp_path/lab."""
    (tmp_path / "lab").mkdir()
    monkeypatch.setenv(MARK, str(tmp_path / "lab"))

    def call(function) -> str:
        child = start_function(function, tmp_path / "lab" / "log")
        child.wait(30)
        return child.output()

    return call


def test_a_file_outside_is_found(run, tmp_path: Path) -> None:
    run(lambda: (tmp_path / "lab" / "inside").write_text("x"))
    with pytest.raises(Violation, match="outside") as found:
        run(lambda: (tmp_path / "outside").write_text("x"))
    assert found.value.kind == "bytes outside"


def test_a_program_that_a_file_starts_is_found(run) -> None:
    import pickle

    with pytest.raises(Violation, match="ran") as found:
        run(lambda: pickle.loads(mutations.hostile_pickle()))
    assert found.value.kind == "code run"


def test_a_command_that_hangs_is_found(run, tmp_path: Path) -> None:
    def hang() -> None:
        faulthandler.disable()  # pytest's would print to the terminal
        os.read(os.pipe()[0], 1)

    child = start_function(hang, tmp_path / "lab" / "log")
    with pytest.raises(Violation, match="still running"):
        child.wait(0.2)


@pytest.mark.skipif(bool(scenarios.unavailable("power cuts")), reason="needs root and a loop device")
def test_a_power_cut_loses_what_was_not_flushed(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    try:
        disk = faults.new_disk(lab)
        for name in ("flushed", "not flushed"):
            temporary = lab.project / f"{name}.tmp"
            with temporary.open("wb") as file:
                file.write(b"x" * 5000)
                file.flush()
                if name == "flushed":
                    os.fsync(file.fileno())
            temporary.rename(lab.project / name)
        with (lab.project / "last").open("wb") as file:
            os.fsync(file.fileno())  # writes the journal, with the new names
        faults.after_cut(lab, disk)
        sizes = {path.name: path.stat().st_size for path in lab.project.iterdir() if path.is_file()}
        assert sizes == {"flushed": 5000, "not flushed": 0, "last": 0}
    finally:
        lab.close()


def test_other_bytes_and_half_written_files_are_found(tmp_path: Path) -> None:
    model = tmp_path / "artifacts" / "model" / "model.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}")
    expected = project.digest(tmp_path)
    project.check_same(tmp_path, expected)
    model.with_name("model.json.tmp").touch()
    with pytest.raises(Violation, match=r"half-written: .*model\.json\.tmp|differs"):
        project.check_same(tmp_path, project.digest(tmp_path))
    model.with_name("model.json.tmp").unlink()
    model.write_text("{ }")
    with pytest.raises(Violation, match=r"differs .*: artifacts/model/model\.json"):
        project.check_same(tmp_path, expected)


def test_two_mlflow_runs_of_one_record_are_found() -> None:
    database = sqlite3.connect(":memory:")
    database.executescript(
        "CREATE TABLE experiments (experiment_id, name); CREATE TABLE runs (run_uuid, experiment_id);"
        "CREATE TABLE tags (run_uuid, key, value); CREATE TABLE metrics (run_uuid, key, step);"
        "INSERT INTO experiments VALUES (1, 'medgen'); INSERT INTO runs VALUES ('a', 1), ('b', 1);"
        "INSERT INTO tags VALUES ('a', 'medgen.id', 'x'); INSERT INTO metrics VALUES ('a', 'loss', 1), ('a', 'loss', 1)"
    )
    assert project.stored_points(database) == Counter({("loss", 1): 2})
    database.execute("INSERT INTO tags VALUES ('b', 'medgen.id', 'x')")
    with pytest.raises(Violation, match="several runs"):
        project.stored_points(database)


def test_a_seed_repeats_its_mutations() -> None:
    first, again, other = (mutations.mutate(bytes(range(256)), random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
