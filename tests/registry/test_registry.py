"""Registering a model: content, lineage and metrics of the version, and loading it elsewhere."""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout

from medgen import registry
from medgen.config import Model, Params, Preprocess, Prior, Project, Refiner, Registry, Tracking
from medgen.errors import UserError
from medgen.evaluation.data import EvaluationData, EvaluationInfo, save_evaluation
from medgen.io import hash_file
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import ANALYTIC, NEURAL, load_prior, sample_images, save_prior
from medgen.priors import refiner as refinement
from medgen.priors.generator import content_hash, load_generator
from medgen.priors.refiner import save_disabled, save_refiner
from medgen.registry.evaluations import download_evaluation
from medgen.registry.model_package import PACKAGE
from medgen.registry.promotion import history
from medgen.registry.versions import download_checked, find_version
from medgen.tracking import PRIOR_ORIGIN, REFINER_ORIGIN, Tracker, lineage
from medgen.tracking.mlflow_sync import STATE_FILE, connect, store_uri

SHAPE = (1, 16, 16)
RUN = "0123456789ab"
DATASET = "ba9876543210"
EXTRACTOR = "e" * 64
EVALUATED = EvaluationData(EvaluationInfo(DATASET, EXTRACTOR, "test", 0, 24, 1.0), torch.rand(5), torch.arange(5))
MODEL = Model(base_channels=8, max_channels=8, latent_channels=4, latent_size=4, attention_resolutions=())


def mlflow_run(project: Project, run: str) -> str:
    run_id: str = json.loads((project.runs / run / STATE_FILE).read_text())["run_id"]
    return run_id


def write_model(project: Project, seed: int, run: str = RUN) -> None:
    """Write an untrained model and an untrained flow prior."""
    torch.manual_seed(seed)
    model = build_model(MODEL, SHAPE, 2)
    preprocess = Preprocess(image_size=SHAPE[1])
    bundle.save(project.model, model, BundleInfo(MODEL, preprocess, SHAPE, ("NORMAL", "ILL"), DATASET, run, "2.15"))
    latents, labels = torch.randn(64, *model.latent_shape), torch.arange(64) % 2
    small = Prior(name="flow", channels=8, blocks=1, sampling_steps=2)
    save_prior(project.prior, NEURAL["flow"].create(latents, labels, 2, small), bundle.digest(project.model))
    save_disabled(project.refiner, bundle.digest(project.model))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after an evaluation; its run is recorded and its model registered as version 1."""
    project = Project(tmp_path_factory.mktemp("project"))
    write_model(project, seed=0)
    with Tracker.open(project.runs / RUN, Tracking(enabled=False), project, "spatial_vae") as tracker:
        tracker.tags(lineage(project, Params(), device="cpu", precision="fp32"))
        tracker.metrics({"val/ssim": 0.8}, step=1)
    project.reports.mkdir()
    (project.reports / "metrics.json").write_text('{"reconstruction/ssim": 0.875, "run/num_test": 100}')
    provenance = {"content": content_hash(project.model, project.prior, project.refiner), "dataset": DATASET}
    provenance |= {"extractors": {"domain": {"sha256": EXTRACTOR}}, "evaluate": {"num_generated": 24}}
    provenance |= {"metrics": hash_file(project.reports / "metrics.json")}
    provenance |= {"evaluation": save_evaluation(project.evaluation, EVALUATED)}
    (project.reports / "provenance.json").write_text(json.dumps(provenance))
    origin = {"sha256": hash_file(project.reports / "provenance.json"), "lineage": lineage(project)}
    (project.runs / RUN / "evaluation.origin.json").write_text(json.dumps(origin))
    version = registry.register(project, params=Params())
    assert (version.number, version.is_new) == (1, True)
    return project


@pytest.fixture
def unreachable_store() -> Tracking:
    """An address where no server listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Tracking(uri=f"http://127.0.0.1:{probe.getsockname()[1]}", timeout_seconds=1)


def expected_images(project: Project, n: int, label: int | None, seed: int) -> np.ndarray:
    model, _ = bundle.load(project.model)
    labels = None if label is None else torch.full((n,), label)
    images = sample_images(load_prior(project.prior, bundle.digest(project.model)), model, n, labels, seed)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_version_belongs_to_the_run_that_trained_it(project: Project) -> None:
    client, _ = connect(project, Tracking())
    version = client.get_model_version("medgen", "1")
    assert version.run_id == mlflow_run(project, RUN)
    run = client.get_run(version.run_id)
    assert run.data.metrics == {"val/ssim": 0.8}
    assert run.info.status == "FINISHED"
    experiment = client.get_experiment_by_name("medgen")
    assert len(client.search_runs([experiment.experiment_id], f"tags.`medgen.run` = '{RUN}'")) == 1


def test_version_has_its_lineage(project: Project) -> None:
    client, _ = connect(project, Tracking())
    version = client.get_model_version_by_alias("medgen", "candidate")
    assert set(lineage(project)) <= set(version.tags)
    assert version.tags["dataset.fingerprint"] == DATASET
    assert version.tags["run"] == RUN
    assert version.tags["reconstruction/ssim"] == "0.875"
    assert "NORMAL, ILL" in version.description


def test_same_content_is_the_same_version(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    version = registry.register(project, params=Params())
    assert (version.number, version.is_new) == (1, False)
    assert "already registered as models:/medgen/1" in capsys.readouterr().out


def test_another_project_in_the_same_process_has_its_own_store(project: Project, tmp_path: Path) -> None:
    registry.find_model(project, tracking=Tracking(), source="models:/medgen/1")
    assert store_uri(Project(tmp_path), Tracking()) == f"sqlite:///{tmp_path}/mlflow.db"


def test_initial_weights_are_a_version_by_number(project: Project) -> None:
    uri, folder = registry.fetcher(project, tracking=Tracking())("models:/medgen@candidate")
    assert uri == "models:/medgen/1"
    assert bundle.digest(folder) == bundle.digest(project.model)
    with pytest.raises(UserError, match="no such version"):
        registry.fetcher(project, tracking=Tracking())("models:/medgen@champion")


def stored_evaluation(project: Project) -> EvaluationData | None:
    client, _ = connect(project, Tracking())
    return download_evaluation(find_version(client, "medgen", 1), project, Tracking())


def evaluation_file(project: Project) -> Path:
    return next((project.root / "mlartifacts").rglob("evaluation.safetensors"))


DAMAGE: dict[str, Callable[[Project], object]] = {
    "none": lambda project: None,
    "damaged": lambda project: evaluation_file(project).write_bytes(b"damaged"),
    "missing": lambda project: shutil.rmtree(evaluation_file(project).parent),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_registering_again_restores_the_evaluation(project: Project, case: str) -> None:
    found = stored_evaluation(project)
    assert found is not None and found.similarity.equal(EVALUATED.similarity)
    DAMAGE[case](project)
    assert (stored_evaluation(project) is None) == (case != "none")
    registry.register(project, params=Params())
    assert stored_evaluation(project) is not None


def test_new_metrics_without_an_evaluation_remove_the_earlier_one(project: Project) -> None:
    """An older medgen stored metrics without per-image values."""
    reports = {name: (project.reports / name).read_text() for name in ("metrics.json", "provenance.json")}
    try:
        (project.reports / "metrics.json").write_text('{"reconstruction/ssim": 0.5}')
        provenance = json.loads(reports["provenance.json"])
        del provenance["evaluation"]
        provenance["metrics"] = hash_file(project.reports / "metrics.json")
        (project.reports / "provenance.json").write_text(json.dumps(provenance))
        registry.register(project, params=Params())
        client, _ = connect(project, Tracking())
        version = find_version(client, "medgen", 1)
        assert version.metrics["reconstruction/ssim"] == 0.5
        assert "evaluated.values" not in version.tags
    finally:
        for name, text in reports.items():
            (project.reports / name).write_text(text)
        registry.register(project, params=Params())


def test_earlier_metrics_of_a_version_are_kept(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever changes metrics.json together with its hash replaces the metrics of a registered version."""
    reports = {name: (project.reports / name).read_text() for name in ("metrics.json", "provenance.json")}
    try:
        (project.reports / "metrics.json").write_text('{"reconstruction/ssim": 0.999}')
        provenance = json.loads(reports["provenance.json"]) | {"metrics": hash_file(project.reports / "metrics.json")}
        (project.reports / "provenance.json").write_text(json.dumps(provenance))
        registry.register(project, params=Params())
        found = history(project, tracking=Tracking(), registry=Registry())
        values = [entry["reconstruction/ssim"] for entry in found["versions"][0]["measurements"]]
        assert values[0] == "0.875" and values[-1] == "0.999"
        assert "was measured again: reconstruction/ssim 0.875, then" in capsys.readouterr().out
    finally:
        for name, text in reports.items():
            (project.reports / name).write_text(text)
        registry.register(project, params=Params())


def test_only_one_process_evaluates_a_version(project: Project) -> None:
    arguments: dict[str, Any] = {"tracking": Tracking(), "registry": Registry(), "source": "models:/medgen@candidate"}
    for _ in range(2):
        with registry.fetch_for_evaluation(project, **arguments) as (_, folder):
            assert (folder / "artifacts" / "model" / "model.json").exists()
            with pytest.raises(Timeout):
                FileLock(f"{folder}.lock", timeout=0).acquire()


def test_evaluation_on_a_server_that_does_not_answer_is_an_error(project: Project, unreachable_store: Tracking) -> None:
    client, _ = connect(project, Tracking())
    with pytest.raises(UserError, match="does not answer"):
        download_evaluation(find_version(client, "medgen", 1), project, unreachable_store)


FRESH = """
import json, sys
import mlflow, numpy, pandas
mlflow.set_tracking_uri(sys.argv[1])
generator = mlflow.pyfunc.load_model("models:/medgen@candidate")
requests = pandas.DataFrame({"n": [3, 70], "label": ["ILL", None], "seed": [5, 6]})
numpy.save(sys.argv[2], generator.predict(requests))
print(json.dumps({"files": [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "medgen"]}))
"""


@pytest.fixture(scope="module")
def fresh(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], np.ndarray]:
    """The files that a new process in another folder imported, and its images of models:/medgen@candidate."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", FRESH, f"sqlite:///{project.root}/mlflow.db", str(folder / "images.npy")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout), np.load(folder / "images.npy")


def test_new_process_generates_the_same_images(project: Project, fresh: tuple[dict[str, Any], np.ndarray]) -> None:
    _, images = fresh
    assert images.dtype == np.uint8
    assert images.shape == (73, 16, 16, 1)
    np.testing.assert_array_equal(images[:3], expected_images(project, 3, 1, 5))
    np.testing.assert_array_equal(images[3:], expected_images(project, 70, None, 6))


def test_version_runs_its_own_code(project: Project, fresh: tuple[dict[str, Any], np.ndarray]) -> None:
    imported, _ = fresh
    assert len(imported["files"]) > 5
    assert all(Path(file).is_relative_to(project.root / "mlartifacts") for file in imported["files"])


def test_version_contains_no_pickle(project: Project) -> None:
    """Nor any other file that loading would execute, except Python source."""
    files = [path for path in (project.root / "mlartifacts").rglob("*") if path.is_file()]
    kinds = {path.suffix or path.name for path in files if "__pycache__" not in path.parts}
    assert {".py", ".safetensors", ".json", "MLmodel"} <= kinds
    assert kinds <= {
        ".py",
        ".safetensors",
        ".json",
        "MLmodel",
        "registered_model_meta",
        ".yaml",
        ".txt",
        ".typed",
        ".html",
        ".md",
        "gitignore",
    }


def test_a_version_does_not_name_folders_of_this_machine(project: Project) -> None:
    files = [path for path in (project.root / "mlartifacts").rglob("*") if path.is_file()]
    assert any(path.name == "MLmodel" for path in files)
    for path in files:
        content = path.read_bytes()
        assert str(project.root).encode() not in content, path
        assert str(PACKAGE).encode() not in content or "__pycache__" in path.parts, path


def test_requirements_cover_what_the_code_imports(project: Project, fresh: tuple[dict[str, Any], np.ndarray]) -> None:
    """The version's requirements.txt lists all packages that the loaded medgen modules import at the top."""
    listed = next((project.root / "mlartifacts").rglob("requirements.txt"))
    lines = listed.read_text().split()
    assert all("==" in line and "+" not in line for line in lines)
    distributions = packages_distributions()
    imported = {
        name
        for file in [*fresh[0]["files"], PACKAGE / "serving" / "pyfunc.py"]
        for name in top_level_imports(Path(file))
    }
    needed = imported - sys.stdlib_module_names - {"medgen"} | {"safetensors"}  # medgen/io.py imports it in functions
    assert {"torch", "mlflow", "ruamel"} <= needed
    listed_names = {line.partition("==")[0] for line in lines}
    assert [name for name in needed if not listed_names & set(distributions[name])] == []


def top_level_imports(file: Path) -> set[str]:
    body = ast.parse(file.read_text()).body
    plain = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in plain | named}


@pytest.fixture(scope="module")
def generator(project: Project) -> Any:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project.root}/mlflow.db")
    return mlflow.pyfunc.load_model("models:/medgen/1")


@pytest.mark.parametrize(
    ("request_row", "message"),
    [
        ({"n": [float("inf")]}, "n: found inf"),
        ({"n": [10**30]}, "n: found 1000.*0000; expected"),
        ({"n": [60000, 6000]}, "66000 images requested; at most 65536 in one call"),
        ({"label": ["ILL"]}, "n, image: found neither in a row"),
        ({"n": [1, 1], "image": [None, "aGk="]}, "n, image: found both in a row"),
        ({"n": [None]}, "n, image: found neither"),
        ({"n": [1], "seed": [-1]}, "seed: found -1; expected a whole number from 0 to"),
        ({"n": [1], "seed": [0.5]}, "seed: found 0.5"),
        ({"n": [1], "label": ["x" * 1000]}, "label: found 'xxx.*xxx'; expected a class"),
        ({"n": [1], "label": [["ILL"]]}, r"label: found \['ILL'\]; expected a class"),
        ({"image": ["aGk="], "seed": [1]}, "seed: found with image"),
        ({"n": [1], "refine": [True]}, "refine: found true, but this version has no refiner; leave it out"),
        ({"image": ["aGk="], "refine": [True]}, "refine: found true, but this version has no refiner"),
        ({"n": [1, 1], "refine": [None, 1.0]}, r"refine: found 1\.0; expected true or false"),
        ({"image": ["aGk="], "label": ["ILL"]}, "spatial_vae does not use labels; leave it out"),
        ({"image": ["aGk="]}, "image: not readable as an image: a text file; expected PNG, JPEG, BMP or TIFF"),
        ({"image": [b"GIF89a"]}, "image: found bytes; expected a file in base64 as text"),
        ({"n": [1], "label": ["DOG"]}, "label: unknown name 'DOG'. Known: ILL, NORMAL"),
    ],
)
def test_invalid_request_is_named(generator: Any, request_row: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        generator.predict(pd.DataFrame(request_row))
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_label_and_seed_are_optional(generator: Any) -> None:
    first, second = (generator.predict(pd.DataFrame({"n": [4]})) for _ in range(2))
    assert first.shape == (4, 16, 16, 1)
    assert not np.array_equal(first, second)  # without a seed, each call draws other images


def test_input_example_is_valid_for_an_unconditional_prior(project: Project, tmp_path: Path) -> None:
    """Such a prior rejects labels, also with labelled data."""
    from types import SimpleNamespace

    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project.root}/mlflow.db")
    example = mlflow.pyfunc.load_model("models:/medgen/1").input_example
    other = Project(tmp_path)
    write_model(other, seed=0)
    latents, labels = torch.randn(64, 4, 4, 4), torch.arange(64) % 2
    save_prior(other.prior, ANALYTIC["normal"].fit(latents, labels, 2, Prior()), bundle.digest(other.model))
    from medgen.serving.pyfunc import Generator

    other_generator = Generator()
    other_generator.load_context(
        SimpleNamespace(artifacts={"model": other.model, "prior": other.prior, "refiner": other.refiner})
    )
    assert other_generator.predict(None, example).shape == (2, 16, 16, 1)


def test_find_model_downloads_a_version(project: Project) -> None:
    folder = registry.find_model(project, tracking=Tracking(), source="models:/medgen@candidate")
    parts = ("model/model.safetensors", "model/model.json", "prior/prior.safetensors", "prior/prior.json")
    for part in (*parts, "refiner/refiner.json"):
        assert (folder / part).read_bytes() == (project.root / "artifacts" / part).read_bytes()


def test_version_registered_before_refiners_existed_has_none(project: Project, tmp_path: Path) -> None:
    (folder,) = (path.parent for path in (project.root / "mlartifacts").rglob("artifacts/refiner"))
    (folder / "refiner").rename(tmp_path / "refiner")
    client, _ = connect(project, Tracking())
    digest = client.get_model_version("medgen", "1").tags["medgen.files"]
    client.delete_model_version_tag("medgen", "1", "medgen.files")  # nor did medgen record hashes then
    try:
        found = registry.find_model(project, tracking=Tracking(), source="models:/medgen/1")
        loaded = load_generator(found / "model", found / "prior", found / "refiner")
        assert loaded.refiner is None
        assert content_hash(found / "model", found / "prior", found / "refiner") == content_hash(
            project.model, project.prior, project.refiner
        )
    finally:
        client.set_model_version_tag("medgen", "1", "medgen.files", digest)
        (tmp_path / "refiner").rename(folder / "refiner")


def add_to_first_line(path: Path) -> None:
    path.write_bytes(b"#" + path.read_bytes())


@pytest.mark.parametrize("name", ["artifacts/model/model.json", "artifacts/params.json", "hashes/files.json"])
@pytest.mark.parametrize("change", [add_to_first_line, Path.unlink])
def test_changed_files_of_a_version_are_refused(project: Project, name: str, change: Callable[[Path], object]) -> None:
    (file,) = (project.root / "mlartifacts").rglob(name)
    content = file.read_bytes()
    change(file)
    try:
        with pytest.raises(
            UserError, match=f"{name}.* in MLflow's store is not the file that was registered|no such v"
        ):
            registry.find_model(project, tracking=Tracking(), source="models:/medgen/1")
    finally:
        file.write_bytes(content)


def test_changed_code_is_refused_and_code_that_was_added_is_not_used(project: Project, tmp_path: Path) -> None:
    """`medgen serve` executes the version's code; a torch.py in the same folder would be imported instead of torch."""
    (code,) = (project.root / "mlartifacts").rglob("code/medgen/io.py")
    content, added = code.read_bytes(), code.parent.parent / "torch.py"
    added.write_text("raise SystemExit")
    try:
        found = download_checked("models:/medgen/1", "", tmp_path / "good", project, Tracking())
        assert (found / "code/medgen/io.py").read_bytes() == content
        assert not (found / "code/torch.py").exists()
        add_to_first_line(code)
        with pytest.raises(UserError, match=r"code/medgen/io\.py in MLflow's store is not the file"):
            download_checked("models:/medgen/1", "", tmp_path / "bad", project, Tracking())
    finally:
        code.write_bytes(content)
        added.unlink()


def test_version_without_a_trusted_signature_is_not_used(project: Project, tmp_path: Path) -> None:
    trusted = project.root / "trusted_keys.txt"
    trusted.write_text("MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n")
    try:
        with pytest.raises(UserError, match=r"models:/medgen/1: no signature by a key of trusted_keys\.txt"):
            registry.find_model(project, tracking=Tracking(), source="models:/medgen/1")
    finally:
        trusted.unlink()


def test_find_model_takes_folders(project: Project, tmp_path: Path) -> None:
    assert registry.find_model(project, tracking=Tracking(), source=None) == project.root / "artifacts"
    with pytest.raises(UserError, match="model: not found"):
        registry.find_model(project, tracking=Tracking(), source=str(tmp_path))


@pytest.mark.parametrize("uri", ["models:/medgen@nobody", "models:/medgen/99", "models:/other/1", "models:/medgen"])
def test_unknown_version_is_named(project: Project, uri: str) -> None:
    with pytest.raises(UserError, match=f"{uri}: no such version.*Registered: models:/medgen"):
        registry.find_model(project, tracking=Tracking(), source=uri)


def test_new_weights_without_a_training_record_are_a_new_candidate(project: Project) -> None:
    """The model came from a DVC remote: its training was recorded on another machine."""
    write_model(project, seed=1, run="fedcba987654")
    try:
        version = registry.register(project, params=Params())
        client, _ = connect(project, Tracking())
        assert (version.number, version.is_new) == (2, True)
        assert client.get_model_version_by_alias("medgen", "candidate").version == 2
        assert version.run_id == mlflow_run(project, "fedcba987654")
        assert version.run_id != mlflow_run(project, RUN)
    finally:
        write_model(project, seed=0)
        assert registry.register(project, params=Params()).number == 1


def test_store_that_does_not_answer(
    project: Project, unreachable_store: Tracking, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="does not answer"):
        registry.register(project, params=Params(tracking=unreachable_store))
    assert registry.register_if_enabled(project, params=Params(tracking=unreachable_store)) is None
    output = capsys.readouterr().err
    assert "warning: tracking.uri" in output
    assert "medgen register" in output


def test_registering_can_be_disabled(project: Project) -> None:
    off = Registry(register_after_evaluate=False)
    assert registry.register_if_enabled(project, params=Params(registry=off)) is None
    assert registry.register_if_enabled(project, params=Params(tracking=Tracking(enabled=False))) is None
    with pytest.raises(UserError, match=r"tracking\.enabled: false"):
        registry.register(project, params=Params(tracking=Tracking(enabled=False)))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    project = Project(tmp_path)
    with pytest.raises(UserError, match="run `medgen train`"):
        registry.register(project, params=Params())
    for part, command in ((project.prior, "medgen prior"), (project.refiner, "medgen refiner")):
        write_model(project, seed=0)
        shutil.rmtree(part)
        with pytest.raises(UserError, match=f"run `{command}`"):
            registry.register(project, params=Params())


@pytest.mark.parametrize("has_origin", [False, True])
def test_version_with_a_refiner_has_its_lineage_and_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_origin: bool
) -> None:
    """If the origin of the refiner is not recorded, the commit of the version is unknown."""
    project, known = Project(tmp_path), {"git.commit": "c" * 40, "git.dirty": "false"}
    write_model(project, seed=0)
    params = Refiner(enabled=True, channels=8, blocks=1, sampling_steps=2)
    scales = torch.full((1,), 0.1), torch.ones(1, SHAPE[1], SHAPE[2] // 2 + 1), torch.ones(4, 4, 4)
    refiner = refinement.Refiner.create(params, SHAPE, 2, *scales)
    save_refiner(project.refiner, refiner, bundle.digest(project.model))
    with Tracker.open(project.runs / RUN, Tracking(enabled=False), project, "spatial_vae") as tracker:
        tracker.tags(known)
    origins = {PRIOR_ORIGIN: project.prior / "prior.json"}
    if has_origin:
        origins[REFINER_ORIGIN] = project.refiner / "refiner.json"
    for name, artifact in origins.items():
        (project.runs / RUN / name).write_text(json.dumps({"sha256": hash_file(artifact), "lineage": known}))

    version = registry.register(project, params=Params())
    client, _ = connect(project, Tracking())
    found = client.get_model_version("medgen", str(version.number))
    assert found.tags["git.commit"] == ("c" * 40 if has_origin else "unknown")
    assert found.tags["git.dirty"] == ("false" if has_origin else "unknown")
    assert "A refiner adds detail" in found.description
    folder = registry.find_model(project, tracking=Tracking(), source=version.uri)
    assert json.loads((folder / "params.json").read_text())["refiner"] == params.model_dump(mode="json")
    for name in ("refiner.json", "refiner.safetensors"):
        assert (folder / "refiner" / name).read_bytes() == (project.refiner / name).read_bytes()

    save_disabled(project.refiner, bundle.digest(project.model))
    assert registry.register(project, params=Params()).is_new, "without the refiner the content differs"


def test_a_clean_rebuild_of_the_same_bytes_becomes_the_origin_which_is_then_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path)
    write_model(project, seed=0)
    client, _ = connect(project, Tracking())
    expected = {"true": ("a", "true"), "false": ("b", "false"), "another": ("b", "false")}
    for (state, (origin, dirty)), made_at in zip(expected.items(), "abc", strict=True):
        lineage_now = {"git.commit": made_at * 40, "git.dirty": dirty, "data.md5": "d" * 32}
        with Tracker.open(project.runs / RUN, Tracking(enabled=False), project, "spatial_vae") as tracker:
            tracker.tags(lineage_now)
        origin_of_prior = {"sha256": hash_file(project.prior / "prior.json"), "lineage": lineage_now}
        (project.runs / RUN / PRIOR_ORIGIN).write_text(json.dumps(origin_of_prior))
        assert registry.register(project, params=Params()).number == 1
        tags = client.get_model_version("medgen", "1").tags
        assert (tags["git.commit"], tags["git.dirty"]) == (origin * 40, dirty), state
    assert "its origin is now commit bbbbbbbbbbbb" in capsys.readouterr().out


def test_ui_rejects_servers_and_ports_in_use(project: Project, unreachable_store: Tracking) -> None:
    with pytest.raises(UserError, match="is a server with its own UI"):
        registry.ui(project, tracking=unreachable_store)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: already in use"):
            registry.ui(project, tracking=Tracking(), port=port)


def test_failed_registration_leaves_the_run_finished(project: Project, monkeypatch: Any) -> None:
    import mlflow

    write_model(project, seed=5)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the artifact store is full")

    monkeypatch.setattr(mlflow.pyfunc, "save_model", fail)
    with pytest.raises(OSError, match="full"):
        registry.register(project, params=Params())
    client, _ = connect(project, Tracking())
    assert client.get_run(mlflow_run(project, RUN)).info.status == "FINISHED"
