"""The origin of a version: train, look, commit, promote; which files count, and what the messages say to do."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from medgen.config import Params, Project, Registry, Tracking
from medgen.errors import Refused
from medgen.registry.ledger import Entry
from medgen.registry.origin import is_known, origin_tags
from medgen.registry.promotion import promote
from medgen.source import PACKAGE
from medgen.tracking import lineage
from medgen.tracking.lineage import SECTIONS, find_changes, hash_files
from medgen.tracking.mlflow_sync import connect

STAGES = ("train", "prior", "refiner", "evaluate")
EVALUATED = {
    "dataset.fingerprint": "ba9876543210",
    "evaluated.dataset": "ba9876543210",
    "evaluated.extractor": "e" * 64,
    "evaluated.values": "0",
    "params.fingerprint": "abc123",
    "reconstruction/ssim": "0.85",
    "privacy/copy_rate": "0.01",
    "privacy/copy_rate_plausible": "0.05",
    "privacy/nearest_over_limit": "0.9",
    "privacy/held_out_limit": "0.5",
}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "change")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Project:
    """A project with an installed medgen, in a repository with one commit."""
    for name in ("params.yaml", "dvc.yaml", "data.dvc", ".gitignore"):
        shutil.copy(root / name, tmp_path / name)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return Project(tmp_path)


def made_now(project: Project) -> dict[str, str]:
    """The tags of a version of which every part is made now."""
    stages = [lineage(project, Params(), stage=stage) for stage in STAGES]
    return stages[0] | origin_tags(project.root, stages) | EVALUATED


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """A store that all tests share, since a new one takes seconds."""
    return Tracking(uri=f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@dataclass(frozen=True)
class Version:
    client: Any
    name: str
    project: Project
    tracking: Tracking

    def promote(self) -> Entry | None:
        return promote(self.project, tracking=self.tracking, registry=Registry(model_name=self.name))

    def tags(self) -> dict[str, str]:
        return self.client.get_model_version(self.name, "1").tags


@pytest.fixture
def register(tracking: Tracking, project: Project) -> Callable[[dict[str, str]], Version]:
    """`register(tags)` creates the first version of a registered model of its own."""

    def add(tags: dict[str, str]) -> Version:
        client, _ = connect(project, tracking)
        name = f"model-{project.root.name}"
        client.create_registered_model(name)
        client.create_model_version(name, source=str(project.root), tags=tags)
        client.set_registered_model_alias(name, "candidate", "1")
        return Version(client, name, project, tracking)

    return add


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_train_look_commit_promote(project: Project, register: Any) -> None:
    replace(project.root / "params.yaml", "batch_size: 16", "batch_size: 8")
    version = register(made_now(project))
    with pytest.raises(Refused) as refused:
        version.promote()
    text = "The files that it was made from are in no commit. Commit them, and promote again: `git add params.yaml && "
    assert f"git commit failed. {text}git commit -m" in str(refused.value)
    assert "medgen promote --version 1" in str(refused.value)
    git(project.root, "add", "params.yaml")
    git(project.root, "commit", "-qm", "change")
    head = git(project.root, "rev-parse", "HEAD")
    (project.root / "dvc_plots").mkdir()
    (project.root / "dvc_plots" / "index.html").write_text("plots")

    assert getattr(version.promote(), "after", None) == 1
    assert (version.tags()["git.commit"], version.tags()["git.dirty"]) == (head, "false")


def test_a_commit_before_the_last_one_is_found(project: Project, register: Any) -> None:
    replace(project.root / "params.yaml", "batch_size: 16", "batch_size: 8")
    version = register(made_now(project))
    origin = commit(project.root)
    replace(project.root / "params.yaml", "batch_size: 8", "batch_size: 4")
    commit(project.root)
    assert getattr(version.promote(), "after", None) == 1
    assert version.tags()["git.commit"] == origin


def test_files_that_changed_since_are_named_with_the_commands(project: Project, register: Any) -> None:
    replace(project.root / "params.yaml", "batch_size: 16", "batch_size: 8")
    version = register(made_now(project))
    replace(project.root / "params.yaml", "batch_size: 8", "batch_size: 4")
    again = "dvc repro --force && medgen promote`"
    with pytest.raises(
        Refused, match=rf"changed: params\.yaml:train\. Commit, then run again: `git add params\.yaml .*{again}"
    ):
        version.promote()
    commit(project.root)
    with pytest.raises(Refused, match=rf"changed: params\.yaml:train\. Run again: `{again}"):
        version.promote()


@pytest.mark.parametrize("tags", [{"files": None}, {"files": "damaged"}, {"data.md5": "unknown"}])
def test_version_without_a_record_of_its_files_or_data_has_to_be_made_again(
    project: Project, register: Any, tags: dict[str, str | None]
) -> None:
    whole = made_now(project) | {"git.dirty": "true"} | tags
    version = register({key: value for key, value in whole.items() if value is not None})
    with pytest.raises(Refused, match=r"Run again: `dvc repro --force && medgen promote`"):
        version.promote()


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda root: None, []),
    "plots of DVC": (lambda root: (root / "dvc_plots").mkdir() or (root / "dvc_plots" / "a.html").touch(), []),
    "dvc.lock": (lambda root: (root / "dvc.lock").write_text("x"), []),
    "a report": (lambda root: (root / "reports").mkdir() or (root / "reports" / "metrics.json").touch(), []),
    "the file before a recipe": (lambda root: (root / "params.yaml.before").touch(), []),
    "untracked notes": (lambda root: (root / "notes.py").write_text("x = 1"), []),
    "a comment": (lambda root: replace(root / "params.yaml", "train:", "train:  # faster"), []),
    "parameters of another stage": (
        lambda root: replace(root / "params.yaml", "num_generated: 2000", "num_generated: 9"), []
    ),
    "parameters of the stage": (
        lambda root: replace(root / "params.yaml", "batch_size: 16", "batch_size: 8"), ["params.yaml:train"]
    ),
    "parameters of preprocess": (
        lambda root: replace(root / "params.yaml", "image_size: 64", "image_size: 32"), ["params.yaml:preprocess"]
    ),
    "the pipeline": (lambda root: replace(root / "dvc.yaml", "medgen train", "medgen train -v"), ["dvc.yaml:train"]),
    "another stage of the pipeline": (lambda root: replace(root / "dvc.yaml", "medgen prior", "medgen prior -v"), []),
    "data": (lambda root: replace(root / "data.dvc", "md5: d", "md5: 0"), ["data.dvc"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_only_what_the_stage_depends_on_counts(case: str, project: Project) -> None:
    change, expected = CHANGES[case]
    change(project.root)
    found = lineage(project, Params(), stage="train")
    assert found["git.dirty"] == str(bool(expected)).lower()
    assert find_changes(project.root, "HEAD", json.loads(found["files"])) == expected


def test_code_in_the_repository_counts_without_its_comments(project: Project) -> None:
    """An installed medgen is no file of the repository, so only a clone's code is compared with the commit."""
    files = hash_files(project.root, ["train"])
    shutil.copytree(PACKAGE, project.root / "medgen", ignore=shutil.ignore_patterns("__pycache__"))
    loop = project.root / "medgen" / "training" / "loop.py"
    loop.write_text("# a comment\n" + loop.read_text())
    (project.root / "medgen" / "tracking" / "naming.py").write_text("# cannot change a result\n")
    assert find_changes(project.root, commit(project.root), files) == []
    loop.write_text(loop.read_text() + "\nx = 1\n")
    assert find_changes(project.root, commit(project.root), files) == ["medgen:train"]


def test_parts_of_different_commits_need_one_commit_that_has_all(project: Project) -> None:
    first = lineage(project, Params(), stage="train")
    replace(project.root / "params.yaml", "num_generated: 2000", "num_generated: 9")
    last = commit(project.root)
    stages = [first, lineage(project, Params(), stage="evaluate")]
    assert origin_tags(project.root, stages)["git.commit"] == last
    replace(project.root / "params.yaml", "batch_size: 16", "batch_size: 8")
    commit(project.root)
    stages.append(lineage(project, Params(), stage="prior"))
    assert origin_tags(project.root, stages)["git.commit"] == last, "the last commit has other parameters of train"
    replace(project.root / "params.yaml", "name: gmm", "name: gaussian")
    stages[-1] = lineage(project, Params(), stage="prior")
    commit(project.root)
    assert not is_known(origin_tags(project.root, stages))
    assert origin_tags(project.root, [*stages, {}])["files"] == "unknown", "of all parts or of none"


def test_commits_that_are_options_of_git_are_ignored(project: Project, tmp_path: Path) -> None:
    stage = lineage(project, Params(), stage="prior") | {"git.commit": f"--output={tmp_path}/written"}
    assert origin_tags(project.root, [stage])["git.commit"] == git(project.root, "rev-parse", "HEAD")
    assert not list(tmp_path.glob("written*"))


def test_sections_are_those_of_the_pipeline(root: Path) -> None:
    stages = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text())["stages"]
    assert {name: tuple(stage["params"]) for name, stage in stages.items() if "params" in stage} == SECTIONS
