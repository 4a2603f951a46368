"""Compares the class that a classifier finds in an image with the label the image was made for.

The classifier is the domain extractor, trained on real images alone. Its accuracy on real test images is the reference:
more cannot be asked of a sample.

Shapes: N images, C channels, H W height and width, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medgen.data.store import Split
from medgen.metrics.features import DomainExtractor
from medgen.metrics.generation import thin
from medgen.metrics.intervals import Groups, Interval, group_rows
from medgen.models import GenerativeModel
from medgen.reports.figures import write_stacks

MAX_SWAPPED = 1000
NUM_SHOWN = 25  # as in the published experiment
COLUMNS = 9
PICTURE = "wrong_labels.png"


@dataclass(frozen=True)
class Swapped:
    """Test images, encoded with their label and decoded with a wrong one."""

    original: Tensor  # (N, C, H, W) uint8
    decoded: Tensor  # (N, C, H, W) in [0, 1]
    true: Tensor  # (N,)
    given: Tensor  # (N,)
    rows: Tensor  # (N,) of the test split


@torch.no_grad()
def swap_labels(model: GenerativeModel, test: Split, known: Tensor, batch_size: int, seed: int) -> Swapped | None:
    """Up to 1,000 labelled test images, spread over the split, each with a wrong label drawn from `known` (K,) classes.

    None where there is no such image, or no other class that the model has learnt.
    """
    labels = torch.from_numpy(test.labels.copy())
    rows = ((labels >= 0) & (known.sum() > known[labels.clamp(min=0)].long())).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    rows = thin(rows, min(MAX_SWAPPED, len(rows)))
    original, true = torch.from_numpy(test.images[rows.numpy()]), labels[rows]
    given = other_labels(true, known, torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    decoded = []
    for part in torch.split(torch.arange(len(rows)), batch_size):
        latent = model.encode(original[part].to(device).float() / 255.0, true[part].to(device)).mean
        decoded.append(model.decode(latent, given[part].to(device)).float().cpu())
    return Swapped(original, torch.cat(decoded), true, given, rows)


def other_labels(true: Tensor, known: Tensor, generator: torch.Generator) -> Tensor:
    """For each label (N,) another, uniform over the other classes of which `known` (K,) is true."""
    choices = known.float().repeat(len(true), 1)  # (N, K)
    choices.scatter_(1, true[:, None], 0.0)
    return torch.multinomial(choices, 1, generator=generator)[:, 0]


@torch.no_grad()
def answers(extractor: DomainExtractor, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """For each image (N, C, H, W), uint8 or floats in [0, 1]: True where the class found is its label (N,)."""
    device = next(extractor.parameters()).device
    found = []
    for part in torch.split(images, batch_size):
        part = part.to(device)
        scores = extractor.logits(part if part.is_floating_point() else part.float() / 255.0)
        found.append(scores.argmax(dim=1).cpu())
    return torch.cat(found) == labels


def balanced_accuracy(correct: Tensor, labels: Tensor, classes: Sequence[int], groups: Groups = None) -> Interval:
    """Mean over classes of the share of right answers, so that sets of different class mixes can be compared.

    The error is the linearised one of a mean of ratios over groups. Where answers hardly vary, as when all are right,
    it is at least that of independent answers with one right and one wrong added to each class.

    Args:
        correct: (N,) of True and False.
        labels: (N,); images of other classes than `classes` do not count.
        classes: each has an image at least.
        groups: N keys, such as each image's patient: answers on one patient's images resemble one another.

    Returns:
        The accuracy and its 95 % interval, which may exceed [0, 1].
    """
    correct = correct.double()
    influence = torch.zeros_like(correct)
    shares, least = [], 0.0
    for label in classes:
        rows = (labels == label).nonzero()[:, 0]
        count, share = len(rows), correct[rows].mean()
        shares.append(float(share))
        influence[rows] = (correct[rows] - share) / (count * len(classes))
        smoothed = (float(correct[rows].sum()) + 1) / (count + 2)
        least += smoothed * (1 - smoothed) / count / len(classes) ** 2
    sums = torch.stack([influence[rows].sum() for rows in group_rows(len(labels), groups)])
    variance = float(sums.square().sum()) * len(sums) / max(1, len(sums) - 1)
    return Interval.of(sum(shares) / len(shares), max(variance, least) ** 0.5)


def draw(figures: Path, swapped: Swapped, classes: Sequence[str]) -> None:
    """Writes wrong_labels.png: originals over what the model makes of them, under each pair its two labels.

    No stage of dvc.yaml declares the file: an output has to be there whatever the model, and what is no picture should
    not look like one. index.html is declared and has the picture inside: with that DVC brings it back.
    """
    size = min(NUM_SHOWN, len(swapped.true))
    pairs = zip(thin(swapped.true, size).tolist(), thin(swapped.given, size).tolist(), strict=True)
    captions = [f"true: {classes[true]}\ngiven: {classes[given]}" for true, given in pairs]
    lines = {"original": thin(swapped.original, size), "decoded": thin(swapped.decoded, size)}
    write_stacks(figures / PICTURE, lines, columns=COLUMNS, captions=captions)
