"""Processor cores, threads, GPUs, signals and garbage collection, without the slow import of torch."""

import atexit
import gc
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any


def num_cores() -> int:
    """Number of processor cores this process may use, by its affinity and by the CPU quota of its control groups."""
    quota = cpu_quota()
    cores = len(affinity())
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def affinity() -> frozenset[int]:
    """Numbers of the cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Lowest CPU quota, in cores, of this process's control groups (version 1 or 2); None without one.

    `root` is the folder with proc/ and sys/.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # not Linux
    quotas = []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        for folder in [PurePosixPath(group), *PurePosixPath(group).parents]:  # a container sees only the last, "/"
            mounted = root / "sys/fs/cgroup" / controllers / folder.relative_to("/")
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    limit = (mounted / "cpu.cfs_quota_us").read_text(encoding="utf-8")
                    period = (mounted / "cpu.cfs_period_us").read_text(encoding="utf-8")
                else:
                    limit, period = (mounted / "cpu.max").read_text(encoding="utf-8").split()
                quotas.append(float(limit) / float(period))  # "max" is no number
    return min((quota for quota in quotas if quota > 0), default=None)  # version 1 has -1 for no quota


def num_threads() -> int:
    """Number of threads for arithmetic: OMP_NUM_THREADS if it is set, or one per core.

    It does not depend on the machine's load: it decides how sums are rounded, so results would depend on it too.
    """
    return int(os.environ.get("OMP_NUM_THREADS") or num_cores())


def set_openmp_defaults() -> None:
    """Set OpenMP's environment variables that the user has not set; to be called before torch is imported.

    A thread that waits spins for milliseconds as by default, which is fastest on a free core, but sleeps at once while
    `medgen.training.cores` leaves cores to other processes. With a CPU quota, the number of threads is the quota.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for threads beyond the number of cores
        os.environ["GOMP_SPINCOUNT"] = "300000"  # for the others
    if num_cores() < len(affinity()):
        os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))


def reduce_garbage_collection() -> None:
    """Collect garbage less often in this process, and not once more when it ends.

    torch and MLflow make about 500,000 objects that live as long as the process. To go through them again and again
    takes a fifth of a short command's time, and once more at its end half a second to two.
    """
    gc.set_threshold(10_000)  # new objects before a collection; Python's default is 700
    atexit.register(skip_last_collection)


def skip_last_collection() -> None:
    """Keep Python from collecting garbage at the end of the process, unless triton is loaded.

    The nanobind library in triton prints all its objects that were not collected.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def gpus() -> list[str]:
    """Identifiers, as in CUDA_VISIBLE_DEVICES, of the NVIDIA GPUs this process may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    import pynvml

    try:
        pynvml.nvmlInit()
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []  # no NVIDIA driver


@contextmanager
def signal_handler(numbers: Iterable[int], handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """Handle these signals with `handler` within the block; only in the main thread, which alone receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
