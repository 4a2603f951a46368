"""Claims of trials with exact counts although processes die, on a journal file and on PostgreSQL; ranking."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier

import optuna
import pytest
import torch
from optuna.trial import TrialState

from medgen.config import Params, Phase, Project, Searched, Train, Tune
from medgen.errors import UserError
from medgen.metrics.intervals import Interval
from medgen.metrics.mmd import Discrepancy
from medgen.tune.objective import choose_objective
from medgen.tune.space import build_space
from medgen.tune.storage import JournalStorage, open_storage, storage_errors
from medgen.tune.study import DISCREPANCY, Claim, Study, build_pruner, discrepancy_to_dict, study_name, trial_name

SPACE = {
    "train.phases.one.learning_rate": Searched(low=1e-4, high=1e-2, log=True),
    "train.batch_size": Searched(low=8, high=64),
}
PARAMS = Params(train=Train(phases=(Phase(name="one", epochs=2, learning_rate=1e-3),)), tune=Tune(space=SPACE))
START = {"train.phases.one.learning_rate": 1e-3, "train.batch_size": 32}
BEFORE = datetime.now() - timedelta(days=1)


def objective_of(params):
    return choose_objective(params.tune.objective, "image", 64, params.evaluate)


def open_study(root, params=PARAMS, storage="optuna.journal", name="name"):
    opened = open_storage(Project(root), storage)
    return Study(opened, name, params, build_space(params), objective_of(params))


def with_tune(**values):
    return PARAMS.model_copy(update={"tune": PARAMS.tune.model_copy(update=values)})


def name_of(params, data="data"):
    return study_name(params, build_space(params), objective_of(params), data, "extractor")


@pytest.fixture(scope="module")
def plain_name():
    return name_of(PARAMS)


def finish(study, claim, mmd=1.0, ssim=0.5, recall=0.5, discrepancy=None):
    metrics = {"reconstruction/ssim": ssim, "generation/mmd_domain": mmd, "generation/recall": recall}
    claim.trial.set_user_attr("metrics", metrics)
    if discrepancy is not None:
        claim.trial.set_user_attr(DISCREPANCY, discrepancy)
    study.tell(claim, TrialState.COMPLETE, [mmd])


def fail(study, claim, reason):
    claim.trial.set_user_attr("reason", reason)
    study.tell(claim, TrialState.FAIL)


@pytest.fixture(params=["journal", "postgres"])
def opened(request, tmp_path):
    """A function that opens the study as another process does."""
    storage = "optuna.journal" if request.param == "journal" else request.getfixturevalue("postgres")()
    return lambda params=PARAMS, name="name": open_study(tmp_path, params, storage, name)


def test_trial_0_has_the_values_of_params_and_others_wait_for_its_floor(opened):
    one, two = opened(), opened()
    first = one.claim(3, BEFORE)
    assert isinstance(first, Claim) and first.values == START and first.ssim_floor is None
    assert two.claim(3, BEFORE) == "wait"
    finish(one, first, ssim=0.7)
    second = two.claim(3, BEFORE)
    assert (second.trial.number, second.ssim_floor) == (1, 0.7)


@pytest.mark.parametrize("objective", ["reconstruction/ssim", "pareto"])
def test_no_waiting_for_objectives_without_a_floor(tmp_path, objective):
    one, two = (open_study(tmp_path, with_tune(objective=objective)) for _ in range(2))
    claims = [one.claim(3, BEFORE), two.claim(3, BEFORE)]
    assert [claim.ssim_floor for claim in claims] == [None, None]


def test_processes_together_claim_the_wanted_number_of_trials(opened):
    studies = [opened() for _ in range(3)]
    finish(studies[0], studies[0].claim(5, BEFORE))
    claims = [studies[turn % 3].claim(5, BEFORE) for turn in range(6)]
    assert [claim.trial.number for claim in claims[:4]] == [1, 2, 3, 4]
    assert claims[4:] == ["wait", "wait"]  # others run the last trials, and may be killed
    for turn, claim in enumerate(claims[:4]):
        finish(studies[turn % 3], claim)
    assert studies[0].claim(5, BEFORE) is None
    assert studies[0].claim(6, BEFORE).trial.number == 5  # more trials: the study continues


def test_the_trial_of_a_dead_process_is_claimed_with_its_number_and_values(opened):
    one, two = opened(), opened()
    finish(one, one.claim(3, BEFORE))
    left = one.claim(3, BEFORE)
    left.release()  # as the kernel or the database does when the process dies
    taken = two.claim(3, BEFORE)
    assert (taken.trial.number, taken.values, taken.attempt) == (1, left.values, 2)
    third = two.claim(3, BEFORE)
    assert third.trial.number == 2


def test_a_trial_whose_process_died_before_it_had_values_is_claimed(opened):
    study = opened()
    study.optuna.ask()  # no values are suggested
    claim = study.claim(1, BEFORE)
    assert claim.trial.number == 0 and set(claim.values) == set(SPACE)


def test_a_trial_can_be_ended_only_once(opened):
    one, two = opened(), opened()
    claim = one.claim(1, BEFORE)
    claim.release()
    again = two.claim(1, BEFORE)
    finish(two, again, mmd=1.0)
    one.tell(claim, TrialState.COMPLETE, [2.0])
    assert [trial.values for trial in one.trials] == [[1.0]]


def test_an_interrupted_search_suggests_the_same_values(tmp_path):
    drawn = []
    for folder, reopens in (("uninterrupted", False), ("interrupted", True)):
        study, values = open_study(tmp_path / folder), []
        for number in range(14):  # the last ones are not random but suggested by the fitted sampler
            study = open_study(tmp_path / folder) if reopens else study
            claim = study.claim(14, BEFORE)
            values.append(claim.values)
            finish(study, claim, mmd=claim.values["train.phases.one.learning_rate"] * number)
        drawn.append(values)
    assert drawn[0] == drawn[1]
    assert len({tuple(values.values()) for values in drawn[0]}) == 14


@pytest.mark.parametrize(
    ("reasons", "stops"),
    [
        (["out of memory: 3 GiB", "out of memory: 4 GiB", "out of memory: 5 GiB"], True),
        (["out of memory: 3 GiB", "x.png: damaged", "out of memory: 5 GiB"], False),
        (["out of memory: 3 GiB", "out of memory: 4 GiB"], False),
        (["out of memory: 3 GiB", None, "out of memory: 4 GiB", "out of memory: 5 GiB"], False),
    ],
)
def test_three_equal_failures_in_a_row_stop_the_search(tmp_path, reasons, stops):
    study = open_study(tmp_path, with_tune(ssim_floor=0.1))
    for reason in reasons:
        claim = study.claim(9, BEFORE)
        finish(study, claim) if reason is None else fail(study, claim, reason)
    if not stops:
        assert isinstance(study.claim(9, BEFORE), Claim)
        return
    with pytest.raises(UserError, match="the last 3 trials failed for the same reason: out of memory: 5 GiB"):
        study.claim(9, BEFORE)
    assert isinstance(study.claim(9, datetime.now()), Claim)  # the same command again, after a fix


def test_the_winner_reaches_the_floor(tmp_path):
    study = open_study(tmp_path)
    for mmd, ssim in ((3.0, 0.7), (1.0, 0.6), (2.0, 0.8)):
        finish(study, study.claim(3, BEFORE), mmd, ssim)
    assert study.winner().number == 2
    assert [trial.number for trial in study.ranked()] == [2, 0]


def discrepancy(mmd, to_samples=(0.0,) * 4, patients=(0, 1, 2, 3), variance=0.5e-4):
    """A stored MMD; with equal `to_samples` the standard error of a difference is 0.01."""
    among = mmd + 2 * sum(to_samples) / len(to_samples)
    return discrepancy_to_dict(
        Discrepancy(Interval.from_error(mmd, 0.01), torch.tensor(to_samples), among, variance), patients
    )


WAVE = (0.0, 0.4, 0.0, 0.4)


@pytest.mark.parametrize(
    ("trials", "order"),
    [
        pytest.param([(0.100, 0.5, 0.7), (0.109, 0.6, 0.7)], [1, 0], id="tied: higher recall"),
        pytest.param([(0.100, 0.5, 0.7), (0.111, 0.6, 0.7)], [0, 1], id="more than one standard error away"),
        pytest.param([(0.100, 0.5, 0.7), (0.109, 0.5, 0.8)], [1, 0], id="tied and equal recall: higher SSIM"),
        pytest.param([(0.109, 0.5, 0.7), (0.100, 0.5, 0.7)], [1, 0], id="tied in all: lower MMD"),
        pytest.param([(0.118, 0.9, 0.9), (0.109, 0.6, 0.7), (0.1, 0.5, 0.7)], [1, 2, 0], id="tied with the best only"),
        pytest.param([(0.100, 0.5, 0.7), (0.101, 0.9, 0.05)], [0], id="below the floor"),
        pytest.param([(0.100, 0.5, 0.7, None), (0.101, 0.9, 0.7)], [0, 1], id="the best has no record: no ties"),
        pytest.param([(0.100, 0.5, 0.7), (0.101, 0.9, 0.7, None)], [0, 1], id="the other has no record: no tie"),
        pytest.param([(0.1, 0.5, 0.7, WAVE), (0.2, 0.6, 0.7)], [1, 0], id="the val images differ widely between them"),
    ],
)
def test_trials_within_one_paired_standard_error_are_tied(tmp_path, trials, order):
    study = open_study(tmp_path, with_tune(ssim_floor=0.1))
    for mmd, recall, ssim, *record in trials:
        to_samples = record[0] if record else (0.0,) * 4
        stored = None if to_samples is None else discrepancy(mmd, to_samples)
        finish(study, study.claim(9, BEFORE), mmd, ssim, recall, stored)
    assert [trial.number for trial in study.ranked()] == order
    assert study.winner().number == order[0]


def test_the_standard_error_is_computed_by_patient(tmp_path):
    """Within each patient the differences of the two models cancel, so that only the sampling variance is left."""
    study = open_study(tmp_path, with_tune(ssim_floor=0.1))
    for mmd, recall, to_samples in ((0.1, 0.5, WAVE), (0.111, 0.9, (0.0,) * 4), (0.109, 0.6, (0.0,) * 4)):
        finish(study, study.claim(9, BEFORE), mmd, 0.7, recall, discrepancy(mmd, to_samples, (7, 7, 9, 9)))
    assert [trial.number for trial in study.ranked()] == [2, 0, 1]


def test_other_objectives_have_no_ties(tmp_path):
    study = open_study(tmp_path, with_tune(objective="generation/kid_domain", ssim_floor=0.1))
    for mmd, recall in ((0.100, 0.5), (0.101, 0.9)):
        finish(study, study.claim(9, BEFORE), mmd, 0.7, recall, discrepancy(mmd))
    assert [trial.number for trial in study.ranked()] == [0, 1]


def test_a_confirmation_has_trial_0_and_the_best_trials_once(opened):
    search = opened()
    for mmd, ssim in ((3.0, 0.7), (1.0, 0.6), (2.0, 0.8), (2.5, 0.7), (1.5, 0.9)):
        finish(search, search.claim(5, BEFORE), mmd, ssim)
    one, two = opened(name="name-full"), opened(name="name-full")
    one.enqueue_best(search, 1)
    first = one.claim(0, BEFORE)
    two.enqueue_best(search, 2)  # another machine, with one trial more
    second, third = two.claim(0, BEFORE), one.claim(0, BEFORE)  # they do not wait for the floor of trial 0
    claims = [first, second, third]
    assert [trial_name(claim.trial) for claim in claims] == ["trial 0 in full", "trial 4 in full", "trial 2 in full"]
    assert [claim.values for claim in claims] == [search.values_of(search.trials[number]) for number in (0, 4, 2)]
    assert two.claim(0, BEFORE) == "wait" and one.parent == search.record
    third.release()  # its process was killed
    again = two.claim(0, BEFORE)
    assert (trial_name(again.trial), again.attempt) == ("trial 2 in full", 2)
    for claim, mmd in ((first, 0.9), (second, 0.5)):
        finish(one, claim, mmd)
    assert one.winner() is None  # one trial has not ended
    finish(two, again, 0.4)
    assert trial_name(one.winner()) == "trial 2 in full"
    one.enqueue_best(search, 2)
    assert one.claim(0, BEFORE) is None  # no trial twice
    assert len(search.trials) == 5


def test_the_winner_of_a_front_reconstructs_at_least_as_well_as_trial_0(tmp_path):
    study = open_study(tmp_path, with_tune(objective="pareto"))
    for mmd, ssim in ((3.0, 0.7), (1.0, 0.6), (2.0, 0.8)):
        claim = study.claim(3, BEFORE)
        claim.trial.set_user_attr("metrics", {})
        study.tell(claim, TrialState.COMPLETE, [1 - ssim, mmd])
    assert study.winner().number == 2
    assert {trial.number for trial in study.optuna.best_trials} == {1, 2}


def test_there_is_no_floor_if_trial_0_is_not_complete(tmp_path):
    study = open_study(tmp_path)
    first = study.claim(2, BEFORE)
    study.tell(first, TrialState.PRUNED)
    claim = study.claim(2, BEFORE)
    assert claim.ssim_floor is None
    finish(study, claim)
    assert study.winner().number == 1


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({}, True),
        ({"train": {"batch_size": 16}}, True),  # searched: the value of params.yaml does not count
        ({"train": {"device": "cpu"}}, True),
        ({"train": {"clip_norm": 0.5}}, False),
        ({"loss": {"free_bits": 0.1}}, False),
        ({"tune": {"trial": {"epochs": 1}}}, False),
        ({"tune": {"objective": "reconstruction/ssim"}}, False),
        ({"tune": {"ssim_floor": 0.5}}, False),
        ({"tune": {"pruner": "none"}}, True),
        ({"evaluate": {"save_images": True}}, True),
        ({"evaluate": {"num_generated": 77}}, True),  # tune.trial sets the number of samples
        ({"evaluate": {"seed": 1}}, False),
        ({"prior": {"name": "normal"}}, False),
        ({"refiner": {"enabled": True}}, False),
        ({"tracking": {"experiment": "other"}}, True),
    ],
)
def test_study_name_changes_if_trials_are_not_comparable(plain_name, values, same):
    plain = PARAMS.model_dump(mode="json")
    for section, keys in values.items():
        plain[section] |= keys
    changed = Params.model_validate(plain)
    assert (name_of(changed) == plain_name) == same


def test_study_name_changes_with_the_data(plain_name):
    assert name_of(PARAMS, "other data") != plain_name


def test_an_incomplete_last_line_of_the_journal_is_removed(tmp_path):
    study = open_study(tmp_path)
    finish(study, study.claim(2, BEFORE))
    with (tmp_path / "optuna.journal").open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')  # a kill or a power cut
    again = open_study(tmp_path)
    finish(again, again.claim(2, BEFORE))
    assert [trial.state.name for trial in open_study(tmp_path).trials] == ["COMPLETE", "COMPLETE"]


def test_processes_can_open_an_empty_database_at_once(postgres, tmp_path):
    url, gate = postgres(), Barrier(4)

    def open_one(_):
        gate.wait()
        return open_study(tmp_path, storage=url).name

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(open_one, range(4))) == ["name"] * 4


def test_the_error_for_an_unreachable_database_hides_the_password(tmp_path):
    url = "postgresql://medgen:hunter2@127.0.0.1:1/studies"
    pytest.importorskip("psycopg")
    with pytest.raises(UserError, match="does not answer") as error, storage_errors(url):
        open_storage(Project(tmp_path), url)
    assert "hunter2" not in str(error.value) and "127.0.0.1" in str(error.value)


def test_study_name_with_the_default_space_stays_the_same_after_apply():
    names = set()
    for rate in (5e-5, 1e-3):  # outside the default range, then the winner's
        params = PARAMS.model_copy(update={"tune": Tune()})
        phase = params.train.phases[0].model_copy(update={"learning_rate": rate})
        params = params.model_copy(update={"train": params.train.model_copy(update={"phases": (phase,)})})
        names.add(name_of(params))
    assert len(names) == 1


@pytest.mark.parametrize("content", [b"{}", b"precious", b'{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_not_changed(tmp_path, content):
    (tmp_path / "optuna.journal").write_bytes(content)
    with pytest.raises(UserError, match="is not a journal of Optuna"):
        open_storage(Project(tmp_path), "optuna.journal")
    assert (tmp_path / "optuna.journal").read_bytes() == content


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("sqlite:///studies.db", "sqlite:// is not supported; expected a journal file"),
        ("", "cannot be a journal file"),
        ("optuna.journal/below", "cannot be a journal file"),
        ("postgresql://host:port/name", "tune.storage: "),
        ("postgresql+nothing://host/name", "tune.storage: "),
    ],
)
def test_an_invalid_storage_is_refused(tmp_path, storage, message):
    (tmp_path / "optuna.journal").touch()
    with pytest.raises(UserError, match=message):
        open_storage(Project(tmp_path), storage)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("median", optuna.pruners.MedianPruner),
        ("hyperband", optuna.pruners.HyperbandPruner),
        ("none", optuna.pruners.NopPruner),
    ],
)
def test_pruners_by_name(tmp_path, name, kind):
    assert isinstance(build_pruner(name, 9), kind)
    study = open_study(tmp_path, with_tune(pruner=name))
    claim = study.claim(1, BEFORE)
    claim.trial.report(1.0, 1)
    assert claim.trial.should_prune() is False


def test_optuna_can_open_the_journal(tmp_path):
    study = open_study(tmp_path)
    finish(study, study.claim(1, BEFORE))
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
    shown = optuna.load_study(study_name="name", storage=optuna.storages.JournalStorage(backend))
    assert shown.best_trial.params == START
    assert JournalStorage(tmp_path / "optuna.journal").try_lock("name-0") is not None
