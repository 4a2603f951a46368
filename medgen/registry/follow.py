"""`medgen serve --follow`: serves the version that an alias names, and changes to another one without losing a request.

This process holds the listening socket and asks the registry for the alias. A version runs in a process of its own
(medgen/serving/app.py), which shares the socket. When the alias has moved, the new version's process is started beside
the old one; once it accepts requests, the old one accepts no more and ends after those it has. Each process ends when
the pipe that is its standard input is closed, so none outlives this one, however it ends.
"""

import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn, TypeVar

from medgen.console import say, warn
from medgen.errors import UserError
from medgen.machine import signal_handler
from medgen.registry.versions import Version

POLL_SECONDS = 30.0
START_SECONDS = 300.0  # for a version to load
STOP_SECONDS = 15.0  # for the processes to end after a signal: they give open requests ten
T = TypeVar("T")
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}


@dataclass
class _Service:
    """The process of a version."""

    version: Version
    folder: Path  # temporary
    process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str], fd: int) -> None:
        """Start the process and wait until it accepts requests.

        Raises:
            UserError: the version does not start.
        """
        self.process = subprocess.Popen(
            [*command, "--parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.folder,
            env=dict(environment),
            pass_fds=[fd],
            start_new_session=True,  # Ctrl-C reaches it through this process only
        )
        line = _read_line(self.process.stdout, START_SECONDS)
        if not line:
            raise UserError(f"{self.version.uri}: the version does not start; see the messages above")
        say(line)

    def drain(self) -> None:
        """Let it end after the requests that it has."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def is_running(self) -> bool:
        """True if the process has not ended; otherwise its folder is removed."""
        if self.process is not None and self.process.poll() is None:
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        if self.process is not None:
            self.process.send_signal(number)

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended, and kill it at the deadline."""
        if self.process is not None:
            try:
                self.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class _Follower:
    find: Callable[[], Version]
    prepare: Callable[[Version, Path], list[str]]
    environment: Mapping[str, str]
    fd: int
    services: list[_Service] = field(default_factory=list)  # the last one accepts requests, the others end
    failed: int | None = None  # number of a version that did not start
    last_error: str = ""

    def start(self, version: Version) -> None:
        """Start a version's process; the earlier ones end after their requests."""
        service = _Service(version, Path(tempfile.mkdtemp(prefix="medgen-serve-")))
        self.services.append(service)
        try:
            command = _call_in_thread(lambda: self.prepare(version, service.folder))
            self.failed = version.number
            service.start(command, self.environment, self.fd)
            self.failed = None
        except UserError:
            service.wait(0.0)
            self.services.remove(service)
            raise
        for earlier in self.services[:-1]:
            earlier.drain()

    def poll(self) -> None:
        """Start the version that the alias names now, if it is another one. After an error the present one stays."""
        try:
            version = _call_in_thread(self.find)
            current = self.services[-1].version
            if version.uri != current.uri and version.number != self.failed:
                self.start(version)
            self.last_error = ""
        except Exception as error:  # whatever the store raises
            if str(error) != self.last_error:
                warn(f"{error}\n{self.services[-1].version.uri} is served as before")
            self.last_error = str(error)

    def run(self) -> NoReturn:
        """Serve until the process of the present version ends."""
        self.start(_call_in_thread(self.find))
        while True:
            deadline = time.monotonic() + POLL_SECONDS
            while (left := deadline - time.monotonic()) > 0:
                try:
                    code = self._process.wait(left)
                except subprocess.TimeoutExpired:
                    continue
                raise UserError(f"{self.services[-1].version.uri}: its process ended with exit code {code}")
            self.services = [one for one in self.services[:-1] if one.is_running()] + self.services[-1:]
            self.poll()

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        process = self.services[-1].process
        assert process is not None
        return process


def follow_alias(
    find: Callable[[], Version],
    prepare: Callable[[Version, Path], list[str]],
    environment: Mapping[str, str],
    fd: int,
) -> NoReturn:
    """Serve the version that `find` returns, as long as this process runs.

    Args:
        find: returns the version that the alias names.
        prepare: downloads a version to a folder; returns the command that serves it.
        environment: variables of the version's process.
        fd: file descriptor of the listening socket.

    Raises:
        UserError: the first version cannot be found or does not start, or the process of a version ended.
    """
    follower = _Follower(find, prepare, environment, fd)
    received = signal.SIGTERM

    def stop(number: int, _: object) -> NoReturn:
        nonlocal received
        received = signal.Signals(number)
        sys.exit(EXIT_CODES[received])

    with signal_handler(EXIT_CODES, stop):
        try:
            follower.run()
        finally:
            for number in EXIT_CODES:  # a second one would leave processes behind
                signal.signal(number, signal.SIG_IGN)
            deadline = time.monotonic() + STOP_SECONDS
            for service in follower.services:
                service.signal(received)
            for service in follower.services:
                service.wait(deadline)


def _call_in_thread(function: Callable[[], T]) -> T:
    """Call a function that uses MLflow's store in a thread: a signal ends this process at once, whatever that does."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return result.result()


def _read_line(file: IO[bytes] | None, seconds: float) -> str:
    """The first line that a process prints, or "" if it prints none in this time."""
    assert file is not None
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        return os.read(file.fileno(), 1000).decode().strip() if selector.select(seconds) else ""
