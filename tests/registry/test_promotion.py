"""Promotion: gates, comparisons with champions, the ledger, rollback and history."""

import dataclasses
import functools
import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
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
from medgen.registry.evaluations import compare_versions, download_evaluation
from medgen.registry.gates import check_gates
from medgen.registry.promotion import history, promote, rollback
from medgen.registry.versions import Version, get_aliases, metric_tags, update_tags
from medgen.tracking.mlflow_sync import connect, store_uri

TRAINED = {"dataset.fingerprint": "ba9876543210", "dataset.name": "phantom"}
LINEAGE = TRAINED | {
    "git.commit": "c" * 40,
    "git.dirty": "false",
    "data.md5": "d" * 32 + ".dir",
    "params.fingerprint": "abc123",
}
EVALUATED = {"evaluated.dataset": "ba9876543210", "evaluated.extractor": "e" * 64, "evaluated.values": "0"}
METRICS = {
    "reconstruction/ssim": 0.85,
    "generation/mmd_domain": 0.010,
    "privacy/copy_rate": 0.01,
    "privacy/copy_rate_plausible": 0.05,
    "privacy/nearest_over_limit": 0.9,
    "privacy/held_out_limit": 0.5,
    "run/num_test": 200.0,
}
NO_IMAGES: dict[str, str | None] = dict.fromkeys([*METRICS, "evaluated.extractor"])
OF_MASKS = NO_IMAGES | {
    "segmentation/dice_foreground": "0.9",
    "segmentation/iou_foreground": "0.8",
    "run/num_test": "50",
}
# registered before the mean over classes excluded the background
OF_OLD_MASKS = NO_IMAGES | {"segmentation/dice": "0.66", "segmentation/dice_0": "1", "segmentation/dice_1": "0.95"}
NOT_COMPARABLE = {"evaluated with", "comparison"}
REGISTRY = Registry()


def tags(metrics: dict[str, float], **changes: str | None) -> dict[str, str]:
    """A version's tags with changes; None removes a tag."""
    changed = {
        name if "." in name or "/" in name else name.replace("_", ".", 1): value for name, value in changes.items()
    }
    whole = LINEAGE | EVALUATED | {name: f"{value:g}" for name, value in metrics.items()} | changed
    return {name: value for name, value in whole.items() if value is not None}


def version(number: int = 2, metrics: dict[str, float] = METRICS, **changes: str | None) -> Version:
    return Version("medgen", number, "run", tags(metrics, **changes))


def compared(ssim: float = 0.0, c2st_high: float = 0.1, **p: float) -> list[Comparison]:
    """A comparison without differences, except for the given p-values; `ssim` is the decrease of SSIM."""
    tests = [
        Comparison(name, 0.5, 0.5, 0.0, -0.1, c2st_high if name == "c2st" else 0.1, p.get(name, 0.5), 0.05)
        for name in ("mmd", "spectrum", "c2st", "recall")
    ]
    return [Comparison("ssim", 0.85 - ssim, 0.85, ssim, ssim - 0.002, ssim + 0.002, 0.5, 0.003), *tests]


# changes of the candidate's tags, gates that fail, limits
LIMITS: dict[str, tuple[dict[str, str | None], set[str], Gates]] = {
    "first version": ({}, set(), Gates()),
    "blurred": ({"reconstruction/ssim": "0.5"}, {"ssim"}, Gates()),
    "copies": ({"privacy/copy_rate": "0.06"}, {"copy_rate"}, Gates()),
    "copies below a configured ceiling": ({"privacy/copy_rate": "0.06"}, set(), Gates(copy_rate_ceiling=0.1)),
    "few test images, so a higher rate by chance": (
        {"privacy/copy_rate": "0.23", "privacy/copy_rate_plausible": "0.23"}, set(), Gates()
    ),
    "one certain copy": (
        {"privacy/nearest_over_limit": "0.249"}, {"nearest_over_limit"}, Gates(copy_rate_ceiling=0.1)
    ),
    "test images too similar to train images": ({"privacy/held_out_limit": "0.1"}, {"copy_rate"}, Gates()),
    "no privacy metrics": ({name: None for name in METRICS if name.startswith("privacy/")}, {"copy_rate"}, Gates()),
    "privacy metrics of an older medgen": (
        {"privacy/copy_rate_plausible": None, "privacy/nearest_over_limit": None}, {"copy_rate"}, Gates()
    ),
    "samples that harm a classifier": ({"utility/gain_both": "-0.03"}, {"gain_both"}, Gates(utility_floor=-0.02)),
    "samples that help": ({"utility/gain_both": "0.01"}, set(), Gates(utility_floor=0.0)),
    "samples that harm a U-Net": (
        {"utility/gain_dice_both": "-0.03"}, {"gain_dice_both"}, Gates(utility_floor=-0.02)
    ),
    "samples that help a U-Net, without labels": ({"utility/gain_dice_both": "0.01"}, set(), Gates(utility_floor=0.0)),
    "samples that help a classifier and harm a U-Net": (
        {"utility/gain_both": "0.01", "utility/gain_dice_both": "-0.03"}, {"gain_dice_both"}, Gates(utility_floor=0.0)
    ),
    "use of samples not measured": ({}, {"gain_both"}, Gates(utility_floor=0.0)),
    "samples that harm, without this gate": ({"utility/gain_both": "-0.03"}, set(), Gates()),
    "uncommitted changes": ({"git.dirty": "true"}, {"git commit"}, Gates()),
    "no git": ({"git.commit": "unknown", "git.dirty": "unknown"}, {"git commit"}, Gates()),
    "no git tags": ({"git.commit": None, "git.dirty": None}, {"git commit"}, Gates()),
    "data md5 unknown": ({"data.md5": "unknown"}, {"data"}, Gates()),
    "no parameters": ({"params.fingerprint": None}, {"params"}, Gates()),
    "empty tags": (
        {"git.commit": "", "data.md5": "", "params.fingerprint": ""}, {"git commit", "data", "params"}, Gates()
    ),
    "not evaluated": (
        dict.fromkeys([*METRICS, "evaluated.dataset", "evaluated.extractor"]),
        {"evaluated with", "trained on", "ssim", "copy_rate"},
        Gates(),
    ),
    "evaluated on another dataset": ({"dataset.fingerprint": "0" * 12}, {"trained on"}, Gates()),
    "metrics that are not finite": (
        {"reconstruction/ssim": "inf", "privacy/copy_rate": "nan"}, {"ssim", "copy_rate"}, Gates()
    ),
    "poor masks": (OF_MASKS | {"segmentation/dice_foreground": "0.5"}, {"dice_foreground"}, Gates()),
    "masks of an older medgen, one of two organs missed": (
        OF_OLD_MASKS | {"segmentation/dice_2": "0"}, {"dice_foreground"}, Gates()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_limits_of_a_version(case: str) -> None:
    changes, failed, gates = LIMITS[case]
    assert {gate.name for gate in check_gates(version(**changes), None, gates) if not gate.passed} == failed


CHAMPION = version(1)
# changes of the candidate's tags, comparison with the champion, gates that fail, limits
COMPARED: dict[str, tuple[dict[str, str | None], list[Comparison] | None, set[str], Gates]] = {
    "equal": ({}, compared(), set(), Gates()),
    "SSIM within the margin": ({}, compared(ssim=0.01), set(), Gates()),
    "SSIM below it": ({}, compared(ssim=0.0101), {"ssim"}, Gates()),
    "SSIM within a configured margin": ({}, compared(ssim=0.05), set(), Gates(ssim_margin=0.06)),
    "worse within chance": ({}, compared(mmd=0.05, spectrum=0.06), set(), Gates()),
    "higher MMD": ({}, compared(mmd=0.049), {"mmd"}, Gates()),
    "higher MMD, smaller alpha": ({}, compared(mmd=0.049), set(), Gates(alpha=0.01)),
    "blurred": ({}, compared(spectrum=0.004), {"spectrum"}, Gates()),
    "less realistic": ({}, compared(c2st=0.004), {"c2st"}, Gates()),
    "less diverse": ({}, compared(recall=0.004), {"recall"}, Gates()),
    "lower recall but clearly more realistic": ({}, compared(recall=0.004, c2st_high=-0.01), set(), Gates()),
    "not comparable": ({}, None, {"comparison"}, Gates()),
    "other test images": (
        {"evaluated.dataset": "0" * 12, "dataset.fingerprint": "0" * 12}, None, NOT_COMPARABLE, Gates()
    ),
    "another extractor": ({"evaluated.extractor": "0" * 64}, None, NOT_COMPARABLE, Gates()),
    "fewer samples": ({"run/num_generated": "3"}, None, NOT_COMPARABLE, Gates()),
    "masks compared with images": (OF_MASKS, None, NOT_COMPARABLE, Gates()),
    "another dataset, evaluated on the same": (
        {"dataset.name": "xrays", "dataset.fingerprint": "0" * 12}, None,
        NOT_COMPARABLE | {"dataset", "trained on"}, Gates()
    ),
    "more images of the same dataset": (
        {"dataset.fingerprint": "0" * 12, "evaluated.dataset": "0" * 12}, None, NOT_COMPARABLE, Gates()
    ),
    "the same dataset under another name": ({"dataset.name": "xrays"}, compared(), set(), Gates()),
    "a version of an older medgen, without the dataset's name": ({"dataset.name": None}, compared(), set(), Gates()),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPARED)
def test_comparison_with_the_champion(case: str) -> None:
    changes, comparison, failed, gates = COMPARED[case]
    found = check_gates(version(**changes), CHAMPION, gates, [(CHAMPION, comparison)])
    assert {gate.name for gate in found if not gate.passed} == failed


@pytest.mark.parametrize(("decrease", "failed"), [(0.01, []), (0.02, ["dice"])])
def test_comparison_of_masks(decrease: float, failed: list[str]) -> None:
    champion = version(1, **OF_MASKS)
    low, high = decrease - 0.01, decrease + 0.01
    comparison = [Comparison("dice", 0.9 - decrease, 0.9, decrease, low, high, 0.5, 0.02)]
    found = check_gates(version(**OF_MASKS), champion, Gates(), [(champion, comparison)])
    assert [gate.name for gate in found if not gate.passed] == failed


def test_gates_name_an_earlier_champion() -> None:
    found = check_gates(version(9), CHAMPION, Gates(), [(CHAMPION, compared()), (version(4), compared(mmd=0.01))])
    assert [gate.name for gate in found if not gate.passed] == ["mmd (version 4)"]


def test_kid_margin_of_an_older_params_file_gives_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"registry\.gates\.kid_margin: no longer used"):
        assert Gates.model_validate({"kid_margin": 0.1}) == Gates()


NUM_SAMPLES = 200


def evaluation(seed: int = 0, shift: float = 0.0, ssim: float = 0.85) -> EvaluationData:
    """Synthetic per-image values; the samples' features are shifted by `shift` from those of the held-out images."""
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
    """Arguments of `register` that give a version the evaluation with these arguments."""
    return {f"test.{name}": str(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    connect(project, Tracking())  # creating the database takes seconds, so tests share it
    return project


@pytest.fixture(autouse=True)
def synthetic_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derive the evaluations from tags, because the versions of these tests have no artifacts."""

    def read(version: Version, *_: object) -> EvaluationData | None:
        if "evaluated.values" not in version.tags:
            return None
        values = {key.removeprefix("test."): value for key, value in version.tags.items() if key.startswith("test.")}
        return evaluation(int(values.get("seed", 0)), float(values.get("shift", 0)), float(values.get("ssim", 0.85)))

    monkeypatch.setattr(promotion, "download_evaluation", read)
    monkeypatch.setattr(evaluations, "compare", functools.partial(compare, num_permutations=199))


class Register:
    """A registered model; a call adds a version, which becomes the candidate."""

    def __init__(self, project: Project, name: str) -> None:
        self.name, self.project = name, project
        self.client, _ = connect(project, Tracking())
        self.client.create_registered_model(name)
        options = {"tracking": Tracking(), "registry": Registry(model_name=name)}
        self.promote, self.rollback, self.history = (
            functools.partial(command, project, **options) for command in (promote, rollback, history)
        )

    def __call__(self, metrics: dict[str, float] = METRICS, **changes: str | None) -> int:
        made = self.client.create_model_version(self.name, source=str(self.project.root), tags=tags(metrics, **changes))
        self.client.set_registered_model_alias(self.name, "candidate", made.version)
        return int(made.version)

    def champion(self, metrics: dict[str, float] = METRICS, **changes: str | None) -> None:
        self(metrics, **changes)
        self.promote()

    def aliases(self) -> dict[str, int]:
        return get_aliases(self.client, self.name)

    def entries(self) -> list[ledger.Entry]:
        return ledger.read_entries(self.client, self.name)


@pytest.fixture
def register(project: Project, request: pytest.FixtureRequest) -> Register:
    return Register(project, re.sub(r"\W+", "-", request.node.name))


def test_versions_of_different_datasets_are_never_compared(register: Register) -> None:
    """Even if the champion was evaluated on the candidate's images since."""
    xrays = {"dataset.fingerprint": "0" * 12, "evaluated.dataset": "0" * 12}
    register.champion(**{"dataset.name": "phantom"})
    register.client.set_model_version_tag(register.name, "1", "evaluated.dataset", "0" * 12)
    register(**{"dataset.name": "xrays"}, **xrays)
    text = rf"/2 was trained on dataset xrays, models:/{register.name}/1 on phantom: .*remove registry\.model_name"
    with pytest.raises(Refused, match=rf"dataset, evaluated with, comparison failed.*{text}") as refused:
        register.promote()
    assert "medgen evaluate" not in str(refused.value)


def test_promotion_moves_the_aliases(register: Register, capsys: Any) -> None:
    first = register()
    assert register.promote()
    assert register.aliases() == {"candidate": first, "champion": first}
    second = register(METRICS | {"reconstruction/ssim": 0.9})
    entry = register.promote()
    assert register.aliases() == {"candidate": second, "champion": second, "previous": first}
    assert entry and (entry.action, entry.before, entry.after, entry.forced) == ("promote", first, second, False)
    assert entry.metrics["reconstruction/ssim"] == 0.9
    output = capsys.readouterr().out
    assert all(text in output for text in ("0.85", "0.9", "nearest_over_limit"))  # not folded at 80 columns


def test_refusal_changes_nothing(register: Register) -> None:
    register.champion()
    before = register.aliases()
    worse = register(**quality(seed=1, shift=0.5))
    with pytest.raises(Refused, match="mmd, c2st failed; version 1 stays champion") as refused:
        register.promote()
    assert refused.value.exit_code == 3
    assert register.aliases() == before | {"candidate": worse}
    assert len(register.entries()) == 1


def test_versions_evaluated_differently_are_refused_with_the_commands_to_run(register: Register) -> None:
    register.champion()
    register(evaluated_extractor="0" * 64)
    name = register.name
    both = rf"`medgen evaluate --model models:/{name}/1` and `medgen evaluate --model models:/{name}/2`"
    with pytest.raises(Refused, match=both):
        register.promote()
    register({})
    with pytest.raises(Refused, match=rf"run `medgen evaluate --model models:/{name}/3`, then promote again"):
        register.promote()


NOT_EVALUATED: dict[str, tuple[dict[str, str | None], str]] = {  # changes of a candidate's tags; a gate that fails
    "tags of an older medgen": (
        {"evaluated.dataset": None, "evaluated.extractor": None, "evaluated.values": None},
        "evaluated with",
    ),
    "no per-image values": ({"evaluated.values": None, "privacy/copy_rate_plausible": None}, "copy_rate"),
}


@pytest.mark.parametrize("case", NOT_EVALUATED)
def test_refusal_of_a_candidate_that_is_not_evaluated_names_the_command(register: Register, case: str) -> None:
    changes, gate = NOT_EVALUATED[case]
    register(**changes)
    command = rf"{gate}.*failed.*`medgen evaluate --model models:/{register.name}/1`, then promote again"
    with pytest.raises(Refused, match=command):
        register.promote()


def test_champion_without_per_image_values(register: Register) -> None:
    """The refusal names the command; after a forced promotion the former champion need not be evaluated."""
    register.champion(**{"evaluated.values": None})
    register()
    command = rf"comparison failed; .*run `medgen evaluate --model models:/{register.name}/1`, then promote again"
    with pytest.raises(Refused, match=command):
        register.promote()
    forced = register.promote(force="its code no longer loads")
    assert forced and forced.gates == ["comparison"]
    register()
    assert register.promote()


def test_each_step_of_a_worsening_chain_is_refused(register: Register) -> None:
    register.champion()
    for step in range(1, 3):  # also after a refusal
        register(METRICS | {"generation/mmd_domain": 0.01 + 0.05 * step}, **quality(seed=step, shift=0.4 * step))
        with pytest.raises(Refused, match="mmd"):
            register.promote()
    assert register.aliases()["champion"] == 1


def test_small_steps_add_up_compared_with_the_best_champion_on_record(register: Register) -> None:
    refusal = ""
    for step in range(12):
        register(METRICS | {"generation/mmd_domain": 0.01 + 0.001 * step}, **quality(seed=step, shift=0.05 * step))
        try:
            register.promote()
        except Refused as error:
            refusal = str(error)
            break
    assert "mmd (version 1)" in refusal
    assert step > 2  # the first steps were too small to detect


def test_steps_within_the_ssim_margin_do_not_add_up() -> None:
    def with_ssim(number: int, ssim: float, **changes: str | None) -> Version:
        return version(number, METRICS | {"reconstruction/ssim": ssim}, **changes)

    def refused(ssim: float) -> set[str]:
        earlier = [with_ssim(1, 0.93, evaluated_extractor="0" * 64), with_ssim(2, 0.850), with_ssim(3, 0.842)]
        comparisons = [(earlier[-1], compared(ssim=earlier[-1].metrics["reconstruction/ssim"] - ssim))]
        gates = check_gates(with_ssim(4, ssim), earlier[-1], Gates(), comparisons, earlier)
        return {gate.name for gate in gates if not gate.passed}

    assert refused(0.840) == set()  # version 1 was evaluated with another extractor
    assert refused(0.839) == {"ssim"}


@pytest.mark.slow
def test_equal_models_are_rarely_refused() -> None:
    refused = 0
    for seed in range(40):
        found = compare_versions(evaluation(2 * seed + 1), evaluation(2 * seed + 2))
        gates = check_gates(version(), CHAMPION, Gates(), [(CHAMPION, found)])
        refused += any(not gate.passed for gate in gates)
    assert refused <= 5


def spread(seed: int, scale: float) -> EvaluationData:
    """An evaluation whose samples have features `scale` times as wide as real ones, after a ReLU."""
    data = evaluation(seed)
    assert data.samples and data.held_out
    draw, real = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    samples = ImageSet((scale * torch.randn(NUM_SAMPLES, 16, generator=draw)).relu(), data.samples.power)
    held_out = ImageSet(torch.randn(60, 16, generator=real).relu(), data.held_out.power)
    return dataclasses.replace(data, samples=samples, held_out=held_out)


SPREAD = {"collapsed candidate": (0.5, 1.0, False), "champion with too much spread": (1.0, 2.0, True)}


@pytest.mark.parametrize("case", SPREAD)
def test_lower_recall_is_accepted_only_from_a_champion_with_too_much_spread(case: str) -> None:
    candidate, champion, promoted = SPREAD[case]
    found = compare_versions(spread(1, candidate), spread(2, champion))
    assert found is not None
    assert {one.name: one for one in found}["recall"].p < 0.05  # lower in both cases
    gates = {gate.name: gate.passed for gate in check_gates(version(), CHAMPION, Gates(), [(CHAMPION, found)])}
    assert gates["recall"] == promoted
    assert all(gates.values()) == promoted


def test_evaluation_is_stored_with_its_version_and_damage_is_detected(project: Project, register: Register) -> None:
    """Use MLflow's artifacts."""
    client, experiment = connect(project, Tracking())
    digest = save_evaluation(project.evaluation, evaluation(3))
    mlflow.set_tracking_uri(store_uri(project, Tracking()))  # create_model_version looks here for the logged model
    logged = client.create_logged_model(experiment, name="kept")
    made = client.create_model_version(
        register.name,
        source=f"models:/{logged.model_id}",
        tags=tags(METRICS, **{"evaluated.values": digest}),
        model_id=logged.model_id,
    )
    client.finalize_logged_model(logged.model_id, "READY")
    version = Version(register.name, int(made.version), "", made.tags)
    assert download_evaluation(version, project, Tracking()) is None  # not uploaded yet
    evaluations.upload_evaluation(client, made, project)
    found = download_evaluation(version, project, Tracking())
    assert found is not None and found.similarity.equal(evaluation(3).similarity)
    save_evaluation(project.evaluation, evaluation(4))
    evaluations.upload_evaluation(client, made, project)  # and killed before setting the tags
    assert download_evaluation(version, project, Tracking()) is None


def test_evaluations_with_other_settings_are_not_compared() -> None:
    other = evaluation()
    other = dataclasses.replace(other, info=dataclasses.replace(other.info, num_generated=100))
    assert compare_versions(evaluation(), other) is None


def test_forced_promotion_is_recorded(register: Register) -> None:
    register(METRICS | {"reconstruction/ssim": 0.1})
    why = "the only version; für alle Ärzte"
    entry = register.promote(force=why)
    assert entry and entry.forced and entry.gates == ["ssim"]
    assert register.entries()[-1].why == why
    assert register.aliases()["champion"] == 1


@pytest.mark.parametrize("why", ["", "  ", "x" * 1001, "red \x1b[31m"])
def test_invalid_reason_is_rejected(project: Project, why: str) -> None:
    with pytest.raises(UserError, match="--force: expected a reason"):
        promote(project, tracking=Tracking(), registry=REGISTRY, force=why)


def test_longest_reason_fits_the_database_column(register: Register) -> None:
    gone = {name: None for name in ("git_commit", "git_dirty", "data_md5", "params_fingerprint")}
    register(METRICS | {"reconstruction/ssim": 0.1, "privacy/copy_rate": 0.9}, **gone)
    entry = register.promote(force="ß" * ledger.MAX_WHY)
    assert entry and len(entry.line) < 5000


@pytest.mark.parametrize(("number", "message"), [(9, "9: no such version"), (None, "candidate: no such version")])
def test_unknown_version_is_named(register: Register, number: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register.promote(version=number)


def test_rollback_goes_back_one_champion_each_time(register: Register) -> None:
    for _ in range(3):
        register.champion()
    back = register.rollback(why="blurred in practice")
    assert (back.before, back.after, back.why) == (3, 2, "blurred in practice")
    assert register.aliases() == {"candidate": 3, "champion": 2, "previous": 1}
    register.rollback()
    assert register.aliases() == {"candidate": 3, "champion": 1}
    with pytest.raises(UserError, match="the champion is 1, and the record has no former champion"):
        register.rollback()
    register.promote()
    assert register.rollback().after == 1


def test_rollback_without_a_registered_model(project: Project) -> None:
    with pytest.raises(UserError, match="models:/nothing: the champion is none"):
        rollback(project, tracking=Tracking(), registry=Registry(model_name="nothing"))


def test_rollback_without_a_champion(register: Register) -> None:
    register()
    with pytest.raises(UserError, match="the champion is none"):
        register.rollback()


def test_ledger_is_in_the_registry_and_in_a_file_that_is_only_appended_to(project: Project, register: Register) -> None:
    file = project.reports / "promotions.jsonl"
    register.champion()
    before = file.read_text()
    register.champion()
    assert file.read_text().startswith(before)
    file.unlink()  # as in a clone on another machine: the file gets all entries
    register.rollback()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["action"], line["before"], line["after"]) for line in lines] == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("rollback", 2, 1),
    ]
    assert all(line["who"] and line["time"].endswith("+00:00") for line in lines)


def test_history_lists_versions_and_promotions(register: Register, capsys: Any) -> None:
    register.champion()
    register(METRICS | {"reconstruction/ssim": 0.4}, data_md5="f" * 32)
    register.promote(force="[bold]a test[/bold]")
    register.history()
    assert "[bold]a" in capsys.readouterr().out  # shown literally
    register.history(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [one["version"] for one in found["versions"]] == [1, 2]
    assert found["versions"][1]["aliases"] == ["candidate", "champion"]
    assert found["promotions"][1]["forced"] is True
    assert found["promotions"][1]["gates"] == ["ssim"]


@pytest.mark.parametrize(("dataset", "numbers"), [("ffff", [2]), ("dddd", [1]), ("ba98", [1, 2])])
def test_history_of_one_dataset(register: Register, dataset: str, numbers: list[int]) -> None:
    register()
    register(data_md5="f" * 32)
    found = register.history(dataset=dataset)
    assert [one["version"] for one in found["versions"]] == numbers


def test_unknown_dataset_is_named(register: Register) -> None:
    register()
    with pytest.raises(UserError, match="--dataset 1234: no version"):
        register.history(dataset="1234")


def test_history_reports_an_alias_moved_by_other_means(register: Register, capsys: Any) -> None:
    register.champion()
    register()
    register.client.set_registered_model_alias(register.name, "champion", "2")
    register.history()
    assert "The champion is version 2, but the last entry of the record says 1" in capsys.readouterr().out


def test_new_metrics_replace_earlier_ones_except_privacy(register: Register) -> None:
    number = register(METRICS | {"generation/fd_inception": 7.0, "refined/ssim": 0.7, "decoded/fd_domain": 3.0})
    later = {"reconstruction/ssim": 0.7, "generation/mmd_domain": 0.3}
    provenance = {"dataset": "later", "extractors": {"domain": {"sha256": "x"}}}
    version = register.client.get_model_version(register.name, str(number))
    assert update_tags(register.client, version, metric_tags(later, provenance))
    found = register.client.get_model_version(register.name, str(number)).tags
    metrics = {key: value for key, value in found.items() if "/" in key}
    assert metrics == {
        "reconstruction/ssim": "0.7",
        "generation/mmd_domain": "0.3",
        **{key: f"{value:g}" for key, value in METRICS.items() if key.startswith("privacy/")},
    }
    assert (found["evaluated.dataset"], found["evaluated.extractor"]) == ("later", "x")


def test_one_of_two_simultaneous_promotions_is_refused(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have checked the gates before either changes the champion. They share nothing but the store."""
    numbers = [register(), register()]
    both_have_checked, change = threading.Barrier(2), promotion._change_champion

    def wait_and_change(*args: Any, **kwargs: Any) -> None:
        both_have_checked.wait(60)
        change(*args, **kwargs)

    monkeypatch.setattr(promotion, "_change_champion", wait_and_change)

    def refusal(number: int) -> str | None:
        try:
            register.promote(version=number)
        except Refused as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        refusals = list(pool.map(refusal, numbers))
    assert refusals.count(None) == 1, refusals
    winner = numbers[refusals.index(None)]
    assert f"version {winner} became champion" in "".join(filter(None, refusals))
    assert register.aliases()["champion"] == winner
    assert [entry.after for entry in register.entries()] == [winner]


def test_lock_has_one_holder_at_a_time(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RETRY_SECONDS", (0.0, 0.02))
    inside, most, done = 0, 0, []

    def work() -> None:
        nonlocal inside, most
        with ledger.promotion_lock(register.client, register.name) as check:
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


def test_lock_of_a_killed_promotion_expires(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "CLAIM_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(ledger, "RETRY_SECONDS", (0.05, 0.05))
    register.client.set_registered_model_tag(register.name, f"{ledger.CLAIM}dead", "someone@somewhere")
    with ledger.promotion_lock(register.client, register.name) as check:
        check()
        (claim,) = ledger._claims(register.client, register.name)
        register.client.delete_registered_model_tag(register.name, claim)
        with pytest.raises(UserError, match="another process took over the promotion lock"):
            check()


def entry(action: Any, after: int, why: str = "why") -> ledger.Entry:
    return ledger.Entry(model="medgen", action=action, before=None, after=after, why=why)


ACTIONS: dict[str, tuple[list[tuple[str, int]], list[int]]] = {
    "one promotion": ([("promote", 1)], [1]),
    "one rollback": ([("promote", 1), ("promote", 2), ("rollback", 1)], [1]),
    "promoted again and rolled back": ([("promote", 1), ("promote", 2), ("promote", 1), ("rollback", 2)], [1, 2]),
    "two rollbacks": ([("promote", n) for n in (1, 2, 3)] + [("rollback", 2), ("rollback", 1)], [1]),
    "rollback to a version never promoted": ([("promote", 1), ("rollback", 5)], [5]),
}


@pytest.mark.parametrize("case", ACTIONS)
def test_standing_champions(case: str) -> None:
    actions, expected = ACTIONS[case]
    assert ledger.standing_champions([entry(action, after) for action, after in actions]) == expected


def test_entry_after_an_incomplete_line_is_readable(register: Register, tmp_path: Path) -> None:
    file = tmp_path / "promotions.jsonl"
    file.write_text('{"key": "to')
    ledger.append_entry(register.client, register.name, entry("promote", 1))
    ledger.append_to_file(register.client, register.name, file)
    assert json.loads(file.read_text().splitlines()[-1])["after"] == 1


def test_rollback_skips_later_champions(register: Register) -> None:
    for _ in range(3):
        register.champion()
    register.client.set_registered_model_alias(register.name, "champion", "2")  # by hand, or an interrupted promotion
    assert register.rollback().after == 1


def test_last_champion_on_record_replaces_a_deleted_one_in_comparisons(register: Register) -> None:
    for _ in range(3):
        register.champion()
    register.client.delete_model_version(register.name, "3")
    register(**quality(seed=1, shift=0.5))
    with pytest.raises(Refused, match="mmd, c2st failed; version 2, the last champion on record, was"):
        register.promote()
    register.client.delete_model_version(register.name, "2")
    assert register.rollback().after == 1


def test_alias_moved_by_other_means_can_be_put_on_record(register: Register, capsys: Any) -> None:
    for _ in range(2):
        register()
    register.promote(version=1)
    register.client.set_registered_model_alias(register.name, "champion", "2")
    assert register.promote(version=2)
    capsys.readouterr()
    register.history()
    assert "The champion is version" not in capsys.readouterr().out


def change_reason(client: Any, name: str, key: str, line: str) -> None:
    client.set_registered_model_tag(name, key, line.replace("all gates passed", "approved by the board"))


def delete_entry(client: Any, name: str, key: str, line: str) -> None:
    client.delete_registered_model_tag(name, key)


@pytest.mark.parametrize("change", [change_reason, delete_entry])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("has_file", [True, False])
def test_changed_and_deleted_entries_are_found(
    project: Project, register: Register, capsys: Any, change: Any, number: int, has_file: bool
) -> None:
    """Without the file of this machine only the last entry can be changed unseen."""
    for _ in range(3):
        register.champion()
    if not has_file:
        (project.reports / "promotions.jsonl").unlink()
    register.history()
    tags = register.client.get_registered_model(register.name).tags
    (key,) = (key for key in tags if key.startswith(f"promotion.{number:06d}."))
    change(register.client, register.name, key, tags[key])
    capsys.readouterr()
    if number == 3 and not has_file:
        register.history()
        return
    with pytest.raises(Refused, match="its record of promotions was changed") as refused:
        register.history()
    assert "Changes of the champion" in capsys.readouterr().out
    assert ("in the registry" in str(refused.value)) == has_file
    register.rollback()  # the record can be continued, and its next entry does not hide the change
    with pytest.raises(Refused, match="its record of promotions was changed"):
        register.history(as_json=True)


def test_promotions_without_a_trusted_signature_are_reported(
    project: Project, register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before the first signed one are covered by its hash of them."""
    key = tmp_path / "signing.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    command = ["openssl", "pkey", "-in", str(key), "-pubout"]
    public = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[1]
    register.champion()
    monkeypatch.setenv("MEDGEN_SIGNING_KEY", str(key))
    register.champion()
    trusted = project.root / "trusted_keys.txt"
    trusted.write_text(public)
    try:
        register.history()
        monkeypatch.delenv("MEDGEN_SIGNING_KEY")
        register.champion()
        with pytest.raises(Refused, match=r"entry 3 has no signature by a key of trusted_keys\.txt"):
            register.history()
    finally:
        trusted.unlink()


def test_entries_of_an_older_medgen_are_no_change(register: Register) -> None:
    register.champion()
    tags = register.client.get_registered_model(register.name).tags
    (key,) = (key for key in tags if key.startswith("promotion."))
    values = json.loads(tags[key])
    del values["previous"]
    register.client.set_registered_model_tag(register.name, key, json.dumps(values))
    (register.project.reports / "promotions.jsonl").unlink()
    register.champion()
    register.history()


@pytest.mark.parametrize("text", ['{"bro', "[]", '{"key": "0"}'])
def test_changed_ledger_entry_is_reported_and_nothing_is_written(
    project: Project, register: Register, text: str
) -> None:
    register()
    register.client.set_registered_model_tag(register.name, "promotion.note", "ours")
    register.client.set_registered_model_tag(register.name, "promotion.000001.ab", text)
    before = register.client.get_registered_model(register.name).tags
    for command in (register.promote, register.rollback, register.history):
        with pytest.raises(UserError, match=r"tag promotion\.000001\.ab: not a valid ledger entry"):
            command()
    assert register.client.get_registered_model(register.name).tags == before


def test_unwritable_ledger_file_is_only_a_warning(tmp_path: Path, project: Project, register: Register) -> None:
    register()
    (project.reports / "promotions.jsonl").unlink(missing_ok=True)
    (project.reports / "promotions.jsonl").mkdir(parents=True)
    try:
        assert register.promote()
    finally:
        (project.reports / "promotions.jsonl").rmdir()
    assert register.aliases()["champion"] == 1


def test_process_that_lost_the_lock_overwrites_no_entry(register: Register) -> None:
    """It was stopped between its last check and its write."""
    register()
    late = entry("promote", 1, "late")
    ledger.append_entry(register.client, register.name, entry("promote", 1, "in time"))
    register.client.set_registered_model_tag(register.name, f"promotion.000001.{late.key}", late.line)
    assert {entry.why for entry in register.entries()} == {"in time", "late"}
