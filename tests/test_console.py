"""Messages of commands."""

import subprocess
import sys

import pytest
import torch
from rich.table import Table

from medgen import console
from medgen.training.progress import Display


def test_a_warning_is_printed_once() -> None:
    """Python's logging prints a warning too if nothing else handles it."""
    command = [sys.executable, "-c", "from medgen.console import warn; warn('low disk space')"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == "warning: low disk space\n"


HOSTILE = ("[/x]", "[red]a[/red]", ":smile:", "a\x1b[31mred\x07\r")


def test_names_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    for name in HOSTILE:
        for command in (console.say, console.note, console.warn):
            command(name)
        table = Table(name, title=name)
        table.add_row(name)
        console.show(table)
    printed = "".join(capsys.readouterr())
    assert all(printed.count(name) == 6 for name in ("[/x]", "[red]a[/red]", ":smile:", "a[31mred"))
    assert "\x1b" not in printed and "\x07" not in printed


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_progress_of_a_phase_of_any_name(
    name: str, is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with Display(0, 1, is_main=True) as display:
        display.step(0.5, 4, {name: torch.tensor(1.0)})
        display.epoch(1, name, {"train/loss": 1.0})
    printed = capsys.readouterr().out
    assert name.replace("\x1b", "").replace("\x07\r", "") in printed or is_terminal
    assert "\x1b[31m" not in printed
