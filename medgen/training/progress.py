"""Progress of a training on the terminal, epoch by epoch."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from medgen.console import ERR, LiteralConsole
from medgen.errors import printable

if TYPE_CHECKING:
    from torch import Tensor

SCORES = ("val/ssim", "val/dice")  # of images, of masks


class Display:
    """Progress bar on a terminal; otherwise a line for an epoch.

    Both show loss terms and images per second; the bar also the time left.
    """

    def __init__(self, epochs_done: int, total_epochs: int, is_main: bool) -> None:
        self.console = LiteralConsole(quiet=not is_main or ERR.quiet)
        self.total_epochs = total_epochs
        self.num_images = 0
        self.started = time.monotonic()
        self._drawn_at = 0.0
        self._epoch = epochs_done
        self._validation = ""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", markup=False),
        )
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("training", total=total_epochs, completed=epochs_done, terms="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    @property
    def images_per_second(self) -> float:
        """Training images per second in this epoch."""
        return self.num_images / max(time.monotonic() - self.started, 1e-9)

    def step(self, epoch_fraction: float, num_images: int, terms: dict[str, "Tensor"]) -> None:
        """Update after a step; the bar is drawn at most four times a second, as reading terms waits for the device."""
        self.num_images += num_images
        now = time.monotonic()
        if not self.console.is_terminal or now - self._drawn_at < 0.25:
            return
        self._drawn_at = now
        text = " ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
        text = printable(f"{text} {self._validation} {self.images_per_second:.0f} images/s")
        self.progress.update(self.task, completed=self._epoch + epoch_fraction, terms=text)

    def epoch(self, epoch: int, phase: str, record: dict[str, float]) -> None:
        """Update after an epoch; without a terminal, print a line for at most fifty epochs of the run."""
        if not self.console.is_terminal and (
            epoch % max(1, self.total_epochs // 50) == 0 or epoch == self.total_epochs
        ):
            chosen = {name: record[name] for name in ("train/loss", "val/l1", *SCORES, "train/kl") if name in record}
            text = "  ".join(f"{name} {value:.4g}" for name, value in chosen.items())
            rate = f"{self.images_per_second:.0f} images/s"
            self.console.print(f"{phase} epoch {epoch}/{self.total_epochs}  {text}  {rate}", soft_wrap=True)
        self._epoch = epoch
        self._validation = " ".join(f"{name} {record[name]:.4f}" for name in SCORES if name in record)
        self.num_images, self.started = 0, time.monotonic()
