"""The worker processes of one machine: started, seated on threads and GPUs, started again when killed, stopped."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

from medgen.errors import TrainingInterrupted, UserError
from medgen.tune.study import MAX_ATTEMPTS
from medgen.tune.worker import Search, Seat, work

MAX_DEATHS = MAX_ATTEMPTS + 1  # of one worker in a row, with no trial ended by anyone: it is not the trial


def seats(num_workers: int, num_threads: int, gpus: list[str]) -> list[Seat]:
    """Shares a machine: threads evenly, so that workers do not fight for them, and GPUs in turn."""
    threads = max(1, num_threads // num_workers)
    return [Seat(n, threads, gpus[n % len(gpus)] if gpus else None) for n in range(num_workers)]


class Pool:
    """Workers, as a context: leaving it stops those that still run, after the step they are in."""

    def __init__(self, search: Search, places: Sequence[Seat]) -> None:
        self._search = search
        self._spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA or OpenMP
        self._workers: dict[Seat, BaseProcess] = {}
        self._deaths = dict.fromkeys(places, 0)
        self._ended = 0

    def __enter__(self) -> Self:
        try:
            for seat in self._deaths:
                self._start(seat)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            started = [worker for worker in self._workers.values() if worker.pid is not None]
            for worker in started:
                worker.terminate()
            for worker in started:
                worker.join()
        except BaseException:  # a second Ctrl-C does not wait
            for worker in started:
                worker.kill()
            raise

    def tend(self, num_ended: int, seconds: float) -> bool:
        """Waits for a worker to end, `seconds` at most, and starts anew the killed; False when all are done.

        Args:
            num_ended: trials that have ended in the study.
            seconds: how long to wait.

        Raises:
            UserError: a worker stopped with a message, or dies again and again.
        """
        wait([worker.sentinel for worker in self._workers.values()], timeout=seconds)
        if num_ended > self._ended:
            self._ended, self._deaths = num_ended, dict.fromkeys(self._deaths, 0)
        for seat, worker in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[seat]
            if worker.exitcode == UserError.exit_code:
                raise UserError(self._last_words(seat))
            if worker.exitcode in (0, TrainingInterrupted.exit_code):
                continue
            self._deaths[seat] += 1
            if self._deaths[seat] == MAX_DEATHS:
                raise UserError(
                    f"worker {seat.number} died {MAX_DEATHS} times without ending a trial, last with exit code "
                    f"{worker.exitcode}: {self._last_words(seat)}"
                )
            self._start(seat)
        return bool(self._workers)

    def _start(self, seat: Seat) -> None:
        variables = {"OMP_NUM_THREADS": str(seat.threads), "MKL_NUM_THREADS": str(seat.threads)}
        if seat.gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = seat.gpu
        worker = self._spawn.Process(target=work, args=(self._search, seat), name=f"worker {seat.number}")
        self._workers[seat] = worker
        with environment(variables), ignoring_ctrl_c():
            worker.start()

    def _last_words(self, seat: Seat) -> str:
        path = self._search.folder / f"worker_{seat.number}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        said = next((line for line in reversed(lines) if line.strip()), "it left no word")
        return f"{said.removeprefix(f'worker {seat.number}: ')} (all of it: {path})"


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables in the environment of processes that are started meanwhile."""
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
def ignoring_ctrl_c() -> Iterator[None]:
    """Processes that are started meanwhile never hear Ctrl-C, which a terminal sends to all: the parent decides."""
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if earlier is None else earlier)


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """SIGTERM and SIGUSR1, from a cluster that takes its machine back, end the block as Ctrl-C does."""

    def stop(number: int, _: object) -> None:
        raise TrainingInterrupted(
            f"search stopped by {signal.Signals(number).name}; running trials are saved, the same command goes on"
        )

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
