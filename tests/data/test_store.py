"""The dataset store returns what was written; a damaged store is refused with the name of the damaged file."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medgen.config import fingerprint
from medgen.data import store
from medgen.data.store import StoreWriter, open_store, verify_store
from medgen.errors import UserError
from medgen.io import hash_file

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
    assert (train.images[:] == IMAGES[[0, 2, 3]]).all()
    assert (test.images[:] == IMAGES[[1, 4]]).all()
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
    assert np.load(folder / "train" / "images-00000.npy", allow_pickle=False).shape == (3, 1, SIZE, SIZE)


FILES = [
    f"{split}/{kind}.npy" for split in ("train", "val", "test") for kind in ("images-00000", "labels", "masks-00000")
]


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
        ({"schema": 0}, "dataset.json: schema 0; expected 3"),
        ({"classes": ["A", "C"]}, "dataset.json: damaged"),
        ({"image_shape": [1, 8, 8]}, "dataset.json: damaged"),
        ({"files": {}}, "dataset.json: damaged"),
        ({"counts": {"train": 4, "val": 0, "test": 1}}, r"images-\*\.npy: damaged"),
        ({"counts": {}}, "dataset.json: incomplete or damaged"),
        ({"preprocessing": {"image_size": -1}}, "dataset.json: incomplete or damaged"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    folder = write(tmp_path / "dataset")
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=reason):
        open_store(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 3}', "{"])
def test_an_unreadable_dataset_json_is_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "dataset")
    (folder / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        open_store(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b'"' + b"x" * 200_000, b"path\n", b"0.png,0\n"])
def test_an_unreadable_manifest_with_the_right_hash_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "dataset")
    manifest = folder / "manifest.csv"
    manifest.write_bytes(manifest.read_bytes().splitlines(keepends=True)[0] + content)
    description = json.loads((folder / "dataset.json").read_text())
    description["files"]["manifest.csv"] = {"bytes": manifest.stat().st_size, "sha256": hash_file(manifest)}
    parts = (store.SCHEMA, *(description[key] for key in ("classes", "image_shape", "files")))
    (folder / "dataset.json").write_text(json.dumps(description | {"fingerprint": fingerprint(*parts)}))
    split = open_store(folder).split("train")
    with pytest.raises(UserError, match=r"manifest\.csv: damaged: .*Run `medgen preprocess` again"):
        list(split.rows())


def test_an_archive_in_place_of_an_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "labels.npy", "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(UserError, match=r"labels\.npy: damaged: unreadable \(an archive"):
        store._open_array(tmp_path / "labels.npy")


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06" + bytes(18),
        npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (4,"),
        npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999,)}\n"),
        npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (4,)}\n"),
        npy(b"{'descr': [], 'fortran_order': False, 'shape': None}\n"),
    ],
)
def test_a_damaged_array_is_one_kind_of_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"\w"):
        store.map_array(tmp_path / "labels.npy")


def test_the_error_for_a_missing_store_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="medgen preprocess"):
        open_store(tmp_path / "absent")


def test_the_error_for_an_unknown_split_lists_the_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train"):
        open_store(write(tmp_path / "dataset")).split("tests")


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with at most two images in a file."""
    monkeypatch.setattr(store, "SHARD_BYTES", 2 * SIZE * SIZE + 1)
    return write(tmp_path / "dataset")


def test_a_large_split_is_many_files(sharded: Path) -> None:
    names = [f"{kind}-{shard:05}.npy" for kind in ("images", "masks") for shard in range(2)]
    assert sorted(path.name for path in (sharded / "train").iterdir()) == sorted([*names, "labels.npy"])
    shards = [np.load(sharded / "train" / name) for name in names[:2]]
    assert [len(shard) for shard in shards] == [2, 1]
    assert (np.concatenate(shards) == IMAGES[[0, 2, 3]]).all()
    assert np.load(sharded / "val" / "images-00000.npy").shape == (0, 1, SIZE, SIZE)
    (sharded / "train" / names[1]).unlink()
    with pytest.raises(UserError, match=r"train/images-00001\.npy: damaged: found no such file"):
        open_store(sharded)


@pytest.mark.parametrize(
    "index",
    [0, -1, np.int64(2), slice(None), slice(1, 9), slice(None, None, -2), [2, 0, 2, -1], np.array([1, 2]), [], ...,
     np.array([True, False, True]), (slice(1, 3), 0), (0, 0), (..., slice(2, 5)), ([0, 2], 0, slice(3))],
    ids=str,
)  # fmt: skip
def test_shards_are_indexed_like_one_array(sharded: Path, index: object) -> None:
    images, expected = open_store(sharded).split("train").images, IMAGES[[0, 2, 3]]
    found = images[index]
    assert isinstance(found, np.ndarray) and found.flags.writeable
    np.testing.assert_array_equal(found, expected[index], strict=True)  # type: ignore[call-overload]


def test_all_images_of_shards_are_read_in_order(sharded: Path) -> None:
    images = open_store(sharded).split("train").images
    assert (np.stack(list(images)) == IMAGES[[0, 2, 3]]).all()
    assert np.asarray(images, float).tolist() == IMAGES[[0, 2, 3]].tolist()
    assert (images.shape, images.dtype, len(images)) == ((3, 1, SIZE, SIZE), np.uint8, 3)


@pytest.mark.parametrize("index", [3, -4, [0, 3], [-4], [True, False]], ids=str)
def test_rows_that_do_not_exist_are_refused(sharded: Path, index: object) -> None:
    with pytest.raises(IndexError, match="3"):
        open_store(sharded).split("train").images[index]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that have been hashed."""
    names: list[str] = []
    monkeypatch.setattr(store, "hash_file", lambda path: (names.append(path.name), hash_file(path))[1])
    return names


def age(folder: Path, seconds: int = 60) -> None:
    """Set the time stamps of a store's files back: only files that have not changed for a while are remembered."""
    for path in folder.rglob("*.*"):
        times = path.stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns - seconds * 10**9))


def test_a_file_is_hashed_once_and_again_after_a_change(tmp_path: Path, hashed: list[str]) -> None:
    folder = write(tmp_path / "dataset")
    age(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    hashed.clear()
    first = open_store(folder)
    assert len(hashed) == len(before) - 1  # all but dataset.json
    hashed.clear()
    assert open_store(folder) == first
    assert hashed == []
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before, "the folder belongs to DVC"
    age(folder / "train")
    open_store(folder)
    assert sorted(hashed) == ["images-00000.npy", "labels.npy", "masks-00000.npy"]


def test_a_file_that_has_just_been_written_is_hashed_again(tmp_path: Path, hashed: list[str]) -> None:
    """A second change within one tick of the clock would not change the time stamp."""
    folder = write(tmp_path / "dataset")
    for _ in range(2):
        hashed.clear()
        open_store(folder)
        assert "labels.npy" in hashed


@pytest.mark.parametrize("content", [None, "{", "[]", '{"manifest.csv": 3, "train/labels.npy": [1]}', "\udcff"])
def test_all_files_are_hashed_if_nothing_is_known_of_them(
    tmp_path: Path, hashed: list[str], content: str | None
) -> None:
    folder = write(tmp_path / "dataset")
    age(folder)
    record = tmp_path / "dataset.checked.json"
    record.unlink(missing_ok=True)
    if content is None:
        record.mkdir()  # cannot be written
    else:
        record.write_bytes(content.encode(errors="surrogateescape"))
    hashed.clear()
    open_store(folder)
    first, _ = len(hashed), hashed.clear()
    open_store(folder)
    assert (first, len(hashed)) == (11, 11 if content is None else 0)


def test_verify_names_every_damaged_file_also_with_its_old_time_stamp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "dataset")
    age(folder)
    verify_store(folder)
    assert "all 11 files (0.0 MB) is correct" in capsys.readouterr().out
    for name in ("test/images-00000.npy", "manifest.csv"):
        path, times = folder / name, (folder / name).stat()
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    open_store(folder)  # size and time are those of the last check
    with pytest.raises(UserError, match=r"2 of 11 files.*manifest\.csv: found.*test/images-00000\.npy: found"):
        verify_store(folder)
    with pytest.raises(UserError, match="damaged"):
        open_store(folder)


def test_a_failed_write_leaves_the_old_store(tmp_path: Path) -> None:
    folder = write(tmp_path / "dataset")
    before = open_store(folder).fingerprint
    with pytest.raises(ValueError, match="uint8"), StoreWriter(folder, (1, SIZE, SIZE), with_masks=False) as writer:
        writer.add(IMAGES[0, :, :8], None, {})
    assert open_store(folder).fingerprint == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "dataset.building" / "train").mkdir(parents=True)
    (tmp_path / "dataset.old").mkdir()
    open_store(write(tmp_path / "dataset"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset"]
