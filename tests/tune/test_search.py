"""Searches from the first trial to the reports: trials that end well, fail, diverge or are killed."""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from medgen import console, tune
from medgen.config import Params, Project, load, replace
from medgen.data.store import open_store
from medgen.datasets.sample import draw
from medgen.errors import TrainingInterrupted, UserError
from medgen.evaluation import evaluate
from medgen.ingest import preprocess
from medgen.machine import gpus
from medgen.models import bundle
from medgen.priors.refiner import load_refiner
from medgen.tracking import history, read_run
from medgen.training import prior, refiner, train
from medgen.tune import worker
from medgen.tune.pool import allocate_slots, environment
from medgen.tune.report import print_summary
from medgen.tune.study import DISCREPANCY, MAX_ATTEMPTS, origin_number

RATE, BETA = "train.phases.one.learning_rate", "train.phases.one.beta.end"
LONG = 20  # epochs: enough to be killed in


def prepare(project, params, trials):
    return tune.prepare(project, params, trials, None)


def run_here(project, params, trials):
    """Run all trials in this process; returns search and study."""
    search = prepare(project, params, trials)
    worker.run_trials(search)
    return search, worker.open_study(search)


def run_folder(search, number):
    (folder,) = search.trial_folder(number).glob("runs/*")
    return folder


def epochs_of(search, number):
    return [record["step"] for folder in search.trial_folder(number).glob("runs/*") for record in history(folder)]


def states_of(study):
    return [trial.state.name for trial in study.trials]


@pytest.fixture
def stub_evaluation(monkeypatch):
    """Skips prior, refiner and evaluation; returns the metrics that each trial gets."""
    metrics = {"reconstruction/ssim": 0.5, "generation/mmd_domain": 1.0}
    for stage in (prior, refiner):
        monkeypatch.setattr(stage, "run", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "evaluate_validation", lambda *_, **__: metrics)
    monkeypatch.setattr(worker, "compute_discrepancy", lambda *_: None)
    return metrics


@pytest.fixture
def stub_trials(stub_evaluation, monkeypatch):
    """Skips the training as well."""
    monkeypatch.setattr(train, "run", lambda *_, **__: None)
    return stub_evaluation


@pytest.fixture(scope="module")
def finished(make_project, tmp_path_factory):
    """A search with two trials, and the splits that they were evaluated on."""
    splits, load_context = [], evaluate.load_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_context", lambda *args: splits.append(args[-1]) or load_context(*args))
        search, study = run_here(*make_project(tmp_path_factory.mktemp("finished") / "project"), 2)
    return SimpleNamespace(search=search, study=study, splits=splits)


@pytest.fixture
def finished_copy(finished, tmp_path):
    """The same search in a project of the test's own."""
    shutil.copytree(finished.search.project.root, tmp_path / "copy")
    return dataclasses.replace(finished.search, project=Project(tmp_path / "copy"))


def test_trials_are_evaluated_on_the_val_split_and_recorded(finished):
    search, study, project = finished.search, finished.study, finished.search.project
    assert finished.splits == ["val", "val"]
    stored = [trial.user_attrs[DISCREPANCY] for trial in study.trials]
    assert study.trials[1].values[0] - study.trials[0].values[0] == pytest.approx(
        stored[1]["among_samples"]
        - stored[0]["among_samples"]
        - 2 * np.mean(np.subtract(stored[1]["to_samples"], stored[0]["to_samples"])),
        abs=1e-6,
    )
    assert [len(each["patients"]) for each in stored] == [open_store(project.dataset).counts["val"]] * 2
    for trial in study.trials:
        record = read_run(run_folder(search, trial.number))
        assert (record.name, record.status) == (f"trial {trial.number}", "FINISHED")
        assert (record.tags["tune.trial"], record.tags["tune.state"]) == (str(trial.number), "complete")
        assert record.params[RATE] == study.values_of(trial)[RATE]
        assert record.metrics[-1]["val/generation/mmd_domain"] == trial.values[0]
        assert trial.system_attrs["constraints:reconstruction/ssim"] == pytest.approx(
            study.trials[0].user_attrs["metrics"]["reconstruction/ssim"]
            - trial.user_attrs["metrics"]["reconstruction/ssim"]
        )
        assert (search.trial_folder(trial.number) / "reports" / "figures" / "samples.png").stat().st_size > 0
    assert not list(search.folder.rglob("*.safetensors")) and not list(search.folder.rglob("checkpoint.pt"))
    assert not project.model.exists() and not project.curves.exists()


def test_trials_have_the_metrics_of_evaluate_on_the_same_split(finished, finished_copy, monkeypatch):
    """The stages, run by hand with the parameters of trial 0, and the whole of evaluate give the same metrics."""
    project, own = finished_copy.project, tune.trial_params(finished_copy.params, {})
    train.run(project, model=own.model, loss=own.loss, train=own.train, tracking=worker.NO_MLFLOW)
    prior.run(project, prior=own.prior, tracking=worker.NO_MLFLOW)
    refiner.run(project, refiner=own.refiner, tracking=worker.NO_MLFLOW)
    load_context = evaluate.load_context
    monkeypatch.setattr(evaluate, "load_context", lambda *args: load_context(*args[:6], "val"))
    by_hand = evaluate.run(project, evaluate=own.evaluate, tracking=worker.NO_MLFLOW)
    metrics = finished.study.trials[0].user_attrs["metrics"]
    compared = set(metrics) & set(by_hand)
    assert {"reconstruction/ssim", "generation/mmd_domain", "privacy/copy_rate"} <= compared
    assert {key: metrics[key] for key in compared} == pytest.approx({key: by_hand[key] for key in compared}, rel=1e-4)


def test_two_processes_write_their_reports_one_after_the_other(finished_copy, monkeypatch):
    search = finished_copy
    both_inside = threading.Barrier(2, timeout=1.0)
    write_figures = tune.write_figures

    def meet(*args):
        try:
            both_inside.wait()
        except threading.BrokenBarrierError:  # the other one waits for the lock
            return write_figures(*args)
        raise AssertionError("both write at once")

    monkeypatch.setattr(tune, "write_figures", meet)
    file = search.project.root / "params.yaml"
    (search.folder / file.name).write_bytes(file.read_bytes())

    def write_results(_):
        return tune.write_results([tune.TrackedStudy(search)], "FINISHED", file).number

    with ThreadPoolExecutor(2) as threads:
        assert len(set(threads.map(write_results, range(2)))) == 1


def test_a_trial_trains_the_refiner_with_its_values(search_project, monkeypatch):
    enabled = {"enabled": True, "channels": 8, "blocks": 1, "epochs": 1, "sampling_steps": 2}
    space = {"refiner.sampling_noise": {"low": 0.1, "high": 0.9}}
    project, params = search_project(space=space, objective="reconstruction/ssim", sections={"refiner": enabled})
    noises = []

    def read_noise(project, **_):
        noises.append(load_refiner(project.refiner, bundle.digest(project.model)).params.sampling_noise)
        return {"reconstruction/ssim": 0.5}

    monkeypatch.setattr(evaluate, "evaluate_validation", read_noise)
    search, study = run_here(project, params, 2)
    tried = [study.values_of(trial)["refiner.sampling_noise"] for trial in study.trials]
    assert tried[0] == 0.5 != tried[1] and noises == tried
    assert not list(search.folder.rglob("checkpoint.pt")) and not list(search.folder.rglob("*.safetensors"))
    recorded = {
        path.parent / event["path"]
        for path in search.folder.rglob("history.jsonl")
        for event in map(json.loads, path.read_text().splitlines())
        if "path" in event
    }
    assert {path.name for path in recorded} >= {"refiner_loss.png"}
    assert all(path.is_file() for path in recorded)  # MLflow may get them later


@pytest.mark.parametrize("objective", [None, "pareto"])
def test_a_diverging_trial_is_pruned_with_step_and_term(search_project, stub_evaluation, monkeypatch, objective):
    run = train.run

    def run_if_diverging(project, train, **words):
        if train.phases[0].learning_rate == 1e30:
            run(project, train=train, **words)

    monkeypatch.setattr(train, "run", run_if_diverging)
    project, params = search_project(space={RATE: {"choices": [1e-3, 1e30]}}, objective=objective)
    search, study = run_here(project, params, 4)
    diverging = [trial for trial in study.trials if study.values_of(trial)[RATE] == 1e30]
    assert diverging and len(diverging) < 4
    for trial in study.trials:
        record = read_run(run_folder(search, trial.number))
        if trial in diverging:
            assert (trial.state, record.status) == (TrialState.PRUNED, "KILLED")
            step, term = trial.user_attrs["nonfinite_step"], trial.user_attrs["nonfinite_term"]
            assert trial.user_attrs["reason"] == f"{term} not finite at step {step} (phase one)"
            tags = record.tags
            assert (tags["nonfinite_step"], tags["nonfinite_term"], tags["tune.state"]) == (step, term, "pruned")
        else:
            assert (trial.state, record.status) == (TrialState.COMPLETE, "FINISHED")
    assert study.winner() not in diverging


def test_an_objective_or_floor_that_is_not_finite_prunes_the_trial(search_project, stub_trials, monkeypatch):
    cases = list(product(("generation/mmd_domain", "reconstruction/ssim"), (float("nan"), float("inf"))))
    metrics = iter([stub_trials | {key: value} for key, value in cases])
    monkeypatch.setattr(evaluate, "evaluate_validation", lambda *_, **__: next(metrics))
    _, study = run_here(*search_project(), len(cases))
    for trial, (key, value) in zip(study.trials, cases, strict=True):
        assert trial.state == TrialState.PRUNED and f"{key} is {value}" in trial.user_attrs["reason"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory: CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: "),
        (UserError("artifacts/dataset/images.npy: damaged"), "artifacts/dataset/images.npy: damaged"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_reasons_of_errors(error, reason):
    assert worker.describe_error(error).startswith(reason)


def test_errors_fail_the_trial_and_three_equal_ones_in_a_row_stop_the_search(search_project, stub_trials, monkeypatch):
    errors = iter([None, MemoryError("5 GiB"), None, *(MemoryError(f"{size} GiB") for size in (1, 2, 3))])

    def raise_next(*_, **__):
        if error := next(errors):
            raise error

    monkeypatch.setattr(train, "run", raise_next)
    search = prepare(*search_project(), 9)
    with pytest.raises(UserError, match="failed for the same reason"):
        worker.run_trials(search)
    study = worker.open_study(search)
    assert states_of(study) == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "FAIL", "FAIL"]
    assert study.trials[-1].user_attrs["reason"] == "out of memory: 3 GiB"
    assert read_run(run_folder(search, 5)).status == "FAILED"


def test_a_trial_whose_worker_is_always_killed_fails(search_project):
    search = prepare(*search_project(), 1)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        claim = worker.open_study(search).claim(1, search.started)
        assert (claim.trial.number, claim.attempt) == (0, attempt)
        claim.release()  # as the kernel does when the worker is killed
    worker.run_trials(search)
    (trial,) = worker.open_study(search).trials
    assert trial.state == TrialState.FAIL and "killed 3 times" in trial.user_attrs["reason"]
    assert read_run(run_folder(search, 0)).status == "FAILED"


def test_interrupts_and_an_unreachable_database_leave_the_trial_running(search_project, stub_evaluation, monkeypatch):
    search = prepare(*search_project(epochs=4), 1)
    run = train.run
    for error in (TrainingInterrupted("asked to stop"), StorageInternalError("gone"), TrainingInterrupted("again")):

        def run_one_epoch(*args, after_epoch, error=error, **words):
            def stop(epoch, values):
                after_epoch(epoch, values)
                raise error

            return run(*args, after_epoch=stop, **words)

        monkeypatch.setattr(train, "run", run_one_epoch)
        with pytest.raises(type(error)):
            worker.run_trials(search)
        assert states_of(worker.open_study(search)) == ["RUNNING"]
    monkeypatch.setattr(train, "run", run)
    worker.run_trials(search)
    assert states_of(worker.open_study(search)) == ["COMPLETE"]
    assert epochs_of(search, 0) == [1, 2, 3, 4]


@pytest.mark.parametrize("where", [(train, "run"), (worker, "write_trial_record"), (worker, "end_trial")])
@pytest.mark.parametrize("error", [TrainingInterrupted("asked to stop"), StorageInternalError("gone")])
def test_a_trial_whose_worker_stops_without_an_epoch_does_not_fail(
    search_project, stub_trials, monkeypatch, error, where
):
    """Before the first, or after the last, when a resumed trial has none left."""

    def stop(*_, **__):
        raise error

    search = prepare(*search_project(), 1)
    monkeypatch.setattr(*where, stop)
    for _ in range(MAX_ATTEMPTS + 2):
        with pytest.raises(type(error)):
            worker.run_trials(search)
    (trial,) = worker.open_study(search).trials
    assert trial.state == TrialState.RUNNING and trial.user_attrs["attempts"] == 1


def test_a_trial_worse_than_the_others_is_pruned(search_project, stub_trials, monkeypatch):
    values = iter(0.9 - 0.01 * number for number in range(1000))  # each trial is worse than those before it

    def report(*_, after_epoch, **__):
        value = next(values)
        for epoch in range(1, 5):
            after_epoch(epoch, {"val/ssim": value})

    monkeypatch.setattr(train, "run", report)
    _, study = run_here(*search_project(epochs=4), 13)
    assert states_of(study) == ["COMPLETE"] * 10 + ["PRUNED"] * 3  # the first ten are not compared
    assert "val/ssim 0.78" in study.trials[-1].user_attrs["reason"]


def test_store_and_extractor_are_created_only_if_missing(search_project, monkeypatch):
    project, params = search_project()
    created = []
    monkeypatch.setattr(tune.preprocess, "run", lambda *_, **__: created.append("store"))
    monkeypatch.setattr(tune.extractor, "run", lambda *_, **__: created.append("extractor"))
    prepare(project, params, 1)
    assert created == []
    project.features.rename(project.root / "aside")
    with pytest.raises(UserError):  # the stub has created none
        prepare(project, params, 1)
    assert created == ["extractor"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "train/loss"}, "lower bounds"),
        ({"space": {"loss.weights.perceptual": {"low": 0.0, "high": 1.0}}}, "medgen weights fetch vgg16"),
        ({"space": {"prior.nme": {"choices": ["gmm", "normal"]}}}, "did you mean 'name'"),
        ({"storage": "mysql://host/db"}, "mysql:// is not supported"),
        ({"sections": {"model": {"name": "unet"}}}, "is trained on masks"),
        ({"sections": {"loss": {"weights": {"dice": 1.0, "l1": 1.0}}}}, "dice compares masks"),
    ],
)
def test_settings_that_would_make_every_trial_fail_are_refused(
    search_project, monkeypatch, tmp_path, settings, message
):
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path))
    project, params = search_project(**settings)
    with pytest.raises(UserError, match=message):
        tune.run(project, params=params, file=project.root / "params.yaml", trials=1)
    assert not list(project.root.glob("optuna.journal"))


def test_a_store_made_with_other_settings_is_refused(search_project):
    project, params = search_project()
    other = params.model_copy(update={"preprocess": params.preprocess.model_copy(update={"clahe_clip": 3.0})})
    with pytest.raises(UserError, match="other values of preprocess"):
        prepare(project, other, 1)


@pytest.mark.parametrize(
    ("workers", "cores", "devices", "shares"),
    [
        (1, 2, [], [(2, None)]),
        (2, 2, [], [(1, None), (1, None)]),
        (4, 2, [], [(1, None)] * 4),
        (3, 16, ["0", "1"], [(5, "0"), (5, "1"), (5, "0")]),
        (2, 8, ["GPU-a", "GPU-b"], [(4, "GPU-a"), (4, "GPU-b")]),
    ],
)
def test_workers_get_equal_numbers_of_threads_and_gpus_in_turn(workers, cores, devices, shares):
    assert [(slot.threads, slot.gpu) for slot in allocate_slots(workers, cores, devices)] == shares


def test_gpus_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


def test_environment_variables_are_restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("1", "0")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "CUDA_VISIBLE_DEVICES" not in os.environ


def open_study(project, trials=1):
    return worker.open_study(prepare(project, load(project.root / "params.yaml"), trials))


def wait_for_epochs(started, search, number, count):
    """Wait until a trial has been trained for `count` epochs."""
    process, output = started
    while len(epochs_of(search, number)) < count:
        assert process.is_alive(), output.read_text()
        time.sleep(0.05)


def finish(process, output):
    """Wait for a command that must succeed; returns its output."""
    process.join()
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def worker_of(process):
    """The only worker process of a command."""
    commands = {child: " ".join(child.cmdline()) for child in psutil.Process(process.pid).children()}
    (found,) = (child for child, words in commands.items() if re.search(r"(spawn|forkserver) import", words))
    return found


@pytest.mark.slow
def test_killed_workers_and_parents_lose_no_trial_and_repeat_no_epoch(search_project, start_tune):
    project, params = search_project(epochs=LONG)
    search = prepare(project, params, 2)
    started = process, _ = start_tune(project, "--trials", "2")
    wait_for_epochs(started, search, 0, 3)
    worker_of(process).kill()
    wait_for_epochs(started, search, 1, 3)  # another worker has ended trial 0
    second = worker_of(process)
    process.kill()
    process.join()
    second.wait()  # it notices, saves and ends

    assert states_of(open_study(project)) == ["COMPLETE", "RUNNING"]
    assert 3 <= len(epochs_of(search, 1)) < LONG

    _, study = run_here(project, params, 2)
    assert states_of(study) == ["COMPLETE", "COMPLETE"]
    assert "trial 0, attempt 2" in (search.folder / "worker_0.log").read_text()
    for number in (0, 1):  # resumed from the checkpoint
        assert epochs_of(search, number) == list(range(1, LONG + 1))


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_the_trial_and_the_same_command_continues_it(search_project, start_tune):
    project, params = search_project(epochs=LONG)
    search = prepare(project, params, 1)
    for number, code, epochs in ((signal.SIGINT, 130, 2), (signal.SIGTERM, TrainingInterrupted.exit_code, 8)):
        started = process, output = start_tune(project, "--trials", "1")
        wait_for_epochs(started, search, 0, epochs)
        os.kill(process.pid, number)
        process.join()
        text = output.read_text()
        assert process.exitcode == code and "run the same command again" in text, text
        assert "Traceback" not in text, text
        assert states_of(open_study(project)) == ["RUNNING"]
    _, study = run_here(project, params, 1)
    assert states_of(study) == ["COMPLETE"]
    assert epochs_of(search, 0) == list(range(1, LONG + 1))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "postgres"])
def test_two_commands_share_one_study(search_project, start_tune, request, storage):
    own = {"storage": request.getfixturevalue("postgres")()} if storage == "postgres" else {}
    project, _ = search_project(**own)
    for started in [start_tune(project, "--trials", "3") for _ in range(2)]:
        finish(*started)
    study = open_study(project)
    assert states_of(study) == ["COMPLETE"] * 3
    assert [trial.user_attrs["attempts"] for trial in study.trials] == [1] * 3


def prepare_full(project, params):
    return tune.prepare(project, params, 0, None, is_confirmation=True)


def test_a_confirmation_of_trials_that_are_already_full_is_refused(search_project):
    with pytest.raises(UserError, match="every trial is already trained in full"):
        prepare_full(*search_project())


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({}, False),
        ({"trial": {"num_generated": 1999}}, True),
        ({"trial": {"num_generated": 1999}, "objective": "pareto"}, False),
        ({"trial": {"num_generated": 1999}, "objective": "reconstruction/ssim"}, False),
    ],
)
def test_too_few_samples_for_a_reliable_ranking_give_a_warning(search_project, capsys, settings, warns):
    prepare(*search_project(**({"trial": {}} | settings)), 1)
    assert ("tune.trial.num_generated is 1999" in " ".join(capsys.readouterr().err.split())) == warns


def mlflow_runs(project):
    """The runs in MLflow by name, and a client."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("medgen").experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    assert {run.info.status for run in runs} == {"FINISHED"}
    return {run.info.run_name: run for run in runs}, client


@pytest.mark.slow
def test_a_confirmation_trains_what_dvc_repro_would_train_and_continues_if_it_is_killed(
    search_project, start_tune, capsys, monkeypatch
):
    budget = {"num_generated": 16, "epochs": 1, "subset": 24}
    project, params = search_project(tracking=True, epochs=LONG, trial=budget)
    search, study = run_here(project, params, 2)
    full = prepare_full(project, params)
    tracked = tune.TrackedStudy(search)
    tracked.write_record("FINISHED")
    tracked.upload_parent()  # creates MLflow's tables: a kill during that would break the database
    started = process, _ = start_tune(project, "--trials", "2", "--confirm", "2")
    wait_for_epochs(started, full, 0, 3)
    working = worker_of(process)
    process.kill()
    process.join()
    working.wait()  # it notices, saves and ends
    assert states_of(worker.open_study(full)) == ["RUNNING", "WAITING"]

    arguments = ("--trials", "2", "--confirm", "2", "--workers", "2", "--apply")
    output = finish(*start_tune(project, *arguments))
    confirmation = worker.open_study(full)
    best = confirmation.winner()
    assert sorted(origin_number(trial) for trial in confirmation.trials) == [0, 1]
    for trial in confirmation.trials:
        own = replace(params, study.values_of(study.trials[origin_number(trial)]), "test")
        folder, trial_folder = run_folder(full, trial.number), full.trial_folder(trial.number)
        dataset = open_store(project.dataset).fingerprint
        assert folder.name == train.run_fingerprint(dataset, own.model, own.loss, own.train)
        assert epochs_of(full, trial.number) == list(range(1, LONG + 1)) and epochs_of(search, trial.number) == [1]
        assert read_run(folder).name == f"trial {origin_number(trial)} in full"
        assert (trial_folder / "artifacts" / "refiner" / "refiner.json").exists()
        for part in ("model", "prior"):
            assert list((trial_folder / "artifacts" / part).glob("*.safetensors"))
        assert not list(trial_folder.rglob("checkpoint.pt"))
    assert f"its model, prior and refiner: {full.trial_folder(best.number) / 'artifacts'}" in output
    written = project.reports / "tune" / "best.yaml"
    assert f"trial {origin_number(best)} in full, best of 2" in written.read_text()
    for path in (written, project.root / "params.yaml"):
        assert load(path).train.phases[0].beta.end == confirmation.values_of(best)[BETA]
    monkeypatch.setattr(console.OUT, "width", 200)
    print_summary(study, project.root / "params.yaml", confirmation)
    printed = capsys.readouterr().out
    assert "rank in search" in printed and "rank in full" in printed

    assert "2 of 2 trials in full are done" in finish(*start_tune(project, *arguments))
    assert len(worker.open_study(full).trials) == 2 and len(worker.open_study(search).trials) == 2

    runs, _ = mlflow_runs(project)
    search_name, full_name = f"search {search.study}", f"confirmation {full.study}"
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    ids = {name: run.info.run_id for name, run in runs.items()}
    assert parents == {
        search_name: None,
        **dict.fromkeys(("trial 0", "trial 1", full_name), ids[search_name]),
        **dict.fromkeys(("trial 0 in full", "trial 1 in full"), ids[full_name]),
    }


@pytest.mark.slow
def test_a_search_writes_reports_mlflow_runs_and_params_yaml(search_project, start_tune):
    project, params = search_project(tracking=True)
    path = project.root / "params.yaml"
    path.write_text(path.read_text().replace("base_channels: 8", "base_channels: 8  # kept"))
    output = finish(*start_tune(project, "--trials", "2", "--workers", "2", fork_workers=False))
    assert "trial 0 complete" in output

    study = open_study(project, 2)
    best = study.winner()
    values = study.values_of(best)
    folder = project.reports / "tune"
    assert {"best.yaml", "history.png", "slice.png"} <= {file.name for file in folder.iterdir()}
    assert load(folder / "best.yaml").train.phases[0].learning_rate == values[RATE]
    assert load(path) == params  # only --apply changes it

    assert "2 of 2 trials are done" in finish(*start_tune(project, "--trials", "2", "--apply"))
    assert load(path).train.phases[0].beta.end == values[BETA]
    assert "# kept" in path.read_text()
    assert open_study(project, 2).name == study.name  # --apply starts no new study

    runs, client = mlflow_runs(project)
    assert len(runs) == 3
    parent = runs[f"search {study.name}"]
    assert parent.data.metrics["tune/complete"] == 2
    assert parent.data.metrics["tune/best/generation/mmd_domain"] == pytest.approx(best.values[0])
    artifacts = {file.path for name in ("tune", "best") for file in client.list_artifacts(parent.info.run_id, name)}
    assert {"tune/history.png", "tune/best.yaml", "best/samples.png"} <= artifacts
    for number in range(2):
        child = runs[f"trial {number}"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.metrics["val/generation/mmd_domain"] == pytest.approx(study.trials[number].values[0])
        assert {"figures/samples.png"} <= {file.path for file in client.list_artifacts(child.info.run_id, "figures")}


@pytest.mark.slow
def test_a_search_for_a_segmentation_model(small_params, tmp_path):
    draw(tmp_path / "data", num_images=36, size=48, seed=0)
    project = Project(tmp_path)
    plain = small_params | {
        "model": {"name": "unet", "base_channels": 4},
        "loss": {"weights": {"bce": 1.0, "dice": 1.0}},
        "tracking": {"enabled": False},
        "tune": {"trial": {"epochs": 1}},
    }
    params = Params.model_validate(json.loads(json.dumps(plain)))
    preprocess.run(project, data=params.data, preprocess=params.preprocess)
    _, study = run_here(project, params, 2)
    assert study.objective.keys == ("segmentation/dice_foreground",)
    assert set(study.space) == {RATE, "loss.weights.bce", "loss.weights.dice"}
    assert all(trial.state == TrialState.COMPLETE and 0 <= trial.values[0] <= 1 for trial in study.trials)
    assert not project.features.exists()


def test_the_cluster_that_read_the_images_does_not_matter(search_project):
    project, params = search_project()
    on_cluster = replace(params, {"preprocess.scheduler": "tcp://node:8786"}, "test")
    assert tune.prepare_store(project, on_cluster).folder == project.dataset
    tune.check_params_unchanged(project.root / "params.yaml", on_cluster)
