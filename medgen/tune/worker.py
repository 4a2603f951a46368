"""A worker process of a search: claims trials, trains and evaluates them, and records the results."""

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
from medgen.errors import NonFiniteError, TrainingInterrupted, UserError, is_out_of_memory
from medgen.evaluation import evaluate
from medgen.evaluation.data import load_evaluation
from medgen.metrics.mmd import mmd
from medgen.models import MODELS
from medgen.registry import fetcher
from medgen.tracking import Tracker, history
from medgen.training import checkpoint, prior, refiner, train
from medgen.tune.objective import MMD, SSIM, Objective, choose_objective
from medgen.tune.space import build_space, trial_params
from medgen.tune.storage import STORAGE_ERRORS, open_storage, storage_errors
from medgen.tune.study import DISCREPANCY, MAX_ATTEMPTS, Claim, Study, discrepancy_to_dict, origin_number, trial_name

WAIT_SECONDS = 1.0
NO_MLFLOW = Tracking(enabled=False)  # only the process that started the workers writes to MLflow
PRUNING_METRICS = {"image": "val/ssim", "mask": "val/dice"}  # by the model's target; more is better
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}


@dataclass(frozen=True)
class Search:
    """The settings that all processes of a search share."""

    project: Project
    params: Params
    study: str  # its name
    num_trials: int  # total number of trials in the study
    started: datetime
    deadline: float | None  # seconds since 1970; no trial starts after it
    is_confirmation: bool = False  # trains the best trials of another study in full, and keeps their models

    @property
    def folder(self) -> Path:
        """Working folder of the study."""
        return self.project.runs / "tune" / self.study

    def trial_folder(self, number: int) -> Path:
        """Folder of a trial's model, prior, refiner, runs and reports."""
        return self.folder / f"trial_{number:04d}"


STOPPED = "stopped"  # file of a trial whose last worker was not killed: that attempt does not count


@dataclass(frozen=True)
class WorkerSlot:
    """A worker's share of the machine."""

    number: int
    threads: int
    gpu: str | None  # value of CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class Outcome:
    """The result of a trial."""

    state: TrialState
    reason: str = ""
    values: list[float] | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    discrepancy: Mapping[str, Any] | None = None  # from `discrepancy_to_dict`, if the objective is the MMD
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_study(search: Search) -> Study:
    """Open the study in this process.

    Raises:
        UserError: as in `medgen.tune.run`.
    """
    params = search.params
    space, objective = build_space(params), build_objective(search.project, params)
    return Study(open_storage(search.project, params.tune.storage), search.study, params, space, objective)


def build_objective(project: Project, params: Params) -> Objective:
    """The objective for this model and dataset."""
    side = min(open_store(project.dataset).image_shape[1:])
    return choose_objective(params.tune.objective, MODELS[params.model.name].target, side, params.evaluate)


def run_worker(search: Search, slot: WorkerSlot) -> None:
    """Run trials until none is left, with all output in a log file in the study's folder.

    SIGTERM, or the end of the parent process, stops the worker after the current step. Its trial stays running in the
    study; the next claim of it resumes from its checkpoint.
    """
    log = (search.folder / f"worker_{slot.number}.log").open("a", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    signal.signal(signal.SIGTERM, raise_interrupted)
    threading.Thread(target=terminate_after_parent, daemon=True).start()
    torch.set_num_threads(slot.threads)
    try:
        with storage_errors(search.params.tune.storage):
            run_trials(search)
    except (UserError, TrainingInterrupted) as error:
        print(f"worker {slot.number}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def run_trials(search: Search) -> None:
    """Claim and run trials until none is left or the deadline has passed."""
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


def raise_interrupted(*_: object) -> NoReturn:
    """Handle SIGTERM between two trainings; during one, the training handles it."""
    raise TrainingInterrupted("asked to stop")


def terminate_after_parent() -> None:
    """Send SIGTERM to this process when its parent process has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run_trial(search: Search, study: Study, claim: Claim) -> None:
    """Run all stages of a trial, evaluate it on the val split, write its record and end it in the study."""
    stopped = search.trial_folder(claim.trial.number) / STOPPED
    try:
        if stopped.exists():
            claim = dataclasses.replace(claim, attempt=max(1, claim.attempt - 1))
            claim.trial.set_user_attr("attempts", claim.attempt)
            stopped.unlink()
        _run_trial(search, study, claim)
    except (TrainingInterrupted, *STORAGE_ERRORS):  # no errors of the trial: it stays running and is claimed again
        stopped.parent.mkdir(parents=True, exist_ok=True)
        stopped.touch()  # a file, as the storage may be out of reach
        raise


def _run_trial(search: Search, study: Study, claim: Claim) -> None:
    number, name = claim.trial.number, trial_name(claim.trial)
    project = dataclasses.replace(search.project, apart=search.trial_folder(number))
    print(f"{name}, attempt {claim.attempt}: {claim.values}", flush=True)
    scratch, started = project.runs / "not_begun", time.monotonic()
    try:
        params = trial_params(search.params, claim.values)
        scratch = run_folder(project, params)
        with Tracker.open(scratch, NO_MLFLOW, project, name, parent=study.record) as tracker:
            tracker.finish("RUNNING")
        if claim.attempt > MAX_ATTEMPTS:
            reason = f"its worker was killed {MAX_ATTEMPTS} times without completing an epoch; was there enough memory?"
            outcome = Outcome(TrialState.FAIL, reason)
        else:
            outcome = train_and_evaluate(project, params, study, claim)
    except (TrainingInterrupted, *STORAGE_ERRORS):
        raise
    except NonFiniteError as error:
        reason = f"{error.term} not finite at step {error.step} (phase {error.phase})"
        tags = {"nonfinite_step": str(error.step), "nonfinite_term": error.term}
        outcome = Outcome(TrialState.PRUNED, reason, tags=tags)
    except optuna.TrialPruned as pruned:
        outcome = Outcome(TrialState.PRUNED, str(pruned))
    except Exception as error:  # any error of one trial is recorded, and the search continues
        traceback.print_exc()
        outcome = Outcome(TrialState.FAIL, describe_error(error))
    print(f"{name}: {outcome.state.name.lower()} {outcome.reason}", flush=True)
    write_trial_record(project, scratch, study, claim, outcome)
    claim.trial.set_user_attr("seconds", round(time.monotonic() - started, 2))
    end_trial(study, claim, outcome)
    cleanup(search, number)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def end_trial(study: Study, claim: Claim, outcome: Outcome) -> None:
    """Write the outcome into the study: user attributes, constraint, state and values."""
    attributes = {"reason": outcome.reason, **outcome.tags, "metrics": dict(outcome.metrics)}
    for key, value in attributes.items():
        if value:
            claim.trial.set_user_attr(key, value)
    if outcome.discrepancy is not None:
        claim.trial.set_user_attr(DISCREPANCY, outcome.discrepancy)
    if study.objective.has_floor and outcome.state == TrialState.COMPLETE:
        own = outcome.metrics[SSIM]
        claim.trial.set_constraint(SSIM, (own if claim.ssim_floor is None else claim.ssim_floor) - own)
    study.tell(claim, outcome.state, outcome.values)


def train_and_evaluate(project: Project, params: Params, study: Study, claim: Claim) -> Outcome:
    """Run the stages of a trial and evaluate it.

    Raises:
        NonFiniteError, optuna.TrialPruned: the trial is stopped early.
        UserError: the combination of parameters is invalid.
    """
    trial, objective = claim.trial, study.objective
    metric = PRUNING_METRICS[MODELS[params.model.name].target]
    last = sum(phase.epochs for phase in params.train.phases)
    sign = 1.0 if objective.directions[0] == "maximize" else -1.0  # Optuna compares in the direction of the objective
    first = study.trials[0].intermediate_values if trial.number > 0 and objective.has_floor else {}

    def after_epoch(epoch: int, values: Mapping[str, float]) -> None:
        if claim.attempt > 1:
            trial.set_user_attr("attempts", 1)  # an epoch is completed
        if objective.is_pareto or not math.isfinite(values[metric]):
            return  # Optuna does not prune with two objectives
        # if SSIM is only a lower limit, a trial with more of it than trial 0 is not better
        trial.report(sign * min(values[metric], sign * first.get(epoch, sign * math.inf)), epoch)
        if epoch < last and trial.number > 0 and trial.should_prune():  # trial 0 is the reference
            raise optuna.TrialPruned(f"{metric} {values[metric]:.4f} after epoch {epoch}: worse than other trials'")

    sections = {"model": params.model, "loss": params.loss, "train": params.train}
    fetch = fetcher(project, tracking=params.tracking)
    train.run(project, **sections, tracking=NO_MLFLOW, after_epoch=after_epoch, fetch=fetch)  # type: ignore[arg-type]
    prior.run(project, prior=params.prior, tracking=NO_MLFLOW)
    refiner.run(project, refiner=params.refiner, tracking=NO_MLFLOW)
    metrics = evaluate.evaluate_validation(project, evaluate=params.evaluate)
    values = objective.values(metrics)
    required = dict(zip(objective.labels, values, strict=True))
    required |= {SSIM: metrics[SSIM]} if objective.has_floor else {}
    if nonfinite := [f"{name} is {value}" for name, value in required.items() if not math.isfinite(value)]:
        return Outcome(TrialState.PRUNED, f"the objective is not finite: {', '.join(nonfinite)}")
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    discrepancy = compute_discrepancy(project) if objective.keys[-1] == MMD else None
    return Outcome(TrialState.COMPLETE, values=values, metrics=finite, discrepancy=discrepancy)


def compute_discrepancy(project: Project) -> dict[str, Any]:
    """The parts of the evaluated model's MMD that a comparison with another model needs."""
    data = load_evaluation(project.evaluation)
    assert data.samples is not None and data.held_out is not None, "segmentation models have no MMD"
    patients = data.held_out_groups.tolist()
    discrepancy = mmd(data.held_out.features, data.samples.features, data.info.bandwidth, patients)
    return discrepancy_to_dict(discrepancy, patients)


def write_trial_record(project: Project, scratch: Path, study: Study, claim: Claim, outcome: Outcome) -> None:
    """End the trial's record with its state, reason, metrics and samples."""
    with Tracker.open(scratch, NO_MLFLOW, project, trial_name(claim.trial), parent=study.record) as tracker:
        tags = {"tune.study": study.name, "tune.trial": str(origin_number(claim.trial))}
        tags["tune.state"] = outcome.state.name.lower()
        tracker.tags(tags | ({"tune.reason": outcome.reason} if outcome.reason else {}) | dict(outcome.tags))
        records = history(scratch)
        step = records[-1]["step"] if records else 0
        tracker.metrics({f"val/{name}": value for name, value in outcome.metrics.items()}, step)
        samples = project.figures / "samples.png"
        if outcome.metrics and samples.exists():
            tracker.artifact(samples, "figures")
            tracker.image("samples", samples, step=0)  # as `medgen evaluate` does
        tracker.finish(STATUS[outcome.state])


def run_folder(project: Project, params: Params) -> Path:
    """The folder in which `medgen.training.train` keeps the training of these parameters."""
    dataset = open_store(project.dataset).fingerprint
    return project.runs / train.run_fingerprint(dataset, params.model, params.loss, params.train)


def describe_error(error: Exception) -> str:
    """The reason of a failed trial, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        return f"out of memory: {text}"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def cleanup(search: Search, number: int) -> None:
    """Remove the checkpoints and latents of an ended trial, and its weights unless it is a confirmation."""
    folder = search.trial_folder(number)
    if not search.is_confirmation:
        shutil.rmtree(folder / "artifacts", ignore_errors=True)
    for scratch in folder.glob("runs/*"):
        checkpoint.remove(scratch)
        for latents in scratch.glob("latents_*"):
            shutil.rmtree(latents, ignore_errors=True)  # the worker may be removing them too
        for stage_folder in (*scratch.glob("prior_*"), *scratch.glob("refiner_*")):
            checkpoint.remove(stage_folder)  # its figures belong to the trial's record
