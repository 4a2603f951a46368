"""The floors of docs/architecture.md, held by import-linter."""

import subprocess
import sys


def test_no_module_imports_from_its_own_floor_or_above(root):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_heavy_libraries_stay_in_their_rooms(root):
    """mlflow only in tracking, registry and what MLflow runs; typer only in cli; optuna only in tune; dvc never."""

    def room(name):
        return {path.relative_to(root / "medgen").as_posix() for path in (root / "medgen" / name).glob("*.py")}

    allowed = {
        "mlflow": {"tracking/mirror.py", "tracking/worker.py", *room("registry")}
        | {"gateway.py", "pyfunc.py", "pyfunc_masks.py"},
        "typer": {"cli.py"},
        "dvc": set(),
        "optuna": room("tune"),
        "sklearn": {"priors/gmm.py"},
    }
    for path in (root / "medgen").rglob("*.py"):
        name = path.relative_to(root / "medgen").as_posix()
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                library = words[1].split(".")[0]
                assert name in allowed.get(library, {name}), f"{name}: {line.strip()}"
