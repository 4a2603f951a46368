"""slurm/train.sbatch with fake srun and scontrol: a signal stops both nodes at one step; the next job resumes."""

import json
import os
import subprocess
import sys

import pytest

from medgen.models import bundle
from medgen.tracking import history
from medgen.training import checkpoint

SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])  # as the real one does
for node in "01":
    ranks = dict(SLURM_NTASKS="2", SLURM_PROCID=node, SLURM_LOCALID="0", SCRIPT=str(os.getppid()))
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | ranks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo localhost || echo "$@" >> scontrol.log
"""
MEDGEN = f"""#!{sys.executable}
# The first process sends the signal to the batch script once and waits until the script has passed it on.
import os, pathlib, signal, time
from medgen import cli
from medgen.training.loader import Loader
from medgen.training.distributed import StopRequest
received, batch, record = [], Loader.batch, StopRequest._record
def batch_after_signal(self, position):
    if position == 3 and os.environ["RANK"] == "0" and not pathlib.Path("sent").exists():
        pathlib.Path("sent").touch()
        os.kill(int(os.environ["SCRIPT"]), getattr(signal, os.environ["STOP_SIGNAL"]))
        while not received:
            time.sleep(0.01)
    return batch(self, position)
Loader.batch = batch_after_signal
StopRequest._record = lambda self, number, frame: (received.append(number), record(self, number, frame))
if __name__ == "__main__":
    cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_signal", "requeued"),
    [("SIGUSR1", True), ("SIGTERM", False)],  # before the time limit; of a cancelled job, which must not be requeued
)
def test_stopped_job_saves_and_the_next_job_resumes(tiny_project, root, stop_signal, requeued):
    folder = tiny_project.root
    for name, text in {"bin/srun": SRUN, "bin/scontrol": SCONTROL, ".venv/bin/medgen": MEDGEN}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    params = {
        "model": {"base_channels": 8, "latent_size": 8, "latent_channels": 4},
        "train": {"batch_size": 8, "phases": {"a": {"epochs": 2, "learning_rate": 1e-3}}},
        "tracking": {"enabled": False},
    }
    (folder / "params.yaml").write_text(json.dumps(params))
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "STOP_SIGNAL": stop_signal,
        "SLURM_JOB_ID": str(os.getpid()),  # gives each test its own port
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "2",
        "MEDGEN_STAGES": "train prior",
    }
    command = ["bash", str(root / "slurm" / "train.sbatch")]

    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("after step 4 and saved") == 2
    log = folder / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == (f"requeue {os.getpid()}\n" if requeued else "")
    (scratch,) = tiny_project.runs.iterdir()
    assert checkpoint.load(scratch)["counters"]["position"] == 4
    assert not tiny_project.model.exists()

    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in history(scratch)] == [1, 2]
    assert bundle.load_info(tiny_project.model).run == scratch.name
    assert (tiny_project.prior / "prior.json").exists()
    assert log.exists() == requeued
