"""Stage `utility`: classifiers trained on real images and on samples tell a useful model from a useless one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medgen.config import Evaluate, Features, Prior, Project, Tracking, Utility
from medgen.data.store import StoreWriter, open_store
from medgen.errors import UserError
from medgen.evaluation import evaluate, utility
from medgen.evaluation.training_sets import (
    BOTH,
    CLASSIFICATION,
    REAL,
    SEGMENTATION,
    TrainingSet,
    UtilityResult,
    UtilityTask,
    utility_metrics,
)
from medgen.evaluation.utility import choose_rows
from medgen.io import hash_file
from medgen.models import bundle
from medgen.priors import ANALYTIC, save_prior

Trained = Callable[..., Project]

FEATURES = Features(width=4, batch_size=8, learning_rate=1e-2)
SMALL = Utility(enabled=True, fractions=(0.2,), repetitions=2, steps=3, num_generated=30)
CPU = torch.device("cpu")


def draw_blobs(labels: Tensor, seed: int) -> Tensor:
    """Images (N, 1, 32, 32) uint8 with a bright spot above the middle in class 0 and below it in class 1."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.rand(len(labels), 1, 32, 32, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top = (4 if label == 0 else 20) + int(torch.randint(4, (), generator=generator))
        image[0, top : top + 6, 12:20] += 0.5
    return (255 * images).to(torch.uint8)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 train and 40 test images in two classes."""
    folder = tmp_path_factory.mktemp("blobs") / "dataset"
    images = draw_blobs(torch.arange(80) % 2, seed=0)
    with StoreWriter(folder, (1, 32, 32), with_masks=False) as writer:
        for number, image in enumerate(images.numpy()):
            row = {"path": f"{number}.png", "patient": f"p{number // 4}", "label": "ab"[number % 2]}
            writer.add(image, None, row)
        writer.commit(["train"] * 40 + ["test"] * 40, [], {}, "")
    return folder


def test_useful_samples_train_a_classifier_and_swapped_labels_ruin_it(blobs: Path) -> None:
    store = open_store(blobs)
    labels = torch.arange(30) % 2
    params = SMALL.model_copy(update={"steps": 30, "fractions": ()})
    for name, given in (("useful", labels), ("swapped", 1 - labels)):
        result = utility.compare_classifiers(store, draw_blobs(labels, seed=1), given, FEATURES, params, CPU)
        assert [each.key for each in result.sets] == ["synthetic", "real", "both"]
        metrics = utility_metrics(store, [result])
        assert metrics["utility/accuracy_real"] > 0.9
        accuracy, gain = metrics["utility/accuracy_synthetic"], metrics["utility/gain_synthetic"]
        assert gain == pytest.approx(accuracy - metrics["utility/accuracy_real"])
        assert accuracy > 0.9 if name == "useful" else metrics["utility/gain_synthetic_ci_high"] < -0.5
        assert metrics["utility/accuracy_real_ci_low"] < metrics["utility/accuracy_real"]


def test_all_sets_have_the_same_number_of_steps_and_classes_come_evenly(
    blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = utility.F.cross_entropy

    def watched(scores: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return original(scores, targets)

    monkeypatch.setattr(utility.F, "cross_entropy", watched)
    labels = (torch.arange(30) % 5 == 0).long()
    result = utility.compare_classifiers(open_store(blobs), draw_blobs(labels, 1), labels, FEATURES, SMALL, CPU)
    assert [each.key for each in result.sets] == ["synthetic", "real_20", "both_20", "real", "both"]
    assert [each.num_real for each in result.sets] == [0, 8, 8, 40, 40], "20 %: two patients with four images each"
    assert len(seen) == SMALL.repetitions * 5 * SMALL.steps and {len(batch) for batch in seen} == {8}
    assert torch.cat(seen).float().mean() == pytest.approx(0.5, abs=0.12)


def test_subsets_are_nested_and_consist_of_whole_patients() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 6 + [-1] * 4)
    patients = [f"p{row // 3}" for row in range(100)]
    few, many = (choose_rows(labels, patients, fraction, seed=3) for fraction in (0.2, 0.5))
    assert set(few.tolist()) < set(many.tolist())
    assert choose_rows(labels, patients, 1.0, seed=3).tolist() == list(range(96)), "unlabelled images are left out"
    assert choose_rows(labels, patients, 0.2, seed=4).tolist() != few.tolist()
    for rows, fraction in ((few, 0.2), (many, 0.5)):
        counts = torch.bincount(labels[rows], minlength=3)
        assert (counts >= fraction * torch.tensor([60, 30, 6])).all()
        assert (counts <= fraction * torch.tensor([60, 30, 6]) + 3).all()
        chosen = {patients[row] for row in rows.tolist()}
        assert sum(patients.count(name) for name in chosen) == len(rows)


@pytest.mark.parametrize("task", [CLASSIFICATION, SEGMENTATION], ids=["accuracy", "Dice"])
def test_intervals_cover_the_gain_over_other_patients_and_trainings(task: UtilityTask) -> None:
    """Simulated scores: each patient has its own difficulty, each training its own skill."""
    generator = torch.Generator().manual_seed(0)
    sets = tuple(TrainingSet(kind, 100.0, 1, 1) for kind in (REAL, BOTH))
    labels, groups, covered = torch.arange(80) % 2, [row // 2 for row in range(80)], 0
    classes = (0, 1) if task is CLASSIFICATION else ()
    for _ in range(100):
        difficulty = torch.randn(40, generator=generator).repeat_interleave(2)
        skill = 0.3 * torch.randn(2, 5, 1, generator=generator)
        noise = torch.randn(2, 5, 80, generator=generator)
        logits = difficulty + skill + noise + 1.0
        scores = logits > 0.0 if task is CLASSIFICATION else torch.sigmoid(logits)
        result = UtilityResult(task, sets, torch.arange(80), scores, classes)
        found = result.intervals(labels, groups)
        gain = found[f"{task.gain}_both"]
        covered += gain.low <= 0.0 <= gain.high
    assert 90 <= covered <= 99
    if task is SEGMENTATION:
        assert found["dice_both"].value == pytest.approx(float(scores[1].mean()))
        assert gain.value == pytest.approx(float(scores[1].mean() - scores[0].mean()), abs=1e-6)


def test_the_stage_is_reproducible_and_its_metrics_are_evaluated(tiny_project: Project, trained: Trained) -> None:
    project = trained(tiny_project)
    params, off = Evaluate(num_generated=20, batch_size=7, grid_images=6), Tracking(enabled=False)
    assert utility.run(project, features=FEATURES, utility=Utility()) is None
    dataset = open_store(project.dataset).fingerprint
    assert utility.load_utility(project, dataset) == []
    found, digests = [], []
    for _ in range(2):
        torch.rand(3)
        found.append(utility.run(project, features=FEATURES, utility=SMALL))
        digests.append([hash_file(path) for path in sorted(project.utility.iterdir())])
    assert found[0] == found[1] and digests[0] == digests[1]
    metrics = evaluate.run(project, evaluate=params, tracking=off)
    for key, value in found[0].items():
        assert metrics[key] == pytest.approx(value, rel=1e-5)
    assert {f"utility/{name}" for name in ("accuracy_real", "accuracy_both_20", "gain_both", "gain_synthetic")} < set(
        metrics
    )
    page = (project.reports / "index.html").read_text()
    assert "Use of samples for training" in page and (project.figures / "utility.png").is_file()
    assert "utility/gain_both" in json.loads((project.reports / "summary.json").read_text())

    prior = ANALYTIC["normal"].fit(torch.zeros(4, 2, 8, 8), None, 0, Prior(conditional=False))
    save_prior(project.prior, prior, bundle.digest(project.model))
    with pytest.raises(UserError, match="run `medgen utility` again"):
        utility.load_utility(project, dataset)
    with pytest.raises(UserError, match="labels do not change what the model generates"):
        utility.run(project, features=FEATURES, utility=SMALL)
