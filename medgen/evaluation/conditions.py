"""Evaluate whether samples have the conditions that they were requested with.

Networks trained on the train split predict the conditions of an image: the class network of the domain extractor all
categories, findings and numbers, and a U-Net each map: the mask, or a paired image. They are applied to samples, whose
requested conditions are those of held-out images, and to the held-out images themselves. The real images are the
reference, the best value to expect; the baseline is a prediction that does not depend on the image.

Shapes: N images, C channels, H W height and width, K values of conditions, F findings or categories, P planes of an
image: 1, or of a volume 3 (`medgen.data.images.middle_planes`).
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
from medgen.data.images import Images, StoredPlanes, middle_planes, split_images, to_floats
from medgen.data.store import Split
from medgen.evaluation.context import EvaluationContext
from medgen.evaluation.fitting import fit
from medgen.evaluation.label_accuracy import balanced_accuracy
from medgen.evaluation.segmenter import BATCH_SIZE as MAP_BATCH_SIZE
from medgen.evaluation.segmenter import train_unet
from medgen.metrics.c2st import auc_interval
from medgen.metrics.features import DomainExtractor
from medgen.metrics.intervals import Groups, Interval, interval_metrics, mean_interval, select_groups
from medgen.metrics.segmentation import class_indices, count_classes, foreground_scores
from medgen.models.unet import UNet
from medgen.nn.conditions import StoredConditions
from medgen.nn.ssim import ssim
from medgen.reports.evaluation import CONDITIONS_TEXT, PageTable, Row
from medgen.training.extractor import augment

STEPS, MAP_STEPS = 1000, 600  # of the trainings
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
ERROR = "mean absolute error"
MEAN_AREA = "mean AUC of findings"
BALANCED = "balanced accuracy"
MAP_MEASURES = {"mask": ("Dice", "IoU"), "image": ("correlation", "SSIM")}
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
    for map_field, _ in space.map_fields.values():
        found += _compare_maps(context, map_field, requested, samples)
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
    """Values (N, K) without the maps."""
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


def _compare_maps(
    context: EvaluationContext, field: ConditionField, requested: StoredConditions, samples: Tensor
) -> list[Agreement]:
    """Agreement of the map that a U-Net predicts from samples and real images with the requested and the true one.

    Dice and IoU of a mask, correlation and SSIM of a paired image.
    """
    split, train, batch_size = context.held_out, context.store.split("train"), context.params.batch_size
    has_map = torch.from_numpy(split.has_map(field.name))
    numbers = ((requested.rows >= 0) & has_map[requested.rows.clamp(min=0)]).nonzero()[:, 0]
    real = context.compared_rows[has_map[context.compared_rows]]
    if not len(numbers) or not len(real) or not train.has_map(field.name).any():
        return []
    network, constant = train_map_network(context, field), _constant_map(train, field, batch_size)
    scores = []  # (N, 2) of samples and of real images
    baseline = []
    for images, at, rows in ((samples, numbers, requested.rows[numbers]), (StoredPlanes(split), real, real)):
        own = []
        for part in torch.split(torch.arange(len(at)), batch_size):
            true = _read_planes(split, field, rows[part])
            inputs = to_floats(images[at[part]].to(context.device))
            with torch.no_grad():
                predicted = network.predict(_single_planes(inputs, true.shape[1])).prediction.cpu()
            found = class_indices(predicted) if field.kind == "mask" else predicted[:, 0]
            own.append(_map_scores(field, found.view_as(true), true))
            if images is not samples:
                baseline.append(_map_scores(field, constant.expand_as(true), true))
        scores.append(torch.cat(own))
    groups: tuple[Groups, Groups] = (None, select_groups(context.patients, real))
    agreements = []
    for number, measure in enumerate(MAP_MEASURES[field.kind]):
        samples_interval, real_interval = (
            mean_interval(score[:, number], group) for score, group in zip(scores, groups, strict=True)
        )
        value = float(torch.cat(baseline)[:, number].mean())
        intervals, counts = (samples_interval, real_interval), (len(numbers), len(real))
        key = f"{field.name}_{measure.lower()}"
        agreements.append(Agreement(key, field.name, measure, intervals, value, counts))
    return agreements


def _read_planes(split: Split, field: ConditionField, rows: Tensor) -> Tensor:
    """Class numbers of masks, or grey values in [0, 1] of paired images, of rows (B,) of a split: (B, P, H, W)."""
    stored = middle_planes(torch.from_numpy(split.read_map(field, rows.numpy())))
    return stored if field.kind == "mask" else to_floats(stored)


def _single_planes(images: Tensor, num_planes: int) -> Tensor:
    """Images (B, P·C, H, W) with each plane as an image of its own, (B·P, C, H, W)."""
    return images.reshape(num_planes * len(images), -1, *images.shape[2:])


def _constant_map(train: Split, field: ConditionField, batch_size: int) -> Tensor:
    """Most common class of the train masks, or mean of the train images, at each pixel (P, H, W)."""
    rows = torch.from_numpy(train.has_map(field.name)).nonzero()[:, 0]
    total = torch.zeros(())
    for part in torch.split(rows, batch_size):
        planes = _read_planes(train, field, part)
        total = total + (count_classes(planes, field.channels) if field.kind == "mask" else planes.sum(dim=0))
    return total.argmax(dim=0) if field.kind == "mask" else total / len(rows)


def _map_scores(field: ConditionField, predicted: Tensor, true: Tensor) -> Tensor:
    """Scores (B, 2) of predicted maps (B, P, H, W), mean over planes: those of `MAP_MEASURES`."""
    flat, true_flat = predicted.flatten(0, 1), true.flatten(0, 1)
    if field.kind == "mask":
        scores = foreground_scores(flat, true_flat, field.channels)
    else:
        scores = torch.stack([correlation(flat, true_flat), ssim(true_flat[:, None], flat[:, None])], dim=1)
    return scores.double().view(len(true), -1, 2).mean(dim=1)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation (B,) of the pixels of images (B, H, W); 0 for an image without contrast."""
    a, b = (images.double().flatten(1) - images.double().flatten(1).mean(1, keepdim=True) for images in (first, second))
    result: Tensor = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    return result


def train_map_network(context: EvaluationContext, field: ConditionField) -> UNet:
    """A U-Net that predicts the train split's masks or paired images, plane by plane."""
    split, seed = context.store.split("train"), seed_of(context.params.seed, 8)
    images, with_map = StoredPlanes(split), torch.from_numpy(split.has_map(field.name)).nonzero()[:, 0]
    shape = (context.store.image_shape[0], *images.shape[2:])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = with_map[torch.randint(len(with_map), (MAP_BATCH_SIZE,), generator=generator)]
        planes = _read_planes(split, field, rows)
        return _single_planes(to_floats(images[rows]), planes.shape[1]), planes.flatten(0, 1)

    return train_unet(draw, shape, field.channels, MAP_STEPS, seed, context.device)
