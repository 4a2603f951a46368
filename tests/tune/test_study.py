"""Which trial is next, and whose: exact counts whoever dies, on a file and on PostgreSQL alike."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier

import optuna
import pytest
from optuna.trial import TrialState

from medgen.config import Params, Phase, Project, Searched, Train, Tune
from medgen.errors import UserError
from medgen.tune.objective import choose_objective
from medgen.tune.space import build_space
from medgen.tune.storage import JournalStorage, lost, open_storage
from medgen.tune.study import Claim, Study, build_pruner, study_name

SPACE = {
    "train.phases.0.learning_rate": Searched(low=1e-4, high=1e-2, log=True),
    "train.batch_size": Searched(low=8, high=64),
}
PARAMS = Params(train=Train(phases=(Phase(name="one", epochs=2, learning_rate=1e-3),)), tune=Tune(space=SPACE))
START = {"train.phases.0.learning_rate": 1e-3, "train.batch_size": 32}
BEFORE = datetime.now() - timedelta(days=1)


def objective_of(params):
    return choose_objective(params.tune.objective, "image", 64, params.evaluate)


def open_study(root, params=PARAMS, storage="optuna.journal"):
    return Study(open_storage(Project(root), storage), "name", params, build_space(params), objective_of(params), 2)


def with_tune(**values):
    return PARAMS.model_copy(update={"tune": PARAMS.tune.model_copy(update=values)})


def finish(study, claim, kid=1.0, ssim=0.5):
    claim.trial.set_user_attr("metrics", {"reconstruction/ssim": ssim, "generation/kid_domain": kid})
    study.tell(claim, TrialState.COMPLETE, [kid])


def fail(study, claim, reason):
    claim.trial.set_user_attr("reason", reason)
    study.tell(claim, TrialState.FAIL)


@pytest.fixture(params=["journal", "postgres"])
def opened(request, tmp_path):
    """A function that opens the study as another process would."""
    storage = "optuna.journal" if request.param == "journal" else request.getfixturevalue("postgres")()
    return lambda params=PARAMS: open_study(tmp_path, params, storage)


def test_the_first_trial_is_params_yaml_itself_and_others_wait_for_its_floor(opened):
    one, two = opened(), opened()
    first = one.claim(3, BEFORE)
    assert isinstance(first, Claim) and first.values == START and first.ssim_floor is None
    assert two.claim(3, BEFORE) == "wait"
    finish(one, first, ssim=0.7)
    second = two.claim(3, BEFORE)
    assert (second.trial.number, second.ssim_floor) == (1, 0.7)


@pytest.mark.parametrize("objective", ["reconstruction/ssim", "pareto"])
def test_nobody_waits_where_there_is_no_floor(tmp_path, objective):
    one, two = (open_study(tmp_path, with_tune(objective=objective)) for _ in range(2))
    claims = [one.claim(3, BEFORE), two.claim(3, BEFORE)]
    assert [claim.ssim_floor for claim in claims] == [None, None]


def test_processes_together_claim_as_many_trials_as_are_asked_for(opened):
    studies = [opened() for _ in range(3)]
    finish(studies[0], studies[0].claim(5, BEFORE))
    claims = [studies[turn % 3].claim(5, BEFORE) for turn in range(6)]
    assert [claim.trial.number for claim in claims[:4]] == [1, 2, 3, 4]
    assert claims[4:] == ["wait", "wait"]  # others work on the last ones, and may be killed
    for turn, claim in enumerate(claims[:4]):
        finish(studies[turn % 3], claim)
    assert studies[0].claim(5, BEFORE) is None
    assert studies[0].claim(6, BEFORE).trial.number == 5  # asked for more, it goes on


def test_what_a_dead_process_left_is_taken_up_under_its_number_and_with_its_values(opened):
    one, two = opened(), opened()
    finish(one, one.claim(3, BEFORE))
    left = one.claim(3, BEFORE)
    left.release()  # what the kernel or the database does when the holder dies
    taken = two.claim(3, BEFORE)
    assert (taken.trial.number, taken.values, taken.attempt) == (1, left.values, 2)
    third = two.claim(3, BEFORE)
    assert third.trial.number == 2


def test_a_process_killed_between_asking_and_drawing_leaves_a_trial_that_can_be_drawn(opened):
    study = opened()
    study.optuna.ask()  # and nothing more
    claim = study.claim(1, BEFORE)
    assert claim.trial.number == 0 and set(claim.values) == set(SPACE)


def test_the_first_to_end_a_trial_counts(opened):
    one, two = opened(), opened()
    claim = one.claim(1, BEFORE)
    claim.release()
    again = two.claim(1, BEFORE)
    finish(two, again, kid=1.0)
    one.tell(claim, TrialState.COMPLETE, [2.0])
    assert [trial.values for trial in one.trials] == [[1.0]]


def test_an_interrupted_search_suggests_what_an_unbroken_one_does(tmp_path):
    drawn = []
    for folder, opens_anew in (("unbroken", False), ("interrupted", True)):
        study, values = open_study(tmp_path / folder), []
        for number in range(14):  # some of them drawn by the sampler, not at random
            study = open_study(tmp_path / folder) if opens_anew else study
            claim = study.claim(14, BEFORE)
            values.append(claim.values)
            finish(study, claim, kid=claim.values["train.phases.0.learning_rate"] * number)
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
def test_three_failures_alike_in_a_row_stop_the_search(tmp_path, reasons, stops):
    study = open_study(tmp_path, with_tune(ssim_floor=0.1))
    for reason in reasons:
        claim = study.claim(9, BEFORE)
        finish(study, claim) if reason is None else fail(study, claim, reason)
    if not stops:
        assert isinstance(study.claim(9, BEFORE), Claim)
        return
    with pytest.raises(UserError, match="the last 3 trials failed alike: out of memory: 5 GiB"):
        study.claim(9, BEFORE)
    assert isinstance(study.claim(9, datetime.now()), Claim)  # the same command, after it was mended


def test_the_winner_holds_the_floor(tmp_path):
    study = open_study(tmp_path)
    for kid, ssim in ((3.0, 0.7), (1.0, 0.6), (2.0, 0.8)):
        finish(study, study.claim(3, BEFORE), kid, ssim)
    assert study.winner().number == 2
    assert [trial.number for trial in study.complete()] == [2, 0]


def test_of_a_front_the_winner_costs_no_similarity(tmp_path):
    study = open_study(tmp_path, with_tune(objective="pareto"))
    for kid, ssim in ((3.0, 0.7), (1.0, 0.6), (2.0, 0.8)):
        claim = study.claim(3, BEFORE)
        claim.trial.set_user_attr("metrics", {})
        study.tell(claim, TrialState.COMPLETE, [1 - ssim, kid])
    assert study.winner().number == 2
    assert {trial.number for trial in study.optuna.best_trials} == {1, 2}


def test_without_a_first_trial_to_compare_with_there_is_no_floor(tmp_path):
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
        ({"train": {"batch_size": 16}}, True),  # searched: its own value does not count
        ({"train": {"device": "cpu"}}, True),
        ({"train": {"clip_norm": 0.5}}, False),
        ({"loss": {"free_bits": 0.1}}, False),
        ({"tune": {"trial": {"epochs": 1}}}, False),
        ({"tune": {"objective": "reconstruction/ssim"}}, False),
        ({"tune": {"ssim_floor": 0.5}}, False),
        ({"tune": {"pruner": "none"}}, True),
        ({"evaluate": {"save_images": True}}, True),
        ({"evaluate": {"num_generated": 77}}, True),  # of a trial's samples tune.trial says how many
        ({"evaluate": {"seed": 1}}, False),
        ({"prior": {"name": "normal"}}, False),
        ({"tracking": {"experiment": "other"}}, True),
    ],
)
def test_a_study_is_another_when_its_trials_would_not_compare(values, same):
    plain = PARAMS.model_dump(mode="json")
    for section, keys in values.items():
        plain[section] |= keys
    changed = Params.model_validate(plain)
    names = {study_name(p, build_space(p), objective_of(p), "data", "extractor") for p in (PARAMS, changed)}
    assert (len(names) == 1) == same
    assert study_name(PARAMS, build_space(PARAMS), objective_of(PARAMS), "other data", "extractor") not in names


def test_a_torn_last_line_of_the_journal_costs_only_itself(tmp_path):
    study = open_study(tmp_path)
    finish(study, study.claim(2, BEFORE))
    with (tmp_path / "optuna.journal").open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')  # killed, or the power went
    again = open_study(tmp_path)
    finish(again, again.claim(2, BEFORE))
    assert [trial.state.name for trial in open_study(tmp_path).trials] == ["COMPLETE", "COMPLETE"]


def test_an_empty_database_may_be_opened_by_many_at_once(postgres, tmp_path):
    url, gate = postgres(), Barrier(4)

    def open_one(_):
        gate.wait()
        return open_study(tmp_path, storage=url).name

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(open_one, range(4))) == ["name"] * 4


def test_a_database_that_is_not_there_is_said_without_its_password(tmp_path):
    url = "postgresql://medgen:hunter2@127.0.0.1:1/studies"
    pytest.importorskip("psycopg")
    with pytest.raises(UserError, match="does not answer") as refusal, lost(url):
        open_storage(Project(tmp_path), url)
    assert "hunter2" not in str(refusal.value) and "127.0.0.1" in str(refusal.value)


def test_a_storage_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="sqlite:// is not supported; expected a journal file"):
        open_storage(Project(tmp_path), "sqlite:///studies.db")


def test_without_a_space_the_study_stays_the_same_after_its_best_values_are_applied():
    names = set()
    for rate in (5e-5, 1e-3):  # outside of the default range, and then the winner's
        params = PARAMS.model_copy(update={"tune": Tune()})
        phase = params.train.phases[0].model_copy(update={"learning_rate": rate})
        params = params.model_copy(update={"train": params.train.model_copy(update={"phases": (phase,)})})
        names.add(study_name(params, build_space(params), objective_of(params), "data", "extractor"))
    assert len(names) == 1


@pytest.mark.parametrize("content", [b"{}", b"precious", b'{"a": 1}\n'])
def test_another_file_is_never_written_to(tmp_path, content):
    (tmp_path / "optuna.journal").write_bytes(content)
    with pytest.raises(UserError, match="is another file"):
        open_storage(Project(tmp_path), "optuna.journal")
    assert (tmp_path / "optuna.journal").read_bytes() == content


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("", "cannot be a journal file"),
        ("optuna.journal/below", "cannot be a journal file"),
        ("postgresql://host:port/name", "tune.storage: "),
        ("postgresql+nothing://host/name", "tune.storage: "),
    ],
)
def test_a_storage_that_cannot_be_is_said_in_a_line(tmp_path, storage, words):
    (tmp_path / "optuna.journal").touch()
    with pytest.raises(UserError, match=words):
        open_storage(Project(tmp_path), storage)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("median", optuna.pruners.MedianPruner),
        ("hyperband", optuna.pruners.HyperbandPruner),
        ("none", optuna.pruners.NopPruner),
    ],
)
def test_the_pruner_is_the_one_that_is_named(tmp_path, name, kind):
    assert isinstance(build_pruner(name, 9), kind)
    study = open_study(tmp_path, with_tune(pruner=name))
    claim = study.claim(1, BEFORE)
    claim.trial.report(1.0, 1)
    assert claim.trial.should_prune() is False


def test_the_journal_is_one_that_optunas_own_tools_open(tmp_path):
    study = open_study(tmp_path)
    finish(study, study.claim(1, BEFORE))
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.journal"))
    shown = optuna.load_study(study_name="name", storage=optuna.storages.JournalStorage(backend))
    assert shown.best_trial.params == START
    assert JournalStorage(tmp_path / "optuna.journal").try_lock("name-0") is not None
