"""What a search found, in words and tables."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from medgen.tune.study import Study, alike, is_nonfinite, is_start, ssim_of

MAX_REASONS = 5
REASON_LENGTH = 200  # characters of a reason that are shown


def describe(study: Study, trial: FrozenTrial) -> list[tuple[str, str, str]]:
    """Rows of key, the value that params.yaml has, the trial's."""
    return [(key, _text(study.space[key].start), _text(value)) for key, value in study.tried(trial).items()]


def print_summary(study: Study, params_file: Path | None) -> None:
    """Prints what the search found: how trials ended, the best one beside params.yaml's own values, and why the others
    were given up.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    name = params_file.name if params_file else "params.yaml"
    trials, best = study.trials, study.winner()
    console.print(_counts(study, trials))
    console.print(_verdict(study, trials, best, name))
    if study.objective.is_pareto and (front := study.optuna.best_trials):
        console.print(_front_table(study, front, best))
    if best is not None:
        console.print(_metrics_table(study, trials[0], best))
        table = _table("key", name, f"trial {best.number}")
        for row in describe(study, best):
            table.add_row(*row)
        console.print(table)
    for line in _reasons(trials):
        console.print(line)


def _counts(study: Study, trials: Sequence[FrozenTrial]) -> str:
    """How many trials there are of each state."""
    by_state = {state: [trial for trial in trials if trial.state == state] for state in TrialState}
    complete, pruned = by_state[TrialState.COMPLETE], by_state[TrialState.PRUNED]
    told = []
    if complete:
        below, floor = len(complete) - len(study.complete()), study.ssim_floor(trials)
        told.append(f"{len(complete)} complete" + (f" ({below} below the SSIM floor of {floor:.4g})" if below else ""))
    if pruned:
        nonfinite = sum(is_nonfinite(trial) for trial in pruned)
        told.append(f"{len(pruned)} pruned" + (f" ({nonfinite} for values that are not finite)" if nonfinite else ""))
    for name, state in (("failed", TrialState.FAIL), ("running", TrialState.RUNNING), ("waiting", TrialState.WAITING)):
        if by_state[state]:
            told.append(f"{len(by_state[state])} {name}")
    plural = "" if len(trials) == 1 else "s"
    return f"study {study.name}: {len(trials)} trial{plural}" + (f": {', '.join(told)}" if told else "")


def _verdict(study: Study, trials: Sequence[FrozenTrial], best: FrozenTrial | None, name: str) -> str:
    """What the search came to, in a sentence or two."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return "No trial has completed: there is nothing to choose from."
    if best is None:
        nearest = max(complete, key=ssim_of)
        return (
            f"No trial holds the SSIM floor of {study.ssim_floor(trials):.4g}; the nearest, trial {nearest.number}, "
            f"reached {ssim_of(nearest):.4g}. Lower tune.ssim_floor, or search a wider space."
        )
    chosen = "has the lowest KID of those that reconstruct no worse" if study.objective.is_pareto else "is the best"
    if best.number == 0:
        told = f"{name}'s own values are still the best." if is_start(study, best) else f"Trial 0 {chosen}."
    elif is_start(study, best):
        told = f"Trial {best.number} {chosen}, and {name} has its values."
    else:
        told = f"Trial {best.number} {chosen}."
    missing = f" Trial 0, the yardstick, is not complete ({trials[0].state.name.lower()})."
    return told + ("" if trials[0].state == TrialState.COMPLETE else missing)


def _metrics_table(study: Study, first: FrozenTrial, best: FrozenTrial) -> Table:
    """Trial 0 and the best side by side: objectives, SSIM, KID, copies."""
    shown = [first, best] if best.number else [best]
    own = "trial 0, params.yaml" if is_start(study, first) else "trial 0, params.yaml as it was"
    table = _table("val", *(f"trial {trial.number}" if trial.number else own for trial in shown))
    columns = [study.scores(trial) for trial in shown]
    for name in dict.fromkeys(chain.from_iterable(columns)):
        table.add_row(name, *(_text(column.get(name)) for column in columns))
    return table


def _front_table(study: Study, front: Sequence[FrozenTrial], best: FrozenTrial | None) -> Table:
    """The trials that no other beats in both objectives, by the first."""
    columns = [study.scores(trial) for trial in front]
    names = list(dict.fromkeys(chain.from_iterable(columns)))
    table = _table("front", *(re.sub(r"\w+/", "", name) for name in names))
    for trial, scores in sorted(zip(front, columns, strict=True), key=lambda pair: (pair[0].values[0], pair[0].number)):
        marked = f"trial {trial.number}" + (" *" if best is not None and trial.number == best.number else "")
        table.add_row(marked, *(_text(scores.get(name)) for name in names))
    return table


def _reasons(trials: Sequence[FrozenTrial]) -> list[str]:
    """Why trials were given up, the commonest first; reasons that differ in numbers only are one."""
    groups: dict[tuple[str, str], list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state in (TrialState.PRUNED, TrialState.FAIL):
            groups.setdefault((trial.state.name, alike(_reason(trial))), []).append(trial)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    lines = []
    for (state, _), group in ordered[:MAX_REASONS]:
        which = f"trial {group[-1].number}" + (", for one" if len(group) > 1 else "")
        lines.append(f"{len(group)} × {'failed' if state == 'FAIL' else 'pruned'}: {_reason(group[-1])} ({which})")
    return lines + ([f"and {len(ordered) - MAX_REASONS} more reasons"] if len(ordered) > MAX_REASONS else [])


def _reason(trial: FrozenTrial) -> str:
    reason = str(trial.user_attrs.get("reason", "no reason was written down"))
    return reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]}…"


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", overflow="fold")
    return table


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.5g}" if isinstance(value, float) else str(value)
