"""Scores of networks that were trained on real images, on samples and on both: metrics, tables and figures.

Shapes: N test images, A sets of training images, R repetitions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medgen.data.store import Store
from medgen.evaluation.context import labels_of
from medgen.evaluation.label_accuracy import balanced_accuracy, class_mean
from medgen.metrics.intervals import Groups, Interval, interval_metrics, select_groups
from medgen.reports.evaluation import UTILITY, UTILITY_MASKS, UTILITY_MASKS_TEXT, UTILITY_TEXT, PageTable
from medgen.reports.figures import write_intervals

REAL, BOTH, SYNTHETIC = "real", "both", "synthetic"


@dataclass(frozen=True)
class UtilityTask:
    """A task that networks are trained for."""

    network: str
    measure: str  # of its result, such as accuracy; in lower case the start of the metrics' names
    average: str  # the measure's mean over test images
    gain: str  # start of the names of the metrics that compare two sets of training images
    figure: str  # name of its file
    title: str  # of its table
    text: str  # below the title


CLASSIFICATION = UtilityTask(
    "classifier", "accuracy", "balanced accuracy", "gain", UTILITY, "Use of samples for training", UTILITY_TEXT
)
SEGMENTATION = UtilityTask(
    "U-Net",
    "Dice",
    "Dice",
    "gain_dice",
    UTILITY_MASKS,
    "Use of samples for training of a U-Net",
    UTILITY_MASKS_TEXT,
)


@dataclass(frozen=True)
class TrainingSet:
    """The images that networks are trained on."""

    kind: str  # REAL, BOTH or SYNTHETIC
    percent: float  # of the train images of each class that are among the real ones; 0 for SYNTHETIC
    num_real: float  # mean over the repetitions
    num_synthetic: int

    @property
    def key(self) -> str:
        """End of a metric's name: real, both_10."""
        return self.kind if self.percent in (0, 100) else f"{self.kind}_{self.percent:g}"


@dataclass(frozen=True)
class UtilityResult:
    """Scores of the same test images by networks trained on different images."""

    task: UtilityTask
    sets: tuple[TrainingSet, ...]
    rows: Tensor  # (N,) of the test split
    scores: Tensor  # (A, R, N): True where the class is found, or Dice of the mask
    classes: tuple[int, ...] = ()  # that the train and the test split have; empty for SEGMENTATION

    def __getitem__(self, key: str) -> Tensor:
        """Scores (R, N) by the networks trained on the set with this key."""
        return self.scores[[each.key for each in self.sets].index(key)]

    def intervals(self, labels: Tensor, groups: Groups) -> dict[str, Interval]:
        """Balanced accuracy or Dice of each set, and its gain over the same real images, with 95 % intervals.

        They cover other test patients and other seeds of the trainings, not other trainings of the generative model.

        Args:
            labels: (N,) of the test images; SEGMENTATION does not use them.
            groups: N patients.
        """
        found, measure, classes = {}, self.task.measure.lower(), self.classes
        if self.task is SEGMENTATION:  # a mean over images: all of them are of one class
            labels, classes = torch.zeros_like(self.rows), (0,)
        for each in self.sets:
            found[f"{measure}_{each.key}"] = self.mean(each.key, labels, classes, groups)
        for each in self.sets:
            if each.kind != REAL:
                gains = self[each.key].double() - self[each.key.replace(each.kind, REAL)].double()
                found[f"{self.task.gain}_{each.key}"] = _mean_interval(gains, labels, classes, groups)
        return found

    def mean(self, key: str, labels: Tensor, classes: Sequence[int], groups: Groups) -> Interval:
        """Mean over classes of the scores by the networks trained on the set with this key."""
        scores = self[key].double()
        if self.task is SEGMENTATION:
            return _mean_interval(scores, labels, classes, groups)
        of_images = balanced_accuracy(scores.mean(dim=0), labels, classes, groups)
        return _with_trainings(of_images, scores, labels, classes)


def utility_metrics(store: Store, results: Sequence[UtilityResult]) -> dict[str, float]:
    """The `utility/` metrics."""
    metrics: dict[str, float] = {}
    for result in results:
        metrics |= interval_metrics("utility", result.intervals(*_labels_and_patients(store, result)))
    return metrics


def utility_tables(store: Store, results: Sequence[UtilityResult]) -> list[PageTable]:
    """Tables of the mean score by training set, and of the accuracy by class with all train images."""
    tables = []
    for result in results:
        labels, groups = _labels_and_patients(store, result)
        found, task = result.intervals(labels, groups), result.task
        rows: list[tuple[str, ...]] = []
        for each in result.sets:
            gain = found.get(f"{task.gain}_{each.key}")
            score = _show(found[f"{task.measure.lower()}_{each.key}"])
            cells = (each.kind, f"{each.num_real:,.0f}", f"{each.num_synthetic:,}", score)
            rows.append((*cells, "–" if gain is None else f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"))
        head = ("trained on", "real images", "samples", task.average, "gain")
        tables.append(PageTable(task.title, task.text, head, rows))
        if result.classes:
            tables.append(_class_table(store, result, labels, groups))
    return tables


def _class_table(store: Store, result: UtilityResult, labels: Tensor, groups: Groups) -> PageTable:
    rows: list[tuple[str, ...]] = []
    for label in result.classes:
        accuracies = (_show(result.mean(key, labels, (label,), groups)) for key in (REAL, BOTH, SYNTHETIC))
        rows.append((store.classes[label], f"{int((labels == label).sum()):,}", *accuracies))
    head = ("class", "test images", "accuracy, real images", "both", "samples")
    text = "Accuracy of the classifiers trained on all train images, with samples, and on samples alone."
    return PageTable(f"{result.task.title} by class", text, head, rows)


def write_figures(folder: Path, store: Store, results: Sequence[UtilityResult]) -> None:
    """Plot the mean score of each training set over the number of its real images, one figure for each result."""
    names = {REAL: "real images", BOTH: "real images and samples", SYNTHETIC: "samples alone"}
    for result in results:
        found, task = result.intervals(*_labels_and_patients(store, result)), result.task
        numbers = [each.num_real for each in result.sets if each.kind == REAL]
        series = {}
        for kind, name in names.items():
            sets = [each for each in result.sets if each.kind == kind]
            points = {each.num_real: found[f"{task.measure.lower()}_{each.key}"] for each in sets}
            series[name] = dict.fromkeys(numbers, points[0]) if kind == SYNTHETIC else points  # a level line
        write_intervals(folder / task.figure, series, ("real train images", f"{task.average} on the test split"))


def _labels_and_patients(store: Store, result: UtilityResult) -> tuple[Tensor, Groups]:
    """Labels (N,) and patients of the test images."""
    test = store.split("test")
    return labels_of(test)[result.rows], select_groups(test.patients, result.rows)


def _show(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _mean_interval(scores: Tensor, labels: Tensor, classes: Sequence[int], groups: Groups) -> Interval:
    """Mean of scores (R, N) over trainings, images and classes."""
    value, variance = class_mean(scores.mean(dim=0), labels, classes, groups)
    return _with_trainings(Interval.from_error(value, variance**0.5), scores, labels, classes)


def _with_trainings(of_images: Interval, scores: Tensor, labels: Tensor, classes: Sequence[int]) -> Interval:
    """Widen an interval over test images by the variance of the mean over trainings, from their scores (R, N)."""
    by_training = torch.tensor([class_mean(one, labels, classes)[0] for one in scores])
    half = (of_images.high - of_images.low) / 2
    error = Interval.from_error(0.0, float((by_training.double().var() / len(by_training)).sqrt())).high
    half = math.hypot(half, error)
    return Interval(of_images.value, of_images.value - half, of_images.value + half)
