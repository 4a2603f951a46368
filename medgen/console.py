"""Output of the commands: results on stdout, warnings and progress on stderr, both in the log file if there is one.

Commands print with `say`, `show` and `warn`; library code logs to `logging.getLogger(__name__)`.
"""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from medgen.errors import UserError, printable


class LiteralConsole(Console):
    """Console that shows text literally, as names may come from users: no markup, no control characters."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, stderr=stderr, quiet=quiet)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of messages, and of the cells and titles of tables."""
        return super().render_str(printable(text), **options)


LOG = logging.getLogger("medgen")
LOG.addHandler(logging.NullHandler())  # without a handler, Python prints warnings a second time
OUT = LiteralConsole()
ERR = LiteralConsole(stderr=True)


def configure(verbose: bool = False, quiet: bool = False, log_file: Path | None = None) -> None:
    """Set what is printed and logged.

    Args:
        verbose: print log messages of all levels to stderr.
        quiet: print results only, without messages, warnings and progress.
        log_file: file to append messages, warnings and log messages to.
    """
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False
    LOG.handlers = [logging.NullHandler()]
    handlers: list[logging.Handler] = []
    if verbose:
        handlers.append(logging.StreamHandler())
        handlers[0].addFilter(lambda record: record.name != LOG.name)  # messages of commands are printed already
    if log_file is not None:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"--log-file {log_file}: cannot be written ({error.strerror}); name a file that you may write to"
            ) from None
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        LOG.addHandler(handler)
    ERR.quiet = quiet


def say(text: str) -> None:
    """Print a message to stdout."""
    LOG.info(text)
    if not ERR.quiet:
        OUT.print(text, soft_wrap=True)


def show(result: RenderableType) -> None:
    """Print a command's result, such as a table, to stdout."""
    OUT.print(result)


def note(text: str) -> None:
    """Print a message to stderr, for commands whose stdout is a result."""
    LOG.info(text)
    ERR.print(text, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    LOG.warning(text)
    ERR.print(f"warning: {text}", style="yellow", soft_wrap=True)


def counting_bar(console: Console = ERR) -> Progress:
    """Progress bar of a known number of items, with the time left."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
