"""Run medgen's commands in forks of this process, which has imported all they need: imports take longer than a stage.

A fork works as a new process would: it has its own session, folder, output and arguments, and its exit code is what a
shell would see. `MARK` in the environment marks this process and all that it starts, whoever their parent becomes.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

MARK = "MEDGEN_CAMPAIGN"  # environment variable: the campaign's folder
FORK = multiprocessing.get_context("fork")
ORPHAN_SECONDS = 20.0  # for the processes of a killed command to notice and end
COMMAND_SECONDS = 240.0  # longer is a hang
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PROGRAMS = {
    "git",
    "dvc",
    "fc-list",
    "ldconfig",
    "uname",
    os.path.basename(sys.executable),
}  # that medgen and its libraries start


class Violation(Exception):
    """A promise that did not hold; `kind` is one of KINDS in __main__.py."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass
class Child:
    """A running command."""

    process: BaseProcess
    log: Path
    words: tuple[str, ...]

    def kill(self, whole_group: bool = True, number: int = signal.SIGKILL) -> None:
        """Send a signal to the command's process, or to all processes of its session."""
        assert self.process.pid is not None
        for pid in session(self.process.pid) if whole_group else [self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float = COMMAND_SECONDS) -> int:
        """The exit code, negative after a signal.

        Raises:
            Violation: the command did not end, or wrote outside the campaign's folder.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            with contextlib.suppress(psutil.Error):
                self.kill(number=signal.SIGABRT)  # prints where it hangs
            self.process.join(5)
            self.kill()
            raise Violation("crashed", f"{self.name}: still running after {seconds:.0f} s\n{self.output()}")
        output = self.output()
        for line in output.splitlines():
            if line.startswith("AUDIT "):
                raise Violation("code run" if " ran " in line else "bytes outside", f"{self.name}: {line}")
        return self.process.exitcode

    def output(self) -> str:
        """The output of the command so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def name(self) -> str:
        """The command line."""
        return " ".join(("medgen", *self.words))


def session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == leader:
                found.append(pid)
    return found


def start(
    folder: Path, words: Sequence[str], log: Path, prepare: Iterable[Callable[[], None]] = (), fork_workers: bool = True
) -> Child:
    """Start `medgen WORDS` in `folder`; the functions of `prepare` are called first, in the new process.

    `fork_workers`: worker processes of `medgen tune` are forks too.
    """
    process = FORK.Process(target=_run, args=(folder, tuple(words), log, tuple(prepare), fork_workers))
    process.start()
    return Child(process, log, tuple(words))


def run(
    folder: Path, *words: str, log: Path, prepare: Iterable[Callable[[], None]] = (), codes: Iterable[int] = (0,)
) -> str:
    """Run a command to its end and return its output.

    Raises:
        Violation: its exit code is none of `codes`.
    """
    child = start(folder, words, log, prepare)
    code = child.wait()
    if code not in codes:
        raise Violation(
            "crashed" if code in (1, *range(-64, 0)) else "lost", f"{child.name}: exit code {code}\n{child.output()}"
        )
    return child.output()


def start_function(function: Callable[[], None], log: Path, folder: Path | None = None) -> Child:
    """Start a function in a fork of its own, with its output in `log`."""
    process = FORK.Process(target=_call, args=(function, log, folder))
    process.start()
    return Child(process, log, (getattr(function, "__name__", "function"),))


def _run(
    folder: Path, words: tuple[str, ...], log: Path, prepare: tuple[Callable[[], None], ...], fork_workers: bool
) -> None:
    from medgen import cli

    def main() -> None:
        sys.argv = ["medgen", *words]
        if fork_workers:
            get_context = multiprocessing.get_context
            multiprocessing.get_context = lambda method=None: get_context("fork")  # type: ignore[assignment]
        for each in prepare:
            each()
        cli.main()

    _call(main, log, folder)


def _call(function: Callable[[], None], log: Path, folder: Path | None) -> None:
    os.setsid()
    os.chdir(folder or log.parent)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    audit(Path(os.environ[MARK]), descriptor)
    code: object = 0
    try:
        function()
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    if not isinstance(code, int):
        os.write(2, f"{code}\n".encode())
        code = 1
    os._exit(code)  # as the daemon threads of the forks would keep multiprocessing's own end waiting


def audit(allowed: Path, descriptor: int) -> None:
    """Report in the log every file that this process opens for writing outside `allowed`, and every program it runs."""
    roots = (f"{allowed}/", "/dev/", "/proc/")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, flags = arguments[0], arguments[2]
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & WRITES:
                where = os.path.realpath(os.fsdecode(path))
                if not where.startswith(roots):
                    os.write(descriptor, f"AUDIT writes {where!r}\n".encode())
        elif event in ("os.system", "os.exec", "os.posix_spawn", "pickle.find_class"):
            os.write(descriptor, f"AUDIT ran {event} {arguments[:2]!r}\n".encode())
        elif event == "subprocess.Popen" and isinstance(arguments[1], list | tuple):
            program = os.path.basename(str(arguments[1][0]))
            if program not in PROGRAMS:
                os.write(descriptor, f"AUDIT ran {arguments[1]!r}\n".encode())

    sys.addaudithook(hook)


def orphans() -> list[psutil.Process]:
    """Processes with this campaign's mark that are no descendants of this process."""
    descendants = {child.pid for child in psutil.Process().children(recursive=True)} | {os.getpid()}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.pid not in descendants and process.environ().get(MARK) == os.environ[MARK]
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def check_no_orphans() -> None:
    """Wait for the processes of ended commands to end too.

    Raises:
        Violation: one has not ended after `ORPHAN_SECONDS`; it is killed.
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := orphans():
        if time.monotonic() > deadline:
            names = [f"{process.pid}: {' '.join(process.cmdline())[:200]}" for process in left]
            for process in left:
                process.kill()
            raise Violation("lost", f"processes without a parent: {'; '.join(names)}")
        time.sleep(0.1)
