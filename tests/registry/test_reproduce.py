"""`medgen history --reproduce`: the printed commands, and errors if a version cannot be rebuilt.

tests/test_story.py rebuilds a version with `--run`.
"""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from medgen.config import Params, Project, Registry, Tracking
from medgen.errors import Refused, UserError
from medgen.registry import reproduce as reproduce_module
from medgen.registry.versions import Version
from medgen.tracking.lineage import hash_files
from medgen.tracking.mlflow_sync import connect

DOWNLOADS: dict[str, Path] = {}  # by URI of a version
PARAMS = {"train": {"batch_size": 8}, "tracking": {"experiment": "other"}}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in a subfolder of a repository, with a space in its name."""
    repository = tmp_path_factory.mktemp("repository")
    project = Project(repository / "our X-rays")
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
    """`register(params, **tags)` creates a version and returns its number."""
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
        DOWNLOADS[f"models:/medgen/{made.version}"] = source
        return int(made.version)

    return add


@pytest.fixture(autouse=True)
def local_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """These versions hold only params.json; tests/registry/test_registry.py tests downloads from MLflow."""
    monkeypatch.setattr(reproduce_module, "download_version", lambda uri, *_: DOWNLOADS[uri])


def reproduce(project: Project, version: int, run: bool = False) -> dict[str, float]:
    return reproduce_module.reproduce(project, tracking=Tracking(), registry=Registry(), version=version, run=run)


def test_commands_check_out_the_commit_and_folder(project: Project, register: Any, capsys: Any) -> None:
    reproduce(project, register())
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]
    commit = git(project.root, "rev-parse", "HEAD")
    tree = commands[0][4]
    assert commands[0] == ["git", "worktree", "add", "--detach", "../../medgen-1", commit]
    assert commands[1] == ["cd", f"{tree}/our X-rays"]
    assert commands[2] == ["dvc", "config", "--local", "cache.dir", str(project.root / ".dvc" / "cache")]
    assert commands[3][:3] == ["dvc", "checkout", "data.dvc"]
    assert commands[4] == ["dvc", "repro", "--force", "--no-run-cache"]
    assert len(commands) == 5


def test_tags_cannot_add_commands(project: Project, register: Any, capsys: Any) -> None:
    """Anyone with access to the registry may edit a tag, and the commands are made to be run."""
    attack = "cpu\ntouch PWNED\x1b[2K"
    reproduce(project, register(device=attack, version_torch=attack, data_md5="abc.dir", git_dirty=attack))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() and line.startswith("#") for line in lines if "PWNED" in line or "[2K" in line)
    assert any("PWNED" in line for line in lines)


@pytest.mark.parametrize("params", [PARAMS | {"tracking": {"experiment": "mine"}}, None])
def test_parameters_are_not_downloaded_if_the_commit_gives_the_same_result(
    project: Project, register: Any, capsys: Any, params: dict[str, Any] | None
) -> None:
    """They differ in the tracking section only, or an older medgen did not store them."""
    reproduce(project, register(params))
    assert "params.json" not in capsys.readouterr().out


def test_parameters_that_the_commit_lacks_are_downloaded(project: Project, register: Any, capsys: Any) -> None:
    number = register({"train": {"batch_size": 16}})
    reproduce(project, number)
    assert f"models:/medgen/{number}/artifacts/params.json" in capsys.readouterr().out


def test_a_start_from_a_version_is_read_from_this_project_s_store(project: Project, register: Any, capsys: Any) -> None:
    params = {"train": {"init_from": f"models:/medgen/1#sha256={64 * '0'}"}}
    reproduce(project, register(params))
    assert f"export MLFLOW_TRACKING_URI=sqlite:///{project.root}/mlflow.db" in capsys.readouterr().out.replace("'", "")


def test_a_start_from_a_folder_that_git_does_not_have_is_copied(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[dict[str, str]] = []
    monkeypatch.setattr(reproduce_module, "_dvc", lambda *_, **variables: ran.append(variables))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.json").write_text("{}")
    tree = Project(tmp_path / "tree")
    tree.root.mkdir()
    params = {"train": {"init_from": f"weights#sha256={64 * '0'}"}}
    reproduce_module._run_stages(tree, Project(tmp_path), Tracking(), None, params)
    assert (tree.root / "weights" / "model.json").read_text() == "{}"
    assert json.loads((tree.root / "params.yaml").read_text())["train"] == params["train"]
    assert ran == [{"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}]
    with pytest.raises(UserError, match=r"train\.init_from: .*gone: not found"):
        reproduce_module._run_stages(tree, Project(tmp_path), Tracking(), None, {"train": {"init_from": "gone"}})


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"git_commit": "unknown"}, "its commit is unknown"),
        ({"git_commit": "0" * 40}, "this repository does not have its commit 0+; run `git fetch --all`"),
        ({"git_commit": "--help"}, "git.commit is '--help', so it was changed"),
        ({"git_commit": "HEAD^{/L|$(>PWNED)}"}, r"git.commit is 'HEAD.*', so it was changed"),
    ],
)
def test_unknown_commit_is_an_error(project: Project, register: Any, tags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reproduce(project, register(**tags))


def test_version_with_uncommitted_changes_is_not_rebuilt(project: Project, register: Any, capsys: Any) -> None:
    number = register(git_dirty="true")
    reproduce(project, number)
    assert "changes that are not in this commit" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"uncommitted changes, so commit [0-9a-f]{12} cannot rebuild it"):
        reproduce(project, number, run=True)


@pytest.mark.parametrize(("code", "warns"), [("0" * 12, True), (None, False)])
def test_version_of_another_installed_medgen_is_named(
    project: Project, register: Any, capsys: Any, code: str | None, warns: bool
) -> None:
    files = hash_files(project.root, ["prior"])
    files["medgen:prior"] = code or files["medgen:prior"]
    reproduce(project, register(files=json.dumps(files), version_medgen="0.0.9"))
    assert ("was made with medgen 0.0.9, whose code differs" in " ".join(capsys.readouterr().err.split())) is warns


def test_failed_stage_keeps_its_worktree(project: Project, register: Any) -> None:
    with pytest.raises(UserError, match=r"ended with exit code .*is kept so that you can inspect it") as failed:
        reproduce(project, register(), run=True)  # no dvc.yaml, and no data in the cache
    tree = Path(shlex.split(str(failed.value).rpartition("remove --force ")[2].partition("`")[0])[0])
    assert (tree / "our X-rays" / "params.yaml").is_file()
    git(project.root, "worktree", "remove", "--force", str(tree))
    assert git(project.root, "status", "--porcelain") == ""


REGISTERED = {
    "reconstruction/ssim": 0.8,
    "generation/mmd_domain": 0.1,
    "generation/mmd_domain_ci_low": 0.0,
    "generation/mmd_domain_ci_high": 0.2,
}
COMPARED: dict[str, tuple[dict[str, float], bool, str, str]] = {
    "identical": (REGISTERED, True, "", "byte for byte; 4 of 4"),
    "within the tolerance": (REGISTERED | {"reconstruction/ssim": 0.795}, False, "", "1 of 4 metrics differ"),
    "lower ssim": (REGISTERED | {"reconstruction/ssim": 0.78}, False, "another one: reconstruction/ssim", ""),
    "higher ssim": (REGISTERED | {"reconstruction/ssim": 0.82}, False, "reconstruction/ssim", ""),
    "higher mmd": (REGISTERED | {"generation/mmd_domain": 0.21}, False, "another one: generation/mmd_domain", ""),
    "no common metric": ({"segmentation/dice": 0.9}, False, "no metric in common", ""),
}


@pytest.mark.parametrize("case", COMPARED)
def test_comparison_of_registered_and_rebuilt(case: str, capsys: Any) -> None:
    metrics, is_identical, refused, printed = COMPARED[case]
    version = Version("medgen", 1, "run", {name: f"{value:g}" for name, value in REGISTERED.items()})
    if refused:
        with pytest.raises(Refused, match=refused):
            reproduce_module._compare(version, metrics, is_identical)
    else:
        reproduce_module._compare(version, metrics, is_identical)
        assert printed in capsys.readouterr().out
