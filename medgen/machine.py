"""Processor cores, threads, GPUs and signals, without the slow import of torch."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def num_cores() -> int:
    """Number of processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Number of threads for arithmetic: OMP_NUM_THREADS if it is set, or one per core."""
    return int(os.environ.get("OMP_NUM_THREADS") or num_cores())


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
