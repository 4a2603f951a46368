"""Everything that a training holds between two steps: saved, resumed and rolled back as one."""

import math
import shutil
import signal
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medgen.config import Phase, Train, seed_of
from medgen.errors import TrainingInterrupted, UserError
from medgen.nn.parallel import BatchPart, batch_part
from medgen.training import checkpoint
from medgen.training.distributed import StopRequest, World
from medgen.training.guard import Guard
from medgen.training.losses import Losses
from medgen.training.optimizers import AveragedWeights, Plateau, build_optimizer, rate_factor


class TrainingTask(ABC):
    """A model, its batches and its objective.

    Each method is a pure function of its arguments and of torch's global generator, which the loop seeds at each step,
    so that a resumed training repeats an uninterrupted one.
    """

    num_batches: int  # steps in an epoch
    batch_size: int  # over all processes
    train: Train  # phases, optimizer and policies
    model: nn.Module  # the network that is trained, on its device

    @abstractmethod
    def batch(self, position: int) -> Any:
        """Input of the step at `position`, counted from the start of the training."""

    @abstractmethod
    def forward(self, network: nn.Module, batch: Any) -> Any:
        """Output for a batch; `network` is the model, which may be compiled."""

    def objective(self, output: Any, batch: Any, phase: Phase, epoch: float) -> Losses:
        """Loss of an output, `epoch` epochs (with a fraction) into the phase; by default the output itself."""
        return Losses(total=output, terms={})

    @abstractmethod
    def validate(self, phase: Phase) -> dict[str, float]:
        """Metrics of the whole validation split, the same in all processes, without randomness; one is `objective`.

        The lower objective is better: it decides which epoch `train.keep: best` keeps, and the plateau schedule. It is
        the same function of the weights in all epochs of a phase.
        """

    def scalars(self, phase: Phase, epoch: float) -> dict[str, float]:
        """Values to log besides losses and learning rate, such as β."""
        return {}

    def draw(self, folder: Path, epoch: int) -> dict[str, Path]:
        """Write image grids of the epoch below `folder`; return their paths by name."""
        return {}

    @abstractmethod
    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """Input tensor of the step at `position`, and the files it comes from."""


@dataclass
class Counters:
    """Progress of a training, without its tensors."""

    phase: int = 0
    epoch: int = 0  # within the phase
    step: int = 0  # within the epoch
    position: int = 0  # steps since the start of the training
    rate_scale: float = 1.0  # halved by every rollback
    num_rollbacks: int = 0
    best_objective: float = math.inf  # lowest of this phase's epochs, if train.keep is "best"
    plateau: Plateau = field(default_factory=Plateau)
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's logged scalars


class Meter:
    """Sums of an epoch's scalars, kept on the device: reading them at each step would wait for it."""

    def __init__(self, sums: dict[str, float]) -> None:
        self.names = tuple(sums)
        self.total = torch.tensor(list(sums.values()), dtype=torch.float64) if sums else None

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one step's scalars, whose names are the same at every step of an epoch."""
        self.names = tuple(scalars)
        values = torch.stack([scalar.double() for scalar in scalars.values()])
        self.total = values if self.total is None else self.total.to(values.device) + values

    def sums(self) -> dict[str, float]:
        """Name to sum, read from the device."""
        return {} if self.total is None else dict(zip(self.names, self.total.tolist(), strict=True))


def channels_last(model: nn.Module) -> torch.memory_format:
    """Memory format of a network's images or volumes in which the channels of a pixel are adjacent."""
    has_volumes = any(parameter.dim() == 5 for parameter in model.parameters())
    return torch.channels_last_3d if has_volumes else torch.channels_last


class TrainState:
    """Model, optimizer, averaged weights, best weights and counters of a task.

    Args:
        task: what is trained.
        world: this process among those that train.
        scratch: folder of the checkpoint, which `resume` reads if there is one.
    """

    def __init__(self, task: TrainingTask, world: World, scratch: Path) -> None:
        self.task, self.world, self.scratch, self.train = task, world, scratch, task.train
        self.model = task.model
        self.model.to(memory_format=channels_last(self.model))
        self.network = self._wrap(self.model)
        self.average = AveragedWeights(self.model, self.train.ema_decay) if self.train.ema_decay else None
        self.best: dict[str, Tensor] | None = None  # weights of the epoch with `counters.best_objective`
        self.guard = Guard(world.device, world.any)
        self.stop = StopRequest()
        self.counters = Counters()
        self.optimizer = build_optimizer(self.train.phases[0], self.model.parameters())
        self._saved_at = time.monotonic()

    @property
    def total_epochs(self) -> int:
        """Number of epochs over all phases."""
        return sum(phase.epochs for phase in self.train.phases)

    @property
    def epochs_done(self) -> int:
        """Number of whole epochs trained, over all phases."""
        return self.counters.position // self.task.num_batches

    @property
    def drawn_epochs(self) -> list[int]:
        """Epochs with image grids: the first, the last, and every `train.sample_every`-th."""
        every = range(self.train.sample_every, self.total_epochs, self.train.sample_every)
        return sorted({1, *every, self.total_epochs})

    def epoch_at(self, step: int) -> float:
        """Epochs (with a fraction) from the start of the phase to a step of the current epoch."""
        return self.counters.epoch + step / self.task.num_batches

    def rate_at(self, step: int, phase: Phase) -> float:
        """Learning rate at a step of the current epoch."""
        counters = self.counters
        factor = rate_factor(phase, self.epoch_at(step), counters.epoch * self.task.num_batches + step)
        return phase.learning_rate * factor * counters.plateau.factor * counters.rate_scale

    def next_phase(self) -> Phase | None:
        """Phase of the next epoch; None after the last.

        A new phase starts with a new optimizer, plateau and best epoch; weights and averages continue.
        """
        counters, phases = self.counters, self.train.phases
        while counters.epoch >= phases[counters.phase].epochs:
            if counters.phase == len(phases) - 1:
                return None
            counters.phase, counters.epoch, counters.plateau = counters.phase + 1, 0, Plateau()
            counters.best_objective, self.best = math.inf, None
            self.optimizer = build_optimizer(phases[counters.phase], self.model.parameters())
        return phases[counters.phase]

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, if the training keeps them."""
        if self.average:
            self.average.swap()
        try:
            yield
        finally:
            if self.average:
                self.average.swap()

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """The model with the weights to export, as `train.keep` says."""
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
        """Keep the model's present weights, the averaged ones, if no epoch had a lower validation objective."""
        if self.train.keep == "best" and objective < self.counters.best_objective:
            self.counters.best_objective = objective
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def due(self) -> tuple[bool, bool]:
        """Two flags: a signal asked to stop, and the checkpoint is older than `train.checkpoint_seconds`.

        They are those of any process: one that stopped alone would leave the others waiting. Processes agree as often
        as the guard reads its flag, because this waits for the device too.
        """
        stop = self.stop.signal is not None
        save = time.monotonic() - self._saved_at > self.train.checkpoint_seconds
        if self.world.size > 1:
            if self.counters.position % self.guard.read_every:
                return False, False
            flags = self.world.any(torch.tensor([stop, save], dtype=torch.float32, device=self.world.device))
            stop, save = flags.bool().tolist()
        return stop, save

    def interruption(self) -> BaseException:
        """Exception that ends a training which was asked to stop: KeyboardInterrupt after Ctrl-C."""
        if self.stop.signal == signal.SIGINT:
            return KeyboardInterrupt()
        name = "another process" if self.stop.signal is None else signal.Signals(self.stop.signal).name
        return TrainingInterrupted(
            f"training stopped by {name} after step {self.counters.position} and saved; run the same command to resume"
        )

    def backward(self, network: nn.Module, position: int, phase: Phase, epoch: float) -> Losses:
        """Compute the losses and gradients of a step, of `train.accumulate_steps` parts of its batch in turn.

        Args:
            network: `self.network`, or another that is called with a batch.
            position: the step, counted from the start of the training.
            phase: its phase.
            epoch: epochs (with a fraction) from the start of the phase.
        """
        task, world, num_parts = self.task, self.world, self.train.accumulate_steps
        seed = seed_of(self.train.seed, position, 0)
        torch.manual_seed(seed)
        with batch_part(BatchPart(world.rank, world.size, world.size)):
            share = task.batch(position)
        network.zero_grad(set_to_none=True)
        losses: list[Losses] = []
        for number in range(num_parts):
            torch.manual_seed(seed)  # each part makes the draws of the whole batch and keeps its own
            batch = share if num_parts == 1 else share.part(number, num_parts)
            inner = isinstance(network, DistributedDataParallel) and number < num_parts - 1
            exchange = cast(DistributedDataParallel, network).no_sync() if inner else nullcontext()
            part = BatchPart(world.rank + number * world.size, num_parts * world.size, world.size)
            with batch_part(part), exchange:
                losses.append(task.objective(network(batch), batch, phase, epoch))
                (losses[-1].total / num_parts).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        terms = {name: torch.stack([part.terms[name] for part in losses]).mean(0) for name in losses[0].terms}
        return Losses(torch.stack([part.total.detach() for part in losses]).mean(0), terms)

    def save(self) -> None:
        """Replace the checkpoint."""
        self._saved_at = time.monotonic()
        if self.world.is_main:
            tensors = {name: part.state_dict() for name, part in self._parts().items()}
            checkpoint.save(self.scratch, {"counters": asdict(self.counters), "best": self.best, **tensors})
        self.world.barrier()

    def roll_back(self) -> None:
        """Return to the last checkpoint with half the learning rate."""
        rate_scale, num_rollbacks = self.counters.rate_scale / 2, self.counters.num_rollbacks + 1
        self.resume()
        self.counters.rate_scale, self.counters.num_rollbacks = rate_scale, num_rollbacks
        self.guard.reset()
        self.save()

    def resume(self) -> None:
        """Load the checkpoint, or write a first one for a rollback in the first epoch.

        Raises:
            UserError: the checkpoint is damaged, or has trained the last phase for more epochs than `train` asks for.
        """
        saved = checkpoint.load(self.scratch)
        self.world.barrier()  # all have looked before the main process writes
        if saved is None:
            self.save()
            return
        counters: dict[str, Any] = saved["counters"]
        self.counters = Counters(**{**counters, "plateau": Plateau(**counters["plateau"])})
        phase = self.train.phases[self.counters.phase]
        if self.counters.epoch > phase.epochs:
            raise UserError(
                f"{self.scratch}: trained phase {phase.name!r} for {self.counters.epoch} epochs, expected at most "
                f"{phase.epochs}, the phase's number of epochs; raise that, or remove the folder to train anew"
            )
        best = saved["best"]
        self.best = best and {name: tensor.to(self.world.device) for name, tensor in best.items()}
        self.optimizer = build_optimizer(phase, self.model.parameters())
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])

    def _parts(self) -> dict[str, Any]:
        """Parts with a state dict that a checkpoint holds, besides counters and best weights."""
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def _wrap(self, model: nn.Module) -> nn.Module:
        can = self.world.device.type == "cuda" and bool(shutil.which("cc") or shutil.which("gcc"))
        compiled = {"on": True, "off": False, "auto": can}[self.train.compile]  # triton needs a C compiler
        network = Forward(self.task, cast(nn.Module, torch.compile(model)) if compiled else model)
        if self.world.size == 1:
            return network
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # torch 2.15 has another name for it
            # buffers are alike in all processes already (medgen/nn/parallel.py)
            return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


class Forward(nn.Module):
    """A task's forward pass as a module, which DistributedDataParallel can wrap."""

    def __init__(self, task: TrainingTask, network: nn.Module) -> None:
        super().__init__()
        self.task, self.network = task, network

    def forward(self, batch: Any) -> Any:
        """Output of the task for a batch."""
        return self.task.forward(self.network, batch)
