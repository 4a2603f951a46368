"""Imports follow the order of packages in docs/architecture.md."""

import subprocess
import sys


def test_a_package_imports_only_from_packages_listed_below_it(root):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_heavy_libraries_are_imported_only_where_they_belong(root):
    """mlflow in tracking, registry and the MLflow apps, typer in cli, optuna in tune, dvc nowhere."""

    def package(name):
        return {path.relative_to(root / "medgen").as_posix() for path in (root / "medgen" / name).glob("*.py")}

    allowed = {
        "mlflow": {"tracking/mlflow_sync.py", "tracking/uploader.py", *package("registry")}
        | {"serving/pyfunc.py", "serving/pyfunc_masks.py", *package("serving/server")},
        "typer": {"cli.py"},
        "dvc": set(),
        "optuna": package("tune"),
        "sklearn": {"priors/gmm.py"},
    }
    for path in (root / "medgen").rglob("*.py"):
        name = path.relative_to(root / "medgen").as_posix()
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                library = words[1].split(".")[0]
                assert name in allowed.get(library, {name}), f"{name}: {line.strip()}"
