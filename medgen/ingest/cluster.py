"""Apply a function to parts of files on a Dask cluster (`preprocess.scheduler`), with the results in their order.

for part, result in map_on_cluster("tcp://10.0.0.5:8786", function, parts):
    …

Dask runs the parts of a worker that died on another one. Every task checks that its worker has the same code as this
process, so that the results do not depend on the worker.
"""

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from medgen import source
from medgen.console import warn
from medgen.errors import UserError
from medgen.ingest.dataset_scan import ImageRecord

Result = TypeVar("Result")

_BATCH_SIZE = 32  # images of one task, or one part if it has more
_CONNECT_SECONDS = 10.0
_WAIT_SECONDS = 30.0  # without a result, after which the cluster is checked for workers


class FilePart(NamedTuple):
    """Images of one file."""

    name: str  # of the file, for messages
    records: Sequence[ImageRecord]
    num_images: int  # of the whole file


def map_on_cluster(
    scheduler: str, function: Callable[[FilePart], Result], parts: Iterable[FilePart]
) -> Iterator[tuple[FilePart, Result]]:
    """Each part with its result, in order; a few batches for each core of the cluster are in flight.

    Raises:
        UserError: Dask is not installed, the scheduler cannot be reached or is lost, a worker has other code, or a
            file kills its workers repeatedly.
    """
    with _connect(scheduler) as client:
        from distributed import KilledWorker

        waiting, pending = _batches(parts), deque[tuple[list[FilePart], Any]]()  # with the future of each

        def submit(batch: list[FilePart]) -> Any:
            return client.submit(_run_batch, function, batch, environment(), pure=False)

        while True:
            num_free = 2 + 2 * sum(client.nthreads().values()) - len(pending)
            pending.extend((batch, submit(batch)) for batch in islice(waiting, max(0, num_free)))
            if not pending:
                return
            batch, future = pending.popleft()
            try:
                results = _wait(client, scheduler, future)
            except KilledWorker:  # any task that was on those workers may be the cause, so run each part alone
                for _, other in pending:
                    with suppress(KilledWorker):  # is raised again when it is its turn
                        _wait(client, scheduler, other)
                results = [_run_alone(client, scheduler, submit, part) for part in batch]
            yield from zip(batch, results, strict=True)


@cache
def environment() -> str:
    """The versions that decide the result of reading an image."""
    import cv2
    import numpy as np

    code = source.fingerprint("ingest/**/*.py")[:12]
    return f"medgen {code}, OpenCV {cv2.__version__}, NumPy {np.__version__}"


def _batches(parts: Iterable[FilePart]) -> Iterator[list[FilePart]]:
    batch: list[FilePart] = []
    num_images = 0
    for part in parts:
        batch.append(part)
        num_images += len(part.records)
        if num_images >= _BATCH_SIZE:
            yield batch
            batch, num_images = [], 0
    if batch:
        yield batch


def _run_batch(function: Callable[[FilePart], Result], batch: Sequence[FilePart], expected: str) -> list[Result]:
    if environment() != expected:
        raise UserError(
            f"preprocess.scheduler: the worker on {platform.node()} has {environment()}; expected {expected}, as on "
            "this machine. Install the same medgen in both places (`uv sync --extra dask`) and restart the workers"
        )
    return [function(part) for part in batch]


def _run_alone(client: Any, scheduler: str, submit: Callable[[list[FilePart]], Any], part: FilePart) -> Any:
    """The result of a part while the cluster runs nothing else of this process."""
    from distributed import KilledWorker

    try:
        return _wait(client, scheduler, submit([part]))[0]
    except KilledWorker as error:
        raise UserError(
            f"{part.name}: each worker of {scheduler} that read this file died, the last at "
            f"{error.last_worker.address}; expected a file that fits into a worker's memory. Start workers with more "
            "memory, remove the file, or read it on this machine with --set preprocess.scheduler=null"
        ) from None


def _wait(client: Any, scheduler: str, future: Any) -> Any:
    """The future's result; warns while the cluster has no workers, which may start later."""
    while True:
        try:
            return future.result(timeout=_WAIT_SECONDS)
        except TimeoutError:
            if future.status == "error":  # the function's own error
                raise
            if not client.nthreads():
                warn(f"{scheduler}: no workers; waiting. Start one with `dask worker {scheduler}`")


@contextmanager
def _connect(scheduler: str) -> Iterator[Any]:
    try:
        from distributed import CancelledError, Client
        from distributed.client import ClosedClientError
        from distributed.comm.core import CommClosedError
    except ModuleNotFoundError:
        raise UserError(
            f"preprocess.scheduler: {scheduler} needs Dask, which is not installed; run `uv sync --extra dask`, or "
            "`pip install 'medgen[dask]'`"
        ) from None
    try:
        client: Any = Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False, name="medgen")  # type: ignore[no-untyped-call,unused-ignore]
    except (OSError, ValueError) as error:
        raise UserError(
            f"preprocess.scheduler: {scheduler} does not answer ({str(error).splitlines()[0]}); expected a Dask "
            "scheduler. Start one with `dask scheduler`, correct the address, or leave the key out to use this machine"
        ) from None
    with client:
        try:
            yield client
        except (CancelledError, ClosedClientError, CommClosedError):
            raise UserError(
                f"preprocess.scheduler: the connection to {scheduler} was lost; expected it to run until all images "
                "are read. Start it and its workers, and run the command again"
            ) from None
