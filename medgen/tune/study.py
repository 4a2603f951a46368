"""Claim trials of a study, end them, and rank them.

The states are Optuna's: complete (has values), pruned (stopped, with a reason), fail (an error, with a reason),
running. A running trial whose worker has died is claimed again under the same number, so no trial is counted twice.

A second study confirms the best trials of a search: they are enqueued there and trained in full.
"""

import os
import re
import socket
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from medgen import source
from medgen.config import Params, fingerprint, seed_of, set_at
from medgen.config.edit import Value
from medgen.errors import UserError
from medgen.metrics.intervals import Interval
from medgen.metrics.mmd import Discrepancy, mmd_difference
from medgen.training import prior, refiner, train
from medgen.tune.objective import MMD, RECALL, SSIM, Objective
from medgen.tune.space import SECTIONS, Dimension, trial_params
from medgen.tune.storage import Release, Storage

COPY_RATE = "privacy/copy_rate"
ORIGIN = "origin"  # user attribute of a trial in full: its number in the search
DISCREPANCY = "discrepancy"  # user attribute: the parts of the MMD that a comparison of two trials needs
MAX_ATTEMPTS = 3  # a trial whose workers die this often fails
SAME_FAILURES = 3  # this many in a row stop a search
NUM_STARTUP_TRIALS = 10  # drawn at random, before the sampler fits a model and the pruner compares trials
IGNORED_KEYS = {  # keys that do not change the metrics of a trial
    "train": train.NOT_IN_FINGERPRINT | {"compile"},
    "evaluate": {"grid_images", "save_images"},
}
METRIC_CODE = ("evaluation/*.py", "metrics/*.py")  # code that computes the metrics


@dataclass(frozen=True)
class Claim:
    """A trial that no other process can claim until `release` is called."""

    trial: optuna.Trial
    values: dict[str, Value]  # by key, rounded
    attempt: int  # counts from 1; 1 again after an epoch is completed
    ssim_floor: float | None
    release: Release


class Study:
    """An Optuna study with the claims and the ranking of a search.

    `name` is from `study_name`, `params` are the parameters that the search starts from.
    """

    def __init__(
        self, storage: Storage, name: str, params: Params, space: dict[str, Dimension], objective: Objective
    ) -> None:
        self.storage, self.name, self.params = storage, name, params
        self.space, self.objective = space, objective
        self._ties: dict[tuple[int, int], bool] = {}  # by the numbers of two complete trials
        num_epochs = sum(phase.epochs for phase in trial_params(params, {}).train.phases)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with storage.lock():
            self.optuna = optuna.create_study(
                storage=storage.optuna,
                study_name=name,
                directions=list(objective.directions),
                pruner=build_pruner(params.tune.pruner, num_epochs),
                load_if_exists=True,
            )
            if "record" not in self.optuna.user_attrs:  # its ID in MLflow, the same on every machine
                self.optuna.set_user_attr("record", os.urandom(16).hex())
                with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
                    self.optuna.set_metric_names(list(objective.labels))

    @property
    def record(self) -> str:
        """ID of the study's record."""
        return str(self.optuna.user_attrs["record"])

    @property
    def parent(self) -> str | None:
        """ID of the search's record if this study is its confirmation, else None."""
        return self.optuna.user_attrs.get("parent")

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.optuna.get_trials(deepcopy=False)

    def enqueue_best(self, search: "Study", count: int) -> None:
        """Make this study the confirmation of a search: enqueue its trial 0 and its `count` best, unless present."""
        best = [search.trials[0], *search.ranked()[:count]]
        with self.storage.lock():
            self.optuna.set_user_attr("parent", search.record)
            present = {origin_number(trial) for trial in self.trials}
            for number, trial in {trial.number: trial for trial in best}.items():
                if number not in present:
                    self.optuna.enqueue_trial(trial.params, user_attrs={ORIGIN: number})

    def claim(self, wanted: int, since: datetime) -> Claim | Literal["wait"] | None:
        """Claim a trial: one whose worker died, else an enqueued one, else a new one.

        Args:
            wanted: total number of trials of the study.
            since: earlier failures are ignored.

        Returns:
            The claim; "wait" while other processes run trial 0, which sets the SSIM floor of the others, or the last
            trials, which must be claimed again if their workers die; None when all trials have ended.

        Raises:
            UserError: the last trials failed for the same reason.
        """
        with self.storage.lock():
            trials = self.trials
            if (reason := repeated_failure(trials, since)) is not None:
                raise UserError(
                    f"the last {SAME_FAILURES} trials failed for the same reason: {reason}. Fix it and run the same "
                    "command again"
                )
            for left in trials:
                if left.state == TrialState.RUNNING and (claim := self._take_over(left)) is not None:
                    return claim
            trials = self.trials
            states = [trial.state for trial in trials]
            if TrialState.WAITING not in states:
                if self.objective.has_floor and states[:1] == [TrialState.RUNNING]:
                    return "wait"
                if len(trials) >= wanted:
                    return "wait" if TrialState.RUNNING in states else None  # its worker may still be killed
            if not trials:
                self.optuna.enqueue_trial({key: dimension.start for key, dimension in self.space.items()})
            trial = self.optuna.ask()
            release = self._lock(trial.number)
            assert release is not None, "a new trial's lock is free"
            return self._start_claim(trial, 1, release)

    def tell(self, claim: Claim, state: TrialState, values: Sequence[float] | None = None) -> None:
        """End a trial; does nothing if another process has ended it."""
        self.optuna.tell(claim.trial.number, values, state, skip_if_finished=True)

    def counts(self) -> dict[str, int]:
        """The numbers of complete, pruned and failed trials."""
        states = [trial.state for trial in self.trials]
        ends = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        return {name: states.count(state) for name, state in ends.items()}

    def ssim_floor(self, trials: Sequence[FrozenTrial]) -> float | None:
        """The minimum SSIM: tune.ssim_floor, else the SSIM of trial 0; None without one."""
        if not self.objective.has_floor:
            return None
        if self.params.tune.ssim_floor is not None:
            return self.params.tune.ssim_floor
        return ssim_of(trials[0]) if trials and trials[0].state == TrialState.COMPLETE else None

    def complete(self) -> list[FrozenTrial]:
        """Complete trials that reach the SSIM floor, by number."""
        trials = self.trials
        floor = self.ssim_floor(trials)
        return [t for t in trials if t.state == TrialState.COMPLETE and (floor is None or ssim_of(t) >= floor)]

    def ranked(self) -> list[FrozenTrial]:
        """The trials that can win, best first: those of `tied`, then the others by the objective."""
        tied, ordered = self.tied(), self._ordered()
        numbers = {trial.number for trial in tied}
        return tied + [trial for trial in ordered if trial.number not in numbers]

    def tied(self) -> list[FrozenTrial]:
        """The trial with the best value, and those whose MMD is within one standard error of it, by recall, then SSIM.

        The standard error is that of the difference of two models over the same val images (`mmd_difference`).
        """
        ordered = self._ordered()
        tied = [trial for trial in ordered if self._is_tied(trial, ordered[0])]
        return sorted(tied, key=lambda trial: [-_metrics(trial).get(name, 0.0) for name in (RECALL, SSIM)])

    def winner(self) -> FrozenTrial | None:
        """The best trial; of a confirmation, None until all its trials have ended."""
        if self.parent is not None and not all(trial.state.is_finished() for trial in self.trials):
            return None
        return next(iter(self.ranked()), None)

    def values_of(self, trial: FrozenTrial) -> dict[str, Value]:
        """The searched values of a trial, by key, rounded."""
        return {key: dimension.round(trial.params[key]) for key, dimension in self.space.items() if key in trial.params}

    def scores(self, trial: FrozenTrial) -> dict[str, float]:
        """Those of a trial's objective values, MMD, SSIM, recall and copy rate that it has."""
        metrics = _metrics(trial)
        values = dict(zip(self.objective.labels, trial.values or (), strict=False))
        return values | {name: metrics[name] for name in (MMD, SSIM, RECALL, COPY_RATE) if name in metrics}

    def _ordered(self) -> list[FrozenTrial]:
        """The trials that can win, by value; of two objectives by MMD, without those more dissimilar than trial 0."""
        good = self.complete()
        if self.objective.is_pareto and good and good[0].number == 0:
            good = [trial for trial in good if trial.values[0] <= good[0].values[0]]
        sign = -1.0 if self.objective.directions[-1] == "maximize" else 1.0
        return sorted(good, key=lambda trial: sign * trial.values[-1])

    def _is_tied(self, trial: FrozenTrial, best: FrozenTrial) -> bool:
        if trial.number == best.number:
            return True
        pair = trial.number, best.number
        if pair not in self._ties:
            own, lowest = (each.user_attrs.get(DISCREPANCY) for each in (trial, best))
            if self.objective.keys[-1] != MMD or own is None or lowest is None:
                return False
            mmds = discrepancy_from_dict(own), discrepancy_from_dict(lowest)
            difference, error = mmd_difference(*mmds, own["patients"])
            self._ties[pair] = difference <= error
        return self._ties[pair]

    def _lock(self, number: int) -> Release | None:
        return self.storage.try_lock(f"{self.name}-{number}")

    def _take_over(self, left: FrozenTrial) -> Claim | None:
        """Claim a running trial, unless its worker is alive."""
        release = self._lock(left.number)
        if release is None:
            return None
        trial = optuna.Trial(self.optuna, left._trial_id)
        if self.storage.optuna.get_trial(left._trial_id).state.is_finished():  # ended just before the lock was released
            release()
            return None
        return self._start_claim(trial, int(trial.user_attrs.get("attempts", 0)) + 1, release)

    def _start_claim(self, trial: optuna.Trial, attempt: int, release: Release) -> Claim:
        # seeded by the number, so that a search that is interrupted and continued suggests the same values
        self.optuna.sampler = build_sampler(seed_of(self.params.tune.seed, trial.number))
        suggested = {key: dimension.suggest(trial) for key, dimension in self.space.items()}
        trial.set_user_attr("worker", f"{socket.gethostname()} {os.getpid()}")
        values = {key: self.space[key].round(value) for key, value in suggested.items()}
        claim = Claim(trial, values, attempt, self.ssim_floor(self.trials), release)
        trial.set_user_attr("attempts", attempt)  # last: a storage that fails before is no attempt
        return claim


def study_name(params: Params, space: dict[str, Dimension], objective: Objective, dataset: str, extractor: str) -> str:
    """The name of the study: a hash of all that must be equal for trials to be comparable.

    That is space, budget, objective, data and code. The values of searched keys, and the default ranges around them, do
    not count, so the study stays the same after `--apply`.
    """
    shortened = trial_params(params, {})
    plain: dict[str, Any] = {name: getattr(shortened, name).model_dump(mode="json") for name in (*SECTIONS, "evaluate")}
    for section, keys in IGNORED_KEYS.items():
        for key in keys:
            del plain[section][key]
    for key in space:
        set_at(plain, key, None, "tune.space")
    searched = {key: values.model_dump(mode="json") for key, values in params.tune.space.items()} or sorted(space)
    metric_code = source.fingerprint(*METRIC_CODE)
    parts = (plain, searched, objective.keys, params.tune.ssim_floor, dataset, extractor)
    return f"{params.model.name}-{fingerprint(*parts, train.code(), prior.code(), refiner.code(), metric_code)}"


def build_pruner(name: str, num_epochs: int) -> optuna.pruners.BasePruner:
    """The pruner that `tune.pruner` names, for trials of `num_epochs` epochs."""
    if name == "median":
        # not in the first half, in which small learning rates are slow though they may end well
        return optuna.pruners.MedianPruner(NUM_STARTUP_TRIALS, n_warmup_steps=num_epochs // 2)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, num_epochs // 9), max_resource=num_epochs)
    return optuna.pruners.NopPruner()


def build_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """A multivariate tree-structured Parzen estimator (Bergstra et al. 2011; Falkner et al. 2018).

    Running trials count as bad ones (constant liar), so that parallel workers do not try similar values.
    """
    return optuna.samplers.TPESampler(
        seed=seed % (1 << 32), multivariate=True, constant_liar=True, n_startup_trials=NUM_STARTUP_TRIALS
    )


def ssim_of(trial: FrozenTrial) -> float:
    """The SSIM of a complete trial."""
    return _metrics(trial)[SSIM]


def origin_number(trial: FrozenTrial | optuna.Trial) -> int:
    """The number of a trial, or of the search's trial that it confirms."""
    return int(trial.user_attrs.get(ORIGIN, trial.number))


def trial_name(trial: FrozenTrial | optuna.Trial) -> str:
    """The name of a trial: "trial 7", or "trial 7 in full" in a confirmation."""
    return f"trial {origin_number(trial)}" + (" in full" if ORIGIN in trial.user_attrs else "")


def discrepancy_to_dict(discrepancy: Discrepancy, patients: Sequence[int]) -> dict[str, Any]:
    """The MMD of a trial as JSON values for a user attribute, from which any machine can compare two trials.

    Args:
        discrepancy: MMD of the trial's samples and the N val images.
        patients: the patient number of each val image (N).
    """
    to_samples = [float(f"{value:.8g}") for value in discrepancy.to_samples.tolist()]
    return asdict(discrepancy) | {"to_samples": to_samples, "patients": list(patients)}


def discrepancy_from_dict(plain: dict[str, Any]) -> Discrepancy:
    """The inverse of `discrepancy_to_dict`, without the patients."""
    to_samples = torch.tensor(plain["to_samples"], dtype=torch.float64)
    interval = Interval(*plain["interval"])
    return Discrepancy(interval, to_samples, plain["among_samples"], plain["sampling_variance"])


def _metrics(trial: FrozenTrial) -> dict[str, float]:
    return trial.user_attrs.get("metrics", {})  # type: ignore[no-any-return]


def repeated_failure(trials: Sequence[FrozenTrial], since: datetime) -> str | None:
    """The reason of the last `SAME_FAILURES` trials if all failed with the same one, apart from numbers; else None."""
    ended = [trial for trial in trials if trial.datetime_complete is not None and trial.datetime_complete >= since]
    last = sorted(ended, key=lambda trial: trial.datetime_complete or since)[-SAME_FAILURES:]
    reasons = [str(trial.user_attrs.get("reason", "")) for trial in last if trial.state == TrialState.FAIL]
    is_same = len({mask_numbers(reason) for reason in reasons}) == 1
    return reasons[-1] if len(reasons) == SAME_FAILURES and is_same else None


def mask_numbers(reason: str) -> str:
    """The text with # in place of each number, so that reasons that differ only in numbers are equal."""
    return re.sub(r"\d+(\.\d+)?", "#", reason)


def is_nonfinite(trial: FrozenTrial) -> bool:
    """True if a trial was pruned because a value was not finite."""
    return "nonfinite_step" in trial.user_attrs or "not finite" in str(trial.user_attrs.get("reason", ""))


def is_start(study: Study, trial: FrozenTrial) -> bool:
    """True if a trial has the present values of params.yaml."""
    return study.values_of(trial) == {key: dimension.start for key, dimension in study.space.items()}
