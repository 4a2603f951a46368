"""Sharing cores with other processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medgen.machine import affinity
from medgen.training.cores import choose_cores

ALL = {0, 1}


@pytest.mark.parametrize(
    ("loads", "bound", "own", "chosen", "shared"),
    [
        ({0: 1.0, 1: 1.0}, ALL, 2.0, ALL, False),  # alone
        ({0: 0.9, 1: 0.3}, ALL, 1.0, ALL, False),  # another's load of 0.2
        ({0: 1.0, 1: 1.0}, ALL, 1.4, {0}, True),  # a busy process that got half a core
        ({0: 1.0, 1: 1.0}, {1}, 1.0, {1}, True),  # it has a core of its own now: stay
        ({0: 0.0, 1: 1.0}, {1}, 0.5, {0}, True),  # it shares our core although another is free: move
        ({0: 0.0, 1: 1.0}, {1}, 1.0, ALL, False),  # it has ended
        ({0: 1.0, 1: 1.0}, {1}, 0.3, {1}, True),  # more processes than cores: keep one core
        (dict.fromkeys(range(8), 1.0), set(range(8)), 7.0, set(range(8)), True),  # most cores are free: keep all
        (dict.fromkeys(range(8), 1.0), set(range(8)), 4.0, {0, 1, 2, 3}, True),
    ],
)
def test_free_cores_are_chosen(
    loads: dict[int, float], bound: set[int], own: float, chosen: set[int], shared: bool
) -> None:
    assert choose_cores(loads, bound, own) == (chosen, shared)


def test_two_trainings_on_one_core_part() -> None:
    """Each sees the other's half of the core and moves; the second to look sees the first one gone, and stays."""
    loads = {0: 1.0, 1: 0.0}
    assert choose_cores(loads, {0}, 0.5) == ({1}, True)
    assert choose_cores({0: 1.0, 1: 1.0}, {0}, 1.0) == ({0}, True)


WAITING = """
def seconds():  # processor time of 300 operations of two threads each, on one core
    start = time.process_time()
    for _ in range(300):
        x.add_(1.0)
    return time.process_time() - start

x = torch.ones(1 << 16)
seconds()
cores._bind({min(affinity())})
found["spinning"] = seconds()
sleeper = cores._sleep_when_waiting()
found["sleeping"] = seconds()
sleeper.shutdown()
found["spinning again"] = seconds()
"""
SHARING = """
def wait_for(number):
    deadline = time.monotonic() + 60
    while len(affinity()) != number and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(affinity())

busy = 0.0
cores.random.uniform = lambda low, high: 0.01
cores._own_seconds = lambda: 0.0
cores._busy_seconds = lambda: dict.fromkeys(every, busy * time.monotonic())
every = affinity()
with cores.share_cores():
    busy = 1.0  # other processes use all cores
    found["busy"] = wait_for(1)
    busy = 0.0
    found["free"] = wait_for(len(every))
    busy = 1.0
    wait_for(1)
found["ended"], found["all"], found["threads"] = len(affinity()), len(every), torch.get_num_threads()
"""


def run(program: str, root: Path) -> dict[str, float]:
    """A process with a thread for each core, which tests do not have."""
    start = "import json, time; from medgen.machine import affinity, set_openmp_defaults; set_openmp_defaults()\n"
    start += "import torch; from medgen.training import cores; found = {}\n"
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", f"{start}{program}print(json.dumps(found))"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


several = pytest.mark.skipif(len(affinity()) < 2 or sys.platform != "linux", reason="needs two cores and Linux")


@several
def test_waiting_threads_sleep_while_cores_are_shared(root: Path) -> None:
    """Measured in processor time: a thread that spins takes it from the thread that it waits for."""
    found = run(WAITING, root)
    assert 3 * found["sleeping"] < min(found["spinning"], found["spinning again"])


@several
def test_cores_are_left_and_taken_again_and_the_number_of_threads_stays(root: Path) -> None:
    found = run(SHARING, root)
    assert found["busy"] == 1 and found["free"] == found["ended"] == found["all"] == found["threads"]
