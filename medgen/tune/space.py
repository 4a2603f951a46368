"""The search space: `tune.space` of params.yaml, checked against the schema; and the parameters of a trial.

Without `tune.space`: each phase's learning rate and β, the weights of the loss terms that params.yaml has, and the
variance that a gmm prior keeps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import optuna

from medgen.config import Beta, Params, Phase, Schedule, Searched, Train, TrialBudget, replace, unknown_name
from medgen.datasets.weights import weights_path
from medgen.errors import UserError
from medgen.models import MODELS, GenerativeModel

SECTIONS = ("model", "loss", "train", "prior", "refiner")  # data and extractor are made once, and judge all trials
OVERRULED = tuple(  # these change nothing that is learnt, or tune.trial decides them
    f"train.{name}" for name in ("subset", "sample_every", "on_nonfinite", "max_rollbacks", "checkpoint_seconds")
)
SOURCE = "tune.space"
SIGNIFICANT_DIGITS = 4  # of what is tried: nobody reads more, and the rest is noise
LEARNING_RATE = (1e-4, 1e-2)
BETA = (1e-3, 1.0)  # where 1 is the evidence lower bound
BETA_FACTOR = 30.0  # either way, where β has another scale
VARIANCE_KEPT = (0.8, 0.99)
WEIGHTS = {"l1": (0.1, 2.0), "ssim": (0.05, 2.0), "perceptual": (0.01, 1.0), "bce": (0.1, 2.0), "dice": (0.1, 2.0)}

Value = str | int | float | bool


@dataclass(frozen=True)
class Dimension:
    """A searched parameter: its dotted key, its values, and the one params.yaml has."""

    key: str
    values: Searched
    start: Value

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """As Optuna says it."""
        values = self.values
        if values.choices is not None:
            return optuna.distributions.CategoricalDistribution(values.choices)
        assert values.low is not None and values.high is not None
        if isinstance(self.start, int):
            step = 1 if values.step is None else int(values.step)
            return optuna.distributions.IntDistribution(int(values.low), int(values.high), values.log, step)
        return optuna.distributions.FloatDistribution(values.low, values.high, values.log, values.step)

    def suggest(self, trial: optuna.Trial) -> Value:
        """Asks Optuna for this trial's value, or what it suggested earlier."""
        values, distribution = self.values, self.distribution
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            assert values.choices is not None
            return trial.suggest_categorical(self.key, values.choices)  # type: ignore[return-value]  # none is None
        if isinstance(distribution, optuna.distributions.IntDistribution):
            low, high, step = distribution.low, distribution.high, distribution.step
            return trial.suggest_int(self.key, low, high, step=step, log=values.log)
        assert isinstance(distribution, optuna.distributions.FloatDistribution)
        return trial.suggest_float(
            self.key, distribution.low, distribution.high, step=distribution.step, log=values.log
        )

    def tried(self, suggested: Value) -> Value:
        """The value a trial takes: what Optuna suggested, less the digits that say nothing."""
        if suggested == self.start or not isinstance(suggested, float):
            return suggested
        if self.values.choices is not None or self.values.step is not None:
            return suggested
        assert self.values.low is not None and self.values.high is not None
        return min(max(float(f"{suggested:.{SIGNIFICANT_DIGITS}g}"), self.values.low), self.values.high)


def build_space(params: Params) -> dict[str, Dimension]:
    """The dimensions of `tune.space`, or the default ones, by key.

    Raises:
        UserError: a key is unknown or may not be searched, a range is of the wrong type, or params.yaml's own value,
            which the first trial takes, lies outside.
    """
    space = params.tune.space or default_space(params)
    return {key: _dimension(params, key, values) for key, values in space.items()}


def default_space(params: Params) -> dict[str, Searched]:
    """Learning rates, β, weights and a gmm's variance, as far as params.yaml has them, in ranges with its values."""
    space = {}
    for number, phase in enumerate(params.train.phases):
        if not phase.epochs:
            continue
        key = f"train.phases.{number}"
        space[f"{key}.learning_rate"] = _around(phase.learning_rate, *LEARNING_RATE)
        if (beta := phase.beta.end) > 0:
            elbo = params.loss.kl_reduction == "elbo"
            bounds = BETA if elbo else (beta / BETA_FACTOR, beta * BETA_FACTOR)
            space[f"{key}.beta.end"] = _around(beta, *bounds)
    weights = {name: weight for name, weight in params.loss.weights.model_dump().items() if weight > 0}
    if len(weights) > 1 and any(phase.weights is None for phase in params.train.phases):  # one alone: only a scale
        space |= {f"loss.weights.{name}": _around(weights[name], *WEIGHTS[name]) for name in WEIGHTS if name in weights}
    if has_mixture(params):
        space["prior.variance_kept"] = _around(params.prior.variance_kept, *VARIANCE_KEPT, log=False)
    return space


def has_mixture(params: Params) -> bool:
    """True if the prior is a gmm, by name or by the default of `medgen.training.prior.run`."""
    family = MODELS[params.model.name]
    if not issubclass(family, GenerativeModel):
        return False
    default = "gmm" if family.codes is GenerativeModel.codes else "tokens"
    return (params.prior.name or default) == "gmm"


def check_weights(params: Params, space: Mapping[str, Dimension]) -> None:
    """Refuses to search the perceptual weight where the network that it asks is not here.

    Raises:
        UserError: as `medgen.datasets.weights.weights_path`.
    """
    if any(key.endswith("weights.perceptual") for key in space) or params.loss.weights.perceptual > 0:
        weights_path("vgg16")


def trial_params(params: Params, values: Mapping[str, Value]) -> Params:
    """The parameters of a trial: searched values in place, cut to the budget `tune.trial`.

    A trial on a budget trains no refiner unless keys of `refiner` are searched.

    Raises:
        UserError: values that are good one by one do not go together.
    """
    chosen = replace(params, values, SOURCE)
    budget = params.tune.trial
    train = shortened(chosen.train, budget)
    is_full = train is chosen.train and budget.subset is None
    train = train.model_copy(
        update={
            "subset": budget.subset or train.subset,
            "sample_every": sum(phase.epochs for phase in train.phases),  # the first epoch's and the last one's grids
            "on_nonfinite": "raise",  # parameters that need to be nursed are not what is searched for
            "compile": "off" if train.compile == "auto" and not is_full else train.compile,  # short: it would not pay
        }
    )
    evaluate = chosen.evaluate.model_copy(update={"num_generated": budget.num_generated})
    refiner = chosen.refiner
    if not is_full and not any(key.startswith("refiner.") for key in params.tune.space):
        refiner = refiner.model_copy(update={"enabled": False})  # its training would take longer than the trial's
    return chosen.model_copy(update={"train": train, "refiner": refiner, "evaluate": evaluate})


def in_full(params: Params) -> Params:
    """The parameters of a search whose trials are trained in full, and none pruned.

    Raises:
        UserError: `tune.trial` cuts nothing, so that they are already.
    """
    budget = TrialBudget(num_generated=params.tune.trial.num_generated)
    tune = params.tune.model_copy(update={"trial": budget, "pruner": "none"})
    full = params.model_copy(update={"tune": tune})
    if trial_params(full, {}).train == trial_params(params, {}).train:
        raise UserError(
            "--confirm: tune.trial sets neither fewer epochs nor a subset, so every trial is already trained in full; "
            "leave --confirm out, or set tune.trial.epochs"
        )
    return full


def shortened(train: Train, budget: TrialBudget) -> Train:
    """Phases of `budget.epochs` in sum, each with its share and one epoch at least; what is told in epochs or warm-up
    steps shrinks alike.
    """
    total = sum(phase.epochs for phase in train.phases)
    if budget.epochs is None or budget.epochs >= total:
        return train
    factor = budget.epochs / total
    ends = [0, *(round(factor * end) for end in accumulate(phase.epochs for phase in train.phases))]
    lengths = [end - begin for begin, end in pairwise(ends)]
    phases = [_shortened(phase, length, factor) for phase, length in zip(train.phases, lengths, strict=True)]
    return train.model_copy(update={"phases": tuple(phases)})


def value_at(params: Params, key: str) -> Any:
    """The value at a dotted key.

    Raises:
        UserError: there is no such key.
    """
    node: Any = params.model_dump()
    for part in key.split("."):
        try:
            node = node[int(part)] if isinstance(node, tuple) else node[part]
        except (KeyError, ValueError, IndexError, TypeError):
            if node is not None:
                replace(params, {key: None}, SOURCE)  # says what is wrong with the key
            raise UserError(f"{SOURCE}.{key}: leads through a value that params.yaml leaves at null; set it") from None
    return node


def _dimension(params: Params, key: str, values: Searched) -> Dimension:
    section = key.partition(".")[0]
    if section not in SECTIONS:
        known = f"keys of {', '.join(SECTIONS)} can be searched"
        if section in type(params).model_fields:
            raise UserError(f"{SOURCE}.{key}: {section} is the same for all trials, which are compared by it; {known}")
        raise unknown_name(f"{SOURCE}.{key}: section", section, SECTIONS)
    if key in OVERRULED:
        raise UserError(f"{SOURCE}.{key}: the same in all trials, where it is not tune.trial's; leave it out")
    start = value_at(params, key)
    for value in _ends(values):
        taken = value_at(replace(params, {key: value}, SOURCE), key)
        if values.choices is not None and isinstance(taken, bool) != isinstance(value, bool):
            raise UserError(f"{SOURCE}.{key}: found choice {value!r}, expected values like params.yaml's {start!r}")
        if values.choices is None and isinstance(taken, bool):
            raise UserError(f"{SOURCE}.{key}: is true or false, found a range; expected choices: [true, false]")
        if values.choices is None and isinstance(taken, int) and values.step is not None and values.step % 1:
            raise UserError(f"{SOURCE}.{key}: a whole number, found step {values.step:g}; expected a whole step")
    if not isinstance(start, Value):
        raise UserError(
            f"{SOURCE}.{key}: params.yaml has {start!r} there, and the first trial is params.yaml itself; set a value"
        )
    if not _holds(values, start):
        raise UserError(
            f"{SOURCE}.{key}: params.yaml has {start!r}, and the first trial is params.yaml itself; widen the range, "
            "or change the value"
        )
    return Dimension(key, values, start)


def _ends(values: Searched) -> Iterable[Any]:
    return values.choices if values.choices is not None else (values.low, values.high)


def _holds(values: Searched, start: Value) -> bool:
    if values.choices is not None:
        return start in values.choices
    assert values.low is not None and values.high is not None and not isinstance(start, str)
    steps = 0.0 if values.step is None else (start - values.low) / values.step
    return values.low <= start <= values.high and abs(steps - round(steps)) < 1e-6


def _around(value: float, low: float, high: float, log: bool = True) -> Searched:
    return Searched(low=min(low, value), high=max(high, value), log=log)


def _shortened(phase: Phase, epochs: int, factor: float) -> Phase:
    def scaled(length: int) -> int:
        return max(1, round(factor * length))

    schedule, beta = phase.schedule, phase.beta
    shorter: dict[str, int | Schedule | Beta] = {
        "epochs": max(1, epochs) if phase.epochs else 0,
        "warmup_steps": round(factor * phase.warmup_steps),
        "schedule": schedule.model_copy(
            update={"period": scaled(schedule.period), "patience": scaled(schedule.patience)}
        ),
        "beta": beta.model_copy(update={"epochs": scaled(beta.epochs)}),
    }
    return phase.model_copy(update=shorter)
