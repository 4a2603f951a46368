"""Exceptions and their exit codes; docs/contract.md lists the codes."""

import difflib
import errno
from collections.abc import Mapping, Sequence
from pathlib import Path


def printable(text: str) -> str:
    """`text` without control characters, which a file name, tag or reason could use to control a terminal."""
    return "".join(letter for letter in text if letter == "\n" or letter.isprintable())


class UserError(Exception):
    """An error in the user's input: one message, no traceback, exit code 2.

    The message names the file or key, what was found, what was expected and what to do.
    """

    exit_code = 2


class Refused(UserError):
    """A gate failed and nothing was changed: exit code 3."""

    exit_code = 3


class NonFiniteError(Exception):
    """Training stopped on a NaN or infinite loss or gradient: exit code 4.

    `step`, `phase` and `term` are the step, the phase and the loss term where it occurred first;
    `forensics` is the JSON file with all details.
    """

    exit_code = 4

    def __init__(self, message: str, *, step: int, phase: str, term: str, forensics: Path) -> None:
        super().__init__(message)
        self.step = step
        self.phase = phase
        self.term = term
        self.forensics = forensics


class TrainingInterrupted(Exception):
    """Training stopped on a signal after saving its checkpoint: exit code 5. The same command resumes it."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """True if the machine or the GPU had too little memory: errors of Python, NumPy and torch."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def unknown_name(kind: str, name: str, known: Mapping[str, object] | Sequence[str]) -> UserError:
    """The error for a name that is not in a registry: lists the choices and the nearest one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"{kind}: unknown name {name!r}{hint} Known: {', '.join(sorted(known))}")
