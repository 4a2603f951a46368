"""The small project of the campaign, what its commands must leave behind, and what they must not."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.campaign.process import Violation

STAGES = ("preprocess", "features", "train", "prior", "refiner", "evaluate")
PARAMS: dict[str, Any] = {
    "data": {"path": "data", "name": "small"},
    "preprocess": {"image_size": 32, "clahe_tiles": 2, "test_fraction": 0.3},
    "features": {"width": 8, "epochs": 1},
    "model": {"name": "spatial_vae", "base_channels": 8, "latent_size": 8, "latent_channels": 4},
    "loss": {"weights": {"l1": 1.0, "ssim": 0.5}},
    "train": {
        "batch_size": 8,
        "sample_every": 2,
        "checkpoint_seconds": 0.2,
        "phases": {"one": {"epochs": 3, "learning_rate": 1e-3}},
    },
    "prior": {"name": "gmm", "components": [1]},
    "refiner": {"enabled": True, "channels": 8, "blocks": 1, "epochs": 1, "sampling_steps": 2, "sampling_noise": 0.0},
    "evaluate": {"num_generated": 24, "grid_images": 6},
    "tune": {
        "space": {"train.phases.one.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "trial": {"epochs": 1, "num_generated": 16},
    },
    "tracking": {"system_metrics": False},
}
UNFINISHED = ("*.tmp", "*.building", "*.old", "*.part")  # names of files and folders that are being written


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that must be the same after any fault: artifacts/ and the metrics."""
    files = [path for path in sorted(folder.glob("artifacts/**/*")) if path.is_file()]
    files += [folder / "reports" / name for name in ("metrics.json", "summary.json", "training/curves.csv")]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.exists() and path.name != "dataset.checked.json"
    }


def residue(folder: Path) -> list[str]:
    """Half-written files and folders."""
    return [str(path.relative_to(folder)) for pattern in UNFINISHED for path in folder.rglob(pattern)]


def check_same(folder: Path, expected: dict[str, str]) -> None:
    """Compare a finished project with an undisturbed one.

    Raises:
        Violation: a file of artifacts/ or a metric differs, or a half-written file is left.
    """
    found = digest(folder)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        raise Violation("lost", f"{folder}: differs from a run without faults: {', '.join(different)}")
    if left := residue(folder):
        raise Violation("lost", f"{folder}: left half-written: {', '.join(left)}")


def stored_points(database: Any, experiment: str = "medgen") -> Counter[Any]:
    """Number of metric points by name and step in MLflow's database.

    Args:
        database: a connection with `execute`, of SQLite or PostgreSQL.
        experiment: name of the experiment.

    Raises:
        Violation: MLflow has two runs of one record.
    """
    runs = (
        "SELECT tags.value FROM tags, runs, experiments WHERE tags.run_uuid = runs.run_uuid AND tags.key = 'medgen.id' "
        f"AND runs.experiment_id = experiments.experiment_id AND experiments.name = '{experiment}'"
    )
    points = (
        "SELECT metrics.key, metrics.step FROM metrics, runs, experiments WHERE metrics.run_uuid = runs.run_uuid "
        f"AND runs.experiment_id = experiments.experiment_id AND experiments.name = '{experiment}'"
    )
    records = Counter(record for (record,) in database.execute(runs).fetchall())
    if repeated := [record for record, number in records.items() if number > 1]:
        raise Violation("lost", f"MLflow has several runs of the records {', '.join(repeated)}")
    return Counter((name, step) for name, step in database.execute(points).fetchall())


def check_history(output: str) -> None:
    """Check the output of `medgen history --json`.

    Raises:
        Violation: the record of promotions and the aliases do not belong together.
    """
    found = json.loads(output)
    champion, changes = found["aliases"].get("champion"), found["promotions"]
    if found["problems"] or (changes and changes[-1]["after"] != champion):
        raise Violation("lost", f"champion {champion}, record {changes[-1:]}, problems {found['problems']}")
