"""Stage `prior`: fit or train the distribution of a trained model's latents.

medgen prior
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen import config, source
from medgen.config import Phase, Project, Tracking, fingerprint, seed_of, unknown_name
from medgen.console import say, warn
from medgen.data.conditions import ConditionSpace
from medgen.data.store import open_store
from medgen.errors import UserError
from medgen.io import to_json, write_folder
from medgen.models import GenerativeModel, bundle
from medgen.models.bundle import BundleInfo
from medgen.nn.conditions import read_conditions
from medgen.priors import ANALYTIC, NEURAL, PRIORS, AnalyticPrior, Prior, sample_images, save_prior
from medgen.priors.axes import chunks
from medgen.priors.gmm import RARE
from medgen.priors.neural import NeuralPrior
from medgen.reports.figures import write_grid
from medgen.tracking import PRIOR_ORIGIN
from medgen.training.distributed import World, join
from medgen.training.latents import BATCH_SIZE, Encoded, encode_dataset
from medgen.training.parts import draw_losses, one_phase, record, trained
from medgen.training.state import TrainingTask, TrainState

STEPS_PER_EPOCH = 100  # of a network on latents: one pass over a small split would be too short for an epoch
NUM_DRAWS = 8  # for each validation latent: the loss depends on random draws
NUM_SAMPLES = 36
CODE = (
    "data/conditions.py",
    "nn/*.py",
    "priors/*.py",
    "training/latents.py",
    "training/prior.py",
)  # source files that decide the trained weights
SAMPLING = {"sampling_steps", "solver", "guidance"}  # parameters that the trained network does not depend on


def run(project: Project, *, prior: config.Prior, tracking: Tracking) -> Prior | None:
    """Encode the train split, fit or train the prior, write artifacts/prior and record it in the model's run.

    Returns:
        The prior; None for a segmentation model, which has no latent (prior.json then says so), and in processes other
        than the main one.

    Raises:
        UserError: the store or the model is missing or damaged, they do not belong together, or the
            latents cannot be fitted.
        NonFiniteError, TrainingInterrupted: as in `medgen train`, for a prior with a network.
    """
    if prior.name is not None and prior.name not in PRIORS:
        raise unknown_name("prior.name", prior.name, PRIORS)
    with join("auto") as world:
        store = open_store(project.dataset)
        model, info = bundle.load_for(store, project.model, world.device)
        if not isinstance(model, GenerativeModel):
            if world.is_main:
                write_none(project, info)
            return None
        space = store.conditions if prior.conditional else None
        name = prior.name or default_prior(model, space)
        if space is not None and name in ANALYTIC and model.space is None:
            raise UserError(
                f"preprocess.conditions: prior.name {name} takes only the class; set prior.name to one of "
                f"{', '.join(NEURAL)}, or prior.conditional to false"
            )
        flat_volumes = store.preprocess.has_volumes and len(model.latent_shape) == 1
        if space is not None and space.map_channels and name in NEURAL and flat_volumes:
            raise UserError(
                f"preprocess.conditions: {', '.join(space.map_fields)} of volumes need a latent with a grid, and the "
                f"latent of model.name {info.model.name} is flat; expected another model, such as spatial_vae, or "
                "prior.conditional: false"
            )
        digest, classes = bundle.digest(project.model), store.classes
        train, val = encode_dataset(store, model, digest, project.runs / info.run, world)
        if name in ANALYTIC and not world.is_main:
            return None
        if world.is_main:
            warn_of_rare_classes(train.labels, classes)
        made: Prior
        figures: list[Path] = []
        if name in ANALYTIC:
            made = fitted = ANALYTIC[name].fit(
                train.means, train.labels, len(classes), prior, train.variance, train.split.patients
            )
            save_prior(project.prior, fitted, digest)
            metrics = {"train_log_likelihood": mean_log_likelihood(fitted, train)}
            if len(val.labels):
                metrics["val_log_likelihood"] = mean_log_likelihood(fitted, val)
            print_choices(fitted, classes)
        else:
            codes = None if model.codebook is None else model.codebook.cpu()
            latents = (train.means, train.labels, len(classes))
            made = network = NEURAL[name].create(*latents, prior, train.variance, codes, space)
            task = LatentTask(network, model, train, val, prior, world)
            plain = prior.model_dump(mode="json", exclude=SAMPLING) | {"name": name}
            scratch = project.runs / info.run / f"prior_{fingerprint(digest, plain, code())}"
            with trained(task, world, scratch, project, name) as state:
                if not world.is_main:
                    return None
                metrics, figures = export_network(project, task, state, digest)
        named = {f"prior/{key}": value for key, value in metrics.items()}
        used = prior.model_copy(update={"name": name})
        record(project, info, tracking, used, project.prior / "prior.json", named, figures, PRIOR_ORIGIN)
        values = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in metrics.items())
        say(f"prior {name}: {values}")
        return made


def default_prior(model: GenerativeModel, space: ConditionSpace | None) -> str:
    """Name of the prior for `prior.name: null`: the fastest that takes the model's latents and the conditions."""
    if model.codebook is not None:
        return "tokens"
    return "gmm" if space is None else "flow"


class LatentTask(TrainingTask):
    """Train a prior's network on the latents of the train split and validate it on those of the val split."""

    num_batches = STEPS_PER_EPOCH

    def __init__(
        self,
        prior: NeuralPrior,
        model: GenerativeModel,
        train: Encoded,
        val: Encoded,
        params: config.Prior,
        world: World,
    ) -> None:
        self.prior, self.decoder, self.data, self.params, self.world = prior, model, train, params, world
        self.validation = val if len(val.labels) else train
        self.batch_size, self.device = params.batch_size, world.device
        world.check_batch_size("prior", params.batch_size, len(train.labels))
        self.model = prior.network.to(world.device)
        self.train = one_phase(params, "prior", STEPS_PER_EPOCH, 0.02, ema_decay=0.999, keep="best", compile="off")

    def batch(self, position: int) -> tuple[Any, ...]:
        """Latents, labels, the generator of the step's random draws, and conditions."""
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, position, 1))
        return self._inputs(self.data, self._rows(position)[self.world.rank :: self.world.size], generator)

    def forward(self, network: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Loss of the prior, which its family defines."""
        return self.prior.loss(*batch)

    @torch.no_grad()
    def validate(self, phase: Phase) -> dict[str, float]:
        """Loss on validation latents (on train latents if there are none), with the same random draws each time."""
        data, total = self.validation, 0.0
        batches = torch.split(torch.arange(len(data.labels)), BATCH_SIZE)
        for number in self.world.share(len(batches)):
            for draw in range(NUM_DRAWS):
                generator = torch.Generator().manual_seed(seed_of(self.params.seed, 2, number, draw))
                loss = self.prior.loss(*self._inputs(data, batches[number], generator))
                total += len(batches[number]) * float(loss)
        mean = self.world.sum_of({"loss": total})["loss"] / (NUM_DRAWS * len(data.labels))
        return {"loss": mean, "objective": mean}

    def draw(self, folder: Path, epoch: int) -> dict[str, Path]:
        """Write a grid of samples."""
        path = folder / "samples" / f"epoch_{epoch:04d}.png"
        write_grid(path, sample_images(self.prior, self.decoder, NUM_SAMPLES, None, self.params.seed))
        return {"samples": path}

    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """Latents of the step at `position`, and the image files they were encoded from."""
        rows = self._rows(position)
        files = self.data.split.paths
        return self.data.means[rows], [files[row] for row in rows.tolist()]

    def _inputs(self, data: Encoded, rows: Tensor, generator: torch.Generator) -> tuple[Any, ...]:
        """Arguments of `NeuralPrior.loss` for rows (B,) of a split."""
        conditions = None if self.prior.space is None else read_conditions(data.split, rows).to(self.device)
        return data.means[rows].to(self.device), data.labels[rows].to(self.device), generator, conditions

    def _rows(self, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, position))
        return torch.randint(len(self.data.labels), (self.batch_size,), generator=generator)


def export_network(
    project: Project, task: LatentTask, state: TrainState, digest: str
) -> tuple[dict[str, float], list[Path]]:
    """Write the trained prior to artifacts/prior; return its losses, and figures to record."""
    grid, curves = state.scratch / "prior_samples.png", state.scratch / "prior_loss.png"
    save_prior(project.prior, task.prior, digest)
    write_grid(grid, sample_images(task.prior, task.decoder, NUM_SAMPLES, None, task.params.seed))
    losses = {"train_loss": draw_losses(state.scratch, curves), "val_loss": state.counters.best_objective}
    return losses, [grid, curves]


def code() -> str:
    """Hash of the code that decides the trained weights of a prior."""
    return source.fingerprint(*source.TRAINING, *CODE)


def write_none(project: Project, info: BundleInfo) -> None:
    """Write a prior.json without a prior, since DVC expects the folder."""
    reason = f"model.name {info.model.name} finds masks: it has no latent to draw from"
    plain = {"name": None, "reason": reason, "model": bundle.digest(project.model)}
    write_folder(project.prior, {"prior.json": to_json(plain)})
    say(f"no prior: {reason}")


def mean_log_likelihood(prior: AnalyticPrior, data: Encoded) -> float:
    """Log-likelihood in nats per dimension of the latent, mean over images of classes in the train split."""
    labels = data.labels
    if len(prior.frequencies):
        unseen = (prior.frequencies == 0).nonzero()[:, 0]  # no density was fitted for these classes
        labels = torch.where(torch.isin(labels, unseen), -1, labels)
    parts = [prior.log_likelihood(part, labels[rows]) for rows, part in chunks(data.means)]
    return float(torch.cat(parts).mean()) / math.prod(data.means.shape[1:])


def warn_of_rare_classes(labels: Tensor, classes: tuple[str, ...]) -> None:
    """Print a warning for each class with few training images."""
    for number, name in enumerate(classes):
        count = int((labels == number).sum())
        if 0 < count < RARE:
            warn(
                f"{name}: {count} training images, fewer than {RARE}: its samples are unreliable; a gmm uses "
                "the class's own mean and the covariance of all classes"
            )


def print_choices(prior: AnalyticPrior, classes: tuple[str, ...]) -> None:
    """Print the number of components that a mixture chose for each class."""
    for choice in prior.state()[1].get("choices", []):
        if choice["held_out"] is not None:
            name = classes[choice["class"]] if choice["class"] >= 0 else "all classes"
            say(f"{name}: {choice['rows']} images, number of components {choice['components']}")
