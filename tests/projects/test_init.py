"""`medgen init`: a project in which `dvc repro` runs; nothing of the user is replaced."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medgen.config import load
from medgen.datasets.sample import draw
from medgen.errors import UserError
from medgen.projects import init

FILES = {"params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", "README.md"}
OUTPUTS = ["data", "artifacts/model", "reports/metrics.json", "runs/x", "outputs/x", "mlflow.db-wal", "mlartifacts/x"]


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def commands(monkeypatch):
    """The commands that would make git and DVC repositories; git alone runs."""
    seen = []

    def run(folder, *command):
        seen.append(" ".join(command[command.index("-m") + 1 :] if "-m" in command else command))
        if command[0] == "git":
            assert git(folder, *command[1:]).returncode == 0

    monkeypatch.setattr(init, "_run", run)
    return seen


def test_a_project_has_parameters_pipeline_git_and_dvc(tmp_path, root):
    draw(tmp_path / "images", num_images=9, size=32, seed=0)
    project = tmp_path / "xray"
    init.init(project, "chest-xray-64", tmp_path / "images")
    assert FILES | {"data", "data.dvc", ".git", ".dvc"} == {path.name for path in project.iterdir()}
    assert (project / "dvc.yaml").read_bytes() == (root / "dvc.yaml").read_bytes()
    params, recipe = load(project / "params.yaml"), load(root / "recipes" / "chest-xray-64.yaml")
    assert params.data.name == params.registry.model_name == "images"
    assert params.model_copy(update={"data": recipe.data, "registry": recipe.registry}) == recipe
    assert (project / "README.md").read_text().startswith("# xray\n")
    assert git(project, "check-ignore", *OUTPUTS).stdout.split() == OUTPUTS
    assert git(project, "check-ignore", *FILES, "dvc.lock", "data.dvc", ".dvc/config").stdout == ""
    status = [sys.executable, "-m", "dvc", "status", "data.dvc"]
    assert "up to date" in subprocess.run(status, cwd=project, capture_output=True, text=True).stdout
    assert "analytics = false" in (project / ".dvc" / "config").read_text()


def test_a_git_repository_is_kept(tmp_path, commands):
    git(tmp_path, "init", "-q")
    head = (tmp_path / ".git" / "HEAD").read_text()
    (tmp_path / "notes.txt").write_text("mine")
    init.init(tmp_path)
    assert commands == ["dvc init --quiet", "dvc config core.analytics false"]
    assert (tmp_path / ".git" / "HEAD").read_text() == head
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_a_git_repository_belongs_to_it_unless_it_is_ignored(tmp_path, commands):
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("/outputs/\n")
    init.init(tmp_path / "xray")
    assert commands == ["dvc init --quiet --subdir", "dvc config core.analytics false"]
    init.init(tmp_path / "outputs" / "xray")
    assert commands[2:] == ["git init --quiet", "dvc init --quiet", "dvc config core.analytics false"]


def test_a_machine_without_git_gets_a_project_too(tmp_path, commands, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    init.init(tmp_path)
    assert commands[0] == "dvc init --quiet --no-scm"
    assert "git is not installed" in capsys.readouterr().err


def test_no_file_is_replaced(tmp_path, commands):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / ".gitignore").write_text("*.tmp")
    with pytest.raises(UserError, match=r"\.gitignore, \S*README\.md: found with other content"):
        init.init(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"README.md": "mine", ".gitignore": "*.tmp"}
    assert commands == []


def test_the_same_command_again_changes_nothing(tmp_path, commands):
    init.init(tmp_path)
    (tmp_path / ".dvc").mkdir()
    before, done = {path: path.stat().st_size for path in tmp_path.iterdir()}, len(commands)
    init.init(tmp_path)
    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before
    assert len(commands) == done


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("new", {"recipe": "chest-xray"}, "unknown name 'chest-xray'"),
        ("new", {"data": Path("nowhere")}, "--data nowhere: not found"),
        ("new", {"data": Path("new/data")}, "already the project's data folder.*dvc add data"),
        ("new", {"data": Path("images")}, "files that DVC does not track"),
        ("file/new", {}, "cannot be written"),
    ],
)
def test_a_mistake_leaves_the_folder_as_it_is(tmp_path, commands, monkeypatch, folder, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("new/data/a.png", "images/b.png", "file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        init.init(Path(folder), **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert commands == []
