"""A training's whole state: built from the parameters, saved, resumed, rolled back, exported."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import medgen
from medgen import bundle, checkpoint, optim
from medgen.config import Loss, Model, Phase, Project, Tracking, Train, fingerprint
from medgen.data.loader import Loader
from medgen.data.store import Split, open_store
from medgen.data.weights import weights_path
from medgen.distributed import StopRequest, World, pick_precision
from medgen.errors import TrainingInterrupted, UserError
from medgen.files import write_atomic
from medgen.guard import Guard
from medgen.losses import Objective, beta_at
from medgen.models import GenerativeModel, build_model
from medgen.tracking import Tracker, lineage
from medgen.types import Batch, ModelOutput

# what decides the result of a training: a change there is a new run, not a resumed one
CODE = ("models/*.py", "losses.py", "optim.py", "guard.py", "job.py", "train.py", "data/loader.py")
NOT_IN_FINGERPRINT = {"sample_every", "checkpoint_seconds", "on_nonfinite", "max_rollbacks", "device"}


@dataclass
class State:
    """Where the training is: with the tensors, all that a checkpoint holds."""

    phase: int = 0
    epoch: int = 0  # within the phase
    step: int = 0  # within the epoch
    position: int = 0  # steps since the start of the run
    rate_scale: float = 1.0  # halved by every rollback
    num_rollbacks: int = 0
    plateau: optim.Plateau = field(default_factory=optim.Plateau)
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
    """Everything a training holds, resumed from its scratch folder where that has a checkpoint."""

    def __init__(self, project: Project, world: World, model: Model, loss: Loss, train: Train) -> None:
        self.project, self.world, self.train, self.loss = project, world, train, loss
        self.params = model
        self.store = open_store(project.dataset)
        train_split, val_split = self.store.split("train"), self.store.split("val")
        self.train_files = train_split.paths
        if train.batch_size % world.size or (world.size > 1 and len(train_split.images) < train.batch_size):
            raise UserError(
                f"train.batch_size: {train.batch_size} images are shared by {world.size} processes; expected a "
                f"multiple of {world.size}, and no more than the {len(train_split.images)} of the train split"
            )
        if not len(val_split.images):
            raise UserError(
                f"{project.dataset}: the val split is empty, and training is watched on it; "
                "raise preprocess.val_fraction or bring more images"
            )
        torch.manual_seed(train.seed)
        self.mask_classes = self.store.preprocess.mask_classes
        classes = len(self.store.classes)
        self.model = build_model(model, self.store.image_shape, classes, self.mask_classes).to(world.device)
        with_masks = self.model.target == "mask"
        if with_masks:
            self._check_masks(train_split, val_split)
        self.loader = Loader(
            train_split, train.batch_size, world.device, train.seed, world.rank, world.size,
            train.horizontal_flip, train.subset, with_masks,
        )  # fmt: skip
        self.validation = Loader(val_split, 2 * train.batch_size, world.device, with_masks=with_masks)
        self.model.to(memory_format=torch.channels_last)
        latent_shape = self.model.latent_shape if isinstance(self.model, GenerativeModel) else ()
        self.latent_numel = int(torch.Size(latent_shape).numel())
        self.objective = Objective(loss, self.store.image_shape, self._vgg16()).to(world.device)
        self.network = self._wrap(self.model)
        self.precision = pick_precision(train.precision, world.device)
        self.average = optim.AveragedWeights(self.model, train.ema_decay) if train.ema_decay else None
        self.guard = Guard(world.device, world.any)
        self.stop = StopRequest()
        self.fingerprint = run_fingerprint(self.store.fingerprint, model, loss, train)
        self.scratch = project.runs / self.fingerprint
        self.state = State()
        self.optimizer = optim.build_optimizer(train.phases[0], self.model.parameters())
        self._saved_at = time.monotonic()

    @property
    def total_epochs(self) -> int:
        """Over all phases."""
        return sum(phase.epochs for phase in self.train.phases)

    @property
    def epochs_done(self) -> int:
        """Over all phases, whole ones."""
        return self.state.position // self.loader.num_batches

    @property
    def drawn_epochs(self) -> list[int]:
        """The epochs that leave sample and reconstruction grids: the first, the last, and every so many."""
        every = range(self.train.sample_every, self.total_epochs, self.train.sample_every)
        return sorted({1, *every, self.total_epochs})

    def phase(self) -> Phase | None:
        """The phase the next epoch belongs to; None at the end of the last.

        A new phase has a new optimizer and a new plateau; weights and averages stay.
        """
        state, phases = self.state, self.train.phases
        while state.phase < len(phases) and state.epoch >= phases[state.phase].epochs:
            state.phase, state.epoch, state.plateau = state.phase + 1, 0, optim.Plateau()
            if state.phase < len(phases):
                self.optimizer = optim.build_optimizer(phases[state.phase], self.model.parameters())
        return phases[state.phase] if state.phase < len(phases) else None

    def forward(self, network: nn.Module, batch: Batch) -> ModelOutput:
        """The network's output for a batch, in the run's precision."""
        with self.autocast():
            output: ModelOutput = network(batch.image.contiguous(memory_format=torch.channels_last), batch.label)
        return output

    def target(self, batch: Batch) -> Tensor:
        """What the network's output is compared with: the images (B, C, H, W), or the masks.

        A mask of 0 and 1 is (B, 1, H, W), one of K classes (B, K, H, W): 1 in the channel of its class.
        """
        if self.model.target == "image":
            return batch.image
        assert batch.mask is not None, "the loader brings masks for a model that learns them"
        if self.mask_classes == 2:
            return batch.mask
        one_hot = F.one_hot(batch.mask[:, 0].long(), self.mask_classes)  # (B, H, W, K)
        return one_hot.permute(0, 3, 1, 2).float()

    def autocast(self) -> torch.autocast:
        """bf16 where the run uses it; a no-op in float32."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def beta(self, phase: Phase) -> float:
        """β at the current step."""
        return beta_at(phase.beta, self.state.epoch + self.state.step / self.loader.num_batches)

    def rate(self, phase: Phase) -> float:
        """Learning rate at the current step."""
        steps = self.state.epoch * self.loader.num_batches + self.state.step
        factor = optim.rate_factor(phase, steps / self.loader.num_batches, steps)
        return phase.learning_rate * factor * self.state.plateau.factor * self.state.rate_scale

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
            tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            average = self.average.state_dict() if self.average else None
            checkpoint.save(self.scratch, {"state": asdict(self.state), "average": average, **tensors})
        self.world.barrier()

    def roll_back(self) -> None:
        """Back to the last checkpoint with half the learning rate."""
        rate_scale, num_rollbacks = self.state.rate_scale / 2, self.state.num_rollbacks + 1
        self.resume()
        self.state.rate_scale, self.state.num_rollbacks = rate_scale, num_rollbacks
        self.guard.reset()
        self.save()

    @contextmanager
    def record(self, tracking: Tracking) -> Iterator[Tracker | None]:
        """The run's log, opened with all that the run is made from; None in processes other than the main one."""
        if not self.world.is_main:
            yield None
            return
        name = f"{self.params.name}-{self.store.image_shape[1]}-{self.fingerprint[:6]}"
        with Tracker.open(self.scratch, tracking, self.project, name) as tracker:
            sections = {"model": self.params, "loss": self.loss, "train": self.train}
            everything = {**sections, "preprocess": self.store.preprocess}
            tracker.params(everything)
            plain = {name: section.model_dump(mode="json") for name, section in everything.items()}
            write_atomic(self.scratch / "params.json", f"{json.dumps(plain, indent=2)}\n".encode())
            precision = "bf16" if self.precision == torch.bfloat16 else "fp32"
            tracker.tags(lineage(self.project, *sections.values(), device=str(self.world.device), precision=precision))
            tracker.tags({"medgen.run": self.fingerprint})
            tracker.note(self._describe())
            tracker.dataset(self.store.name, self.store.fingerprint, "artifacts/dataset", self.store.counts)
            yield tracker

    def export(self) -> None:
        """Writes artifacts/model."""
        info = bundle.BundleInfo(
            model=self.params,
            preprocess=self.store.preprocess,
            image_shape=self.store.image_shape,
            classes=self.store.classes,
            dataset=self.store.fingerprint,
            run=self.fingerprint,
            torch=torch.__version__,
        )
        with self.averaged_weights():
            bundle.save(self.project.model, self.model, info)

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
        self.state = State(**{**plain, "plateau": optim.Plateau(**plain["plateau"])})
        phase = self.train.phases[self.state.phase]
        if self.state.epoch > phase.epochs:
            raise UserError(
                f"{self.scratch}: has trained phase {phase.name!r} for {self.state.epoch} epochs, expected at most "
                f"{phase.epochs} as train.phases now says; raise that, or remove the folder to train anew"
            )
        self.optimizer = optim.build_optimizer(phase, self.model.parameters())
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])

    def _describe(self) -> str:
        """The run in a few words of Markdown, for its page."""
        channels, height, width = self.store.image_shape
        makes = f"masks of {self.mask_classes} classes"
        if isinstance(self.model, GenerativeModel):
            makes = f"a latent of {'×'.join(map(str, self.model.latent_shape))}"
        phases = ", ".join(f"{phase.name} ({phase.epochs} epochs)" for phase in self.train.phases)
        counts = ", ".join(f"{count} {name}" for name, count in self.store.counts.items())
        return (
            f"**{self.params.name}** of {channels}×{height}×{width} images with {makes}. "
            f"Data: {self.store.name} {self.store.fingerprint} ({counts}; "
            f"classes: {', '.join(self.store.classes) or 'none'}). Phases: {phases}."
        )

    def _check_masks(self, train: Split, val: Split) -> None:
        if not len(train.masked_rows) or not len(val.masked_rows):
            raise UserError(
                f"model.name: {self.params.name} learns masks; {self.project.dataset} has {len(train.masked_rows)} in "
                f"train and {len(val.masked_rows)} in val; expected masks beside the images (docs/data.md), or another "
                "model"
            )
        weights = [self.loss.weights, *(phase.weights for phase in self.train.phases if phase.weights)]
        if any(getattr(each, name) > 0 for each in weights for name in ("ssim", "perceptual", "sigma")):
            raise UserError(
                f"loss.weights: ssim, perceptual and sigma compare pictures, and {self.params.name} learns masks; "
                "expected bce, dice or both, such as {bce: 1.0, dice: 1.0}"
            )

    def _vgg16(self) -> Path | None:
        phases = [phase.weights for phase in self.train.phases if phase.weights]
        wanted = any(weights.perceptual > 0 for weights in [self.loss.weights, *phases])
        return weights_path("vgg16") if wanted else None

    def _wrap(self, model: nn.Module) -> nn.Module:
        can = self.world.device.type == "cuda" and bool(shutil.which("cc") or shutil.which("gcc"))
        compiled = {"on": True, "off": False, "auto": can}[self.train.compile]  # triton needs a C compiler
        network = cast(nn.Module, torch.compile(model)) if compiled else model
        if self.world.size > 1:
            network = nn.parallel.DistributedDataParallel(network)
        return network


def run_fingerprint(dataset: str, model: Model, loss: Loss, train: Train) -> str:
    """Names a run by what decides its weights: data, model, loss, optimizer, order, code; not its length.

    The last phase may grow: its number of epochs is left out, so a longer run resumes a shorter one.
    """
    plain = train.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT)
    del plain["phases"][-1]["epochs"]
    folder = Path(medgen.__file__).parent
    code = checkpoint.code_fingerprint(source for pattern in CODE for source in folder.glob(pattern))
    return fingerprint(dataset, model, loss, plain, code)
