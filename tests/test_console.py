"""Messages of commands."""

import subprocess
import sys


def test_a_warning_is_printed_once() -> None:
    """Python's logging prints a warning too if nothing else handles it."""
    command = [sys.executable, "-c", "from medgen.console import warn; warn('low disk space')"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == "warning: low disk space\n"
