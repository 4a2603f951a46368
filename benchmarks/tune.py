"""Measure what a search costs beyond its trials: the share of worker time without training or evaluation.

python benchmarks/tune.py [--trials 8] [--workers 2] [--epochs 10]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medgen import tune
from medgen.config import Project, load
from medgen.datasets.sample import draw
from medgen.ingest import preprocess
from medgen.training import extractor
from medgen.tune.worker import open_study

PARAMS = Path(__file__).resolve().parent.parent / "params.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each trial")
    arguments = parser.parse_args()
    overrides = [f"tune.trial.epochs={arguments.epochs}", "tune.pruner=none"]
    with tempfile.TemporaryDirectory() as folder:
        project, params = Project(Path(folder)), load(PARAMS, overrides)
        draw(project.root / params.data.path, num_images=480, size=128, seed=0)
        preprocess.run(project, data=params.data, preprocess=params.preprocess)
        extractor.run(project, features=params.features)
        command = [sys.executable, "-m", "medgen", "tune", "--params", str(PARAMS)]
        command += [word for override in overrides for word in ("--set", override)]
        command += ["--trials", str(arguments.trials), "--workers", str(arguments.workers)]
        started = time.perf_counter()
        subprocess.run(command, cwd=project.root, check=True)
        wall = time.perf_counter() - started
        study = open_study(tune.prepare(project, params, arguments.trials, None))
        trials = [trial.user_attrs["seconds"] for trial in study.trials]
    busy = sum(trials) / (arguments.workers * wall)
    columns = ("trials", "workers", "seconds per trial", "seconds of the command", "share of time outside trials")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    mean = sum(trials) / len(trials)
    print(f"| {len(trials)} | {arguments.workers} | {mean:.1f} | {wall:.0f} | {1 - busy:.3f} |")


if __name__ == "__main__":
    main()
