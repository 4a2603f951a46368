"""Tracking servers and databases that stop, stall, slow down or lose answers during whole runs."""

import random
import time

from benchmarks.campaign.faults import check_message
from benchmarks.campaign.lab import Lab
from benchmarks.campaign.process import COMMAND_SECONDS, Child
from benchmarks.campaign.project import stored_points
from benchmarks.campaign.proxy import MODES
from benchmarks.campaign.search import SEARCH, check_trials
from benchmarks.campaign.team import Team

MAX_ATTEMPTS = 8  # of a search whose database goes away


def track_through_faults(lab: Lab, draws: random.Random) -> None:
    """Stages that record in a server with faults: the same results, and after `sync` every point once."""
    team = lab.team()
    lab.restore("train")
    name = f"round-{draws.getrandbits(64):x}"
    options = [f"tracking.uri={team.uri}", f"tracking.experiment={name}", f"registry.model_name={name}"]
    options += ["tracking.timeout_seconds=1", "registry.register_after_evaluate=false"]
    words = [word for option in options for word in ("--set", option)]
    stages, after = draws.choice(((("train", "prior"), "refiner"), (("train", "prior", "refiner", "evaluate"), "done")))
    for stage in stages:
        child = lab.start(stage, *words)
        disturb(lab, draws, team, child)
        check_message(child, child.wait(), (0,))
    team.heal()
    lab.run("sync", *words)
    with team.database.connect("test0") as database:
        found = stored_points(database, name)
    lab.compare_points(found, after)
    lab.check_stage(stages[-1], points=False)


def search_through_faults(lab: Lab, draws: random.Random) -> None:
    """A search whose study is in a database with faults, run again until it is done: no trial is lost."""
    expected, team = lab.search(), lab.team()
    lab.restore("train")
    storage = team.database.new_database().replace(f":{team.database.port}/", f":{team.database_proxy.port}/")
    words = (*SEARCH, "--set", f"tune.storage={storage}", "--set", "tracking.enabled=false")
    for _ in range(MAX_ATTEMPTS):
        child = lab.start(*words)
        disturb(lab, draws, team, child)
        check_message(child, code := child.wait(), (0, 2))
        team.heal()
        if code == 0:
            break
    else:
        lab.run(*words)
    check_trials(lab.project, expected, storage)


def disturb(lab: Lab, draws: random.Random, team: Team, child: Child) -> None:
    """Faults at random moments until the command has ended."""
    deadline = time.monotonic() + COMMAND_SECONDS
    while child.process.exitcode is None and time.monotonic() < deadline:
        child.process.join(draws.uniform(0.1, 1.5))
        if child.process.exitcode is not None:
            return
        action = draws.random()
        if action < 0.1:
            team.database.kill()
            child.process.join(draws.uniform(0.0, 2.0))
            team.database.restart()
        elif action < 0.13:  # takes seconds
            team.mlflow.kill()
            team.heal()  # MLflow does not start without its database
            team.mlflow.restart()
        else:
            proxy = draws.choice((team.database_proxy, team.mlflow_proxy))
            proxy.mode = draws.choice(MODES)
            child.process.join(draws.uniform(0.1, 1.0))
            proxy.mode = "pass" if draws.random() < 0.7 else proxy.mode
        lab.counts["faults"] += 1
