"""Search for better parameters: worker processes run trials, which are evaluated on the val split.

medgen tune --trials 50 --workers 2
medgen tune --trials 50 --confirm 3 --apply

`run` is the entry function. All trials share one dataset and one extractor. The same command, run again, continues up
to the total number of trials. `--confirm` trains the best trials in full and chooses the winner among them; `--apply`
writes its values into params.yaml.
"""

import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock
from optuna.trial import FrozenTrial

from medgen.config import Params, Project, fingerprint, load, unknown_name
from medgen.console import counting_bar, say, warn
from medgen.data.store import Store, open_store
from medgen.datasets.weights import checked_weights
from medgen.errors import TrainingInterrupted, UserError
from medgen.evaluation.context import MIN_IMAGES, find_local_network
from medgen.ingest import preprocess
from medgen.io import write_atomic
from medgen.machine import gpus, num_threads
from medgen.metrics.features import load_extractor
from medgen.models import MODELS
from medgen.registry import fetcher
from medgen.training import extractor, train
from medgen.training.distributed import World
from medgen.training.initial_weights import find_weights
from medgen.tune.figures import write_figures
from medgen.tune.params_file import apply_best, read_without_credentials, write_best
from medgen.tune.pool import WorkerPool, allocate_slots, interrupt_on_signals
from medgen.tune.report import print_summary
from medgen.tune.space import SECTIONS, build_space, check_weight_files, full_params, trial_params
from medgen.tune.storage import storage_errors
from medgen.tune.study import Study, origin_number, ssim_of, study_name, trial_name
from medgen.tune.tracking import TrackedStudy
from medgen.tune.worker import Search, WorkerSlot, build_objective, cleanup

POLL_SECONDS = 1.0
RELIABLE_SAMPLES = 2000  # for each trial; with fewer the ranking by MMD is unreliable
RESULT_SECTIONS = ("data", "preprocess", "features", *SECTIONS)  # sections that determine a result


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
    """Search until the study has `trials` trials; write reports/tune/ with best.yaml, and the study's record.

    Args:
        project: its dataset and extractor are created if they are missing.
        params: parameters of trial 0, and of all trials where they are not searched.
        file: params file that `params` come from.
        trials: total number of trials in the study.
        workers: number of processes on this machine; None: one for each GPU, or one.
        timeout: seconds after which no trial of the search starts; confirmations have no timeout.
        confirm: number of best trials that are trained in full, together with trial 0; one of them becomes the winner.
            0: no confirmation; the best trial is the winner.
        apply: write the winner's values into `file`.

    Raises:
        UserError: data, space, objective or storage are invalid, or the last trials failed for the same reason.
        TrainingInterrupted: the process received SIGTERM or SIGUSR1.
    """
    if apply:
        check_params_unchanged(file, params)
    resolved = resolve_weights(project, params)
    search = prepare(project, resolved, trials, timeout)
    full = prepare(project, resolved, 0, None, is_confirmation=True) if confirm else None
    with lock_reports(project):  # best.yaml is made from this copy, so later edits of the file do not matter
        write_atomic(search.folder / file.name, read_without_credentials(file).encode())
    devices = [] if params.train.device == "cpu" else gpus()
    first = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))  # a log for each job of an array, not one for all
    slots = allocate_slots(workers or max(1, len(devices)), num_threads(), devices, first)
    with storage_errors(params.tune.storage):
        stages = [TrackedStudy(search)]
        status = "FAILED"
        try:
            with interrupt_on_signals():
                supervise(stages[0], slots)
                if full is not None and stages[0].study.ranked():
                    confirmation = TrackedStudy(full)
                    confirmation.study.enqueue_best(stages[0].study, confirm)
                    stages.append(confirmation)
                    stages[0].upload_parent()  # its MLflow run is the parent of the confirmation's
                    supervise(confirmation, slots)
            status = "FINISHED"
        except (KeyboardInterrupt, TrainingInterrupted) as stop:
            status = "KILLED"
            if isinstance(stop, KeyboardInterrupt):
                say("search stopped; running trials are saved, run the same command again to continue")
            raise
        finally:
            best = write_results(stages, status, file)
    if best is None:
        raise UserError("no trial can be recommended, for the reasons above; widen tune.space or fix what failed")
    if apply:
        check_params_unchanged(file, params)
        changed = apply_best(stages[-1].study, best, file)
        say(f"{file}: {'now has the best values; next: dvc repro' if changed else 'has the best values'}")


def resolve_weights(project: Project, params: Params) -> Params:
    """The parameters with the resolved train.init_from, so that all trials start from the same weights."""
    if params.train.init_from is None:
        return params
    source, _ = find_weights(project, params.train.init_from, fetcher(project, tracking=params.tracking))
    return params.model_copy(update={"train": params.train.model_copy(update={"init_from": source})})


def check_params_unchanged(file: Path, params: Params) -> None:
    """Check that the params file has the values of the search.

    Raises:
        UserError: it has others, because of --set or an edit.
    """
    own = load(file)
    if any(fingerprint(getattr(own, name)) != fingerprint(getattr(params, name)) for name in RESULT_SECTIONS):
        raise UserError(
            f"--apply: {file} has other values than the search, because of --set or an edit; write the values of --set "
            "into the file and search again, or omit --apply: reports/tune/best.yaml has the best values too"
        )


def write_results(stages: Sequence[TrackedStudy], status: str, file: Path) -> FrozenTrial | None:
    """Print and draw the results, write best.yaml, end the records; returns the winner of the last stage."""
    first, last = stages[0], stages[-1]
    search, study, folder = first.search, first.study, first.search.project.reports / "tune"
    best = last.study.winner()
    print_summary(study, file, last.study if last is not first else None)
    with lock_reports(search.project):
        searched = None if best is None else study.trials[origin_number(best)]
        files = write_figures(study, folder, searched)
        if best is not None:
            try:
                files.append(write_best(last.study, best, search.folder / file.name, folder))
            except UserError as error:
                say(f"no best.yaml: {error}")
        first.write_record(status, searched, files)
        if last is not first:
            last.write_record(status, best)
    for stage in stages:
        stage.upload_rest()
    if last is not first and best is not None:
        model = last.search.trial_folder(best.number) / "artifacts"
        if model.exists():  # only if the trial ran on this machine
            say(f"its model, prior and refiner: {model}")
    return best


def lock_reports(project: Project) -> FileLock:
    """The lock of reports/tune/ and the studies' files, which all searches of the project write.

    It is not the lock of `prepare`, which is held while an extractor is trained: a search that is asked to stop has
    only seconds to write its results.
    """
    return FileLock(project.runs / "tune_reports.lock")


def prepare(
    project: Project, params: Params, trials: int, timeout: float | None, is_confirmation: bool = False
) -> Search:
    """Create the dataset and the extractor if they are missing, and check what would make every trial fail.

    With `is_confirmation` the result is the study of trials in full that belongs to this search.

    Raises:
        UserError: data, space, objective or weights are invalid, or there is nothing to confirm.
    """
    if params.model.name not in MODELS:
        raise unknown_name("model.name", params.model.name, MODELS)
    space = build_space(params)
    check_weight_files(params, space)
    first = trial_params(params, {})
    project.runs.mkdir(parents=True, exist_ok=True)
    with FileLock(project.runs / "tune.lock"):
        store = prepare_store(project, params)
        extractor_hash = "" if MODELS[params.model.name].target == "mask" else prepare_extractor(project, params, store)
    if store.counts["val"] < MIN_IMAGES:
        raise UserError(
            f"{project.dataset}: {store.counts['val']} images in the val split, on which trials are evaluated; "
            f"expected at least {MIN_IMAGES}; increase preprocess.val_fraction or add images"
        )
    # raises an error for an invalid model or loss, or missing masks
    train.ModelTask(project, World(0, 1, torch.device("cpu")), first.model, first.loss, first.train)
    objective = build_objective(project, params)
    if any("inception" in key for key in objective.keys):
        checked_weights("inception")
    find_local_network(first.evaluate, project.root, torch.device("cpu"))
    shared = (space, objective, store.fingerprint, extractor_hash)
    name = study_name(params, *shared)
    if is_confirmation:
        params = full_params(params)
        name += f"-full-{fingerprint(study_name(params, *shared))}"
    elif objective.keys[0].startswith("generation/") and params.tune.trial.num_generated < RELIABLE_SAMPLES:
        warn(
            f"tune.trial.num_generated is {params.tune.trial.num_generated}: with fewer than {RELIABLE_SAMPLES} "
            "samples for each trial the ranking is unreliable"
        )
    deadline = None if timeout is None else time.time() + timeout
    search = Search(project, params, name, trials, datetime.now(), deadline, is_confirmation)
    search.folder.mkdir(parents=True, exist_ok=True)
    return search


def prepare_store(project: Project, params: Params) -> Store:
    """The dataset store, which is created if it is missing."""
    if not project.dataset.exists():
        preprocess.run(project, data=params.data, preprocess=params.preprocess)
    store = open_store(project.dataset)
    if fingerprint(store.preprocess) != fingerprint(params.preprocess):
        raise UserError(
            f"{project.dataset}: was made with other values of preprocess than the params file has; run `dvc repro "
            "features` (or `medgen preprocess` and `medgen features`) first"
        )
    return store


def prepare_extractor(project: Project, params: Params, store: Store) -> str:
    """The hash of the domain extractor, which is trained if it is missing."""
    if not project.features.exists():
        extractor.run(project, features=params.features)
    return load_extractor(project.features, store.fingerprint)[1]


def supervise(stage: TrackedStudy, slots: Sequence[WorkerSlot]) -> None:
    """Run workers until no trial is left, and meanwhile send records to MLflow and print progress."""
    search, study = stage.search, stage.study
    ended = {trial.number for trial in study.trials if trial.state.is_finished()}
    total = max(search.num_trials, len(study.trials))
    say(f"study {study.name}: {', '.join(study.space)}")
    trials = "trials in full" if search.is_confirmation else "trials"
    say(f"{study.objective} of the val split; {len(ended)} of {total} {trials} are done")
    if len(ended) == total:
        return
    with counting_bar() as progress, WorkerPool(search, slots) as pool:
        task = progress.add_task("", total=total, completed=len(ended))
        stage.write_record("RUNNING")
        stage.upload_parent()
        busy = True
        while busy:
            busy = pool.poll(len(ended), POLL_SECONDS)
            for trial in study.trials:
                if trial.state.is_finished() and trial.number not in ended:
                    ended.add(trial.number)
                    cleanup(search, trial.number)  # its worker may have been killed before its own cleanup
                    say(format_trial(study, trial))
            progress.update(task, completed=len(ended), description=format_progress(study))
            stage.upload()


def format_trial(study: Study, trial: FrozenTrial) -> str:
    """One line with a trial's state and metrics, and the progress of the search."""
    name = f"{trial_name(trial)} {trial.state.name.lower()}"
    if trial.user_attrs.get("reason"):
        return f"{name}: {trial.user_attrs['reason']}"
    scores = ", ".join(f"{label.rpartition('/')[2]} {value:.4g}" for label, value in study.scores(trial).items())
    floor = study.ssim_floor(study.trials)
    below = f" (below the SSIM floor of {floor:.4g})" if floor is not None and ssim_of(trial) < floor else ""
    return f"{name}: {scores}{below}; {format_progress(study)}"


def format_progress(study: Study) -> str:
    """The best trial with its value, and the numbers of pruned and failed trials."""
    best, counts = study.winner(), study.counts()
    shown = "none yet" if best is None else f"{best.values[-1]:.4g} ({trial_name(best)})"
    return f"best {shown}, {counts['pruned']} pruned, {counts['failed']} failed"
