"""artifacts/evaluation: exact values, errors for damaged files, no patient identifiers."""

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
    EvaluationData,
    EvaluationInfo,
    load_evaluation,
    save_evaluation,
)
from medgen.metrics.comparison import ImageSet
from medgen.metrics.intervals import group_indices

PATIENTS = ["Miller", "Miller", "Jones", "Miller", "Brown"]
GROUPS = group_indices(5, PATIENTS)
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
def test_values_are_loaded_exactly(data: EvaluationData, tmp_path: Path) -> None:
    digest = save_evaluation(tmp_path / "evaluation", data)
    found = load_evaluation(tmp_path / "evaluation")
    assert same(data, found)
    assert found.digest == digest == save_evaluation(tmp_path / "again", data)


def test_no_patient_identifier_is_saved(tmp_path: Path) -> None:
    save_evaluation(tmp_path, IMAGES)
    saved = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(name.encode() in saved for name in PATIENTS)
    assert load_evaluation(tmp_path).groups.tolist() == [0, 0, 1, 0, 2]
    assert group_indices(3, None).tolist() == [0, 1, 2]  # without patients each image is a group


def test_an_evaluation_of_masks_replaces_one_of_images(tmp_path: Path) -> None:
    save_evaluation(tmp_path, IMAGES)
    save_evaluation(tmp_path, MASKS)
    assert load_evaluation(tmp_path).samples is None


def change(folder: Path, **values: object) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_a_tensor(folder: Path) -> None:
    content = safetensors.torch.save({"similarity": torch.rand(5)})
    (folder / "evaluation.safetensors").write_bytes(content)
    change(folder, sha256=hashlib.sha256(content).hexdigest())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "not found; run `medgen eval"),
    "no tensors": (lambda folder: (folder / "evaluation.safetensors").unlink(), "evaluation.safetensors: not found"),
    "a byte more": (
        lambda folder: (folder / "evaluation.safetensors").open("ab").write(b"0"),
        "evaluation.safetensors: damaged",
    ),
    "another schema": (lambda folder: change(folder, schema=2), "found schema 2, expected 1"),
    "torn": (lambda folder: (folder / DESCRIPTION).write_text('{"sch'), f"{DESCRIPTION}: not readable as JSON"),
    "a list": (lambda folder: (folder / DESCRIPTION).write_text("[]"), f"{DESCRIPTION}: expected a JSON object"),
    "no settings": (lambda folder: change(folder, info={"dataset": 3}), f"{DESCRIPTION}: incomplete or damaged"),
    "a tensor is missing": (drop_a_tensor, f"{DESCRIPTION}: incomplete or damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_an_error_that_names_it(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    save_evaluation(tmp_path, IMAGES)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("change", "comparable"),
    [
        ({}, True),
        ({"bandwidth": 2.5000002}, True),  # rounded differently on another machine
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
