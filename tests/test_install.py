"""Ways to install medgen: the wheel, in which a project needs no clone, and PyTorch's build for CPUs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest


@pytest.fixture(scope="module")
def uv(root):
    """The program that builds the wheel; `make` fetches it to .uv/ where it is missing."""
    program = shutil.which("uv") or shutil.which("uv", path=str(root / ".uv" / "bin"))
    if program is None:
        pytest.skip("uv is not installed (`make setup` fetches it)")
    return program


@pytest.fixture(scope="module")
def environment(uv, root, tmp_path_factory):
    """Environment variables of a virtual environment with the wheel and, from this one, its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [uv, "build", "--offline", "--quiet", "--wheel", "--out-dir", str(folder), str(root)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "offline" in built.stderr.lower():
        pytest.skip("the build backend is not in uv's cache (`make setup` downloads it)")
    assert built.returncode == 0, built.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    command = [uv, "pip", "install", "--offline", "--quiet", "--no-deps", "--python", str(python)]
    subprocess.run([*command, *map(str, folder.glob("*.whl"))], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # a .pth file in an added folder is not read, so the editable medgen there is not found
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": os.pathsep.join((str(python.parent), os.environ["PATH"]))}


@pytest.mark.slow
def test_the_wheel_alone_makes_a_project_in_which_stages_run(environment, small_params, root, tmp_path):
    from medgen.datasets.sample import draw

    draw(tmp_path / "images", num_images=30, size=32, seed=0)

    def run(*command, folder=tmp_path):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert str(root) not in run("python", "-c", "import medgen; print(medgen.__file__)")
    assert run("medgen", "--version").startswith("medgen ")
    assert "chest-xray-64" in run("medgen", "recipe", "list")
    assert "pneumoniamnist" in run("medgen", "data", "list")
    run("medgen", "init", "xray", "--data", "images")
    project = tmp_path / "xray"
    assert (project / "dvc.yaml").read_bytes() == (root / "dvc.yaml").read_bytes()
    (project / "params.yaml").write_text(json.dumps(small_params))
    run("python", "-m", "dvc", "repro", "preprocess", folder=project)
    assert json.loads((project / "artifacts" / "dataset" / "dataset.json").read_text())["classes"]
    assert "artifacts/code/preprocess.json" in (project / "dvc.lock").read_text()
    run("medgen", "data", "audit", folder=project)  # renders a template


def test_make_cpu_installs_the_locked_versions_from_pytorchs_index_for_cpus(root):
    def plan(*words):
        return subprocess.run(
            ["make", "-n", "setup", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout

    assert "download.pytorch.org" not in plan()
    assert "--default-index https://download.pytorch.org/whl/cpu" in plan("CPU=1")
    assert "sync" not in plan("CPU=1"), "`uv sync` would replace it with the build for GPUs"
