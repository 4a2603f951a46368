"""Conditions of images in the store: columns of manifest.csv, findings of an npz file, masks, paired images."""

import csv
import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgen import config
from medgen.config import Project
from medgen.data.store import Store, open_store
from medgen.errors import UserError
from medgen.ingest.dataset_scan import ImageRecord
from medgen.ingest.formats.arrays import inspect
from medgen.ingest.preprocess import run

CONDITIONS = {
    "findings": {"kind": "multilabel"},
    "sex": {"kind": "category"},
    "kvp": {"kind": "number", "low": 50, "high": 150},
}
ROWS = [
    {"findings": "Mass|Effusion", "sex": "F", "kvp": "100"},
    {"findings": "No Finding", "sex": "M", "kvp": ""},
    {"findings": "", "sex": "", "kvp": "999"},
]


def make(folder: Path, rows: list[dict[str, str]] = ROWS, copies: int = 4) -> Path:
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "Findings", "sex", "KVP", "site"])
        writer.writeheader()
        for number in range(copies * len(rows)):
            Image.fromarray(generator.integers(0, 256, (20, 20), np.uint8)).save(folder / "images" / f"{number:02}.png")
            row = rows[number % len(rows)]
            cells = {"Findings": row["findings"], "sex": row["sex"], "KVP": row["kvp"], "site": "A"}
            writer.writerow({"path": f"images/{number:02}.png", **cells})
    return folder


def build(root: Path, conditions: object = CONDITIONS, **values: object) -> Store:
    settings = {"image_size": 16, "val_fraction": 0, "test_fraction": 0, "conditions": conditions}
    return run(Project(root), data=config.Data(), preprocess=config.Preprocess(**{**settings, **values}))


def test_columns_of_the_manifest_become_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data")
    build(tmp_path)
    store = open_store(tmp_path / "artifacts" / "dataset")
    assert store.conditions is not None
    assert store.conditions.fields[0].values == ("Effusion", "Mass")
    split = store.split("train")
    expected = [[1, 1, 1, 1, 1, 0, 1, 0.5], [1, 0, 0, 1, 0, 1, 0, 0], [0] * 8]
    for row, values in zip(split.rows(), split.condition_values, strict=True):
        assert values.tolist() == expected[int(row["path"][7:9]) % 3]
    header = (store.folder / "manifest.csv").read_text().splitlines()[0]
    assert header.endswith('"mask","sex","age","view","findings","kvp"'), "and no other column of the user's"
    assert "kvp: 4 images have values outside of 50 to 150" in " ".join(capsys.readouterr().err.split())


def test_a_store_without_conditions_does_not_depend_on_the_columns(tmp_path: Path) -> None:
    make(tmp_path / "data")
    store = build(tmp_path, {})
    assert store.conditions is None
    assert store.split("train").condition_values.shape == (12, 0)
    description = json.loads((store.folder / "dataset.json").read_text())
    assert "conditions" not in description and "conditions" not in description["preprocessing"]


def test_other_conditions_are_another_dataset(tmp_path: Path) -> None:
    make(tmp_path / "data")
    first = build(tmp_path)
    wider = {**CONDITIONS, "kvp": {"kind": "number", "low": 0, "high": 150}}
    assert build(tmp_path).fingerprint == first.fingerprint
    assert build(tmp_path, wider).fingerprint != first.fingerprint


def test_damaged_conditions_are_found(tmp_path: Path) -> None:
    make(tmp_path / "data")
    path = build(tmp_path).folder / "dataset.json"
    path.write_text(path.read_text().replace('"high": 150.0,\n      "channels"', '"high": 99.0,\n      "channels"'))
    with pytest.raises(UserError, match="damaged: found content of fingerprint"):
        open_store(path.parent)


@pytest.mark.parametrize(
    ("conditions", "kvp", "message"),
    [
        ({"view": {"kind": "category"}}, "1", "preprocess.conditions.view: no image .* expected a column view"),
        ({"lungs": {"kind": "mask"}}, "1", "preprocess.conditions.lungs: no image in .* has a mask"),
        (CONDITIONS, "high", r"images/00.png has 'high' in column kvp; expected a number"),
    ],
)
def test_missing_and_wrong_values_are_one_message(tmp_path: Path, conditions: object, kvp: str, message: str) -> None:
    make(tmp_path / "data", [{"findings": "Mass", "sex": "F", "kvp": kvp}])
    with pytest.raises(UserError, match=message):
        build(tmp_path, conditions)


def test_a_column_of_identifiers_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "data", [{"findings": f"name {number}", "sex": "F", "kvp": ""} for number in range(201)], copies=1)
    for kind in ("category", "multilabel"):
        with pytest.raises(UserError, match=r"conditions.findings: 201 different values .* expected at most 200"):
            build(tmp_path, {"findings": {"kind": kind}})


def test_findings_of_chestmnist_are_kept(tmp_path: Path) -> None:
    """The layout of chestmnist.npz: fourteen columns of 0 and 1 for each image."""
    labels = np.zeros((6, 14), np.uint8)
    labels[0, [0, 2]] = labels[1, 13] = 1
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    arrays = {f"{name}_images": images for name in ("train", "test")}
    arrays |= {"train_labels": labels, "test_labels": labels}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "chestmnist.npz", **arrays)
    store = build(tmp_path, {"findings": {"kind": "multilabel"}}, image_size=28)
    assert store.conditions is not None and store.classes == ()
    assert store.conditions.fields[0].values == ("atelectasis", "effusion", "hernia")
    cells = [row["findings"] for row in store.split("train").rows()]
    assert cells == ["atelectasis+effusion", "hernia", *["No Finding"] * 4]
    assert store.split("train").condition_values.tolist()[:3] == [[1, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.eye(3, dtype=np.uint8), ["0", "1", "2"]),
        (np.eye(3, 12, dtype=np.uint8), ["00", "01", "02"]),
        (np.full((3, 2), 7, np.uint8), None),  # not yes or no
        (np.zeros((3, 2)), None),
        (np.zeros(3, np.uint8), None),  # a class
    ],
)
def test_findings_of_other_files(tmp_path: Path, labels: np.ndarray, expected: list[str] | None) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, train_images=np.zeros((3, 8, 8), np.uint8), train_labels=labels)
    found = inspect(path, config.Preprocess(image_size=16)).findings
    assert (None if found is None else list(found)) == expected


EDGES = {"edges": {"kind": "image", "folder": "edges"}}


def draw_pairs(folder: Path, names: dict[str, str], side: int = 32) -> None:
    """Write images, and for each the file that `names` gives, of half the size and with inverted greys."""
    generator = np.random.default_rng(0)
    for name, other in names.items():
        pixels = np.kron(generator.integers(0, 256, (4, 4), np.uint8), np.ones((side // 4, side // 4), np.uint8))
        for path, array in ((name, pixels), (other, 255 - pixels[::2, ::2])):
            if path:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / path)


@pytest.mark.parametrize(
    "names",
    [
        {"images/a.png": "edges/a.png", "images/b.png": "edges/b.png", "images/c.png": ""},
        {"images/N/a.png": "edges/N/a.png", "images/P/a.png": "edges/P/a.png", "images/P/c.png": ""},
        {"N/images/a.png": "N/edges/a.png", "P/images/a.png": "P/edges/a.png", "P/images/c.png": ""},
        {"a.png": "Edges/a.tif", "b.jpg": "Edges/b.png", "c.png": ""},
        {"images/a.png": "edges/a.png", "images/b.png": "edges/b.png", "images/c.png": "masks/c.png"},
    ],
)
def test_files_of_a_folder_are_paired_images(tmp_path: Path, names: dict[str, str]) -> None:
    """Whatever the folders, a file belongs to the image of its name; the third image has none."""
    draw_pairs(tmp_path / "data", names)
    store = build(tmp_path, EDGES, clahe_clip=0, image_size=16, mask_values=list(range(256)))
    split = store.split("train")
    assert split.paired is not None and split.paired.shape == (3, 1, 16, 16)
    assert store.conditions is not None
    (field,) = store.conditions.fields
    assert (field.kind, field.channels) == ("image", 2)
    for number, row in enumerate(split.rows()):
        expected = names[row["path"]] if "edges" in names[row["path"]].lower() else ""
        assert row["edges"] == expected
        assert split.has_map("edges")[number] == bool(expected)
        if expected and not row["path"].endswith("jpg"):
            assert (split.read_map(field, np.array([number]))[0] == 255 - split.images[number]).all()
        if not expected:
            assert not split.paired[number].any()
    assert store.counts["train"] == 3, "the files are no images of their own"


def test_other_files_of_the_folder_are_reported(tmp_path: Path) -> None:
    draw_pairs(tmp_path / "data", {"images/a.png": "edges/a.png"})
    draw_pairs(tmp_path / "data", {"edges/lost.png": "edges/a.tif"})
    store = build(tmp_path, EDGES)
    with (store.folder / "rejected.csv").open() as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons == {
        "edges/a.tif": "a second file in edges of the image that has edges/a.png",
        "edges/lost.png": "in edges, without its image",
    } or reasons == {
        "edges/a.png": "a second file in edges of the image that has edges/a.tif",
        "edges/lost.png": "in edges, without its image",
    }


def test_a_changed_paired_file_makes_a_new_dataset(tmp_path: Path) -> None:
    draw_pairs(tmp_path / "data", {"images/a.png": "edges/a.png", "images/b.png": "edges/b.png"})
    first = build(tmp_path, EDGES)
    assert build(tmp_path, EDGES).fingerprint == first.fingerprint
    Image.new("L", (32, 32), 9).save(tmp_path / "data" / "edges" / "a.png")
    assert build(tmp_path, EDGES).fingerprint != first.fingerprint


def test_a_store_without_paired_images_does_not_depend_on_their_version(tmp_path: Path) -> None:
    """The digest of the source files leaves out the new field, so present stores are kept."""
    record = ImageRecord("a.png", None, "p", None, None)
    *values, paired, slices = astuple(record)
    assert (len(values), paired, slices) == (8, (), ())


@pytest.mark.parametrize(
    ("size", "message"), [((32, 20), "edges/a.png is 32 x 20, the image 32 x 32"), (None, "edges/a.png: ")]
)
def test_a_wrong_paired_file_rejects_its_image(tmp_path: Path, size: tuple[int, int] | None, message: str) -> None:
    draw_pairs(tmp_path / "data", {"images/a.png": "edges/a.png", "images/b.png": "edges/b.png"})
    path = tmp_path / "data" / "edges" / "a.png"
    if size:
        Image.new("L", size, 9).save(path)
    else:
        path.write_bytes(path.read_bytes()[:60])
    store = build(tmp_path, EDGES, max_rejected=1)
    assert store.counts["train"] == 1
    assert message in (store.folder / "rejected.csv").read_text()


def test_a_folder_without_files_is_one_message(tmp_path: Path) -> None:
    draw_pairs(tmp_path / "data", {"images/a.png": "lines/a.png", "images/b.png": ""})
    with pytest.raises(UserError, match=r"conditions.edges: no image in .* has a file of its name in a folder edges"):
        build(tmp_path, EDGES)
