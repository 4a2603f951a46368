"""A background thread that sends a run's records to MLflow and samples the machine's load."""

import threading
import time
from contextlib import suppress
from typing import Any

import psutil

from medgen.config import Tracking
from medgen.console import warn
from medgen.tracking.history import History
from medgen.tracking.mlflow_sync import MlflowSync, load_mlflow, summarize_error

POLL_SECONDS = 1.0
SAMPLE_SECONDS = 10.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 60.0
CONNECT_SECONDS, IDLE_SECONDS, FLUSH_LIMIT_SECONDS = 30.0, 10.0, 60.0  # how long `stop` waits


class Uploader:
    """The thread, which runs until `stop`."""

    def __init__(self, history: History, mlflow_sync: MlflowSync, tracking: Tracking) -> None:
        self._history = history
        self._mlflow_sync = mlflow_sync
        self._tracking = tracking
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="medgen-tracking", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        sampler = LoadSampler(self._history, self._tracking) if self._tracking.system_metrics else None
        retry_at, pause = 0.0, FIRST_RETRY_SECONDS
        while True:
            closing = self._closing.wait(POLL_SECONDS)
            if sampler and not closing:
                sampler.sample_if_due()
            if closing or time.monotonic() >= retry_at:
                try:
                    self._mlflow_sync.send()
                    self._failure, pause = None, FIRST_RETRY_SECONDS
                except Exception as error:  # MLflow may fail without stopping the run; `stop` reports it
                    self._failure = error
                    retry_at = time.monotonic() + pause
                    pause = min(2 * pause, LAST_RETRY_SECONDS)
            if closing:
                return

    def stop(self) -> None:
        """Wait while the thread makes progress with the rest, then print what is not sent."""
        if self._failure is not None:
            patience = self._tracking.timeout_seconds
        else:
            patience = IDLE_SECONDS if self._mlflow_sync.is_connected else CONNECT_SECONDS
        begin = time.monotonic()
        self._closing.set()
        while self._thread.is_alive() and time.monotonic() - begin < FLUSH_LIMIT_SECONDS:
            if time.monotonic() - max(begin, self._mlflow_sync.progress_time) > patience:
                break
            self._thread.join(0.1)
        self._mlflow_sync.stop()
        if pending := self._mlflow_sync.num_pending():
            reason = f" ({summarize_error(self._failure)})" if self._failure else ""
            warn(f"{pending} records are not in MLflow yet: run `medgen sync`{reason}")
        self._mlflow_sync.warn_unsent()


class LoadSampler:
    """Samples the machine's load every few seconds with MLflow's monitors."""

    def __init__(self, history: History, tracking: Tracking) -> None:
        load_mlflow(tracking)
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from pynvml import NVMLError

        self._history = history
        self._step = history.last_step("system") + 1
        self._due = time.monotonic() + SAMPLE_SECONDS
        self._monitors: list[Any] = [CPUMonitor()]  # type: ignore[no-untyped-call]
        with suppress(RuntimeError, NVMLError):  # no NVIDIA driver, or a GPU that it may not read
            self._monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
        psutil.cpu_percent()  # each call measures since the call before: the first one only starts the measurement

    def sample_if_due(self) -> None:
        """Record a sample if `SAMPLE_SECONDS` have passed since the last one."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + SAMPLE_SECONDS
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
        self._history.append("system", step=self._step, values=values)
        self._step += 1
