"""The preprocessed dataset on disk: uint8 arrays a program maps into memory, and what stands behind each row.

artifacts/dataset/
  train/ val/ test/   images.npy (N, C, H, W) uint8 · labels.npy (N,) int64 · masks.npy (N, 1, H, W) uint8 of 0/1
  manifest.csv        row i of a split = array row i: source file, sha256, label, patient, original size and mode
  rejected.csv        files that are not in it, and why
  dataset.json        schema, classes, shape, counts, how it was made, hash of every file

Shapes: N images of a split, C channels (1), H W height and width.
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from medgen import config
from medgen.errors import UserError
from medgen.files import swap, write_atomic

SCHEMA = 1
SPLITS = ("train", "val", "test")
UNLABELLED = -1
DESCRIPTION, MANIFEST, REJECTED = "dataset.json", "manifest.csv", "rejected.csv"
COLUMNS = ("split", "path", "sha256", "label", "patient", "width", "height", "mode", "mask")
REJECTED_COLUMNS = ("path", "reason")


@dataclass(frozen=True)
class Split:
    """One split's arrays, read from disk as they are used."""

    name: str
    images: NDArray[np.uint8]  # (N, C, H, W)
    labels: NDArray[np.int64]  # (N,), -1 where unlabelled
    masks: NDArray[np.uint8] | None  # (N, 1, H, W) of 0 and 1; 0 throughout where manifest.csv names no mask
    manifest: tuple[Mapping[str, str], ...] = field(default=(), repr=False)

    def rows(self) -> list[dict[str, str]]:
        """manifest.csv's rows of this split, in the order of the arrays."""
        return [dict(row) for row in self.manifest]

    @property
    def paths(self) -> list[str]:
        """Source files, relative to the data folder, in the order of the arrays."""
        return [row["path"] for row in self.manifest]


@dataclass(frozen=True)
class Store:
    """A checked dataset folder."""

    folder: Path
    classes: tuple[str, ...]  # label i is classes[i]; empty when nothing is labelled
    image_shape: tuple[int, int, int]  # C, H, W
    counts: dict[str, int]  # images of each split
    fingerprint: str  # 12 hexadecimal digits of the content
    source: str  # digest of the files and settings it was made from
    name: str  # what data.name called it
    preprocess: config.Preprocess  # the settings themselves: what a new image must go through

    def split(self, name: str) -> Split:
        """Opens "train", "val" or "test"."""
        if name not in SPLITS:
            raise config.unknown_name("split", name, SPLITS)
        place = self.folder / name
        masks = place / "masks.npy"
        rows = [row for row in read_csv(self.folder / MANIFEST, COLUMNS) if row["split"] == name]
        return Split(
            name=name,
            images=_open_array(place / "images.npy"),
            labels=_open_array(place / "labels.npy"),
            masks=_open_array(masks) if masks.exists() else None,
            manifest=tuple(rows),
        )


def open_store(folder: Path) -> Store:
    """Opens a dataset folder after holding every file in it against dataset.json.

    Raises:
        UserError: the folder is absent, of another schema, or a file in it is missing or damaged.
    """
    description = _read_description(folder)
    for name, expected in description["files"].items():
        _check_file(folder / name, expected)
    counts = description["counts"]
    shape = tuple(description["image_shape"])
    with_masks = f"{SPLITS[0]}/masks.npy" in description["files"]
    for split in SPLITS:
        count = counts[split]
        _check_array(folder / split / "images.npy", np.uint8, (count, *shape))
        _check_array(folder / split / "labels.npy", np.int64, (count,))
        if with_masks:
            _check_array(folder / split / "masks.npy", np.uint8, (count, 1, *shape[1:]))
    rows = read_csv(folder / MANIFEST, COLUMNS)
    for split in SPLITS:
        found = sum(row["split"] == split for row in rows)
        if found != counts[split]:
            raise _damaged(folder / MANIFEST, f"{found} rows of {split}", f"{counts[split]}")
    return Store(
        folder=folder,
        classes=tuple(description["classes"]),
        image_shape=(shape[0], shape[1], shape[2]),
        counts=dict(counts),
        fingerprint=description["fingerprint"],
        source=description["source"],
        name=description["name"],
        preprocess=config.Preprocess.model_validate(description["preprocessing"]),
    )


class StoreWriter:
    """Writes a dataset folder row by row; it takes the place of the old one only when it is complete.

    with StoreWriter(folder, image_size=64, with_masks=False) as writer:
        writer.add("train", image, label="NORMAL", mask=None, row={"path": …})
        writer.commit(rejected=[], preprocessing={}, source="…")
    """

    def __init__(self, folder: Path, image_size: int, with_masks: bool) -> None:
        self.folder = folder
        self.building = folder.with_name(f"{folder.name}.building")
        self.shape = (1, image_size, image_size)
        self.with_masks = with_masks

    def __enter__(self) -> Self:
        shutil.rmtree(self.building, ignore_errors=True)  # left by a run that was killed
        kinds = ("images", "masks") if self.with_masks else ("images",)
        self._arrays: dict[tuple[str, str], _ArrayFile] = {}
        for split in SPLITS:
            (self.building / split).mkdir(parents=True)
            for kind in kinds:
                self._arrays[split, kind] = _ArrayFile(self.building / split / f"{kind}.npy", self.shape)
        self._rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for array in self._arrays.values():
            array.close()
        shutil.rmtree(self.building, ignore_errors=True)  # gone already after commit

    def add(
        self,
        split: str,
        image: NDArray[np.uint8],
        label: str | None,
        mask: NDArray[np.uint8] | None,
        row: Mapping[str, str],
    ) -> None:
        """Appends an image (H, W), and a mask (H, W) of 0/1, to a split; `row` holds the manifest's other columns."""
        self._arrays[split, "images"].append(image[None])
        if self.with_masks:
            self._arrays[split, "masks"].append(np.zeros(self.shape, np.uint8) if mask is None else mask[None])
        self._rows[split].append({**row, "split": split, "label": label or ""})

    def commit(
        self, rejected: Sequence[tuple[str, str]], preprocessing: Mapping[str, Any], source: str, name: str = "dataset"
    ) -> Store:
        """Writes labels, manifest and description, then puts the folder in the old one's place."""
        for array in self._arrays.values():
            array.close()
        classes = sorted({row["label"] for rows in self._rows.values() for row in rows} - {""})
        index = {"": UNLABELLED, **{name: i for i, name in enumerate(classes)}}
        for split, rows in self._rows.items():
            labels = np.array([index[row["label"]] for row in rows], dtype=np.int64)
            np.save(self.building / split / "labels.npy", labels, allow_pickle=False)
        write_csv(self.building / MANIFEST, COLUMNS, [row for rows in self._rows.values() for row in rows])
        refused = [{"path": path, "reason": reason} for path, reason in rejected]
        write_csv(self.building / REJECTED, REJECTED_COLUMNS, refused)
        names = sorted(path.relative_to(self.building).as_posix() for path in self.building.rglob("*.*"))
        files = {
            name: {"bytes": (self.building / name).stat().st_size, "sha256": hash_file(self.building / name)}
            for name in names
        }
        description = {
            "schema": SCHEMA,
            "name": name,
            "fingerprint": config.fingerprint(SCHEMA, classes, self.shape, files),
            "classes": classes,
            "image_shape": self.shape,
            "intensity": [0, 255],
            "counts": {split: len(rows) for split, rows in self._rows.items()},
            "preprocessing": preprocessing,
            "source": source,
            "files": files,
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (self.building / DESCRIPTION).write_text(text, encoding="utf-8")
        swap(self.building, self.folder)
        return open_store(self.folder)


class _ArrayFile:
    """A .npy file of uint8 items that grows by one at a time; its header is put right when it is closed."""

    def __init__(self, path: Path, item_shape: tuple[int, ...]) -> None:
        self.item_shape = item_shape
        self.count = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()
        self._start = self._file.tell()

    def append(self, item: NDArray[np.uint8]) -> None:
        if item.shape != self.item_shape or item.dtype != np.uint8:
            raise ValueError(f"expected uint8 {self.item_shape}, found {item.dtype} {item.shape}")
        self._file.write(np.ascontiguousarray(item).data)
        self.count += 1

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start, "NumPy leaves room in the header for a longer first axis"
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.item_shape)}
        npy.write_array_header_1_0(self._file, header)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Writes rows of text under a header, with Unix line ends."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, stream.getvalue().encode())


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{path}: not there; expected the preprocessed dataset. Run `medgen preprocess` or `dvc repro`")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        schema = description["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"unreadable ({error})", "a dataset's description") from None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema}; expected {SCHEMA}. Run `medgen preprocess` again")
    expected = {"classes", "image_shape", "counts", "fingerprint", "files", "source"}
    if missing := expected - description.keys():
        raise _damaged(path, f"no {', '.join(sorted(missing))}", "a complete description")
    digest = config.fingerprint(SCHEMA, description["classes"], description["image_shape"], description["files"])
    if digest != description["fingerprint"]:
        raise _damaged(path, f"content of fingerprint {digest}", f"{description['fingerprint']}")
    return dict(description)


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise _damaged(path, "no such file", f"{expected['bytes']} bytes")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise _damaged(path, f"{size} bytes", f"{expected['bytes']}")
    if (digest := hash_file(path)) != expected["sha256"]:
        raise _damaged(path, f"sha256 {digest[:12]}…", f"{expected['sha256'][:12]}…")


def _check_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    array = _open_array(path)
    if array.dtype != dtype or array.shape != shape:
        raise _damaged(path, f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}")


def _open_array(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path, f"unreadable ({error})", "a NumPy array") from None


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads what `write_csv` wrote; a UserError where the columns are others."""
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise _damaged(path, f"columns {reader.fieldnames}", f"{list(columns)}")
        return list(reader)


def _damaged(path: Path, found: str, expected: str) -> UserError:
    return UserError(f"{path}: damaged: found {found}; expected {expected}. Run `medgen preprocess` again")
