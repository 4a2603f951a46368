"""Complete params files: `medgen recipe list · show · use · run`. Their first line says what they are.

medgen recipe run unet-maxpool-transposed-bce unet-maxpool-transposed-dice --set data.path=lungs
"""

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medgen.config import Project, load, unknown_name
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError
from medgen.io import write_atomic

MAIN_METRICS = (  # shown, where a model has them
    "segmentation/dice_foreground",
    "segmentation/iou_foreground",
    "reconstruction/ssim",
    "reconstruction/psnr",
    "generation/c2st_auc",
    "generation/spectrum_distance",
    "generation/mmd_domain",
    "generation/kid_domain",
    "generation/fd_domain",
    "generation/label_accuracy",
)


def known() -> dict[str, str]:
    """Name to first line of every recipe that ships with medgen."""
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in _files()}


def read(name: str) -> str:
    """The text of a recipe.

    Raises:
        UserError: there is no such recipe; lists the known ones.
    """
    return _find(name).read_text(encoding="utf-8")


def use(name: str, project: Project) -> None:
    """Writes a recipe to params.yaml; one of the user's own that stood there is kept as params.yaml.before."""
    text = read(name)
    path = project.root / "params.yaml"
    earlier = path.read_bytes() if path.exists() else None
    kept = ""
    if earlier is not None and earlier not in [recipe.read_bytes() for recipe in _files()]:
        write_atomic(path.with_name("params.yaml.before"), earlier)
        kept = "; what it was before is params.yaml.before"
    write_atomic(path, text.encode())
    load(path)
    print(f"params.yaml is now recipe {name!r}{kept}. Next: dvc repro")


def run(project: Project, names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Takes each recipe through all stages in this project, prints their metrics, writes reports/recipes.csv.

    Run again, it prepares and trains only what is left. artifacts/ and the other reports are those of the last recipe
    afterwards; runs and registered versions of all are kept.

    Returns:
        The metrics of each recipe.

    Raises:
        UserError: a recipe is unknown, an override is wrong, or a stage failed; its exit code 4 is passed on.
        TrainingInterrupted: a stage was asked to stop, and has saved.
    """
    plans = {name: _stages(_find(name), overrides) for name in names}  # all mistakes are found before the first hour
    console = Console(highlight=False)
    metrics: dict[str, dict[str, float]] = {}
    for name, stages in plans.items():
        console.rule(f"recipe {name}")
        for stage in stages:
            _run_stage(project, name, stage, overrides)
        metrics[name] = json.loads((project.reports / "metrics.json").read_text(encoding="utf-8"))
    _write_csv(project.reports / "recipes.csv", metrics)
    _print_table(console, metrics)
    return metrics


def _stages(path: Path, overrides: Sequence[str]) -> list[str]:
    from medgen.models import MODELS  # heavy, and `recipe list` needs none of it

    model = load(path, overrides).model.name
    if model not in MODELS:
        raise unknown_name("model.name", model, MODELS)
    judges_samples = MODELS[model].target == "image"
    return ["preprocess", *(["features"] if judges_samples else []), "train", "prior", "refiner", "evaluate"]


def _run_stage(project: Project, name: str, stage: str, overrides: Sequence[str]) -> None:
    """In a process of its own, as DVC does it: no stage finds what another left in memory."""
    command = [sys.executable, "-m", "medgen", stage, "--params", str(_find(name))]
    command += [word for override in overrides for word in ("--set", override)]
    code = _wait_for(subprocess.Popen(command, cwd=project.root))
    if code == TrainingInterrupted.exit_code:
        raise TrainingInterrupted(f"recipe {name}: `medgen {stage}` stopped and saved; the same command goes on")
    if code:
        error = UserError(
            f"recipe {name}: `medgen {stage}` ended with exit code {code}, for the reason above; mend it and run the "
            "same command again, which goes on from there"
        )
        if code == NonFiniteError.exit_code:
            error.exit_code = code
        raise error


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code. Signals that ask to stop reach the process, which is waited for while it saves."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    earlier = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in numbers}
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # it heard Ctrl-C too
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _write_csv(path: Path, metrics: Mapping[str, Mapping[str, float]]) -> None:
    names = sorted({name for values in metrics.values() for name in values})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["recipe", *names])
    writer.writerows([recipe, *(values.get(name, "") for name in names)] for recipe, values in metrics.items())
    write_atomic(path, table.getvalue().encode())


def _print_table(console: Console, metrics: Mapping[str, Mapping[str, float]]) -> None:
    shown = [name for name in MAIN_METRICS if any(name in values for values in metrics.values())]
    table = Table(title="Recipes on their test splits; all metrics are in reports/recipes.csv", title_justify="left")
    table.add_column("recipe", no_wrap=True)
    for name in shown:
        table.add_column(name.partition("/")[2], justify="right")
    for recipe, values in metrics.items():
        table.add_row(recipe, *(f"{values[name]:.4f}" if name in values else "–" for name in shown))
    console.print(table)


def _find(name: str) -> Path:
    paths = {path.stem: path for path in _files()}
    if name not in paths:
        raise unknown_name("recipe", name, paths)
    return paths[name]


def _files() -> list[Path]:
    here = Path(__file__).parent
    installed, checkout = here / "recipes", here.parent / "recipes"
    return sorted((installed if installed.is_dir() else checkout).glob("*.yaml"))
