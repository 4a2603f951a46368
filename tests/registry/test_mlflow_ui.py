"""Descriptions, metrics and images that MLflow's UI shows; a user's own descriptions are kept."""

import html
import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from PIL import Image

from medgen import registry
from medgen.config import Model, Params, Preprocess, Prior, Project, Refiner, Registry, Tracking
from medgen.io import hash_file
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import ANALYTIC, save_prior
from medgen.priors.generator import content_hash
from medgen.priors.refiner import save_disabled
from medgen.registry import mlflow_ui
from medgen.registry.artifacts import Artifacts
from medgen.tracking import Tracker, read_run
from medgen.tracking.mlflow_descriptions import EXPERIMENT_DESCRIPTION, HASH_TAG, NOTE_TAG, VIEW_TAG
from medgen.tracking.mlflow_sync import STATE_FILE, connect

OFF = Tracking(enabled=False)
MODEL = Model(base_channels=8, max_channels=8, latent_channels=4, latent_size=4, attention_resolutions=())
METRICS = {
    "reconstruction/ssim": 0.8125,
    "reconstruction/pca_ssim": 0.75,
    "generation/kid_domain": 1.5,
    "generation/kid_domain_floor": 0.25,
    "run/num_test": 52,
}
TRAINING = "**spatial_vae** of 1×16×16 images."


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """One store for all tests, because creating one takes seconds; tests use experiments of their own."""
    return Tracking(uri=f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


DATASET = "ba9876543210"


def with_experiment(store: Tracking, experiment: str) -> Tracking:
    return store.model_copy(update={"experiment": experiment})


def info(classes: tuple[str, ...] = ("NORMAL", "ILL"), name: str = "spatial_vae", run: str = "a" * 12) -> BundleInfo:
    model = MODEL.model_copy(update={"name": name})
    return BundleInfo(model, Preprocess(image_size=16), (1, 16, 16), classes, DATASET, run, "2.15")


def artifacts(classes: tuple[str, ...] = ("NORMAL", "ILL"), **others: Any) -> Artifacts:
    """Without files."""
    return Artifacts(Project(Path("nowhere")), info(classes), "gmm", **{"refiner": None, **others})


def write_prior(project: Project, name: str) -> None:
    latents, labels = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    save_prior(
        project.prior, ANALYTIC[name].fit(latents, labels, 2, Prior(components=(1,))), bundle.digest(project.model)
    )
    save_disabled(project.refiner, bundle.digest(project.model))


def write_evaluation(project: Project, metrics: Mapping[str, float] = METRICS, shade: int = 0) -> None:
    """Write the files of an evaluation that the descriptions need."""
    project.figures.mkdir(parents=True, exist_ok=True)
    (project.reports / "metrics.json").write_text(json.dumps(metrics))
    provenance = {"content": content_hash(project.model, project.prior, project.refiner), "dataset": DATASET}
    provenance |= {"extractors": {"domain": {"sha256": "e" * 64}}, "evaluate": {}}
    provenance["metrics"] = hash_file(project.reports / "metrics.json")
    (project.reports / "provenance.json").write_text(json.dumps(provenance))
    Image.new("L", (1600, 400), shade).save(project.figures / "samples.png")


def register(project: Project, store: Tracking, name: str = "chest X-rays") -> Any:
    """Register artifacts/; return the version as the store has it."""
    version = registry.register(project, params=Params(tracking=store, registry=Registry(model_name=name)))
    client, _ = connect(project, store)
    return client.get_model_version(version.name, str(version.number))


@pytest.fixture(scope="module")
def registered(store: Tracking, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, list[Any]]:
    """One model with two priors: two versions of one run, each with its own evaluation."""
    project = Project(tmp_path_factory.mktemp("project"))
    torch.manual_seed(0)
    bundle.save(project.model, build_model(MODEL, (1, 16, 16), 2), info())
    with Tracker.open(project.runs / ("a" * 12), OFF, project, "spatial_vae-16-aaaaaa") as tracker:
        tracker.params({"model": MODEL})
        tracker.note(TRAINING)
        tracker.metrics({"val/ssim": 0.8}, step=3)
    versions = []
    for prior, kid, shade in (("gaussian", 1.5, 64), ("normal", 2.5, 192)):
        write_prior(project, prior)
        write_evaluation(project, METRICS | {"generation/kid_domain": kid}, shade)
        versions.append(register(project, store))
    return project, versions


def shown_metrics(description: str) -> dict[str, list[str]]:
    """Value and reference of each row of the table, by its name."""
    block = description.split("```")[1]
    found = (re.match(r"(\D+?)\s{2,}(.*)", line) for line in block.strip().splitlines()[1:])
    return {row[1]: re.findall(r"[\d.]+", row[2])[:2] for row in found if row}


def samples_file(client: Any, description: str) -> Path:
    """The file that MLflow's server sends for the image in the description."""
    address = urlsplit(re.findall(r"!\[samples\]\((\S+)\)", description)[0])
    assert not address.scheme and not address.path.startswith("/")  # relative, so that it works behind a proxy's prefix
    query = {name: values[0] for name, values in parse_qs(address.query).items()}
    if address.path == "get-artifact":
        root = client.get_run(query["run_uuid"]).info.artifact_uri
    else:
        assert address.path == "model-versions/get-artifact"
        root = client.get_model_version_download_uri(query["name"], query["version"])
    return Path(root.removeprefix("file://"), query["path"])


def test_version_description_shows_its_own_metrics(registered: tuple[Project, list[Any]]) -> None:
    _, versions = registered
    for version in versions:
        tags = version.tags
        assert shown_metrics(version.description) == {
            "SSIM of reconstructions": [tags["reconstruction/ssim"], tags["reconstruction/pca_ssim"]],
            "KID of samples": [tags["generation/kid_domain"], tags["generation/kid_domain_floor"]],
        }
        assert f"models:/chest X-rays/{version.version}'" in version.description  # quoted for the shell
    assert [version.tags["generation/kid_domain"] for version in versions] == ["1.5", "2.5"]


def test_version_keeps_its_own_samples(store: Tracking, registered: tuple[Project, list[Any]]) -> None:
    """Both versions belong to one run, whose samples.png is that of the later version."""
    project, versions = registered
    assert versions[0].run_id == versions[1].run_id
    client, _ = connect(project, store)
    for version, shade in zip(versions, (64, 192), strict=True):
        with Image.open(samples_file(client, version.description)) as image:
            assert image.width <= 640
            assert image.getpixel((5, 5)) == shade


def test_run_description_shows_its_last_evaluation(store: Tracking, registered: tuple[Project, list[Any]]) -> None:
    project, versions = registered
    client, _ = connect(project, store)
    run = client.get_run(versions[1].run_id)
    note = run.data.tags[NOTE_TAG]
    assert note.startswith(TRAINING)
    assert "with the prior normal" in note
    assert note.count("```") == 2
    assert shown_metrics(note)["KID of samples"] == ["2.5", "0.25"]
    with Image.open(samples_file(client, note)) as image:
        assert image.getpixel((5, 5)) == 192
    record = read_run(project.runs / ("a" * 12))
    assert record is not None
    assert record.tags[NOTE_TAG] == note  # MLflow shows the record


def test_logged_model_has_parameters(store: Tracking, registered: tuple[Project, list[Any]]) -> None:
    project, versions = registered
    client, _ = connect(project, store)
    for version in versions:
        logged = client.get_logged_model(version.source.removeprefix("models:/"))
        assert logged.params["model.latent_channels"] == "4"


def test_version_without_evaluation_shows_no_metrics(store: Tracking, registered: tuple[Project, list[Any]]) -> None:
    """The reports on disk are those of the former prior."""
    project, versions = registered
    write_prior(project, "gmm")
    try:
        version = register(project, store)
        assert int(version.version) > int(versions[1].version)
        assert not {"generation/kid_domain", "reconstruction/ssim"} & set(version.tags)
        assert "SSIM" not in version.description
        assert "![" not in version.description
    finally:
        write_prior(project, "normal")


def test_registering_again_updates_metrics_and_keeps_a_users_description(store: Tracking, tmp_path: Path) -> None:
    project = Project(tmp_path)
    bundle.save(project.model, build_model(MODEL, (1, 16, 16), 2), info())
    write_prior(project, "normal")
    write_evaluation(project)
    first = register(project, store, "again")
    write_evaluation(project, METRICS | {"reconstruction/ssim": 0.9375})
    assert shown_metrics(register(project, store, "again").description)["SSIM of reconstructions"][0] == "0.9375"
    client, _ = connect(project, store)
    client.update_model_version(first.name, first.version, "Do not use: see the audit.")
    write_evaluation(project)
    again = register(project, store, "again")
    assert again.description == "Do not use: see the audit."
    assert again.tags["reconstruction/ssim"] == "0.8125"


@pytest.mark.parametrize(
    "name", ["a|b<script>alert(1)</script>", "![x](http://elsewhere/x.png)", "```\n# big", "&lt;", "_it_"]
)
def test_class_names_are_escaped(name: str) -> None:
    text = mlflow_ui.describe_version("medgen", 1, artifacts((name, "ILL")), {"reconstruction/ssim": "0.5"})
    first, rest = text.split("\n\n", 1)
    assert not re.search(r"[<>|`!\[\]\n]|\b_|_\b", first)
    assert name in html.unescape(first)  # as rendered
    assert "SSIM of reconstructions  0.5" in rest


def test_description_of_a_segmentation_model(tmp_path: Path) -> None:
    tags = {"segmentation/dice_foreground": "0.9", "segmentation/dice_foreground_mean_mask": "0.6"}
    unet = Artifacts(Project(tmp_path), info(name="unet"), None, None, metrics={"segmentation/dice_foreground": 0.9})
    unet.project.figures.mkdir(parents=True)
    (unet.project.figures / "samples.png").touch()
    text = mlflow_ui.describe_version("medgen", 2, unet, tags)
    assert "predicts masks of 2 classes" in text
    assert shown_metrics(text) == {"Dice of masks": ["0.9", "0.6"]}
    assert "medgen generate" not in text
    assert "prior" not in text and "refiner" not in text


def test_version_description_names_commands() -> None:
    text = mlflow_ui.describe_version("medgen", 3, artifacts(), {})
    assert "refiner" not in text
    for command in ("generate --model models:/medgen/3", "serve --model models:/medgen/3", "history --reproduce 3"):
        assert f"medgen {command}" in text


def test_descriptions_mention_the_refiner() -> None:
    refined = artifacts(refiner=Refiner(), metrics={"reconstruction/ssim": 0.5})
    text = mlflow_ui.describe_version("medgen", 3, refined, {})
    assert "A refiner adds detail that the decoder omits to new images, unless refine is false." in text
    run = mlflow_ui.describe_run(TRAINING, refined, "r")
    assert "Evaluated on the test split with the prior gmm and its refiner:" in run


def test_model_description_lists_aliases_and_promotions() -> None:
    bare = mlflow_ui.describe_model("medgen", ())
    assert all(f"`{alias}`" in bare for alias in ("champion", "candidate", "previous"))
    assert "models:/medgen@candidate" in bare
    assert "promotions" not in bare
    lines = ["- version 3 in place of 2", "- version 2"]
    assert mlflow_ui.describe_model("medgen", lines).endswith("**Last promotions**\n\n" + "\n".join(lines) + "\n")


def test_new_registered_model_has_a_description(store: Tracking, registered: tuple[Project, list[Any]]) -> None:
    project, _ = registered
    client, _ = connect(project, store)
    assert client.get_registered_model("chest X-rays").description == mlflow_ui.describe_model("chest X-rays", ())


def note_of(project: Project, tracking: Tracking) -> str:
    client, experiment = connect(project, tracking)
    return str(client.get_experiment(experiment).tags.get(NOTE_TAG))


def test_experiment_is_described_and_a_users_description_is_kept(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, tracking = Project(tmp_path), with_experiment(store, "described")
    assert note_of(project, tracking) == EXPERIMENT_DESCRIPTION
    client, experiment = connect(project, tracking)
    monkeypatch.setattr("medgen.tracking.mlflow_sync.EXPERIMENT_DESCRIPTION", "Of a later medgen.")
    assert note_of(project, tracking) == "Of a later medgen."
    for text in ("Mine.", ""):
        client.set_experiment_tag(experiment, NOTE_TAG, text)
        monkeypatch.setattr("medgen.tracking.mlflow_sync.EXPERIMENT_DESCRIPTION", f"Newer than {text!r}.")
        assert note_of(project, tracking) == text


def test_experiment_of_other_tools_is_not_described(store: Tracking, tmp_path: Path) -> None:
    project = Project(tmp_path)
    client, _ = connect(project, with_experiment(store, "first"))
    others = client.create_experiment("shared", tags={"team": "radiology"})
    connect(project, with_experiment(store, "shared"))
    tags = client.get_experiment(others).tags
    assert (tags["team"], NOTE_TAG in tags, HASH_TAG in tags, VIEW_TAG in tags) == ("radiology", False, False, False)


def test_experiment_has_a_view_of_the_summary_unless_a_user_deletes_it(
    store: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's runs table has no metric as a column by default; a saved view has, and is in the list *Views*."""

    def view() -> str | None:
        client, experiment = connect(project, tracking)
        found: str | None = client.get_experiment(experiment).tags.get(VIEW_TAG)
        return found

    project, tracking = Project(tmp_path), with_experiment(store, "viewed")
    shown = json.loads(json.loads(view() or "")["state"])["selectedColumns"]
    assert "metrics.`reconstruction/ssim`" in shown and 10 <= len(shown) <= 16
    monkeypatch.setattr("medgen.tracking.mlflow_sync.EXPERIMENT_VIEW", "Of a later medgen.")
    assert view() == "Of a later medgen."
    client, experiment = connect(project, tracking)
    client.delete_experiment_tag(experiment, VIEW_TAG)
    assert view() is None


def train(project: Project, run: str, *, experiment: Tracking = OFF, **params: object) -> None:
    with Tracker.open(project.runs / run, experiment, project, f"vae-64-{run[:6]}") as tracker:
        tracker.params({"train": {"phases": [{"beta": {"end": 0.1}}, {"beta": {"end": 0.1}}], **params}})


def name_and_changes(project: Project, run: str) -> tuple[str, str | None, str | None]:
    record = read_run(project.runs / run)
    assert record is not None
    return record.name, record.tags.get("differs.from"), record.tags.get("differs.in")


def test_run_is_named_after_its_changed_parameters(tmp_path: Path) -> None:
    project = Project(tmp_path)
    train(project, "aaaaaabbbbbb", seed=0)
    train(project, "ccccccdddddd", seed=1)
    train(project, "eeeeeeffffff", seed=1, phases=[{"beta": {"end": 0.1}}, {"beta": {"end": 1.0}}])
    train(project, "gggggghhhhhh", seed=1, phases=[{"beta": {"end": 0.1}}])
    assert name_and_changes(project, "aaaaaabbbbbb") == ("vae-64-aaaaaa", None, None)
    assert name_and_changes(project, "ccccccdddddd") == ("seed=1 (cccccc)", "vae-64-aaaaaa", "train.seed: 0 → 1")
    assert name_and_changes(project, "eeeeeeffffff") == (
        "phases.1.beta.end=1.0 (eeeeee)", "seed=1 (cccccc)", "train.phases.1.beta.end: 0.1 → 1.0",
    )  # fmt: skip
    assert name_and_changes(project, "gggggghhhhhh")[2] == "train.phases.1.beta.end: 1.0 → –"


def test_run_keeps_its_name_and_many_changes_give_no_name(tmp_path: Path) -> None:
    project = Project(tmp_path)
    train(project, "aaaaaabbbbbb")
    train(project, "ccccccdddddd", seed=1)
    with Tracker.open(project.runs / "ccccccdddddd", OFF, project, "vae") as tracker:
        tracker.params({"prior": {"name": "flow"}})  # a later stage adds its parameters
    train(project, "eeeeeeffffff", a=1, b=2, c=3, d=4)
    train(project, "gggggghhhhhh", a=1, b=2, c=3, d=4)
    train(project, "ccccccdddddd", seed=1)  # resumed
    assert name_and_changes(project, "ccccccdddddd")[0] == "seed=1 (cccccc)"
    name, before, changed = name_and_changes(project, "eeeeeeffffff")
    assert (name, before) == ("vae-64-eeeeee", "seed=1 (cccccc)")
    assert changed is not None
    assert "prior" not in changed
    assert name_and_changes(project, "gggggghhhhhh") == ("vae-64-gggggg", "vae-64-eeeeee", "data or code, no parameter")


def test_mlflow_shows_the_name_and_final_metrics_at_step_0(store: Tracking, tmp_path: Path) -> None:
    """MLflow draws metrics that are only at step 0 as bars; curves keep their epochs. References are not sent."""
    project, tracking = Project(tmp_path), with_experiment(store, "named")
    train(project, "aaaaaabbbbbb", experiment=tracking, seed=0)
    train(project, "ccccccdddddd", experiment=tracking, seed=1)
    with Tracker.open(project.runs / "ccccccdddddd", tracking, project, "vae") as tracker:
        tracker.metrics({"val/ssim": 0.5, "generation/kid_domain": 2.0, "refiner/val_loss": 1.0}, step=40)
        references = ("kid_domain_floor", "recall_real", "kid_domain_ci_low", "kid_domain_ci_high")
        tracker.metrics({f"generation/{name}": 0.5 for name in references}, step=40)
        tracker.metrics({"reconstruction/pca_ssim": 0.5, "privacy/copy_rate_plausible": 0.1}, step=40)
    client, _ = connect(project, tracking)
    run_id = json.loads((project.runs / "ccccccdddddd" / STATE_FILE).read_text())["run_id"]
    run = client.get_run(run_id)
    assert run.info.run_name == "seed=1 (cccccc)"
    steps = {name: [point.step for point in client.get_metric_history(run_id, name)] for name in run.data.metrics}
    assert steps == {"val/ssim": [40], "generation/kid_domain": [0], "refiner/val_loss": [0]}


def test_ui_shows_no_password_in_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every account of the machine can read the commands of running processes."""
    uri = "postgresql://alice:hunter2@host/mlflow"
    called: list[Any] = []
    experiment = SimpleNamespace(get_experiment=lambda _: SimpleNamespace(tags={}))
    monkeypatch.setattr(mlflow_ui, "mlflow_client", lambda *_: nullcontext((experiment, "1")))
    monkeypatch.setattr(mlflow_ui.os, "execve", lambda *arguments: called.append(arguments))
    monkeypatch.chdir(tmp_path)
    mlflow_ui.ui(Project(tmp_path), tracking=Tracking(uri=uri), port=0)
    ((_, command, environment),) = called
    assert "hunter2" not in " ".join(command) and environment["MLFLOW_BACKEND_STORE_URI"] == uri
