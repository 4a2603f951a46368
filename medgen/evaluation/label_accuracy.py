"""Evaluate whether the class that a classifier finds in an image is the image's label.

The classifier is the domain extractor, trained on real images alone. Its accuracy on real test images is the reference,
the highest value to expect.

Shapes: N images, C channels, H W height and width, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from medgen.config import seed_of
from medgen.data.images import Images, StoredImages, middle_planes, split_images, to_floats
from medgen.data.store import Split
from medgen.evaluation.context import EvaluationContext, labels_of
from medgen.metrics.features import DomainExtractor
from medgen.metrics.generation import subsample
from medgen.metrics.intervals import Groups, Interval, group_indices, interval_metrics, select_groups
from medgen.models import GenerativeModel
from medgen.nn.conditions import read_conditions

MAX_SWAPPED = 1000


@dataclass(frozen=True)
class LabelSwap:
    """Test images that were encoded with their label and decoded with a wrong one."""

    original: Tensor  # (N, C, H, W) as stored
    decoded: Tensor  # (N, C, H, W) in [0, 1]
    true: Tensor  # (N,) labels
    given: Tensor  # (N,) wrong labels
    rows: Tensor  # (N,) of the test split


class LabelAccuracy(NamedTuple):
    """Accuracy of the domain classifier."""

    metrics: dict[str, float]  # `generation/label_accuracy` and others
    by_class: dict[int, float]  # share of samples of each class in which the classifier finds it


def evaluate_labels(context: EvaluationContext, samples: Tensor, swap: LabelSwap | None) -> LabelAccuracy:
    """Balanced accuracy of the domain classifier on samples, label swaps and real images, with 95 % intervals.

    All three use the same classes: those that the extractor recognises and that occur in samples and real images. With
    fewer than two such classes there are no metrics; the label swaps must have all of them, too.
    """
    labels = context.labels[context.compared_rows]
    if context.sample_labels is None:
        return LabelAccuracy({}, {})
    sets: dict[str, tuple[Images, Tensor, Groups]] = {
        "label_accuracy": (samples, context.sample_labels, None),
        "label_accuracy_real": (context.compared, labels, context.groups),
    }
    recognised = {i for i, name in enumerate(context.store.classes) if name not in context.unrecognised}
    classes = sorted(recognised.intersection(*(targets.tolist() for _, targets, _ in sets.values())))
    if len(classes) < 2:
        return LabelAccuracy({}, {})
    if swap and set(classes) <= set(swap.given.tolist()):
        sets["label_accuracy_wrong"] = (swap.decoded, swap.given, select_groups(context.patients, swap.rows))
    intervals, by_class = {}, dict[int, float]()
    for name, (images, targets, keys) in sets.items():
        correct = is_correct(context.extractor, images, targets, context.params.batch_size)
        intervals[name] = balanced_accuracy(correct, targets, classes, keys)
        if images is samples:
            by_class = {label: float(correct[targets == label].double().mean()) for label in classes}
    return LabelAccuracy(interval_metrics("generation", intervals), by_class)


def swap_labels(context: EvaluationContext) -> LabelSwap | None:
    """Label swaps of test images; None for a model that does not use labels or data without classes."""
    if not context.model.conditional or len(context.prior.frequencies) == 0:
        return None
    known, seed = context.prior.frequencies > 0, seed_of(context.params.seed, 2)
    return decode_with_wrong_labels(context.model, context.held_out, known, context.params.batch_size, seed)


@torch.no_grad()
def decode_with_wrong_labels(
    model: GenerativeModel, test: Split, known: Tensor, batch_size: int, seed: int
) -> LabelSwap | None:
    """Decode up to 1,000 labelled test images, spread evenly, each with a random other class of `known` (K,) booleans.

    None if there is no labelled image, or no other class that the model has learnt.
    """
    labels = labels_of(test)
    rows = ((labels >= 0) & (known.sum() > known[labels.clamp(min=0)].long())).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    rows = subsample(rows, min(MAX_SWAPPED, len(rows)))
    original, true = StoredImages(test, rows)[:], labels[rows]
    given = draw_wrong_labels(true, known, torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    decoded = []
    for part in torch.split(torch.arange(len(rows)), batch_size):
        conditions = None if model.space is None else read_conditions(test, rows[part])
        latent = model.encode(to_floats(original[part].to(device)), true[part].to(device), conditions).mean
        decoded.append(model.decode(latent, given[part].to(device), conditions).float().cpu())
    return LabelSwap(original, torch.cat(decoded), true, given, rows)


def draw_wrong_labels(true: Tensor, known: Tensor, generator: torch.Generator) -> Tensor:
    """A different label for each label (N,), uniform over the other classes with `known` (K,) True."""
    choices = known.float().repeat(len(true), 1)  # (N, K)
    choices.scatter_(1, true[:, None], 0.0)
    return torch.multinomial(choices, 1, generator=generator)[:, 0]


@torch.no_grad()
def is_correct(extractor: DomainExtractor, images: Images, labels: Tensor, batch_size: int) -> Tensor:
    """True (N,) for each image (N, C, H, W), as stored or floats in [0, 1], whose predicted class is its label (N,)."""
    device = next(extractor.parameters()).device
    predicted = []
    for part in split_images(images, batch_size):
        part = middle_planes(part).to(device)
        scores = extractor.logits(to_floats(part))
        predicted.append(scores.argmax(dim=1).cpu())
    return torch.cat(predicted) == labels


def balanced_accuracy(correct: Tensor, labels: Tensor, classes: Sequence[int], groups: Groups = None) -> Interval:
    """Mean accuracy over classes, which is comparable between sets with different class proportions.

    The standard error is the linearised one of a mean of ratios over groups. If answers hardly vary, such as when all
    are correct, it is at least that of independent answers with one correct and one wrong answer added to each class.

    Args:
        correct: (N,) booleans, or shares of several answers.
        labels: (N,); images of classes not in `classes` are ignored.
        classes: each has at least one image.
        groups: N keys, such as each image's patient, since answers for images of one patient are correlated.

    Returns:
        The accuracy and its 95 % interval, which may exceed [0, 1].
    """
    correct = correct.double()
    share, variance = class_mean(correct, labels, classes, groups)
    min_variance = 0.0
    for label in classes:
        rows = (labels == label).nonzero()[:, 0]
        smoothed = (float(correct[rows].sum()) + 1) / (len(rows) + 2)
        min_variance += smoothed * (1 - smoothed) / len(rows) / len(classes) ** 2
    return Interval.from_error(share, max(variance, min_variance) ** 0.5)


def class_mean(values: Tensor, labels: Tensor, classes: Sequence[int], groups: Groups = None) -> tuple[float, float]:
    """Mean over classes of the mean value (N,) of their images, and its linearised variance over groups.

    `labels` (N,) and `groups` are as for `balanced_accuracy`.
    """
    influence = torch.zeros_like(values)
    means = []
    for label in classes:
        rows = (labels == label).nonzero()[:, 0]
        means.append(float(values[rows].mean()))
        influence[rows] = (values[rows] - values[rows].mean()) / (len(rows) * len(classes))
    indices = group_indices(len(labels), groups)
    sums = torch.zeros(int(indices.max()) + 1, dtype=values.dtype).index_add_(0, indices, influence)
    return sum(means) / len(means), float(sums.square().sum()) * len(sums) / max(1, len(sums) - 1)
