"""Print the results of a search."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from medgen.console import show
from medgen.tune.objective import RECALL, SSIM
from medgen.tune.study import Study, is_nonfinite, is_start, mask_numbers, origin_number, ssim_of, trial_name

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
MAX_REASONS = 5
REASON_LENGTH = 200  # characters of a reason that are shown


def print_summary(study: Study, params_file: Path, confirmation: Study | None = None) -> None:
    """Print the counts of trials, the winner compared with params.yaml, and the reasons of pruned and failed trials.

    A `confirmation`, the study of the best trials in full, decides the winner.
    """
    name = params_file.name
    last = confirmation or study
    trials, best = last.trials, last.winner()
    show(_describe_counts(study))
    if confirmation is not None:
        show(_describe_counts(confirmation))
        show(_confirmation_table(study, confirmation))
    show(_describe_winner(last, trials, best, name))
    if study.objective.is_pareto and (front := last.optuna.best_trials):
        show(_front_table(last, front, best))
    if best is not None:
        show(_metrics_table(last, trials[0], best))
        table = _new_table("key", name, trial_name(best))
        for key, value in last.values_of(best).items():
            table.add_row(key, _format(last.space[key].start), _format(value))
        show(table)
    for line in _list_reasons(study.trials if confirmation is None else [*study.trials, *trials]):
        show(line)


def _describe_counts(study: Study) -> str:
    """The number of trials in each state, in one line."""
    trials = study.trials
    counts = Counter(STATES[trial.state] for trial in trials)
    below, floor = counts["complete"] - len(study.complete()), study.ssim_floor(trials)
    nonfinite = sum(trial.state == TrialState.PRUNED and is_nonfinite(trial) for trial in trials)
    remarks = {
        "complete": f" ({below} below the SSIM floor of {floor:.4g})" if below else "",
        "pruned": f" ({nonfinite} for values that are not finite)" if nonfinite else "",
    }
    parts = [f"{counts[name]} {name}{remarks.get(name, '')}" for name in STATES.values() if counts[name]]
    plural = "" if len(trials) == 1 else "s"
    return f"study {study.name}: {len(trials)} trial{plural}" + (f": {', '.join(parts)}" if parts else "")


def _describe_winner(study: Study, trials: Sequence[FrozenTrial], best: FrozenTrial | None, name: str) -> str:
    """The winner, or the reason why there is none."""
    if study.parent is not None and not all(trial.state.is_finished() for trial in trials):
        return "Some trials in full have not ended, so there is no winner yet; run the same command again to continue."
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return "No trial has completed."
    if best is None:
        nearest = max(complete, key=ssim_of)
        return (
            f"No trial reaches the SSIM floor of {study.ssim_floor(trials):.4g}; the closest, trial {nearest.number}, "
            f"has {ssim_of(nearest):.4g}. Lower tune.ssim_floor, or widen tune.space."
        )
    chosen = "is the best"
    if study.objective.is_pareto:
        chosen = "has the lowest MMD of the trials that reconstruct at least as well as trial 0"
    winner = trial_name(best).capitalize()
    text = f"{winner} {chosen}."
    if is_start(study, best):
        text = f"{winner} {chosen}, and {name} has its values."
        if best.number == 0:
            text = f"The values of {name} are still the best."
    if (tied := len(study.tied())) > 1:
        text += f" {tied} trials have the lowest MMD within one standard error; of them it has the highest recall."
    if trials[0].state != TrialState.COMPLETE:
        text += f" Trial 0, the reference, is not complete ({trials[0].state.name.lower()})."
    return text


def _confirmation_table(study: Study, confirmation: Study) -> Table:
    """Rank and value of each confirmed trial in the search and in full, with recall and SSIM, which decide ties."""
    short, full = ([origin_number(trial) for trial in each.ranked()] for each in (study, confirmation))
    label = re.sub(r"\w+/", "", study.objective.labels[-1])
    table = _new_table(
        "trial", "rank in search", f"{label} in search", "rank in full", f"{label} in full", "recall", "SSIM"
    )
    trials = {origin_number(trial): trial for trial in confirmation.trials}
    for number in [*full, *sorted(trials.keys() - set(full))]:
        trial = trials[number]
        values = [_format(t.values[-1]) if t.values else t.state.name.lower() for t in (study.trials[number], trial)]
        scores = [_format(confirmation.scores(trial).get(name)) for name in (RECALL, SSIM)]
        ranks = [str(order.index(number) + 1) if number in order else "–" for order in (short, full)]
        table.add_row(str(number), ranks[0], values[0], ranks[1], values[1], *scores)
    return table


def _metrics_table(study: Study, first: FrozenTrial, best: FrozenTrial) -> Table:
    """Trial 0 and the best trial side by side: objectives, MMD, SSIM, recall, copy rate."""
    shown = [first, best] if best.number else [best]
    own = f"{trial_name(first)}, {'params.yaml' if is_start(study, first) else 'former params.yaml'}"
    table = _new_table("val", *(trial_name(trial) if trial.number else own for trial in shown))
    columns = [study.scores(trial) for trial in shown]
    for name in dict.fromkeys(chain.from_iterable(columns)):
        table.add_row(name, *(_format(column.get(name)) for column in columns))
    return table


def _front_table(study: Study, front: Sequence[FrozenTrial], best: FrozenTrial | None) -> Table:
    """The Pareto front, sorted by the first objective; * marks the winner."""
    columns = [study.scores(trial) for trial in front]
    names = list(dict.fromkeys(chain.from_iterable(columns)))
    table = _new_table("front", *(re.sub(r"\w+/", "", name) for name in names))
    for trial, scores in sorted(zip(front, columns, strict=True), key=lambda pair: (pair[0].values[0], pair[0].number)):
        name = trial_name(trial) + (" *" if best is not None and trial.number == best.number else "")
        table.add_row(name, *(_format(scores.get(score)) for score in names))
    return table


def _list_reasons(trials: Sequence[FrozenTrial]) -> list[str]:
    """The reasons of pruned and failed trials, most frequent first; reasons that differ only in numbers are grouped."""
    groups: dict[tuple[str, str], list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state in (TrialState.PRUNED, TrialState.FAIL):
            groups.setdefault((STATES[trial.state], mask_numbers(_reason(trial))), []).append(trial)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    lines = []
    for (state, _), group in ordered[:MAX_REASONS]:
        example = ("for example " if len(group) > 1 else "") + trial_name(group[-1])
        lines.append(f"{len(group)} × {state}: {_reason(group[-1])} ({example})")
    return lines + ([f"and {len(ordered) - MAX_REASONS} more reasons"] if len(ordered) > MAX_REASONS else [])


def _reason(trial: FrozenTrial) -> str:
    reason = str(trial.user_attrs.get("reason", "no reason recorded"))
    return reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]}…"


def _new_table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", overflow="fold")
    return table


def _format(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.5g}" if isinstance(value, float) else str(value)
