"""Stage `features`: train the domain extractor to classify images (or quarter turns) and to detect degradations.

medgen features
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from medgen import source
from medgen.config import Features, Phase, Project, fingerprint, seed_of
from medgen.console import say, show, warn
from medgen.data.store import Store, open_store
from medgen.metrics.degradations import DEGRADATIONS, degrade
from medgen.metrics.features import CLEAN, DomainExtractor, ExtractorSizes, save_extractor
from medgen.training.distributed import World, join
from medgen.training.loader import Batch, Loader
from medgen.training.losses import Losses
from medgen.training.parts import one_phase, trained
from medgen.training.state import TrainingTask

NUM_TURNS = 4
# source files that decide the trained weights
CODE = (*source.TRAINING, "nn/*.py", "metrics/features.py", "metrics/degradations.py", "training/extractor.py")
MAX_SHIFT = 1 / 16  # fraction of the image's side, in either direction
MAX_BRIGHTNESS = 0.1  # added to or taken from values in [0, 1]
MAX_CONTRAST = 0.2  # relative change of differences from the mean
NORMAL_QUANTILE = 1.96  # of two-sided 95 %


@dataclass(frozen=True)
class Validation:
    """Results on the validation split."""

    accuracy: dict[str, float]  # of each class (or turn) that has images
    num_images: dict[str, int]  # of the same ones
    degradation_auc: dict[str, float]  # clean against degraded images, 0.5 is chance

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean accuracy over classes; None where no image has a label."""
        return sum(self.accuracy.values()) / len(self.accuracy) if self.accuracy else None

    def unrecognised_classes(self, names: Sequence[str]) -> list[str]:
        """Classes (or turns) whose accuracy is not clearly above chance.

        It must exceed chance by 1.96 standard errors and by a quarter of the way to 1. A class without images fails.
        """
        chance = 1 / len(names)
        error = NORMAL_QUANTILE * math.sqrt(chance * (1 - chance))
        return [
            name
            for name in names
            if name not in self.accuracy
            or self.accuracy[name] - chance <= max((1 - chance) / 4, error / math.sqrt(self.num_images[name]))
        ]

    def unrecognised_degradations(self, num_images: int) -> list[str]:
        """Degradations whose AUC is not clearly above 0.5, by Mann and Whitney's test."""
        error = math.sqrt((2 * num_images + 1) / (12 * num_images**2)) if num_images else 0.0
        return [name for name, value in self.degradation_auc.items() if value - 0.5 <= NORMAL_QUANTILE * error]


def run(project: Project, *, features: Features) -> float | None:
    """Train the extractor and write artifacts/features.

    Returns:
        Balanced accuracy on the validation split; None if that has no labelled image.

    Raises:
        UserError: there is no store, or it is damaged.
        NonFiniteError, TrainingInterrupted: as in `medgen train`.
    """
    with join("auto") as world:
        return _train_extractor(project, features, world)


def _train_extractor(project: Project, features: Features, world: World) -> float | None:
    store = open_store(project.dataset)
    task = ExtractorTask(store, features, world)
    scratch = project.runs / "features" / fingerprint(store.fingerprint, features, source.fingerprint(*CODE))
    with trained(task, world, scratch, project, "features"):
        extractor = task.model.eval()
        extractor.standardise(
            (batch.image for batch in task.loader.sequential()),
            (task.degraded(batch) for batch in task.loader.sequential()),
            world.concat,
        )
        found = Validation({}, {}, {})
        if store.counts["val"]:
            found = validate(extractor, task.validation, task.names, task.by_class, features.seed, world)
        accuracy = found.balanced_accuracy
        if not world.is_main:
            return accuracy
        classes = found.unrecognised_classes(task.names)
        degradations = found.unrecognised_degradations(store.counts["val"])
        facts = {
            "task": "classes" if task.by_class else "quarter turns",
            "classes": list(store.classes),
            "dataset": store.fingerprint,
            "val_balanced_accuracy": None if accuracy is None else rounded(accuracy),
            "val_accuracy": {name: rounded(value) for name, value in found.accuracy.items()},
            "val_images": found.num_images,
            "val_degradation_auc": {name: rounded(value) for name, value in found.degradation_auc.items()},
            "unrecognised": {"classes": classes, "degradations": degradations},
            "features": features.model_dump(mode="json"),
        }
        digest = save_extractor(project.features, extractor, facts)
    report(store, task.by_class, found, digest)
    warn_of_unrecognised(classes, degradations, len(task.names))
    return accuracy


class Questions(NamedTuple):
    """Input of a step, with the answers to learn."""

    image: Tensor  # (B, C, H, W) augmented
    target: Tensor  # (B,) class or number of quarter turns, -1 where unlabelled
    mixed: Tensor  # (2 B, C, H, W) augmented images, then degraded copies
    kinds: Tensor  # (2 B,) CLEAN or the kind of degradation


class ExtractorTask(TrainingTask):
    """Train the domain extractor's two heads with cross-entropy.

    The class head sees clean images, equally many of each class. Without classes it predicts by how many quarter turns
    an image was rotated (Gidaris et al., Unsupervised representation learning by predicting image rotations, 2018).
    The quality head sees each clean image and a degraded copy, and predicts the kind of degradation, or none.
    """

    model: DomainExtractor

    def __init__(self, store: Store, features: Features, world: World) -> None:
        self.features, self.world, device = features, world, world.device
        split, val = store.split("train"), store.split("val")
        self.split = split
        self.loader = Loader(split, features.batch_size, device, features.seed, world.rank, world.size, as_planes=True)
        world.check_batch_size("features", self.loader.batch_size, self.loader.num_images)
        self.num_batches, self.batch_size = self.loader.num_batches, self.loader.batch_size
        warmup_steps = max(1, features.epochs * self.num_batches // 10)
        self.train = one_phase(features, "extractor", warmup_steps, 0.0, clip_norm=10.0, compile="off")
        validated = val if len(val.images) else split
        self.validation = Loader(
            validated, 2 * features.batch_size, device, rank=world.rank, world=world.size, as_planes=True
        )
        self.by_class = len(store.classes) > 1
        turns = [f"turned by {90 * count} degrees" for count in range(NUM_TURNS)]
        self.names = list(store.classes) if self.by_class else turns
        sizes = ExtractorSizes(
            image_channels=store.plane_shape[0],
            image_size=min(store.plane_shape[1:]),
            width=features.width,
            num_outputs=len(self.names),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(features.seed))
            self.model = DomainExtractor(sizes).to(device)
        self.model.quality.standardise((batch.image for batch in self.loader.sequential()), world.concat)
        labels = self.loader.labels
        self.chances = sampling_weights(labels) if self.by_class else torch.ones(len(labels))
        # A batch has as many clean images as degraded ones of all kinds together: every answer counts equally.
        self.quality_weights = torch.ones(1 + len(DEGRADATIONS), device=device)
        self.quality_weights[CLEAN] = 1 / len(DEGRADATIONS)

    def batch(self, position: int) -> Questions:
        """Images drawn with replacement, augmented, with a degraded copy of each."""
        generator = torch.Generator().manual_seed(seed_of(self.features.seed, position, 1))
        batch = self.loader.gather(self._rows(generator))
        image, target = augment(batch.image, generator), batch.label
        mixed = torch.cat([image, degraded(image, position, generator)])
        if not self.by_class:
            target = torch.randint(NUM_TURNS, (len(image),), generator=generator).to(image.device)
            image = torch.stack([turned(one[None], int(count))[0] for one, count in zip(image, target, strict=True)])
        kinds = degradation_kinds(len(image), position).to(image.device)
        # each process makes the whole batch, since an image's draws depend on the images before it
        rows = slice(self.world.rank, None, self.world.size)
        return Questions(image[rows], target[rows], mixed[rows], kinds[rows])

    def forward(self, network: nn.Module, batch: Questions) -> tuple[Tensor, Tensor]:
        """Class scores and quality scores."""
        return self.model.logits(batch.image), self.model.quality_logits(batch.mixed)

    def objective(self, output: tuple[Tensor, Tensor], batch: Questions, phase: Phase, epoch: float) -> Losses:
        """Sum of the two cross-entropies."""
        # the mean over the labelled images alone would be 0 / 0 in a batch without labels
        class_loss = F.cross_entropy(output[0], batch.target, ignore_index=-1, reduction="none").mean()
        quality_loss = F.cross_entropy(output[1], batch.kinds, self.quality_weights)
        terms = {"class_loss": class_loss.detach(), "quality_loss": quality_loss.detach()}
        return Losses(class_loss + quality_loss, terms)

    @torch.no_grad()
    def validate(self, phase: Phase) -> dict[str, float]:
        """Class loss on the val split (on the train split if that is empty)."""
        total = count = 0.0  # over labelled images
        for batch in self.validation.sequential():
            for image, target in questions(batch, self.by_class):
                total += float(F.cross_entropy(self.model.logits(image), target, ignore_index=-1, reduction="sum"))
                count += int((target >= 0).sum())
        sums = self.world.sum_of({"total": total, "count": count})
        loss = sums["total"] / max(1.0, sums["count"])
        return {"loss": loss, "objective": loss}

    def inputs(self, position: int) -> tuple[Tensor, list[str]]:
        """Images of the step at `position`, and their files."""
        generator = torch.Generator().manual_seed(seed_of(self.features.seed, position, 1))
        batch, files = self.loader.gather(self._rows(generator)), self.split.paths
        return batch.image, [files[row] for row in batch.index.tolist()]

    def degraded(self, batch: Batch) -> Tensor:
        """Degraded copies of a batch of the train split in order."""
        number = int(batch.index[0]) // self.loader.batch_size
        return degraded(batch.image, number, batch.generator(self.features.seed, 2))

    def _rows(self, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.chances, self.batch_size, replacement=True, generator=generator)


def sampling_weights(labels: Tensor) -> Tensor:
    """Weights (N,) for drawing images, from labels (N,): classes come evenly, unlabelled images (-1) in proportion."""
    labels = labels.cpu() + 1
    counts = torch.bincount(labels)
    num_classes = int((counts[1:] > 0).sum())
    wanted = torch.full((len(counts),), int(counts[1:].sum()) / max(1, num_classes))
    wanted[0] = counts[0]
    return (wanted / counts.clamp_min(1))[labels]


def degradation_labels(size: int, position: int) -> Tensor:
    """Kinds of degradation (size,) in batch `position`: each in turn."""
    return 1 + (torch.arange(size) + position * size) % len(DEGRADATIONS)


def degradation_kinds(size: int, position: int) -> Tensor:
    """Targets (2 * size,) of the quality head: clean images, then the degraded copies of batch `position`."""
    return torch.cat([torch.full((size,), CLEAN), degradation_labels(size, position)])


def degraded(image: Tensor, position: int, generator: torch.Generator) -> Tensor:
    """Copies (B, C, H, W) of batch `position`, degraded by `degradation_labels`, each with a random severity."""
    labels = degradation_labels(len(image), position)
    copies = image.cpu().clone()
    for label, kind in enumerate(DEGRADATIONS, start=1):
        chosen = labels == label
        if bool(chosen.any()):
            copies[chosen] = degrade(copies[chosen], kind, generator)
    return copies.to(image.device)


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image (B, C, H, W) and change its brightness and contrast slightly, at random.

    Shifts are whole pixels, since interpolation blurs and an augmented image must count as clean.
    """
    size, side = len(image), min(image.shape[-2:])
    most = max(1, round(MAX_SHIFT * side))
    shifts = torch.randint(-most, most + 1, (size, 2), generator=generator).tolist()
    padded = F.pad(image, (most,) * 4, mode="replicate")
    rows, columns = image.shape[-2:]
    image = torch.stack(
        [
            one[:, most + down : most + down + rows, most + right : most + right + columns]
            for one, (down, right) in zip(padded, shifts, strict=True)
        ]
    )
    return change_greys(image, generator)


def change_greys(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change the brightness and contrast of each image (B, C, H, W) slightly, at random."""
    brightness, contrast = (
        (2.0 * torch.rand(2, len(image), 1, 1, 1, generator=generator) - 1.0).to(image.device).unbind()
    )
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    changed: Tensor = mean + (image - mean) * (1.0 + MAX_CONTRAST * contrast) + MAX_BRIGHTNESS * brightness
    return changed.clamp(0.0, 1.0)


def turned(image: Tensor, count: int) -> Tensor:
    """The squares in the middle of images (B, C, H, W) after `count` quarter turns: (B, C, S, S), S = min(H, W)."""
    side = min(image.shape[-2:])
    top, left = ((length - side) // 2 for length in image.shape[-2:])
    return torch.rot90(image[..., top : top + side, left : left + side], count, (2, 3))


@torch.no_grad()
def validate(
    extractor: DomainExtractor, validation: Loader, names: Sequence[str], by_class: bool, seed: int, world: World
) -> Validation:
    """Accuracy for each class (or turn), and AUC of clean against degraded images, over all processes.

    Every image is degraded in every way with a random severity; images are ranked by the probability of "clean".
    """
    correct, total = torch.zeros(2, len(names), dtype=torch.float64)
    damage = {kind: [torch.empty(0)] for kind in ("clean", *DEGRADATIONS)}
    for batch in validation.sequential():
        for image, target in questions(batch, by_class):
            answer = extractor.logits(image).argmax(dim=1)
            known = target >= 0
            correct += torch.bincount(target[known & (answer == target)].cpu(), minlength=len(correct))
            total += torch.bincount(target[known].cpu(), minlength=len(total))
        generator = batch.generator(seed, 3)
        for kind, scores in damage.items():
            image = batch.image if kind == "clean" else degrade(batch.image, kind, generator).to(batch.image.device)
            scores.append(-extractor.quality_logits(image).log_softmax(dim=1)[:, CLEAN].cpu())
    correct, total = world.sum(correct), world.sum(total)
    ranked = {kind: world.concat(torch.cat(scores)) for kind, scores in damage.items()}
    clean = ranked.pop("clean")
    return Validation(
        accuracy={name: float(correct[i] / total[i]) for i, name in enumerate(names) if total[i] > 0},
        num_images={name: int(total[i]) for i, name in enumerate(names) if total[i] > 0},
        degradation_auc={kind: area_under_curve(scores, clean) for kind, scores in ranked.items()},
    )


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive score (N,) exceeds a negative one (M,), ties counting one half: the ROC's area."""
    difference = positive[:, None] - negative[None]
    return float((0.5 * (difference.sign() + 1.0)).double().mean())


def questions(batch: Batch, by_class: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images with their labels, or in all four turns with the number of turns."""
    if by_class:
        yield batch.image, batch.label
        return
    for count in range(NUM_TURNS):
        yield turned(batch.image, count), torch.full_like(batch.label, count)


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def report(store: Store, by_class: bool, found: Validation, digest: str) -> None:
    """Print the results on the validation split."""
    subject = f"{len(store.classes)} classes" if by_class else "quarter turns (the dataset has no classes)"
    accuracy = found.balanced_accuracy
    measured = "no validation image" if accuracy is None else f"balanced validation accuracy {accuracy:.3f}"
    say(f"domain extractor: {subject}, {measured}, weights {digest[:12]}")
    if not found.degradation_auc:
        return
    shown = Table("class or degradation", "images", "accuracy", "AUC against clean")
    for name, value in found.accuracy.items():
        shown.add_row(name, f"{found.num_images[name]:,}", f"{value:.2f}", "")
    for name, value in found.degradation_auc.items():
        shown.add_row(name, f"{store.counts['val']:,}", "", f"{value:.2f}")
    show(shown)


def warn_of_unrecognised(classes: Sequence[str], degradations: Sequence[str], num_classes: int) -> None:
    """Print a warning for each class and degradation that the extractor does not recognise."""
    lines = [
        f"the domain extractor does not recognise {name}: its accuracy on validation images is not clearly "
        f"above chance (1/{num_classes}). Raise features.epochs, or add images of it"
        for name in classes
    ]
    lines += [
        f"the domain extractor does not recognise {name}: its AUC on validation images is not clearly above "
        "chance (0.5). Raise features.epochs"
        for name in degradations
    ]
    for line in lines:
        warn(line)
