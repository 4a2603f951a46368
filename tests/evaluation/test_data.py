"""What a user is promised of artifacts/evaluation: the values come back exactly or not at all, and name nobody."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from medgen.errors import UserError
from medgen.evaluation.data import (
    DESCRIPTION,
    TENSORS,
    EvaluationData,
    EvaluationInfo,
    group_numbers,
    load_evaluation,
    save_evaluation,
)
from medgen.metrics.comparison import ImageSet

PATIENTS = ["Miller", "Miller", "Jones", "Miller", "Brown"]
GROUPS = group_numbers(PATIENTS, 5)
IMAGES = EvaluationData(
    EvaluationInfo("ba9876543210", "e" * 64, "test", 3, 7, 2.5),
    torch.rand(5),
    GROUPS,
    ImageSet(torch.randn(7, 4), torch.rand(7, 8)),
    ImageSet(torch.randn(5, 4), torch.rand(5, 8)),
)
MASKS = EvaluationData(EvaluationInfo("ba9876543210", "", "test", 0, 0, 0.0), torch.rand(5), GROUPS)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        names = [part.name for part in dataclasses.fields(one) if part.name != "digest"]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    return bool(one == other)


@pytest.mark.parametrize("data", [IMAGES, MASKS], ids=["images", "masks"])
def test_values_come_back_exactly(data: EvaluationData, tmp_path: Path) -> None:
    digest = save_evaluation(tmp_path / "evaluation", data)
    found = load_evaluation(tmp_path / "evaluation")
    assert same(data, found)
    assert found.digest == digest == save_evaluation(tmp_path / "again", data)


def test_no_identifier_of_a_patient_is_kept(tmp_path: Path) -> None:
    save_evaluation(tmp_path, IMAGES)
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(name.encode() in kept for name in PATIENTS)
    assert load_evaluation(tmp_path).groups.tolist() == [0, 0, 1, 0, 2]
    assert group_numbers(None, 3).tolist() == [0, 1, 2]  # no patients known: each image by itself


def test_a_masks_evaluation_takes_the_place_of_an_images_one(tmp_path: Path) -> None:
    save_evaluation(tmp_path, IMAGES)
    save_evaluation(tmp_path, MASKS)
    assert load_evaluation(tmp_path).samples is None


def change(folder: Path, **values: object) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_a_tensor(folder: Path) -> None:
    content = safetensors.torch.save({"similarity": torch.rand(5)})
    (folder / TENSORS).write_bytes(content)
    change(folder, sha256=hashlib.sha256(content).hexdigest())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "no evaluation here; run `medgen eval"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), f"{TENSORS}: no evaluation here"),
    "a byte more": (lambda folder: (folder / TENSORS).open("ab").write(b"0"), "damaged or of another medgen"),
    "another schema": (lambda folder: change(folder, schema=2), "damaged or of another medgen"),
    "torn": (lambda folder: (folder / DESCRIPTION).write_text('{"sch'), f"{DESCRIPTION}: not an evaluation's"),
    "a list": (lambda folder: (folder / DESCRIPTION).write_text("[]"), f"{DESCRIPTION}: not an evaluation's"),
    "no settings": (lambda folder: change(folder, info={"dataset": 3}), f"{DESCRIPTION}: not an evaluation's"),
    "a tensor is missing": (drop_a_tensor, f"{DESCRIPTION}: not an evaluation's"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    save_evaluation(tmp_path, IMAGES)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("change", "comparable"),
    [
        ({}, True),
        ({"bandwidth": 2.5000002}, True),  # computed on another machine
        ({"dataset": "0"}, False),
        ({"extractor": "0"}, False),
        ({"split": "val"}, False),
        ({"seed": 4}, False),
        ({"num_generated": 8}, False),
    ],
    ids=str,
)
def test_evaluations_of_equal_inputs_can_be_compared(change: dict[str, Any], comparable: bool) -> None:
    assert (dataclasses.replace(IMAGES.info, **change) == IMAGES.info) == comparable
