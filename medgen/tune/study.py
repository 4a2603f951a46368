"""A study: its trials, which one is next, how they ended, and which one wins.

The states are Optuna's: complete (has values), pruned (given up, for a reason), fail (a fault, and why), running. A
running trial whose worker is gone is taken up again under its number: no trial is ever counted twice.

A second study of the same kind confirms the best trials of a search: they are enqueued there and trained in full.
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

from medgen.config import Params, fingerprint, seed_of, set_at
from medgen.errors import UserError
from medgen.metrics.intervals import Interval
from medgen.metrics.mmd import Discrepancy, mmd_difference
from medgen.training import checkpoint, prior, refiner, train
from medgen.tune.objective import MMD, RECALL, SSIM, Objective
from medgen.tune.space import SECTIONS, Dimension, Value, trial_params
from medgen.tune.storage import Release, Storage

COPY_RATE = "privacy/copy_rate"
ORIGIN = "origin"  # user attribute of a confirmation: the number of the trial that it trains in full
DISCREPANCY = "discrepancy"  # user attribute: the parts of the MMD that comparing two trials takes
MAX_ATTEMPTS = 3  # a trial that kills its worker so often is given up
SAME_FAILURES = 3  # in a row stop a search
NUM_STARTUP_TRIALS = 10  # drawn at random before the sampler learns from them, and before any is compared with others
NOT_COMPARED = {  # keys that leave a trial's values as they are
    "train": train.NOT_IN_FINGERPRINT | {"compile"},
    "evaluate": {"grid_images", "save_images"},
}
JUDGES = ("evaluation/*.py", "metrics/*.py")  # code that decides a value


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on, until `release` is called: nobody else takes it."""

    trial: optuna.Trial
    values: dict[str, Value]  # by key, as they are tried
    attempt: int  # 1 the first time, and again after it got on by an epoch
    ssim_floor: float | None
    release: Release


class Study:
    """An Optuna study and the rules of this search.

    Args:
        storage: where it is kept.
        name: as of `study_name`.
        params: the parameters that the search starts from.
        space: the searched parameters.
        objective: what is minimized or maximized.
        num_epochs: of a trial.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        params: Params,
        space: dict[str, Dimension],
        objective: Objective,
        num_epochs: int,
    ) -> None:
        self.storage, self.name, self.params = storage, name, params
        self.space, self.objective = space, objective
        self._ties: dict[tuple[int, int], bool] = {}  # by the numbers of two complete trials, which never change
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with storage.turn():
            self.optuna = optuna.create_study(
                storage=storage.optuna,
                study_name=name,
                directions=list(objective.directions),
                pruner=build_pruner(params.tune.pruner, num_epochs),
                load_if_exists=True,
            )
            if "record" not in self.optuna.user_attrs:  # its identity in MLflow, the same from every machine
                self.optuna.set_user_attr("record", os.urandom(16).hex())
                with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
                    self.optuna.set_metric_names(list(objective.labels))

    @property
    def record(self) -> str:
        """Identity of the study's own record."""
        return str(self.optuna.user_attrs["record"])

    @property
    def parent(self) -> str | None:
        """Of a confirmation, the identity of the search's record; None for a search."""
        return self.optuna.user_attrs.get("parent")

    @property
    def trials(self) -> list[FrozenTrial]:
        """All of them, by number."""
        return self.optuna.get_trials(deepcopy=False)

    def enqueue_best(self, search: "Study", count: int) -> None:
        """Makes this study the confirmation of a search: enqueues its trial 0 and its `count` best, each only once."""
        best = [search.trials[0], *search.ranked()[:count]]
        with self.storage.turn():
            self.optuna.set_user_attr("parent", search.record)
            present = {origin(trial) for trial in self.trials}
            for number, trial in {trial.number: trial for trial in best}.items():
                if number not in present:
                    self.optuna.enqueue_trial(trial.params, user_attrs={ORIGIN: number})

    def claim(self, wanted: int, since: datetime) -> Claim | Literal["wait"] | None:
        """The next trial: one that another worker left, else an enqueued one, else a new one.

        Args:
            wanted: number of trials the study shall have.
            since: failures before are forgiven.

        Returns:
            The trial; "wait" while others work on the first, which gives new ones their SSIM floor, or on the last
            ones; None when all are done.

        Raises:
            UserError: the last trials failed for the same reason.
        """
        with self.storage.turn():
            trials = self.trials
            if (reason := same_failures(trials, since)) is not None:
                raise UserError(
                    f"the last {SAME_FAILURES} trials failed alike: {reason}. Fix it and run the same command again"
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
                    return "wait" if TrialState.RUNNING in states else None  # who works on it may yet be killed
            if not trials:
                self.optuna.enqueue_trial({key: dimension.start for key, dimension in self.space.items()})
            trial = self.optuna.ask()
            release = self._lock(trial.number)
            assert release is not None, "a new trial's lock is free"
            return self._claimed(trial, 1, release)

    def tell(self, claim: Claim, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Ends a trial; one that another process has ended meanwhile stays as it is."""
        self.optuna.tell(claim.trial.number, values, state, skip_if_finished=True)

    def counts(self) -> dict[str, int]:
        """How many trials ended complete, pruned and failed."""
        states = [trial.state for trial in self.trials]
        ends = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        return {name: states.count(state) for name, state in ends.items()}

    def ssim_floor(self, trials: Sequence[FrozenTrial]) -> float | None:
        """The floor: as params.yaml says, else what params.yaml itself reached; None without one."""
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
        """Trials that may win, the best first: those of `tied`, then the others by the objective."""
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
        """The best trial; of a confirmation only after all its trials have ended."""
        if self.parent is not None and not all(trial.state.is_finished() for trial in self.trials):
            return None
        return next(iter(self.ranked()), None)

    def tried(self, trial: FrozenTrial) -> dict[str, Value]:
        """The values a trial took, by key."""
        return {key: dimension.tried(trial.params[key]) for key, dimension in self.space.items() if key in trial.params}

    def scores(self, trial: FrozenTrial) -> dict[str, float]:
        """A trial's objective values, MMD, SSIM, recall and share of copies, as far as it has them."""
        metrics = _metrics(trial)
        values = dict(zip(self.objective.labels, trial.values or (), strict=False))
        return values | {name: metrics[name] for name in (MMD, SSIM, RECALL, COPY_RATE) if name in metrics}

    def _ordered(self) -> list[FrozenTrial]:
        """Trials that may win, by value; of two objectives by the MMD of those as similar as params.yaml's or more."""
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
            difference, error = mmd_difference(_unpacked(own), _unpacked(lowest), own["patients"])
            self._ties[pair] = difference <= error
        return self._ties[pair]

    def _lock(self, number: int) -> Release | None:
        return self.storage.try_lock(f"{self.name}-{number}")

    def _take_over(self, left: FrozenTrial) -> Claim | None:
        """A running trial, if nobody works on it."""
        release = self._lock(left.number)
        if release is None:
            return None
        trial = optuna.Trial(self.optuna, left._trial_id)
        if self.storage.optuna.get_trial(left._trial_id).state.is_finished():  # just now: its lock came free with it
            release()
            return None
        return self._claimed(trial, int(trial.user_attrs.get("attempts", 0)) + 1, release)

    def _claimed(self, trial: optuna.Trial, attempt: int, release: Release) -> Claim:
        # seeded by the number: a search that was stopped and goes on suggests what an unbroken one does
        self.optuna.sampler = build_sampler(seed_of(self.params.tune.seed, trial.number))
        suggested = {key: dimension.suggest(trial) for key, dimension in self.space.items()}
        trial.set_user_attr("attempts", attempt)
        trial.set_user_attr("worker", f"{socket.gethostname()} {os.getpid()}")
        values = {key: self.space[key].tried(value) for key, value in suggested.items()}
        return Claim(trial, values, attempt, self.ssim_floor(self.trials), release)


def study_name(params: Params, space: dict[str, Dimension], objective: Objective, dataset: str, extractor: str) -> str:
    """Names a study by what makes its trials comparable: another space, budget, objective, data or code is another.

    The values of searched keys are left out, and the ranges that are made around them without tune.space: after
    `--apply` the study is still the same.
    """
    shortened = trial_params(params, {})
    plain: dict[str, Any] = {name: getattr(shortened, name).model_dump(mode="json") for name in (*SECTIONS, "evaluate")}
    for section, keys in NOT_COMPARED.items():
        for key in keys:
            del plain[section][key]
    for key in space:
        set_at(plain, key, None, "tune.space")
    searched = {key: values.model_dump(mode="json") for key, values in params.tune.space.items()} or sorted(space)
    judges = checkpoint.package_fingerprint(*JUDGES)
    parts = (plain, searched, objective.keys, params.tune.ssim_floor, dataset, extractor)
    return f"{params.model.name}-{fingerprint(*parts, train.code(), prior.code(), refiner.code(), judges)}"


def build_pruner(name: str, num_epochs: int) -> optuna.pruners.BasePruner:
    """The pruner of `tune.pruner`; it looks after each of `num_epochs` epochs."""
    if name == "median":
        # not in the first half: a small learning rate begins slowly, and may end well
        return optuna.pruners.MedianPruner(NUM_STARTUP_TRIALS, n_warmup_steps=num_epochs // 2)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, num_epochs // 9), max_resource=num_epochs)
    return optuna.pruners.NopPruner()


def build_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Tree-structured Parzen estimator over all keys together (Bergstra et al. 2011; Falkner et al. 2018).

    Running trials count as bad ones (constant liar): parallel workers do not all try the same place.
    """
    return optuna.samplers.TPESampler(
        seed=seed % (1 << 32), multivariate=True, constant_liar=True, n_startup_trials=NUM_STARTUP_TRIALS
    )


def ssim_of(trial: FrozenTrial) -> float:
    """The SSIM of a complete trial."""
    return _metrics(trial)[SSIM]


def origin(trial: FrozenTrial | optuna.Trial) -> int:
    """The trial's number in the search, also where it is its confirmation."""
    return int(trial.user_attrs.get(ORIGIN, trial.number))


def trial_name(trial: FrozenTrial | optuna.Trial) -> str:
    """The trial's name: "trial 7", of a confirmation "trial 7 in full"."""
    return f"trial {origin(trial)}" + (" in full" if ORIGIN in trial.user_attrs else "")


def packed(discrepancy: Discrepancy, patients: Sequence[int]) -> dict[str, Any]:
    """A trial's MMD as a user attribute, from which any machine can compare it with another trial's.

    Args:
        discrepancy: of the trial's samples and the N val images.
        patients: the number of each val image's patient (N).
    """
    to_samples = [float(f"{value:.8g}") for value in discrepancy.to_samples.tolist()]
    return asdict(discrepancy) | {"to_samples": to_samples, "patients": list(patients)}


def _unpacked(plain: dict[str, Any]) -> Discrepancy:
    to_samples = torch.tensor(plain["to_samples"], dtype=torch.float64)
    interval = Interval(*plain["interval"])
    return Discrepancy(interval, to_samples, plain["among_samples"], plain["sampling_variance"])


def _metrics(trial: FrozenTrial) -> dict[str, float]:
    return trial.user_attrs.get("metrics", {})  # type: ignore[no-any-return]


def same_failures(trials: Sequence[FrozenTrial], since: datetime) -> str | None:
    """The reason that the last trials failed for, if it is the same but for numbers."""
    ended = [trial for trial in trials if trial.datetime_complete is not None and trial.datetime_complete >= since]
    last = sorted(ended, key=lambda trial: trial.datetime_complete or since)[-SAME_FAILURES:]
    reasons = [str(trial.user_attrs.get("reason", "")) for trial in last if trial.state == TrialState.FAIL]
    same = len({alike(reason) for reason in reasons}) == 1
    return reasons[-1] if len(reasons) == SAME_FAILURES and same else None


def alike(reason: str) -> str:
    """A reason without its numbers: those that differ in nothing else are the same."""
    return re.sub(r"\d+(\.\d+)?", "#", reason)


def is_nonfinite(trial: FrozenTrial) -> bool:
    """True if a trial was given up because a value was not finite."""
    return "nonfinite_step" in trial.user_attrs or "not finite" in str(trial.user_attrs.get("reason", ""))


def is_start(study: Study, trial: FrozenTrial) -> bool:
    """True if a trial's values are those of params.yaml as it is now."""
    return study.tried(trial) == {key: dimension.start for key, dimension in study.space.items()}
