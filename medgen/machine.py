"""What this machine has, asked without torch: its import takes seconds."""

import os


def num_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """How many threads are to be used for arithmetic: what the user's OMP_NUM_THREADS says, or one for each core."""
    return int(os.environ.get("OMP_NUM_THREADS") or num_cores())


def gpus() -> list[str]:
    """The NVIDIA GPUs this process may use, each as CUDA_VISIBLE_DEVICES takes it."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name]
    import pynvml

    try:
        pynvml.nvmlInit()
        return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []  # no driver
