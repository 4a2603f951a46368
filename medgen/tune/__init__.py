"""The search for better parameters: trials in worker processes, evaluated on the val split.

medgen tune --trials 50 --workers 2
medgen tune --trials 50 --confirm 3 --apply

Data and extractor are made once. Run again, it goes on to the asked number of trials. `--confirm` trains the best of
them in full and chooses among those; `--apply` writes the winner's values into params.yaml.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medgen.config import Params, Project, fingerprint, load, unknown_name
from medgen.data.store import Store, open_store
from medgen.datasets.weights import checked_weights
from medgen.errors import TrainingInterrupted, UserError
from medgen.evaluation import evaluate
from medgen.ingest import preprocess
from medgen.io import write_atomic
from medgen.machine import gpus, num_threads
from medgen.metrics.features import load_extractor
from medgen.models import MODELS
from medgen.training import extractor, train
from medgen.training.distributed import World
from medgen.tune.params_file import apply_best, write_best
from medgen.tune.pictures import write_figures
from medgen.tune.pool import Pool, heeding_sigterm, seats
from medgen.tune.record import Sender, keep_record
from medgen.tune.report import print_summary
from medgen.tune.space import SECTIONS, build_space, check_weights, in_full, trial_params
from medgen.tune.storage import lost
from medgen.tune.study import Study, origin, ssim_of, study_name, trial_name
from medgen.tune.worker import Search, Seat, objective_of, open_study, tidy

POLL_SECONDS = 1.0
RELIABLE_SAMPLES = 2000  # of one trial: with fewer, the ranking by MMD is rough
SHAPING = ("data", "preprocess", "features", *SECTIONS)  # sections that shape a result


@dataclass(frozen=True)
class Stage:
    """A study and what works on it: the search, or its confirmation."""

    search: Search
    study: Study
    sender: Sender


def run(
    project: Project,
    *,
    params: Params,
    file: Path,
    trials: int,
    workers: int | None = None,
    timeout: float | None = None,
    confirm: int = 0,
    apply: bool = False,
) -> None:
    """Searches until the study has `trials` trials; writes reports/tune/ with best.yaml, and the record of it.

    Args:
        project: where to work.
        params: the parameters that the search starts from.
        file: where they come from; `apply` writes the best values into it.
        trials: total number of trials in the study.
        workers: processes on this machine; None: one for each GPU, or one.
        timeout: seconds after which no trial of the search begins; confirmations follow it.
        confirm: number of the best trials that are trained in full, beside trial 0; the winner is one of them. 0: none,
            and the best trial wins.
        apply: writes the best values into `file`.

    Raises:
        UserError: data, space, objective or storage are wrong, or the last trials failed alike.
        TrainingInterrupted: SIGTERM or SIGUSR1 asked to stop.
    """
    if apply:
        check_same(file, params)
    console = Console(highlight=False)
    search = prepare(project, params, trials, timeout)
    full = prepare(project, params, 0, None, confirms=True) if confirm else None
    with reporting(project):  # best.yaml is made from it, whatever is edited meanwhile
        write_atomic(search.folder / file.name, file.read_bytes())
    devices = [] if params.train.device == "cpu" else gpus()
    places = seats(workers or max(1, len(devices)), num_threads(), devices)
    with lost(params.tune.storage):
        stages = [open_stage(search)]
        status = "FAILED"
        try:
            with heeding_sigterm():
                supervise(stages[0], places, console)
                if full is not None and stages[0].study.ranked():
                    confirmation = open_stage(full)
                    confirmation.study.enqueue_best(stages[0].study, confirm)
                    stages.append(confirmation)
                    stages[0].sender.send_parent()  # MLflow shows the confirmation below it
                    supervise(confirmation, places, console)
            status = "FINISHED"
        except (KeyboardInterrupt, TrainingInterrupted) as stop:
            status = "KILLED"
            if isinstance(stop, KeyboardInterrupt):
                console.print("stopped; running trials are saved, the same command goes on")
            raise
        finally:
            best = conclude(stages, status, file, console)
    if best is None:
        raise UserError("no trial can be recommended, for the reasons above; widen tune.space or fix what failed")
    if apply:
        check_same(file, params)
        changed = apply_best(stages[-1].study, best, file)
        console.print(f"{file}: {'now has the best values; next: dvc repro' if changed else 'has the best values'}")


def check_same(file: Path, params: Params) -> None:
    """Checks that the params file has the values that the search is run with.

    Raises:
        UserError: it has others, by --set or since it was edited.
    """
    if any(getattr(load(file), name) != getattr(params, name) for name in SHAPING):
        raise UserError(
            f"--apply: {file} has other values than the search was run with, by --set or an edit; write what you set "
            "into the file and search again, or leave --apply out: reports/tune/best.yaml has the best values too"
        )


def open_stage(search: Search) -> Stage:
    """Opens the study in this process, with what sends its records to MLflow."""
    study = open_study(search)
    return Stage(search, study, Sender(search, study, search.params.tracking))


def conclude(stages: Sequence[Stage], status: str, file: Path, console: Console) -> FrozenTrial | None:
    """Prints and draws the results, writes best.yaml, ends the records; returns the winner of the last stage."""
    first, last = stages[0], stages[-1]
    search, study, folder = first.search, first.study, first.search.project.reports / "tune"
    best = last.study.winner()
    print_summary(study, file, last.study if last is not first else None)
    with reporting(search.project):
        searched = None if best is None else study.trials[origin(best)]
        files = write_figures(study, folder, searched)
        if best is not None:
            try:
                files.append(write_best(last.study, best, search.folder / file.name, folder))
            except UserError as error:
                console.print(f"no best.yaml: {error}", markup=False, soft_wrap=True)
        keep_record(search, study, status, searched, files)
        if last is not first:
            keep_record(last.search, last.study, status, best)
    for stage in stages:
        stage.sender.send_rest(console)
    if last is not first and best is not None:
        model = last.search.trial_folder(best.number) / "artifacts"
        if model.exists():  # on this machine
            console.print(f"its model, prior and refiner: {model}", markup=False, soft_wrap=True)
    return best


def reporting(project: Project) -> FileLock:
    """A context in which no other search of the project writes what they share: reports/tune/, a study's files.

    Not the lock of `prepare`, which may train an extractor: a search that was told to stop has seconds to conclude.
    """
    return FileLock(project.runs / "tune_reports.lock")


def prepare(project: Project, params: Params, trials: int, timeout: float | None, confirms: bool = False) -> Search:
    """Makes what all trials share where it is missing, and checks what would break every one.

    Args:
        project, params, trials, timeout: as of `run`.
        confirms: for trials in full, of a study of their own, that belongs to the search's.

    Raises:
        UserError: data, space, objective or weights are wrong, or there is nothing to confirm.
    """
    if params.model.name not in MODELS:
        raise unknown_name("model.name", params.model.name, MODELS)
    space = build_space(params)
    check_weights(params, space)
    first = trial_params(params, {})
    project.runs.mkdir(parents=True, exist_ok=True)
    with FileLock(project.runs / "tune.lock"):
        store = prepare_store(project, params)
        extractor = "" if MODELS[params.model.name].target == "mask" else prepare_extractor(project, params, store)
    if store.counts["val"] < evaluate.MIN_IMAGES:
        raise UserError(
            f"{project.dataset}: {store.counts['val']} images in the val split, which trials are evaluated on; "
            f"expected at least {evaluate.MIN_IMAGES}; raise preprocess.val_fraction or bring more images"
        )
    # reports what is wrong with model, loss or masks, which would break every trial
    train.ModelTask(project, World(0, 1, torch.device("cpu")), first.model, first.loss, first.train)
    objective = objective_of(project, params)
    if any("inception" in key for key in objective.keys):
        checked_weights("inception")
    evaluate.find_local_network(first.evaluate, project.root, torch.device("cpu"))
    name = study_name(params, space, objective, store.fingerprint, extractor)
    if confirms:
        params = in_full(params)
        name += f"-full-{fingerprint(study_name(params, space, objective, store.fingerprint, extractor))}"
    elif objective.keys[0].startswith("generation/") and params.tune.trial.num_generated < RELIABLE_SAMPLES:
        warn_of_few_samples(params.tune.trial.num_generated)
    deadline = None if timeout is None else time.time() + timeout
    search = Search(project, params, name, trials, datetime.now(), deadline, confirms)
    search.folder.mkdir(parents=True, exist_ok=True)
    return search


def warn_of_few_samples(count: int) -> None:
    """Prints a warning that trials draw too few samples to be ranked reliably."""
    warning = (
        f"warning: tune.trial.num_generated is {count}: with fewer than {RELIABLE_SAMPLES} samples of each trial the "
        "ranking is rough"
    )
    Console(stderr=True, highlight=False).print(warning, style="yellow", markup=False, soft_wrap=True)


def prepare_store(project: Project, params: Params) -> Store:
    """The store, made where there is none."""
    if not project.dataset.exists():
        preprocess.run(project, data=params.data, preprocess=params.preprocess)
    store = open_store(project.dataset)
    if store.preprocess != params.preprocess:
        raise UserError(
            f"{project.dataset}: was made with other values of preprocess than the params file has; run `dvc repro "
            "features` (or `medgen preprocess` and `medgen features`) first"
        )
    return store


def prepare_extractor(project: Project, params: Params, store: Store) -> str:
    """Hash of the domain extractor, which is trained where there is none."""
    if not project.features.exists():
        extractor.run(project, features=params.features)
    return load_extractor(project.features, store.fingerprint)[1]


def supervise(stage: Stage, places: Sequence[Seat], console: Console) -> None:
    """Runs workers until none finds a trial to do; meanwhile sends their records to MLflow and prints the progress."""
    search, study, sender = stage.search, stage.study, stage.sender
    ended = {trial.number for trial in study.trials if trial.state.is_finished()}
    total = max(search.num_trials, len(study.trials))
    console.print(f"study {study.name}: {', '.join(study.space)}", soft_wrap=True)
    trials = "trials in full" if search.confirms else "trials"
    console.print(f"{study.objective} of the val split; {len(ended)} of {total} {trials} are done", soft_wrap=True)
    if len(ended) == total:
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, Pool(search, places) as pool:
        task = bar.add_task("", total=total, completed=len(ended))
        keep_record(search, study, "RUNNING")
        sender.send_parent()
        busy = True
        while busy:
            busy = pool.tend(len(ended), POLL_SECONDS)
            for trial in study.trials:
                if trial.state.is_finished() and trial.number not in ended:
                    ended.add(trial.number)
                    tidy(search, trial.number)  # its worker may have been killed before
                    console.print(line_of(study, trial), markup=False, soft_wrap=True)
            bar.update(task, completed=len(ended), description=state_of(study))
            sender.send()


def line_of(study: Study, trial: FrozenTrial) -> str:
    """One line: a trial's state and metrics, and the state of the search."""
    name = f"{trial_name(trial)} {trial.state.name.lower()}"
    if trial.user_attrs.get("reason"):
        return f"{name}: {trial.user_attrs['reason']}"
    scores = ", ".join(f"{label.rpartition('/')[2]} {value:.4g}" for label, value in study.scores(trial).items())
    floor = study.ssim_floor(study.trials)
    below = f" (below the SSIM floor of {floor:.4g})" if floor is not None and ssim_of(trial) < floor else ""
    return f"{name}: {scores}{below}; {state_of(study)}"


def state_of(study: Study) -> str:
    """The best trial's objective, and the numbers of pruned and failed ones."""
    best, counts = study.winner(), study.counts()
    shown = "none yet" if best is None else f"{best.values[-1]:.4g} ({trial_name(best)})"
    return f"best {shown}, {counts['pruned']} pruned, {counts['failed']} failed"
