"""The errors a user meets; the class decides the exit code (see docs/contract.md)."""

from pathlib import Path


def printable(text: str) -> str:
    """`text` without what could steer a terminal: names of files, tags and reasons come from anywhere."""
    return "".join(letter for letter in text if letter == "\n" or letter.isprintable())


class UserError(Exception):
    """Input that the user can mend: one message, no traceback, exit code 2.

    The message names the file or key, what was found, what was expected and what to do.
    """

    exit_code = 2


class Refused(UserError):
    """A gate was not passed, exit code 3: nothing was changed."""

    exit_code = 3


class NonFiniteError(Exception):
    """Training stopped on a NaN or infinite loss or gradient, exit code 4.

    `step`, `phase` and `term` say where and in which loss term it was first seen;
    `forensics` is the JSON file that holds the whole finding.
    """

    exit_code = 4

    def __init__(self, message: str, *, step: int, phase: str, term: str, forensics: Path) -> None:
        super().__init__(message)
        self.step = step
        self.phase = phase
        self.term = term
        self.forensics = forensics


class TrainingInterrupted(Exception):
    """A signal asked the training to stop, and it did with all it has saved: exit code 5, the same command goes on."""

    exit_code = 5
