"""Trains the domain extractor on the train split: to tell classes (or quarter turns) and to see degradations.

medgen features
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from medgen.config import Features, Project, seed_of
from medgen.data.store import Store, open_store
from medgen.metrics.degradations import DEGRADATIONS, degrade
from medgen.metrics.features import CLEAN, DomainExtractor, ExtractorSizes, save_extractor
from medgen.training.distributed import pick_device
from medgen.training.loader import Batch, Loader

NUM_TURNS = 4
MAX_SHIFT = 1 / 16  # of the image's side, either way
MAX_BRIGHTNESS = 0.1  # added to or taken from values in [0, 1]
MAX_CONTRAST = 0.2  # share by which differences from the mean grow or shrink
WEIGHT_DECAY = 1e-2
WARMUP = 0.1  # share of the steps over which the learning rate rises
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
        """Those of the classes (or turns) whose accuracy is not clearly above guessing, or only a little above it.

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
    """Trains the extractor and writes artifacts/features.

    Returns:
        Balanced accuracy on the validation split; None where that has no labelled image.

    Raises:
        UserError: there is no store, or it is damaged.
    """
    store = open_store(project.dataset)
    device = pick_device("auto")
    by_class = len(store.classes) > 1
    names = store.classes if by_class else [f"turned by {90 * count} degrees" for count in range(NUM_TURNS)]
    sizes = ExtractorSizes(
        image_channels=store.image_shape[0],
        image_size=min(store.image_shape[1:]),
        width=features.width,
        num_outputs=len(names),
    )
    train = Loader(store.split("train"), features.batch_size, device, features.seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(features.seed))
        extractor = DomainExtractor(sizes).to(device)
    extractor.quality.standardise(batch.image for batch in train.sequential())
    fit(extractor, train, features, by_class)
    extractor.eval()
    generator = torch.Generator().manual_seed(seed_of(features.seed, 2))
    extractor.standardise(
        (batch.image for batch in train.sequential()),
        (degraded(batch.image, position, generator) for position, batch in enumerate(train.sequential())),
    )
    found = Validation({}, {}, {})
    if store.counts["val"]:
        validation = Loader(store.split("val"), 2 * features.batch_size, device)
        found = validate(extractor, validation, names, by_class, generator)
    accuracy = found.balanced_accuracy
    classes = found.unrecognised_classes(names)
    degradations = found.unrecognised_degradations(store.counts["val"])
    facts = {
        "task": "classes" if by_class else "quarter turns",
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
    report(store, by_class, found, digest)
    warn(classes, degradations, len(names))
    return accuracy


def fit(extractor: DomainExtractor, train: Loader, features: Features, by_class: bool) -> None:
    """Minimises two cross-entropies with AdamW; the learning rate rises briefly, then falls to 0 along a cosine.

    The class head sees clean images, as many of each class. Without classes it tells by how many quarter turns each
    image was turned (Gidaris et al., Unsupervised representation learning by predicting image rotations, 2018).
    The quality head sees each clean image and a degraded copy, and tells the kind of degradation or that there is none.
    """
    chances = sampling_weights(train.labels) if by_class else torch.ones(len(train.labels))
    # A batch has as many clean images as degraded ones of all kinds together: every answer counts alike.
    quality_weights = torch.ones(1 + len(DEGRADATIONS), device=train.device)
    quality_weights[CLEAN] = 1 / len(DEGRADATIONS)
    optimizer = torch.optim.AdamW(extractor.parameters(), lr=features.learning_rate, weight_decay=WEIGHT_DECAY)
    num_steps = features.epochs * train.num_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / num_steps))
    extractor.train()
    for position in range(num_steps):
        generator = torch.Generator().manual_seed(seed_of(features.seed, position, 1))
        batch = train.gather(torch.multinomial(chances, train.batch_size, replacement=True, generator=generator))
        image, target = augment(batch.image, generator), batch.label
        damaged = degraded(image, position, generator)
        kinds = torch.cat([torch.full((len(image),), CLEAN), degradation_labels(len(image), position)])
        quality_loss = F.cross_entropy(
            extractor.quality_logits(torch.cat([image, damaged])), kinds.to(image.device), quality_weights
        )
        if not by_class:
            target = torch.randint(NUM_TURNS, (len(image),), generator=generator).to(image.device)
            image = torch.stack([turned(one[None], int(count))[0] for one, count in zip(image, target, strict=True)])
        # A mean over the labelled images alone would be 0 / 0 in a batch that has none.
        class_loss = F.cross_entropy(extractor.logits(image), target, ignore_index=-1, reduction="none").mean()
        optimizer.zero_grad(set_to_none=True)
        (class_loss + quality_loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()


def rate(progress: float) -> float:
    """Factor on the learning rate after this share of the steps."""
    if progress < WARMUP:
        return 0.1 + 0.9 * progress / WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))


def sampling_weights(labels: Tensor) -> Tensor:
    """Weights (N,) for drawing images, from labels (N,): classes come evenly, unlabelled images (-1) in proportion."""
    labels = labels.cpu() + 1
    counts = torch.bincount(labels)
    num_classes = int((counts[1:] > 0).sum())
    wanted = torch.full((len(counts),), int(counts[1:].sum()) / max(1, num_classes))
    wanted[0] = counts[0]
    return (wanted / counts.clamp_min(1))[labels]


def degradation_labels(size: int, position: int) -> Tensor:
    """The quality head's answers (size,) for the degraded images of batch `position`: kinds take turns."""
    return 1 + (torch.arange(size) + position * size) % len(DEGRADATIONS)


def degraded(image: Tensor, position: int, generator: torch.Generator) -> Tensor:
    """Copies (B, C, H, W) of batch `position`, degraded as `degradation_labels` says, each at a random severity."""
    labels = degradation_labels(len(image), position)
    copies = image.cpu().clone()
    for label, kind in enumerate(DEGRADATIONS, start=1):
        chosen = labels == label
        if bool(chosen.any()):
            copies[chosen] = degrade(copies[chosen], kind, generator)
    return copies.to(image.device)


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image (B, C, H, W) and changes its brightness and contrast a little, at random.

    Whole pixels only, since interpolation blurs: the network must take an augmented image for a clean one.
    """
    size, side = len(image), image.shape[-1]
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
    brightness, contrast = (2.0 * torch.rand(2, size, 1, 1, 1, generator=generator) - 1.0).to(image.device).unbind()
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    changed: Tensor = mean + (image - mean) * (1.0 + MAX_CONTRAST * contrast) + MAX_BRIGHTNESS * brightness
    return changed.clamp(0.0, 1.0)


def turned(image: Tensor, count: int) -> Tensor:
    """Square images (B, C, H, H) after `count` quarter turns."""
    return torch.rot90(image, count, (2, 3))


@torch.no_grad()
def validate(
    extractor: DomainExtractor, validation: Loader, names: Sequence[str], by_class: bool, generator: torch.Generator
) -> Validation:
    """Accuracy for each class (or turn), and how well clean and degraded images are told apart.

    Every image is degraded in every way at a random severity; images are ordered by the probability of "clean".
    """
    correct, total = torch.zeros(2, len(names), dtype=torch.float64)
    damage: dict[str, list[Tensor]] = {kind: [] for kind in ("clean", *DEGRADATIONS)}
    for batch in validation.sequential():
        for image, target in questions(batch, by_class):
            answer = extractor.logits(image).argmax(dim=1)
            known = target >= 0
            correct += torch.bincount(target[known & (answer == target)].cpu(), minlength=len(correct))
            total += torch.bincount(target[known].cpu(), minlength=len(total))
        for kind, scores in damage.items():
            image = batch.image if kind == "clean" else degrade(batch.image, kind, generator).to(batch.image.device)
            scores.append(-extractor.quality_logits(image).log_softmax(dim=1)[:, CLEAN].cpu())
    clean = torch.cat(damage.pop("clean"))
    return Validation(
        accuracy={name: float(correct[i] / total[i]) for i, name in enumerate(names) if total[i] > 0},
        num_images={name: int(total[i]) for i, name in enumerate(names) if total[i] > 0},
        degradation_auc={kind: area_under_curve(torch.cat(scores), clean) for kind, scores in damage.items()},
    )


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive score (N,) exceeds a negative one (M,), ties counting one half: the ROC's area."""
    difference = positive[:, None] - negative[None]
    return float((0.5 * (difference.sign() + 1.0)).double().mean())


def questions(batch: Batch, by_class: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and the answers to them: the labels, or each image in all four turns."""
    if by_class:
        yield batch.image, batch.label
        return
    for count in range(NUM_TURNS):
        yield turned(batch.image, count), torch.full_like(batch.label, count)


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def report(store: Store, by_class: bool, found: Validation, digest: str) -> None:
    """Prints the results on the validation split."""
    subject = f"{len(store.classes)} classes" if by_class else "quarter turns (no classes to learn)"
    accuracy = found.balanced_accuracy
    measured = "no validation image" if accuracy is None else f"balanced validation accuracy {accuracy:.3f}"
    console = Console()
    console.print(f"Domain extractor: {subject}, {measured}, weights {digest[:12]}", highlight=False, soft_wrap=True)
    if not found.degradation_auc:
        return
    shown = Table("class or degradation", "images", "accuracy", "AUC against clean")
    for name, value in found.accuracy.items():
        shown.add_row(name, f"{found.num_images[name]:,}", f"{value:.2f}", "")
    for name, value in found.degradation_auc.items():
        shown.add_row(name, f"{store.counts['val']:,}", "", f"{value:.2f}")
    console.print(shown)


def warn(classes: Sequence[str], degradations: Sequence[str], num_classes: int) -> None:
    """Prints a warning for each class and degradation that the extractor does not recognise."""
    lines = [
        f"warning: the domain extractor does not recognise {name}: its accuracy on validation images is not clearly "
        f"above chance (1/{num_classes}). Raise features.epochs, or bring more images of it"
        for name in classes
    ]
    lines += [
        f"warning: the domain extractor does not recognise {name}: its AUC on validation images is not clearly above "
        "chance (0.5). Raise features.epochs"
        for name in degradations
    ]
    for line in lines:
        Console(stderr=True, highlight=False).print(line, style="yellow", markup=False, soft_wrap=True)
