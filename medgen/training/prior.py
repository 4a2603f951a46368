"""Makes the prior: fits it to what the encoder says of the train split, or trains it on that.

medgen prior
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from medgen import config
from medgen.config import Phase, Project, Schedule, Tracking, Train, fingerprint, seed_of, unknown_name
from medgen.data.store import Split, open_store
from medgen.io import hash_file, write_atomic, write_folder
from medgen.models import GenerativeModel, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import FITTED, LEARNED, PRIORS, FittedPrior, LearnedPrior, Prior, sample_images, save_prior
from medgen.priors.gmm import RARE
from medgen.reports.figures import write_curves, write_grid
from medgen.tracking import PRIOR_ORIGIN, Tracker, history, lineage
from medgen.training import checkpoint
from medgen.training.distributed import World, pick_device
from medgen.training.loader import Loader
from medgen.training.loop import train_to_end
from medgen.training.losses import Losses
from medgen.training.state import Job

BATCH_SIZE = 64
MAX_LATENT_NUMBERS = 1 << 28  # held at once, 1 GiB; of more, images spread over the split are used
STEPS_PER_EPOCH = 100  # of a network on latents: a pass over a small split would be over at once
NUM_LOOKS = 8  # at each validation latent: the loss depends on what is drawn
NUM_SAMPLES = 36
# what decides the result of a training: a change there is a new one, not a resumed one
CODE = ("nn/*.py", "priors/*.py", "training/prior.py")
SAMPLING = {"sampling_steps", "solver", "guidance"}  # parameters that the trained network does not depend on


@dataclass(frozen=True)
class Encoded:
    """The latents of a split's images."""

    means: Tensor  # (N, *latent_shape) posterior means
    labels: Tensor  # (N,) int64, -1 where unlabelled
    variance: Tensor | None  # (*latent_shape) posterior variance, mean over the images; None without one
    files: list[str]  # N paths
    patients: list[str] | None = None  # N of them; see `medgen.data.store.Split.patients`


def run(project: Project, *, prior: config.Prior, tracking: Tracking) -> Prior | None:
    """Encodes the train split, fits or trains the prior, writes artifacts/prior and records it in the model's run.

    None for a model without a latent: what is written then says so, as DVC wants the folder.

    Raises:
        UserError: the store or the model is missing or damaged, they do not belong together, or the
            latents cannot be fitted.
        NonFiniteError, TrainingInterrupted: as in `medgen train`, for a prior that is trained.
    """
    if prior.name is not None and prior.name not in PRIORS:
        raise unknown_name("prior.name", prior.name, PRIORS)
    store, device = open_store(project.dataset), pick_device("auto")
    model, info = bundle.load_for(store, project.model, device)
    if not isinstance(model, GenerativeModel):
        write_none(project, info)
        return None
    name = prior.name or ("gmm" if model.codes is None else "tokens")
    train, val = encode(model, store.split("train")), encode(model, store.split("val"))
    warn_of_rare(train.labels, store.classes)
    digest = bundle.digest(project.model)
    made: Prior
    pictures: list[Path] = []
    if name in FITTED:
        made = fitted = FITTED[name].fit(
            train.means, train.labels, len(store.classes), prior, train.variance, train.patients
        )
        save_prior(project.prior, fitted, digest)
        metrics = {"train_log_likelihood": mean_log_likelihood(fitted, train)}
        if len(val.labels):
            metrics["val_log_likelihood"] = mean_log_likelihood(fitted, val)
        report_choices(fitted, store.classes)
    else:
        codes = None if model.codes is None else model.codes.cpu()
        made = learned = LEARNED[name].start(
            train.means, train.labels, len(store.classes), prior, train.variance, codes
        )
        task = LatentTask(learned, model, train, val, prior, device)
        plain = prior.model_dump(mode="json", exclude=SAMPLING) | {"name": name}
        scratch = project.runs / info.run / f"prior_{fingerprint(digest, plain, code())}"
        metrics, pictures = learn(project, task, scratch, name, digest)
    metrics = {f"prior/{key}": value for key, value in metrics.items()}
    record(project, info, prior.model_copy(update={"name": name}), tracking, metrics, pictures)
    values = ", ".join(f"{key.split('/')[1].replace('_', ' ')} {value:.3f}" for key, value in metrics.items())
    Console(highlight=False).print(f"prior {name}: {values}", markup=False)
    return made


class LatentTask:
    """A prior that is a network, trained on the latents of the train split, watched on those of the val split."""

    num_batches = STEPS_PER_EPOCH

    def __init__(
        self,
        prior: LearnedPrior,
        model: GenerativeModel,
        train: Encoded,
        val: Encoded,
        params: config.Prior,
        device: torch.device,
    ) -> None:
        self.prior, self.decoder, self.data, self.val, self.params = prior, model, train, val, params
        self.batch_size, self.device = params.batch_size, device
        prior.network.to(device)

    @property
    def model(self) -> nn.Module:
        """The prior's network."""
        return self.prior.network

    @property
    def train(self) -> Train:
        """How it is trained: one phase along a cosine; of the averaged weights those that fit held-out latents best."""
        params = self.params
        phase = Phase(
            name="prior",
            epochs=params.epochs,
            learning_rate=params.learning_rate,
            weight_decay=1e-2,
            warmup_steps=STEPS_PER_EPOCH,
            schedule=Schedule(name="cosine_restarts", period=params.epochs, min_factor=0.02),
        )
        return Train(
            seed=params.seed,
            batch_size=params.batch_size,
            phases=(phase,),
            ema_decay=0.999,
            on_nonfinite="rollback",
            keep="best",
            compile="off",
        )

    def losses(self, network: nn.Module, position: int, phase: Phase, epoch: float) -> Losses:
        """See `medgen.training.state.Task`."""
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, position, 1))
        return Losses(total=self._loss(self.data, self._rows(position), generator), terms={})

    @torch.no_grad()
    def validate(self, phase: Phase) -> dict[str, float]:
        """The loss on validation latents (on train latents where there are none), with the same draws each time.

        It is the objective, too.
        """
        data = self.val if len(self.val.labels) else self.data
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, 2))
        total = 0.0
        for _ in range(NUM_LOOKS):
            for rows in torch.split(torch.arange(len(data.labels)), BATCH_SIZE):
                total += len(rows) * float(self._loss(data, rows, generator))
        loss = total / (NUM_LOOKS * len(data.labels))
        return {"loss": loss, "objective": loss}

    def record(self, phase: Phase, epoch: float) -> dict[str, float]:
        """Nothing besides the loss."""
        return {}

    def draw(self, folder: Path, epoch: int) -> dict[str, Path]:
        """A grid of new images."""
        path = folder / "samples" / f"epoch_{epoch:04d}.png"
        write_grid(path, sample_images(self.prior, self.decoder, NUM_SAMPLES, None, self.params.seed))
        return {"samples": path}

    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """The latents of the step at `position`, and the files they are of."""
        rows = self._rows(position)
        return self.data.means[rows], [self.data.files[row] for row in rows.tolist()]

    def _loss(self, data: Encoded, rows: Tensor, generator: torch.Generator) -> Tensor:
        return self.prior.loss(data.means[rows].to(self.device), data.labels[rows].to(self.device), generator)

    def _rows(self, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.params.seed, position))
        return torch.randint(len(self.data.labels), (self.batch_size,), generator=generator)


def learn(
    project: Project, task: LatentTask, scratch: Path, name: str, digest: str
) -> tuple[dict[str, float], list[Path]]:
    """Trains, resumed from `scratch`, writes artifacts/prior; returns the last losses, and pictures to keep."""
    own = Tracking(enabled=False)  # a prior's epochs are not its model's: they stay in this file
    job = Job(task, World(0, 1, task.device), task.train, scratch)
    with job.stop.listening(), Tracker.open(scratch, own, project, name) as tracker:
        train_to_end(job, tracker)
        with job.final_weights():
            save_prior(project.prior, task.prior, digest)
            metrics = {"val_loss": job.state.best_objective}
            grid = scratch / "prior_samples.png"
            write_grid(grid, sample_images(task.prior, task.decoder, NUM_SAMPLES, None, task.params.seed))
    records = history(scratch)
    series = {key: [record[key] for record in records] for key in ("train/loss", "val/loss")}
    write_curves(scratch / "prior_loss.png", series, log=False, y_label="loss")
    return {"train_loss": records[-1]["train/loss"], **metrics}, [grid, scratch / "prior_loss.png"]


def code() -> str:
    """Hash of the code that decides what a trained prior becomes."""
    return checkpoint.package_fingerprint(*checkpoint.TRAINING_CODE, *CODE)


def write_none(project: Project, info: BundleInfo) -> None:
    """Writes a prior.json that says why there is no prior."""
    reason = f"model.name {info.model.name} finds masks: it has no latent to draw from"
    plain = {"name": None, "reason": reason, "model": bundle.digest(project.model)}
    write_folder(project.prior, {"prior.json": (json.dumps(plain, indent=2) + "\n").encode()})
    Console(highlight=False).print(f"no prior: {reason}", markup=False)


@torch.no_grad()
def encode(model: GenerativeModel, split: Split) -> Encoded:
    """Latents of a split, on the CPU; of a split too large to hold, those of images spread over it."""
    limit = max(1, MAX_LATENT_NUMBERS // torch.Size(model.latent_shape).numel())
    subset = limit if len(split.images) > limit else None
    device = next(model.parameters()).device
    means, labels = [torch.empty(0, *model.latent_shape)], [torch.empty(0, dtype=torch.int64)]
    variance: Tensor | None = None
    rows: list[int] = []
    paths, patients = split.paths, split.patients
    for batch in Loader(split, BATCH_SIZE, device, subset=subset).sequential() if len(paths) else ():
        latent = model.encode(batch.image, batch.label)
        means.append(latent.mean.float().cpu())
        labels.append(batch.label.cpu())
        rows += batch.index.tolist()
        if latent.logvar is not None:
            total = latent.logvar.double().exp().sum(0).cpu()
            variance = total if variance is None else variance + total
    mean_variance = None if variance is None else (variance / len(rows)).float()
    files, people = [paths[row] for row in rows], patients and [patients[row] for row in rows]
    return Encoded(torch.cat(means), torch.cat(labels), mean_variance, files, people)


def mean_log_likelihood(prior: FittedPrior, data: Encoded) -> float:
    """Nats per number of the latent, mean over images whose class the prior knows."""
    labels = data.labels
    if len(prior.frequencies):
        unseen = (prior.frequencies == 0).nonzero()[:, 0]  # of such a class no density was fitted
        labels = torch.where(torch.isin(labels, unseen), -1, labels)
    return float(prior.log_likelihood(data.means, labels).mean()) / data.means[0].numel()


def record(
    project: Project,
    info: BundleInfo,
    prior: config.Prior,
    tracking: Tracking,
    metrics: Mapping[str, float],
    pictures: list[Path],
) -> None:
    """Adds parameters, metrics, prior.json and pictures to the record of the run that trained the model."""
    scratch = project.runs / info.run
    with Tracker.open(scratch, tracking, project, info.model.name) as tracker:
        records = history(scratch)
        tracker.params({"prior": prior})
        tracker.metrics(metrics, step=records[-1]["step"] if records else 0)
        for path in (project.prior / "prior.json", *pictures):
            tracker.artifact(path, "prior")
    origin = {
        "sha256": hash_file(project.prior / "prior.json"),
        "prior": prior.model_dump(mode="json"),
        "lineage": lineage(project, prior),
    }
    write_atomic(scratch / PRIOR_ORIGIN, f"{json.dumps(origin, indent=2)}\n".encode())


def warn_of_rare(labels: Tensor, classes: tuple[str, ...]) -> None:
    """Says which classes have too few images to tell much of them."""
    for number, name in enumerate(classes):
        count = int((labels == number).sum())
        if 0 < count < RARE:
            Console(highlight=False, soft_wrap=True).print(
                f"warning: {name}: {count} training images, fewer than {RARE}: what is drawn of it says little; a gmm "
                "gives it its own mean and the covariance of all classes",
                style="yellow",
                markup=False,
            )


def report_choices(prior: FittedPrior, classes: tuple[str, ...]) -> None:
    """Says how many components a mixture has."""
    choices: list[dict[str, Any]] = prior.state()[1].get("choices", [])
    for choice in choices:
        if choice["held_out"] is not None:
            name = classes[choice["class"]] if choice["class"] >= 0 else "all classes"
            text = f"{name}: {choice['rows']} images, number of components {choice['components']}"
            Console(highlight=False).print(text, markup=False)
