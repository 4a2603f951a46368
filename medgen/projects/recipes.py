"""Recipes: complete params.yaml files that ship with medgen. The first line of a recipe is its description.

medgen recipe list | show NAME | use NAME | run NAME...
medgen recipe run unet-maxpool-transposed-bce unet-maxpool-transposed-dice --set data.path=lungs
"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from medgen.config import RESULTS_VARIABLE, Project, load, unknown_name
from medgen.config.edit import as_yaml, set_value
from medgen.console import OUT, say, show
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError
from medgen.io import write_atomic
from medgen.machine import signal_handler
from medgen.metrics.summary import SUMMARY
from medgen.projects.shipped import find_shipped


def list_recipes() -> dict[str, str]:
    """Description of each recipe by name."""
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in _files()}


def read(name: str) -> str:
    """The text of a recipe.

    Raises:
        UserError: unknown name; the message lists the names.
    """
    return find(name).read_text(encoding="utf-8")


def use(name: str, project: Project) -> None:
    """Write a recipe to params.yaml; the dataset keeps its name, and an edited file is kept as params.yaml.before."""
    path = project.root / "params.yaml"
    earlier = path.read_bytes() if path.exists() else None
    kept, dataset = "", _dataset_name(path)
    text = _with_dataset(read(name), dataset)
    if earlier is not None and earlier not in [_with_dataset(read(one.stem), dataset).encode() for one in _files()]:
        write_atomic(path.with_name("params.yaml.before"), earlier)
        kept = "; the earlier file is params.yaml.before"
    write_atomic(path, text.encode())
    load(path)
    say(f"params.yaml is now recipe {name!r}{kept}. Next: dvc repro")


def run(project: Project, names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Run all stages of each recipe on this project's data, print the metrics, and write reports/recipes.csv.

    The artifacts and reports of a recipe are in runs/recipes/NAME/: those of the project stay as they are. Runs and
    registered versions are recorded with the project's own. The same command resumes after an interruption.

    Returns:
        The metrics of each recipe.

    Raises:
        UserError: unknown recipe, invalid override, or a failed stage; exit code 4 of a stage is passed on.
        TrainingInterrupted: a signal stopped a stage, which saved its state.
    """
    dataset = _dataset_name(project.root / "params.yaml")
    if dataset is not None and not any(override.startswith("data.") for override in overrides):
        overrides = [f"data.name={as_yaml(dataset)}", *overrides]
    plans = {name: _stages(find(name), overrides) for name in names}  # checks all recipes before the first one runs
    metrics: dict[str, dict[str, float]] = {}
    for name, stages in plans.items():
        OUT.rule(f"recipe {name}")
        for stage in stages:
            _run_stage(project, name, stage, overrides)
        metrics[name] = json.loads((_results(project, name) / "reports" / "metrics.json").read_text(encoding="utf-8"))
    _write_csv(project.reports / "recipes.csv", metrics)
    _print_table(metrics)
    say(
        "runs/recipes/NAME/ holds each recipe's artifacts and reports; this project's own are unchanged. "
        "Next: medgen generate --model runs/recipes/NAME/artifacts --out DIR"
    )
    return metrics


def _results(project: Project, name: str) -> Path:
    """Folder of a recipe's artifacts/ and reports/."""
    return project.runs / "recipes" / name


def _dataset_name(params_file: Path) -> str | None:
    """data.name of a params file; None if it is not given, or the file is missing or invalid."""
    try:
        data = load(params_file).data
    except UserError:
        return None
    return data.name if "name" in data.model_fields_set else None


def _with_dataset(text: str, name: str | None) -> str:
    """The text of a recipe with data.name."""
    return text if name is None else set_value(text, "data.name", name)


def _stages(path: Path, overrides: Sequence[str]) -> list[str]:
    from medgen.models import MODELS  # imports torch, which `medgen recipe list` does not need

    model = load(path, overrides).model.name
    if model not in MODELS:
        raise unknown_name("model.name", model, MODELS)
    has_samples = MODELS[model].target == "image"
    return ["preprocess", *(["features"] if has_samples else []), "train", "prior", "refiner", "utility", "evaluate"]


def _run_stage(project: Project, name: str, stage: str, overrides: Sequence[str]) -> None:
    """Run a stage in its own process, as DVC does, so that stages share no state in memory."""
    command = [sys.executable, "-m", "medgen", stage, "--params", str(find(name))]
    command += [word for override in overrides for word in ("--set", override)]
    environment = os.environ | {RESULTS_VARIABLE: str(_results(project, name))}
    code = _wait_for(subprocess.Popen(command, cwd=project.root, env=environment))
    if code == TrainingInterrupted.exit_code:
        raise TrainingInterrupted(
            f"recipe {name}: `medgen {stage}` was stopped and saved its state; run the same command to resume"
        )
    if code:
        error = UserError(
            f"recipe {name}: `medgen {stage}` ended with exit code {code}. Fix the error printed above and run the "
            "same command again to resume"
        )
        if code == NonFiniteError.exit_code:
            error.exit_code = code
        raise error


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """Exit code of a process. SIGTERM and SIGUSR1 are forwarded to it, and it has time to save its state."""
    with signal_handler((signal.SIGTERM, signal.SIGUSR1), lambda number, _: process.send_signal(number)):
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reaches the process too
            raise


def _write_csv(path: Path, metrics: Mapping[str, Mapping[str, float]]) -> None:
    names = sorted({name for values in metrics.values() for name in values})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["recipe", *names])
    writer.writerows([recipe, *(values.get(name, "") for name in names)] for recipe, values in metrics.items())
    write_atomic(path, table.getvalue().encode())


def _print_table(metrics: Mapping[str, Mapping[str, float]]) -> None:
    shown = [name for name in SUMMARY if any(name in values for values in metrics.values())]
    table = Table(title="Main metrics on the test splits; reports/recipes.csv lists all metrics", title_justify="left")
    table.add_column("recipe", no_wrap=True)
    for name in shown:
        table.add_column(name.partition("/")[2], justify="right")
    for recipe, values in metrics.items():
        table.add_row(recipe, *(f"{values[name]:.4f}" if name in values else "–" for name in shown))
    show(table)


def find(name: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: unknown name; the message lists the names.
    """
    paths = {path.stem: path for path in _files()}
    if name not in paths:
        raise unknown_name("recipe", name, paths)
    return paths[name]


def _files() -> list[Path]:
    return sorted(find_shipped("recipes").glob("*.yaml"))
