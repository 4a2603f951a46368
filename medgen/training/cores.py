"""Leave cores to other processes while a network trains.

OpenMP divides each operation among its threads and waits for the last. A busy process on one of their cores delays that
thread by whole time slices, while the others spin: beside one busy process on two cores a training keeps a tenth of its
speed. The number of threads cannot follow the load, since it decides how sums are rounded. How threads wait and which
cores run them changes no result, and can follow it.
"""

import math
import os
import random
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from medgen.machine import affinity

STAT = Path("/proc/stat")
IGNORED_LOAD = 0.3  # cores that other processes may use without being noticed
MOVE_LOAD = 0.25  # a core must be this much less used than the present one


@contextmanager
def share_cores() -> Iterator[None]:
    """A context in which this process leaves busy cores to other processes, and takes them again when they are free.

    Active on Linux, in a process with one OpenMP thread for each of its cores.
    """
    cores = affinity()
    if not STAT.exists() or len(cores) < 2 or torch.get_num_threads() != len(cores):
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(cores, ended), name="cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def choose_cores(loads: Mapping[int, float], bound: Collection[int], own: float) -> tuple[set[int], bool]:
    """The cores to run on, and whether other processes need one.

    Args:
        loads: share of its time that each core was busy, for any process.
        bound: the cores that this process ran on.
        own: cores that this process used.

    Returns:
        All cores, unless at most half are free: then the free ones, at least one, preferring `bound`. With more free
        cores, the threads that shared one would make all others wait.
    """
    others = {core: load - (own / len(bound) if core in bound else 0.0) for core, load in loads.items()}
    num_free = max(1, len(loads) - max(0, math.ceil(sum(others.values()) - IGNORED_LOAD)))
    if 2 * num_free > len(loads):
        return set(loads), num_free < len(loads)
    ranked = sorted(loads, key=lambda core: others[core] - (MOVE_LOAD if core in bound else 0.0))
    return set(ranked[:num_free]), True


def _watch(cores: frozenset[int], ended: threading.Event) -> None:
    bound, sleeper = set(cores), None
    busy, own, now = _busy_seconds(), _own_seconds(), time.monotonic()
    # random intervals: two trainings that chose the same core do not move at the same time
    while not ended.wait(random.uniform(1.0, 2.0)):
        busy_before, own_before, before = busy, own, now
        busy, own, now = _busy_seconds(), _own_seconds(), time.monotonic()
        seconds = now - before
        loads = {core: (busy[core] - busy_before[core]) / seconds for core in cores}
        chosen, shared = choose_cores(loads, bound, (own - own_before) / seconds)
        if shared and sleeper is None:
            sleeper = _sleep_when_waiting()
        elif not shared and sleeper is not None:
            sleeper.shutdown()
            sleeper = None
        if chosen != bound:
            bound = chosen
            _bind(bound)
    _bind(cores)
    if sleeper is not None:
        sleeper.shutdown()


def _sleep_when_waiting() -> ThreadPoolExecutor:
    """Make OpenMP's threads sleep instead of spin while they wait, until the result is shut down.

    libgomp does so while it has more threads than cores (see GOMP_SPINCOUNT in its manual). A second thread that has
    called OpenMP has threads of its own, which count until it ends.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="openmp")
    executor.submit(lambda: torch.zeros(1 << 20).add_(1.0)).result()
    return executor


def _bind(cores: Collection[int]) -> None:
    """Let all threads of this process run on `cores` only."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # the thread has ended, or the administrator has taken a core away
            os.sched_setaffinity(int(thread), cores)


def _busy_seconds() -> dict[int, float]:
    """Seconds that each core has been busy since the machine started."""
    ticks = os.sysconf("SC_CLK_TCK")
    busy = {}
    for line in STAT.read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, fields[:8])
            busy[int(name[3:])] = (user + nice + system + sum(interrupts_and_steal)) / ticks
    return busy


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
