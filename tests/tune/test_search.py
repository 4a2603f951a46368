"""A search as its user runs it: trials that end well, break, go infinite or are killed; what is left to look at."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from rich.console import Console

from medgen import tune
from medgen.config import Project, load, replace
from medgen.data.store import open_store
from medgen.errors import TrainingInterrupted, UserError
from medgen.evaluation import evaluate
from medgen.machine import gpus
from medgen.models import bundle
from medgen.priors.refiner import load_refiner
from medgen.tracking import history, read_run
from medgen.training import train
from medgen.tune import worker
from medgen.tune.pool import environment, seats
from medgen.tune.study import DISCREPANCY, MAX_ATTEMPTS, origin

LONG = [{"name": "one", "epochs": 40, "learning_rate": 1e-3, "beta": {"end": 0.1}}]


def search_of(project, params, trials):
    return tune.prepare(project, params, trials, None)


def run_here(project, params, trials):
    """All trials in this process; returns the study."""
    search = search_of(project, params, trials)
    worker.run_trials(search)
    return search, worker.open_study(search)


def scratch_of(search, number):
    (folder,) = search.trial_folder(number).glob("runs/*")
    return folder


def test_a_trial_is_judged_on_the_val_split_and_leaves_its_record_and_pictures(search_project, monkeypatch):
    project, params = search_project()
    judged = []
    load_subject = evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda *args: judged.append(args[-1]) or load_subject(*args))
    search, study = run_here(project, params, 2)
    assert judged == ["val", "val"]
    stored = [trial.user_attrs[DISCREPANCY] for trial in study.trials]
    assert study.trials[1].values[0] - study.trials[0].values[0] == pytest.approx(
        stored[1]["among_samples"]
        - stored[0]["among_samples"]
        - 2 * np.mean(np.subtract(stored[1]["to_samples"], stored[0]["to_samples"])),
        abs=1e-6,
    )
    assert [len(each["patients"]) for each in stored] == [open_store(project.dataset).counts["val"]] * 2
    for trial in study.trials:
        record = read_run(scratch_of(search, trial.number))
        assert (record.name, record.status) == (f"trial {trial.number}", "FINISHED")
        assert (record.tags["tune.trial"], record.tags["tune.state"]) == (str(trial.number), "complete")
        assert record.params["train.phases.0.learning_rate"] == study.tried(trial)["train.phases.0.learning_rate"]
        assert record.metrics[-1]["val/generation/mmd_domain"] == trial.values[0]
        assert trial.system_attrs["constraints:reconstruction/ssim"] == pytest.approx(
            study.trials[0].user_attrs["metrics"]["reconstruction/ssim"]
            - trial.user_attrs["metrics"]["reconstruction/ssim"]
        )
        assert (search.trial_folder(trial.number) / "reports" / "figures" / "samples.png").stat().st_size > 0
    assert not list(search.folder.rglob("*.safetensors")) and not list(search.folder.rglob("checkpoint.pt"))
    assert not project.model.exists() and not (project.root / "reports" / "curves.csv").exists()


def test_the_search_sees_what_evaluate_says_of_the_same_split(search_project, monkeypatch):
    """The independent path: stages run by hand with the trial's parameters, judged by the whole of evaluate."""
    project, params = search_project()
    _, study = run_here(project, params, 1)
    own = tune.trial_params(params, {})
    train.run(project, model=own.model, loss=own.loss, train=own.train, tracking=worker.UNTRACKED)
    worker.prior.run(project, prior=own.prior, tracking=worker.UNTRACKED)
    worker.refiner.run(project, refiner=own.refiner, tracking=worker.UNTRACKED)
    load_subject = evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda *args: load_subject(*args[:5], "val"))
    by_hand = evaluate.run(project, evaluate=own.evaluate, tracking=worker.UNTRACKED)
    metrics = study.trials[0].user_attrs["metrics"]
    compared = set(metrics) & set(by_hand)
    assert {"reconstruction/ssim", "generation/mmd_domain", "privacy/copy_rate"} <= compared
    assert {key: metrics[key] for key in compared} == pytest.approx({key: by_hand[key] for key in compared}, rel=1e-4)


def test_a_trial_trains_the_refiner_with_the_values_it_tries(search_project, monkeypatch):
    enabled = {"enabled": True, "channels": 8, "blocks": 1, "epochs": 1, "sampling_steps": 2}
    space = {"refiner.sampling_noise": {"low": 0.1, "high": 0.9}}
    project, params = search_project(space=space, objective="reconstruction/ssim", sections={"refiner": enabled})
    drawn_with = []

    def judge(project, **_):
        made = load_refiner(project.refiner, bundle.digest(project.model))
        drawn_with.append(made.params.sampling_noise)
        return {"reconstruction/ssim": 0.5}

    monkeypatch.setattr(evaluate, "judge_validation", judge)
    search, study = run_here(project, params, 2)
    tried = [study.tried(trial)["refiner.sampling_noise"] for trial in study.trials]
    assert tried[0] == 0.5 != tried[1] and drawn_with == tried
    assert not list(search.folder.rglob("refiner_*")) and not list(search.folder.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, "pareto"])
def test_what_goes_infinite_is_pruned_with_step_and_term_and_never_complete(search_project, objective):
    rates = {"train.phases.0.learning_rate": {"choices": [1e-3, 1e30]}}
    project, params = search_project(space=rates, objective=objective)
    search, study = run_here(project, params, 6)
    planted = [trial for trial in study.trials if study.tried(trial)["train.phases.0.learning_rate"] == 1e30]
    assert planted and len(planted) < 6
    for trial in study.trials:
        status = read_run(scratch_of(search, trial.number)).status
        if trial in planted:
            assert (trial.state, status) == (TrialState.PRUNED, "KILLED")
            step, term = trial.user_attrs["nonfinite_step"], trial.user_attrs["nonfinite_term"]
            assert trial.user_attrs["reason"] == f"{term} not finite at step {step} (phase one)"
            tags = read_run(scratch_of(search, trial.number)).tags
            assert (tags["nonfinite_step"], tags["nonfinite_term"], tags["tune.state"]) == (step, term, "pruned")
        else:
            assert (trial.state, status) == (TrialState.COMPLETE, "FINISHED")
            assert all(abs(value) < 1e30 for value in trial.values)
    assert study.winner() not in planted


@pytest.mark.parametrize(("objective", "key"), [(None, "generation/mmd_domain"), (None, "reconstruction/ssim")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_objective_that_is_not_finite_is_pruned(search_project, monkeypatch, objective, key, value):
    project, params = search_project(objective=objective)
    good = {"reconstruction/ssim": 0.5, "generation/mmd_domain": 1.0}
    monkeypatch.setattr(evaluate, "judge_validation", lambda *_, **__: good | {key: value})
    _, study = run_here(project, params, 1)
    (trial,) = study.trials
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
def test_a_trial_that_breaks_is_failed_with_its_reason_and_three_alike_stop_the_search(
    search_project, monkeypatch, error, reason
):
    project, params = search_project()

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(train, "run", broken)
    search = search_of(project, params, 9)
    with pytest.raises(UserError, match="failed alike"):
        worker.run_trials(search)
    trials = worker.open_study(search).trials
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 3
    assert all(trial.user_attrs["reason"].startswith(reason) for trial in trials)
    assert read_run(scratch_of(search, 0)).status == "FAILED"


def test_a_trial_that_kills_its_worker_again_and_again_is_failed_like_any_other(search_project):
    project, params = search_project()
    search = search_of(project, params, 1)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        claim = worker.open_study(search).claim(1, search.started)
        assert (claim.trial.number, claim.attempt) == (0, attempt)
        claim.release()  # what the kernel does when the worker is killed
    worker.run_trials(search)
    (trial,) = worker.open_study(search).trials
    assert trial.state == TrialState.FAIL and "killed 3 times" in trial.user_attrs["reason"]
    assert read_run(scratch_of(search, 0)).status == "FAILED"


def test_stops_and_lost_databases_are_no_fault_of_the_trial(search_project, monkeypatch):
    project, params = search_project(phases=[LONG[0] | {"epochs": 6}])
    search = search_of(project, params, 1)
    learn = train.run
    for error in (TrainingInterrupted("asked to stop"), StorageInternalError("gone"), TrainingInterrupted("again")):

        def stopped(*args, after_epoch, error=error, **words):
            def stop(epoch, values):
                after_epoch(epoch, values)
                raise error

            return learn(*args, after_epoch=stop, **words)

        monkeypatch.setattr(train, "run", stopped)
        with pytest.raises(type(error)):
            worker.run_trials(search)
        assert [trial.state.name for trial in worker.open_study(search).trials] == ["RUNNING"]
    monkeypatch.setattr(train, "run", learn)
    worker.run_trials(search)
    (trial,) = worker.open_study(search).trials
    assert trial.state == TrialState.COMPLETE and epochs_of(search, 0) == [1, 2, 3, 4, 5, 6]


def test_one_broken_trial_does_not_stop_the_others(search_project, monkeypatch):
    project, params = search_project()
    calls = []
    learn = train.run

    def broken_once(*args, **words):
        calls.append(words)
        if len(calls) == 2:
            raise MemoryError
        return learn(*args, **words)

    monkeypatch.setattr(train, "run", broken_once)
    _, study = run_here(project, params, 3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_trial_worse_than_the_others_is_pruned_by_its_epochs(search_project, monkeypatch):
    project, params = search_project(trial={"num_generated": 16}, phases=[LONG[0] | {"epochs": 4}])
    reported = iter(range(1000))

    def learn(project, *, after_epoch, **_):
        falling = 0.9 - 0.01 * next(reported)  # each trial is worse than the ones before
        for epoch in range(1, 5):
            after_epoch(epoch, {"val/ssim": falling})

    monkeypatch.setattr(train, "run", learn)
    monkeypatch.setattr(worker.prior, "run", lambda *_, **__: None)
    monkeypatch.setattr(worker.refiner, "run", lambda *_, **__: None)
    good = {"reconstruction/ssim": 0.5, "generation/mmd_domain": 1.0}
    monkeypatch.setattr(evaluate, "judge_validation", lambda *_, **__: good)
    monkeypatch.setattr(worker, "discrepancy_of", lambda *_: None)
    _, study = run_here(project, params, 13)
    states = [trial.state.name for trial in study.trials]
    assert states[:10] == ["COMPLETE"] * 10  # nothing to compare with yet
    assert states[10:] == ["PRUNED"] * 3
    assert "val/ssim 0.78" in study.trials[-1].user_attrs["reason"]


def test_data_and_extractor_are_made_once_where_they_are_missing(search_project, monkeypatch):
    project, params = search_project()
    made = []
    monkeypatch.setattr(tune.preprocess, "run", lambda *_, **__: made.append("store"))
    monkeypatch.setattr(tune.features, "run", lambda *_, **__: made.append("extractor"))
    search_of(project, params, 1)
    assert made == []
    (project.features).rename(project.root / "aside")
    with pytest.raises(UserError):  # the stand-in made none
        search_of(project, params, 1)
    assert made == ["extractor"]


@pytest.mark.parametrize(
    ("tune_section", "words"),
    [
        ({"objective": "train/loss"}, "lower bounds"),
        ({"space": {"loss.weights.perceptual": {"low": 0.0, "high": 1.0}}}, "medgen weights fetch vgg16"),
        ({"space": {"prior.nme": {"choices": ["gmm", "normal"]}}}, "did you mean 'name'"),
        ({"storage": "mysql://host/db"}, "mysql:// is not supported"),
        ({"sections": {"model": {"name": "unet"}}}, "learns masks"),
        ({"sections": {"loss": {"weights": {"dice": 1.0, "l1": 1.0}}}}, "dice compares masks"),
    ],
)
def test_what_would_break_every_trial_is_said_before_the_first(
    search_project, monkeypatch, tmp_path, tune_section, words
):
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path))
    project, params = search_project(**tune_section)
    with pytest.raises(UserError, match=words):
        tune.run(project, params=params, file=project.root / "params.yaml", trials=1)
    assert not list(project.root.glob("optuna.journal"))


def test_a_store_made_with_other_settings_is_refused(search_project):
    project, params = search_project()
    other = params.model_copy(update={"preprocess": params.preprocess.model_copy(update={"clahe_clip": 3.0})})
    with pytest.raises(UserError, match="other values of preprocess"):
        search_of(project, other, 1)


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
def test_workers_share_cores_evenly_and_get_gpus_in_turn(workers, cores, devices, shares):
    assert [(seat.threads, seat.gpu) for seat in seats(workers, cores, devices)] == shares


def test_gpus_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


def test_a_started_process_sees_its_share_and_this_one_does_not(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("1", "0")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "CUDA_VISIBLE_DEVICES" not in os.environ


def command(trials, *more):
    return [sys.executable, "-m", "medgen", "tune", "--trials", str(trials), *more]


def start(project, trials, *more):
    return subprocess.Popen(
        command(trials, *more),
        cwd=project.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )


def study_of(project, trials=1):
    return worker.open_study(search_of(project, load(project.root / "params.yaml"), trials))


def epochs_of(search, number):
    return [record["step"] for folder in search.trial_folder(number).glob("runs/*") for record in history(folder)]


def wait_for_epochs(search, number, count, process):
    """Waits until a trial has trained for `count` epochs."""
    while len(epochs_of(search, number)) < count:
        assert process.poll() is None, process.communicate()[0]
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue


def workers_of(process):
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_killed_workers_and_parents_cost_no_trial_and_count_none_twice(search_project):
    project, params = search_project(phases=LONG)
    search = search_of(project, params, 2)
    process = start(project, 2)
    wait_for_epochs(search, 0, 3, process)
    (first,) = workers_of(process)
    first.kill()
    wait_for_epochs(search, 1, 3, process)  # trial 0 was ended by the worker that took its place
    (second,) = workers_of(process)
    process.kill()
    process.communicate()
    second.wait()  # it notices, saves and ends

    assert [trial.state.name for trial in study_of(project).trials] == ["COMPLETE", "RUNNING"]
    assert 3 <= len(epochs_of(search, 1)) < 40

    _, study = run_here(project, params, 2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert "trial 0, attempt 2" in (search.folder / "worker_0.log").read_text()
    for number in (0, 1):  # from its checkpoint: every epoch once
        assert epochs_of(search, number) == list(range(1, 41))


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_and_the_same_command_goes_on(search_project):
    project, params = search_project(phases=LONG)
    search = search_of(project, params, 1)
    for number, code, epochs in ((signal.SIGINT, 130, 2), (signal.SIGTERM, TrainingInterrupted.exit_code, 20)):
        process = start(project, 1)
        wait_for_epochs(search, 0, epochs, process)
        process.send_signal(number)
        said = process.communicate()[0]
        assert process.returncode == code and "same command goes on" in said, said
        assert "Traceback" not in said, said
        assert [trial.state.name for trial in study_of(project).trials] == ["RUNNING"]
    _, study = run_here(project, params, 1)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]
    assert epochs_of(search, 0) == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal", "postgres"])
def test_two_commands_work_on_one_study(search_project, request, storage):
    own = {"storage": request.getfixturevalue("postgres")()} if storage == "postgres" else {}
    project, _ = search_project(**own)
    processes = [start(project, 4) for _ in range(2)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    study = study_of(project)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert [trial.user_attrs["attempts"] for trial in study.trials] == [1] * 4


def full_of(project, params):
    return tune.prepare(project, params, 0, None, confirms=True)


@pytest.mark.slow
def test_a_confirmation_is_what_dvc_repro_would_train_and_its_model_stays(search_project, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    trial = {"num_generated": 16, "epochs": 1, "subset": 24}
    project, params = search_project(phases=[LONG[0] | {"epochs": 3}], trial=trial)
    search, study = run_here(project, params, 3)
    full = full_of(project, params)
    confirmation = worker.open_study(full)
    confirmation.enqueue_best(study, 2)
    worker.run_trials(full)
    numbers = {0, *(t.number for t in study.ranked()[:2])}
    assert {origin(t): t.state.name for t in confirmation.trials} == dict.fromkeys(numbers, "COMPLETE")
    for trial in confirmation.trials:
        own = replace(params, study.tried(study.trials[origin(trial)]), "test")
        dataset = open_store(project.dataset).fingerprint
        scratch = scratch_of(full, trial.number)
        assert scratch.name == train.run_fingerprint(dataset, own.model, own.loss, own.train)
        assert epochs_of(full, trial.number) == [1, 2, 3] and epochs_of(search, origin(trial)) == [1]
        assert read_run(scratch).name == f"trial {origin(trial)} in full"
        assert (full.trial_folder(trial.number) / "artifacts" / "refiner" / "refiner.json").exists()
        for part in ("model", "prior"):
            assert list((full.trial_folder(trial.number) / "artifacts" / part).glob("*.safetensors"))
        assert not list(full.trial_folder(trial.number).rglob("checkpoint.pt"))

    file = project.root / "params.yaml"
    (search.folder / file.name).write_bytes(file.read_bytes())
    stages = [tune.open_stage(each) for each in (search, full)]
    capsys.readouterr()
    best = tune.conclude(stages, "FINISHED", file, Console())
    printed = capsys.readouterr().out
    assert best == confirmation.winner() and "rank in search" in printed and "rank in full" in printed
    assert f"its model, prior and refiner: {full.trial_folder(best.number) / 'artifacts'}" in printed
    written = project.reports / "tune" / "best.yaml"
    assert f"trial {origin(best)} in full, best of {len(numbers)}" in written.read_text()
    tried = study.tried(study.trials[origin(best)])
    assert load(written).train.phases[0].learning_rate == tried["train.phases.0.learning_rate"]


def test_a_confirmation_of_trials_that_are_full_already_is_refused(search_project):
    project, params = search_project()
    with pytest.raises(UserError, match="every trial is already trained in full"):
        full_of(project, params)


@pytest.mark.parametrize(
    ("section", "warns"),
    [
        ({}, False),
        ({"trial": {"num_generated": 1999}}, True),
        ({"trial": {"num_generated": 1999}, "objective": "pareto"}, False),
        ({"trial": {"num_generated": 1999}, "objective": "reconstruction/ssim"}, False),
    ],
)
def test_too_few_samples_for_a_reliable_ranking_are_warned_of(search_project, capsys, section, warns):
    project, params = search_project(**({"trial": {}} | section))
    search_of(project, params, 1)
    assert ("tune.trial.num_generated is 1999" in " ".join(capsys.readouterr().err.split())) == warns


@pytest.mark.slow
def test_a_confirmation_that_is_killed_goes_on_and_repeats_nothing(search_project):
    phases = [LONG[0] | {"epochs": 20}]
    project, params = search_project(tracking=True, phases=phases, trial={"num_generated": 16, "epochs": 1})
    search, full = search_of(project, params, 2), full_of(project, params)
    process = start(project, 2, "--confirm", "2")
    wait_for_epochs(full, 0, 3, process)
    (working,) = workers_of(process)
    process.kill()
    process.communicate()
    working.wait()  # it notices, saves and ends
    assert [trial.state.name for trial in worker.open_study(full).trials] == ["RUNNING", "WAITING"]

    arguments = command(2, "--confirm", "2", "--workers", "2", "--apply")
    run = subprocess.run(arguments, cwd=project.root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    confirmation, best = worker.open_study(full), worker.open_study(full).winner()
    assert sorted(origin(trial) for trial in confirmation.trials) == [0, 1]
    assert [epochs_of(full, number) for number in (0, 1)] == [list(range(1, 21))] * 2
    assert f"rial {origin(best)} in full" in run.stdout
    tried = confirmation.tried(best)
    assert load(project.root / "params.yaml").train.phases[0].beta.end == tried["train.phases.0.beta.end"]

    again = subprocess.run(arguments, cwd=project.root, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "2 of 2 trials in full are done" in again.stdout
    assert len(worker.open_study(full).trials) == 2 and len(worker.open_study(search).trials) == 2

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("medgen").experiment_id])
    ids = {run.info.run_name: run.info.run_id for run in runs}
    parents = {run.info.run_name: run.data.tags.get("mlflow.parentRunId") for run in runs}
    search_run, confirmation_run = ids[f"search {search.study}"], ids[f"confirmation {full.study}"]
    assert parents == {
        f"search {search.study}": None,
        "trial 0": search_run,
        "trial 1": search_run,
        f"confirmation {full.study}": search_run,
        "trial 0 in full": confirmation_run,
        "trial 1 in full": confirmation_run,
    }
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_two_commands_that_end_at_once_write_their_reports_in_turn(search_project, monkeypatch):
    project, params = search_project()
    search, _ = run_here(project, params, 2)
    both_inside = threading.Barrier(2, timeout=1.0)
    write_figures = tune.write_figures

    def meet(*args):
        try:
            both_inside.wait()
        except threading.BrokenBarrierError:  # the other waits for its turn
            return write_figures(*args)
        raise AssertionError("both write at once")

    monkeypatch.setattr(tune, "write_figures", meet)
    file = project.root / "params.yaml"
    (search.folder / file.name).write_bytes(file.read_bytes())

    def conclude(_):
        return tune.conclude([tune.open_stage(search)], "FINISHED", file, Console()).number

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(conclude, range(2)))) == 1


@pytest.mark.slow
def test_a_search_from_the_first_trial_to_mlflow_and_params_yaml(search_project):
    project, params = search_project(tracking=True)
    path = project.root / "params.yaml"
    path.write_text(path.read_text().replace("base_channels: 8", "base_channels: 8  # kept"))
    run = subprocess.run(command(4, "--workers", "2"), cwd=project.root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 of 4" not in run.stderr and "trial 0 complete" in run.stdout

    study = study_of(project, 4)
    best = study.winner()
    tried = study.tried(best)
    folder = project.reports / "tune"
    assert {"best.yaml", "history.png", "slice.png"} <= {file.name for file in folder.iterdir()}
    from_best = load(folder / "best.yaml")
    assert from_best.train.phases[0].learning_rate == tried["train.phases.0.learning_rate"]
    assert load(path) == params  # nothing is applied that was not asked for

    again = subprocess.run(command(4, "--apply"), cwd=project.root, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "4 of 4 trials are done" in again.stdout
    assert load(path).train.phases[0].beta.end == tried["train.phases.0.beta.end"]
    assert "# kept" in path.read_text()
    assert study_of(project, 4).name == study.name  # the winner's own search, not a new one

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("medgen").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert len(runs) == 5
    parent = by_name.pop(f"search {study.name}")
    assert parent.info.status == "FINISHED" and parent.data.metrics["tune/complete"] == 4
    assert parent.data.metrics["tune/best/generation/mmd_domain"] == pytest.approx(best.values[0])
    artifacts = {file.path for name in ("tune", "best") for file in client.list_artifacts(parent.info.run_id, name)}
    assert {"tune/history.png", "tune/best.yaml", "best/samples.png"} <= artifacts
    for number in range(4):
        child = by_name[f"trial {number}"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
        assert child.data.metrics["val/generation/mmd_domain"] == pytest.approx(study.trials[number].values[0])
        assert {"figures/samples.png"} <= {file.path for file in client.list_artifacts(child.info.run_id, "figures")}


@pytest.mark.slow
def test_a_search_for_masks(small_params, tmp_path):
    from medgen.config import Params
    from medgen.datasets.sample import draw
    from medgen.ingest import preprocess

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
    assert study.objective.keys == ("segmentation/dice_foreground",) and set(study.space) == {
        "train.phases.0.learning_rate",
        "loss.weights.bce",
        "loss.weights.dice",
    }
    assert all(trial.state == TrialState.COMPLETE and 0 <= trial.values[0] <= 1 for trial in study.trials)
    assert not Path(project.features).exists()
