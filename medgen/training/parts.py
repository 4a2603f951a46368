"""Train a part of a model that has its own stage (domain extractor, prior, refiner), and record it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from medgen.config import Features, Phase, Prior, Project, Refiner, Schedule, Section, Tracking, Train
from medgen.io import hash_file, to_json, write_atomic
from medgen.models.bundle import BundleInfo
from medgen.reports.figures import write_curves
from medgen.tracking import Tracker, history, lineage
from medgen.training.distributed import World
from medgen.training.loop import train_to_end
from medgen.training.state import TrainingTask, TrainState

LOSSES = ("train/loss", "val/loss")


def one_phase(
    params: Features | Prior | Refiner, name: str, warmup_steps: int, min_factor: float, **train: Any
) -> Train:
    """Section `train` of a part: one phase with a cosine schedule, and a rollback after a loss that is not finite."""
    phase = Phase(
        name=name,
        epochs=params.epochs,
        learning_rate=params.learning_rate,
        weight_decay=1e-2,
        warmup_steps=warmup_steps,
        schedule=Schedule(name="cosine_restarts", period=params.epochs, min_factor=min_factor),
    )
    return Train(seed=params.seed, batch_size=params.batch_size, phases=(phase,), on_nonfinite="rollback", **train)


@contextmanager
def trained(task: TrainingTask, world: World, scratch: Path, project: Project, name: str) -> Iterator[TrainState]:
    """Train to the end, resumed from `scratch`; the state with the weights to export.

    The epochs are recorded in `scratch`, and not in the run of the model.
    """
    state = TrainState(task, world, scratch)
    with state.stop.listening():
        off = Tracking(enabled=False)
        with Tracker.open(scratch, off, project, name) if world.is_main else nullcontext() as tracker:
            train_to_end(state, tracker)
        with state.final_weights():
            yield state


def draw_losses(scratch: Path, path: Path) -> float:
    """Write the loss curves of the training recorded in `scratch`; return its last train loss."""
    records = history(scratch)
    write_curves(path, {key: [record[key] for record in records] for key in LOSSES}, log=False, y_label="loss")
    return float(records[-1]["train/loss"])


def record(
    project: Project,
    info: BundleInfo,
    tracking: Tracking,
    section: Section,
    description: Path,
    metrics: Mapping[str, float],
    figures: Sequence[Path],
    origin: str,
) -> None:
    """Add a part's parameters, metrics and files to the record of the run that trained the model.

    Args:
        project: the project.
        info: the model's description, which names its run.
        tracking: where runs are recorded.
        section: the part's parameters, as they were used.
        description: the part's JSON file, whose stem names the part.
        metrics: name to value.
        figures: image files.
        origin: name of the file in the run's folder that keeps the part's hash and lineage.
    """
    scratch, name = project.runs / info.run, description.stem
    with Tracker.open(scratch, tracking, project, info.model.name) as tracker:
        records = history(scratch)
        tracker.params({name: section})
        tracker.metrics(metrics, step=records[-1]["step"] if records else 0)
        for path in (description, *figures):
            tracker.artifact(path, name)
    content = {
        "sha256": hash_file(description),
        name: section.model_dump(mode="json"),
        "lineage": lineage(project, section, stage=name),
    }
    write_atomic(scratch / origin, to_json(content))
