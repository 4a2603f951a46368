"""What a search leaves behind: figures, best.yaml, params.yaml with its values, the summary."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image
from ruamel.yaml import YAML

from medgen import tune
from medgen.config import Params, Searched, load, replace
from medgen.errors import UserError
from medgen.metrics.intervals import Interval
from medgen.metrics.mmd import Discrepancy
from medgen.tune.objective import MMD, RECALL, SSIM, choose_objective
from medgen.tune.params_file import apply_best, write_best
from medgen.tune.pictures import Board, write_figures
from medgen.tune.report import describe, print_summary
from medgen.tune.space import Dimension, build_space
from medgen.tune.storage import JournalStorage
from medgen.tune.study import DISCREPANCY, Study, packed

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]
RATE, FLIP, BETA = "train.phases.0.learning_rate", "train.horizontal_flip", "train.phases.1.beta.end"
SMALL = {
    RATE: Dimension(RATE, Searched(low=1e-4, high=1e-2, log=True), 2e-3),
    FLIP: Dimension(FLIP, Searched(choices=(True, False)), False),
    BETA: Dimension(BETA, Searched(low=0.0, high=1.0), 0.1),
}
START = {key: dimension.start for key, dimension in SMALL.items()}
OTHER = START | {RATE: 1e-3, FLIP: True}

Build = Callable[..., Study]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Makes a study of a space; `keys` of the objective as tune.objective says it."""

    def make(
        space: dict[str, Dimension] = SMALL,
        name: str | None = None,
        params: Params | None = None,
        target: str = "image",
    ) -> Study:
        params = params or load(ROOT / "params.yaml")
        objective = choose_objective(name, target, 64, params.evaluate)
        return Study(JournalStorage(tmp_path / "optuna.journal"), "vae-123456", params, space, objective, 10)

    return make


def add(
    study: Study,
    values: Mapping[str, Any] = OTHER,
    mmd: float = 0.02,
    ssim: float = 0.9,
    state: TrialState = TrialState.COMPLETE,
    recall: float = 0.5,
    **attributes: Any,
) -> FrozenTrial:
    """A trial that ended, or runs, as the worker writes it down."""
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


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def other(dimension: Dimension) -> float:
    """A value that the dimension may take, and params.yaml has not."""
    low, high = dimension.values.low, dimension.values.high
    assert low is not None and high is not None
    return low if dimension.start != low else high


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_only_values_change_in_a_params_file(file: Path, tmp_path: Path, build: Build) -> None:
    params = load(file)
    space = build_space(params)
    space.pop("prior.variance_kept", None)  # a default, which needs a new line: test_a_value_finds_its_place
    study = build(space, params=params, name=SSIM if params.model.name != "unet" else None, target=target_of(params))
    values = {key: other(dimension) for key, dimension in space.items()}
    trial = create_trial(values=[0.5], params=values, distributions={k: d.distribution for k, d in space.items()})
    copy = tmp_path / "params.yaml"
    copy.write_bytes(file.read_bytes())

    assert apply_best(study, trial, copy)
    assert load(copy) == replace(params, values, "test")
    before, after = lines(file.read_text()), lines(copy.read_text())
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert 0 < len(changed) <= len(values)
    # what stands around the numbers is the same: keys, comments, alignment, braces
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in changed)
    assert all(old.partition(":")[0] == new.partition(":")[0] for old, new in changed)

    written = copy.read_bytes()
    assert not apply_best(study, trial, copy)
    assert copy.read_bytes() == written

    best = write_best(study, trial, file, tmp_path / "tune")
    assert load(best) == load(copy)
    assert best.read_text().endswith(copy.read_text())


def target_of(params: Params) -> str:
    return "mask" if params.model.name == "unet" else "image"


DROPOUT = Dimension("prior.dropout", Searched(low=0.0, high=0.9), 0.1)
RULE = Dimension("prior.solver", Searched(choices=("euler", "midpoint")), "midpoint")
DECAY = Dimension("train.phases.0.weight_decay", Searched(low=1e-9, high=1.0, log=True), 1e-5)
RAMP = Dimension("train.phases.0.beta.end", Searched(low=0.0, high=1.0), 0.0)
PHASE = "train:\n  phases:\n"


@pytest.mark.parametrize(
    ("dimension", "value", "before", "after"),
    [
        pytest.param(
            DROPOUT,
            0.25,
            "prior:\n  name: flow   # a network\n\n# how it is judged\nevaluate: {}\n",
            "prior:\n  name: flow   # a network\n  dropout: 0.25\n\n# how it is judged\nevaluate: {}\n",
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
            PHASE + "  - name: a\n    weight_decay: 1e-3\n    epochs: 3\n",
            PHASE + "  - name: a\n    weight_decay: 1.5e-5\n    epochs: 3\n",
            id="small number, another indentation",
        ),
        pytest.param(
            DECAY,
            1e-6,
            PHASE + "      - {name: a,  epochs: 3}\n\nprior: {}\n",
            PHASE + "      - {name: a,  epochs: 3, weight_decay: 1e-6}\n\nprior: {}\n",
            id="missing in a list's braces",
        ),
        pytest.param(
            RAMP,
            0.5,
            PHASE + "    - name: a\n      epochs: 3 # short\n    - {name: b, epochs: 1}\n",
            PHASE + "    - name: a\n      epochs: 3 # short\n      beta: {end: 0.5}\n    - {name: b, epochs: 1}\n",
            id="missing section in a list",
        ),
        pytest.param(
            SMALL[FLIP],
            True,
            PHASE + "    - name: a\n      epochs: 3 # short\n\n# what draws\nprior: {}\n",
            PHASE + "    - name: a\n      epochs: 3 # short\n  horizontal_flip: true\n\n# what draws\nprior: {}\n",
            id="missing after a list",
        ),
    ],
)
def test_a_value_finds_its_place(
    dimension: Dimension, value: Any, before: str, after: str, tmp_path: Path, build: Build
) -> None:
    study, file = build({dimension.key: dimension}), tmp_path / "params.yaml"
    file.write_bytes(before.encode())
    assert apply_best(study, add(study, {dimension.key: value}), file)
    assert file.read_bytes().decode() == after
    node = YAML(typ="safe", pure=True).load(after)
    for part in dimension.key.split("."):
        node = node[int(part) if isinstance(node, list) else part]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize("before", ["prior: {dropout: 1.0e-1}\n", "prior:\n  name: gmm\n"], ids=["written", "default"])
def test_a_value_that_is_there_stays_as_it_is_written(before: str, tmp_path: Path, build: Build) -> None:
    study, file = build({DROPOUT.key: DROPOUT}), tmp_path / "params.yaml"
    file.write_text(before)
    assert not apply_best(study, add(study, {DROPOUT.key: 0.1}), file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param(
            "train:\n  phases:\n    - {name: a, epochs: 1, learning_rate: &rate 2e-3}\n"
            "    - {name: b, epochs: 1, learning_rate: *rate, beta: {end: 0.1}}\n",
            "anchors or aliases.*learning_rate: 0.001",
            id="a value that another place takes over",
        ),
        pytest.param(
            "train:\n  phases:\n    - {name: a, epochs: 1, beta: &ramp {end: 0.1}}\n"
            "    - {name: b, epochs: 1, beta: *ramp}\n",
            "anchors or aliases.*beta.end: 0.5",
            id="a section that two places share",
        ),
        pytest.param("train: {phases: [{name: a, epochs: 1}], batch: 3}", "unknown key", id="no params file"),
        pytest.param("train: {phases: [{name: a, epochs: 1}]}", "'1' is no index", id="no such phase"),
    ],
)
def test_what_cannot_be_written_is_said(text: str, told: str, tmp_path: Path, build: Build) -> None:
    study, file = build(), tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=told):
        apply_best(study, add(study, OTHER | {BETA: 0.5}), file)
    assert file.read_text() == text


def test_best_says_where_it_is_from(tmp_path: Path, build: Build) -> None:
    study = build()
    add(study, START)
    best = write_best(study, add(study, mmd=0.0123, ssim=0.912), ROOT / "params.yaml", tmp_path / "tune")
    assert best == tmp_path / "tune" / "best.yaml"
    head = [line for line in best.read_text().partition("# The sample project")[0].splitlines()]
    assert head and all(line.startswith("#") for line in head)
    for words in ("vae-123456: trial 1, best of 2", f"{MMD} 0.0123", f"{SSIM} 0.912", "`medgen tune --apply`"):
        assert words in "\n".join(head)


def search(build: Build, name: str | None = None, far: bool = False) -> Study:
    """Trials of every kind."""
    study = build(name=name)
    add(study, START, mmd=0.03, ssim=0.85)
    for number in range(8):
        values = START | {RATE: 1e-4 * 1.5**number, FLIP: number % 2 == 0, BETA: number / 8}
        add(study, values, mmd=99.0 if far and number == 3 else 0.04 - 0.002 * number, ssim=0.84 + 0.01 * (number % 4))
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
def test_figures(name: str, expected: list[str], tmp_path: Path, build: Build) -> None:
    study, folder, style = search(build, name), tmp_path / "tune", dict(mpl.rcParams)
    folder.mkdir()
    for stale in ("history.png", "front.png"):
        (folder / stale).write_bytes(b"of an earlier search")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna's would reach the user
        written = write_figures(study, folder, study.winner())
    assert [path.name for path in written] == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    for path in written:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.min() < 64 and 0.01 < (pixels < 250).mean() < 0.5, path.name  # ink, mostly paper
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edges == 255).all(), f"{path.name}: something is cut off"
    assert dict(mpl.rcParams) == style


def test_the_same_trials_give_the_same_bytes(tmp_path: Path, build: Build) -> None:
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
def test_what_cannot_be_drawn_yet_is_absent(
    mmds: Sequence[float], expected: list[str], tmp_path: Path, build: Build
) -> None:
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
def test_a_trial_that_went_far_wrong_does_not_flatten_the_others(name: str, build: Build) -> None:
    study = search(build, name, far=True)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    board = Board(study, study.trials, complete, [], study.winner())
    scale = board.scale(len(study.objective.keys) - 1)
    wrong = max(complete, key=lambda trial: trial.values[-1])
    assert wrong.values[-1] == 99.0 and scale.place(wrong) == scale.worst < 0.1 and scale.is_beyond(wrong)
    others = [trial for trial in complete if trial != wrong]
    assert all(scale.place(trial) == trial.values[-1] and not scale.is_beyond(trial) for trial in others)


def test_everything_names_the_same_winner_of_tied_trials(build: Build, tmp_path: Path) -> None:
    study = build()
    tied(study)
    best = study.winner()
    assert best is not None and best.number == 2
    assert "best 0.029 (trial 2)" in tune.state_of(study)
    assert "best 0.029 (trial 2)" in tune.line_of(study, study.trials[3])
    assert ": trial 2, best of 4" in write_best(study, best, ROOT / "params.yaml", tmp_path).read_text()


def test_rows_hold_both_values(build: Build) -> None:
    study = build()
    assert describe(study, add(study)) == [(RATE, "0.002", "0.001"), (FLIP, "false", "true"), (BETA, "0.1", "0.1")]


Fill = Callable[[Study], object]


def still_best(study: Study) -> None:
    add(study, START, mmd=0.02)
    add(study, mmd=0.03)


def better(study: Study) -> None:
    add(study, START, mmd=0.03)
    add(study, mmd=0.0123, ssim=0.91)


def tied(study: Study) -> None:
    """Standard error 0.01, of the samples alone."""
    for mmd, recall in ((0.05, 0.6), (0.02, 0.5), (0.029, 0.7), (0.031, 0.9)):
        found = Discrepancy(Interval.of(mmd, 0.01), torch.zeros(4), mmd, 0.5e-4)
        values = OTHER | {BETA: mmd}
        add(study, START if mmd == 0.05 else values, mmd=mmd, recall=recall, **{DISCREPANCY: packed(found, range(4))})


def below_floor(study: Study) -> None:
    add(study, START, mmd=0.03, ssim=0.9)
    add(study, mmd=0.0123, ssim=0.8)
    add(study, OTHER | {BETA: 0.5}, mmd=0.025, ssim=0.9)


def no_reference(study: Study) -> None:
    add(study, START, state=TrialState.PRUNED, reason="kl not finite at step 3 (phase one)", nonfinite_step="3")
    add(study, mmd=0.0123)


def given_up(study: Study) -> None:
    for step in (3, 44):
        reason = f"[red]kl[/red] not finite at step {step}"
        add(study, state=TrialState.PRUNED, reason=reason, nonfinite_step=str(step))
    add(study, state=TrialState.PRUNED, reason="worse than other trials'")
    add(study, {}, state=TrialState.FAIL, reason="out of memory")
    add(study, state=TrialState.RUNNING)


def many_reasons(study: Study) -> None:
    for letter in "abcdefg":
        add(study, state=TrialState.FAIL, reason=f"reason {letter}" + "x" * 300)


@pytest.mark.parametrize(
    ("fill", "said", "unsaid"),
    [
        pytest.param(lambda study: None, ["0 trials", "No trial has completed"], ["is the best"], id="no trial"),
        pytest.param(still_best, ["2 complete", "params.yaml's own values are still the best"], ["pruned"], id="start"),
        pytest.param(
            better,
            ["Trial 1 is the best.", RATE, "0.002", "0.001", "0.03", "0.0123", "0.91", "0.0125"],
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
            given_up,
            [
                "5 trials: 3 pruned (2 for values that are not finite), 1 failed, 1 running",
                "No trial has completed",
                "2 × pruned: [red]kl[/red] not finite at step 44 (trial 1, for one)",
                "1 × pruned: worse than other trials' (trial 2)",
                "1 × failed: out of memory (trial 3)",
            ],
            ["at step 3", "still the best"],
            id="given up",
        ),
        pytest.param(many_reasons, ["reason e", "and 2 more reasons", "…"], ["reason f", "x" * 250], id="many reasons"),
    ],
)
def test_summary(
    fill: Fill,
    said: list[str],
    unsaid: list[str],
    build: Build,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    study = build()
    fill(study)
    print_summary(study, None)
    printed = capsys.readouterr().out
    assert [words for words in said if words not in printed] == []
    assert [words for words in unsaid if words in printed] == []


def test_summary_when_none_holds_the_floor(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    study = build(params=load(ROOT / "params.yaml", ["tune.ssim_floor=0.95"]))
    add(study, START, ssim=0.8)
    add(study, ssim=0.9)
    print_summary(study, ROOT / "params.yaml")
    printed = " ".join(capsys.readouterr().out.split())
    assert "No trial holds the SSIM floor of 0.95; the nearest, trial 1, reached 0.9." in printed


def test_summary_after_the_values_were_applied(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    study = build()
    better(study)
    now = {key: Dimension(key, dimension.values, OTHER[key]) for key, dimension in SMALL.items()}
    print_summary(build(now), ROOT / "params.yaml")
    printed = capsys.readouterr().out
    assert "Trial 1 is the best, and params.yaml has its values." in printed
    assert "params.yaml as it was" in printed


def test_summary_of_two_objectives_shows_the_front(
    build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    study = build(name="pareto")
    for mmd, ssim in ((0.04, 0.8), (0.05, 0.95), (0.02, 0.85), (0.01, 0.7), (0.045, 0.79)):
        add(study, mmd=mmd, ssim=ssim)
    print_summary(study, ROOT / "params.yaml")
    printed = capsys.readouterr().out
    front = printed.partition("┃ val")[0].partition("front")[2]
    assert [number for number in range(5) if f"trial {number} " in front] == [1, 2, 3]
    assert front.index("trial 1") < front.index("trial 2 *") < front.index("trial 3")
    assert "Trial 2 has the lowest MMD of those that reconstruct no worse." in printed
    assert max(map(len, printed.splitlines())) <= 80
