"""Build the search space from `tune.space` of params.yaml, and the parameters of a trial.

The default space holds each phase's learning rate and β, the weights of the loss terms in use, and the share of
variance that a gmm prior keeps.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from medgen.config import Beta, Params, Phase, Schedule, Searched, Train, TrialBudget, replace, unknown_name
from medgen.config.edit import Value
from medgen.datasets.weights import weights_path
from medgen.errors import UserError
from medgen.models import MODELS, GenerativeModel

SECTIONS = ("model", "loss", "train", "prior", "refiner")  # dataset and extractor are the same for all trials
FIXED_KEYS = tuple(  # keys that do not change what is learned, or that `trial_params` sets
    f"train.{name}" for name in ("subset", "sample_every", "on_nonfinite", "max_rollbacks", "checkpoint_seconds")
)
SOURCE = "tune.space"
SIGNIFICANT_DIGITS = 4  # of a tried value
LEARNING_RATE = (1e-4, 1e-2)
BETA = (1e-3, 1.0)  # if the KL divergence is reduced as in the ELBO, of which β is 1
BETA_FACTOR = 30.0  # otherwise, up and down from the value in params.yaml
VARIANCE_KEPT = (0.8, 0.99)
WEIGHTS = {"l1": (0.1, 2.0), "ssim": (0.05, 2.0), "perceptual": (0.01, 1.0), "bce": (0.1, 2.0), "dice": (0.1, 2.0)}

Distribution = CategoricalDistribution | IntDistribution | FloatDistribution


@dataclass(frozen=True)
class Dimension:
    """A searched parameter: its dotted key, its range or choices, and its value in params.yaml."""

    key: str
    distribution: Distribution
    start: Value

    def suggest(self, trial: optuna.Trial) -> Value:
        """Optuna's value for this trial; the one it suggested before, if there is one."""
        values = self.distribution
        if isinstance(values, CategoricalDistribution):
            return trial.suggest_categorical(self.key, values.choices)  # type: ignore[return-value]  # none is None
        if isinstance(values, IntDistribution):
            return trial.suggest_int(self.key, values.low, values.high, step=values.step, log=values.log)
        return trial.suggest_float(self.key, values.low, values.high, step=values.step, log=values.log)

    def round(self, suggested: Value) -> Value:
        """The value that a trial uses: the suggested one, to `SIGNIFICANT_DIGITS` digits, within the range."""
        values = self.distribution
        if suggested == self.start or not isinstance(values, FloatDistribution) or values.step is not None:
            return suggested
        return min(max(float(f"{suggested:.{SIGNIFICANT_DIGITS}g}"), values.low), values.high)


def build_space(params: Params) -> dict[str, Dimension]:
    """The dimensions of `tune.space`, or the default ones, by key.

    Raises:
        UserError: a key is unknown or cannot be searched, a range has the wrong type, or does not contain the value of
            params.yaml, which trial 0 uses.
    """
    space = params.tune.space or default_space(params)
    dimensions = [_build_dimension(params, _name_phase(params, key), values) for key, values in space.items()]
    return {dimension.key: dimension for dimension in dimensions}


def default_space(params: Params) -> dict[str, Searched]:
    """Ranges around params.yaml's values of learning rates, β, loss weights and the variance that a gmm prior keeps."""
    space = {}
    for phase in params.train.phases:
        if not phase.epochs:
            continue
        key = f"train.phases.{phase.name}"
        space[f"{key}.learning_rate"] = _range_around(phase.learning_rate, *LEARNING_RATE)
        if (beta := phase.beta.end) > 0:
            elbo = params.loss.kl_reduction == "elbo"
            bounds = BETA if elbo else (beta / BETA_FACTOR, beta * BETA_FACTOR)
            space[f"{key}.beta.end"] = _range_around(beta, *bounds)
    weights = {name: weight for name, weight in params.loss.weights.model_dump().items() if weight > 0}
    # a single weight only scales the loss
    if len(weights) > 1 and any(phase.weights is None for phase in params.train.phases):
        for name, bounds in WEIGHTS.items():
            if name in weights:
                space[f"loss.weights.{name}"] = _range_around(weights[name], *bounds)
    if uses_gmm(params):
        space["prior.variance_kept"] = _range_around(params.prior.variance_kept, *VARIANCE_KEPT, log=False)
    return space


def uses_gmm(params: Params) -> bool:
    """True if the prior is a gmm, by name or as the default of `medgen.training.prior.run`."""
    family = MODELS[params.model.name]
    if not issubclass(family, GenerativeModel):
        return False
    default = "gmm" if family.codebook is GenerativeModel.codebook else "tokens"
    return (params.prior.name or default) == "gmm"


def check_weight_files(params: Params, space: Mapping[str, Dimension]) -> None:
    """Check that the network of the perceptual loss is present if its weight is searched or above 0.

    Raises:
        UserError: it is missing, as in `medgen.datasets.weights.weights_path`.
    """
    if any(key.endswith("weights.perceptual") for key in space) or params.loss.weights.perceptual > 0:
        weights_path("vgg16")


def trial_params(params: Params, values: Mapping[str, Value]) -> Params:
    """The parameters of a trial: params with the searched values, reduced to the budget `tune.trial`.

    A trial with a budget trains no refiner unless keys of `refiner` are searched.

    Raises:
        UserError: the combination of values is invalid.
    """
    chosen = replace(params, values, SOURCE)
    budget = params.tune.trial
    train = shorten(chosen.train, budget)
    is_full = train is chosen.train and budget.subset is None
    train = train.model_copy(
        update={
            "subset": budget.subset or train.subset,
            "sample_every": sum(phase.epochs for phase in train.phases),  # sample grids of the first and the last epoch
            "on_nonfinite": "raise",  # parameters that need rollbacks are not a good result
            "compile": "off"
            if train.compile == "auto" and not is_full
            else train.compile,  # takes longer than it saves in a short trial
        }
    )
    evaluate = chosen.evaluate.model_copy(update={"num_generated": budget.num_generated})
    refiner = chosen.refiner
    if not is_full and not any(key.startswith("refiner.") for key in params.tune.space):
        refiner = refiner.model_copy(update={"enabled": False})  # its training takes longer than the rest of the trial
    return chosen.model_copy(update={"train": train, "refiner": refiner, "evaluate": evaluate})


def full_params(params: Params) -> Params:
    """The parameters of a search whose trials are trained in full and not pruned.

    Raises:
        UserError: `tune.trial` sets no budget, so every trial is already trained in full.
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


def shorten(train: Train, budget: TrialBudget) -> Train:
    """The phases, shortened in proportion to `budget.epochs` in total, each to one epoch at least.

    Periods in epochs and warm-up steps shrink by the same factor.
    """
    total = sum(phase.epochs for phase in train.phases)
    if budget.epochs is None or budget.epochs >= total:
        return train
    factor = budget.epochs / total
    ends = [0, *(round(factor * end) for end in accumulate(phase.epochs for phase in train.phases))]
    lengths = [end - begin for begin, end in pairwise(ends)]
    phases = [_shorten_phase(phase, length, factor) for phase, length in zip(train.phases, lengths, strict=True)]
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
                replace(params, {key: None}, SOURCE)  # raises the error for an unknown key
            raise UserError(f"{SOURCE}.{key}: a section of this key is null in params.yaml; set it there") from None
    return node


def _name_phase(params: Params, key: str) -> str:
    """The key with the name of a phase in place of its number, which earlier versions used."""
    parts, names = key.split("."), [phase.name for phase in params.train.phases]
    if parts[:2] != ["train", "phases"] or not parts[2:] or parts[2] in names or not parts[2].isdigit():
        return key
    if int(parts[2]) < len(names):
        parts[2] = names[int(parts[2])]
        warnings.warn(f"{SOURCE}.{key}: phases have names now; rename the key to {'.'.join(parts)}", stacklevel=2)
    return ".".join(parts)


def _build_dimension(params: Params, key: str, values: Searched) -> Dimension:
    section = key.partition(".")[0]
    if section not in SECTIONS:
        known = f"keys of {', '.join(SECTIONS)} can be searched"
        if section in type(params).model_fields:
            raise UserError(
                f"{SOURCE}.{key}: {section} must be the same for all trials, so that they can be compared; {known}"
            )
        raise unknown_name(f"{SOURCE}.{key}: section", section, SECTIONS)
    if key in FIXED_KEYS:
        raise UserError(f"{SOURCE}.{key}: cannot be searched, as the search or tune.trial sets it; leave it out")
    start = value_at(params, key)
    for value in values.choices or (values.low, values.high):
        taken = value_at(replace(params, {key: value}, SOURCE), key)
        if values.choices is not None and isinstance(taken, bool) != isinstance(value, bool):
            raise UserError(
                f"{SOURCE}.{key}: found choice {value!r}, expected the type of params.yaml's value {start!r}"
            )
        if values.choices is None and isinstance(taken, bool):
            raise UserError(
                f"{SOURCE}.{key}: found a range for a value that is true or false; expected choices: [true, false]"
            )
        if values.choices is None and isinstance(taken, int) and values.step is not None and values.step % 1:
            raise UserError(f"{SOURCE}.{key}: found step {values.step:g} for an integer; expected an integer step")
    if not isinstance(start, Value):
        raise UserError(f"{SOURCE}.{key}: params.yaml has {start!r} there, but trial 0 needs a value; set one")
    distribution = _build_distribution(values, start)
    if not _contains(distribution, start):
        raise UserError(
            f"{SOURCE}.{key}: params.yaml has {start!r}, which trial 0 uses, outside the range or choices; widen "
            "them, or change the value"
        )
    return Dimension(key, distribution, start)


def _build_distribution(values: Searched, start: Value) -> Distribution:
    if values.choices is not None:
        return CategoricalDistribution(values.choices)
    assert values.low is not None and values.high is not None
    if isinstance(start, int):
        return IntDistribution(int(values.low), int(values.high), values.log, int(values.step or 1))
    return FloatDistribution(values.low, values.high, values.log, values.step)


def _contains(distribution: Distribution, start: Value) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return start in distribution.choices
    assert not isinstance(start, str)
    steps = 0.0 if distribution.step is None else (start - distribution.low) / distribution.step
    return distribution.low <= start <= distribution.high and abs(steps - round(steps)) < 1e-6


def _range_around(value: float, low: float, high: float, log: bool = True) -> Searched:
    return Searched(low=min(low, value), high=max(high, value), log=log)


def _shorten_phase(phase: Phase, epochs: int, factor: float) -> Phase:
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
