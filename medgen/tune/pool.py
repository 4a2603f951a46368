"""Start, restart and stop the worker processes of one machine."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Self

from medgen.errors import TrainingInterrupted, UserError
from medgen.machine import signal_handler
from medgen.tune.study import MAX_ATTEMPTS
from medgen.tune.worker import Search, WorkerSlot, run_worker

MAX_DEATHS = MAX_ATTEMPTS + 1  # of one worker in a row while no trial ends: the trial is not the cause


def allocate_slots(num_workers: int, num_threads: int, gpus: list[str], first: int = 0) -> list[WorkerSlot]:
    """Divide the machine's threads evenly among workers, and assign its GPUs in turn; `first` is the first's number."""
    threads = max(1, num_threads // num_workers)
    return [WorkerSlot(first + n, threads, gpus[n % len(gpus)] if gpus else None) for n in range(num_workers)]


class WorkerPool:
    """A context with one worker process for each slot; on leaving it, running workers stop after the current step."""

    def __init__(self, search: Search, slots: Sequence[WorkerSlot]) -> None:
        self._search = search
        self._spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA or OpenMP
        self._workers: dict[WorkerSlot, BaseProcess] = {}
        self._deaths = dict.fromkeys(slots, 0)
        self._num_ended = 0

    def __enter__(self) -> Self:
        try:
            for slot in self._deaths:
                self._start(slot)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            started = [worker for worker in self._workers.values() if worker.pid is not None]
            for worker in started:
                worker.terminate()
            for worker in started:
                worker.join()
        except BaseException:  # such as a second Ctrl-C
            for worker in started:
                worker.kill()
            raise

    def poll(self, num_ended: int, seconds: float) -> bool:
        """Wait up to `seconds` for a worker to end, and restart killed workers.

        Args:
            num_ended: number of trials of the study that have ended.
            seconds: maximum time to wait.

        Returns:
            False if all workers have ended.

        Raises:
            UserError: a worker ended with an error message, or was killed repeatedly.
        """
        wait([worker.sentinel for worker in self._workers.values()], timeout=seconds)
        if num_ended > self._num_ended:
            self._num_ended, self._deaths = num_ended, dict.fromkeys(self._deaths, 0)
        for slot, worker in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[slot]
            if worker.exitcode == UserError.exit_code:
                raise UserError(self._last_log_line(slot))
            if worker.exitcode in (0, TrainingInterrupted.exit_code):
                continue
            self._deaths[slot] += 1
            if self._deaths[slot] == MAX_DEATHS:
                raise UserError(
                    f"worker {slot.number} died {MAX_DEATHS} times without ending a trial, last with exit code "
                    f"{worker.exitcode}: {self._last_log_line(slot)}"
                )
            self._start(slot)
        return bool(self._workers)

    def _start(self, slot: WorkerSlot) -> None:
        variables = {"OMP_NUM_THREADS": str(slot.threads), "MKL_NUM_THREADS": str(slot.threads)}
        if slot.gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = slot.gpu
        worker = self._spawn.Process(target=run_worker, args=(self._search, slot), name=f"worker {slot.number}")
        self._workers[slot] = worker
        # the worker ignores Ctrl-C, which a terminal sends to all processes: this process stops it
        with environment(variables), signal_handler([signal.SIGINT], signal.SIG_IGN):
            worker.start()

    def _last_log_line(self, slot: WorkerSlot) -> str:
        path = self._search.folder / f"worker_{slot.number}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "its log is empty")
        return f"{last.removeprefix(f'worker {slot.number}: ')} (full log: {path})"


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A context that sets environment variables for the processes that it starts."""
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGUSR1, the signals of clusters, raise `TrainingInterrupted`."""

    def stop(number: int, _: object) -> None:
        raise TrainingInterrupted(
            f"search stopped by {signal.Signals(number).name}; running trials are saved, run the same command again to "
            "continue"
        )

    with signal_handler([signal.SIGTERM, signal.SIGUSR1], stop):
        yield
