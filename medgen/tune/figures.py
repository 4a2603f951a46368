"""Draw the figures of a search: history, importances, parallel coordinates, slices, Pareto front.

Optuna's own figures need pyplot, and in them dotted keys overlap.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from medgen.config.edit import as_yaml, shortest
from medgen.reports.figures import plot_style, write_plot
from medgen.tune.space import Dimension
from medgen.tune.study import Study, is_nonfinite, is_start

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#9a9a9a"
# a trial is drawn at the edge if it is this many times further from the best than the upper quartile of the trials
OUTLIER_FACTOR = 4.0
LABEL_LENGTH = 18  # characters of a key in one line, where keys are side by side
COMPLETE, POOR, PRUNED, NONFINITE, FAILED = "complete", "below the SSIM floor", "pruned", "not finite", "failed"
MARKERS: dict[str, dict[str, Any]] = {  # style of a trial, by group
    COMPLETE: {"marker": "o", "s": 24, "facecolor": BLUE, "edgecolor": "white", "linewidth": 0.5, "zorder": 3},
    POOR: {"marker": "o", "s": 22, "facecolor": "white", "edgecolor": GREY, "zorder": 2.5},
    PRUNED: {"marker": "x", "s": 22, "color": GREY, "linewidth": 1.2, "zorder": 3},
    NONFINITE: {"marker": "x", "s": 26, "color": ORANGE, "linewidth": 1.5, "zorder": 3},
    FAILED: {"marker": "+", "s": 40, "color": BLACK, "linewidth": 1.5, "zorder": 3},
    "trial 0": {"marker": "D", "s": 46, "facecolor": BLACK, "edgecolor": "white", "linewidth": 0.8, "zorder": 5},
    "best": {"marker": "*", "s": 150, "facecolor": ORANGE, "edgecolor": "white", "linewidth": 0.8, "zorder": 6},
}


@dataclass(frozen=True)
class ObjectiveScale:
    """The axis of an objective. Outliers are drawn at its edge, so that they do not compress the other trials."""

    position: int  # index of the objective in the study
    label: str
    sign: float  # 1.0 if lower is better, else -1.0
    best: float
    worst: float  # end of the axis

    @property
    def span(self) -> float:
        """Length of the axis, never 0."""
        return abs(self.worst - self.best) or abs(self.best) or 1.0

    def clip(self, trial: FrozenTrial) -> float:
        """The trial's value, limited to the worst end of the axis."""
        return self.worst if self.is_outlier(trial) else float(trial.values[self.position])

    def is_outlier(self, trial: FrozenTrial) -> bool:
        """True if the trial's value is beyond the worst end of the axis."""
        return self.sign * float(trial.values[self.position]) > self.sign * self.worst

    def share(self, trial: FrozenTrial) -> float:
        """The distance from the best value as a fraction of the axis: 0 the best, 1 the worst."""
        return abs(self.clip(trial) - self.best) / self.span

    def limits(self, beyond: float = 0.06) -> tuple[float, float]:
        """Limits of the axis, with a margin of `beyond` of its length at the worst end."""
        ends = (self.best - self.sign * 0.06 * self.span, self.worst + self.sign * beyond * self.span)
        return min(ends), max(ends)


class TrialGroups:
    """The trials of a study, in the groups that figures distinguish; `best` is marked as the winner."""

    def __init__(self, study: Study, best: FrozenTrial | None) -> None:
        self.study, self.best, self.trials = study, best, study.trials
        good = {trial.number for trial in study.complete()}
        self.by_name: dict[str, list[FrozenTrial]] = {name: [] for name in (COMPLETE, POOR, PRUNED, NONFINITE, FAILED)}
        for trial in self.trials:
            if trial.state == TrialState.COMPLETE:
                self.by_name[COMPLETE if trial.number in good else POOR].append(trial)
            elif trial.state == TrialState.PRUNED:
                self.by_name[NONFINITE if is_nonfinite(trial) else PRUNED].append(trial)
            elif trial.state == TrialState.FAIL:
                self.by_name[FAILED].append(trial)
        self.complete = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        self.first = next((trial for trial in self.complete if trial.number == 0), None)
        self.ended = {name: self.by_name[name] for name in (PRUNED, NONFINITE, FAILED) if self.by_name[name]}

    @cached_property
    def front(self) -> list[FrozenTrial]:
        """The Pareto front, sorted by the first objective; empty with one objective."""
        optimal = self.study.optuna.best_trials if self.study.objective.is_pareto else []
        return sorted(optimal, key=lambda trial: (trial.values[0], trial.number))

    @cached_property
    def scales(self) -> list[ObjectiveScale]:
        """The axes of all objectives; the best trial, trial 0 and the front are never treated as outliers."""
        kept = [trial for trial in (self.first, self.best, *self.front) if trial is not None]
        scales = []
        for position, (label, direction) in enumerate(
            zip(self.study.objective.labels, self.study.objective.directions, strict=True)
        ):
            sign = 1.0 if direction == "minimize" else -1.0
            losses = sign * np.array([trial.values[position] for trial in self.complete])
            best = losses.min()
            reach = OUTLIER_FACTOR * (np.quantile(losses, 0.75) - best)
            near = losses[losses <= best + reach] if reach > 0 else losses
            worst = max([near.max(), *(sign * trial.values[position] for trial in kept)])
            scales.append(ObjectiveScale(position, label, sign, float(sign * best), float(sign * worst)))
        return scales


def write_figures(study: Study, folder: Path, best: FrozenTrial | None) -> list[Path]:
    """Draw history, importances, parallel_coordinates, slice and front as PNG files; `best` is marked as the winner.

    Returns:
        The files. A figure that needs more trials is left out, and an older file of its name is removed.
    """
    groups, written = TrialGroups(study, best), []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        with plot_style():
            figure = draw(groups)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            _add_legend(figure)
            write_plot(path, figure)
        written.append(path)
    return written


def draw_history(groups: TrialGroups) -> "Figure | None":
    """One objective by trial number with its best value so far; a panel below shows trials without a value."""
    if groups.study.objective.is_pareto or not groups.complete:
        return None
    scale, ended = groups.scales[0], groups.ended
    figure = _new_figure(8.0, 4.2 + 0.25 * len(ended))
    heights = [12.0, len(ended) + 0.4] if ended else [1.0]
    panels: Any = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _scatter_complete(panels[0], groups, lambda trial: trial.number, scale)
    best = [np.nan] * len(groups.trials)
    for trial in groups.by_name[COMPLETE]:
        best[trial.number] = scale.sign * trial.values[0]
    curve = scale.sign * np.fmin.accumulate(best)
    panels[0].step(range(len(curve)), curve, where="post", color=GREEN, label="best value so far", zorder=2)
    panels[0].set(ylim=scale.limits(), ylabel=scale.label)
    if ended:
        for row, (name, group) in enumerate(ended.items()):
            panels[1].scatter([trial.number for trial in group], [row] * len(group), **MARKERS[name])
        panels[1].set(yticks=range(len(ended)), yticklabels=list(ended), ylim=(len(ended) - 0.4, -0.6))
        panels[1].spines["left"].set_visible(False)
        panels[1].tick_params(left=False)
    panels[-1].set(xlabel="trial", xlim=(-0.7, max(len(groups.trials), 2) - 0.3))
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_importances(groups: TrialGroups) -> "Figure | None":
    """The importance of each key for the best tenth of trials, per objective, by PED-ANOVA (Watanabe et al. 2023)."""
    values = [trial.values for trial in groups.complete]
    if not values or any(len(set(column)) < 2 for column in zip(*values, strict=True)):
        return None
    shares = {scale.label: _compute_importances(groups.study, scale) for scale in groups.scales}
    keys = sorted(groups.study.space, key=lambda key: sum(share[key] for share in shares.values()))
    figure = _new_figure(8.0, 1.2 + 0.34 * len(keys) * (1 + 0.5 * (len(shares) - 1)))
    axes = figure.subplots()
    height = 0.72 / len(shares)
    for number, (label, share) in enumerate(shares.items()):
        places = np.arange(len(keys)) + 0.36 - (number + 0.5) * height
        bars = axes.barh(places, [share[key] for key in keys], height, color=(BLUE, ORANGE)[number], label=label)
        axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=9)
    axes.set(yticks=range(len(keys)), yticklabels=keys, xlim=(0.0, 1.1 * max(max(s.values()) for s in shares.values())))
    axes.set_xlabel(f"importance (sum 1), from {len(groups.complete)} trials")
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    axes.tick_params(left=False)
    return figure


def draw_parallel_coordinates(groups: TrialGroups) -> "Figure | None":
    """Each complete trial as a line through its values; the last axis and the colour are the objective."""
    import matplotlib as mpl

    if len(groups.complete) < 2:
        return None
    coordinates: list[Dimension | ObjectiveScale] = [*groups.study.space.values(), *groups.scales]
    figure = _new_figure(max(6.0, 1.55 * len(coordinates)), 5.0)
    axes = figure.subplots()
    scales = [axes.twinx() for _ in coordinates]
    for each in figure.axes:
        each.grid(visible=False)
        each.spines[:].set_visible(False)
    for number, (scale, coordinate) in enumerate(zip(scales, coordinates, strict=True)):
        _set_up(scale, "y", coordinate)
        scale.spines["right"].set(position=("data", number), visible=True, color="#b0b0b0")
        scale.tick_params(labelsize=8)
        for label in scale.get_yticklabels():
            label.set_bbox({"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75})
    colours, last = mpl.colormaps["viridis"], groups.scales[-1]
    for rank, trial in enumerate(sorted(groups.complete, key=lambda trial: -last.sign * trial.values[-1])):
        values = [_number(groups.study, trial, coordinate) for coordinate in coordinates]
        points = zip(scales, values, strict=True)
        heights = [(each.transScale + each.transLimits).transform((0.0, value))[1] for each, value in points]
        style: dict[str, Any] = {"color": colours(0.95 * last.share(trial)), "linewidth": 1.0, "alpha": 0.75}
        if trial in groups.by_name[POOR]:
            style = {"color": "#c8c8c8", "linewidth": 0.8, "label": POOR}
        axes.plot(heights, clip_on=False, **({"zorder": 2 + rank / 1000} | style | _highlight(groups, trial)))
    axes.set(xlim=(-0.15, len(coordinates) - 0.4), ylim=(0.0, 1.0), yticks=[])
    axes.set_xticks(range(len(coordinates)), [_wrap_label(coordinate) for coordinate in coordinates])
    axes.tick_params(bottom=False)
    return figure


def draw_slice(groups: TrialGroups) -> "Figure | None":
    """The objectives over each key; trials without a value are in a strip beyond the worst end."""
    if len(groups.complete) < 2:
        return None
    space, ended = groups.study.space, groups.ended
    columns = min(3, len(space))
    blocks = -(-len(space) // columns)  # rows of panels for an objective
    figure = _new_figure(max(5.0, 3.5 * columns), 0.8 + 2.7 * blocks * len(groups.scales))
    panels = figure.subplots(blocks * len(groups.scales), columns, squeeze=False)
    for scale, (number, (key, dimension)) in product(groups.scales, enumerate(space.items())):
        row, column = divmod(number, columns)
        axes: Axes = panels[scale.position * blocks + row, column]

        def across(trial: FrozenTrial, coordinate: Dimension = dimension) -> float:
            return _number(groups.study, trial, coordinate) + _jitter(trial, coordinate)

        _scatter_complete(axes, groups, across, scale)
        strip = scale.worst + scale.sign * 0.17 * scale.span
        for name, group in ended.items():
            shown = [trial for trial in group if key in trial.params]  # a trial may fail before it has values
            axes.scatter([across(trial) for trial in shown], [strip] * len(shown), label=name, **MARKERS[name])
        if ended:
            axes.axhspan(scale.worst + scale.sign * 0.08 * scale.span, strip + scale.sign * scale.span, color="#f2f2f2")
        for points in axes.collections:
            points.set_clip_on(False)  # a value may be an end of its range
        _set_up(axes, "x", dimension)
        axes.set(ylim=scale.limits(0.26 if ended else 0.06), xlabel=key, ylabel=scale.label if column == 0 else "")
        axes.tick_params(labelleft=column == 0)
    for axes in panels.flat:
        axes.set_visible(axes.has_data())
    return figure


def draw_front(groups: TrialGroups) -> "Figure | None":
    """A scatter plot of two objectives with the Pareto front."""
    if not groups.study.objective.is_pareto or len(groups.complete) < 2:
        return None
    across, up = groups.scales
    figure = _new_figure(6.4, 5.0)
    axes = figure.subplots()
    _scatter_complete(axes, groups, across.clip, up)
    line = [[trial.values[position] for trial in groups.front] for position in (0, 1)]
    axes.step(*line, where="post", color=GREEN, zorder=2, marker=".", label="front, by trial number")
    labelled: list[tuple[float, float]] = []
    for trial in groups.front:
        place = across.share(trial), up.share(trial)
        if all(abs(place[0] - x) > 0.05 or abs(place[1] - y) > 0.04 for x, y in labelled):
            labelled.append(place)
            where: dict[str, Any] = {"xytext": (-5, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate(str(trial.number), trial.values, fontsize=8, color=GREEN, **where)
    axes.set(xlim=across.limits(), ylim=up.limits(), xlabel=across.label, ylabel=up.label)
    axes.grid(visible=True)
    return figure


FIGURES: dict[str, Callable[[TrialGroups], "Figure | None"]] = {
    "history": draw_history,
    "importances": draw_importances,
    "parallel_coordinates": draw_parallel_coordinates,
    "slice": draw_slice,
    "front": draw_front,
}


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _add_legend(figure: "Figure") -> None:
    """Add one legend above all panels, with each label once."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if len(named) > 1:
        entry = 0.5 + 0.07 * max(map(len, named))  # inches
        columns = min(len(named), max(1, int(figure.get_figwidth() / entry)))
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns)


def _scatter_complete(
    axes: "Axes", groups: TrialGroups, across: Callable[[FrozenTrial], float], scale: ObjectiveScale
) -> None:
    """Draw complete trials as points, with markers for those below the SSIM floor, outliers, trial 0 and the best."""
    special = [trial for trial in (groups.first, groups.best) if trial is not None]
    for name in (COMPLETE, POOR):
        plain = [trial for trial in groups.by_name[name] if trial not in special]
        for is_outlier in (False, True):
            shown = [trial for trial in plain if scale.is_outlier(trial) == is_outlier]
            style = MARKERS[name] | ({"marker": "^" if scale.sign > 0 else "v"} if is_outlier else {})
            label = "off the scale" if is_outlier else name
            if shown:
                axes.scatter([across(t) for t in shown], [scale.clip(t) for t in shown], label=label, **style)
    for name, trial in (("trial 0", groups.first), ("best", groups.best)):
        if trial is not None and not (name == "trial 0" and trial == groups.best):
            axes.scatter([across(trial)], [scale.clip(trial)], label=_trial_label(groups, trial), **MARKERS[name])


def _trial_label(groups: TrialGroups, trial: FrozenTrial) -> str:
    """The label of trial 0 or the best trial in a legend."""
    own = "trial 0: " + ("params.yaml" if is_start(groups.study, trial) else "former params.yaml")
    best = "chosen" if groups.study.objective.is_pareto else "the best"
    if trial != groups.best:
        return own
    return f"{own}, still {best}" if trial.number == 0 else f"trial {trial.number}: {best}"


def _highlight(groups: TrialGroups, trial: FrozenTrial) -> dict[str, Any]:
    """The line style of trial 0 and the best trial; empty for others."""
    if trial == groups.best:
        return {"color": ORANGE, "linewidth": 2.4, "alpha": 1.0, "zorder": 5, "label": _trial_label(groups, trial)}
    if trial.number == 0:
        style = {"color": BLACK, "linewidth": 1.8, "linestyle": "--", "alpha": 1.0, "zorder": 4}
        return style | {"label": _trial_label(groups, trial)}
    return {}


def _compute_importances(study: Study, scale: ObjectiveScale) -> dict[str, float]:
    """Importance of each key for one objective; they sum to 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it minimizes the target, which the sign accounts for
        return optuna.importance.get_param_importances(
            study.optuna, params=list(study.space), target=lambda trial: scale.sign * trial.values[scale.position]
        )


def _number(study: Study, trial: FrozenTrial, coordinate: Dimension | ObjectiveScale) -> float:
    """The position of a trial on an axis: a number, or the index of a choice."""
    if isinstance(coordinate, ObjectiveScale):
        return coordinate.clip(trial)
    value, values = study.values_of(trial)[coordinate.key], coordinate.distribution
    return values.choices.index(value) if isinstance(values, CategoricalDistribution) else value  # type: ignore[return-value]


def _jitter(trial: FrozenTrial, dimension: Dimension) -> float:
    """A fixed offset that keeps trials with the same choice from overlapping."""
    is_choice = isinstance(dimension.distribution, CategoricalDistribution)
    return (trial.number * 0.618 % 1.0 - 0.5) * 0.5 if is_choice else 0.0


def _set_up(axes: "Axes", side: Literal["x", "y"], coordinate: Dimension | ObjectiveScale) -> None:
    """Give an axis of a plot the scale, the range and the ticks of a searched key or an objective."""
    from matplotlib.ticker import LogLocator

    axis = getattr(axes, f"{side}axis")
    values = coordinate.distribution if isinstance(coordinate, Dimension) else coordinate
    if isinstance(values, CategoricalDistribution):
        limits = (-0.5, len(values.choices) - 0.5)
        labels = [as_yaml(choice) for choice in values.choices]  # type: ignore[arg-type]  # none is None
        axis.set_ticks(range(len(labels)), labels)
    elif isinstance(values, ObjectiveScale):
        low = min(values.best, values.worst)
        limits = (low, low + values.span)
        axis.set_major_formatter(_format_tick)
    else:
        limits = (values.low, values.high)
        if values.log:
            axes.set(**{f"{side}scale": "log"})
            decades = np.log10(values.high / values.low)
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)))
            axis.minorticks_off()
        else:
            axis.get_major_locator().set_params(integer=isinstance(values, IntDistribution))
        axis.set_major_formatter(_format_tick)
    axes.set(**{f"{side}lim": limits})


def _format_tick(number: float, _: object) -> str:
    return f"{number:g}" if abs(number) >= 1e-3 or number == 0 else shortest(f"{number:.2e}")


def _wrap_label(coordinate: Dimension | ObjectiveScale) -> str:
    """The label of an axis, wrapped after dots and slashes."""
    lines = [""]
    for part in re.findall(r"[^./]+[./]?", coordinate.key if isinstance(coordinate, Dimension) else coordinate.label):
        if lines[-1] and len(lines[-1] + part) > LABEL_LENGTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
