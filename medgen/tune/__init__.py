"""The search for better parameters: trials in worker processes, judged on the val split.

medgen tune --trials 50 --workers 2

Data and extractor are made once. Run again, it goes on to the asked number of trials; `--apply` writes the best into
params.yaml, and `dvc repro` trains it in full.
"""

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medgen import evaluate, features, preprocess, train
from medgen.config import Params, Project, load, unknown_name
from medgen.data.store import Store, open_store
from medgen.data.weights import checked_weights
from medgen.distributed import World
from medgen.errors import TrainingInterrupted, UserError
from medgen.files import write_atomic
from medgen.machine import gpus, num_threads
from medgen.metrics.features import load_extractor
from medgen.models import MODELS
from medgen.tune.params_file import apply_best, write_best
from medgen.tune.pictures import write_figures
from medgen.tune.pool import Pool, heeding_sigterm, seats
from medgen.tune.record import Sender, keep_record
from medgen.tune.report import print_summary
from medgen.tune.space import build_space, check_weights, trial_params
from medgen.tune.storage import lost
from medgen.tune.study import Study, ssim_of, study_name
from medgen.tune.worker import Search, Seat, objective_of, open_study, tidy

POLL_SECONDS = 1.0
SHAPING = ("data", "preprocess", "features", "model", "loss", "train", "prior")  # sections that shape a result


def run(
    project: Project,
    *,
    params: Params,
    file: Path,
    trials: int,
    workers: int | None = None,
    timeout: float | None = None,
    apply: bool = False,
) -> None:
    """Searches until the study has `trials` trials; writes reports/tune/ with best.yaml, and the record of it.

    Args:
        project: where to work.
        params: the parameters that the search starts from.
        file: where they come from; `apply` writes the best values into it.
        trials: how many the study shall have, earlier ones included.
        workers: processes on this machine; None: one for each GPU, or one.
        timeout: seconds after which no trial begins.
        apply: whether to write the best values into `file`.

    Raises:
        UserError: data, space, objective or storage are wrong, or the last trials failed alike.
        TrainingInterrupted: SIGTERM or SIGUSR1 asked to stop.
    """
    if apply:
        check_same(file, params)
    console = Console(highlight=False)
    search = prepare(project, params, trials, timeout)
    with reporting(project):  # best.yaml is made from it, whatever is edited meanwhile
        write_atomic(search.folder / file.name, file.read_bytes())
    devices = [] if params.train.device == "cpu" else gpus()
    places = seats(workers or max(1, len(devices)), num_threads(), devices)
    with lost(params.tune.storage):
        study = open_study(search)
        sender = Sender(search, study, params.tracking)
        status = "FAILED"
        try:
            with heeding_sigterm():
                supervise(search, study, places, sender, console)
            status = "FINISHED"
        except (KeyboardInterrupt, TrainingInterrupted) as stop:
            status = "KILLED"
            if isinstance(stop, KeyboardInterrupt):
                console.print("stopped; running trials are saved, the same command goes on")
            raise
        finally:
            best = conclude(search, study, status, file, sender, console)
    if best is None:
        raise UserError("no trial can be recommended, for the reasons above; widen tune.space or mend what failed")
    if apply:
        check_same(file, params)
        changed = apply_best(study, best, file)
        console.print(f"{file}: {'now has the best values; next: dvc repro' if changed else 'has the best values'}")


def check_same(file: Path, params: Params) -> None:
    """Refuses to write into a params file that says other things than were searched with.

    Raises:
        UserError: it does, by --set or since it was edited.
    """
    if any(getattr(load(file), name) != getattr(params, name) for name in SHAPING):
        raise UserError(
            f"--apply: {file} has other values than the search was run with, by --set or an edit; write what you set "
            "into the file and search again, or leave --apply out: reports/tune/best.yaml has the best values too"
        )


def conclude(
    search: Search, study: Study, status: str, file: Path, sender: Sender, console: Console
) -> FrozenTrial | None:
    """Says what was found, draws it, writes best.yaml, ends the record; returns the best trial."""
    best, folder = study.winner(), search.project.reports / "tune"
    print_summary(study, file)
    with reporting(search.project):
        files = write_figures(study, folder)
        if best is not None:
            try:
                files.append(write_best(study, best, search.folder / file.name, folder))
            except UserError as error:
                console.print(f"no best.yaml: {error}", markup=False, soft_wrap=True)
        keep_record(search, study, status, best, files)
    sender.send_rest(console)
    return best


def reporting(project: Project) -> FileLock:
    """A context in which no other search of the project writes what they share: reports/tune/, a study's files.

    Not the lock of `prepare`, which may train an extractor: a search that was told to stop has seconds to conclude.
    """
    return FileLock(project.runs / "tune_reports.lock")


def prepare(project: Project, params: Params, trials: int, timeout: float | None) -> Search:
    """Makes what all trials share where it is missing, and refuses early what would break every one.

    Raises:
        UserError: data, space, objective or weights are wrong.
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
            f"{project.dataset}: {store.counts['val']} images in the val split, which trials are judged on; expected "
            f"at least {evaluate.MIN_IMAGES}; raise preprocess.val_fraction or bring more images"
        )
    # what is wrong with model, loss or masks would break every trial: it is said here
    train.ModelTask(project, World(0, 1, torch.device("cpu")), first.model, first.loss, first.train)
    objective = objective_of(project, params)
    if any("inception" in key for key in objective.keys):
        checked_weights("inception")
    name = study_name(params, space, objective, store.fingerprint, extractor)
    deadline = None if timeout is None else time.time() + timeout
    search = Search(project, params, name, trials, datetime.now(), deadline)
    search.folder.mkdir(parents=True, exist_ok=True)
    return search


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
        features.run(project, features=params.features)
    return load_extractor(project.features, store.fingerprint)[1]


def supervise(search: Search, study: Study, places: Sequence[Seat], sender: Sender, console: Console) -> None:
    """Workers, until none finds a trial to do; meanwhile MLflow gets their records, and a person sees how it stands."""
    ended = {trial.number for trial in study.trials if trial.state.is_finished()}
    console.print(f"study {study.name}: {', '.join(study.space)}", soft_wrap=True)
    console.print(f"{study.objective} of the val split; {len(ended)} of {search.num_trials} trials are done")
    if len(ended) >= search.num_trials and len(ended) == len(study.trials):
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, Pool(search, places) as pool:
        task = bar.add_task("", total=search.num_trials, completed=len(ended))
        keep_record(search, study, "RUNNING")
        sender.send_parent()
        busy = True
        while busy:
            busy = pool.tend(len(ended), POLL_SECONDS)
            for trial in study.trials:
                if trial.state.is_finished() and trial.number not in ended:
                    ended.add(trial.number)
                    tidy(search.trial_folder(trial.number))  # its worker may have been killed before
                    console.print(line_of(study, trial), markup=False, soft_wrap=True)
            bar.update(task, completed=len(ended), description=state_of(study))
            sender.send()


def line_of(study: Study, trial: FrozenTrial) -> str:
    """What became of a trial, and how the search stands."""
    name = trial.state.name.lower()
    if trial.user_attrs.get("reason"):
        return f"trial {trial.number} {name}: {trial.user_attrs['reason']}"
    scores = ", ".join(f"{label.rpartition('/')[2]} {value:.4g}" for label, value in study.scores(trial).items())
    floor = study.ssim_floor(study.trials)
    below = f" (below the SSIM floor of {floor:.4g})" if floor is not None and ssim_of(trial) < floor else ""
    return f"trial {trial.number} {name}: {scores}{below}; {state_of(study)}"


def state_of(study: Study) -> str:
    """Best value, and how many were pruned or failed."""
    best, counts = study.winner(), study.counts()
    shown = "none yet" if best is None else f"{best.values[-1]:.4g} (trial {best.number})"
    return f"best {shown}, {counts['pruned']} pruned, {counts['failed']} failed"
