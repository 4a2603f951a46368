"""dvc.yaml agrees with the code, and runs end to end on a small dataset."""

import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from medgen import source
from medgen.config import Params, Project, load
from medgen.source import STAGES, hash_code, imported_files

NOT_DEPENDED_ON = {"tracking", "registry"}  # where a run is recorded does not change what it makes


@pytest.fixture(scope="module")
def pipeline(root):
    return YAML(typ="safe").load((root / "dvc.yaml").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_params_its_function_takes(pipeline, stage):
    taken = set(inspect.signature(importlib.import_module(STAGES[stage]).run).parameters)
    assert set(pipeline["stages"][stage]["params"]) == (taken & set(Params.model_fields)) - NOT_DEPENDED_ON
    assert pipeline["stages"][stage]["cmd"] == f"python -m medgen {stage}"


def test_each_stage_depends_on_the_code_it_imports(pipeline):
    assert pipeline["stages"]["code"]["outs"] == [{"artifacts/code": {"persist": True}}]
    for stage in STAGES:
        assert f"artifacts/code/{stage}.json" in pipeline["stages"][stage]["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_loads_is_among_its_files(stage):
    """Compare with a process that imports the stage's module; the files also include imports within functions."""
    code = (
        f"import sys, {STAGES[stage]}; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('medgen.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {str(source.PACKAGE / path) for path in imported_files(STAGES[stage])}


def test_only_a_change_of_code_changes_the_hash_of_a_file(tmp_path):
    file = tmp_path / "module.py"

    def hashed(text):
        file.write_text(text)
        return hash_code(file)

    code = '"""Doc."""\n\n\ndef f(x):\n    """Doc of f."""\n    return f"{x} # {x}"  # why\n'
    assert hashed(code) == hashed('def f(x):\n    # other\n    return f"{x} # {x}"\n')
    others = [
        "return x",
        'return f"{x} #  {x}"',
        '"""Doc."""; return f"{x} # {x}"',
        'y = """Doc."""\n    return f"{x} # {x}"',
    ]
    assert len({hashed(code), *(hashed(f"def f(x):\n    {other}\n") for other in others)}) == 5


def test_code_says_which_stages_changed_since_the_last_call(tmp_path, capsys):
    source.run(Project(tmp_path))
    source.run(Project(tmp_path))
    assert capsys.readouterr().out == "", "the first call has nothing to compare with, the second finds no change"
    path = tmp_path / "artifacts" / "code" / "prior.json"
    hashes = json.loads(path.read_text())
    path.write_text(json.dumps(hashes | {"medgen/gone.py": "0", "medgen/priors/gmm.py": "0"}))
    source.run(Project(tmp_path))
    said = capsys.readouterr().out
    assert said == "code of stage prior changed: medgen/gone.py, medgen/priors/gmm.py\n"
    assert json.loads(path.read_text()) == hashes


def test_every_picture_among_the_plots_is_made_by_a_stage(pipeline):
    made = {
        path
        for stage in pipeline["stages"].values()
        for out in stage["outs"]
        for path in ([out] if isinstance(out, str) else out)
    }
    assert all(made & {plot, plot.rpartition("/")[0]} for plot in pipeline["plots"] if isinstance(plot, str))


def test_every_params_file_is_valid_and_has_the_sections_dvc_asks_for(root, pipeline):
    """DVC knows no defaults: a section that a stage names must be in the file, even if it is empty."""
    sections = {section for stage in pipeline["stages"].values() for section in stage.get("params", [])}
    files = [root / "params.yaml", *(root / "recipes").glob("*.yaml")]
    assert len(files) >= 3
    for path in files:
        params = load(path)
        assert sections <= set(YAML(typ="safe").load(path.read_text())), path
        assert params.train.phases[0].epochs > 0
        assert path.name == "params.yaml" or path.read_text().startswith("# ")


def test_git_has_no_results_of_the_sample(root):
    """They differ between processors: `make` on another machine would leave changed files behind."""
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if name == "dvc.lock" or name.startswith(("reports/", "artifacts/"))]


ENVIRONMENT: dict[str, str] = {}  # of `call`, filled by `repository`


@pytest.fixture(scope="module")
def repository(root, small_params, tmp_path_factory, forked_medgen):
    """A git and DVC repository with the package, a small params file and 60 drawn images; `dvc repro` has run."""
    from medgen.datasets.sample import draw

    folder = tmp_path_factory.mktemp("repository")
    for name in ("medgen", "dvc.yaml", ".dvcignore", ".gitignore"):
        source = root / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    (folder / "params.yaml").write_text(json.dumps(small_params))
    draw(folder / "data", num_images=60, size=64, seed=1)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    with forked_medgen(folder, tmp_path_factory.mktemp("programs")) as variables:
        ENVIRONMENT.update(variables)
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
        yield folder


def call(folder, *command):
    if command[0] == "dvc":
        command = (sys.executable, "-m", "dvc", *command[1:])
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_repro_ends_with_metrics_figures_and_a_registered_version(repository):
    metrics = json.loads((repository / "reports" / "metrics.json").read_text())
    assert {"reconstruction/ssim", "reconstruction/pca_ssim", "generation/kid_domain", "run/num_test"} <= set(metrics)
    for path in ("index.html", "provenance.json", "figures/samples.png", "training/curves.csv", "training/loss.png"):
        assert (repository / "reports" / path).stat().st_size > 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repository}/mlflow.db")
    version = client.get_model_version_by_alias("small", "candidate")
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
    assert call(repository, "dvc", "repro").count("Running stage") == 1, "only `code` runs always"
    (repository / "params.yaml").write_text(json.dumps({**small_params, "prior": {"name": "normal"}}))
    output = call(repository, "dvc", "repro")
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in output] == [
        "prior",
        "refiner",
        "utility",
        "evaluate",
    ]
    assert "refiner epoch" not in output, "its gain alone is new"
    (repository / "params.yaml").write_text(json.dumps(small_params))


@pytest.mark.slow
def test_a_cached_result_brings_back_every_report(repository, small_params):
    """Otherwise a report of another model would stay beside the model that DVC has brought back."""
    call(repository, "dvc", "repro")
    reports = {path: path.read_bytes() for path in (repository / "reports").rglob("*") if path.is_file()}
    (repository / "params.yaml").write_text(json.dumps({**small_params, "prior": {"name": "normal"}}))
    call(repository, "dvc", "repro")
    assert reports != {path: path.read_bytes() for path in reports if path.is_file()}
    (repository / "params.yaml").write_text(json.dumps(small_params))
    output = call(repository, "dvc", "repro")
    assert "Stage 'evaluate' is cached" in output
    assert {path: path.read_bytes() for path in (repository / "reports").rglob("*") if path.is_file()} == reports


@pytest.mark.slow
def test_an_experiment_in_a_temporary_tree_is_recorded_in_the_project(repository, small_params):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{repository}/mlflow.db")
    before = len(client.search_model_versions("name = 'small'"))
    call(repository, "dvc", "exp", "run", "--temp", "--name", "temp", "--set-param", "+prior.variance_kept=0.5")
    versions = client.search_model_versions("name = 'small'")
    assert len(versions) == before + 1
    newest = max(versions, key=lambda version: int(version.version))
    assert newest.run_id in {run.info.run_id for run in client.search_runs(["1"])}
    assert (repository / "runs" / newest.tags["run"] / "evaluation.origin.json").is_file()
    shown = call(repository, "dvc", "exp", "show", "--json")
    experiment = json.loads(shown)[1]["experiments"][0]["revs"][-1]["data"]
    metrics = experiment["metrics"]["reports/summary.json"]["data"]
    assert float(newest.tags["generation/mmd_domain"]) == metrics["generation/mmd_domain"]
    call(repository, "dvc", "exp", "apply", "temp")
    assert json.loads((repository / "reports" / "summary.json").read_text()) == metrics
    call(repository, "git", "checkout", "-q", "dvc.lock", "params.yaml")
    call(repository, "dvc", "checkout")


@pytest.mark.slow
def test_outputs_are_the_same_bytes_when_made_again(repository):
    before = (repository / "dvc.lock").read_text()
    call(repository, "git", "checkout", "-q", "dvc.lock", "params.yaml")
    shutil.rmtree(repository / "runs")
    call(repository, "dvc", "repro", "--force")
    assert call(repository, "git", "status", "--porcelain") == "", before


@pytest.mark.slow
def test_a_commit_after_the_training_is_the_origin_of_the_version(repository, small_params):
    """Edit, run, look, commit, promote. A model this small fails other gates."""

    def promote():
        command = [sys.executable, "-m", "medgen", "promote"]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True).stderr

    (repository / "params.yaml").write_text(json.dumps({**small_params, "prior": {"name": "gaussian"}}))
    call(repository, "dvc", "repro")
    (repository / "dvc_plots").mkdir()
    (repository / "dvc_plots" / "index.html").write_text("plots")
    refused = promote()
    version = re.search(r"models:/small/(\d+) is not promoted: git commit", refused)[1]
    assert f'`git add params.yaml && git commit -m "Train version {version}" && medgen promote --version' in refused
    call(repository, "git", "add", "params.yaml")
    call(repository, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "train")
    accepted = promote()
    assert f"contains the files that models:/small/{version} was made from" in accepted
    assert "git commit" not in accepted.partition("not promoted: ")[2]
