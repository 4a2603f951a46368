"""The thread that mirrors a run while it goes on, and samples the machine's load."""

import threading
import time
from typing import Any

import psutil
from rich.console import Console

from medgen.config import Tracking
from medgen.tracking.history import History
from medgen.tracking.mlflow_sync import Mirror, first_line

POLL_SECONDS = 1.0
SAMPLE_SECONDS = 10.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 60.0
STARTUP_SECONDS, FLUSH_SECONDS, FLUSH_LIMIT_SECONDS = 30.0, 10.0, 60.0  # how long `stop` waits


class Worker:
    """The thread that mirrors, and samples the machine's load, while the run goes on."""

    def __init__(self, history: History, mirror: Mirror, tracking: Tracking) -> None:
        self._history = history
        self._mirror = mirror
        self._tracking = tracking
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins in the background."""
        self._thread = threading.Thread(target=self._work, name="medgen-tracking", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        sampler = Sampler(self._history) if self._tracking.system_metrics else None
        retry_at, pause = 0.0, FIRST_RETRY_SECONDS
        while True:
            closing = self._closing.wait(POLL_SECONDS)
            if sampler and not closing:
                sampler.sample_when_due()
            if closing or time.monotonic() >= retry_at:
                try:
                    self._mirror.send()
                    self._failure, pause = None, FIRST_RETRY_SECONDS
                except Exception as error:  # a mirror may fail without hurting the run; `stop` reports it
                    self._failure = error
                    retry_at = time.monotonic() + pause
                    pause = min(2 * pause, LAST_RETRY_SECONDS)
            if closing:
                return

    def stop(self) -> None:
        """Lets the thread send the rest for as long as it gets on, then says what stays behind."""
        if self._thread is None:
            return
        if self._failure is not None:
            patience = self._tracking.timeout_seconds
        else:
            patience = FLUSH_SECONDS if self._mirror.is_connected else STARTUP_SECONDS
        begin = time.monotonic()
        self._closing.set()
        while self._thread.is_alive() and time.monotonic() - begin < FLUSH_LIMIT_SECONDS:
            if time.monotonic() - max(begin, self._mirror.progress) > patience:
                break
            self._thread.join(0.1)
        console = Console(stderr=True, highlight=False)
        pending = self._mirror.num_pending()
        if pending:
            reason = f" ({first_line(self._failure)})" if self._failure else ""
            console.print(f"[yellow]{pending} records are not in MLflow yet: run `medgen sync`[/]{reason}")
        if self._mirror.refused:
            refused = self._mirror.refused
            console.print(f"[yellow]MLflow refused {len(refused)} records, the first: {refused[0]}[/]")


class Sampler:
    """The machine's load every few seconds, under the names MLflow's own monitor uses."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._step = history.last_step("system") + 1
        self._due = time.monotonic() + SAMPLE_SECONDS
        self._gpus: list[Any] = []
        psutil.cpu_percent()  # the first call only sets the mark the next one measures from
        import pynvml

        try:
            pynvml.nvmlInit()
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            pass  # no NVIDIA driver: no GPU to watch

    def sample_when_due(self) -> None:
        """Appends one sample if the last one is old enough."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + SAMPLE_SECONDS
        memory = psutil.virtual_memory()
        values: dict[str, float] = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": round(memory.used / 1e6, 1),
            "system/system_memory_usage_percentage": memory.percent,
        }
        for index, handle in enumerate(self._gpus):
            values |= _gpu_load(f"system/gpu_{index}_", handle)
        self._history.append("system", step=self._step, values=values)
        self._step += 1


def _gpu_load(prefix: str, handle: Any) -> dict[str, float]:
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            f"{prefix}utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            f"{prefix}memory_usage_megabytes": round(memory.used / 1e6, 1),
            f"{prefix}memory_usage_percentage": round(100 * memory.used / memory.total, 1),
            f"{prefix}power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
    except pynvml.NVMLError:
        return {}  # shared and virtual GPUs do not tell everything
