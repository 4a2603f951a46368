"""`compute.processes`: a stage's command runs in several processes, which stop, fail and end as one."""

import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from medgen.config import Params
from medgen.errors import UserError
from medgen.tracking import history
from medgen.training import checkpoint
from medgen.training.launch import num_processes

# The main process sends the signal to the launcher at step 3, and waits until it has arrived here.
MEDGEN = """
import os, pathlib, signal, time
from medgen import cli
from medgen.training.distributed import StopRequest
from medgen.training.loader import Loader
received, batch, record = [], Loader.batch, StopRequest._record
def batch_after_signal(self, position):
    if position == 0:
        pathlib.Path(f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
    if position == 3 and os.environ["RANK"] == "0" and os.environ["STOP_SIGNAL"] and not pathlib.Path("sent").exists():
        pathlib.Path("sent").touch()
        os.kill(os.getppid(), getattr(signal, os.environ["STOP_SIGNAL"]))
        while not received:
            time.sleep(0.01)
    return batch(self, position)
Loader.batch = batch_after_signal
StopRequest._record = lambda self, number, frame: (received.append(number), record(self, number, frame))
if __name__ == "__main__":
    cli.main()
"""


@pytest.fixture
def command(tiny_project, tmp_path):
    """Function that runs `medgen train` in two processes; it returns exit code and output."""
    params = {
        "model": {"base_channels": 8, "latent_size": 8, "latent_channels": 4},
        "train": {"batch_size": 8, "phases": {"a": {"epochs": 2, "learning_rate": 1e-3}}},
        "tracking": {"enabled": False},
        "compute": {"processes": 2},
    }
    (tiny_project.root / "params.yaml").write_text(json.dumps(params))
    (tiny_project.root / "main.py").write_text(MEDGEN)
    (tmp_path / "tmp").mkdir()

    def run(*arguments, stop_signal=""):
        environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "MASTER_ADDR")}
        environment |= {"OMP_NUM_THREADS": "2", "STOP_SIGNAL": stop_signal, "TMPDIR": str(tmp_path / "tmp")}
        everything = [sys.executable, "main.py", "train", *arguments]
        return subprocess.run(
            everything,
            cwd=tiny_project.root,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores Ctrl-C
        )

    return run


def pids(project):
    return [int((project.root / f"pid_{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_signal", "code"),
    [("SIGTERM", 5), ("SIGUSR1", 5), ("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)],
)
def test_a_signal_to_the_launcher_stops_all_processes_at_one_step_and_the_next_command_resumes(
    tiny_project, command, stop_signal, code
):
    """Killed, it cannot pass anything on: its processes notice and end too, perhaps without a last checkpoint."""
    done = command(stop_signal=stop_signal)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("after step 4 and saved") == (1 if code == 5 else 0)
    assert not psutil.wait_procs([psutil.Process(pid) for pid in pids(tiny_project) if psutil.pid_exists(pid)], 60)[1]
    (scratch,) = tiny_project.runs.iterdir()
    if stop_signal != "SIGKILL":
        assert "Traceback" not in done.stderr
        assert checkpoint.load(scratch)["counters"]["position"] == 4
    if stop_signal == "SIGINT":
        return
    done = command()
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in history(scratch)] == [1, 2]
    assert (tiny_project.model / "model.safetensors").exists()
    assert len(re.findall(r"epoch 2/2", done.stderr + done.stdout)) == 1


@pytest.mark.slow
def test_an_error_of_the_user_is_one_message_and_exit_code_2(command, tmp_path):
    done = command("--set", "train.batch_size=7")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "train.batch_size: 7 images a step" in done.stderr
    assert "change train.batch_size or compute.processes" in done.stderr
    left = [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")]
    assert not left, "of temporary files only the compiler's cache stays"


ORPHAN = """
import multiprocessing, os, signal, threading
from medgen.training.launch import work
def process(returned):
    work(lambda: None)
    returned.set()
    threading.Event().wait()  # as torch does until the launcher has read the result
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    returned = spawn.Event()
    child = spawn.Process(target=process, args=(returned,))
    child.start()
    returned.wait()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_done_ends_if_the_launcher_is_killed_before_it_reads_the_result(tmp_path):
    (tmp_path / "main.py").write_text(ORPHAN)
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "main.py"], cwd=tmp_path, stdout=log, stderr=log, check=False)
    pid = int((tmp_path / "log").read_text())
    assert not psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], 60)[1]


def test_auto_is_one_process_for_each_gpu_that_gets_an_equal_share(monkeypatch):
    def count(stage, num_nodes=1, **sections):
        return num_processes(Params.model_validate(sections), stage, num_nodes)

    assert count("train") == 1
    assert count("train", compute={"processes": 3}) == 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert count("train", train={"batch_size": 64}) == 8
    assert count("train", train={"batch_size": 12}) == 6
    assert count("train", train={"batch_size": 64, "accumulate_steps": 16}) == 4
    assert count("train", num_nodes=4, train={"batch_size": 16}) == 4
    assert count("train", train={"device": "cpu"}) == 1
    assert count("refiner", refiner={"batch_size": 4}) == 4
    assert count("evaluate") == 8
    with pytest.raises(UserError, match=r"compute\.processes: 9, but torch finds 8 GPUs"):
        count("train", compute={"processes": 9})
