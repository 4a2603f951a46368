"""The dataset store returns what was written; a damaged store is refused with the name of the damaged file."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from medgen.data.store import StoreWriter, open_store
from medgen.errors import UserError

SIZE = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE)).astype(np.uint8)
IMAGES = IMAGES[:, None]  # (N, 1, H, W)
MASK = (IMAGES[0] > 127).astype(np.uint8)
ROWS = [("train", "A"), ("test", "B"), (None, "C"), ("train", "B"), ("train", ""), ("test", "A")]
REJECTED = [("bad, very.png", "empty file")]


def write(folder: Path, with_masks: bool = True) -> Path:
    positions = iter(range(len(IMAGES)))
    with StoreWriter(folder, (1, SIZE, SIZE), with_masks) as writer:
        for split, label in ROWS:
            i = 0 if split is None else next(positions)
            row = {"path": f"{i}.png", "index": "0", "sha256": hashlib.sha256(bytes([i])).hexdigest(),
                   "label": label, "patient": f"p{i}", "width": "20", "height": "30", "mode": "L",
                   "mask": "" if i else "m.png"}  # fmt: skip
            writer.add(IMAGES[i], None if i else MASK, row)
        writer.commit([split for split, _ in ROWS], REJECTED, {"image_size": SIZE}, "source")
    return folder


def test_written_data_is_read_back(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "dataset"))
    assert store.classes == ("A", "B")
    assert store.image_shape == (1, SIZE, SIZE)
    assert store.counts == {"train": 3, "val": 0, "test": 2}
    train, val, test = (store.split(name) for name in ("train", "val", "test"))
    assert isinstance(train.images, np.memmap)
    assert (train.images == IMAGES[[0, 2, 3]]).all()
    assert (test.images == IMAGES[[1, 4]]).all()
    assert val.images.shape == (0, 1, SIZE, SIZE)
    assert train.labels.tolist() == [0, 1, -1]
    assert train.labels.dtype == np.int64
    assert test.labels.tolist() == [1, 0]
    assert train.masks is not None
    assert (train.masks[0] == MASK).all()
    assert not train.masks[1:].any()
    assert train.paths == ["0.png", "2.png", "3.png"]
    assert [row["patient"] for row in test.rows()] == ["p1", "p4"]
    assert (tmp_path / "dataset" / "rejected.csv").read_text() == '"path","reason"\n"bad, very.png","empty file"\n'


def test_a_dataset_without_masks_has_no_masks(tmp_path: Path) -> None:
    assert open_store(write(tmp_path / "dataset", with_masks=False)).split("train").masks is None


def test_the_same_content_gives_the_same_bytes_and_fingerprint(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    names = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert names == sorted(path.relative_to(second) for path in second.rglob("*.*"))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert open_store(first).fingerprint != open_store(write(tmp_path / "c", with_masks=False)).fingerprint


def test_numpy_reads_the_arrays(tmp_path: Path) -> None:
    """The arrays can be read without medgen."""
    folder = write(tmp_path / "dataset")
    assert np.load(folder / "train" / "images.npy", allow_pickle=False).shape == (3, 1, SIZE, SIZE)


FILES = [f"{split}/{kind}.npy" for split in ("train", "val", "test") for kind in ("images", "labels", "masks")]


@pytest.mark.parametrize("name", [*FILES, "manifest.csv", "rejected.csv"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "longer"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    folder = write(tmp_path / "dataset")
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"cut": data[:-1], "flipped": data, "longer": data + b"\0"}[damage])
    with pytest.raises(UserError, match=f"{name}: damaged.*medgen preprocess"):
        open_store(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 0}, "dataset.json: schema 0; expected 2"),
        ({"classes": ["A", "C"]}, "dataset.json: damaged"),
        ({"image_shape": [1, 8, 8]}, "dataset.json: damaged"),
        ({"files": {}}, "dataset.json: damaged"),
        ({"counts": {"train": 4, "val": 0, "test": 1}}, "images.npy: damaged"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    folder = write(tmp_path / "dataset")
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=reason):
        open_store(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', "{"])
def test_an_unreadable_dataset_json_is_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "dataset")
    (folder / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        open_store(folder)


def test_the_error_for_a_missing_store_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="medgen preprocess"):
        open_store(tmp_path / "absent")


def test_the_error_for_an_unknown_split_lists_the_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train"):
        open_store(write(tmp_path / "dataset")).split("tests")


def test_a_failed_write_leaves_the_old_store(tmp_path: Path) -> None:
    folder = write(tmp_path / "dataset")
    before = open_store(folder).fingerprint
    with pytest.raises(ValueError, match="uint8"), StoreWriter(folder, (1, SIZE, SIZE), with_masks=False) as writer:
        writer.add(IMAGES[0, :, :8], None, {})
    assert open_store(folder).fingerprint == before
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "dataset.building" / "train").mkdir(parents=True)
    (tmp_path / "dataset.old").mkdir()
    open_store(write(tmp_path / "dataset"))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
