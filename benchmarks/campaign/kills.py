"""Kills at random moments: each command is killed some times, then run to its end."""

import random
import shutil

from benchmarks.campaign.lab import Lab
from benchmarks.campaign.process import check_no_orphans
from benchmarks.campaign.project import STAGES, check_history
from benchmarks.campaign.search import SEARCH, check_trials

MAX_KILLS = 4


def kill_stages(lab: Lab, draws: random.Random) -> None:
    """One stage, or in one round of six all, killed and resumed: the same bytes as without."""
    if draws.random() < 0.85:
        stage = draws.choice(STAGES)
        lab.restore(stage)
        kill_and_finish(lab, draws, stage, seconds=lab.seconds[stage])
        lab.check_stage(stage)
        return
    lab.restore("preprocess")
    (lab.project / "mlflow.db").unlink()  # kills meet its creation too
    for stage in STAGES:
        kill_and_finish(lab, draws, stage, seconds=lab.seconds[stage])
    lab.check_stage("evaluate")


def kill_registry(lab: Lab, draws: random.Random) -> None:
    """`sync`, `promote` and `rollback`: every point once, and a record of promotions that names the champion."""
    lab.restore("done")
    if draws.random() < 0.5:
        shutil.copy(lab.snapshot("train") / "mlflow.db", lab.project / "mlflow.db")  # MLflow has received nothing
        kill_and_finish(lab, draws, "sync", seconds=lab.seconds["prior"])
        lab.check_points("done")
        return
    kill_and_finish(lab, draws, "promote", "--force", "a test", seconds=2.0)
    check_history(lab.run("history", "--json"))


def kill_search(lab: Lab, draws: random.Random) -> None:
    """`medgen tune`: all trials with the same values as without kills."""
    expected = lab.search()
    lab.restore("train")
    kill_and_finish(lab, draws, *SEARCH, seconds=lab.seconds["tune"])
    check_trials(lab.project, expected)


def kill_and_finish(lab: Lab, draws: random.Random, *words: str, seconds: float) -> None:
    """Kill a command up to MAX_KILLS times, at any moment of the `seconds` that it takes; then let it end."""
    for _ in range(draws.randint(1, MAX_KILLS)):
        child = lab.start(*words, prepare=[short_claims])
        child.process.join(draws.uniform(0.0, 1.1 * seconds))
        if child.process.exitcode is not None:
            break
        child.kill(whole_group=draws.random() < 0.7)
        child.wait()
        lab.counts["kills"] += 1
        if draws.random() < 0.5:
            check_no_orphans()
    check_no_orphans()
    lab.run(*words, prepare=[short_claims])


def short_claims() -> None:
    """Let a promotion wait seconds, not a minute, for one that was killed."""
    from medgen.registry import ledger

    ledger.CLAIM_TIMEOUT_SECONDS = 2.0
