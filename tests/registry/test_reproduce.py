"""What a user is promised of `medgen history --reproduce`: commands that make a version again, or why there are none.

tests/test_story.py rebuilds a version for real.
"""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from medgen.config import Params, Project, Registry, Tracking
from medgen.errors import Refused, UserError
from medgen.registry import reproduce as rebuild
from medgen.registry.versions import Version
from medgen.tracking.mlflow_sync import connect

FETCHED: dict[str, Path] = {}  # URI of a version -> what is fetched of it
PARAMS = {"train": {"batch_size": 8}, "tracking": {"experiment": "other"}}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in a folder, with a space in its name, of a repository."""
    repository = tmp_path_factory.mktemp("repository")
    project = Project(repository / "our films")
    project.root.mkdir()
    (project.root / "params.yaml").write_text(json.dumps(PARAMS))
    (project.root / "data.dvc").write_text("outs:\n- md5: abc.dir\n  path: data\n")
    (repository / ".gitignore").write_text("mlflow.db*\nmlartifacts\n")
    git(repository, "init", "-q")
    subprocess.run(["dvc", "init", "-q", "--subdir"], cwd=project.root, check=True)
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "start")
    return project


@pytest.fixture(scope="module")
def register(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`register(params, tags)` makes a version and gives its number."""
    client, _ = connect(project, Tracking())
    client.create_registered_model("medgen")

    def add(params: dict[str, Any] | None = PARAMS, **changes: str) -> int:
        source = tmp_path_factory.mktemp("version")
        if params is not None:
            (source / "params.json").write_text(Params.model_validate(params).model_dump_json())
        commit = git(project.root, "rev-parse", "HEAD")
        tags = {"git.commit": commit, "git.dirty": "false", "data.md5": "abc.dir", "version.torch": "2.15.0"}
        tags |= {name.replace("_", "."): value for name, value in changes.items()}
        made = client.create_model_version("medgen", source=str(source), tags=tags)
        FETCHED[f"models:/medgen/{made.version}"] = source
        return int(made.version)

    return add


@pytest.fixture(autouse=True)
def a_store_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its versions are no real models, so they are not fetched by MLflow, which tests/test_registry.py looks at."""
    monkeypatch.setattr(rebuild, "load", lambda uri, *_: FETCHED[uri])


def reproduce(project: Project, version: int, run: bool = False) -> dict[str, float]:
    return rebuild.reproduce(project, tracking=Tracking(), registry=Registry(), version=version, run=run)


def test_the_commands_lead_to_the_very_commit_and_folder(project: Project, register: Any, capsys: Any) -> None:
    reproduce(project, register())
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]
    commit = git(project.root, "rev-parse", "HEAD")
    tree = commands[0][4]
    assert commands[0] == ["git", "worktree", "add", "--detach", "../../medgen-1", commit]
    assert commands[1] == ["cd", f"{tree}/our films"]
    assert commands[2] == ["dvc", "config", "--local", "cache.dir", str(project.root / ".dvc" / "cache")]
    assert commands[3][:3] == ["dvc", "checkout", "data.dvc"]
    assert commands[4] == ["dvc", "repro", "--force", "--no-run-cache"]
    assert len(commands) == 5


@pytest.mark.parametrize("params", [PARAMS | {"tracking": {"experiment": "mine"}}, None])
def test_what_does_not_change_the_result_needs_no_parameters(
    project: Project, register: Any, capsys: Any, params: dict[str, Any] | None
) -> None:
    """The same ones as in the commit but for tracking; or a version of a medgen that did not keep them."""
    reproduce(project, register(params))
    assert "params.json" not in capsys.readouterr().out


def test_parameters_that_the_commit_lacks_are_fetched(project: Project, register: Any, capsys: Any) -> None:
    number = register({"train": {"batch_size": 16}})
    reproduce(project, number)
    assert f"models:/medgen/{number}/artifacts/params.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"git_commit": "unknown"}, "does not say from which commit"),
        ({"git_commit": "0" * 40}, "which this repository does not have; run `git fetch --all`"),
        ({"git_commit": "--help"}, "which this repository does not have"),
    ],
)
def test_what_cannot_be_rebuilt(project: Project, register: Any, tags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reproduce(project, register(**tags))


def test_changed_files_are_said_and_not_rebuilt(project: Project, register: Any, capsys: Any) -> None:
    number = register(git_dirty="true")
    reproduce(project, number)
    assert "changes that are not in this commit" in capsys.readouterr().out
    with pytest.raises(UserError, match="so it cannot be rebuilt"):
        reproduce(project, number, run=True)


def test_a_stage_that_fails_leaves_its_work_tree(project: Project, register: Any) -> None:
    with pytest.raises(UserError, match=r"ended with exit code .*is left for a look") as failed:
        reproduce(project, register(), run=True)  # no dvc.yaml, and no data in the cache
    tree = Path(shlex.split(str(failed.value).rpartition("remove --force ")[2].partition("`")[0])[0])
    assert (tree / "our films" / "params.yaml").is_file()
    git(project.root, "worktree", "remove", "--force", str(tree))
    assert git(project.root, "status", "--porcelain") == ""


REGISTERED = {
    "reconstruction/ssim": 0.8,
    "generation/mmd_domain": 0.1,
    "generation/mmd_domain_ci_low": 0.0,
    "generation/mmd_domain_ci_high": 0.2,
}
COMPARED: dict[str, tuple[dict[str, float], bool, str, str]] = {
    "the same": (REGISTERED, True, "", "byte for byte; 4 of 4"),
    "as good": (REGISTERED | {"reconstruction/ssim": 0.795}, False, "", "1 of 4 metrics differ"),
    "ssim": (REGISTERED | {"reconstruction/ssim": 0.78}, False, "another model: reconstruction/ssim", ""),
    "better is another model too": (REGISTERED | {"reconstruction/ssim": 0.82}, False, "reconstruction/ssim", ""),
    "mmd": (REGISTERED | {"generation/mmd_domain": 0.21}, False, "another model: generation/mmd_domain", ""),
    "nothing to compare": ({"segmentation/dice": 0.9}, False, "no metric in common", ""),
}


@pytest.mark.parametrize("case", COMPARED)
def test_registered_and_rebuilt(case: str, capsys: Any) -> None:
    metrics, same, refused, told = COMPARED[case]
    version = Version("medgen", 1, "run", {name: f"{value:g}" for name, value in REGISTERED.items()})
    if refused:
        with pytest.raises(Refused, match=refused):
            reproduce._compare(version, metrics, same)
    else:
        reproduce._compare(version, metrics, same)
        assert told in capsys.readouterr().out
