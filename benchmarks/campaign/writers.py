"""Eight writers at one project and one registry."""

import random
import shutil

from benchmarks.campaign.faults import check_message
from benchmarks.campaign.kills import short_claims
from benchmarks.campaign.lab import Lab
from benchmarks.campaign.process import Child, Violation
from benchmarks.campaign.project import STAGES, check_history

WRITERS = 8


def write_together(lab: Lab, draws: random.Random) -> None:
    """Eight processes run the same stage, trainings with other seeds, `sync`, or commands of the registry."""
    kind = draws.choice((same_stage, other_seeds, sync, registry))
    lab.counts["faults"] += WRITERS
    kind(lab, draws)


def same_stage(lab: Lab, draws: random.Random) -> None:
    """One writes, the others wait or say that another process is writing; then the stage ends as alone."""
    stage = draws.choice(STAGES)
    lab.restore(stage)
    together([lab.start(stage) for _ in range(WRITERS)])
    lab.run(stage)
    lab.check_stage(stage)


def other_seeds(lab: Lab, draws: random.Random) -> None:
    """Trainings with different seeds replace the model in turn; the last one is that of a single training."""
    lab.restore("train")
    together(
        [
            lab.start("train", "--set", f"train.seed={seed}", "--set", "train.phases.one.epochs=1")
            for seed in range(WRITERS)
        ]
    )
    lab.run("generate", "--n", "2", "--out", "out", codes=(2,))  # a model of one training, without its prior
    lab.run("train")
    lab.run("sync")
    shutil.rmtree(lab.project / "out", ignore_errors=True)
    from benchmarks.campaign.project import check_same, digest

    check_same(lab.project, digest(lab.snapshot("prior")))


def sync(lab: Lab, draws: random.Random) -> None:
    """All records go to an empty store, once."""
    lab.restore("done")
    shutil.copy(lab.snapshot("train") / "mlflow.db", lab.project / "mlflow.db")
    together([lab.start("sync") for _ in range(WRITERS)])
    lab.run("sync")
    lab.check_points("done")


def registry(lab: Lab, draws: random.Random) -> None:
    """Promotions, rollbacks and registrations: the record is whole and names the champion."""
    lab.restore("done")
    lab.run("promote", "--force", "the first")
    commands = (
        ("promote", "--force", "a race"),
        ("rollback",),
        ("register",),
        ("history",),
        ("evaluate", "--model", "models:/small@candidate"),
    )
    children = [lab.start(*draws.choice(commands), prepare=[short_claims]) for _ in range(WRITERS)]
    together(children, codes=(0, 2, 3))
    check_history(lab.run("history", "--json"))


def together(children: list[Child], codes: tuple[int, ...] = (0, 2)) -> None:
    """Wait for all.

    Raises:
        Violation: none did its work, or one crashed.
    """
    ended = [(child, child.wait()) for child in children]
    for child, code in ended:
        check_message(child, code, codes)
    if all(code for _, code in ended):
        raise Violation("lost", f"none of {len(ended)} finished: {ended[0][0].output()}")
