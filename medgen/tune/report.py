"""The results of a search, in sentences and tables."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from medgen.tune.objective import RECALL, SSIM
from medgen.tune.study import Study, alike, is_nonfinite, is_start, origin, ssim_of, trial_name

MAX_REASONS = 5
REASON_LENGTH = 200  # characters of a reason that are shown


def describe(study: Study, trial: FrozenTrial) -> list[tuple[str, str, str]]:
    """Rows of key, the value that params.yaml has, the trial's."""
    return [(key, _text(study.space[key].start), _text(value)) for key, value in study.tried(trial).items()]


def print_summary(study: Study, params_file: Path | None, confirmation: Study | None = None) -> None:
    """Prints the counts of trials, the winner compared with params.yaml, and why trials were given up.

    Args:
        study: the search.
        params_file: for its name.
        confirmation: its best trials in full, of which one is the winner; None: the search has the winner.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    name = params_file.name if params_file else "params.yaml"
    last = confirmation or study
    trials, best = last.trials, last.winner()
    console.print(_counts(study))
    if confirmation is not None:
        console.print(_counts(confirmation))
        console.print(_confirmation_table(study, confirmation))
    console.print(_verdict(last, trials, best, name))
    if study.objective.is_pareto and (front := last.optuna.best_trials):
        console.print(_front_table(last, front, best))
    if best is not None:
        console.print(_metrics_table(last, trials[0], best))
        table = _table("key", name, trial_name(best))
        for row in describe(last, best):
            table.add_row(*row)
        console.print(table)
    for line in _reasons(study.trials if confirmation is None else [*study.trials, *trials]):
        console.print(line)


def _counts(study: Study) -> str:
    """The number of trials in each state."""
    trials = study.trials
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
    """The winner, or why there is none."""
    if study.parent is not None and not all(trial.state.is_finished() for trial in trials):
        return "Confirmations are left to be trained, so no winner is named yet; the same command goes on."
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return "No trial has completed: there is nothing to choose from."
    if best is None:
        nearest = max(complete, key=ssim_of)
        return (
            f"No trial holds the SSIM floor of {study.ssim_floor(trials):.4g}; the nearest, trial {nearest.number}, "
            f"reached {ssim_of(nearest):.4g}. Lower tune.ssim_floor, or search a wider space."
        )
    chosen = "has the lowest MMD of those that reconstruct no worse" if study.objective.is_pareto else "is the best"
    winner = trial_name(best).capitalize()
    if best.number == 0:
        told = f"{name}'s own values are still the best." if is_start(study, best) else f"{winner} {chosen}."
    elif is_start(study, best):
        told = f"{winner} {chosen}, and {name} has its values."
    else:
        told = f"{winner} {chosen}."
    if (tied := len(study.tied())) > 1:
        told += f" {tied} trials have the lowest MMD within one standard error; of them it has the highest recall."
    missing = f" Trial 0, the reference, is not complete ({trials[0].state.name.lower()})."
    return told + ("" if trials[0].state == TrialState.COMPLETE else missing)


def _confirmation_table(study: Study, confirmation: Study) -> Table:
    """Each confirmed trial's rank and value in the search, and in full; and what decides between tied ones."""
    short, full = ([origin(trial) for trial in each.ranked()] for each in (study, confirmation))
    label = re.sub(r"\w+/", "", study.objective.labels[-1])
    table = _table("trial", "rank in search", label, "rank in full", label, "recall", "SSIM")
    trials = {origin(trial): trial for trial in confirmation.trials}
    for number in [*full, *sorted(trials.keys() - set(full))]:
        trial = trials[number]
        values = [_text(t.values[-1]) if t.values else t.state.name.lower() for t in (study.trials[number], trial)]
        scores = [_text(confirmation.scores(trial).get(name)) for name in (RECALL, SSIM)]
        ranks = [str(order.index(number) + 1) if number in order else "–" for order in (short, full)]
        table.add_row(str(number), ranks[0], values[0], ranks[1], values[1], *scores)
    return table


def _metrics_table(study: Study, first: FrozenTrial, best: FrozenTrial) -> Table:
    """Trial 0 and the best side by side: objectives, MMD, SSIM, recall, copies."""
    shown = [first, best] if best.number else [best]
    own = f"{trial_name(first)}, params.yaml" + ("" if is_start(study, first) else " as it was")
    table = _table("val", *(trial_name(trial) if trial.number else own for trial in shown))
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
        marked = trial_name(trial) + (" *" if best is not None and trial.number == best.number else "")
        table.add_row(marked, *(_text(scores.get(name)) for name in names))
    return table


def _reasons(trials: Sequence[FrozenTrial]) -> list[str]:
    """The reasons that trials were given up for, the commonest first; those that differ in numbers only are one."""
    groups: dict[tuple[str, str], list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state in (TrialState.PRUNED, TrialState.FAIL):
            groups.setdefault((trial.state.name, alike(_reason(trial))), []).append(trial)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    lines = []
    for (state, _), group in ordered[:MAX_REASONS]:
        which = trial_name(group[-1]) + (", for one" if len(group) > 1 else "")
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
