"""The search space is checked against the schema; a trial has params.yaml's parameters, reduced to its budget."""

import pytest

from medgen.config import (
    Beta,
    Loss,
    Model,
    Params,
    Phase,
    Prior,
    Refiner,
    Schedule,
    Searched,
    Train,
    TrialBudget,
    Tune,
    Weights,
    load,
    replace,
)
from medgen.errors import UserError
from medgen.models import MODELS
from medgen.projects.recipes import list_recipes
from medgen.tune.objective import choose_objective
from medgen.tune.space import build_space, shorten, trial_params, value_at

TWO_PHASES = (
    Phase(name="a", epochs=30, learning_rate=2e-3, warmup_steps=50, schedule=Schedule(period=30)),
    Phase(name="b", epochs=10, learning_rate=5e-4, beta=Beta(schedule="linear", end=0.1, epochs=8)),
)
ONE_EPOCH = Phase(name="a", epochs=1)


def params_of(space=None, **sections):
    sections = {"train": Train(phases=TWO_PHASES)} | sections
    return Params(tune=Tune(space=space or {}), **sections)


def test_default_space_surrounds_the_values_of_params():
    space = build_space(params_of())
    assert list(space) == [
        "train.phases.a.learning_rate",
        "train.phases.b.learning_rate",
        "train.phases.b.beta.end",
        "loss.weights.l1",
        "loss.weights.ssim",
        "prior.variance_kept",
    ]
    for key, dimension in space.items():
        assert dimension.distribution.log == (key != "prior.variance_kept")
        assert dimension.distribution.low <= dimension.start <= dimension.distribution.high


@pytest.mark.parametrize(
    ("sections", "absent"),
    [
        ({"loss": Loss(weights=Weights(l1=1.0))}, "loss.weights.l1"),  # one weight alone is a scale
        ({"loss": Loss(weights=Weights(l1=1.0, ssim=1.0))}, "loss.weights.perceptual"),
        (
            {"train": Train(phases=(Phase(name="a", epochs=1), Phase(name="b", epochs=0)))},
            "train.phases.b.learning_rate",
        ),
        ({"train": Train(phases=(Phase(name="a", epochs=1),))}, "train.phases.a.beta.end"),
        ({"prior": Prior(name="flow")}, "prior.variance_kept"),
        ({"model": Model(name="vqvae")}, "prior.variance_kept"),
        ({"model": Model(name="unet")}, "prior.variance_kept"),
    ],
)
def test_default_space_has_only_keys_in_use(sections, absent):
    assert absent not in build_space(params_of(**sections))


@pytest.mark.parametrize(
    ("own", "ends"), [(0.8, (0.8, 0.99)), (0.97, (0.8, 0.99)), (0.5, (0.5, 0.99)), (1.0, (0.8, 1.0))]
)
def test_default_range_of_the_priors_variance_contains_its_value(own, ends):
    dimension = build_space(params_of(prior=Prior(name="gmm", variance_kept=own)))["prior.variance_kept"]
    assert (dimension.distribution.low, dimension.distribution.high) == ends and dimension.start == own


def test_distributions_of_each_kind_of_value():
    space = build_space(
        params_of(
            {
                "train.batch_size": Searched(low=8, high=64, step=8),
                "model.base_channels": Searched(low=8, high=64, log=True),
                "train.horizontal_flip": Searched(choices=(False, True)),
                "model.name": Searched(choices=("spatial_vae", "vae")),
                "loss.free_bits": Searched(low=0, high=0.5),
                "prior.variance_kept": Searched(low=0.5, high=1.0),
                "refiner.sampling_noise": Searched(low=0.1, high=0.9),
            }
        )
    )
    kinds = {key: type(dimension.distribution).__name__ for key, dimension in space.items()}
    assert kinds == {
        "train.batch_size": "IntDistribution",
        "model.base_channels": "IntDistribution",
        "train.horizontal_flip": "CategoricalDistribution",
        "model.name": "CategoricalDistribution",
        "loss.free_bits": "FloatDistribution",
        "prior.variance_kept": "FloatDistribution",
        "refiner.sampling_noise": "FloatDistribution",
    }


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("train.lerning_rate", Searched(low=1e-4, high=1e-2), "unknown key"),
        ("train.phases.a.learning_rte", Searched(low=1e-4, high=1e-2), "did you mean 'learning_rate'"),
        ("train.phases.2.learning_rate", Searched(low=1e-4, high=1e-2), "2 is not a phase; expected one of a, b"),
        ("trian.batch_size", Searched(low=8, high=64), "did you mean 'train'"),
        ("preprocess.image_size", Searched(low=32, high=64), "must be the same for all trials"),
        ("evaluate.seed", Searched(low=0, high=9), "must be the same for all trials"),
        ("train.phases.a.learning_rate", Searched(low=-1, high=1e-2), "greater than 0"),
        ("train.batch_size", Searched(low=8.5, high=64), "valid integer"),
        ("train.batch_size", Searched(low=8, high=64, step=0.5), "expected an integer step"),
        ("train.horizontal_flip", Searched(low=0, high=1), "true or false"),
        ("train.precision", Searched(choices=("fp32", "fp64")), "fp64"),
        ("train.phases.a.learning_rate", Searched(low=3e-3, high=1e-2), "has 0.002"),
        ("train.batch_size", Searched(choices=(8, 16)), "has 32"),
        ("train.batch_size", Searched(low=20, high=60, step=5), "has 32"),
        ("model.latent_channels", Searched(low=4, high=16), "has None"),
        ("train.phases.a.weights.l1", Searched(low=0.1, high=1), "is null in params.yaml"),
        ("model.attention_resolutions.00", Searched(low=1, high=2), "'00' is not an index"),
        ("train.phases.b.beta.end", Searched(choices=(0.1, True)), "found choice True"),
        ("train.subset", Searched(low=8, high=64), "leave it out"),
        ("model.attention_resolutions", Searched(choices=("a", "b")), "attention_resolutions"),
    ],
)
def test_invalid_keys_and_ranges_are_refused(key, values, message):
    with pytest.raises(UserError, match=message) as error:
        build_space(params_of({key: values}))
    assert "tune.space" in str(error.value)


def test_phases_can_be_numbered_as_in_earlier_versions():
    with pytest.warns(UserWarning, match="rename the key to train.phases.b.beta.end"):
        assert list(build_space(params_of({"train.phases.1.beta.end": Searched(low=0, high=1)}))) == [
            "train.phases.b.beta.end"
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{low: 1, high: 1}", "the range is empty"),
        ("{low: 2, high: 1}", "the range is empty"),
        ("{low: 1}", "expected low and high, or choices"),
        ("{low: 0, high: 1, log: true}", "log needs a low above 0"),
        ("{low: 1, high: 2, step: 3}", "longer than the range"),
        ("{low: 1, high: .inf}", "finite"),
        ("{choices: [1]}", "at least 2"),
        ("{choices: [1, 1]}", "choices must differ"),
        ("{choices: [1, 2], low: 1}", "expected choices, or low and high"),
        ("{low: 1, hgh: 2}", "did you mean 'high'"),
    ],
)
def test_invalid_ranges_are_refused_when_the_file_is_read(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(f"tune: {{space: {{train.batch_size: {text}}}}}\n")
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "tune.space.train.batch_size" in str(error.value)


@pytest.mark.parametrize(
    ("epochs", "lengths"), [(None, [30, 10]), (80, [30, 10]), (8, [6, 2]), (3, [2, 1]), (1, [1, 1])]
)
def test_a_budget_keeps_the_shares_of_the_phases(epochs, lengths):
    short = shorten(Train(phases=TWO_PHASES), TrialBudget(epochs=epochs))
    assert [phase.epochs for phase in short.phases] == lengths


def test_periods_in_epochs_and_warmup_steps_shrink_with_the_phases():
    first, second = shorten(Train(phases=TWO_PHASES), TrialBudget(epochs=10)).phases
    assert (first.schedule.period, first.warmup_steps, second.beta.epochs) == (8, 12, 2)
    assert (first.learning_rate, second.beta.end) == (2e-3, 0.1)


@pytest.mark.parametrize(
    ("epochs", "space", "enabled"),
    [
        (1, {}, False),
        (1, {"refiner.sampling_noise": Searched(low=0.1, high=0.9)}, True),
        (None, {}, True),  # in full, as in a confirmation
    ],
)
def test_a_trial_with_a_budget_trains_a_refiner_only_if_it_is_searched(epochs, space, enabled):
    tune = Tune(trial=TrialBudget(epochs=epochs), space=space)
    train = Train(phases=(Phase(name="train", epochs=4),))
    params = Params(refiner=Refiner(enabled=True), train=train, tune=tune)
    assert trial_params(params, {}).refiner.enabled is enabled


def test_trial_params_have_the_values_and_the_budget():
    params = replace(params_of(), {"tune.trial.subset": 64, "tune.trial.num_generated": 100}, "test")
    trial = trial_params(params, {"train.phases.b.beta.end": 0.5, "train.batch_size": 8})
    assert (value_at(trial, "train.phases.b.beta.end"), trial.train.batch_size) == (0.5, 8)
    assert (trial.train.subset, trial.evaluate.num_generated, trial.train.on_nonfinite) == (64, 100, "raise")
    assert trial.model == params.model and trial.train.phases[0].learning_rate == 2e-3


def test_values_are_rounded_within_their_range():
    dimension = build_space(params_of())["train.phases.a.learning_rate"]
    assert dimension.round(0.00123456789) == 0.001235
    assert dimension.round(1e-2 - 1e-9) == 1e-2


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_can_be_searched(name, root):
    params = load(root / "recipes" / f"{name}.yaml", ["tune.trial.epochs=2"])
    space = build_space(params)
    objective = choose_objective(None, MODELS[params.model.name].target, params.preprocess.image_size, params.evaluate)
    assert f"train.phases.{params.train.phases[0].name}.learning_rate" in space and objective.keys
    trial = trial_params(params, {key: dimension.start for key, dimension in space.items()})
    assert sum(phase.epochs for phase in trial.train.phases) == max(2, len(params.train.phases))
    assert [phase.learning_rate for phase in trial.train.phases] == [p.learning_rate for p in params.train.phases]
