"""A study: which trials there are, which one is next, and what became of each.

The states are Optuna's: complete (has values), pruned (given up, for a reason), fail (a fault, and why), running. A
running trial whose worker is gone is taken up again under its number: no trial is ever counted twice.
"""

import os
import re
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

import medgen
from medgen import checkpoint, prior, train
from medgen.config import Params, fingerprint, seed_of, set_at
from medgen.errors import UserError
from medgen.tune.objective import KID, SSIM, Objective
from medgen.tune.space import SECTIONS, Dimension, Value, trial_params
from medgen.tune.storage import Release, Storage

COPY_RATE = "privacy/copy_rate"
MAX_ATTEMPTS = 3  # a trial that kills its worker so often is given up
SAME_FAILURES = 3  # in a row stop a search
NUM_STARTUP_TRIALS = 10  # drawn at random before the sampler learns from them, and before any is compared with others
NOT_COMPARED = {  # keys that leave a trial's values as they are
    "train": train.NOT_IN_FINGERPRINT | {"compile"},
    "evaluate": {"grid_images", "save_images"},
}
JUDGES = ("evaluate.py", "label_report.py", "segmentation_report.py", "metrics/*.py")  # code that decides a value


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on, until `release` is called: nobody else takes it."""

    trial: optuna.Trial
    values: dict[str, Value]  # by key, as they are tried
    attempt: int  # 1 the first time, and again after it got on by an epoch
    ssim_floor: float | None
    release: Release


class Study:
    """An Optuna study and the rules of this search."""

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
    def trials(self) -> list[FrozenTrial]:
        """All of them, by number."""
        return self.optuna.get_trials(deepcopy=False)

    def claim(self, wanted: int, since: datetime) -> Claim | Literal["wait"] | None:
        """The next trial: one that another worker left, else a new one.

        Args:
            wanted: number of trials the study shall have.
            since: failures before are forgiven.

        Returns:
            The trial; "wait" while others work on the first, which the SSIM floor comes from, or on the last ones; None
            when all are done.

        Raises:
            UserError: the last trials failed for the same reason.
        """
        with self.storage.turn():
            trials = self.trials
            if (reason := same_failures(trials, since)) is not None:
                raise UserError(
                    f"the last {SAME_FAILURES} trials failed alike: {reason}. Mend it and run the same command again"
                )
            for left in trials:
                if left.state == TrialState.RUNNING and (claim := self._take_over(left)) is not None:
                    return claim
            trials = self.trials
            states = [trial.state for trial in trials]
            if self.objective.has_floor and states[:1] == [TrialState.RUNNING]:
                return "wait"
            if TrialState.WAITING not in states and len(trials) >= wanted:
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
        """Complete trials that hold the floor, the best first; of two objectives by the second, the KID."""
        trials = self.trials
        floor = self.ssim_floor(trials)
        good = [t for t in trials if t.state == TrialState.COMPLETE and (floor is None or ssim_of(t) >= floor)]
        sign = -1.0 if self.objective.directions[-1] == "maximize" else 1.0
        return sorted(good, key=lambda trial: sign * trial.values[-1])

    def winner(self) -> FrozenTrial | None:
        """The best trial; of two objectives the lowest KID that costs no similarity params.yaml has."""
        good = self.complete()
        if self.objective.is_pareto:
            first = self.trials[0] if self.trials else None
            limit = first.values[0] if first is not None and first.state == TrialState.COMPLETE else float("inf")
            good = [trial for trial in good if trial.values[0] <= limit]
        return good[0] if good else None

    def tried(self, trial: FrozenTrial) -> dict[str, Value]:
        """The values a trial took, by key."""
        return {key: dimension.tried(trial.params[key]) for key, dimension in self.space.items() if key in trial.params}

    def scores(self, trial: FrozenTrial) -> dict[str, float]:
        """A trial's objective values, SSIM, KID and share of copies, as far as it has them."""
        metrics: dict[str, float] = trial.user_attrs.get("metrics", {})
        values = dict(zip(self.objective.labels, trial.values or (), strict=False))
        return values | {name: metrics[name] for name in (SSIM, KID, COPY_RATE) if name in metrics}

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
    folder = Path(medgen.__file__).parent
    judges = checkpoint.code_fingerprint(source for pattern in JUDGES for source in folder.glob(pattern))
    parts = (plain, searched, objective.keys, params.tune.ssim_floor, dataset, extractor)
    return f"{params.model.name}-{fingerprint(*parts, train.code(), prior.code(), judges)}"


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
    """The SSIM a complete trial reached."""
    return float(trial.user_attrs["metrics"][SSIM])


def same_failures(trials: Sequence[FrozenTrial], since: datetime) -> str | None:
    """Why the last trials failed, where all did for the same reason; numbers in a reason do not count."""
    ended = [trial for trial in trials if trial.datetime_complete is not None and trial.datetime_complete >= since]
    last = sorted(ended, key=lambda trial: trial.datetime_complete or since)[-SAME_FAILURES:]
    reasons = [str(trial.user_attrs.get("reason", "")) for trial in last if trial.state == TrialState.FAIL]
    same = len({alike(reason) for reason in reasons}) == 1
    return reasons[-1] if len(reasons) == SAME_FAILURES and same else None


def alike(reason: str) -> str:
    """A reason without its numbers: those that differ in nothing else are the same."""
    return re.sub(r"\d+(\.\d+)?", "#", reason)


def is_nonfinite(trial: FrozenTrial) -> bool:
    """Whether a trial was given up because a value was not finite."""
    return "nonfinite_step" in trial.user_attrs or "not finite" in str(trial.user_attrs.get("reason", ""))


def is_start(study: Study, trial: FrozenTrial) -> bool:
    """Whether a trial's values are those of params.yaml as it is now."""
    return study.tried(trial) == {key: dimension.start for key, dimension in study.space.items()}
