"""slurm/tune.sbatch with fake srun and scontrol: a preempted job goes back to the queue; all jobs share one study."""

import os
import subprocess
import sys

import pytest
from optuna.trial import TrialState

from medgen.tune import prepare
from medgen.tune.worker import open_study

SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
signal.signal(signal.SIGUSR1, lambda *_: task.send_signal(signal.SIGUSR1))
task = subprocess.Popen(sys.argv[1:], env=os.environ | dict(SCRIPT=str(os.getppid())))
sys.exit(task.wait())
"""
SCONTROL = """#!/bin/sh
echo "$@" >> scontrol.log
"""
# The first job is preempted when its first trial has ended. It waits there until the signal has reached it.
MEDGEN = f"""#!{sys.executable}
import os, pathlib, signal
from medgen import cli, tune
def preempt(*arguments):
    if not pathlib.Path("preempted").exists():
        pathlib.Path("preempted").touch()
        os.kill(int(os.environ["SCRIPT"]), signal.SIGUSR1)
        while True:
            signal.pause()  # its handler raises TrainingInterrupted
    return format_trial(*arguments)
format_trial, tune.format_trial = tune.format_trial, preempt
if __name__ == "__main__":  # workers import this file
    cli.main()
"""


@pytest.mark.slow
def test_jobs_of_an_array_share_a_study_and_a_preempted_one_is_requeued(search_project, postgres, root):
    project, params = search_project(storage=postgres())
    folder = project.root
    for name, text in {"bin/srun": SRUN, "bin/scontrol": SCONTROL, ".venv/bin/medgen": MEDGEN}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def start(task: int) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(100 + task),
            "SLURM_ARRAY_TASK_ID": str(task),
        }
        command = ["bash", str(root / "slurm" / "tune.sbatch"), "--trials", "3"]
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)

    first = start(1)
    _, errors = first.communicate()
    assert first.returncode == 5, errors
    assert (folder / "scontrol.log").read_text() == "requeue 101\n"
    for job in [start(0), start(1)]:
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    assert (folder / "scontrol.log").read_text() == "requeue 101\n"
    search = prepare(project, params, 3, None)
    assert [trial.state for trial in open_study(search).trials] == [TrialState.COMPLETE] * 3
    assert (search.folder / "worker_1.log").exists()  # each job has a log of its own
