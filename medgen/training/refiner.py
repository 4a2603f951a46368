"""Trains the refiner on the train split's images and their reconstructions, then fits its gain to the prior's samples.

medgen refiner
"""

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from medgen import config
from medgen.config import Phase, Project, Schedule, Tracking, Train, fingerprint, seed_of
from medgen.data.store import Store, open_store
from medgen.io import hash_file, write_atomic
from medgen.metrics.spectrum import radial_index, radial_power
from medgen.models import GenerativeModel, bundle
from medgen.models.base import Decoder
from medgen.models.bundle import BundleInfo
from medgen.priors import Prior, load_prior, sample_images
from medgen.priors.refiner import Refiner, load_refiner, save_none, save_refiner
from medgen.reports.figures import write_curves, write_stacks
from medgen.tracking import REFINER_ORIGIN, Tracker, history, lineage
from medgen.training import checkpoint
from medgen.training.distributed import World, join, pick_precision
from medgen.training.loader import Loader
from medgen.training.loop import train_to_end
from medgen.training.losses import Losses
from medgen.training.state import Job

NUM_SHOWN = 8
MIN_RESIDUAL = 1e-3  # a perfect decoder leaves nothing to scale
NUM_GAIN_SAMPLES = 256  # that the gain is fitted to
NUM_GAIN_IMAGES = 2048  # of the train split, at most
MAX_GAIN = 1.25  # a larger one would make faults larger, too
MIN_POWER = 1e-3  # of the standardised residual at a frequency, whose mean power is 1
# what decides the result of a training: a change there is a new one, not a resumed one
CODE = ("nn/*.py", "models/*.py", "priors/refiner.py", "training/refiner.py")
SAMPLING = {"sampling_steps", "solver", "sampling_noise", "guidance"}  # the trained network does not depend on them


def run(project: Project, *, refiner: config.Refiner, tracking: Tracking) -> Refiner | None:
    """Trains the refiner, fits its gain, writes artifacts/refiner and records it in the model's run.

    None where `refiner.enabled` is false or the model finds masks: what is written then says so, as DVC wants the
    folder.

    Raises:
        UserError: the store, the model or the prior is missing or damaged, or they do not belong together.
        NonFiniteError, TrainingInterrupted: as in `medgen train`.
    """
    with join("auto") as world:
        store = open_store(project.dataset)
        model, info = bundle.load_for(store, project.model, world.device)
        digest = bundle.digest(project.model)
        if not refiner.enabled or not isinstance(model, GenerativeModel):
            if world.is_main:
                save_none(project.refiner, digest)
                reason = "refiner.enabled is false" if not refiner.enabled else f"{info.model.name} finds masks"
                Console(highlight=False).print(f"no refiner: {reason}", markup=False)
            return None
        prior = load_prior(project.prior, digest, world.device)
        task = RefinerTask(model, store, refiner, world)
        plain = refiner.model_dump(mode="json", exclude=SAMPLING)
        scratch = project.runs / info.run / f"refiner_{fingerprint(digest, plain, code())}"
        job = Job(task, world, task.train, scratch)
        with job.stop.listening():
            if not world.is_main:
                train_to_end(job, None)
                return None
            # a refiner's epochs are not its model's: they stay in this file
            with Tracker.open(scratch, Tracking(enabled=False), project, "refiner") as tracker:
                train_to_end(job, tracker)
            with job.final_weights():
                task.refiner.gain = fit_gain(task.refiner, model, prior, store)
                save_refiner(project.refiner, task.refiner, digest)
                figure = task.draw(scratch, job.total_epochs)["refined"]
        records = history(scratch)
        series = {key: [entry[key] for entry in records] for key in ("train/loss", "val/loss")}
        write_curves(scratch / "refiner_loss.png", series, log=False, y_label="loss")
        metrics = {"refiner/train_loss": records[-1]["train/loss"], "refiner/val_loss": job.state.best_objective}
        record(project, info, refiner, tracking, metrics, [figure, scratch / "refiner_loss.png"])
        values = ", ".join(f"{key.split('/')[1].replace('_', ' ')} {value:.4f}" for key, value in metrics.items())
        Console(highlight=False).print(f"refiner: {values}", markup=False)
        return load_refiner(project.refiner, digest, world.device)


class RefinerTask:
    """A refiner on the images of the train split, validated on those of the val split."""

    def __init__(self, model: GenerativeModel, store: Store, params: config.Refiner, world: World) -> None:
        self.decoder, self.params, self.world, self.device = model, params, world, world.device
        split = store.split("train")
        self.files = split.paths
        self.loader = Loader(
            split, params.batch_size, world.device, params.seed, world.rank, world.size, params.horizontal_flip
        )
        self.num_batches, self.batch_size = self.loader.num_batches, self.loader.batch_size
        val = store.split("val")
        self.validation = Loader(val if len(val.images) else split, params.batch_size, world.device)
        self.precision = pick_precision("auto", world.device)
        num_classes = len(store.classes) if params.conditional else 0
        latent_scale = latent_deviation(model, Loader(split, params.batch_size, world.device))
        shape = store.image_shape
        flat = torch.ones(shape[0], shape[1], shape[2] // 2 + 1)
        self.refiner = Refiner.start(params, shape, num_classes, torch.ones(shape[0]), flat, latent_scale)
        loader = Loader(split, params.batch_size, world.device)
        self.refiner.residual_scale, self.refiner.spectrum = self._residual_statistics(loader)
        self.refiner.network.to(world.device)

    @property
    def model(self) -> nn.Module:
        """The refiner's network."""
        return self.refiner.network

    @property
    def train(self) -> Train:
        """One phase along a cosine; keeps the averaged weights of the epoch with the lowest validation loss."""
        params = self.params
        phase = Phase(
            name="refiner",
            epochs=params.epochs,
            learning_rate=params.learning_rate,
            weight_decay=1e-2,
            warmup_steps=100,
            schedule=Schedule(name="cosine_restarts", period=params.epochs, min_factor=0.01),
        )
        return Train(
            seed=params.seed,
            batch_size=params.batch_size,
            phases=(phase,),
            ema_decay=params.ema_decay,
            on_nonfinite="rollback",
            keep="best",
        )

    def losses(self, network: nn.Module, position: int, phase: Phase, epoch: float) -> Losses:
        """See `medgen.training.state.Task`."""
        batch = self.loader.batch(position)
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, position, self.world.rank, 1))
        return Losses(total=self._loss(network, batch.image, batch.label, generator), terms={})

    @torch.no_grad()
    def validate(self, phase: Phase) -> dict[str, float]:
        """The loss on the val split (on the train split where it is empty), with the same draws each time.

        It is the objective, too.
        """
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, 2))
        total = 0.0
        for batch in self.validation.sequential():
            total += len(batch.image) * float(self._loss(self.model, batch.image, batch.label, generator))
        loss = total / len(self.validation.images)
        return {"loss": loss, "objective": loss}

    def record(self, phase: Phase, epoch: float) -> dict[str, float]:
        """Nothing besides the loss."""
        return {}

    def draw(self, folder: Path, epoch: int) -> dict[str, Path]:
        """Validation images, their reconstructions, and those refined."""
        path = folder / "samples" / f"epoch_{epoch:04d}.png"
        batch = self.validation.gather(torch.arange(min(NUM_SHOWN, len(self.validation.images))))
        with torch.no_grad():
            decoded = self.decoder.reconstruct(batch.image, batch.label).float()
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, 3))
        levels = torch.zeros(len(decoded), device=decoded.device)
        refined = self.refiner.refine(decoded, levels, batch.label, generator)
        rows = {"original": batch.image, "reconstruction": decoded, "refined": refined}
        write_stacks(path, {name: images.cpu() for name, images in rows.items()}, columns=NUM_SHOWN)
        return {"refined": path}

    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """The images of the step at `position`, and their files."""
        batch = self.loader.batch(position)
        return batch.image, [self.files[row] for row in batch.index.tolist()]

    def _loss(self, network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        decoded, levels = self._decode_noised(images, labels, generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self.refiner.loss(network, images, decoded, levels, labels, generator)

    @torch.no_grad()
    def _decode_noised(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Decoded posterior draws (B, C, H, W) with noise of random levels (B,) on the latents."""
        latent = self.decoder.encode(images, labels)
        value = latent.mean
        if latent.logvar is not None:
            noise = torch.randn(value.shape, generator=generator).to(value.device)
            value = value + noise * torch.exp(0.5 * latent.logvar)
        levels = self.params.latent_noise * torch.rand(len(images), generator=generator).to(value.device)
        return self.decoder.decode(self.refiner.noise_latents(value, levels, generator), labels).float(), levels

    def _residual_statistics(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """Root-mean-square residual (C,) of the split, with noise on the latents as in training, and its spectrum."""
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, 4))
        variance = torch.zeros(self.refiner.image_shape[0], dtype=torch.float64)
        power = torch.zeros(self.refiner.spectrum.shape, dtype=torch.float64)
        for batch in loader.sequential():
            residual = batch.image - self._decode_noised(batch.image, batch.label, generator)[0]
            share = len(residual) / len(loader.images)
            variance += share * residual.double().square().mean((0, 2, 3)).cpu()
            power += share * torch.fft.rfft2(residual, norm="ortho").abs().square().double().mean(0).cpu()
        variance = variance.clamp_min(MIN_RESIDUAL**2)
        spectrum = (power / variance[:, None, None]).clamp_min(MIN_POWER)
        return variance.sqrt().float(), spectrum.float()


def fit_gain(refiner: Refiner, decoder: Decoder, prior: Prior, store: Store) -> Tensor:
    """Gain (H, W // 2 + 1) that gives refined samples the train split's mean power at each radial frequency.

    The mean, frequency 0, is left as it is; frequencies beyond Nyquist's, in the corners, have the gain at Nyquist's.
    """
    samples = sample_images(prior, decoder, NUM_GAIN_SAMPLES, None, seed_of(refiner.params.seed, 5), refiner=refiner)
    split = store.split("train")
    subset = NUM_GAIN_IMAGES if len(split.images) > NUM_GAIN_IMAGES else None
    loader = Loader(split, refiner.params.batch_size, torch.device("cpu"), subset=subset)
    real = torch.cat([radial_power(batch.image) for batch in loader.sequential()])
    ratio = real.mean(0) / radial_power(samples).mean(0)
    gains = torch.cat([torch.ones(1), ratio.sqrt().clamp(1.0 / MAX_GAIN, MAX_GAIN)])
    _, height, width = refiner.image_shape
    return gains[radial_index(height, width).clamp(max=len(gains) - 1)][:, : width // 2 + 1]


@torch.no_grad()
def latent_deviation(model: GenerativeModel, loader: Loader) -> Tensor:
    """Standard deviation (*latent_shape) of each dimension of a split's latents, float32 on the CPU."""
    first = torch.zeros(model.latent_shape, dtype=torch.float64)
    second, count = torch.zeros_like(first), 0
    for batch in loader.sequential():
        means = model.encode(batch.image, batch.label).mean.double().cpu()
        first, second, count = first + means.sum(0), second + means.square().sum(0), count + len(means)
    return (second / count - (first / count).square()).clamp_min(0.0).sqrt().float()


def code() -> str:
    """Hash of the code that decides what a trained refiner becomes."""
    return checkpoint.package_fingerprint(*checkpoint.TRAINING_CODE, *CODE)


def record(
    project: Project,
    info: BundleInfo,
    refiner: config.Refiner,
    tracking: Tracking,
    metrics: dict[str, float],
    figures: list[Path],
) -> None:
    """Adds parameters, metrics, refiner.json and figures to the record of the run that trained the model."""
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, info.model.name) as tracker:
        records = history(scratch)
        tracker.params({"refiner": refiner})
        tracker.metrics(metrics, step=records[-1]["step"] if records else 0)
        for path in (project.refiner / "refiner.json", *figures):
            tracker.artifact(path, "refiner")
    origin = {
        "sha256": hash_file(project.refiner / "refiner.json"),
        "lineage": lineage(project, refiner),
    }
    write_atomic(scratch / REFINER_ORIGIN, f"{json.dumps(origin, indent=2)}\n".encode())
