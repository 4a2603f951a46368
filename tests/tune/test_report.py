"""The output of a search: figures, best.yaml, params.yaml with its values, the summary."""

import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from medgen import console, tune
from medgen.config import load, replace
from medgen.errors import UserError
from medgen.metrics.intervals import Interval
from medgen.metrics.mmd import Discrepancy
from medgen.tune.figures import TrialGroups, write_figures
from medgen.tune.objective import MMD, RECALL, SSIM, choose_objective
from medgen.tune.params_file import apply_best, write_best
from medgen.tune.report import print_summary
from medgen.tune.space import Dimension, build_space, value_at
from medgen.tune.storage import JournalStorage
from medgen.tune.study import DISCREPANCY, Study, discrepancy_to_dict

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]
RATE, FLIP = "train.phases.reconstruct.learning_rate", "train.horizontal_flip"
BETA = "train.phases.regularise.beta.end"
SMALL = {
    RATE: Dimension(RATE, FloatDistribution(1e-4, 1e-2, log=True), 2e-3),
    FLIP: Dimension(FLIP, CategoricalDistribution((True, False)), False),
    BETA: Dimension(BETA, FloatDistribution(0.0, 1.0), 0.1),
}
START = {key: dimension.start for key, dimension in SMALL.items()}
OTHER = START | {RATE: 1e-3, FLIP: True}


@pytest.fixture
def build(tmp_path):
    """A function that creates a study; `name` is the objective as in tune.objective."""

    def make(space=SMALL, name=None, params=None, target="image"):
        params = params or load(ROOT / "params.yaml")
        objective = choose_objective(name, target, 64, params.evaluate)
        return Study(JournalStorage(tmp_path / "optuna.journal"), "vae-123456", params, space, objective)

    return make


def add(study, values=OTHER, mmd=0.02, ssim=0.9, state=TrialState.COMPLETE, recall=0.5, **attributes):
    """Add a trial as the worker records it."""
    metrics = {MMD: mmd, SSIM: ssim, RECALL: recall, "privacy/copy_rate": 0.0125}
    complete = state == TrialState.COMPLETE
    trial = create_trial(
        state=state,
        params=dict(values),
        distributions={key: study.space[key].distribution for key in values},
        values=study.objective.values(metrics) if complete else None,
        user_attrs=attributes | ({"metrics": metrics} if complete else {}),
    )
    study.optuna.add_trial(trial)
    return study.trials[-1]


def other(dimension):
    """A value of the dimension that differs from params.yaml."""
    values = dimension.distribution
    return values.low if dimension.start != values.low else values.high


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_apply_changes_only_values_in_a_params_file(file, tmp_path, build):
    params = load(file)
    space = build_space(params)
    space.pop("prior.variance_kept", None)  # not in the files; test_a_value_is_inserted covers new lines
    name, target = (None, "mask") if params.model.name == "unet" else (SSIM, "image")
    study = build(space, params=params, name=name, target=target)
    values = {key: other(dimension) for key, dimension in space.items()}
    trial = create_trial(values=[0.5], params=values, distributions={k: d.distribution for k, d in space.items()})
    copy = tmp_path / "params.yaml"
    copy.write_bytes(file.read_bytes())

    assert apply_best(study, trial, copy)
    assert load(copy) == replace(params, values, "test")
    before, after = (path.read_text().splitlines(keepends=True) for path in (file, copy))
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert 0 < len(changed) <= len(values)
    # the text around the values is the same: keys, comments, alignment, braces
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in changed)
    assert all(old.partition(":")[0] == new.partition(":")[0] for old, new in changed)

    written = copy.read_bytes()
    assert not apply_best(study, trial, copy)
    assert copy.read_bytes() == written

    best = write_best(study, trial, file, tmp_path / "tune")
    assert load(best) == load(copy)
    assert best.read_text().endswith(copy.read_text())


DROPOUT = Dimension("prior.dropout", FloatDistribution(0.0, 0.9), 0.1)
RULE = Dimension("prior.solver", CategoricalDistribution(("euler", "midpoint")), "midpoint")
DECAY = Dimension("train.phases.a.weight_decay", FloatDistribution(1e-9, 1.0, log=True), 1e-5)
RAMP = Dimension("train.phases.a.beta.end", FloatDistribution(0.0, 1.0), 0.0)
PHASE = "train:\n  phases:\n"


@pytest.mark.parametrize(
    ("dimension", "value", "before", "after"),
    [
        pytest.param(
            DROPOUT,
            0.25,
            "prior:\n  name: flow   # prior network\n\n# evaluation\nevaluate: {}\n",
            "prior:\n  name: flow   # prior network\n  dropout: 0.25\n\n# evaluation\nevaluate: {}\n",
            id="missing: after the last value, before the next section's comment",
        ),
        pytest.param(
            DROPOUT, 0.25, "prior: {name: flow}", "prior: {name: flow, dropout: 0.25}", id="missing in braces"
        ),
        pytest.param(DROPOUT, 0.25, "prior: {} # x\n", "prior: {dropout: 0.25} # x\n", id="empty braces"),
        pytest.param(
            DROPOUT, 0.25, "prior: {name: flow, }\n", "prior: {name: flow, dropout: 0.25, }\n", id="comma at the end"
        ),
        pytest.param(DROPOUT, 0.25, "data: {}", "data: {}\nprior: {dropout: 0.25}\n", id="missing section, no newline"),
        pytest.param(
            DROPOUT,
            0.25,
            "prior:\n  dropout: 1.0e-1 # of units\n",
            "prior:\n  dropout: 0.25 # of units\n",
            id="comment",
        ),
        pytest.param(
            DROPOUT,
            0.25,
            "prior:\r\n  name: flow\r\n  dropout: 0.1 # x\r\n",
            "prior:\r\n  name: flow\r\n  dropout: 0.25 # x\r\n",
            id="Windows' line ends",
        ),
        pytest.param(RULE, "euler", "prior: {solver: 'midpoint'}\n", "prior: {solver: euler}\n", id="quoted word"),
        pytest.param(
            DECAY,
            1.5e-5,
            PHASE + "     a:\n        weight_decay: 1e-3\n        epochs: 3\n",
            PHASE + "     a:\n        weight_decay: 1.5e-5\n        epochs: 3\n",
            id="small number, another indentation",
        ),
        pytest.param(
            DECAY,
            1e-6,
            PHASE + "      - {name: b, epochs: 1}\n      - {name: a,  epochs: 3}\n\nprior: {}\n",
            PHASE + "      - {name: b, epochs: 1}\n      - {name: a,  epochs: 3, weight_decay: 1e-6}\n\nprior: {}\n",
            id="missing in braces of a list, as phases were in earlier versions",
        ),
        pytest.param(
            RAMP,
            0.5,
            PHASE + "    a:\n      epochs: 3 # short\n    b: {epochs: 1}\n",
            PHASE + "    a:\n      epochs: 3 # short\n      beta: {end: 0.5}\n    b: {epochs: 1}\n",
            id="missing section",
        ),
        pytest.param(
            SMALL[FLIP],
            True,
            PHASE + "    - name: a\n      epochs: 3 # short\n\n# sampling\nprior: {}\n",
            PHASE + "    - name: a\n      epochs: 3 # short\n  horizontal_flip: true\n\n# sampling\nprior: {}\n",
            id="missing after a list",
        ),
    ],
)
def test_a_value_is_inserted(dimension, value, before, after, tmp_path, build):
    study, file = build({dimension.key: dimension}), tmp_path / "params.yaml"
    file.write_bytes(before.encode())
    assert apply_best(study, add(study, {dimension.key: value}), file)
    assert file.read_bytes().decode() == after
    found = value_at(load(file), dimension.key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "before", ["prior: {name: flow, dropout: 1.0e-1}\n", "prior:\n  name: flow\n"], ids=["written", "default"]
)
def test_an_equal_value_is_not_rewritten(before, tmp_path, build):
    study, file = build({DROPOUT.key: DROPOUT}), tmp_path / "params.yaml"
    file.write_text(before)
    assert not apply_best(study, add(study, {DROPOUT.key: 0.1}), file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            PHASE + "    reconstruct: {epochs: 1, learning_rate: &rate 2e-3}\n"
            "    regularise: {epochs: 1, learning_rate: *rate, beta: {end: 0.1}}\n",
            "anchors or aliases.*learning_rate: 0.001",
            id="an alias of a value",
        ),
        pytest.param(
            PHASE + "    reconstruct: {epochs: 1, beta: &ramp {end: 0.1}}\n    regularise: {epochs: 1, beta: *ramp}\n",
            "anchors or aliases.*beta.end: 0.5",
            id="an alias of a section",
        ),
        pytest.param("train: {phases: {reconstruct: {epochs: 1}}, batch: 3}", "unknown key", id="invalid params file"),
        pytest.param("train: {phases: {reconstruct: {epochs: 1}}}", "regularise", id="missing phase"),
    ],
)
def test_apply_refuses_a_file_it_cannot_change(text, message, tmp_path, build):
    study, file = build(), tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        apply_best(study, add(study, OTHER | {BETA: 0.5}), file)
    assert file.read_text() == text


def test_best_yaml_names_its_trial_and_metrics(tmp_path, build):
    study = build()
    add(study, START)
    best = write_best(study, add(study, mmd=0.0123, ssim=0.912), ROOT / "params.yaml", tmp_path / "tune")
    assert best == tmp_path / "tune" / "best.yaml"
    head = [line for line in best.read_text().partition("# The sample project")[0].splitlines()]
    assert head and all(line.startswith("#") for line in head)
    for words in ("vae-123456: trial 1, best of 2", f"{MMD} 0.0123", f"{SSIM} 0.912", "`medgen tune --apply`"):
        assert words in "\n".join(head)


def search(build, name=None, outlier=False):
    """A study with trials of every kind."""
    study = build(name=name)
    add(study, START, mmd=0.03, ssim=0.85)
    for number in range(8):
        values = START | {RATE: 1e-4 * 1.5**number, FLIP: number % 2 == 0, BETA: number / 8}
        add(
            study,
            values,
            mmd=99.0 if outlier and number == 3 else 0.04 - 0.002 * number,
            ssim=0.84 + 0.01 * (number % 4),
        )
    add(study, state=TrialState.PRUNED, reason="val/ssim 0.51 after epoch 3: worse than other trials'")
    add(study, state=TrialState.PRUNED, reason="kl not finite at step 7 (phase one)", nonfinite_step="7")
    add(study, {}, state=TrialState.FAIL, reason="out of memory")
    add(study, state=TrialState.RUNNING)
    return study


COMMON = ["importances.png", "parallel_coordinates.png", "slice.png"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [(MMD, ["history.png", *COMMON]), (SSIM, ["history.png", *COMMON]), ("pareto", [*COMMON, "front.png"])],
)
def test_figures(name, expected, tmp_path, build):
    study, folder, style = search(build, name), tmp_path / "tune", dict(mpl.rcParams)
    folder.mkdir()
    for stale in ("history.png", "front.png"):
        (folder / stale).write_bytes(b"old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning of Optuna may reach the user
        written = write_figures(study, folder, study.winner())
    assert [path.name for path in written] == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    for path in written:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.min() < 64 and 0.01 < (pixels < 250).mean() < 0.5, path.name  # some ink, mostly white
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edges == 255).all(), f"{path.name}: something is cut off"
    assert dict(mpl.rcParams) == style


def test_the_same_trials_give_the_same_bytes(tmp_path, build):
    study = search(build, "pareto")
    one, two = ([path.read_bytes() for path in write_figures(study, tmp_path / name, study.winner())] for name in "ab")
    assert len(one) == 4
    assert one == two


@pytest.mark.parametrize(
    ("mmds", "expected"),
    [
        pytest.param([], [], id="no trial is complete"),
        pytest.param([0.02], ["history.png"], id="one"),
        pytest.param([0.02, 0.02], ["history.png", "parallel_coordinates.png", "slice.png"], id="one value"),
        pytest.param([0.02, 0.03], ["history.png", *COMMON], id="two"),
    ],
)
def test_figures_that_need_more_trials_are_absent(mmds, expected, tmp_path, build):
    study, folder = build(), tmp_path / "tune"
    folder.mkdir()
    for stale in ("history", "importances", "parallel_coordinates", "slice", "front"):
        (folder / f"{stale}.png").write_bytes(b"old")
    for mmd in mmds:
        add(study, START if mmd == mmds[0] else OTHER, mmd=mmd)
    add(study, state=TrialState.PRUNED, reason="too slow")
    assert [path.name for path in write_figures(study, folder, study.winner())] == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("name", [MMD, "pareto"])
def test_an_outlier_does_not_compress_the_other_trials(name, build):
    study = search(build, name, outlier=True)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    scale = TrialGroups(study, study.winner()).scales[-1]
    outlier = max(complete, key=lambda trial: trial.values[-1])
    assert outlier.values[-1] == 99.0 and scale.clip(outlier) == scale.worst < 0.1 and scale.is_outlier(outlier)
    others = [trial for trial in complete if trial != outlier]
    assert all(scale.clip(trial) == trial.values[-1] and not scale.is_outlier(trial) for trial in others)


def test_all_outputs_name_the_same_winner_of_tied_trials(build, tmp_path):
    study = build()
    tied(study)
    best = study.winner()
    assert best is not None and best.number == 2
    assert "best 0.029 (trial 2)" in tune.format_progress(study)
    assert "best 0.029 (trial 2)" in tune.format_trial(study, study.trials[3])
    assert ": trial 2, best of 4" in write_best(study, best, ROOT / "params.yaml", tmp_path).read_text()


def better(study):
    add(study, START, mmd=0.03)
    add(study, mmd=0.0123, ssim=0.91)


def tied(study):
    """Trials with a standard error of 0.01, from the samples alone."""
    for mmd, recall in ((0.05, 0.6), (0.02, 0.5), (0.029, 0.7), (0.031, 0.9)):
        discrepancy = Discrepancy(Interval.from_error(mmd, 0.01), torch.zeros(4), mmd, 0.5e-4)
        stored = {DISCREPANCY: discrepancy_to_dict(discrepancy, range(4))}
        add(study, START if mmd == 0.05 else OTHER | {BETA: mmd}, mmd=mmd, recall=recall, **stored)


def below_floor(study):
    add(study, START, mmd=0.03, ssim=0.9)
    add(study, mmd=0.0123, ssim=0.8)
    add(study, OTHER | {BETA: 0.5}, mmd=0.025, ssim=0.9)


def no_reference(study):
    add(study, START, state=TrialState.PRUNED, reason="kl not finite at step 3 (phase one)", nonfinite_step="3")
    add(study, mmd=0.0123)


def unsuccessful(study):
    for step in (3, 44):
        reason = f"[red]kl[/red] not finite at step {step}"
        add(study, state=TrialState.PRUNED, reason=reason, nonfinite_step=str(step))
    add(study, state=TrialState.PRUNED, reason="worse than other trials'")
    add(study, {}, state=TrialState.FAIL, reason="out of memory")
    add(study, state=TrialState.RUNNING)


def many_reasons(study):
    for letter in "abcdefg":
        add(study, state=TrialState.FAIL, reason=f"reason {letter}" + "x" * 300)


@pytest.mark.parametrize(
    ("fill", "present", "absent"),
    [
        pytest.param(lambda study: None, ["0 trials", "No trial has completed"], ["is the best"], id="no trial"),
        pytest.param(
            lambda study: [add(study, START, mmd=0.02), add(study, mmd=0.03)],
            ["2 complete", "The values of params.yaml are still the best"],
            ["pruned"],
            id="start",
        ),
        pytest.param(
            better,
            ["Trial 1 is the best.", RATE, "0.002", "0.001", "false", "true", "0.03", "0.0123", "0.91", "0.0125"],
            ["still the best", "below", "not complete"],
            id="better",
        ),
        pytest.param(
            tied,
            [
                "Trial 2 is the best. 2 trials have the lowest MMD within one standard error; of them it has the "
                "highest recall.",
                "0.029",
                "0.7",
            ],
            ["trial 1", "trial 3"],
            id="tied",
        ),
        pytest.param(
            below_floor,
            ["3 complete (1 below the SSIM floor of 0.9)", "Trial 2 is the best."],
            ["0.0123"],
            id="better below the floor only",
        ),
        pytest.param(
            no_reference,
            ["Trial 1 is the best. Trial 0, the reference, is not complete (pruned)"],
            [],
            id="no reference",
        ),
        pytest.param(
            unsuccessful,
            [
                "5 trials: 3 pruned (2 for values that are not finite), 1 failed, 1 running",
                "No trial has completed",
                "2 × pruned: [red]kl[/red] not finite at step 44 (for example trial 1)",
                "1 × pruned: worse than other trials' (trial 2)",
                "1 × failed: out of memory (trial 3)",
            ],
            ["at step 3", "still the best"],
            id="pruned and failed",
        ),
        pytest.param(many_reasons, ["reason e", "and 2 more reasons", "…"], ["reason f", "x" * 250], id="many reasons"),
    ],
)
def test_summary(fill, present, absent, build, capsys, monkeypatch):
    monkeypatch.setattr(console.OUT, "width", 250)
    study = build()
    fill(study)
    print_summary(study, ROOT / "params.yaml")
    printed = capsys.readouterr().out
    assert [words for words in present if words not in printed] == []
    assert [words for words in absent if words in printed] == []


def test_summary_when_no_trial_reaches_the_floor(build, capsys):
    study = build(params=load(ROOT / "params.yaml", ["tune.ssim_floor=0.95"]))
    add(study, START, ssim=0.8)
    add(study, ssim=0.9)
    print_summary(study, ROOT / "params.yaml")
    printed = " ".join(capsys.readouterr().out.split())
    assert "No trial reaches the SSIM floor of 0.95; the closest, trial 1, has 0.9." in printed


def test_summary_after_the_values_were_applied(build, capsys):
    study = build()
    better(study)
    now = {key: Dimension(key, dimension.distribution, OTHER[key]) for key, dimension in SMALL.items()}
    print_summary(build(now), ROOT / "params.yaml")
    printed = capsys.readouterr().out
    assert "Trial 1 is the best, and params.yaml has its values." in printed
    assert "former params.yaml" in printed


def test_summary_of_two_objectives_shows_the_front(build, capsys, monkeypatch):
    monkeypatch.setattr(console.OUT, "width", 80)
    study = build(name="pareto")
    for mmd, ssim in ((0.04, 0.8), (0.05, 0.95), (0.02, 0.85), (0.01, 0.7), (0.045, 0.79)):
        add(study, mmd=mmd, ssim=ssim)
    print_summary(study, ROOT / "params.yaml")
    printed = capsys.readouterr().out
    chosen = "Trial 2 has the lowest MMD of the trials that reconstruct at least as well as trial 0."
    assert chosen in " ".join(printed.split())
    front = printed.partition("┃ val")[0].partition("front")[2]
    assert [number for number in range(5) if f"trial {number} " in front] == [1, 2, 3]
    assert front.index("trial 1") < front.index("trial 2 *") < front.index("trial 3")
    assert max(map(len, printed.splitlines())) <= 80
