"""Evaluate whether samples have the conditions that they were requested with.

Networks trained on the train split predict the conditions of an image: the class network of the domain extractor all
categories, findings and numbers, and a U-Net the mask. They are applied to samples, whose requested conditions are
those of held-out images, and to the held-out images themselves. The real images are the reference, the best value to
expect; the baseline is a prediction that does not depend on the image.

Shapes: N images, C channels, H W height and width, K values of conditions, F findings or categories.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medgen.config import seed_of, to_name
from medgen.data.conditions import ConditionField, ConditionSpace
from medgen.data.images import Images, StoredPlanes, split_images, to_floats
from medgen.data.store import Split
from medgen.evaluation.context import EvaluationContext
from medgen.evaluation.fitting import fit
from medgen.evaluation.label_accuracy import balanced_accuracy
from medgen.evaluation.segmentation import mean_mask
from medgen.evaluation.segmenter import MaskedImages, StoredMasks, score_masks, train_segmenter
from medgen.metrics.c2st import auc_interval
from medgen.metrics.features import DomainExtractor
from medgen.metrics.intervals import Groups, Interval, interval_metrics, mean_interval, select_groups
from medgen.metrics.segmentation import foreground_scores
from medgen.nn.conditions import StoredConditions
from medgen.reports.evaluation import CONDITIONS_TEXT, PageTable, Row
from medgen.training.distributed import World
from medgen.training.extractor import augment

STEPS, MASK_STEPS = 1000, 600  # of the trainings
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
ERROR = "mean absolute error"
MEAN_AREA = "mean AUC of findings"
BALANCED = "balanced accuracy"
SHORT = {ERROR: "error", MEAN_AREA: "AUC", BALANCED: "accuracy"}
MIN_IMAGES = 5  # with and without a finding, or of a category
CENTRE, SPREAD = 0.5, 0.25  # of a number in its range, which the network predicts in units of the spread


class Agreement(NamedTuple):
    """Agreement of samples and of held-out images with a condition."""

    key: str  # age_mae
    condition: str
    measure: str
    intervals: tuple[Interval, Interval]  # of samples and of held-out images
    baseline: float  # of a prediction that does not depend on the image
    counts: tuple[int, int]  # samples and held-out images

    @property
    def samples(self) -> Interval:
        """Agreement of the samples."""
        return self.intervals[0]

    @property
    def real(self) -> Interval:
        """Agreement of the held-out images."""
        return self.intervals[1]


class _Set(NamedTuple):
    """Images with their conditions."""

    images: Images  # (N, C, H, W) as stored
    values: Tensor  # (N, K)
    groups: Groups


def evaluate_conditions(context: EvaluationContext, samples: Tensor) -> list[Agreement]:
    """Agreement of samples (N, C, H, W), as stored, with each condition; none for a model without conditions."""
    requested, space = context.sample_conditions, context.store.conditions
    if requested is None or space is None:
        return []
    found: list[Agreement] = []
    if space.size:
        predictor = train_predictor(context, space)
        real = StoredConditions(context.held_out, context.compared_rows)
        sets = (
            _Set(samples, _values(requested), None),
            _Set(context.compared, _values(real), context.groups),
        )
        scores = [predict(predictor, each.images, context.params.batch_size) for each in sets]
        start = 0
        for field, place in space.vector_fields.values():
            size = field.size - 1
            own = [score[:, start : start + size] for score in scores]
            found += _compare(field, place, sets, own, context.store.split("train"))
            start += size
    if space.mask is not None:
        found += _compare_masks(context, space.mask, requested, samples)
    return found


def condition_metrics(found: Sequence[Agreement]) -> dict[str, float]:
    """The `condition/` metrics."""
    metrics: dict[str, float] = {}
    for each in found:
        metrics |= interval_metrics("condition", {each.key: each.samples, f"{each.key}_real": each.real})
        metrics[f"condition/{each.key}_baseline"] = each.baseline
    return metrics


def condition_table(found: Sequence[Agreement]) -> list[PageTable]:
    """The table of the agreement with each condition; none without any."""

    rows: list[tuple[str, ...]] = [
        (
            each.condition,
            each.measure,
            _show(each.samples),
            _show(each.real),
            f"{each.baseline:.3g}",
            " and ".join(f"{count:,}" for count in each.counts),
        )
        for each in found
    ]
    head = ("condition", "measure", "samples", "real images", "baseline", "samples, real images")
    return [PageTable("Agreement with conditions", CONDITIONS_TEXT, head, rows)] if rows else []


def condition_rows(found: Sequence[Agreement]) -> list[Row]:
    """Key metrics, without those of single findings."""
    return [
        Row(
            f"Condition {each.condition}, {SHORT.get(each.measure, each.measure)}",
            _show(each.samples),
            f"{each.real.value:.3g} real images",
            f"{each.measure} of a network that predicts the condition; {each.baseline:.3g} without the image",
        )
        for each in found
        if ": " not in each.condition
    ]


def condition_findings(found: Sequence[Agreement]) -> list[str]:
    """A sentence on the conditions that samples show less than real images do, or on all; none without conditions."""
    if not found:
        return []
    worse = []
    for each in found:
        sign = -1.0 if each.measure == ERROR else 1.0
        margin = math.hypot(each.samples.high - each.samples.value, each.real.high - each.real.value)
        if sign * (each.real.value - each.samples.value) > margin:
            values = f"{each.measure} {each.samples.value:.3g}, real images {each.real.value:.3g}"
            worse.append(f"{each.condition} ({values}, baseline {each.baseline:.3g})")
    if worse:
        return [f"Samples show these conditions less clearly than real images: {'; '.join(worse)}."]
    return ["Samples show the requested conditions as clearly as real images do, within the intervals."]


def _show(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"


def train_predictor(context: EvaluationContext, space: ConditionSpace) -> DomainExtractor:
    """A network whose logits (N, sum of F) predict the train split's conditions, field after field."""
    split, device, seed = context.store.split("train"), context.device, seed_of(context.params.seed, 7)
    images, values = StoredPlanes(split), torch.from_numpy(split.condition_values)
    outputs = sum(field.size - 1 for field, _ in space.vector_fields.values())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DomainExtractor(replace(context.extractor.sizes, num_outputs=outputs)).to(device)

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, step))
        rows = torch.randint(len(values), (BATCH_SIZE,), generator=generator)
        batch = augment(to_floats(images[rows]), generator).to(device)
        return prediction_loss(network.logits(batch), values[rows].to(device), space, weights)

    weights = {name: _class_weights(values[:, place]).to(device) for name, (_, place) in space.vector_fields.items()}
    trained = [*network.content.parameters(), *network.class_head.parameters()]
    fit(trained, loss_of, STEPS, LEARNING_RATE)
    return network.eval()


def prediction_loss(logits: Tensor, values: Tensor, space: ConditionSpace, weights: dict[str, Tensor]) -> Tensor:
    """Sum over conditions of the mean cross-entropy, or squared error of a number, of images that have the condition.

    Args:
        logits: (B, sum of F).
        values: (B, K).
        space: the conditions.
        weights: (F,) of the categories, by condition.
    """
    total, start = logits.new_zeros(()), 0
    for name, (field, place) in space.vector_fields.items():
        known, target = values[:, place.start] > 0, values[:, place.start + 1 : place.stop]
        own = logits[:, start : start + field.size - 1]
        start += field.size - 1
        if not bool(known.any()):
            continue
        own, target = own[known], target[known]
        if field.kind == "category":
            total = total + F.cross_entropy(own, target.argmax(dim=1), weights[name])
        elif field.kind == "multilabel":
            total = total + F.binary_cross_entropy_with_logits(own, target)
        else:
            total = total + F.mse_loss(own, (target - CENTRE) / SPREAD)
    return total


def _class_weights(values: Tensor) -> Tensor:
    """Weights (F,) that make categories count equally, from a condition's values (N, 1 + F)."""
    counts = values[:, 1:].sum(dim=0)
    return counts.sum() / len(counts) / counts.clamp_min(1.0)


@torch.no_grad()
def predict(network: DomainExtractor, images: Images, batch_size: int) -> Tensor:
    """Logits (N, sum of F), on the CPU, of images (N, C, H, W) as stored."""
    device = network.mean.device
    return torch.cat([network.logits(to_floats(part.to(device))).cpu() for part in split_images(images, batch_size)])


def _values(conditions: StoredConditions) -> Tensor:
    """Values (N, K) without the masks."""
    rows, values = conditions.rows, torch.from_numpy(conditions.split.condition_values)
    return values[rows.clamp(min=0)] * (rows >= 0)[:, None]


def _compare(
    field: ConditionField, place: slice, sets: Sequence[_Set], scores: Sequence[Tensor], train: Split
) -> list[Agreement]:
    """Agreement of samples and real images with a condition, from the scores (N, F) of both."""
    known = [(each.values[:, place.start] > 0).nonzero()[:, 0] for each in sets]
    targets = [each.values[rows, place.start + 1 : place.stop] for each, rows in zip(sets, known, strict=True)]
    answers = [score[rows] for score, rows in zip(scores, known, strict=True)]
    groups = [select_groups(each.groups, rows) for each, rows in zip(sets, known, strict=True)]
    sizes = (len(known[0]), len(known[1]))
    if not all(sizes):
        return []
    if field.kind == "number":
        return [_mean_errors(field, targets, answers, groups, train.condition_values[:, place], sizes)]
    if field.kind == "category":
        labels = [target.argmax(dim=1) for target in targets]
        counts = torch.stack([torch.bincount(label, minlength=len(field.values)) for label in labels])
        classes = (counts >= MIN_IMAGES).all(dim=0).nonzero()[:, 0].tolist()
        if len(classes) < 2:
            return []
        samples, real = (
            balanced_accuracy(answer.argmax(dim=1) == label, label, classes, group)
            for answer, label, group in zip(answers, labels, groups, strict=True)
        )
        of_samples, of_real = (int(torch.isin(label, torch.tensor(classes)).sum()) for label in labels)
        name, chance = f"{field.name}_accuracy", 1 / len(classes)
        return [Agreement(name, field.name, BALANCED, (samples, real), chance, (of_samples, of_real))]
    return _areas(field, targets, answers, groups, sizes)


def _mean_errors(
    field: ConditionField,
    targets: Sequence[Tensor],
    answers: Sequence[Tensor],
    groups: Sequence[Groups],
    train: object,
    sizes: tuple[int, int],
) -> Agreement:
    """Mean absolute error of a number in its own unit, from targets and answers (N, 1) of samples and real images."""
    span = field.high - field.low
    samples, real = (
        mean_interval(span * (CENTRE + SPREAD * answer[:, 0] - target[:, 0]).abs(), group)
        for answer, target, group in zip(answers, targets, groups, strict=True)
    )
    values = torch.as_tensor(train)
    median = values[values[:, 0] > 0][:, 1].median()
    baseline = span * float((targets[1][:, 0] - median).abs().mean())
    return Agreement(f"{field.name}_mae", field.name, ERROR, (samples, real), baseline, sizes)


def _areas(
    field: ConditionField,
    targets: Sequence[Tensor],
    answers: Sequence[Tensor],
    groups: Sequence[Groups],
    sizes: tuple[int, int],
) -> list[Agreement]:
    """Area under the ROC curve of each finding, from targets and answers (N, F), and their mean over the findings."""
    found = []
    for number, finding in enumerate(field.values):
        present = [target[:, number] > 0 for target in targets]
        if any(min(int(each.sum()), int((~each).sum())) < MIN_IMAGES for each in present):
            continue
        areas = []
        for answer, has, group in zip(answers, present, groups, strict=True):
            absent, own = (~has).nonzero()[:, 0], has.nonzero()[:, 0]
            scores, folds = answer[:, number], torch.zeros(len(answer))
            keys = select_groups(group, absent), select_groups(group, own)
            areas.append(auc_interval(scores[absent], scores[own], folds[absent], folds[own], *keys))
        key = f"{field.name}_{to_name(finding)}_auc"
        found.append(Agreement(key, f"{field.name}: {finding}", "AUC", (areas[0], areas[1]), 0.5, sizes))
    if not found:
        return []
    means = _mean_of([each.samples for each in found]), _mean_of([each.real for each in found])
    return [Agreement(f"{field.name}_auc", field.name, MEAN_AREA, means, 0.5, sizes), *found]


def _mean_of(intervals: Sequence[Interval]) -> Interval:
    """Mean of estimates, with an interval that allows for errors that are the same in all of them."""
    return Interval(*(sum(values) / len(values) for values in zip(*intervals, strict=True)))


def _compare_masks(
    context: EvaluationContext, field: ConditionField, requested: StoredConditions, samples: Tensor
) -> list[Agreement]:
    """Dice and IoU of the masks that a U-Net finds in samples and real images, with the requested and the true ones."""
    split, num_classes = context.held_out, field.channels
    with_mask = torch.from_numpy(split.masked_rows)
    numbers = torch.isin(requested.rows, with_mask).nonzero()[:, 0]
    real = context.compared_rows[torch.isin(context.compared_rows, with_mask)]
    train = context.store.split("train")
    if split.masks is None or not len(numbers) or not len(real) or not len(train.masked_rows):
        return []
    shown = MaskedImages(samples[numbers], StoredMasks(split, requested.rows[numbers]))
    compared, learned = (
        MaskedImages.stored(split, real),
        MaskedImages.stored(train, torch.from_numpy(train.masked_rows)),
    )
    seed, batch_size = seed_of(context.params.seed, 8), context.params.batch_size
    network = train_segmenter([learned], context.store, MASK_STEPS, seed, context.device)
    scores = [score_masks(network, each, batch_size) for each in (shown, compared)]
    constant_mask = mean_mask(train, num_classes, World(0, 1, context.device), batch_size)
    batches = (compared.masks[rows] for rows in torch.split(torch.arange(len(real)), batch_size))
    baseline = torch.cat([foreground_scores(constant_mask.expand_as(true), true, num_classes) for true in batches])
    groups: tuple[Groups, Groups] = (None, select_groups(context.patients, real))
    found = []
    for number, measure in enumerate(("Dice", "IoU")):
        samples_interval, real_interval = (
            mean_interval(score[:, number], group) for score, group in zip(scores, groups, strict=True)
        )
        constant = float(baseline[:, number].mean())
        intervals, counts = (samples_interval, real_interval), (len(numbers), len(real))
        found.append(Agreement(f"{field.name}_{measure.lower()}", field.name, measure, intervals, constant, counts))
    return found
