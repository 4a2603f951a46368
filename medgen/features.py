"""Trains the domain extractor: a small classifier of the train split, or of quarter turns without classes.

medgen features
"""

from collections.abc import Iterator

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from medgen.config import Features, Project, seed_of
from medgen.data.loader import Loader
from medgen.data.store import Store, open_store
from medgen.distributed import pick_device
from medgen.metrics.features import DomainExtractor, ExtractorSizes, save_extractor
from medgen.types import Batch

NUM_TURNS = 4
MAX_SHIFT = 1 / 16  # of the image's side, either way
MAX_BRIGHTNESS = 0.1  # added to or taken from values in [0, 1]
MAX_CONTRAST = 0.2  # share by which differences from the mean grow or shrink
WEIGHT_DECAY = 1e-2


def run(project: Project, *, features: Features) -> float | None:
    """Trains the extractor and writes artifacts/features.

    Returns:
        Balanced accuracy on the validation split; None where that has no image.

    Raises:
        UserError: there is no store, or it is damaged.
    """
    store = open_store(project.dataset)
    device = pick_device("auto")
    by_class = len(store.classes) > 1
    sizes = ExtractorSizes(
        image_channels=store.image_shape[0],
        image_size=min(store.image_shape[1:]),
        width=features.width,
        num_outputs=len(store.classes) if by_class else NUM_TURNS,
    )
    train = Loader(store.split("train"), features.batch_size, device, features.seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(features.seed))
        extractor = DomainExtractor(sizes).to(device)
    fit(extractor, train, features, by_class)
    extractor.eval()
    extractor.standardise(batch.image for batch in train.sequential())
    accuracy = None
    if store.counts["val"]:
        validation = Loader(store.split("val"), 2 * features.batch_size, device)
        accuracy = balanced_accuracy(extractor, validation, by_class)
    facts = {
        "task": "classes" if by_class else "quarter turns",
        "classes": list(store.classes),
        "dataset": store.fingerprint,
        "val_balanced_accuracy": None if accuracy is None else float(f"{accuracy:.6g}"),
        "features": features.model_dump(mode="json"),
    }
    digest = save_extractor(project.features, extractor, facts)
    report(store, by_class, accuracy, digest)
    return accuracy


def fit(extractor: DomainExtractor, train: Loader, features: Features, by_class: bool) -> None:
    """AdamW on the cross-entropy; the learning rate falls to 0 along a cosine.

    Without classes the network is asked by how many quarter turns each image was turned
    (Gidaris et al., Unsupervised representation learning by predicting image rotations, 2018).
    """
    weights = class_weights(train.labels, extractor.sizes.num_outputs).to(train.device) if by_class else None
    optimizer = torch.optim.AdamW(extractor.parameters(), lr=features.learning_rate, weight_decay=WEIGHT_DECAY)
    num_steps = features.epochs * train.num_batches
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    extractor.train()
    for position in range(num_steps):
        batch = train.batch(position)
        generator = torch.Generator().manual_seed(seed_of(features.seed, position, 1))
        image, target = augment(batch.image, generator), batch.label
        if not by_class:
            target = torch.randint(NUM_TURNS, (len(image),), generator=generator).to(image.device)
            image = torch.stack([turned(one[None], int(count))[0] for one, count in zip(image, target, strict=True)])
        # A mean over the labelled images alone would be 0 / 0 in a batch that has none.
        losses = F.cross_entropy(extractor.logits(image), target, weights, ignore_index=-1, reduction="none")
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weights (K,) in inverse proportion to the classes' frequencies, so that each counts alike in sum."""
    counts = torch.bincount(labels[labels >= 0].cpu(), minlength=num_classes)
    return counts.sum() / (num_classes * counts.clamp_min(1)).float()


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts, brightens and stretches the contrast of each image (B, C, H, W) a little, at random.

    Nothing that blurs or sharpens: the features shall notice a model that does.
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
def balanced_accuracy(extractor: DomainExtractor, validation: Loader, by_class: bool) -> float | None:
    """Mean over classes (or turns) of the share answered rightly; None where no image has a label."""
    correct, total = torch.zeros(2, extractor.sizes.num_outputs, dtype=torch.float64)
    for batch in validation.sequential():
        for image, target in questions(batch, by_class):
            answer = extractor.logits(image).argmax(dim=1)
            known = target >= 0
            correct += torch.bincount(target[known & (answer == target)].cpu(), minlength=len(correct))
            total += torch.bincount(target[known].cpu(), minlength=len(total))
    seen = total > 0
    return float((correct[seen] / total[seen]).mean()) if bool(seen.any()) else None


def questions(batch: Batch, by_class: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and the answers to them: the labels, or each image in all four turns."""
    if by_class:
        yield batch.image, batch.label
        return
    for count in range(NUM_TURNS):
        yield turned(batch.image, count), torch.full_like(batch.label, count)


def report(store: Store, by_class: bool, accuracy: float | None, digest: str) -> None:
    """One line for the person who waits."""
    subject = f"{len(store.classes)} classes" if by_class else "quarter turns (no classes to learn)"
    measured = "no validation image" if accuracy is None else f"balanced validation accuracy {accuracy:.3f}"
    Console().print(f"Domain extractor: {subject}, {measured}, weights {digest[:12]}", highlight=False, soft_wrap=True)
