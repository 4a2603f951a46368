"""`medgen features`: learns what the split shows, with or without classes, and gives the same bytes again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medgen.config import Features, Project
from medgen.data.store import StoreWriter
from medgen.errors import UserError
from medgen.metrics.features import load_extractor
from medgen.training import extractor

SMALL = Features(width=8, epochs=4, batch_size=16, learning_rate=3e-3)
SIZE = 32


def tube(label: str | None, random: np.random.Generator) -> np.ndarray:
    """A bright bar on a dark ground that fades downwards: upright for class "bar", a disc for "disc"."""
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    shape = np.hypot(rows, columns) < 0.25 if label == "disc" else abs(columns) < 0.12
    image = 40 + 160 * shape * (0.9 - rows) + random.normal(0, 8, (SIZE, SIZE))
    return image.clip(0, 255).astype(np.uint8)


def project(folder: Path, labels: list[str | None], num_val: int = 16) -> Project:
    random = np.random.default_rng(0)
    made = Project(folder)
    made.dataset.parent.mkdir(parents=True)
    splits = ["train"] * 64 + ["val"] * num_val + ["test"] * 4
    with StoreWriter(made.dataset, (1, SIZE, SIZE), with_masks=False) as writer:
        for i, split in enumerate(splits):
            label = labels[i % len(labels)]
            row = {"path": f"{split}/{i}.png", "patient": str(i), "label": label or ""}
            writer.add(tube(label, random)[None], None, row)
        writer.commit(splits, [], {}, "")
    return made


def described(made: Project) -> dict[str, object]:
    return dict(json.loads((made.features / "extractor.json").read_text()))


@pytest.mark.parametrize(
    ("labels", "task", "num_outputs"),
    [
        (["bar", "bar", "bar", "disc"], "classes", 2),
        (["bar", None, "disc", None], "classes", 2),
        (["bar"], "quarter turns", 4),
        ([None], "quarter turns", 4),
    ],
    ids=["two classes, uneven", "half unlabelled", "one class", "unlabelled"],
)
def test_it_learns(labels: list[str | None], task: str, num_outputs: int, tmp_path: Path) -> None:
    made = project(tmp_path, labels)
    accuracy = extractor.run(made, features=SMALL)
    assert accuracy is not None
    assert accuracy > 0.9
    description = described(made)
    assert description["task"] == task
    assert description["val_balanced_accuracy"] == pytest.approx(accuracy, rel=1e-5)
    made_extractor, digest = load_extractor(made.features)
    assert made_extractor.sizes.num_outputs == num_outputs
    assert digest == description["sha256"]


def test_the_same_input_gives_the_same_bytes_whatever_was_drawn_before(tmp_path: Path) -> None:
    weights = []
    for name in ("first", "second"):
        made = project(tmp_path / name, ["bar", "disc"])
        torch.rand(len(weights) + 1)
        extractor.run(made, features=SMALL.model_copy(update={"epochs": 1}))
        weights.append((made.features / "extractor.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_without_validation_images_there_is_no_accuracy(tmp_path: Path) -> None:
    made = project(tmp_path, ["bar", "disc"], num_val=0)
    assert extractor.run(made, features=SMALL.model_copy(update={"epochs": 1})) is None
    assert described(made)["val_balanced_accuracy"] is None


def test_a_rare_class_is_drawn_as_often_as_a_common_one() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10 + [-1] * 100)
    weights = extractor.sampling_weights(labels)
    assert [float(weights[labels == label].sum()) for label in (0, 1, -1)] == pytest.approx([50.0, 50.0, 100.0])


def test_it_says_what_it_can_tell_and_what_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of class "bar" and "same" are drawn alike, so that nothing can tell them apart."""
    made = project(tmp_path, ["bar", "disc", "same"], num_val=48)
    extractor.run(made, features=SMALL)
    description: Any = described(made)
    assert description["val_accuracy"]["disc"] > 0.9
    assert description["val_images"] == {"bar": 16, "disc": 16, "same": 16}
    assert description["val_degradation_auc"]["jpeg"] > 0.9
    unrecognised = description["unrecognised"]
    assert set(unrecognised["classes"]) & {"bar", "same"}
    assert "disc" not in unrecognised["classes"]
    output = capsys.readouterr()
    assert "disc" in output.out
    assert output.err.count("does not recognise") == len(unrecognised["classes"]) + len(unrecognised["degradations"])


@pytest.mark.parametrize(
    ("accuracy", "num_images", "recognised"),
    [(0.30, 13, False), (0.55, 13, False), (0.62, 13, True), (0.40, 4000, False), (0.55, 400, True), (1.0, 1, False)],
)
def test_a_class_is_recognised_if_its_accuracy_is_clearly_above_chance(
    accuracy: float, num_images: int, recognised: bool
) -> None:
    found = extractor.Validation({"a": accuracy, "b": 0.9}, {"a": num_images, "b": 100}, {})
    assert found.unrecognised_classes(["a", "b", "without images"]) == [*(["a"] * (not recognised)), "without images"]


def test_area_under_the_curve_is_the_share_of_ordered_pairs() -> None:
    positive, negative = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    assert extractor.area_under_curve(positive, negative) == pytest.approx(4.5 / 6)


@pytest.mark.parametrize(
    ("change", "unchanged"),
    [(lambda image: image, False), (lambda image: torch.full_like(image, 0.5), True)],
    ids=["structure", "flat"],
)
def test_augmentation_moves_and_dims_but_stays_an_image(
    change: Callable[[torch.Tensor], torch.Tensor], unchanged: bool
) -> None:
    images = change(torch.rand(20, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    changed = extractor.augment(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    assert changed.min() >= 0.0
    assert changed.max() <= 1.0
    spread = changed.flatten(1).std(dim=1)
    assert (spread < 1e-6).all() if unchanged else (spread > 0.1).all()
    assert (changed.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))).abs().max() < 0.13
    torch.testing.assert_close(changed, extractor.augment(images, torch.Generator().manual_seed(1)))


def test_without_a_dataset_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="medgen preprocess"):
        extractor.run(Project(tmp_path), features=SMALL)
