"""Figures of a search: history, importances, parallel coordinates, slices, the front.

Optuna's own are made for short names and pyplot; dotted keys stand on top of each other there.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from medgen.reports.figures import plot_style, write_plot
from medgen.tune.params_file import as_yaml, shortest
from medgen.tune.space import Dimension, Value
from medgen.tune.study import Study, is_nonfinite, is_start

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#9a9a9a"
FAR = 4.0  # times as far from the best as three quarters of the trials: further out is drawn at the edge
LABEL_LENGTH = 18  # characters of a key in a line, where keys stand side by side


@dataclass(frozen=True)
class Scale:
    """An objective's axis. A trial that went far wrong is drawn at the edge, and does not flatten the others."""

    position: int  # of the objective among the study's
    label: str
    sign: float  # 1.0 where less is better
    best: float
    worst: float  # that is shown

    @property
    def span(self) -> float:
        """From the best to the worst shown, never 0."""
        return abs(self.worst - self.best) or abs(self.best) or 1.0

    def place(self, trial: FrozenTrial) -> float:
        """Where the trial is drawn."""
        return self.sign * min(self._loss(trial), self.sign * self.worst)

    def is_beyond(self, trial: FrozenTrial) -> bool:
        """Whether it lies further out than where it is drawn."""
        return self._loss(trial) > self.sign * self.worst

    def limits(self, beyond: float = 0.06) -> tuple[float, float]:
        """Ends of the axis, `beyond` of its length past the worst."""
        ends = (self.best - self.sign * 0.06 * self.span, self.worst + self.sign * beyond * self.span)
        return min(ends), max(ends)

    def _loss(self, trial: FrozenTrial) -> float:
        return self.sign * float(trial.values[self.position])


@dataclass(frozen=True)
class Board:
    """A study's trials, as figures tell them apart."""

    study: Study
    trials: list[FrozenTrial]  # all
    good: list[FrozenTrial]  # complete, and they hold the SSIM floor
    poor: list[FrozenTrial]  # complete, below it
    best: FrozenTrial | None

    @property
    def complete(self) -> list[FrozenTrial]:
        """Trials with values, by number."""
        return sorted(self.good + self.poor, key=lambda trial: trial.number)

    @property
    def first(self) -> FrozenTrial | None:
        """Trial 0, where it is complete."""
        return next((trial for trial in self.complete if trial.number == 0), None)

    @cached_property
    def front(self) -> list[FrozenTrial]:
        """Of two objectives the trials that no other beats in both, by the first."""
        optimal = self.study.optuna.best_trials if self.study.objective.is_pareto else []
        return sorted(optimal, key=lambda trial: (trial.values[0], trial.number))

    def ended(self) -> dict[str, list[FrozenTrial]]:
        """Trials that have no value, by what became of them."""
        groups: dict[str, list[FrozenTrial]] = {"pruned": [], "not finite": [], "failed": []}
        for trial in self.trials:
            if trial.state == TrialState.PRUNED:
                groups["not finite" if is_nonfinite(trial) else "pruned"].append(trial)
            elif trial.state == TrialState.FAIL:
                groups["failed"].append(trial)
        return {name: group for name, group in groups.items() if group}

    def scale(self, position: int) -> Scale:
        """The axis of an objective; the best trial, trial 0 and the front are never drawn at its edge."""
        objective = self.study.objective
        sign = 1.0 if objective.directions[position] == "minimize" else -1.0
        losses = sign * np.array([trial.values[position] for trial in self.complete])
        kept = [trial for trial in (self.first, self.best, *self.front) if trial is not None]
        best = losses.min()
        reach = FAR * (np.quantile(losses, 0.75) - best)
        near = losses[losses <= best + reach] if reach > 0 else losses
        worst = max([near.max(), *(sign * trial.values[position] for trial in kept)])
        return Scale(position, objective.labels[position], sign, float(sign * best), float(sign * worst))

    def scales(self) -> list[Scale]:
        """All objectives' axes."""
        return [self.scale(position) for position in range(len(self.study.objective.keys))]


MARKS: dict[str, dict[str, Any]] = {  # how a trial is drawn, by what became of it
    "complete": {"marker": "o", "s": 24, "facecolor": BLUE, "edgecolor": "white", "linewidth": 0.5, "zorder": 3},
    "below the SSIM floor": {"marker": "o", "s": 22, "facecolor": "white", "edgecolor": GREY, "zorder": 2.5},
    "pruned": {"marker": "x", "s": 22, "color": GREY, "linewidth": 1.2, "zorder": 3},
    "not finite": {"marker": "x", "s": 26, "color": ORANGE, "linewidth": 1.5, "zorder": 3},
    "failed": {"marker": "+", "s": 40, "color": BLACK, "linewidth": 1.5, "zorder": 3},
    "trial 0": {"marker": "D", "s": 46, "facecolor": BLACK, "edgecolor": "white", "linewidth": 0.8, "zorder": 5},
    "best": {"marker": "*", "s": 150, "facecolor": ORANGE, "edgecolor": "white", "linewidth": 0.8, "zorder": 6},
}


def write_figures(study: Study, folder: Path, best: FrozenTrial | None) -> list[Path]:
    """Draws history, importances, parallel_coordinates, slice and front as PNGs, as far as the trials allow.

    Args:
        study: the search.
        folder: where they are written.
        best: its trial that is marked as the winner.

    Returns:
        The files. A figure that cannot be drawn yet is left out, and an older one of its name is removed.
    """
    trials, good = study.trials, study.complete()
    numbers = {trial.number for trial in good}
    poor = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.number not in numbers]
    board = Board(study, trials, good, poor, best)
    written = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        with plot_style():
            figure = draw(board)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            write_plot(path, figure)
        written.append(path)
    return written


def draw_history(board: Board) -> "Figure | None":
    """The objective by trial, its best value so far, and below it which trials have no value; of one objective."""
    if board.study.objective.is_pareto or not board.complete:
        return None
    scale, ended = board.scale(0), board.ended()
    figure = _figure(8.0, 4.2 + 0.25 * len(ended))
    heights = [12.0, len(ended) + 0.4] if ended else [1.0]
    panels: Any = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _scatter(panels[0], board, lambda trial: trial.number, scale)
    best = [np.nan] * len(board.trials)
    for trial in board.good:
        best[trial.number] = scale.sign * trial.values[0]
    curve = scale.sign * np.fmin.accumulate(best)
    panels[0].step(range(len(curve)), curve, where="post", color=GREEN, label="best value so far", zorder=2)
    panels[0].set(ylim=scale.limits(), ylabel=scale.label)
    if ended:
        for row, (name, group) in enumerate(ended.items()):
            panels[1].scatter([trial.number for trial in group], [row] * len(group), **MARKS[name])
        panels[1].set(yticks=range(len(ended)), yticklabels=list(ended), ylim=(len(ended) - 0.4, -0.6))
        panels[1].spines["left"].set_visible(False)
        panels[1].tick_params(left=False)
    panels[-1].set(xlabel="trial", xlim=(-0.7, max(len(board.trials), 2) - 0.3))
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, panels[:1])
    return figure


def draw_importances(board: Board) -> "Figure | None":
    """How much of what sets the best tenth of the trials apart each key explains, in PED-ANOVA (Watanabe et al. 2023);
    of two objectives for each.
    """
    keys = list(board.study.space)
    for position in range(len(board.study.objective.keys)):
        if len({trial.values[position] for trial in board.complete}) < 2:
            return None
    shares = {scale.label: _importances(board.study, scale) for scale in board.scales()}
    keys.sort(key=lambda key: sum(share[key] for share in shares.values()))
    figure = _figure(8.0, 1.2 + 0.34 * len(keys) * (1 + 0.5 * (len(shares) - 1)))
    axes = figure.subplots()
    height = 0.72 / len(shares)
    for number, (label, share) in enumerate(shares.items()):
        places = np.arange(len(keys)) + 0.36 - (number + 0.5) * height
        bars = axes.barh(places, [share[key] for key in keys], height, color=(BLUE, ORANGE)[number], label=label)
        axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=9)
    axes.set(yticks=range(len(keys)), yticklabels=keys, xlim=(0.0, 1.1 * max(max(s.values()) for s in shares.values())))
    axes.set_xlabel(f"importance, in parts of 1, from {len(board.complete)} trials")
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    axes.tick_params(left=False)
    _legend(figure, [axes])
    return figure


def draw_parallel_coordinates(board: Board) -> "Figure | None":
    """Each complete trial as a line through its values; the objective is the last axis, and the lines' colour."""
    import matplotlib as mpl

    if len(board.complete) < 2:
        return None
    axes_of: list[Dimension | Scale] = [*board.study.space.values(), *board.scales()]
    scale = board.scale(len(board.study.objective.keys) - 1)
    figure = _figure(max(6.0, 1.55 * len(axes_of)), 5.0)
    axes = figure.subplots()
    for number, along in enumerate(axes_of):
        axes.axvline(number, color="#b0b0b0", linewidth=0.8, zorder=1)
        for height, text in _ticks(along):
            axes.plot([number - 0.02, number + 0.02], [height] * 2, color="#707070", linewidth=0.8, zorder=7)
            box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
            axes.text(number + 0.05, height, text, va="center", fontsize=8, bbox=box, zorder=7)
    colours = mpl.colormaps["viridis"]
    for rank, trial in enumerate(sorted(board.complete, key=lambda trial: -scale.sign * trial.values[-1])):
        heights = [_height(board.study, trial, along) for along in axes_of]
        style: dict[str, Any] = {"color": colours(0.95 * _fraction(scale, trial)), "linewidth": 1.0, "alpha": 0.75}
        if trial in board.poor:
            style = {"color": "#c8c8c8", "linewidth": 0.8, "label": "below the SSIM floor"}
        axes.plot(heights, **({"zorder": 2 + rank / 1000} | style | _role(board, trial)))
    axes.set(xlim=(-0.15, len(axes_of) - 0.4), ylim=(-0.04, 1.04), yticks=[])
    axes.set_xticks(range(len(axes_of)), [_broken(along) for along in axes_of])
    axes.tick_params(bottom=False)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _legend(figure, [axes])
    return figure


def draw_slice(board: Board) -> "Figure | None":
    """The objective over each key alone; trials without a value stand in a strip past its worst end."""
    if len(board.complete) < 2:
        return None
    space, scales, ended = board.study.space, board.scales(), board.ended()
    columns = min(3, len(space))
    blocks = -(-len(space) // columns)  # rows of panels for an objective
    figure = _figure(max(5.0, 3.5 * columns), 0.8 + 2.7 * blocks * len(scales))
    panels = figure.subplots(blocks * len(scales), columns, squeeze=False)
    for scale, (number, (key, dimension)) in ((s, item) for s in scales for item in enumerate(space.items())):
        row, column = divmod(number, columns)
        axes: Axes = panels[scale.position * blocks + row, column]

        def across(trial: FrozenTrial, along: Dimension = dimension) -> float:
            return _height(board.study, trial, along) + _jitter(trial, along)

        _scatter(axes, board, across, scale)
        strip = scale.worst + scale.sign * 0.17 * scale.span
        for name, group in ended.items():
            shown = [trial for trial in group if key in trial.params]  # a trial may fail before it has values
            axes.scatter([across(trial) for trial in shown], [strip] * len(shown), label=name, **MARKS[name])
        if ended:
            axes.axhspan(scale.worst + scale.sign * 0.08 * scale.span, strip + scale.sign * scale.span, color="#f2f2f2")
        axes.set(xlim=(-0.05, 1.05), ylim=scale.limits(0.26 if ended else 0.06), xlabel=key)
        axes.set_xticks(*zip(*_ticks(dimension), strict=True))
        axes.set_ylabel(scale.label if column == 0 else "")
        axes.tick_params(labelleft=column == 0)
    for axes in panels.flat:
        axes.set_visible(axes.has_data())
    _legend(figure, panels.flat)
    return figure


def draw_front(board: Board) -> "Figure | None":
    """Two objectives against each other, and the trials that no other beats in both."""
    if not board.study.objective.is_pareto or len(board.complete) < 2:
        return None
    across, up = board.scales()
    figure = _figure(6.4, 5.0)
    axes = figure.subplots()
    _scatter(axes, board, across.place, up)
    line = [[trial.values[position] for trial in board.front] for position in (0, 1)]
    axes.step(
        *line,
        where="post",
        color=GREEN,
        zorder=2,
        marker=".",
        label="front, by trial number",
    )
    labelled: list[tuple[float, float]] = []
    for trial in board.front:
        place = _fraction(across, trial), _fraction(up, trial)
        if all(abs(place[0] - x) > 0.05 or abs(place[1] - y) > 0.04 for x, y in labelled):
            labelled.append(place)
            where: dict[str, Any] = {"xytext": (-5, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate(str(trial.number), trial.values, fontsize=8, color=GREEN, **where)
    axes.set(xlim=across.limits(), ylim=up.limits(), xlabel=across.label, ylabel=up.label)
    axes.grid(visible=True)
    _legend(figure, [axes])
    return figure


FIGURES: dict[str, Callable[[Board], "Figure | None"]] = {
    "history": draw_history,
    "importances": draw_importances,
    "parallel_coordinates": draw_parallel_coordinates,
    "slice": draw_slice,
    "front": draw_front,
}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _legend(figure: "Figure", panels: Any) -> None:
    """One legend over all panels, each name once, outside them: it covers nothing."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if len(named) > 1:
        entry = 0.5 + 0.07 * max(map(len, named))  # inches
        columns = min(len(named), max(1, int(figure.get_figwidth() / entry)))
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns)


def _scatter(axes: "Axes", board: Board, across: Callable[[FrozenTrial], float], scale: Scale) -> None:
    """Complete trials as points: below the floor, those at the edge, trial 0 and the best told apart."""
    special = [trial for trial in (board.first, board.best) if trial is not None]
    for name, group in (("complete", board.good), ("below the SSIM floor", board.poor)):
        plain = [trial for trial in group if trial not in special]
        for beyond in (False, True):
            shown = [trial for trial in plain if scale.is_beyond(trial) == beyond]
            style = MARKS[name] | ({"marker": "^" if scale.sign > 0 else "v"} if beyond else {})
            label = "off the scale" if beyond else name
            if shown:
                axes.scatter([across(t) for t in shown], [scale.place(t) for t in shown], label=label, **style)
    for name, trial in (("trial 0", board.first), ("best", board.best)):
        if trial is not None and not (name == "trial 0" and trial == board.best):
            axes.scatter([across(trial)], [scale.place(trial)], label=_title(board, trial), **MARKS[name])


def _title(board: Board, trial: FrozenTrial) -> str:
    """What a trial is called in a legend."""
    own = "trial 0: " + ("params.yaml" if is_start(board.study, trial) else "params.yaml as it was")
    best = "the best" if not board.study.objective.is_pareto else "the one chosen"
    if trial != board.best:
        return own
    return f"{own}, still {best}" if trial.number == 0 else f"trial {trial.number}: {best}"


def _role(board: Board, trial: FrozenTrial) -> dict[str, Any]:
    """How the line of trial 0 and of the best differs from the others'."""
    if trial == board.best:
        return {"color": ORANGE, "linewidth": 2.4, "alpha": 1.0, "zorder": 5, "label": _title(board, trial)}
    if trial.number == 0:
        style = {"color": BLACK, "linewidth": 1.8, "linestyle": "--", "alpha": 1.0, "zorder": 4}
        return style | {"label": _title(board, trial)}
    return {}


def _importances(study: Study, scale: Scale) -> dict[str, float]:
    """Key -> importance in one objective, in parts of 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it minimises what it is given: the sign is turned here
        return optuna.importance.get_param_importances(
            study.optuna, params=list(study.space), target=lambda trial: scale.sign * trial.values[scale.position]
        )


def _fraction(scale: Scale, trial: FrozenTrial) -> float:
    """0 the best, 1 the worst shown."""
    return abs(scale.place(trial) - scale.best) / scale.span


def _height(study: Study, trial: FrozenTrial, along: Dimension | Scale) -> float:
    """Where a trial lies on an axis from 0 to 1."""
    if isinstance(along, Scale):
        low, high = sorted((along.best, along.worst))
        return (along.place(trial) - low) / ((high - low) or 1.0)
    return _share(along, study.tried(trial)[along.key])


def _share(dimension: Dimension, value: Value) -> float:
    """Where a value lies between the ends of its range, or among its choices: 0 to 1."""
    values = dimension.values
    if values.choices is not None:
        return (values.choices.index(value) + 0.5) / len(values.choices)
    assert values.low is not None and values.high is not None and not isinstance(value, str)
    low, high, number = values.low, values.high, float(value)
    if values.log:
        low, high, number = np.log(low), np.log(high), np.log(number)
    return float((number - low) / (high - low))


def _jitter(trial: FrozenTrial, dimension: Dimension) -> float:
    """Parts of the axis: trials of the same choice stand beside each other, always in the same way."""
    if dimension.values.choices is None:
        return 0.0
    return (trial.number * 0.618 % 1.0 - 0.5) * 0.5 / len(dimension.values.choices)


def _ticks(along: Dimension | Scale) -> list[tuple[float, str]]:
    """Place from 0 to 1, and text."""
    from matplotlib.ticker import MaxNLocator

    if isinstance(along, Scale):
        low, high = sorted((along.best, along.worst))
        if low == high:
            return [(0.0, _short(low))]
        found = [x for x in MaxNLocator(6).tick_values(low, high) if low <= x <= high]
        return [((x - low) / (high - low), _short(x)) for x in found]
    values = along.values
    if values.choices is not None:
        return [(_share(along, choice), as_yaml(choice)) for choice in values.choices]
    assert values.low is not None and values.high is not None
    if values.log:
        low, high = np.log10([values.low, values.high])
        steps = (1, 2, 5) if high - low < 1.5 else (1, 3) if high - low < 2.5 else (1,)
        decades = range(int(np.floor(low)), int(np.ceil(high)) + 1, max(1, int(high - low) // 3))
        found = [float(f"{step}e{decade}") for decade in decades for step in steps]
    else:
        found = list(MaxNLocator(4, integer=isinstance(along.start, int)).tick_values(values.low, values.high))
    inside = [x for x in found if values.low <= x <= values.high]
    return [(_share(along, x), _short(x)) for x in (inside if len(inside) > 1 else (values.low, values.high))]


def _short(number: float) -> str:
    return f"{number:g}" if abs(number) >= 1e-3 or number == 0 else shortest(f"{number:.2e}")


def _broken(along: Dimension | Scale) -> str:
    """A key in lines that stand beside others, broken after dots and slashes."""
    lines = [""]
    for part in re.findall(r"[^./]+[./]?", along.key if isinstance(along, Dimension) else along.label):
        if lines[-1] and len(lines[-1] + part) > LABEL_LENGTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
