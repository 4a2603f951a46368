"""Measures by sex, age and view: taken from manifest.csv, with intervals by patient, without small groups."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medgen import config
from medgen.config import Project
from medgen.data.store import ATTRIBUTES, COLUMNS, StoreWriter, read_csv
from medgen.evaluation.fairness import (
    Measure,
    age_group,
    collect_measures,
    compare_groups,
    fairness_findings,
    fairness_metrics,
)
from medgen.evaluation.training_sets import (
    BOTH,
    CLASSIFICATION,
    REAL,
    SEGMENTATION,
    SYNTHETIC,
    TrainingSet,
    UtilityResult,
)
from medgen.ingest import preprocess


def write_images(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40), np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{number}.png")


def test_sex_age_and_view_come_from_the_manifest_and_change_nothing_where_they_are_absent(tmp_path: Path) -> None:
    stores = {}
    for name, head in {"plain": "path,patient,ward", "full": "path,patient,Sex,age"}.items():
        write_images(tmp_path / name)
        lines = [f"{number}.png,p{number},F,{60 + number}"[: 100 if name == "full" else -3] for number in range(12)]
        (tmp_path / name / "data" / "manifest.csv").write_text("\n".join([head, *lines]))
        params = config.Preprocess(image_size=16, clahe_tiles=2, val_fraction=0.2, test_fraction=0.2)
        stores[name] = preprocess.run(
            Project(tmp_path / name), data=config.Data(keep_patient_ids=True), preprocess=params
        )
    rows = [row for split in ("train", "val", "test") for row in stores["full"].split(split).rows()]
    assert {(row["path"], row["sex"], row["age"], row["view"]) for row in rows} == {
        (f"{number}.png", "F", str(60 + number), "") for number in range(12)
    }
    assert len(list(read_csv(stores["plain"].folder / "manifest.csv", COLUMNS))) == 12
    assert len(list(read_csv(stores["full"].folder / "manifest.csv", (*COLUMNS, *ATTRIBUTES)))) == 12
    manifest = tmp_path / "full" / "data" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",F,", ",M,"))
    changed = preprocess.run(Project(tmp_path / "full"), data=config.Data(keep_patient_ids=True), preprocess=params)
    assert {row["sex"] for row in changed.split("train").rows()} == {"M"}, "the store is made again"


def make_split(folder: Path, rows: list[dict[str, str]]):
    with StoreWriter(folder, (1, 8, 8), with_masks=False, with_attributes=True) as writer:
        for row in rows:
            writer.add(np.zeros((1, 8, 8), np.uint8), None, row)
        return writer.commit(["test"] * len(rows), [], {}, "").split("test")


def test_a_worse_group_is_found_small_groups_are_left_out_and_equal_groups_are_not_accused(tmp_path: Path) -> None:
    count = 240
    sexes, views = ["F", "M"], ["PA", "PA erect", "AP"]
    rows = [
        {
            "path": f"{number}.png",
            "patient": f"p{number // 2}",
            "sex": sexes[number // 2 % 2] if number < 230 else "",
            "age": "70" if number < 12 else f"0{30 + number % 9}Y",
            "view": "lateral" if number >= 210 else views[number // 2 % 3],
        }
        for number in range(count)
    ]
    for row in rows[210:]:
        row["patient"] = f"l{int(row['path'][:-4]) % 5}"  # thirty images of five patients
    split = make_split(tmp_path / "dataset", rows)
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worse = values - 2.0 * torch.tensor([row["view"] == "AP" for row in rows])
    measures = {"ssim": Measure("SSIM", torch.arange(count), worse)}
    found = compare_groups(split, measures)
    groups = {each.group for each in found}
    assert groups == {"sex_F", "sex_M", "view_PA", "view_PA-erect", "view_AP"}, "not age: the others are too few"
    assert found[0].num_images == 116 and found[0].group == "sex_F"
    metrics = fairness_metrics(found)
    inside = [row["view"] == "AP" for row in rows]
    assert metrics["fairness/view_AP/ssim"] == pytest.approx(float(worse[torch.tensor(inside)].mean()))
    assert metrics["fairness/view_AP/ssim_ci_high"] < metrics["fairness/view_PA/ssim_ci_low"]
    accused = fairness_findings(found, measures)
    assert len(accused) == 1 and accused[0].startswith("Worse for view AP")
    honest = {"ssim": Measure("SSIM", torch.arange(count), values)}
    assert fairness_findings(compare_groups(split, honest), honest)[0].startswith("No difference between groups")


@pytest.mark.parametrize(
    ("text", "group"),
    [
        *(("0", "0-17"), ("17.9", "0-17"), ("018Y", "18-39"), ("63", "60-79"), ("101", "80-or-more"), ("006M", "0-17")),
        *(("", ""), ("adult", "adult"), ("30 to 40", "30-to-40")),
    ],
)
def test_ages_are_grouped(text: str, group: str) -> None:
    assert age_group(text) == group


def test_accuracy_and_dice_of_networks_trained_on_samples_are_measures() -> None:
    sets = tuple(TrainingSet(kind, 100.0, 1, 1) for kind in (REAL, BOTH, SYNTHETIC))
    rows, generator = torch.tensor([0, 2, 3]), torch.Generator().manual_seed(0)
    dice, correct = torch.rand(3, 2, 3, generator=generator), torch.rand(3, 2, 3, generator=generator) > 0.5
    results = [
        UtilityResult(CLASSIFICATION, sets, rows, correct, (0, 1)),
        UtilityResult(SEGMENTATION, sets, rows, dice),
    ]
    context: Any = SimpleNamespace(
        store=SimpleNamespace(classes=()), unrecognised=(), labels=torch.zeros(4), compared_rows=torch.arange(4)
    )
    found = collect_measures(context, torch.rand(4, generator=generator), results)
    names = [f"utility_{name}_{kind}" for name in ("accuracy", "dice") for kind in ("real", "both", "synthetic")]
    assert list(found) == ["ssim", *names]
    assert found["utility_dice_both"].title == "Dice, trained on real images and samples"
    assert found["utility_accuracy_real"].title == "accuracy, trained on real images"
    for name, scores in (("accuracy", correct), ("dice", dice)):
        measure = found[f"utility_{name}_both"]
        assert measure.rows.tolist() == rows.tolist()
        np.testing.assert_allclose(measure.values, scores[1].numpy().mean(axis=0), rtol=1e-6)
