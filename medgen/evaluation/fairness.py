"""Evaluate by groups of patients: sex, age and view, as far as the user's manifest.csv gives them.

Shapes: N images of a split, n images with a value.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from medgen.config import to_name
from medgen.data.conditions import parse_number
from medgen.data.store import ATTRIBUTES, Split
from medgen.evaluation.context import EvaluationContext
from medgen.evaluation.label_accuracy import is_correct
from medgen.evaluation.training_sets import BOTH, REAL, SYNTHETIC, UtilityResult
from medgen.metrics.c2st import MIN_GROUPS
from medgen.metrics.intervals import (
    NORMAL_QUANTILE,
    Groups,
    Interval,
    group_rows,
    interval_metrics,
    mean_interval,
    mean_variance,
    select_groups,
)
from medgen.reports.evaluation import FAIRNESS_TEXT, PageTable

MIN_IMAGES = 20  # of a group; smaller groups, and those of fewer than 10 patients, are left out
FIRST_AGES = (0, 18, 40, 60, 80)  # of the age groups, in years


class Measure(NamedTuple):
    """A value of some images of a split."""

    title: str
    rows: Tensor  # (n,) of the split
    values: Tensor  # (n,)


class GroupValue(NamedTuple):
    """A measure of a group."""

    group: str  # sex_F
    measure: str
    num_images: int
    interval: Interval
    difference: Interval  # from the images of all other groups of this attribute, with an interval for all comparisons


class _Values(NamedTuple):
    """Values (n,) of the images of a group, with their patients."""

    values: Tensor
    patients: Groups

    @classmethod
    def select(cls, measure: Measure, chosen: Sequence[bool], patients: Groups) -> "_Values":
        """The values of the chosen images of a measure; `patients` are of all images of the split."""
        rows = torch.tensor(chosen).nonzero()[:, 0]
        return cls(measure.values[rows].double(), select_groups(patients, measure.rows[rows]))

    @property
    def is_large(self) -> bool:
        """True if the group is large enough for a value."""
        count = len(self.values)
        return count >= MIN_IMAGES and len(group_rows(count, self.patients)) >= MIN_GROUPS


def collect_measures(context: EvaluationContext, ssim: Tensor, utility: Sequence[UtilityResult]) -> dict[str, Measure]:
    """The measures that have a value of each test image, by the end of their metrics' names."""
    measures = {"ssim": Measure("SSIM of reconstructions", torch.arange(len(ssim)), ssim)}
    recognised = [i for i, name in enumerate(context.store.classes) if name not in context.unrecognised]
    labels = context.labels[context.compared_rows]
    if len(recognised) > 1:
        correct = is_correct(context.extractor, context.compared, labels, context.params.batch_size)
        known = torch.isin(labels, torch.tensor(recognised))
        title = "the domain classifier's accuracy on real images"
        measures["label_accuracy_real"] = Measure(title, context.compared_rows[known], correct[known])
    titles = {REAL: "real images", BOTH: "real images and samples", SYNTHETIC: "samples"}
    for result in utility:
        measure = result.task.measure
        for kind, title in titles.items():
            scores = result[kind].double().mean(dim=0)
            name = f"utility_{measure.lower()}_{kind}"
            measures[name] = Measure(f"{measure}, trained on {title}", result.rows, scores)
    return measures


def compare_groups(split: Split, measures: Mapping[str, Measure]) -> list[GroupValue]:
    """Each measure of each group that is large enough, and its difference from the other images with that attribute."""
    patients, found = split.patients, []
    for attribute, names in group_names(split).items():
        for key, measure in measures.items():
            own = [names[row] for row in measure.rows.tolist()]
            for name in sorted(set(own) - {""}):
                inside = _Values.select(measure, [each == name for each in own], patients)
                outside = _Values.select(measure, [each not in ("", name) for each in own], patients)
                if inside.is_large and outside.is_large:
                    group, number = f"{attribute}_{name}", len(inside.values)
                    found.append(GroupValue(group, key, number, mean_interval(*inside), _difference(inside, outside)))
    # Bonferroni: the intervals of differences hold for all comparisons together
    quantile = torch.special.ndtri(torch.tensor(1.0 - 0.025 / max(1, len(found)), dtype=torch.float64))
    widening = float(quantile) / NORMAL_QUANTILE
    return [each._replace(difference=_widen(each.difference, widening)) for each in found]


def fairness_metrics(found: Sequence[GroupValue]) -> dict[str, float]:
    """The `fairness/` metrics."""
    metrics: dict[str, float] = {}
    for each in found:
        metrics |= interval_metrics(f"fairness/{each.group}", {each.measure: each.interval})
    return metrics


def fairness_tables(found: Sequence[GroupValue], measures: Mapping[str, Measure]) -> list[PageTable]:
    """The table of all groups; none without groups."""
    rows: list[tuple[str, ...]] = [
        (
            measures[each.measure].title,
            each.group.replace("_", " ", 1),
            f"{each.num_images:,}",
            _show(each.interval, ""),
            _show(each.difference, "+"),
        )
        for each in sorted(found, key=lambda each: list(measures).index(each.measure))
    ]
    head = ("measure", "group", "test images", "value", "difference from the others")
    return [PageTable("By sex, age and view", FAIRNESS_TEXT, head, rows)] if rows else []


def fairness_findings(found: Sequence[GroupValue], measures: Mapping[str, Measure]) -> list[str]:
    """A sentence for each group that is worse than the others, or one for all if none is; none without groups."""
    worse = [
        f"Worse for {each.group.replace('_', ' ', 1)}: {measures[each.measure].title} is {-each.difference.value:.3f} "
        f"lower than for the others ({-each.difference.high:.3f} to {-each.difference.low:.3f})."
        for each in found
        if each.difference.high < 0
    ]
    names = ", ".join(dict.fromkeys(each.group.replace("_", " ", 1) for each in found))
    return worse or ([f"No difference between groups was found ({names})."] if found else [])


def group_names(split: Split) -> dict[str, list[str]]:
    """Group of each image (N) by attribute, "" where it is unknown; without attributes that no image has."""
    names: dict[str, list[str]] = {attribute: [] for attribute in ATTRIBUTES}
    for row in split.rows():
        for attribute, values in names.items():
            text = row.get(attribute, "")
            values.append(age_group(text) if attribute == "age" else to_name(text))
    return {attribute: values for attribute, values in names.items() if any(values)}


def age_group(text: str) -> str:
    """The age group of an age in years, such as 63, or as DICOM writes it, such as 063Y; other texts as they are."""
    try:
        years = parse_number(text)
    except ValueError:
        return to_name(text)
    if years < 0:
        return to_name(text)
    number = max(number for number, first in enumerate(FIRST_AGES) if years >= first)
    last = f"-{FIRST_AGES[number + 1] - 1}" if number + 1 < len(FIRST_AGES) else "-or-more"
    return f"{FIRST_AGES[number]}{last}"


def _difference(group: _Values, others: _Values) -> Interval:
    error = (mean_variance(*group) + mean_variance(*others)) ** 0.5
    return Interval.from_error(float(group.values.mean() - others.values.mean()), error)


def _widen(interval: Interval, factor: float) -> Interval:
    value, low, high = interval
    return Interval(value, value - factor * (value - low), value + factor * (high - value))


def _show(interval: Interval, sign: str) -> str:
    return "{:{s}.3f} ({:{s}.3f} to {:{s}.3f})".format(*interval, s=sign)
