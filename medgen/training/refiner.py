"""Stage `refiner`: train the refiner on reconstructions of the train split, then fit its gain on samples of the prior.

medgen refiner
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen import config, source
from medgen.config import Phase, Project, Tracking, fingerprint, seed_of
from medgen.console import say
from medgen.data.store import Split, Store, open_store
from medgen.errors import UserError
from medgen.metrics.spectrum import radial_index, radial_power
from medgen.models import GenerativeModel, bundle
from medgen.models.base import Decoder
from medgen.nn.parallel import rand, randn
from medgen.priors import Prior, load_prior, sample_images
from medgen.priors.axes import LatentArray, chunks
from medgen.priors.refiner import Refiner, load_refiner, save_disabled, save_refiner
from medgen.reports.figures import write_stacks
from medgen.tracking import REFINER_ORIGIN
from medgen.training.distributed import World, join, pick_precision
from medgen.training.latents import encode_dataset
from medgen.training.loader import Batch, Loader
from medgen.training.parts import draw_losses, one_phase, record, trained
from medgen.training.state import TrainingTask

NUM_SHOWN = 8
MIN_RESIDUAL = 1e-3  # a perfect decoder leaves nothing to scale
# by the number of sides of an image or volume: samples that the gain is fitted on, and how many are drawn at a time
GAIN_SAMPLES = {2: (256, 64), 3: (64, 4)}
NUM_GAIN_IMAGES = 2048  # train images that they are compared with, at most
MAX_GAIN = 1.25  # a larger gain would also amplify artefacts
MIN_RADIAL_POWER = 1e-12  # of a frequency in train images and samples: blank images have none
MIN_POWER = 1e-3  # of the standardised residual at a frequency, whose mean power is 1
MAX_VOXELS = 1 << 23  # of a volume, which the network takes as a whole; no image has as many pixels
# source files that decide the trained weights
CODE = (
    "data/conditions.py",
    "nn/*.py",
    "models/*.py",
    "priors/refiner.py",
    "training/latents.py",
    "training/refiner.py",
)
# parameters that the trained network does not depend on
SAMPLING = {"sampling_steps", "solver", "sampling_noise", "guidance"}


def run(project: Project, *, refiner: config.Refiner, tracking: Tracking) -> Refiner | None:
    """Train the refiner, fit its gain, write artifacts/refiner and record it in the model's run.

    Returns:
        The refiner; None if `refiner.enabled` is false or for a segmentation model (refiner.json then says so).

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
                save_disabled(project.refiner, digest)
                reason = "refiner.enabled is false" if not refiner.enabled else f"{info.model.name} finds masks"
                say(f"no refiner: {reason}")
            return None
        if math.prod(store.image_shape) > MAX_VOXELS:
            shown = " x ".join(map(str, store.image_shape[1:]))
            raise UserError(
                f"refiner.enabled: true, but the dataset has volumes of {shown}, and the refiner trains on whole "
                f"volumes of at most {MAX_VOXELS:,} voxels, such as 192 x 192 x 192; set it to false, or choose a "
                "smaller preprocess.image_size"
            )
        prior = load_prior(project.prior, digest, world.device)
        latents = encode_dataset(store, model, digest, project.runs / info.run, world)[0].means
        task = RefinerTask(model, store, latent_deviation(latents), refiner, world)
        plain = refiner.model_dump(mode="json", exclude=SAMPLING)
        scratch = project.runs / info.run / f"refiner_{fingerprint(digest, plain, code())}"
        with trained(task, world, scratch, project, "refiner") as state:
            if not world.is_main:
                return None
            task.refiner.gain = fit_gain(task.refiner, model, prior, store)
            save_refiner(project.refiner, task.refiner, digest)
            figure = task.draw(scratch, state.total_epochs)["refined"]
        curves = scratch / "refiner_loss.png"
        losses = {"train loss": draw_losses(scratch, curves), "val loss": state.counters.best_objective}
        metrics = {f"refiner/{name.replace(' ', '_')}": value for name, value in losses.items()}
        description = project.refiner / "refiner.json"
        record(project, info, tracking, refiner, description, metrics, [figure, curves], REFINER_ORIGIN)
        values = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        say(f"refiner: {values}")
        return load_refiner(project.refiner, digest, world.device)


class RefinerTask(TrainingTask):
    """Train a refiner on the images of the train split and validate it on those of the val split."""

    def __init__(
        self, model: GenerativeModel, store: Store, latent_scale: Tensor, params: config.Refiner, world: World
    ) -> None:
        self.decoder, self.params, self.world, self.device = model, params, world, world.device
        split = store.split("train")
        self.split = split
        space = store.conditions if params.conditional else None
        self.with_conditions = space is not None or model.space is not None
        self.loader = Loader(
            split, params.batch_size, world.device, params.seed, world.rank, world.size, params.horizontal_flip,
            with_conditions=self.with_conditions,
        )  # fmt: skip
        world.check_batch_size("refiner", self.loader.batch_size, self.loader.num_images)
        self.num_batches, self.batch_size = self.loader.num_batches, self.loader.batch_size
        val = store.split("val")
        self.validation = self._loader(val if len(val.images) else split)
        self.precision = pick_precision("auto", world.device)
        num_classes = len(store.classes) if params.conditional else 0
        shape = store.image_shape
        flat = torch.ones(*shape[:-1], shape[-1] // 2 + 1)
        self.refiner = Refiner.create(params, shape, num_classes, torch.ones(shape[0]), flat, latent_scale, space)
        self.refiner.residual_scale, self.refiner.spectrum = self._residual_statistics(self._loader(split))
        self.model = self.refiner.network.to(world.device)
        self.train = one_phase(params, "refiner", 100, 0.01, ema_decay=params.ema_decay, keep="best")

    def batch(self, position: int) -> tuple[Any, ...]:
        """Images, decoded latents, noise levels, labels, the generator of the step's random draws, and conditions."""
        batch = self.loader.batch(position)
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, position, 0, 1))
        return batch.image, *self._decode_noised(batch, generator), batch.label, generator, batch.conditions

    def forward(self, network: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Loss of the refiner, in bf16 on devices that support it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self.refiner.loss(network, *batch)

    @torch.no_grad()
    def validate(self, phase: Phase) -> dict[str, float]:
        """Loss on the val split (on the train split if that is empty), with the same random draws each time."""
        total = 0.0
        for batch in self.validation.sequential():
            generator = batch.generator(self.params.seed, 2)
            noised = self._decode_noised(batch, generator)
            loss = self.forward(self.model, (batch.image, *noised, batch.label, generator, batch.conditions))
            total += len(batch.image) * float(loss)
        mean = self.world.sum_of({"loss": total})["loss"] / self.validation.num_images
        return {"loss": mean, "objective": mean}

    def draw(self, folder: Path, epoch: int) -> dict[str, Path]:
        """Write a figure of validation images, their reconstructions and the refined reconstructions."""
        path = folder / "samples" / f"epoch_{epoch:04d}.png"
        batch = self.validation.gather(torch.arange(min(NUM_SHOWN, self.validation.num_images)))
        with torch.no_grad():
            decoded = self.decoder.reconstruct(batch.image, batch.label, batch.conditions).float()
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, 3))
        levels = torch.zeros(len(decoded), device=decoded.device)
        refined = self.refiner.refine(decoded, levels, batch.label, generator, batch.conditions)
        rows = {"original": batch.image, "reconstruction": decoded, "refined": refined}
        write_stacks(path, {name: images.cpu() for name, images in rows.items()}, columns=NUM_SHOWN)
        return {"refined": path}

    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """Images of the step at `position`, and their files."""
        batch, files = self.loader.batch(position), self.split.paths
        return batch.image, [files[row] for row in batch.index.tolist()]

    def _loader(self, split: Split) -> Loader:
        """This process's part of a split, in order."""
        return Loader(
            split, self.params.batch_size, self.device, rank=self.world.rank, world=self.world.size,
            with_conditions=self.with_conditions,
        )  # fmt: skip

    @torch.no_grad()
    def _decode_noised(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Decoded posterior draws (B, C, H, W) with noise of random levels (B,) on the latents."""
        latent = self.decoder.encode(batch.image, batch.label, batch.conditions)
        value = latent.mean
        if latent.logvar is not None:
            noise = randn(*value.shape, generator=generator).to(value.device)
            value = value + noise * torch.exp(0.5 * latent.logvar)
        levels = self.params.latent_noise * rand(len(value), generator=generator).to(value.device)
        noised = self.refiner.noise_latents(value, levels, generator)
        return self.decoder.decode(noised, batch.label, batch.conditions).float(), levels

    def _residual_statistics(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """RMS residual (C,) of a split, with noise on the latents as in training, and its power spectrum."""
        variance = torch.zeros(self.refiner.image_shape[0], dtype=torch.float64)
        power = torch.zeros(self.refiner.spectrum.shape, dtype=torch.float64)
        for batch in loader.sequential():
            generator = batch.generator(self.params.seed, 4)
            residual = batch.image - self._decode_noised(batch, generator)[0]
            weight, axes = len(residual) / loader.num_images, tuple(range(2, residual.dim()))
            variance += weight * residual.double().square().mean((0, *axes)).cpu()
            power += weight * torch.fft.rfftn(residual, dim=axes, norm="ortho").abs().square().double().mean(0).cpu()
        variance, power = self.world.sum(variance).clamp_min(MIN_RESIDUAL**2), self.world.sum(power)
        spectrum = (power / variance.view(-1, *[1] * (power.dim() - 1))).clamp_min(MIN_POWER)
        return variance.sqrt().float(), spectrum.float()


def fit_gain(refiner: Refiner, decoder: Decoder, prior: Prior, store: Store) -> Tensor:
    """Gain (H, W // 2 + 1) that gives refined samples the train split's mean power at each radial frequency.

    Frequency 0, the mean, keeps a gain of 1. Frequencies above the Nyquist frequency (in the corners) have its gain.
    """
    _, *sides = refiner.image_shape
    count, size = GAIN_SAMPLES[len(sides)]
    samples = sample_images(prior, decoder, count, None, seed_of(refiner.params.seed, 5), size, refiner)
    split = store.split("train")
    subset = NUM_GAIN_IMAGES if len(split.images) > NUM_GAIN_IMAGES else None
    loader = Loader(split, refiner.params.batch_size, torch.device("cpu"), subset=subset)
    real = torch.cat([radial_power(batch.image) for batch in loader.sequential()])
    drawn = radial_power(samples)
    ratio = real.mean(0).clamp_min(MIN_RADIAL_POWER) / drawn.mean(0).clamp_min(MIN_RADIAL_POWER)
    gains = torch.cat([torch.ones(1), ratio.sqrt().clamp(1.0 / MAX_GAIN, MAX_GAIN)])
    return gains[radial_index(*sides).clamp(max=len(gains) - 1)][..., : sides[-1] // 2 + 1]


def latent_deviation(latents: LatentArray) -> Tensor:
    """Standard deviation (*latent_shape) of each dimension of the latents (N, *latent_shape), float32 on the CPU."""
    first = torch.zeros(latents.shape[1:], dtype=torch.float64)
    second = torch.zeros_like(first)
    for _, part in chunks(latents):
        first, second = first + part.double().sum(0), second + part.double().square().sum(0)
    first, second = first / len(latents), second / len(latents)
    return (second - first.square()).clamp_min(0.0).sqrt().float()


def code() -> str:
    """Hash of the code that decides the trained weights of a refiner."""
    return source.fingerprint(*source.TRAINING, *CODE)
