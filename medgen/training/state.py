"""A training's whole state: what is trained, where it stands; saved, resumed, rolled back."""

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from medgen.config import Phase, Train
from medgen.errors import TrainingInterrupted, UserError
from medgen.training import checkpoint, optimizers
from medgen.training.distributed import StopRequest, World
from medgen.training.guard import Guard
from medgen.training.losses import Losses


class Task(Protocol):
    """What is trained: a model, batches and a loss. Job and loop know no more of it.

    All of it is a pure function of the step's position and of torch's global generator, which the loop seeds at each
    step: a resumed training repeats what an uninterrupted one does.
    """

    num_batches: int  # steps in an epoch
    batch_size: int  # over all processes

    @property
    def model(self) -> nn.Module:
        """What learns, on the device it learns on."""
        ...

    def losses(self, network: nn.Module, position: int, phase: Phase, epoch: float) -> Losses:
        """The loss of the batch at `position`, which lies `epoch` epochs into its phase; `network` wraps the model."""
        ...

    def validate(self, phase: Phase) -> dict[str, float]:
        """Metrics of the whole validation split, without randomness, among them `objective`.

        The lower objective is better: it decides which epoch `train.keep: best` keeps, and the plateau schedule. It is
        the same function of the weights in all epochs of a phase.
        """
        ...

    def record(self, phase: Phase, epoch: float) -> dict[str, float]:
        """What an epoch's record says besides losses and learning rate, such as β."""
        ...

    def draw(self, folder: Path, epoch: int) -> dict[str, Path]:
        """Writes pictures of how far it is below `folder`; returns their paths by name."""
        ...

    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """What the step at `position` was given, and the files it comes from."""
        ...


@dataclass
class State:
    """Where the training is: with the tensors, all that a checkpoint holds."""

    phase: int = 0
    epoch: int = 0  # within the phase
    step: int = 0  # within the epoch
    position: int = 0  # steps since the start of the run
    rate_scale: float = 1.0  # halved by every rollback
    num_rollbacks: int = 0
    best_objective: float = math.inf  # of this phase's epochs, where train.keep asks for the best
    plateau: optimizers.Plateau = field(default_factory=optimizers.Plateau)
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's terms


class Meter:
    """Sums of an epoch's scalars, kept on the device: reading them there every step would cost a wait."""

    def __init__(self, sums: dict[str, float]) -> None:
        self.names = tuple(sums)
        self.total = torch.tensor(list(sums.values()), dtype=torch.float64) if sums else None

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Adds one step's scalars; their names are the same at every step of an epoch."""
        self.names = tuple(scalars)
        values = torch.stack([scalar.double() for scalar in scalars.values()])
        self.total = values if self.total is None else self.total.to(values.device) + values

    def sums(self) -> dict[str, float]:
        """Name to sum, read from the device."""
        return {} if self.total is None else dict(zip(self.names, self.total.tolist(), strict=True))


class Job:
    """A task with its optimizer and all else a training holds, resumed from `scratch` where that has a checkpoint."""

    def __init__(self, task: Task, world: World, train: Train, scratch: Path) -> None:
        self.task, self.world, self.train, self.scratch = task, world, train, scratch
        self.model = task.model
        self.model.to(memory_format=torch.channels_last)
        self.network = self._wrap(self.model)
        self.average = optimizers.AveragedWeights(self.model, train.ema_decay) if train.ema_decay else None
        self.best: dict[str, Tensor] | None = None  # the weights of the epoch that `state.best_objective` is of
        self.guard = Guard(world.device, world.any)
        self.stop = StopRequest()
        self.state = State()
        self.optimizer = optimizers.build_optimizer(train.phases[0], self.model.parameters())
        self._saved_at = time.monotonic()

    @property
    def total_epochs(self) -> int:
        """Over all phases."""
        return sum(phase.epochs for phase in self.train.phases)

    @property
    def epochs_done(self) -> int:
        """Over all phases, whole ones."""
        return self.state.position // self.task.num_batches

    @property
    def epoch(self) -> float:
        """Where the next step is, in epochs from the phase's start."""
        return self.state.epoch + self.state.step / self.task.num_batches

    @property
    def drawn_epochs(self) -> list[int]:
        """The epochs that leave pictures: the first, the last, and every so many."""
        every = range(self.train.sample_every, self.total_epochs, self.train.sample_every)
        return sorted({1, *every, self.total_epochs})

    def phase(self) -> Phase | None:
        """The phase the next epoch belongs to; None at the end of the last.

        A new phase has a new optimizer, a new plateau and a new best; weights and averages stay.
        """
        state, phases = self.state, self.train.phases
        while state.phase < len(phases) and state.epoch >= phases[state.phase].epochs:
            if state.phase == len(phases) - 1:
                return None
            state.phase, state.epoch, state.plateau = state.phase + 1, 0, optimizers.Plateau()
            state.best_objective, self.best = math.inf, None
            self.optimizer = optimizers.build_optimizer(phases[state.phase], self.model.parameters())
        return phases[state.phase]

    def rate(self, phase: Phase) -> float:
        """Learning rate at the current step."""
        factor = optimizers.rate_factor(phase, self.epoch, self.state.epoch * self.task.num_batches + self.state.step)
        return phase.learning_rate * factor * self.state.plateau.factor * self.state.rate_scale

    def share_statistics(self) -> None:
        """Gives all processes the main one's buffers, such as BatchNorm's, which follow each one's own batches."""
        self.world.share([*self.model.buffers(), *(self.average.average if self.average else [])])

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, where the run keeps them."""
        if self.average:
            self.average.swap()
        try:
            yield
        finally:
            if self.average:
                self.average.swap()

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """The model as it is exported: with the weights that train.keep asks for."""
        if self.best is None:
            with self.averaged_weights():
                yield
            return
        live = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.best)
        try:
            yield
        finally:
            self.model.load_state_dict(live)

    def keep_best(self, objective: float) -> None:
        """Keep the model's weights, which are the averaged ones now, if no epoch had a lower validation objective."""
        if self.train.keep == "best" and objective < self.state.best_objective:
            self.state.best_objective = objective
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is old enough; only asked of a single process, whose clock is its own."""
        return self.world.size == 1 and time.monotonic() - self._saved_at > self.train.checkpoint_seconds

    def stop_is_due(self) -> bool:
        """Whether a signal asked to stop, the same answer in all processes: one that stopped alone would leave the
        others waiting. They agree as often as the guard looks, since this too waits for the device.
        """
        asked = self.stop.signal is not None
        if self.world.size == 1:
            return asked
        if self.state.position % self.guard.read_every:
            return False
        return bool(self.world.any(torch.tensor(float(asked), device=self.world.device)))

    def interruption(self) -> BaseException:
        """What ends a training that was asked to stop and has saved: Ctrl-C is the interrupt it always was."""
        if self.stop.signal == signal.SIGINT:
            return KeyboardInterrupt()
        asked = "another process" if self.stop.signal is None else signal.Signals(self.stop.signal).name
        return TrainingInterrupted(
            f"training stopped by {asked} after step {self.state.position} and saved; the same command goes on"
        )

    def save(self) -> None:
        """Replaces the checkpoint."""
        self._saved_at = time.monotonic()
        if self.world.is_main:
            average = self.average.state_dict() if self.average else None
            tensors: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            tensors |= {"average": average, "best": self.best}
            checkpoint.save(self.scratch, {"state": asdict(self.state), **tensors})
        self.world.barrier()

    def roll_back(self) -> None:
        """Back to the last checkpoint with half the learning rate."""
        rate_scale, num_rollbacks = self.state.rate_scale / 2, self.state.num_rollbacks + 1
        self.resume()
        self.state.rate_scale, self.state.num_rollbacks = rate_scale, num_rollbacks
        self.guard.reset()
        self.save()

    def resume(self) -> None:
        """Takes up the checkpoint, or writes a first one: what a rollback in the first epoch goes back to.

        Raises:
            UserError: the checkpoint is damaged, or has trained the last phase for longer than is asked now.
        """
        saved = checkpoint.load(self.scratch)
        self.world.barrier()  # all have looked before the main process writes
        if saved is None:
            self.save()
            return
        plain: dict[str, Any] = saved["state"]
        self.state = State(**{**plain, "plateau": optimizers.Plateau(**plain["plateau"])})
        phase = self.train.phases[self.state.phase]
        if self.state.epoch > phase.epochs:
            raise UserError(
                f"{self.scratch}: has trained phase {phase.name!r} for {self.state.epoch} epochs, expected at most "
                f"{phase.epochs} as train.phases now says; raise that, or remove the folder to train anew"
            )
        self.optimizer = optimizers.build_optimizer(phase, self.model.parameters())
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        best = saved["best"]
        self.best = best and {name: tensor.to(self.world.device) for name, tensor in best.items()}

    def _wrap(self, model: nn.Module) -> nn.Module:
        can = self.world.device.type == "cuda" and bool(shutil.which("cc") or shutil.which("gcc"))
        compiled = {"on": True, "off": False, "auto": can}[self.train.compile]  # triton needs a C compiler
        network = cast(nn.Module, torch.compile(model)) if compiled else model
        if self.world.size > 1:
            network = nn.parallel.DistributedDataParallel(network)
        return network
