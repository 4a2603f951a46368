"""`medgen evaluate`: the metric keys of docs/contract.md, reproducible bytes, one run for training and evaluation."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from ruamel.yaml import YAML
from torch import Tensor, nn

from medgen.config import Evaluate, LocalNetwork, Project, Refiner, Tracking, seed_of
from medgen.data.images import StoredImages, to_stored
from medgen.data.store import StoreWriter, open_store
from medgen.errors import UserError
from medgen.evaluation import context, evaluate, figures, privacy
from medgen.evaluation.context import proportional_labels
from medgen.evaluation.data import load_evaluation
from medgen.evaluation.generation import Samples
from medgen.io import hash_file
from medgen.metrics import generation, inception, mmd, reconstruction
from medgen.metrics.features import load_extractor
from medgen.metrics.local_network import load_local_network
from medgen.metrics.privacy import CERTAIN_COPY, plausible_rate
from medgen.models import bundle
from medgen.priors import load_prior, sample_images
from medgen.priors.generator import content_hash
from medgen.priors.refiner import Refiner as ImageRefiner
from medgen.priors.refiner import load_refiner, save_disabled, save_refiner
from medgen.registry.evaluations import compare_versions
from medgen.reports.figures import write_grid
from medgen.serving import generate as serving
from medgen.tracking import PRIOR_ORIGIN, history, read_run

Trained = Callable[..., Project]
Evaluated = tuple[Project, dict[str, float]]  # a project and its metrics

OFF = Tracking(enabled=False)
SMALL = Evaluate(num_generated=20, batch_size=7, grid_images=10)
KEYS = {
    *(f"reconstruction/{name}" for name in ("l1", "mse", "psnr", "ssim", "pca_ssim")),
    *(f"latent/{name}" for name in ("kl_nats", "active_units")),
    *(f"reconstruction/ssim_ci_{end}" for end in ("low", "high")),
    *(f"{group}/spectrum_ratio_{band}" for group in ("reconstruction", "generation") for band in range(1, 6)),
    *(f"{group}/spectrum_distance" for group in ("reconstruction", "generation")),
    "generation/spectrum_distance_floor",
    *(
        f"generation/{kind}_domain{name}"
        for kind in ("kid", "mmd", "fd")
        for name in ("", "_ci_low", "_ci_high", "_floor")
    ),
    *(
        f"generation/{name}{of}"
        for name in ("precision", "recall", "density", "coverage")
        for of in ("", "_ci_low", "_ci_high", "_real")
    ),
    *(f"generation/ms_ssim_diversity{of}" for of in ("", "_real")),
    *(f"generation/label_accuracy{of}{end}" for of in ("", "_real") for end in ("", "_ci_low", "_ci_high")),
    *(f"privacy/copy_rate{by}" for by in ("", "_features", "_pixels", "_plausible")),
    "privacy/nearest_over_limit",
    *(f"privacy/nearest_train_ratio{by}" for by in ("", "_pixels")),
    "privacy/held_out_limit",
    *(f"privacy/partial_copy_rate{of}" for of in ("", "_plausible")),
    "privacy/nearest_part_over_limit",
    *(f"run/{name}" for name in ("num_train", "num_test", "num_generated")),
}
SPECTRUM = (*(f"spectrum_ratio_{band}" for band in range(1, 6)), "spectrum_distance")
REFINED_KEYS = {  # added by a refiner
    *(f"{group}/{name}" for group in ("decoded", "refined") for name in (*SPECTRUM, "mmd_domain", "fd_domain")),
    *(f"reconstruction/{name}" for name in ("mmd_domain", "fd_domain")),
    *(f"generation/{name}_floor" for name in SPECTRUM if name != "spectrum_distance"),
    "refined/ssim",
    "refined/psnr",
}
REALISM = {  # only with enough patients
    f"generation/c2st_auc{view}{of}"
    for view in ("", "_spectrum", "_domain", "_pixels")
    for of in ("", "_ci_low", "_ci_high", "_floor")
} | {f"privacy/membership_auc_{attack}{end}" for attack in ("loss", "distance") for end in ("", "_ci_low", "_ci_high")}
REPORTS = (
    "summary.json",
    "provenance.json",
    "metrics.json",
    "index.html",
    "MODEL_CARD.md",
    "figures/cases.png",
    "figures/latents.png",
    "figures/samples.png",
    "figures/reconstructions.png",
    "figures/nearest_train.png",
)


@pytest.fixture(scope="module")
def evaluated(tiny_store: Path, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """A project after one evaluation, and its metrics."""
    project = Project(tmp_path_factory.mktemp("evaluated"))
    shutil.copytree(tiny_store, project.dataset)
    trained(project)
    return project, evaluate.run(project, evaluate=SMALL, tracking=OFF)


@pytest.fixture
def project(evaluated: Evaluated, tmp_path: Path) -> Project:
    """Another project with the artifacts of the evaluated one."""
    shutil.copytree(evaluated[0].root / "artifacts", tmp_path / "artifacts")
    return Project(tmp_path)


def add_refiner(project: Project) -> None:
    """Replace the absent refiner with one of random weights."""
    store, params = open_store(project.dataset), Refiner(enabled=True, channels=8, blocks=4, sampling_steps=1)
    _, height, width = store.image_shape
    scales = torch.full((1,), 0.1), torch.ones(1, height, width // 2 + 1), torch.ones(2, 8, 8)
    refiner = ImageRefiner.create(params, store.image_shape, len(store.classes), *scales)
    save_refiner(project.refiner, refiner, bundle.digest(project.model))


@pytest.fixture(scope="module")
def refined(evaluated: Evaluated, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """The same project with a refiner of random weights, after one evaluation, and its metrics."""
    project = Project(tmp_path_factory.mktemp("refined"))
    shutil.copytree(evaluated[0].root / "artifacts", project.root / "artifacts")
    add_refiner(project)
    return project, evaluate.run(project, evaluate=SMALL, tracking=OFF)


def test_metrics_have_the_documented_keys_and_are_sorted(evaluated: Evaluated) -> None:
    project, metrics = evaluated
    text = (project.reports / "metrics.json").read_text()
    assert json.loads(text) == metrics
    assert set(metrics) == KEYS
    assert list(json.loads(text)) == sorted(metrics)
    assert metrics["generation/kid_domain_ci_low"] < metrics["generation/kid_domain"]
    assert metrics["generation/kid_domain"] < metrics["generation/kid_domain_ci_high"]
    assert metrics["run/num_test"] == open_store(project.dataset).counts["test"]
    assert metrics["run/num_generated"] == 20


def test_reconstruction_metrics_cover_every_test_image(evaluated: Evaluated) -> None:
    project, metrics = evaluated
    store, (model, _) = open_store(project.dataset), bundle.load(project.model)
    train, test = (torch.from_numpy(store.split(name).images[:]) for name in ("train", "test"))
    assert len(test) % SMALL.batch_size, "the last batch must be smaller"
    with torch.no_grad():
        rebuilt = model.reconstruct(test.float() / 255)
    ssim = reconstruction.ssim(test.float() / 255, rebuilt).double().mean().item()
    assert metrics["reconstruction/ssim"] == pytest.approx(ssim, rel=1e-4)
    assert metrics["reconstruction/l1"] == pytest.approx((test / 255 - rebuilt).abs().mean().item(), rel=1e-4)
    num_latent = 2 * 8 * 8
    pca = reconstruction.pca_ssim(train, test, [num_latent])[num_latent]  # limited by the number of train images
    assert metrics["reconstruction/pca_ssim"] == pytest.approx(pca, rel=1e-4)


def test_a_second_evaluation_writes_the_same_bytes(evaluated: Evaluated) -> None:
    project, _ = evaluated
    before = {name: (project.reports / name).read_bytes() for name in REPORTS}
    (project.images / "generated").mkdir(parents=True)  # of an earlier model
    torch.rand(3)
    evaluate.run(project, evaluate=SMALL, tracking=OFF)
    assert {name: (project.reports / name).read_bytes() for name in REPORTS} == before
    assert not project.images.exists()


def test_only_one_evaluation_writes_reports(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one that ended at the same time removed its figures."""
    record, locked = evaluate.record_results, []

    def check(*arguments: Any) -> None:
        try:
            FileLock(project.evaluation.with_name("evaluation.lock"), timeout=0).acquire()
        except Timeout:
            locked.append((project.figures / "samples.png").exists())
        record(*arguments)

    monkeypatch.setattr(evaluate, "record_results", check)
    evaluate.run(project, evaluate=SMALL, tracking=OFF)
    assert locked == [True]


def test_results_are_added_to_the_training_run(evaluated: Evaluated) -> None:
    project, metrics = evaluated
    scratch = project.runs / "run0"
    recorded = history(scratch)[-1]
    assert {name: recorded[name] for name in metrics} == metrics
    assert read_run(scratch).params["evaluate.num_generated"] == 20
    lines = [json.loads(line) for line in (scratch / "history.jsonl").read_text().splitlines()]
    kept = {line["key"] for line in lines if line.get("kind") == "artifact" or "sha256" in line}
    assert {"figures/samples.png", "figures/reconstructions.png", "reports/metrics.json"} <= kept
    finished = {line["key"] for line in lines if line["kind"] == "image" and line["step"] == 0}
    assert finished == {"samples", "reconstructions"}  # MLflow's charts of images begin at step 0


def test_reports_contain_no_local_path_and_need_no_other_file(evaluated: Evaluated) -> None:
    project, metrics = evaluated
    for name in ("metrics.json", "index.html", "provenance.json"):
        assert str(project.root) not in (project.reports / name).read_text()
    page = (project.reports / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<img") == 5 and page.count(">real images<") == 3
    for name in ("reconstruction/ssim", "generation/mmd_domain", "generation/kid_domain"):
        low, high = (metrics[f"{name}_ci_{end}"] for end in ("low", "high"))
        assert f"{metrics[name]:.3g} ({low:.3g} to {high:.3g})" in page
    assert f"{metrics['generation/mmd_domain_floor']:.4g}" in page
    assert f"n = {metrics['run/num_test']:.0f} test images, m = 20 samples" in page
    assert f"{metrics['reconstruction/pca_ssim']:.4g}" in page


def test_the_summary_has_the_main_metrics_alone(evaluated: Evaluated) -> None:
    project, metrics = evaluated
    summary = json.loads((project.reports / "summary.json").read_text())
    assert {"reconstruction/ssim", "generation/mmd_domain", "privacy/copy_rate"} <= set(summary) and len(summary) <= 12
    assert summary.items() <= metrics.items()


def test_the_page_has_a_verdict_with_its_power_numbers_by_class_and_a_model_card(evaluated: Evaluated) -> None:
    project, _ = evaluated
    page, card = ((project.reports / name).read_text() for name in ("index.html", "MODEL_CARD.md"))
    verdict = re.search(r'<div class="verdict \w+"><p>(.*?)</p><p>(.*?)</p>', page)
    assert verdict and "in 4 of 5 cases" in verdict[2] and "Variation between" not in verdict[1]
    store = open_store(project.dataset)
    for name in store.classes:
        assert re.search(rf"<td>{name}</td><td[^>]*>\d+</td><td[^>]*>\d+</td><td[^>]*>0\.\d+ \(", page), name
    header = YAML(typ="safe").load(card.split("---\n")[1])
    assert header["library_name"] == "medgen" and header["pipeline_tag"] == "unconditional-image-generation"
    values = {each["type"]: each["value"] for each in header["model-index"][0]["results"][0]["metrics"]}
    assert values["ssim"] == evaluated[1]["reconstruction/ssim"]
    for text in ("Not for diagnosis", "Licence of the images: not recorded"):
        assert text in page and text in card
    assert "model.latent_size" in page and "num_embeddings" not in page, "keys of other families"


def test_the_page_says_what_was_trained_and_not_where(evaluated: Evaluated, project: Project) -> None:
    phases = {
        "one": {"epochs": 3, "learning_rate": 2e-3},
        "two": {"epochs": 2, "beta": {"schedule": "linear", "end": 0.3, "epochs": 4}},
    }
    train = {"seed": 7, "device": "cuda", "phases": phases}
    scratch = project.runs / "run0"
    scratch.mkdir(parents=True)
    (scratch / "params.json").write_text(json.dumps({"loss": {"weights": {"l1": 1.0, "ssim": 0.5}}, "train": train}))
    (scratch / PRIOR_ORIGIN).write_text(
        json.dumps({"sha256": hash_file(project.prior / "prior.json"), "prior": {"name": "gmm", "variance_kept": 0.77}})
    )
    evaluate.run(project, evaluate=SMALL, tracking=OFF)
    page, card = ((project.reports / name).read_text() for name in ("index.html", "MODEL_CARD.md"))
    for text in ("5 epochs in 2 phases", "0 to 0.3 over 4 epochs", "l1 1, ssim 0.5", "0.002", "0.77"):
        assert text in page, text
    assert "train.seed | 7" in card.replace("\\", "") and "cuda" not in page + card


def test_provenance_has_extractor_and_data_and_the_run_has_versions(evaluated: Evaluated) -> None:
    project, _ = evaluated
    found = json.loads((project.reports / "provenance.json").read_text())
    description = json.loads((project.features / "extractor.json").read_text())
    assert found["extractors"]["domain"]["sha256"] == description["sha256"]
    assert found["dataset"] == open_store(project.dataset).fingerprint
    origin = json.loads((project.runs / found["run"] / "evaluation.origin.json").read_text())
    assert origin["lineage"]["version.torch"] == importlib.metadata.version("torch")
    assert origin["sha256"] == hash_file(project.reports / "provenance.json")


@pytest.mark.parametrize("prior", ["normal", "gmm"])
def test_samples_of_an_unconditional_prior_have_no_captions(
    prior: str, tiny_project: Project, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, object] = {}

    def watched(path: Path, images: torch.Tensor, columns: int | None, captions: list[str] | None) -> None:
        drawn.update(n=len(images), captions=captions)
        write_grid(path, images, columns, captions)

    monkeypatch.setattr(figures, "write_grid", watched)
    evaluate.run(trained(tiny_project, prior=prior, conditional=False), evaluate=SMALL, tracking=OFF)
    assert drawn == {"n": 10, "captions": None}


def make_project(folder: Path, images: Tensor, num_train: int, rows: list[dict[str, str]]) -> Project:
    """A project with a store of images (N, 1, 32, 32) in [0, 1], the first in train and the others in test."""
    project = Project(folder)
    project.dataset.parent.mkdir()
    has_attributes = any("sex" in row for row in rows)
    with StoreWriter(project.dataset, (1, 32, 32), with_masks=False, with_attributes=has_attributes) as writer:
        for i, image in enumerate((images * 255).round().to(torch.uint8).numpy()):
            writer.add(image, None, {"path": f"{i}.png", "patient": ""} | rows[i])
        writer.commit(["train"] * num_train + ["test"] * (len(images) - num_train), [], {}, "")
    return project


def test_images_of_16_bits_get_the_metrics_of_the_same_images_in_8(
    evaluated: Evaluated, trained: Trained, tmp_path: Path
) -> None:
    """Copies with 257 times the grey values: the same floats, so that the networks and reconstructions are the same."""
    project, small = Project(tmp_path), open_store(evaluated[0].dataset)
    project.dataset.parent.mkdir()
    with StoreWriter(project.dataset, small.image_shape, with_masks=False, bits=16) as writer:
        splits = []
        for split in map(small.split, small.counts):
            for image, row in zip(split.images, split.rows(), strict=True):
                writer.add(image.astype(np.uint16) * np.uint16(257), None, {**row, "mask": ""})
                splits.append(row.pop("split"))
        writer.commit(splits, [], small.preprocess.model_copy(update={"bits": 16}).model_dump(mode="json"), "", "small")
    metrics = evaluate.run(trained(project), evaluate=SMALL.model_copy(update={"save_images": True}), tracking=OFF)
    assert metrics.keys() == evaluated[1].keys()
    same = [key for key in metrics if key.startswith(("reconstruction/", "latent/", "run/")) and "spectrum" not in key]
    assert {key: metrics[key] for key in same} == pytest.approx({key: evaluated[1][key] for key in same}, rel=1e-6)
    # samples, and reconstructions before their spectrum, are rounded to more grey values
    others = [key for key in metrics if key.startswith("privacy/") or key.endswith(("_floor", "_real"))]
    assert {key: metrics[key] for key in others} == pytest.approx(
        {key: evaluated[1][key] for key in others}, rel=0.05, abs=0.01
    )
    real = sorted((project.images / "real").glob("*.png"))
    test = open_store(project.dataset).split("test").images[:]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in real]), test[:, 0])


def test_unlabelled_images_are_evaluated(trained: Trained, tmp_path: Path) -> None:
    images = torch.rand(30, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    project = make_project(tmp_path, images, 20, [{}] * 30)
    metrics = evaluate.run(trained(project), evaluate=SMALL, tracking=OFF)
    assert set(metrics) == {name for name in KEYS if "label" not in name} | REALISM
    assert metrics["generation/c2st_auc"] == max(
        metrics[f"generation/c2st_auc_{view}"] for view in ("spectrum", "domain", "pixels")
    )
    page = (project.reports / "index.html").read_text()
    assert "Realism (C2ST)" in page and f"{metrics['generation/c2st_auc_pixels']:.2f} by pixels" in page


def test_images_that_are_not_square_are_evaluated(trained: Trained, tmp_path: Path) -> None:
    """Without labels, so that the extractor learns quarter turns, and with 16 bits."""
    random, project = np.random.default_rng(0), Project(tmp_path)
    project.dataset.parent.mkdir()
    with StoreWriter(project.dataset, (1, 32, 48), with_masks=False, bits=16) as writer:
        for number in range(40):
            writer.add(random.integers(0, 65536, (1, 32, 48)).astype(np.uint16), None, {"path": f"{number}.png"})
        writer.commit([*["train"] * 20, *["test"] * 20], [], {"bits": 16, "image_size": [32, 48]}, "")
    metrics = evaluate.run(trained(project), evaluate=SMALL, tracking=OFF)
    assert set(metrics) == {name for name in KEYS if "label" not in name} | REALISM
    assert "32 × 48 px" in (project.reports / "MODEL_CARD.md").read_text()
    written = serving.run(project.model.parent, tmp_path / "new", n=2, file_format="png16")
    assert np.asarray(Image.open(written[0])).shape == (32, 48)


def smooth_images(count: int, seed: int) -> Tensor:
    """Images (N, 1, 32, 32) in [0, 1], each with its own smooth details."""
    coarse = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.15 * nn.functional.interpolate(coarse, (32, 32), mode="bicubic")).clamp(0, 1)


def test_a_model_that_copies_train_images_is_detected_and_a_generalising_one_is_not(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model returns train images, blurred and half of them mirrored; the other returns new images."""
    train_and_test = smooth_images(220, seed=0)
    rows = [
        {"path": f"secret{i}.png", "patient": f"patient{i // 2}", "sex": "FM"[i // 2 % 2], "age": str(i // 5)}
        for i in range(220)
    ]
    project = trained(make_project(tmp_path, train_and_test, 100, rows))
    shown = project.figures / "nearest_train.png"
    contents = {}
    replayed = torch.cat([train_and_test[:50], train_and_test[50:100].flip(-1)])
    for name, images in (("copies", replayed), ("new", smooth_images(100, seed=1))):
        soft = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        monkeypatch.setattr(evaluate, "draw_samples", lambda _, soft=soft: Samples(to_stored(soft, 8), None))
        metrics = evaluate.run(project, evaluate=SMALL, tracking=OFF)
        rate, page = metrics["privacy/copy_rate"], (project.reports / "index.html").read_text()
        assert rate == max(metrics["privacy/copy_rate_pixels"], metrics["privacy/copy_rate_features"])
        assert rate > 0.95 if name == "copies" else rate <= 0.03
        assert metrics["privacy/copy_rate_plausible"] == pytest.approx(plausible_rate(len(soft), num_patients=60))
        assert (metrics["privacy/nearest_over_limit"] < CERTAIN_COPY) == (name == "copies")
        assert ("reproduces patients" in page) == ("is a copy of a train image" in page) == (name == "copies")
        found = {end: metrics[f"privacy/membership_auc_distance_ci_{end}"] for end in ("low", "high")}
        assert found["low"] > 0.9 if name == "copies" else found["low"] < 0.5 < found["high"]
        assert ("can guess better than by chance" in page) == (name == "copies")
        partial, chance = (metrics[f"privacy/partial_copy_rate{of}"] for of in ("", "_plausible"))
        assert (partial > chance) == (name == "copies")
        groups = {key.split("/")[1] for key in metrics if key.startswith("fairness/")}
        assert groups == {"sex_F", "sex_M", "age_18-39", "age_40-59"}
        ssim = load_evaluation(project.evaluation).similarity[torch.arange(120) // 2 % 2 == 0].mean()
        assert metrics["fairness/sex_F/ssim"] == pytest.approx(float(ssim), rel=1e-5)
        assert "By sex, age and view" in page
        assert "secret" not in page and "patient1" not in page
        contents[name] = shown.read_bytes()
    assert contents["copies"] != contents["new"]
    with Image.open(shown) as image:
        assert image.height >= 2 * 96 and image.width >= 10 * 96


class SmallInception(nn.Module):
    """Replaces the network: 6 features of the bytes, which are also the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 6)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layer(images.flatten(1).float() / 255)
        return features, features


def bytes_of(folder: Path) -> Tensor:
    images = [torch.tensor(list(Image.open(path).get_flattened_data())) for path in sorted(folder.iterdir())]
    return torch.stack(images).reshape(-1, 1, 32, 32).to(torch.uint8)


def test_inception_metrics_are_those_of_the_saved_images(
    evaluated: Evaluated, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = inception.Inception(SmallInception())
    monkeypatch.setattr(context, "checked_weights", Path)
    monkeypatch.setattr(context, "load_inception", lambda path: network if path == Path("inception") else None)
    (project.images / "generated").mkdir(parents=True)
    (project.images / "generated" / "99999.png").touch()  # of an earlier evaluation
    params = SMALL.model_copy(update={"extractors": ("domain", "inception"), "save_images": True})
    metrics = evaluate.run(project, evaluate=params, tracking=OFF)

    more = {f"generation/{name}" for name in ("inception_score", "inception_score_real", "fd_inception_floor")}
    more |= {f"generation/{kind}_inception{end}" for kind in ("kid", "mmd") for end in ("", "_floor")}
    more |= {f"generation/{kind}_inception_ci_{end}" for kind in ("kid", "mmd") for end in ("low", "high")}
    more.add("generation/fd_inception")
    assert set(metrics) == KEYS | more
    assert {name: metrics[name] for name in KEYS} == evaluated[1]
    generated, real = (bytes_of(project.images / name) for name in ("generated", "real"))
    assert real.equal(torch.from_numpy(open_store(project.dataset).split("test").images[:]))
    assert len(generated) == 20
    seen, other = network(generated).features, network(real).features
    expected = generation.frechet_distance(other, seen)
    groups = open_store(project.dataset).split("test").patients
    assert metrics["generation/fd_inception"] == pytest.approx(expected, rel=1e-4)
    assert metrics["generation/kid_inception"] == pytest.approx(mmd.kid(other, seen, groups).value, rel=1e-4)
    found = json.loads((project.reports / "provenance.json").read_text())["extractors"]
    assert found["inception"]["sha256"].startswith("6726825d") and found["domain"]["sha256"]
    page = (project.reports / "index.html").read_text()
    assert f"20 samples against all {len(real)} test images" in page and "inception, 6726825d" in page


def test_without_weights_inception_metrics_are_absent_with_a_warning(
    evaluated: Evaluated,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "weights"))
    params = SMALL.model_copy(update={"extractors": ("domain", "inception")})
    assert evaluate.run(project, evaluate=params, tracking=OFF) == evaluated[1]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    for word in ("no Inception Score and no FID", "medgen weights fetch inception", "MEDGEN_WEIGHTS", "https://"):
        assert word in warnings[0]
    page = (project.reports / "index.html").read_text()
    assert "medgen weights fetch inception" in page and str(tmp_path) not in page
    assert list(json.loads((project.reports / "provenance.json").read_text())["extractors"]) == ["domain"]
    assert not project.images.exists()


def test_a_local_network_gives_distances_with_references(
    evaluated: Evaluated, project: Project, tmp_path: Path
) -> None:
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(0)
    save_file(resnet18(weights=None).state_dict(), tmp_path / "radiology.safetensors")
    digest = hash_file(tmp_path / "radiology.safetensors")
    local = LocalNetwork(path="radiology.safetensors", sha256=digest, architecture="resnet18", image_size=32)
    params = SMALL.model_copy(update={"extractors": ("domain", "local"), "local": local, "save_images": True})
    metrics = evaluate.run(project, evaluate=params, tracking=OFF)

    more = {f"{kind}_local{end}" for kind in ("kid", "mmd", "fd") for end in ("", "_floor")}
    more |= {f"{kind}_local_ci_{end}" for kind in ("kid", "mmd") for end in ("low", "high")}
    assert set(metrics) == set(evaluated[1]) | {f"generation/{name}" for name in more}
    network = load_local_network(local, tmp_path)
    seen, other = (network(bytes_of(project.images / name)) for name in ("generated", "real"))
    expected = generation.frechet_distance(other, seen)
    assert metrics["generation/fd_local"] == pytest.approx(expected, rel=1e-4)
    assert metrics["generation/kid_local"] > metrics["generation/kid_local_floor"]
    found = json.loads((project.reports / "provenance.json").read_text())["extractors"]
    assert found["local"]["sha256"] == digest
    page = (project.reports / "index.html").read_text()
    assert "FID (local network)" in page and "KID (local network)" in page

    wrong = params.model_copy(update={"local": local.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(UserError, match=f"SHA-256 is {digest}, but"):
        evaluate.run(project, evaluate=wrong, tracking=OFF)


def test_sample_labels_have_the_class_proportions_of_the_train_split() -> None:
    labels = proportional_labels(torch.tensor([0.5, 0.0, 0.26, 0.24]), 10)
    assert torch.bincount(labels, minlength=4).tolist() == [5, 0, 3, 2]
    assert len(proportional_labels(torch.full((3,), 1 / 3), 100)) == 100


def other_dataset(project: Project) -> None:
    path = project.features / "extractor.json"
    path.write_text(path.read_text().replace(open_store(project.dataset).fingerprint, "0" * 12))


def other_model(project: Project) -> None:
    """As after `medgen train` without `medgen prior`: latents of the same shape, of other weights."""
    model, info = bundle.load(project.model)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    bundle.save(project.model, model, info)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda project: shutil.rmtree(project.model), "medgen train"),
        (lambda project: shutil.rmtree(project.prior), "medgen prior"),
        (lambda project: shutil.rmtree(project.refiner), "medgen refiner"),
        (lambda project: shutil.rmtree(project.features), "medgen features"),
        (other_dataset, r"extractor\.json: the extractor was trained on dataset 000000000000"),
        (other_model, "run `medgen prior` again"),
    ],
    ids=["no model", "no prior", "no refiner", "no extractor", "extractor of other data", "prior of another model"],
)
def test_missing_or_mismatched_parts_are_errors_that_name_them(
    damage: Callable[[Project], None], message: str, project: Project
) -> None:
    damage(project)
    with pytest.raises(UserError, match=message):
        evaluate.run(project, evaluate=SMALL, tracking=OFF)
    assert not project.reports.exists()


def test_a_refiner_changes_generation_metrics_and_not_reconstruction_metrics(
    evaluated: Evaluated, refined: Evaluated
) -> None:
    (project, metrics), plain = refined, evaluated[1]
    assert set(metrics) == KEYS | REFINED_KEYS
    same = {name for name in KEYS if name.startswith(("reconstruction/", "latent/", "run/")) or name.endswith("_floor")}
    assert {name: metrics[name] for name in same} == {name: plain[name] for name in same}
    assert metrics["generation/spectrum_ratio_5"] != plain["generation/spectrum_ratio_5"]
    assert metrics["privacy/nearest_train_ratio_pixels"] != plain["privacy/nearest_train_ratio_pixels"]
    assert {name: metrics[f"decoded/{name}"] for name in (*SPECTRUM, "mmd_domain", "fd_domain")} == {
        name: plain[f"generation/{name}"] for name in (*SPECTRUM, "mmd_domain", "fd_domain")
    }, "the same samples before refinement"
    facts = json.loads((project.reports / "provenance.json").read_text())
    assert facts["content"] == content_hash(project.model, project.prior, project.refiner)
    again = {name: (project.reports / name).read_bytes() for name in (*REPORTS, "figures/samples_decoded.png")}
    assert evaluate.run(project, evaluate=SMALL, tracking=OFF) == metrics
    assert {name: (project.reports / name).read_bytes() for name in again} == again


def test_saved_samples_are_refined_samples(refined: Evaluated, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(refined[0].root / "artifacts", tmp_path / "artifacts")
    evaluate.run(project, evaluate=SMALL.model_copy(update={"save_images": True}), tracking=OFF)
    digest = bundle.digest(project.model)
    prior, refiner = load_prior(project.prior, digest), load_refiner(project.refiner, digest)
    model, _ = bundle.load_generative(project.model)
    labels = proportional_labels(prior.frequencies, 20)
    expected = sample_images(prior, model, 20, labels, SMALL.seed, SMALL.batch_size, refiner)
    assert bytes_of(project.images / "generated").equal(to_stored(expected, 8))


def test_refined_reconstructions_are_compared_with_their_originals(refined: Evaluated) -> None:
    """Computed again with the refiner's public functions."""
    project, metrics = refined
    test = open_store(project.dataset).split("test")
    (model, _), refiner = bundle.load(project.model), load_refiner(project.refiner, bundle.digest(project.model))
    assert refiner is not None
    originals, labels = torch.from_numpy(test.images[:]).float() / 255, torch.from_numpy(test.labels.copy())
    with torch.no_grad():
        decoded = model.reconstruct(originals, labels)
    parts = []
    for rows in torch.split(torch.arange(len(labels)), SMALL.batch_size):
        generator = torch.Generator().manual_seed(seed_of(SMALL.seed, 4, int(rows[0])))
        parts.append(refiner.refine(decoded[rows], torch.zeros(len(rows)), labels[rows], generator))
    images = torch.cat(parts)
    ssim = reconstruction.ssim(originals, images).double().mean().item()
    assert metrics["refined/ssim"] == pytest.approx(ssim, rel=1e-4)
    assert metrics["refined/ssim"] < metrics["reconstruction/ssim"], "an untrained refiner adds noise"
    extractor, _ = load_extractor(project.features)
    with torch.no_grad():
        features = [extractor(to_stored(each, 8).float() / 255) for each in (images, originals)]
    expected = generation.frechet_distance(features[1], features[0])
    assert metrics["refined/fd_domain"] == pytest.approx(expected, rel=1e-3)


def test_the_page_compares_metrics_before_and_after_the_refiner(evaluated: Evaluated, refined: Evaluated) -> None:
    (project, metrics), plain = refined, evaluated[0]
    page = (project.reports / "index.html").read_text()
    assert "Fidelity and realism" in page and "perception-distortion" in page and page.count("<img") == 6
    for name, group in (
        ("decoder&#39;s reconstructions", "reconstruction"),
        ("refined reconstructions", "refined"),
        ("samples without the refiner", "decoded"),
        ("refined samples", "generation"),
    ):
        row = next(line for line in page.split("<tr>") if line.startswith(f"<td>{name}</td>"))
        for key in ("spectrum_ratio_5", "spectrum_distance", "fd_domain", "mmd_domain"):
            assert f">{metrics[f'{group}/{key}']:.3g}<" in row
    assert "decoded and not refined" in page and "over refined reconstructions" in page
    assert "Fidelity and realism" not in (plain.reports / "index.html").read_text()
    heights = []
    for folder in (project, plain):
        with Image.open(folder.figures / "reconstructions.png") as image:
            heights.append(image.height)
    assert heights[0] > heights[1], "a third row"
    with (
        Image.open(project.figures / "samples_decoded.png") as decoded,
        Image.open(plain.figures / "samples.png") as own,
    ):
        assert decoded.tobytes() == own.tobytes()


def test_a_figure_of_an_earlier_refiner_is_deleted(evaluated: Evaluated, refined: Evaluated, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(refined[0].root, tmp_path, dirs_exist_ok=True)
    save_disabled(project.refiner, bundle.digest(project.model))
    assert evaluate.run(project, evaluate=SMALL, tracking=OFF) == evaluated[1]
    assert not (project.figures / "samples_decoded.png").exists()


def test_a_search_does_not_evaluate_refined_reconstructions(refined: Evaluated, tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(refined[0].root / "artifacts", tmp_path / "artifacts")
    found = evaluate.evaluate_validation(project, evaluate=SMALL)
    assert "generation/mmd_domain" in found and not set(found) & REFINED_KEYS


def test_classes_with_enough_images_have_their_own_metrics(trained: Trained, tmp_path: Path) -> None:
    """Keys have the index of the class, because MLflow does not allow all characters of class names."""
    labels = ["b (früh)", "a"] * 12 + ["b (früh)"] * 21 + ["a"] * 9
    project = trained(make_project(tmp_path, smooth_images(54, seed=0), 24, [{"label": label} for label in labels]))
    add_refiner(project)
    metrics = evaluate.run(project, evaluate=SMALL, tracking=OFF)
    names = (*SPECTRUM, *(f"mmd_domain{end}" for end in ("", "_ci_low", "_ci_high")))
    assert {name for name in metrics if "class_" in name} == {f"generation/class_1/{name}" for name in names}
    assert {name for name in metrics if name.startswith("refined/c2st_auc")} == {
        "refined/c2st_auc_spectrum",
        "refined/c2st_auc_domain",
    }
    page = (project.reports / "index.html").read_text()
    table = page.partition("Realism of refined samples by class")[2]
    row = next(line for line in table.split("<tr>") if line.startswith("<td>b (früh)</td>"))
    assert f">{metrics['generation/class_1/spectrum_ratio_5']:.3g}<" in row
    assert read_run(project.runs / "run0").metrics[-1]["generation/class_1/mmd_domain"] == pytest.approx(
        metrics["generation/class_1/mmd_domain"]
    )


def test_too_few_generated_images_are_an_error(evaluated: Evaluated) -> None:
    with pytest.raises(UserError, match=r"evaluate\.num_generated: found 2, expected at least 3"):
        evaluate.run(evaluated[0], evaluate=Evaluate(num_generated=2), tracking=OFF)


def test_a_model_trained_on_other_data_has_no_privacy_metrics(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version in another folder; on the same data its metrics equal those of `run`."""
    project, metrics = evaluated
    version = tmp_path / "version"
    for part in ("model", "prior", "refiner"):
        shutil.copytree(project.root / "artifacts" / part, version / "artifacts" / part)
    before = (project.reports / "metrics.json").read_bytes()
    found = evaluate.evaluate_version(project, folder=version, evaluate=SMALL)
    assert found == {name: metrics[name] for name in found}
    assert {name for name in metrics if name not in found} == {
        "reconstruction/pca_ssim",
        *(f"generation/{name}_floor" for name in ("kid_domain", "mmd_domain", "fd_domain", "spectrum_distance")),
        *(f"generation/ms_ssim_diversity{of}" for of in ("", "_real")),
        *(f"generation/{name}_real" for name in ("precision", "recall", "density", "coverage")),
    }
    assert json.loads((version / "reports" / "metrics.json").read_text()) == found

    description = version / "artifacts" / "model" / "model.json"
    description.write_text(description.read_text().replace(open_store(project.dataset).fingerprint, "0" * 12))
    elsewhere = evaluate.evaluate_version(project, folder=version, evaluate=SMALL)
    assert elsewhere == {name: value for name, value in found.items() if not name.startswith("privacy/")}
    assert "warning: trained on dataset 000000000000" in capsys.readouterr().err
    assert (project.reports / "metrics.json").read_bytes() == before

    description.write_text(description.read_text().replace('"NORMAL"', '"HEALTHY"'))
    with pytest.raises(UserError, match=r"classes .* but .* was made for .*HEALTHY"):
        evaluate.evaluate_version(project, folder=version, evaluate=SMALL)


def test_of_a_large_split_some_images_are_compared_with_samples(
    evaluated: Evaluated, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reconstructions are still those of all images, and versions can be compared."""
    monkeypatch.setattr(context, "MAX_HELD_OUT", 5)
    monkeypatch.setattr(privacy, "MIN_SEARCHED", 3)
    monkeypatch.setattr(privacy, "MAX_PAIRS", 1)
    expected, metrics = evaluated[1], evaluate.run(project, evaluate=SMALL, tracking=OFF)
    assert metrics is not None and set(metrics) == set(expected)
    assert metrics["generation/mmd_domain"] != expected["generation/mmd_domain"]
    assert metrics["privacy/nearest_train_ratio_pixels"] != expected["privacy/nearest_train_ratio_pixels"]
    for name, value in expected.items():
        if name.startswith(("reconstruction/", "latent/")) and name != "reconstruction/pca_ssim":
            assert metrics[name] == value
    data = load_evaluation(project.evaluation)
    assert data.held_out is not None
    assert len(data.held_out.features) == 5 < metrics["run/num_test"] == len(data.similarity)
    assert compare_versions(data, data) is not None


def test_images_are_read_a_batch_at_a_time(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for copies and all features and scores; benchmarks/large_evaluation.py measures the memory."""
    sizes: list[int] = []
    read, compute = StoredImages.__getitem__, evaluate.compute

    def counted(images: StoredImages, index: slice | Tensor) -> Tensor:
        found = read(images, index)
        sizes.append(len(found))
        return found

    def computed(parts: context.EvaluationContext) -> evaluate.Computed:
        with monkeypatch.context() as patch:
            patch.setattr(StoredImages, "__getitem__", counted)
            return compute(parts)

    monkeypatch.setattr("medgen.metrics.privacy._IMAGES_PER_BATCH", 4)
    monkeypatch.setattr("medgen.metrics.privacy._VALUES_PER_BLOCK", 1)
    monkeypatch.setattr(privacy, "_IMAGES_PER_BLOCK", 4)
    monkeypatch.setattr(evaluate, "compute", computed)
    evaluate.run(project, evaluate=SMALL.model_copy(update={"batch_size": 4}), tracking=OFF)
    assert max(sizes) == 4


@pytest.mark.slow
def test_two_processes_compute_what_one_does(refined: Evaluated, tmp_path: Path) -> None:
    """There are fewer batches of test images than processes; the samples are the same images."""
    params = SMALL.model_copy(update={"save_images": True})
    plain = {"evaluate": params.model_dump(mode="json"), "tracking": {"enabled": False}}
    one, two = Project(tmp_path / "one"), Project(tmp_path / "two")
    for project in (one, two):
        shutil.copytree(refined[0].root / "artifacts", project.root / "artifacts")
        (project.root / "params.yaml").write_text(json.dumps(plain))
    metrics = evaluate.run(one, evaluate=params, tracking=OFF)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "medgen", "evaluate"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=two.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((two.reports / "metrics.json").read_text()) == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    assert bytes_of(two.images / "generated").equal(bytes_of(one.images / "generated"))
