"""What a user is promised of promotion: the better model becomes champion, and every change of it is on record."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from medgen.config import Gates, Project, Registry, Tracking
from medgen.errors import Refused, UserError
from medgen.evaluation.data import EvaluationData, EvaluationInfo, save_evaluation
from medgen.metrics.comparison import Comparison, ImageSet, compare
from medgen.registry import evaluations, ledger, promotion
from medgen.registry.evaluations import compare_versions, read_evaluation
from medgen.registry.gates import check_gates
from medgen.registry.promotion import history, promote, rollback
from medgen.registry.versions import Version, aliases, metric_tags, set_tags
from medgen.tracking.mlflow_sync import connect, store_uri

TRAINED = {"dataset.fingerprint": "ba9876543210"}
LINEAGE = TRAINED | {
    "git.commit": "c" * 40,
    "git.dirty": "false",
    "data.md5": "d" * 32 + ".dir",
    "params.fingerprint": "abc123",
}
JUDGED = {"evaluated.dataset": "ba9876543210", "evaluated.extractor": "e" * 64, "evaluated.values": "0"}
METRICS = {
    "reconstruction/ssim": 0.85,
    "generation/mmd_domain": 0.010,
    "privacy/copy_rate": 0.01,
    "privacy/copy_rate_plausible": 0.05,
    "privacy/nearest_over_limit": 0.9,
    "privacy/held_out_limit": 0.5,
    "run/num_test": 200.0,
}
MASKS = {"segmentation/dice_foreground": 0.9, "segmentation/iou_foreground": 0.8, "run/num_test": 50.0}
# of a version registered before the mean over classes left the background out
OLD_MASKS = {"segmentation/dice": 0.66, "segmentation/dice_0": 1.0, "segmentation/dice_1": 0.95, "run/num_test": 50.0}
REGISTRY = Registry()


def tags(metrics: dict[str, float], **changes: str | None) -> dict[str, str]:
    """A version's tags; a change to None leaves one out."""
    changed = {
        name if "." in name or "/" in name else name.replace("_", ".", 1): value for name, value in changes.items()
    }
    whole = LINEAGE | JUDGED | {name: f"{value:g}" for name, value in metrics.items()} | changed
    return {name: value for name, value in whole.items() if value is not None}


def version(number: int = 2, metrics: dict[str, float] = METRICS, **changes: str | None) -> Version:
    return Version("medgen", number, "run", tags(metrics, **changes))


def compared(ssim: float = 0.0, c2st_high: float = 0.1, **p: float) -> list[Comparison]:
    """A comparison in which nothing is worse, but for the p-values given; `ssim` is by how much that is lower."""
    tests = [
        Comparison(name, 0.5, 0.5, 0.0, -0.1, c2st_high if name == "c2st" else 0.1, p.get(name, 0.5), 0.05)
        for name in ("mmd", "spectrum", "c2st", "recall")
    ]
    return [Comparison("ssim", 0.85 - ssim, 0.85, ssim, ssim - 0.002, ssim + 0.002, 0.5, 0.003), *tests]


def compared_masks(lower: float) -> list[Comparison]:
    return [Comparison("dice", 0.9 - lower, 0.9, lower, lower - 0.01, lower + 0.01, 0.5, 0.02)]


NO_CHAMPION: list[Comparison] | None = []
LIMITS: dict[str, tuple[Version, Gates, set[str]]] = {  # of a version by itself
    "the first": (version(), Gates(), set()),
    "blurred": (version(metrics=METRICS | {"reconstruction/ssim": 0.5}), Gates(), {"ssim"}),
    "copies": (version(metrics=METRICS | {"privacy/copy_rate": 0.06}), Gates(), {"copy_rate"}),
    "copies, and a ceiling of one's own": (
        version(metrics=METRICS | {"privacy/copy_rate": 0.06}),
        Gates(copy_rate_ceiling=0.1),
        set(),
    ),
    "few test images: chance allows more": (
        version(metrics=METRICS | {"privacy/copy_rate": 0.23, "privacy/copy_rate_plausible": 0.23}),
        Gates(),
        set(),
    ),
    "one certain copy": (
        version(metrics=METRICS | {"privacy/nearest_over_limit": 0.249}),
        Gates(copy_rate_ceiling=0.1),
        {"nearest_over_limit"},
    ),
    "test images too near to train images": (
        version(metrics=METRICS | {"privacy/held_out_limit": 0.1}),
        Gates(),
        {"copy_rate"},
    ),
    "copies were not looked for": (
        version(metrics={name: value for name, value in METRICS.items() if not name.startswith("privacy/")}),
        Gates(),
        {"copy_rate"},
    ),
    "copies searched by an older medgen": (
        version(**{"privacy/copy_rate_plausible": None, "privacy/nearest_over_limit": None}),
        Gates(),
        {"copy_rate"},
    ),
    "changed files": (version(git_dirty="true"), Gates(), {"git commit"}),
    "no git": (version(git_commit="unknown", git_dirty="unknown"), Gates(), {"git commit"}),
    "no word of git": (version(git_commit=None, git_dirty=None), Gates(), {"git commit"}),
    "data without a version": (version(data_md5="unknown"), Gates(), {"data"}),
    "no parameters": (version(params_fingerprint=None), Gates(), {"params"}),
    "empty words": (
        version(git_commit="", data_md5="", params_fingerprint=""),
        Gates(),
        {"git commit", "data", "params"},
    ),
    "not evaluated": (
        version(metrics={}, evaluated_dataset=None, evaluated_extractor=None),
        Gates(),
        {"evaluated with", "trained on", "ssim", "copy_rate"},
    ),
    "evaluated on other data than trained on": (version(dataset_fingerprint="0" * 12), Gates(), {"trained on"}),
    "numbers that are none": (
        version(**{"reconstruction/ssim": "inf", "privacy/copy_rate": "nan"}),
        Gates(),
        {"ssim", "copy_rate"},
    ),
    "masks poor": (
        version(metrics=MASKS | {"segmentation/dice_foreground": 0.5}, evaluated_extractor=None),
        Gates(),
        {"dice_foreground"},
    ),
    "masks of an older medgen without one of two organs": (
        version(metrics=OLD_MASKS | {"segmentation/dice_2": 0.0}, evaluated_extractor=None),
        Gates(),
        {"dice_foreground"},
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_version_by_itself(case: str) -> None:
    candidate, gates, refused = LIMITS[case]
    assert {gate.name for gate in check_gates(candidate, None, gates) if not gate.passed} == refused


CHAMPION = version(1)
AGAINST: dict[str, tuple[Version, Version, list[Comparison] | None, Gates, set[str]]] = {
    "as good": (version(), CHAMPION, compared(), Gates(), set()),
    "SSIM within the margin": (version(), CHAMPION, compared(ssim=0.01), Gates(), set()),
    "SSIM below it": (version(), CHAMPION, compared(ssim=0.0101), Gates(), {"ssim"}),
    "SSIM, and a margin of one's own": (version(), CHAMPION, compared(ssim=0.05), Gates(ssim_margin=0.06), set()),
    "worse by chance": (version(), CHAMPION, compared(mmd=0.05, spectrum=0.06), Gates(), set()),
    "farther from real images": (version(), CHAMPION, compared(mmd=0.049), Gates(), {"mmd"}),
    "and a stricter test": (version(), CHAMPION, compared(mmd=0.049), Gates(alpha=0.01), set()),
    "blurred": (version(), CHAMPION, compared(spectrum=0.004), Gates(), {"spectrum"}),
    "less real": (version(), CHAMPION, compared(c2st=0.004), Gates(), {"c2st"}),
    "less diverse": (version(), CHAMPION, compared(recall=0.004), Gates(), {"recall"}),
    "less spread, but clearly more real": (
        version(),
        CHAMPION,
        compared(recall=0.004, c2st_high=-0.01),
        Gates(),
        set(),
    ),
    "not comparable": (version(), CHAMPION, None, Gates(), {"comparison"}),
    "other test images": (
        version(evaluated_dataset="0" * 12, dataset_fingerprint="0" * 12),
        CHAMPION,
        None,
        Gates(),
        {"evaluated with", "comparison"},
    ),
    "another extractor": (
        version(evaluated_extractor="0" * 64),
        CHAMPION,
        None,
        Gates(),
        {"evaluated with", "comparison"},
    ),
    "fewer samples": (
        version(metrics=METRICS | {"run/num_generated": 3.0}),
        CHAMPION,
        None,
        Gates(),
        {"evaluated with", "comparison"},
    ),
    "masks as good": (
        version(metrics=MASKS, evaluated_extractor=None),
        version(1, MASKS, evaluated_extractor=None),
        compared_masks(0.01),
        Gates(),
        set(),
    ),
    "masks worse": (
        version(metrics=MASKS, evaluated_extractor=None),
        version(1, MASKS, evaluated_extractor=None),
        compared_masks(0.02),
        Gates(),
        {"dice"},
    ),
    "masks against images": (
        version(metrics=MASKS, evaluated_extractor=None),
        CHAMPION,
        None,
        Gates(),
        {"evaluated with", "comparison"},
    ),
}


@pytest.mark.parametrize("case", AGAINST)
def test_a_version_compared_with_the_champion(case: str) -> None:
    candidate, champion, comparison, gates, refused = AGAINST[case]
    found = check_gates(candidate, champion, gates, [(champion, comparison)])
    assert {gate.name for gate in found if not gate.passed} == refused


def test_a_second_champion_is_named_in_its_rows() -> None:
    found = check_gates(version(9), CHAMPION, Gates(), [(CHAMPION, compared()), (version(4), compared(mmd=0.01))])
    assert [gate.name for gate in found if not gate.passed] == ["mmd (version 4)"]


def test_the_margin_on_kid_of_an_older_params_file_is_read_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"registry\.gates\.kid_margin: no longer used"):
        assert Gates.model_validate({"kid_margin": 0.1}) == Gates()


NUM_SAMPLES = 200


def evaluation(seed: int = 0, shift: float = 0.0, ssim: float = 0.85) -> EvaluationData:
    """Synthetic per-image values of a model whose samples lie `shift` away from the held-out images."""
    draw = torch.Generator().manual_seed(1)
    real, rebuilt = torch.randn(60, 4, generator=draw), 0.02 * torch.randn(60, generator=draw)
    falling = torch.arange(1, 9).float() ** -1.5
    power = falling * torch.exp(0.3 * torch.randn(60, 8, generator=draw))
    own = torch.Generator().manual_seed(1000 + seed)
    samples = ImageSet(
        shift + torch.randn(NUM_SAMPLES, 4, generator=own),
        falling * torch.exp(0.3 * torch.randn(NUM_SAMPLES, 8, generator=own)),
    )
    info = EvaluationInfo("ba9876543210", "e" * 64, "test", 0, NUM_SAMPLES, 2.8)
    return EvaluationData(info, ssim + rebuilt, torch.arange(60) // 2, samples, ImageSet(real, power))


def quality(**values: float) -> dict[str, str]:
    """Changes of `register` that give a version such an evaluation."""
    return {f"test.{name}": str(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    connect(project, Tracking())  # a database takes seconds to make
    return project


@pytest.fixture(autouse=True)
def synthetic_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of these tests have no artifacts: their evaluations follow from tags."""

    def read(version: Version, *_: object) -> EvaluationData | None:
        if "evaluated.values" not in version.tags:
            return None
        values = {key.removeprefix("test."): value for key, value in version.tags.items() if key.startswith("test.")}
        return evaluation(int(values.get("seed", 0)), float(values.get("shift", 0)), float(values.get("ssim", 0.85)))

    monkeypatch.setattr(promotion, "read_evaluation", read)
    monkeypatch.setattr(evaluations, "compare", functools.partial(compare, num_permutations=199))


@pytest.fixture
def register(project: Project, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry of this test's own: `register(metrics)` adds a version, which is the candidate then."""
    name = re.sub(r"\W+", "-", request.node.name)
    client, _ = connect(project, Tracking())
    client.create_registered_model(name)

    def add(metrics: dict[str, float] = METRICS, **changes: str | None) -> int:
        made = client.create_model_version(name, source=str(project.root), tags=tags(metrics, **changes))
        client.set_registered_model_alias(name, "candidate", made.version)
        return int(made.version)

    add.registry, add.client, add.name = Registry(model_name=name), client, name  # type: ignore[attr-defined]
    add.aliases = lambda: aliases(client, name)  # type: ignore[attr-defined]
    return add


def test_the_better_one_is_promoted_and_aliases_say_so(project: Project, register: Any, capsys: Any) -> None:
    first = register()
    assert promote(project, tracking=Tracking(), registry=register.registry)
    assert register.aliases() == {"candidate": first, "champion": first}
    second = register(METRICS | {"reconstruction/ssim": 0.9})
    entry = promote(project, tracking=Tracking(), registry=register.registry)
    assert register.aliases() == {"candidate": second, "champion": second, "previous": first}
    assert entry and (entry.action, entry.before, entry.after, entry.forced) == ("promote", first, second, False)
    assert entry.metrics["reconstruction/ssim"] == 0.9
    assert "0.85" in (told := capsys.readouterr().out) and "0.9" in told


def test_a_refused_one_changes_nothing(project: Project, register: Any) -> None:
    register()
    promote(project, tracking=Tracking(), registry=register.registry)
    before = register.aliases()
    worse = register(**quality(seed=1, shift=0.5))
    with pytest.raises(Refused, match="mmd, c2st failed; version 1 stays champion") as refused:
        promote(project, tracking=Tracking(), registry=register.registry)
    assert refused.value.exit_code == 3
    assert register.aliases() == before | {"candidate": worse}
    assert len(ledger.entries(register.client, register.name)) == 1


def test_models_judged_unalike_are_refused_with_the_commands_that_mend_it(project: Project, register: Any) -> None:
    register()
    promote(project, tracking=Tracking(), registry=register.registry)
    register(evaluated_extractor="0" * 64)
    name = register.name
    both = rf"`medgen evaluate --model models:/{name}/1` and `medgen evaluate --model models:/{name}/2`"
    with pytest.raises(Refused, match=both):
        promote(project, tracking=Tracking(), registry=register.registry)
    register({})
    with pytest.raises(Refused, match=rf"alike: `medgen evaluate --model models:/{name}/3`, then promote again"):
        promote(project, tracking=Tracking(), registry=register.registry)


def test_a_version_of_an_older_medgen_is_judged_first(project: Project, register: Any) -> None:
    """It has metrics, and does not say what they were measured with."""
    register(**{"evaluated.dataset": None, "evaluated.extractor": None, "evaluated.values": None})
    with pytest.raises(Refused, match=rf"`medgen evaluate --model models:/{register.name}/1`, then promote again"):
        promote(project, tracking=Tracking(), registry=register.registry)


def test_of_a_champion_of_an_older_medgen_the_refusal_names_the_command(project: Project, register: Any) -> None:
    """It has metrics and says what they were measured with, and has no values of single images."""
    register(**{"evaluated.values": None})
    promote(project, tracking=Tracking(), registry=register.registry)
    register()
    command = rf"comparison failed; .*alike: `medgen evaluate --model models:/{register.name}/1`, then promote again"
    with pytest.raises(Refused, match=command):
        promote(project, tracking=Tracking(), registry=register.registry)
    forced = promote(project, tracking=Tracking(), registry=register.registry, force="no longer to be loaded")
    assert forced and forced.gates == ["comparison"]
    register()
    assert promote(project, tracking=Tracking(), registry=register.registry)  # version 1 need not be evaluated again


def test_of_a_candidate_without_values_the_refusal_names_the_command(project: Project, register: Any) -> None:
    register(**{"evaluated.values": None, "privacy/copy_rate_plausible": None})
    command = rf"copy_rate failed.*`medgen evaluate --model models:/{register.name}/1`, then promote again"
    with pytest.raises(Refused, match=command):
        promote(project, tracking=Tracking(), registry=register.registry)


def test_a_chain_of_ever_worse_models_is_refused_at_its_first_step(project: Project, register: Any) -> None:
    register()
    promote(project, tracking=Tracking(), registry=register.registry)
    for step in range(1, 3):  # refused or not, the chain would go on
        register(METRICS | {"generation/mmd_domain": 0.01 + 0.05 * step}, **quality(seed=step, shift=0.4 * step))
        with pytest.raises(Refused, match="mmd"):
            promote(project, tracking=Tracking(), registry=register.registry)
    assert register.aliases()["champion"] == 1


def test_steps_too_small_to_see_add_up_against_the_best_champion_on_record(project: Project, register: Any) -> None:
    refusal = ""
    for step in range(12):
        register(METRICS | {"generation/mmd_domain": 0.01 + 0.001 * step}, **quality(seed=step, shift=0.05 * step))
        try:
            promote(project, tracking=Tracking(), registry=register.registry)
        except Refused as error:
            refusal = str(error)
            break
    assert "mmd (version 1)" in refusal
    assert step > 2  # the first steps were too small to see


def test_steps_within_the_margin_of_ssim_do_not_add_up() -> None:
    def sharp(number: int, ssim: float, **changes: str | None) -> Version:
        return version(number, METRICS | {"reconstruction/ssim": ssim}, **changes)

    def refused(ssim: float) -> set[str]:
        earlier = [sharp(1, 0.93, evaluated_extractor="0" * 64), sharp(2, 0.850), sharp(3, 0.842)]
        comparisons = [(earlier[-1], compared(ssim=earlier[-1].metrics["reconstruction/ssim"] - ssim))]
        gates = check_gates(sharp(4, ssim), earlier[-1], Gates(), comparisons, earlier)
        return {gate.name for gate in gates if not gate.passed}

    assert refused(0.840) == set()  # version 1 was evaluated otherwise
    assert refused(0.839) == {"ssim"}


@pytest.mark.slow
def test_another_draw_of_the_same_model_is_promoted() -> None:
    refused = 0
    for seed in range(40):
        found = compare_versions(evaluation(2 * seed + 1), evaluation(2 * seed + 2))
        gates = check_gates(version(), CHAMPION, Gates(), [(CHAMPION, found)])
        refused += any(not gate.passed for gate in gates)
    assert refused <= 5


def spread(seed: int, scale: float) -> EvaluationData:
    """Of a model that draws from the real distribution, but `scale` times as wide; features as a ReLU leaves them."""
    data = evaluation(seed)
    assert data.samples and data.held_out
    draw, real = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    samples = ImageSet((scale * torch.randn(NUM_SAMPLES, 16, generator=draw)).relu(), data.samples.power)
    held_out = ImageSet(torch.randn(60, 16, generator=real).relu(), data.held_out.power)
    return dataclasses.replace(data, samples=samples, held_out=held_out)


SPREAD = {"collapsed": (0.5, 1.0, False), "in place of an overspread one": (1.0, 2.0, True)}


@pytest.mark.parametrize("case", SPREAD)
def test_lost_diversity_is_refused_and_too_much_of_it_is_no_merit(case: str) -> None:
    candidate, champion, promoted = SPREAD[case]
    found = compare_versions(spread(1, candidate), spread(2, champion))
    assert found is not None
    assert {one.name: one for one in found}["recall"].p < 0.05  # lower in both cases
    gates = {gate.name: gate.passed for gate in check_gates(version(), CHAMPION, Gates(), [(CHAMPION, found)])}
    assert gates["recall"] == promoted
    assert all(gates.values()) == promoted


def test_an_evaluation_is_kept_with_its_version_and_damage_is_seen(project: Project, register: Any) -> None:
    """Through MLflow's own artifacts."""
    client, experiment = connect(project, Tracking())
    digest = save_evaluation(project.evaluation, evaluation(3))
    mlflow.set_tracking_uri(store_uri(project, Tracking()))  # where create_model_version looks for the logged model
    logged = client.create_logged_model(experiment, name="kept")
    made = client.create_model_version(
        register.name,
        source=f"models:/{logged.model_id}",
        tags=tags(METRICS, **{"evaluated.values": digest}),
        model_id=logged.model_id,
    )
    client.finalize_logged_model(logged.model_id, "READY")
    version = Version(register.name, int(made.version), "", made.tags)
    assert read_evaluation(version, project, Tracking()) is None  # not kept yet
    evaluations.keep_evaluation(client, made, project)
    found = read_evaluation(version, project, Tracking())
    assert found is not None and found.similarity.equal(evaluation(3).similarity)
    save_evaluation(project.evaluation, evaluation(4))
    evaluations.keep_evaluation(client, made, project)  # and killed before the tags were set
    assert read_evaluation(version, project, Tracking()) is None


def test_versions_evaluated_unalike_are_not_compared() -> None:
    other = evaluation()
    other = dataclasses.replace(other, info=dataclasses.replace(other.info, num_generated=100))
    assert compare_versions(evaluation(), other) is None


def test_force_is_recorded(project: Project, register: Any) -> None:
    register(METRICS | {"reconstruction/ssim": 0.1})
    why = "the only one there is; Ärzte wissen es"
    entry = promote(project, tracking=Tracking(), registry=register.registry, force=why)
    assert entry and entry.forced and entry.gates == ["ssim"]
    assert ledger.entries(register.client, register.name)[-1].why == why
    assert register.aliases()["champion"] == 1


@pytest.mark.parametrize("why", ["", "  ", "x" * 1001, "red \x1b[31m"])
def test_a_reason_is_one(project: Project, why: str) -> None:
    with pytest.raises(UserError, match="--force: expected a reason"):
        promote(project, tracking=Tracking(), registry=REGISTRY, force=why)


def test_the_longest_reason_fits_the_databases_column(project: Project, register: Any) -> None:
    gone = {name: None for name in ("git_commit", "git_dirty", "data_md5", "params_fingerprint")}
    register(METRICS | {"reconstruction/ssim": 0.1, "privacy/copy_rate": 0.9}, **gone)
    entry = promote(project, tracking=Tracking(), registry=register.registry, force="ß" * ledger.MAX_WHY)
    assert entry and len(entry.line) < 5000


@pytest.mark.parametrize(("number", "said"), [(9, "9: no such version"), (None, "candidate: no such version")])
def test_unknown_versions_are_named(project: Project, register: Any, number: int | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        promote(project, tracking=Tracking(), registry=register.registry, version=number)


def test_rollback_goes_back_step_by_step(project: Project, register: Any) -> None:
    for _ in range(3):
        register()
        promote(project, tracking=Tracking(), registry=register.registry)
    back = rollback(project, tracking=Tracking(), registry=register.registry, why="blurred in practice")
    assert (back.before, back.after, back.why) == (3, 2, "blurred in practice")
    assert register.aliases() == {"candidate": 3, "champion": 2, "previous": 1}
    rollback(project, tracking=Tracking(), registry=register.registry)
    assert register.aliases() == {"candidate": 3, "champion": 1}
    with pytest.raises(UserError, match="the champion is 1, and the record has none before it"):
        rollback(project, tracking=Tracking(), registry=register.registry)
    promote(project, tracking=Tracking(), registry=register.registry)
    assert rollback(project, tracking=Tracking(), registry=register.registry).after == 1


def test_rollback_where_nothing_was_ever_registered(project: Project) -> None:
    with pytest.raises(UserError, match="models:/nothing: the champion is none"):
        rollback(project, tracking=Tracking(), registry=Registry(model_name="nothing"))


def test_rollback_without_a_champion(project: Project, register: Any) -> None:
    register()
    with pytest.raises(UserError, match="the champion is none"):
        rollback(project, tracking=Tracking(), registry=register.registry)


def test_the_ledger_is_in_the_registry_and_in_a_file_that_only_grows(project: Project, register: Any) -> None:
    file = project.reports / "promotions.jsonl"
    register()
    promote(project, tracking=Tracking(), registry=register.registry)
    before = file.read_text()
    register()
    promote(project, tracking=Tracking(), registry=register.registry)
    assert file.read_text().startswith(before)
    file.unlink()  # another machine's clone: it gets all that was before
    rollback(project, tracking=Tracking(), registry=register.registry)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["action"], line["before"], line["after"]) for line in lines] == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("rollback", 2, 1),
    ]
    assert all(line["who"] and line["time"].endswith("+00:00") for line in lines)


def test_history_tells_all(project: Project, register: Any, capsys: Any) -> None:
    register()
    promote(project, tracking=Tracking(), registry=register.registry)
    register(METRICS | {"reconstruction/ssim": 0.4}, data_md5="f" * 32)
    promote(project, tracking=Tracking(), registry=register.registry, force="[bold]a try[/bold]")
    history(project, tracking=Tracking(), registry=register.registry)
    assert "[bold]a" in capsys.readouterr().out  # not taken for markup
    history(project, tracking=Tracking(), registry=register.registry, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [one["version"] for one in told["versions"]] == [1, 2]
    assert told["versions"][1]["aliases"] == ["candidate", "champion"]
    assert told["promotions"][1]["forced"] is True
    assert told["promotions"][1]["gates"] == ["ssim"]


@pytest.mark.parametrize(("dataset", "numbers"), [("ffff", [2]), ("dddd", [1]), ("ba98", [1, 2])])
def test_history_of_a_dataset(project: Project, register: Any, dataset: str, numbers: list[int]) -> None:
    register()
    register(data_md5="f" * 32)
    found = history(project, tracking=Tracking(), registry=register.registry, dataset=dataset)
    assert [one["version"] for one in found["versions"]] == numbers


def test_an_unknown_dataset_is_named(project: Project, register: Any) -> None:
    register()
    with pytest.raises(UserError, match="--dataset 1234: no version"):
        history(project, tracking=Tracking(), registry=register.registry, dataset="1234")


def test_an_alias_moved_by_hand_is_seen(project: Project, register: Any, capsys: Any) -> None:
    register()
    promote(project, tracking=Tracking(), registry=register.registry)
    register()
    register.client.set_registered_model_alias(register.name, "champion", "2")
    history(project, tracking=Tracking(), registry=register.registry)
    assert "The champion is version 2, the last change says 1" in capsys.readouterr().out


def test_later_metrics_take_the_place_of_earlier_ones_but_not_what_is_known_of_copies(register: Any) -> None:
    number = register(METRICS | {"generation/fd_inception": 7.0})
    later = {"reconstruction/ssim": 0.7, "generation/mmd_domain": 0.3}
    provenance = {"dataset": "later", "extractors": {"domain": {"sha256": "x"}}}
    version = register.client.get_model_version(register.name, str(number))
    assert set_tags(register.client, version, metric_tags(later, provenance))
    found = register.client.get_model_version(register.name, str(number)).tags
    metrics = {key: value for key, value in found.items() if "/" in key}
    assert metrics == {
        "reconstruction/ssim": "0.7",
        "generation/mmd_domain": "0.3",
        **{key: f"{value:g}" for key, value in METRICS.items() if key.startswith("privacy/")},
    }
    assert (found["evaluated.dataset"], found["evaluated.extractor"]) == ("later", "x")


PROMOTE = """
import sys
from pathlib import Path
from medgen.config import Project, Registry, Tracking
from medgen.errors import UserError
from medgen.registry import promotion

change = promotion._change
def after_the_other_has_looked(*words, **others):
    print("looked", flush=True)
    sys.stdin.readline()
    change(*words, **others)

promotion._change = after_the_other_has_looked
try:
    registry = Registry(model_name=sys.argv[2])
    promotion.promote(Project(Path(sys.argv[1])), tracking=Tracking(), registry=registry, version=int(sys.argv[3]))
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(project: Project, register: Any) -> None:
    """Both have looked at the gates before either changes anything; then both go on at the same moment."""
    numbers = [register(), register()]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    start = [sys.executable, "-c", PROMOTE, str(project.root), register.name]
    both = [subprocess.Popen([*start, str(number)], **pipes) for number in numbers]
    try:
        for process in both:
            while "looked" not in process.stdout.readline():
                assert process.poll() is None
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        told = [process.communicate(timeout=60)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 3], told
    winner, loser = numbers[codes.index(0)], codes.index(3)
    assert f"version {winner} became champion" in told[loser]
    assert register.aliases()["champion"] == winner
    assert [entry.after for entry in ledger.entries(register.client, register.name)] == [winner]


def test_only_one_at_a_time_has_the_turn(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PAUSE_SECONDS", (0.0, 0.02))
    inside, most, done = 0, 0, []

    def work() -> None:
        nonlocal inside, most
        with ledger.turn(register.client, register.name) as check:
            inside += 1
            most = max(most, inside)
            check()
            done.append(1)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (most, len(done)) == (1, 4)
    assert not ledger._claims(register.client, register.name)


def test_a_killed_promotion_does_not_keep_the_turn(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(ledger, "PAUSE_SECONDS", (0.05, 0.05))
    register.client.set_registered_model_tag(register.name, f"{ledger.CLAIM}dead", "someone@somewhere")
    with ledger.turn(register.client, register.name) as check:
        check()
        register.client.delete_registered_model_tag(
            register.name, next(iter(ledger._claims(register.client, register.name)))
        )
        with pytest.raises(UserError, match="lost its turn"):
            check()


ACTIONS: dict[str, tuple[list[tuple[str, int]], list[int]]] = {
    "one": ([("promote", 1)], [1]),
    "back": ([("promote", 1), ("promote", 2), ("rollback", 1)], [1]),
    "there and back": ([("promote", 1), ("promote", 2), ("promote", 1), ("rollback", 2)], [1, 2]),
    "back twice": ([("promote", n) for n in (1, 2, 3)] + [("rollback", 2), ("rollback", 1)], [1]),
    "to what was never promoted": ([("promote", 1), ("rollback", 5)], [5]),
}


@pytest.mark.parametrize("case", ACTIONS)
def test_standing_champions(case: str) -> None:
    actions, expected = ACTIONS[case]
    entry: Callable[..., Any] = ledger.entry
    assert ledger.champions([entry(action, "medgen", None, after, "why") for action, after in actions]) == expected


def test_a_torn_line_does_not_swallow_the_next(project: Project, register: Any, tmp_path: Path) -> None:
    file = tmp_path / "promotions.jsonl"
    file.write_text('{"key": "to')
    ledger.append(register.client, register.name, ledger.entry("promote", register.name, None, 1, "why"))
    ledger.write_file(register.client, register.name, file)
    assert json.loads(file.read_text().splitlines()[-1])["after"] == 1


def test_rollback_never_goes_forward(project: Project, register: Any) -> None:
    for _ in range(3):
        register()
        promote(project, tracking=Tracking(), registry=register.registry)
    register.client.set_registered_model_alias(register.name, "champion", "2")  # by hand, or a promotion cut short
    assert rollback(project, tracking=Tracking(), registry=register.registry).after == 1


def test_a_deleted_champion_is_still_what_to_be_held_against(project: Project, register: Any) -> None:
    for _ in range(3):
        register()
        promote(project, tracking=Tracking(), registry=register.registry)
    register.client.delete_model_version(register.name, "3")
    register(**quality(seed=1, shift=0.5))
    with pytest.raises(Refused, match="mmd, c2st failed; version 2, the last champion on record, was"):
        promote(project, tracking=Tracking(), registry=register.registry)
    register.client.delete_model_version(register.name, "2")
    assert rollback(project, tracking=Tracking(), registry=register.registry).after == 1


def test_an_alias_moved_by_hand_can_be_put_on_record(project: Project, register: Any, capsys: Any) -> None:
    for _ in range(2):
        register()
    promote(project, tracking=Tracking(), registry=register.registry, version=1)
    register.client.set_registered_model_alias(register.name, "champion", "2")
    assert promote(project, tracking=Tracking(), registry=register.registry, version=2)
    capsys.readouterr()
    history(project, tracking=Tracking(), registry=register.registry)
    assert "The champion is version" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"bro', "[]", '{"key": "0"}'])
def test_a_changed_entry_is_named_before_anything_is_written(project: Project, register: Any, text: str) -> None:
    register()
    register.client.set_registered_model_tag(register.name, "promotion.note", "ours")
    register.client.set_registered_model_tag(register.name, "promotion.000001.ab", text)
    before = register.client.get_registered_model(register.name).tags
    for act in (promote, rollback, history):
        with pytest.raises(UserError, match=r"tag promotion\.000001\.ab: no entry of the ledger any more"):
            act(project, tracking=Tracking(), registry=register.registry)
    assert register.client.get_registered_model(register.name).tags == before


def test_a_file_that_cannot_be_written_is_only_a_warning(tmp_path: Path, project: Project, register: Any) -> None:
    register()
    (project.reports / "promotions.jsonl").unlink(missing_ok=True)
    (project.reports / "promotions.jsonl").mkdir(parents=True)
    try:
        assert promote(project, tracking=Tracking(), registry=register.registry)
    finally:
        (project.reports / "promotions.jsonl").rmdir()
    assert register.aliases()["champion"] == 1


def test_who_lost_its_turn_overwrites_nothing(project: Project, register: Any) -> None:
    """It was stopped between its last look and its writing."""
    register()
    late = ledger.entry("promote", register.name, None, 1, "late")
    ledger.append(register.client, register.name, ledger.entry("promote", register.name, None, 1, "in time"))
    register.client.set_registered_model_tag(register.name, f"promotion.000001.{late.key}", late.line)
    assert {entry.why for entry in ledger.entries(register.client, register.name)} == {"in time", "late"}
