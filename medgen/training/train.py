"""Stage `train`: train a model phase by phase, resumed by running the same command again.

medgen train
torchrun --nproc-per-node 2 -m medgen train
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from medgen import source
from medgen.config import Loss, Model, Phase, Project, Tracking, Train, Weights, fingerprint, seed_of
from medgen.data.store import open_store
from medgen.datasets.weights import weights_path
from medgen.errors import UserError
from medgen.io import to_json, write_atomic
from medgen.metrics.latent import codebook_use
from medgen.models import GenerativeModel, build_model, bundle
from medgen.models.base import ImageModel, ModelOutput
from medgen.models.sliding_window import by_windows
from medgen.nn.conditions import drop_conditions
from medgen.tracking import Tracker, history, lineage, read_run
from medgen.tracking.mlflow_descriptions import escape
from medgen.training import checkpoint
from medgen.training.augment import check_augment
from medgen.training.distributed import World, join, pick_precision
from medgen.training.initial_weights import PIN, REGISTERED, Fetch, find_weights, load_weights
from medgen.training.loader import Batch, Loader
from medgen.training.loop import AfterEpoch, train_to_end
from medgen.training.losses import SCORES, Losses, Objective, beta_at
from medgen.training.report import draw_epoch, write_report
from medgen.training.state import TrainingTask, TrainState, channels_last

# source files that decide the trained weights: a change starts a new run instead of resuming
CODE = ("data/conditions.py", "nn/*.py", "models/*.py", "training/initial_weights.py", "training/train.py")
NOT_IN_FINGERPRINT = {"sample_every", "checkpoint_seconds", "on_nonfinite", "max_rollbacks", "device"}
INITIAL = ("init_from", "init_strict", "freeze")  # keys that are in the fingerprint only if there are initial weights
PARAMS = "params.json"  # in a run's folder: the parameters of its training, with the resolved train.init_from
INIT_TAG = "init_from"  # of a run and a version: the same source
GIVEN_TAG = "init_from.given"  # train.init_from as it was given, such as an alias


def run(
    project: Project,
    *,
    model: Model,
    loss: Loss,
    train: Train,
    tracking: Tracking,
    after_epoch: AfterEpoch | None = None,
    fetch: Fetch | None = None,
) -> Path:
    """Train to the end of the last phase, export artifacts/model and return the run's folder.

    A run that is resumed does not read the weights of train.init_from again.

    Args:
        project: the project.
        model: network and sizes.
        loss: weights of the objective.
        train: phases, optimizer and policies.
        tracking: where the run is recorded.
        after_epoch: see `medgen.training.loop.train_to_end`.
        fetch: downloads a registered version that train.init_from names.

    Raises:
        UserError: the store, a parameter, initial weights or those of the perceptual term are missing or wrong.
        NonFiniteError, TrainingInterrupted: see `medgen.training.loop.train_to_end`.
    """
    with join(train.device) as world:
        given, folder = train.init_from, None
        if given and world.is_main:
            source = _source_of_unfinished(project, model, loss, train)
            source, folder = (source, None) if source else find_weights(project, given, fetch)
            train = train.model_copy(update={"init_from": source})
        train = world.from_main(train)
        task = ModelTask(project, world, model, loss, train)
        name = run_fingerprint(task.store.fingerprint, model, loss, train)
        tags = {INIT_TAG: train.init_from, GIVEN_TAG: given} if given and train.init_from else {}
        if given and not checkpoint.exists(project.runs / name):
            if folder:
                left = load_weights(task.model, str(train.init_from), folder, train.init_strict)
                tags["init_from.not_taken"] = ", ".join(left) or "none"
            world.copy_from_main(task.model.state_dict().values())
        state = TrainState(task, world, project.runs / name)
        with state.stop.listening(), record(state, task, project, tracking, tags) as tracker:
            train_to_end(state, tracker, after_epoch)
            if tracker:
                # of two trainings that end at once, the model and the report are those of the same one
                with FileLock(project.model.with_name("model.lock")):
                    with state.final_weights():
                        task.export(project.model, name)
                    for path in write_report(project.curves, state.scratch, history(state.scratch), state.drawn_epochs):
                        tracker.artifact(path, "figures")
        return state.scratch


class ModelTask(TrainingTask):
    """Train an image model on the train split and validate it on the val split."""

    model: ImageModel

    def __init__(self, project: Project, world: World, model: Model, loss: Loss, train: Train) -> None:
        self.params, self.loss, self.train, self.world, self.device = model, loss, train, world, world.device
        self.store = open_store(project.dataset)
        train_split, val_split = self.store.split("train"), self.store.split("val")
        self.train_split = train_split
        if not len(val_split.images):
            raise UserError(
                f"{project.dataset}: the val split is empty, and training needs one for validation; "
                "raise preprocess.val_fraction or add images"
            )
        torch.manual_seed(train.seed)
        self.mask_classes = self.store.preprocess.mask_classes
        classes = len(self.store.classes)
        sizes = (self.store.image_shape, classes, self.mask_classes, self.store.conditions)
        self.model = build_model(model, *sizes).to(world.device)
        self.space = self.model.space if isinstance(self.model, GenerativeModel) else None
        self.memory_format = channels_last(self.model)
        # whole images pass a model trained on patches window by window
        self.evaluated = by_windows(self.model, train.patch, self.store.image_shape)
        self.frozen = [getattr(self.model, part) for part in self.model.encoder_parts if train.freeze]
        for part in self.frozen:
            part.requires_grad_(False)
        with_masks = self.model.target == "mask"
        self._check_weights()
        check_augment(train.augment, self.store.image_shape[1:], self.space)
        if with_masks and not (len(train_split.masked_rows) and len(val_split.masked_rows)):
            raise UserError(
                f"model.name: {model.name} is trained on masks; {project.dataset} has {len(train_split.masked_rows)} "
                f"in train and {len(val_split.masked_rows)} in val; expected masks with the images (docs/data.md), or "
                "another model"
            )
        self.loader = Loader(
            train_split, train.batch_size, world.device, train.seed, world.rank, world.size,
            train.horizontal_flip, train.subset, with_masks, train.augment, train.patch,
            with_conditions=self.space is not None,
        )  # fmt: skip
        world.check_batch_size("train", self.loader.batch_size, self.loader.num_images, train.accumulate_steps)
        self.num_batches, self.batch_size = self.loader.num_batches, self.loader.batch_size
        self.validation = Loader(
            val_split, 2 * train.batch_size, world.device, rank=world.rank, world=world.size, with_masks=with_masks,
            with_conditions=self.space is not None,
        )  # fmt: skip
        latent_shape = self.model.latent_shape if isinstance(self.model, GenerativeModel) else ()
        self.latent_numel = int(torch.Size(latent_shape).numel())
        self.criterion = Objective(loss, self.store.image_shape, self._vgg16()).to(world.device)
        self.precision = pick_precision(train.precision, world.device)
        if self.precision == torch.bfloat16 and world.device.type == "cpu" and len(self.store.image_shape) == 4:
            # with oneDNN some are not finite, depending on what the memory held before
            raise UserError(
                "train.precision: bf16; gradients of 3-D convolutions are wrong in bf16 on a CPU; use auto or fp32, or "
                "a GPU"
            )

    def batch(self, position: int) -> Batch:
        """Images, labels and, for a segmentation model, masks.

        For a model that takes conditions these too, and they and the label are dropped at random, so that any of them
        may be unknown later.
        """
        batch = self.loader.batch(position)
        if self.space is None or not isinstance(self.model, GenerativeModel):
            return batch
        generator = torch.Generator().manual_seed(seed_of(self.train.seed, position, 0, 4))
        dropped = drop_conditions(batch.label, batch.conditions, self.model.conditional, self.space, generator)
        return replace(batch, label=dropped[0], conditions=dropped[1])

    def forward(self, network: nn.Module, batch: Batch) -> ModelOutput:
        """The network's output, in bf16 if the run uses it."""
        for part in self.frozen:
            part.eval()  # its statistics and codes stay as they are too
        with self._autocast():
            image = batch.image.contiguous(memory_format=self.memory_format)
            output: ModelOutput = network(image, batch.label, batch.conditions)
        return output

    def objective(self, output: ModelOutput, batch: Batch, phase: Phase, epoch: float) -> Losses:
        """Weighted sum of the image and latent terms."""
        beta = beta_at(phase.beta, epoch)
        losses: Losses = self.criterion(output, self._target(batch), self._weights(phase), beta)
        return losses

    @torch.no_grad()
    def validate(self, phase: Phase) -> dict[str, float]:
        """Means over the val split: `loss` (image terms), `objective` (with the latent's terms) and scores.

        The objective uses the phase's final β from its first epoch on: with a rising β it would be lowest for the epoch
        that is regularised least.
        """
        scores = {name: 0.0 for name in ("loss", "objective", *SCORES[self.model.target])}
        codes = [torch.empty(0, dtype=torch.int64)]
        for batch in self.validation.sequential():
            with self._autocast():
                output = self.evaluated.predict(batch.image, batch.label, batch.conditions)
            result, target, size = output.prediction.float(), self._target(batch), len(batch.image)
            image_loss = self.criterion.image_loss(result, target, self._weights(phase)).total
            latent_loss = self.criterion.latent_loss(output, phase.beta.end).total
            scores["loss"] += size * float(image_loss)
            scores["objective"] += size * float(image_loss + latent_loss)
            for name, score in SCORES[self.model.target].items():
                scores[name] += size * float(score(result, target))
            if output.latent is not None and output.latent.codes is not None:
                codes.append(output.latent.codes.flatten().cpu())
        means = {name: total / self.validation.num_images for name, total in self.world.sum_of(scores).items()}
        if not isinstance(self.model, GenerativeModel) or self.model.codebook is None:
            return means
        return means | codebook_use(self.world.concat(torch.cat(codes)), self.params.num_embeddings)

    def scalars(self, phase: Phase, epoch: float) -> dict[str, float]:
        """β as configured, and on the scale where 1 is the evidence lower bound."""
        beta = beta_at(phase.beta, epoch)
        return {"beta": beta, "beta_effective": self.criterion.effective_beta(beta, self.latent_numel)}

    def draw(self, folder: Path, epoch: int) -> dict[str, Path]:
        """Write grids of samples and reconstructions, or of masks."""
        return draw_epoch(self.evaluated, self.loader, self.validation, folder, epoch, self.train.seed)

    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """The images of the step at `position`, and their files."""
        batch, files = self.loader.batch(position), self.train_split.paths
        return batch.image, [files[row] for row in batch.index.tolist()]

    def export(self, folder: Path, run: str) -> None:
        """Write the model with its present weights to `folder`; `run` is the name of its folder in runs/."""
        info = bundle.BundleInfo(
            model=self.params,
            preprocess=self.store.preprocess,
            image_shape=self.store.image_shape,
            classes=self.store.classes,
            dataset=self.store.fingerprint,
            run=run,
            torch=torch.__version__,
            init_from=self.train.init_from,
            patch=self.train.patch,
            conditions=() if self.store.conditions is None else self.store.conditions.fields,
        )
        bundle.save(folder, self.model, info)

    def describe(self) -> str:
        """Short description of the run in Markdown, for MLflow."""
        size = "×".join(map(str, self.store.image_shape))
        makes = f"masks of {self.mask_classes} classes"
        if isinstance(self.model, GenerativeModel):
            makes = f"a latent of {'×'.join(map(str, self.model.latent_shape))}"
        phases = ", ".join(f"{escape(phase.name)} ({phase.epochs} epochs)" for phase in self.train.phases)
        counts = ", ".join(f"{count} {name}" for name, count in self.store.counts.items())
        return (
            f"**{self.params.name}** of {size} images with {makes}. "
            f"Data: {escape(self.store.name)} {self.store.fingerprint} ({counts}; "
            f"classes: {', '.join(map(escape, self.store.classes)) or 'none'}). Phases: {phases}."
        )

    def _target(self, batch: Batch) -> Tensor:
        """Target of the output: the images (B, C, H, W), or the masks.

        Binary masks are (B, 1, H, W), masks of K classes one-hot (B, K, H, W).
        """
        if self.model.target == "image":
            return batch.image
        assert batch.mask is not None, "the loader adds masks for a segmentation model"
        if self.mask_classes == 2:
            return batch.mask
        one_hot = F.one_hot(batch.mask[:, 0].long(), self.mask_classes)  # (B, H, W, K)
        return one_hot.movedim(-1, 1).float()

    def _weights(self, phase: Phase) -> Weights:
        return phase.weights or self.loss.weights

    def _autocast(self) -> torch.autocast:
        """bf16 where the run uses it; a no-op in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def _check_weights(self) -> None:
        weights = [self.loss.weights, *(phase.weights for phase in self.train.phases if phase.weights)]
        used = {name for each in weights for name, weight in each.model_dump().items() if weight > 0}
        if self.model.target == "mask" and (wrong := used & {"ssim", "perceptual", "sigma"}):
            raise UserError(
                f"loss.weights: {', '.join(sorted(wrong))} compare images, and {self.params.name} is trained on masks; "
                "expected bce, dice or both, such as {bce: 1.0, dice: 1.0}"
            )
        if self.params.dims == 3 and "perceptual" in used:
            raise UserError(
                "loss.weights: perceptual compares images, and model.dims is 3; expected l1, mse, bce, ssim, sigma"
            )
        if self.model.target == "image" and "dice" in used:
            raise UserError(
                f"loss.weights: dice compares masks, and {self.params.name} generates images; expected l1, mse, "
                "bce, ssim, sigma, perceptual"
            )

    def _vgg16(self) -> Path | None:
        phases = [phase.weights for phase in self.train.phases if phase.weights]
        wanted = any(weights.perceptual > 0 for weights in [self.loss.weights, *phases])
        return weights_path("vgg16") if wanted else None


@contextmanager
def record(
    state: TrainState, task: ModelTask, project: Project, tracking: Tracking, tags: Mapping[str, str]
) -> Iterator[Tracker | None]:
    """Open the run's record with its parameters, lineage and dataset; None in processes other than the main one.

    `tags` describe the initial weights.
    """
    if not state.world.is_main:
        yield None
        return
    run = state.scratch.name
    sides = task.store.image_shape[1:]
    size = "x".join(map(str, sides if len(set(sides)) > 1 else sides[:1]))
    run_name = f"{task.params.name}-{size}-{run[:6]}"
    with Tracker.open(state.scratch, tracking, project, run_name) as tracker:
        sections = {"model": task.params, "loss": task.loss, "train": task.train}
        everything = {**sections, "preprocess": task.store.preprocess}
        tracker.params(everything)
        plain = {name: section.model_dump(mode="json") for name, section in everything.items()}
        write_atomic(state.scratch / PARAMS, to_json(plain))
        precision = "bf16" if task.precision == torch.bfloat16 else "fp32"
        device = str(state.world.device)
        tracker.tags(lineage(project, *sections.values(), stage="train", device=device, precision=precision))
        tracker.tags({"medgen.run": run, **tags})
        tracker.note(task.describe())
        tracker.dataset(task.store.name, task.store.fingerprint, "artifacts/dataset", task.store.counts)
        yield tracker


def run_fingerprint(dataset: str, model: Model, loss: Loss, train: Train) -> str:
    """Name of a run, from everything that decides its weights: data, model, loss, training and code.

    The number of epochs of the last phase is left out, so that a longer run resumes a shorter one. Initial weights
    count by the hash in a resolved train.init_from, wherever they came from.
    """
    plain = train.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT)
    initial = [plain.pop(key) for key in INITIAL]
    if train.init_from:
        plain |= {"initial": [train.init_from.rpartition(PIN)[2], *initial[1:]]}
    del plain["phases"][train.phases[-1].name]["epochs"]
    return fingerprint(dataset, model, loss, plain, code())


def _source_of_unfinished(project: Project, model: Model, loss: Loss, train: Train) -> str | None:
    """The resolved source of an unfinished run with these parameters, whose alias may have moved; None without."""
    if not str(train.init_from).startswith(REGISTERED):
        return None
    dataset = open_store(project.dataset).fingerprint
    num_epochs = sum(phase.epochs for phase in train.phases)
    for path in project.runs.glob(f"*/{PARAMS}"):
        scratch, run = path.parent, read_run(path.parent)
        if run and run.tags.get(GIVEN_TAG) == train.init_from and checkpoint.exists(scratch):
            source = str(json.loads(path.read_text(encoding="utf-8"))["train"]["init_from"])
            resolved = train.model_copy(update={"init_from": source})
            is_same = run_fingerprint(dataset, model, loss, resolved) == scratch.name
            if is_same and len(history(scratch)) < num_epochs:
                return source
    return None


def code() -> str:
    """Hash of the code that decides the trained weights."""
    return source.fingerprint(*source.TRAINING, *CODE)
