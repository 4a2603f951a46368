"""One worker of a search: a process that claims trials, trains and evaluates them, and records the results."""

import dataclasses
import gc
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import optuna
import torch
from optuna.trial import TrialState

from medgen.config import Params, Project, Tracking
from medgen.data.store import open_store
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError
from medgen.evaluation import evaluate
from medgen.evaluation.data import load_evaluation
from medgen.metrics.mmd import mmd
from medgen.models import MODELS
from medgen.tracking import Tracker, history
from medgen.training import checkpoint, prior, refiner, train
from medgen.tune.objective import MMD, SSIM, Objective, choose_objective
from medgen.tune.space import build_space, trial_params
from medgen.tune.storage import LOST, lost, open_storage
from medgen.tune.study import DISCREPANCY, MAX_ATTEMPTS, Claim, Study, origin, packed, trial_name

WAIT_SECONDS = 1.0
UNTRACKED = Tracking(enabled=False)  # a search has one process that writes to MLflow: the one that started the workers
WATCHED = {"image": "val/ssim", "mask": "val/dice"}  # what the pruner compares; more is better
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}


@dataclass(frozen=True)
class Search:
    """What every process of a search knows."""

    project: Project
    params: Params
    study: str
    num_trials: int  # that the study shall have
    started: datetime
    deadline: float | None  # seconds since 1970; no trial begins after it
    confirms: bool = False  # trains the best trials of another study in full, and keeps their models

    @property
    def folder(self) -> Path:
        """Scratch of the study."""
        return self.project.runs / "tune" / self.study

    def trial_folder(self, number: int) -> Path:
        """Where a trial's model, prior, refiner, runs and reports stand."""
        return self.folder / f"trial_{number:04d}"


@dataclass(frozen=True)
class Seat:
    """A worker's place on the machine."""

    number: int
    threads: int
    gpu: str | None  # as CUDA_VISIBLE_DEVICES takes it


@dataclass(frozen=True)
class Outcome:
    """The result of a trial."""

    state: TrialState
    reason: str = ""
    values: list[float] | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    discrepancy: Mapping[str, Any] | None = None  # as of `medgen.tune.study.packed`, where the objective is the MMD
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # more tags


def open_study(search: Search) -> Study:
    """The study, in this process.

    Raises:
        UserError: as `medgen.tune.run`.
    """
    params = search.params
    space, objective = build_space(params), objective_of(search.project, params)
    epochs = sum(phase.epochs for phase in trial_params(params, {}).train.phases)
    storage = open_storage(search.project, params.tune.storage)
    return Study(storage, search.study, params, space, objective, epochs)


def objective_of(project: Project, params: Params) -> Objective:
    """The objective of this model on this data."""
    side = min(open_store(project.dataset).image_shape[1:])
    return choose_objective(params.tune.objective, MODELS[params.model.name].target, side, params.evaluate)


def work(search: Search, seat: Seat) -> None:
    """The process: trial after trial until there is none; what it prints goes to the study's folder.

    SIGTERM stops it after the step it is in, and so does the end of the process that started it; its trial stays
    running in the study, and whoever claims next takes it up from its checkpoint.
    """
    log = (search.folder / f"worker_{seat.number}.log").open("a", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    torch.set_num_threads(seat.threads)
    try:
        with lost(search.params.tune.storage):
            run_trials(search)
    except (UserError, TrainingInterrupted) as error:
        print(f"worker {seat.number}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def run_trials(search: Search) -> None:
    """All trials that are left for this worker."""
    study = open_study(search)
    while search.deadline is None or time.time() < search.deadline:
        claim = study.claim(search.num_trials, search.started)
        if claim is None:
            return
        if claim == "wait":
            time.sleep(WAIT_SECONDS)
            continue
        try:
            run_trial(search, study, claim)
        finally:
            claim.release()


def stop(*_: object) -> NoReturn:
    """Ends a worker that is between two trainings."""
    raise TrainingInterrupted("asked to stop")


def stop_with_parent() -> None:
    """Asks this process to stop when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run_trial(search: Search, study: Study, claim: Claim) -> None:
    """Runs all stages, evaluates on the val split, writes the record and ends the trial in the study."""
    number, name = claim.trial.number, trial_name(claim.trial)
    project = dataclasses.replace(search.project, apart=search.trial_folder(number))
    print(f"{name}, attempt {claim.attempt}: {claim.values}", flush=True)
    scratch, started = project.runs / "not_begun", time.monotonic()
    try:
        params = trial_params(search.params, claim.values)
        scratch = scratch_of(project, params)
        with Tracker.open(scratch, UNTRACKED, project, name, parent=study.record) as tracker:
            tracker.finish("RUNNING")
        if claim.attempt > MAX_ATTEMPTS:
            reason = f"its worker was killed {MAX_ATTEMPTS} times without getting on; was there enough memory?"
            outcome = Outcome(TrialState.FAIL, reason)
        else:
            outcome = attempt(project, params, study, claim)
    except TrainingInterrupted:  # asked to: no fault of the trial, which stays running and is taken up again
        claim.trial.set_user_attr("attempts", claim.attempt - 1)
        raise
    except LOST:  # no fault of the trial either, but nothing can be said
        raise
    except NonFiniteError as error:
        reason = f"{error.term} not finite at step {error.step} (phase {error.phase})"
        facts = {"nonfinite_step": str(error.step), "nonfinite_term": error.term}
        outcome = Outcome(TrialState.PRUNED, reason, facts=facts)
    except optuna.TrialPruned as pruned:
        outcome = Outcome(TrialState.PRUNED, str(pruned))
    except Exception as error:  # whatever breaks one trial is written down, and the search goes on
        traceback.print_exc()
        outcome = Outcome(TrialState.FAIL, describe(error))
    print(f"{name}: {outcome.state.name.lower()} {outcome.reason}", flush=True)
    record(project, scratch, study, claim, outcome)
    claim.trial.set_user_attr("seconds", round(time.monotonic() - started, 2))
    for key, value in {"reason": outcome.reason, **outcome.facts}.items():
        if value:
            claim.trial.set_user_attr(key, value)
    if outcome.metrics:
        claim.trial.set_user_attr("metrics", dict(outcome.metrics))
    if outcome.discrepancy is not None:
        claim.trial.set_user_attr(DISCREPANCY, outcome.discrepancy)
    if study.objective.has_floor and outcome.state == TrialState.COMPLETE:
        own = outcome.metrics[SSIM]
        claim.trial.set_constraint(SSIM, (own if claim.ssim_floor is None else claim.ssim_floor) - own)
    study.tell(claim, outcome.state, outcome.values)
    tidy(search, number)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(project: Project, params: Params, study: Study, claim: Claim) -> Outcome:
    """The trial itself.

    Raises:
        NonFiniteError, optuna.TrialPruned: it is given up.
        UserError: its parameters do not go together.
    """
    trial, objective = claim.trial, study.objective
    watched = WATCHED[MODELS[params.model.name].target]
    last = sum(phase.epochs for phase in params.train.phases)
    sign = 1.0 if objective.directions[0] == "maximize" else -1.0  # Optuna compares all values the study's way
    first = study.trials[0].intermediate_values if trial.number > 0 and objective.has_floor else {}

    def after_epoch(epoch: int, values: Mapping[str, float]) -> None:
        if claim.attempt > 1:
            trial.set_user_attr("attempts", 1)  # it got on
        if objective.is_pareto or not math.isfinite(values[watched]):
            return  # Optuna compares nothing where there are two objectives
        # where SSIM is a floor and not the objective, more of it than params.yaml has does not count
        trial.report(sign * min(values[watched], sign * first.get(epoch, sign * math.inf)), epoch)
        if epoch < last and trial.number > 0 and trial.should_prune():  # trial 0 is the reference
            raise optuna.TrialPruned(f"{watched} {values[watched]:.4f} after epoch {epoch}: worse than other trials'")

    sections = {"model": params.model, "loss": params.loss, "train": params.train}
    train.run(project, **sections, tracking=UNTRACKED, after_epoch=after_epoch)  # type: ignore[arg-type]
    prior.run(project, prior=params.prior, tracking=UNTRACKED)
    refiner.run(project, refiner=params.refiner, tracking=UNTRACKED)
    metrics = evaluate.judge_validation(project, evaluate=params.evaluate)
    values = objective.values(metrics)
    checked = dict(zip(objective.labels, values, strict=True))
    checked |= {SSIM: metrics[SSIM]} if objective.has_floor else {}
    if broken := [f"{name} is {value}" for name, value in checked.items() if not math.isfinite(value)]:
        return Outcome(TrialState.PRUNED, f"the objective is not finite: {', '.join(broken)}")
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    compared = discrepancy_of(project) if objective.keys[-1] == MMD else None
    return Outcome(TrialState.COMPLETE, values=values, metrics=finite, discrepancy=compared)


def discrepancy_of(project: Project) -> dict[str, Any]:
    """The parts of the evaluated model's MMD that comparing it with another takes."""
    data = load_evaluation(project.evaluation)
    assert data.samples is not None and data.held_out is not None, "models that find masks have no MMD"
    patients = data.groups.tolist()
    found = mmd(data.held_out.features, data.samples.features, data.info.bandwidth, patients)
    return packed(found, patients)


def record(project: Project, scratch: Path, study: Study, claim: Claim, outcome: Outcome) -> None:
    """Ends the trial's record: its state and reason, its metrics, its samples."""
    with Tracker.open(scratch, UNTRACKED, project, trial_name(claim.trial), parent=study.record) as tracker:
        tags = {"tune.study": study.name, "tune.trial": str(origin(claim.trial))}
        tags["tune.state"] = outcome.state.name.lower()
        tracker.tags(tags | ({"tune.reason": outcome.reason} if outcome.reason else {}) | dict(outcome.facts))
        records = history(scratch)
        step = records[-1]["step"] if records else 0
        tracker.metrics({f"val/{name}": value for name, value in outcome.metrics.items()}, step)
        samples = project.figures / "samples.png"
        if outcome.metrics and samples.exists():
            tracker.artifact(samples, "figures")
        tracker.finish(STATUS[outcome.state])


def scratch_of(project: Project, params: Params) -> Path:
    """Where `medgen.training.train` keeps the training of these parameters."""
    dataset = open_store(project.dataset).fingerprint
    return project.runs / train.run_fingerprint(dataset, params.model, params.loss, params.train)


def describe(error: Exception) -> str:
    """One line that says why a trial failed."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return f"out of memory: {text}"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def tidy(search: Search, number: int) -> None:
    """Removes checkpoints of an ended trial, and its weights if it is no confirmation; record and images stay."""
    folder = search.trial_folder(number)
    if not search.confirms:
        shutil.rmtree(folder / "artifacts", ignore_errors=True)
    for scratch in folder.glob("runs/*"):
        checkpoint.remove(scratch)
        for later in (*scratch.glob("prior_*"), *scratch.glob("refiner_*")):
            shutil.rmtree(later, ignore_errors=True)
