"""dvc.yaml is held to the code, and runs end to end on a small set."""

import ast
import hashlib
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from medgen.config import Params, load

STAGES = ("preprocess", "features", "train", "prior", "refiner", "evaluate")
CARRIERS = {  # code that carries a result from place to place and does not shape it
    f"medgen/{name}.py"
    for name in (
        *("__init__", "data/__init__", "metrics/__init__", "types", "errors", "files", "machine", "progress"),
        *("checkpoint", "distributed", "data/store", "data/weights", "data/download"),
    )
}
NOT_DEPENDED_ON = {"tracking", "registry"}  # where a run is recorded does not change what it makes


@pytest.fixture(scope="module")
def pipeline(root):
    return YAML(typ="safe").load((root / "dvc.yaml").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_params_its_function_takes(pipeline, stage):
    taken = set(inspect.signature(importlib.import_module(f"medgen.{stage}").run).parameters)
    assert set(pipeline["stages"][stage]["params"]) == (taken & set(Params.model_fields)) - NOT_DEPENDED_ON
    assert pipeline["stages"][stage]["cmd"] == f"python -m medgen {stage}"


def test_every_code_dependency_exists(pipeline, root):
    for stage in pipeline["stages"].values():
        for path in stage["deps"]:
            if path.startswith("medgen/"):
                assert (root / path).exists(), path


def imported(module, root):
    """Files of the package, from its root, that a module imports, and those that they import."""
    found, ahead = set(), [module]
    while ahead:
        place = root.joinpath(*ahead.pop().split("."))
        files = [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
        for path in files:
            if path.relative_to(root).as_posix() in found:
                continue
            found.add(path.relative_to(root).as_posix())
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    ahead += [name.name for name in node.names]
                elif isinstance(node, ast.ImportFrom):
                    ahead += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return {path for path in found if path.startswith("medgen/")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_again_when_code_that_shapes_its_result_changes(pipeline, root, stage):
    deps = pipeline["stages"][stage]["deps"]
    used = {path for path in imported(f"medgen.{stage}", root) if path not in CARRIERS}
    assert f"medgen/{stage}.py" in used and "medgen/config/__init__.py" in used
    left_out = {path for path in used if not any(path == dep or path.startswith(f"{dep}/") for dep in deps)}
    assert not {path for path in left_out if not path.startswith("medgen/tracking/")}


def test_every_picture_among_the_plots_is_made_by_a_stage(pipeline):
    made = {path for stage in pipeline["stages"].values() for path in stage["outs"] if isinstance(path, str)}
    assert {plot for plot in pipeline["plots"] if isinstance(plot, str)} <= made


def test_every_params_file_is_valid_and_has_the_sections_dvc_asks_for(root, pipeline):
    """DVC knows no defaults: a section that a stage names must stand in the file, be it empty."""
    sections = {section for stage in pipeline["stages"].values() for section in stage["params"]}
    files = [root / "params.yaml", *(root / "recipes").glob("*.yaml")]
    assert len(files) >= 3
    for path in files:
        params = load(path)
        assert sections <= set(YAML(typ="safe").load(path.read_text())), path
        assert params.train.phases[0].epochs > 0
        assert path.name == "params.yaml" or path.read_text().startswith("# ")


@pytest.fixture(scope="module")
def repository(root, small_params, tmp_path_factory):
    """A git and DVC repository with the package, a small params file and 60 drawn films; `dvc repro` has run."""
    from medgen.datasets.sample import draw

    folder = tmp_path_factory.mktemp("repository")
    for name in ("medgen", "dvc.yaml", ".dvcignore", ".gitignore"):
        source = root / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    (folder / "params.yaml").write_text(json.dumps(small_params))
    draw(folder / "data", num_images=60, size=64, seed=1)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (
        [*git, "init", "-q"],
        ["dvc", "init", "-q"],
        ["dvc", "config", "core.analytics", "false"],
        ["dvc", "add", "-q", "data"],
        [*git, "add", "."],
        [*git, "commit", "-qm", "start"],
        ["dvc", "repro"],
        [*git, "add", "."],
        [*git, "commit", "-qm", "results"],
    ):
        call(folder, *command)
    return folder


def call(folder, *command):
    if command[0] == "dvc":
        command = (sys.executable, "-m", "dvc", *command[1:])
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment["PATH"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_repro_ends_with_metrics_figures_and_a_registered_version(repository):
    metrics = json.loads((repository / "reports" / "metrics.json").read_text())
    assert {"reconstruction/ssim", "reconstruction/pca_ssim", "generation/kid_domain", "run/num_test"} <= set(metrics)
    for path in ("index.html", "curves.csv", "provenance.json", "figures/samples.png", "figures/loss.png"):
        assert (repository / "reports" / path).stat().st_size > 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repository}/mlflow.db")
    version = client.get_model_version_by_alias("medgen", "candidate")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["git.commit"] != "unknown"
    assert (
        run.data.tags["dataset.fingerprint"]
        == json.loads((repository / "artifacts" / "dataset" / "dataset.json").read_text())["fingerprint"]
    )
    assert run.data.metrics["reconstruction/ssim"] == metrics["reconstruction/ssim"]
    assert {"train/loss", "val/ssim"} <= set(run.data.metrics)
    assert call(repository, "git", "status", "--porcelain") == ""


@pytest.mark.slow
def test_repro_again_does_nothing_and_after_a_changed_prior_no_refiner_is_trained_again(repository, small_params):
    assert "Running stage" not in call(repository, "dvc", "repro")
    (repository / "params.yaml").write_text(json.dumps({**small_params, "prior": {"name": "normal"}}))
    output = call(repository, "dvc", "repro")
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in output] == ["prior", "refiner", "evaluate"]
    assert "refiner epoch" not in output, "its gain alone is new"
    (repository / "params.yaml").write_text(json.dumps(small_params))


@pytest.mark.slow
def test_outputs_are_the_same_bytes_when_made_again(repository):
    before = (repository / "dvc.lock").read_text()
    call(repository, "git", "checkout", "-q", "dvc.lock", "reports/metrics.json", "params.yaml")
    shutil.rmtree(repository / "runs")
    call(repository, "dvc", "repro", "--force")
    assert call(repository, "git", "status", "--porcelain") == "", before


def dvc_md5(path):
    """A file's md5, or a folder's as DVC reckons it: of the sorted list of its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    entries = [{"md5": dvc_md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    entries.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def test_the_committed_lock_belongs_to_the_committed_code(root):
    """Else `make` in a clone would leave a changed dvc.lock behind. Mend: `uv run dvc repro`, commit what changed."""
    lock = YAML(typ="safe").load((root / "dvc.lock").read_text())
    stale = [
        f"{stage}: {dep['path']}"
        for stage, entry in lock["stages"].items()
        for dep in entry["deps"]
        if dep["path"].startswith("medgen/") and dvc_md5(root / dep["path"]) != dep["md5"]
    ]
    assert not stale, "dvc.lock was made by other code; run `uv run dvc repro` and commit dvc.lock and metrics.json"
    params = YAML(typ="safe").load((root / "params.yaml").read_text())
    for entry in lock["stages"].values():
        for section, values in entry["params"]["params.yaml"].items():
            assert params[section] == values, section
