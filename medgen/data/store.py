"""Read and write the preprocessed dataset: memory-mapped arrays and a manifest with the source of each row.

artifacts/dataset/
  train/ val/ test/   images-00000.npy, images-00001.npy, … (N, C, H, W) uint8 or uint16 · labels.npy (N,) int64;
                      volumes are (N, C, D, H, W), and their masks (N, 1, D, H, W)
                      masks-00000.npy, … (N, 1, H, W) uint8 class numbers
                      paired-00000.npy, … (N, P, H, W) uint8, images of the conditions of kind image
  manifest.csv        row i of a split = array row i: source file, index in the file, sha256, label, patient,
                      original size and mode; sex, age and view if the user's manifest.csv has any of them; the columns
                      of `preprocess.conditions`, of kind image the paired file
  rejected.csv        files and images that are not in the dataset, with reasons
  dataset.json        schema, classes, shape, counts, preprocessing, intensities, hash of every file
artifacts/dataset.checked.json   time stamps of the files at the last check of their hashes; can be deleted

Images, masks and paired images are in shards of at most SHARD_BYTES, or of one image. All shards but the last have the
same number of rows.

Shapes: N images of a split, C channels (1 grey, 3 colour), P conditions of kind image, H W height and width.
"""

import csv
import io
import json
import math
import shutil
import sys
import time
import tokenize
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TextIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from medgen import config
from medgen.console import say
from medgen.data.conditions import ConditionField, ConditionSpace
from medgen.errors import UserError
from medgen.io import hash_file, parsing, swap, to_json, write_atomic

SCHEMA = 3
SPLITS = ("train", "val", "test")
UNLABELLED = -1
DESCRIPTION, MANIFEST, REJECTED = "dataset.json", "manifest.csv", "rejected.csv"
SHARD_BYTES = 256 << 20
# A file that changes twice within a clock tick keeps its time stamp. 2 s is the longest tick of a file system (FAT).
_SETTLED_NS = 2_000_000_000
COLUMNS = ("split", "path", "index", "sha256", "label", "patient", "width", "height", "mode", "mask")
ATTRIBUTES = ("sex", "age", "view")  # further columns, if an image has one of them
REJECTED_COLUMNS = ("path", "reason")
_QUOTING: Literal[1] = csv.QUOTE_ALL  # an unquoted carriage return in a file name ends the row (Python 3.11)


class ShardedArray:
    """A read-only array (N, …) in memory-mapped shards, indexed like a NumPy array.

    The first index is an integer, a slice, or a sequence of integers or booleans. The result is a new NumPy array: only
    the rows asked for are read. `np.asarray` reads all rows.
    """

    def __init__(self, shards: Sequence[NDArray[Any]]) -> None:
        """All `shards` but the last have the same number of rows."""
        self._shards = [shard.view(np.ndarray) for shard in shards]  # indexed faster than np.memmap
        self._rows_per_shard = max(1, len(shards[0]))
        self.shape: tuple[int, ...] = (sum(map(len, shards)), *shards[0].shape[1:])
        self.dtype = shards[0].dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        first, *others = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int | np.integer):
            return np.asarray(self._read(np.array([first]))[(0, *others)])
        if first is Ellipsis:
            first, others = slice(None), [first, *others]
        rows = np.arange(*first.indices(len(self))) if isinstance(first, slice) else np.asarray(first)
        if rows.dtype == np.bool_:
            if rows.shape != self.shape[:1]:
                raise IndexError(f"booleans of shape {rows.shape}; expected {self.shape[:1]}")
            rows = np.flatnonzero(rows)
        return np.asarray(self._read(rows.astype(np.int64))[(slice(None), *others)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of these rows (M,); negative ones count from the end."""
        if len(rows) and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row {rows.min()} or {rows.max()} is out of range for {len(self)} rows")
        shard, row = np.divmod(np.where(rows < 0, rows + len(self), rows), self._rows_per_shard)
        if len(self._shards) == 1:
            return self._shards[0][row]
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for number in np.unique(shard):
            chosen = np.flatnonzero(shard == number)
            result[chosen] = self._shards[number][row[chosen]]
        return result


@dataclass(frozen=True, repr=False)
class Split:
    """The memory-mapped, read-only arrays of one split."""

    name: str
    images: ShardedArray  # (N, C, H, W) uint8 or uint16
    labels: NDArray[np.int64]  # (N,), -1 if unlabelled
    masks: ShardedArray | None  # (N, 1, H, W) uint8 class numbers, 0/1 if binary; see `masked_rows`
    manifest: Path
    conditions: ConditionSpace | None = None  # of `preprocess.conditions`
    paired: ShardedArray | None = None  # (N, P, H, W) uint8 images of the conditions of kind image; see `has_map`

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, images={self.images.shape}, masks={self.masks is not None})"

    def rows(self) -> Iterator[dict[str, str]]:
        """The split's rows of manifest.csv, in the order of the arrays."""
        names = [field.name for field in self.conditions.fields] if self.conditions else []
        return (row for row in read_csv(self.manifest, COLUMNS, (*ATTRIBUTES, *names)) if row["split"] == self.name)

    @cached_property
    def masked_rows(self) -> NDArray[np.int64]:
        """Positions of the images that have a mask."""
        if self.masks is None:
            return np.zeros(0, np.int64)
        return np.fromiter((i for i, row in enumerate(self.rows()) if row["mask"]), np.int64)

    @cached_property
    def condition_values(self) -> NDArray[np.float32]:
        """Conditions (N, K) of the images, as `medgen.data.conditions` describes; K is 0 without any."""
        if self.conditions is None:
            return np.zeros((len(self), 0), np.float32)
        return self.conditions.encode_rows(self.rows())

    def has_map(self, name: str) -> NDArray[np.bool_]:
        """True (N,) for each image that has the mask or paired image which is the condition `name`."""
        return self._has_maps[name]

    def read_map(self, field: ConditionField, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Class numbers of masks or grey values of paired images (B, 1, H, W) of rows (B,); 0 where there is none."""
        stored, channel = self.masks, 0
        if field.kind == "image":
            assert self.conditions is not None
            stored, channel = self.paired, self.conditions.images.index(field)
        if stored is None:
            return np.zeros((len(rows), 1, *self.images.shape[2:]), np.uint8)
        return stored[rows, channel : channel + 1]

    @cached_property
    def _has_maps(self) -> dict[str, NDArray[np.bool_]]:
        fields = self.conditions.map_fields.values() if self.conditions else ()
        columns = {field.name: "mask" if field.kind == "mask" else field.name for field, _ in fields}
        found: dict[str, list[bool]] = {name: [] for name in columns}
        for row in self.rows() if columns else ():
            for name, column in columns.items():
                found[name].append(bool(row[column]))
        return {name: np.array(has, np.bool_) for name, has in found.items()}

    @property
    def paths(self) -> list[str]:
        """Source files, relative to the data folder, in the order of the arrays."""
        return [row["path"] for row in self.rows()]

    @cached_property
    def patients(self) -> list[str] | None:
        """Patient of each image, for statistics by patient.

        None if a patient is unknown, or if there are fewer than three patients or fewer than two images without one.
        """
        names = [sys.intern(row["patient"]) for row in self.rows()]  # one copy of each name in memory
        counts = Counter(names)
        return names if all(names) and len(counts) >= 3 and max(counts.values()) <= len(names) - 2 else None


@dataclass(frozen=True, repr=False)
class Store:
    """A checked dataset folder."""

    folder: Path
    classes: tuple[str, ...]  # label i is classes[i]; empty when nothing is labelled
    image_shape: tuple[int, ...]  # C, H, W; of volumes C, D, H, W
    counts: dict[str, int]  # images per split
    fingerprint: str  # 12 hexadecimal digits of the content's hash
    source: str  # digest of the source files and settings
    name: str  # data.name
    preprocess: config.Preprocess  # settings that a new image needs too
    conditions: ConditionSpace | None = None  # what generation can be conditioned on besides the class

    def __repr__(self) -> str:
        return (
            f"Store({str(self.folder)!r}, name={self.name!r}, counts={self.counts}, image_shape={self.image_shape}, "
            f"classes={self.classes})"
        )

    @property
    def plane_shape(self) -> tuple[int, int, int]:
        """Shape of an image; of volumes that of their planes, see `medgen.data.images.middle_planes`."""
        channels, *sides = self.image_shape
        if len(sides) == 2:
            return channels, sides[0], sides[1]
        return 3 * channels, max(sides), max(sides)

    def split(self, name: str) -> Split:
        """Open "train", "val" or "test"."""
        if name not in SPLITS:
            raise config.unknown_name("split", name, SPLITS)
        folder = self.folder / name
        images = _open_shards(folder, "images")
        assert images is not None, "open_store has checked it"
        return Split(
            name=name,
            images=images,
            labels=_open_array(folder / "labels.npy"),
            masks=_open_shards(folder, "masks"),
            manifest=self.folder / MANIFEST,
            conditions=self.conditions,
            paired=_open_shards(folder, "paired"),
        )


def open_store(folder: Path) -> Store:
    """Open a dataset folder after a check of its files against dataset.json.

    A file is hashed once. Later its size and time stamp are compared with those in FOLDER.checked.json, so that a large
    dataset opens as fast as a small one. This misses a change that keeps both, by a failing disk or by someone who sets
    the time stamp back; `verify_store` hashes all files again. Where FOLDER.checked.json cannot be written, every call
    hashes all files.

    Raises:
        UserError: the folder is missing, has another schema, or a file in it is missing or damaged.
    """
    description = _read_description(folder)
    earlier = _read_checked(folder)
    with parsing(folder / DESCRIPTION, "medgen preprocess"):
        checked = {}
        for name, expected in description["files"].items():
            checked[name], damage = _check_file(folder / name, expected, earlier.get(name))
            if damage:
                raise _damaged(folder / name, damage)
        _write_checked(folder, checked)
        counts = description["counts"]
        shape = tuple(description["image_shape"])
        preprocess = config.Preprocess.model_validate(description["preprocessing"])
        for split in SPLITS:  # the fingerprint, checked above, covers all files, but not the counts
            images, expected_shape = _open_shards(folder / split, "images"), (counts[split], *shape)
            if images is None or images.shape != expected_shape or images.dtype != f"u{preprocess.bits // 8}":
                found = "no file" if images is None else f"{images.dtype} {images.shape}"
                expected = f"uint{preprocess.bits} {expected_shape}"
                raise _damaged(folder / split / "images-*.npy", f"found {found}; expected {expected}")
        return Store(
            folder=folder,
            classes=tuple(description["classes"]),
            image_shape=shape,
            counts=dict(counts),
            fingerprint=description["fingerprint"],
            source=description["source"],
            name=description["name"],
            preprocess=preprocess,
            conditions=ConditionSpace.load(description.get("conditions", [])),
        )


def verify_store(folder: Path) -> None:
    """Hash every file of a dataset folder, whatever was checked before, and print the result.

    Raises:
        UserError: as `open_store`; the message names every damaged file.
    """
    files = _read_description(folder)["files"]
    with parsing(folder / DESCRIPTION, "medgen preprocess"):
        results = {name: _check_file(folder / name, expected) for name, expected in files.items()}
    damages = {name: damage for name, (_, damage) in results.items() if damage}
    # opening then refuses a damaged file, also one with its old time stamp
    _write_checked(folder, {name: stamp for name, (stamp, _) in results.items() if name not in damages})
    if damages:
        found = "; ".join(f"{name}: {damage}" for name, damage in damages.items())
        raise UserError(
            f"{folder}: {len(damages)} of {len(files)} files are damaged: {found}. Run `medgen preprocess` again"
        )
    open_store(folder)
    size = sum(expected["bytes"] for expected in files.values())
    say(f"{folder}: the SHA-256 of all {len(files)} files ({size / 1e6:,.1f} MB) is correct")


class StoreWriter:
    """Write a dataset folder image by image. The folder replaces the old one only when it is complete.

    with StoreWriter(folder, image_shape=(1, 64, 64), with_masks=False) as writer:
        writer.add(image, mask=None, row={"path": …, "label": "NORMAL"})
        writer.commit(splits=["train"], rejected=[], preprocessing={}, source="…")

    All images are first written to one file, because their splits depend on duplicates and leaks and are known only at
    the end. Only the splits are held in memory.
    """

    def __init__(
        self,
        folder: Path,
        image_shape: tuple[int, ...],
        with_masks: bool,
        with_attributes: bool = False,
        bits: int = 8,
        columns: Sequence[str] = (),
        num_paired: int = 0,
    ) -> None:
        """`bits` of an image's grey value: 8 or 16; further `columns` of the manifest; P paired images of each."""
        self.folder = folder
        attributes = ATTRIBUTES if with_attributes else ()
        self._columns = (*COLUMNS, *attributes, *(name for name in columns if name not in attributes))
        self.building = folder.with_name(f"{folder.name}.building")
        self.shape = image_shape
        channels = {"masks": int(with_masks), "paired": num_paired}
        self.shapes = {"images": image_shape} | {kind: (n, *image_shape[1:]) for kind, n in channels.items() if n}
        self.dtypes = {"images": np.dtype(f"u{bits // 8}"), "masks": np.dtype(np.uint8), "paired": np.dtype(np.uint8)}
        self._staging = self.building / "staging"
        self._open_files = ExitStack()

    def __enter__(self) -> Self:
        shutil.rmtree(self.building, ignore_errors=True)  # left by a killed run
        self._staging.mkdir(parents=True)
        opened = self._open_files.enter_context
        self._arrays = {kind: opened((self._staging / kind).open("wb")) for kind in self.shapes}
        self._rows = opened(_csv_writer(self._staging / MANIFEST, self._columns))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()
        shutil.rmtree(self.building, ignore_errors=True)  # does not exist after commit

    def add(
        self,
        image: NDArray[Any],
        mask: NDArray[np.uint8] | None,
        row: Mapping[str, str],
        paired: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append an image or volume, its manifest row without the split, a mask and paired images.

        `mask` (1, H, W) has class numbers, `paired` is (P, H, W); None: zeros.
        """
        given = {"images": image, "masks": mask, "paired": paired}
        for kind, shape in self.shapes.items():
            item: NDArray[Any] = np.zeros(shape, np.uint8) if given[kind] is None else np.asarray(given[kind])
            if item.shape != shape or item.dtype != self.dtypes[kind]:
                raise ValueError(f"expected {self.dtypes[kind]} {shape}, found {item.dtype} {item.shape}")
            self._arrays[kind].write(np.ascontiguousarray(item).data)
        self._rows.writerow(row)

    def commit(
        self,
        splits: Sequence[str | None],
        rejected: Iterable[tuple[str, str]],
        preprocessing: Mapping[str, Any],
        source: str,
        name: str = "dataset",
    ) -> Store:
        """Sort the images into their `splits` (None: left out) and replace the old folder. Returns the new store."""
        self._open_files.close()
        classes = sorted(
            {row["label"] for split, row in zip(splits, self._read_rows(), strict=True) if split is not None} - {""}
        )
        train_rows = (row for split, row in zip(splits, self._read_rows(), strict=True) if split == "train")
        space = ConditionSpace.from_rows(config.Preprocess.model_validate(preprocessing), train_rows)
        conditions = {} if space is None else {"conditions": space.dump()}
        with _csv_writer(self.building / MANIFEST, self._columns) as manifest:
            counts = {split: self._write_split(split, splits, classes, manifest) for split in SPLITS}
        shutil.rmtree(self._staging)
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
            "fingerprint": config.fingerprint(SCHEMA, classes, self.shape, files, *conditions.values()),
            "classes": classes,
            **conditions,
            "image_shape": self.shape,
            "intensity": [0, np.iinfo(self.dtypes["images"]).max],
            **_scale(preprocessing, np.iinfo(self.dtypes["images"]).max),
            "counts": counts,
            "preprocessing": preprocessing,
            "source": source,
            "files": files,
        }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (self.building / DESCRIPTION).write_text(text, encoding="utf-8")
        swap(self.building, self.folder)
        stamps = {name: (self.folder / name).stat().st_mtime_ns for name in files}
        _write_checked(self.folder, {name: [stamps[name], file["sha256"]] for name, file in files.items()})
        return open_store(self.folder)

    def _write_split(
        self, split: str, splits: Sequence[str | None], classes: Sequence[str], manifest: "csv.DictWriter[str]"
    ) -> int:
        """Write the arrays and manifest rows of one split; returns its number of images."""
        index = {"": UNLABELLED, **{name: i for i, name in enumerate(classes)}}
        labels, rows = array("q"), array("q")
        folder = self.building / split
        folder.mkdir()
        for number, (chosen, row) in enumerate(zip(splits, self._read_rows(), strict=True)):
            if chosen == split:
                rows.append(number)
                labels.append(index[row["label"]])
                manifest.writerow({**row, "split": split})
        for kind, shape in self.shapes.items():
            dtype = self.dtypes[kind]
            staged = np.memmap(self._staging / kind, dtype, "r", shape=(len(splits), *shape))
            size = max(1, SHARD_BYTES // (math.prod(shape) * dtype.itemsize))
            for shard, start in enumerate(range(0, max(1, len(rows)), size)):
                chosen_rows = rows[start : start + size]
                with (folder / f"{kind}-{shard:05}.npy").open("wb") as file:
                    header = {
                        "descr": npy.dtype_to_descr(dtype),
                        "fortran_order": False,
                        "shape": (len(chosen_rows), *shape),
                    }
                    npy.write_array_header_1_0(file, header)
                    for number in chosen_rows:
                        file.write(staged[number].data)
        np.save(folder / "labels.npy", np.array(labels, dtype=np.int64), allow_pickle=False)
        return len(labels)

    def _read_rows(self) -> Iterator[dict[str, str]]:
        return read_csv(self._staging / MANIFEST, self._columns)


def _scale(preprocessing: Mapping[str, Any], white: int) -> dict[str, Any]:
    """The entry `scale` of dataset.json, with which slope · grey value + intercept is the intensity in the unit."""
    window = config.Preprocess.model_validate(preprocessing).scale
    if window is None:
        return {}
    return {"scale": {"slope": (window.high - window.low) / white, "intercept": window.low, "unit": window.unit}}


@contextmanager
def _csv_writer(path: Path, columns: Sequence[str]) -> Iterator["csv.DictWriter[str]"]:
    """Writer of a new manifest.csv, with its header and Unix line ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        yield _start_csv(file, columns)


def _start_csv(stream: TextIO, columns: Sequence[str]) -> "csv.DictWriter[str]":
    writer = csv.DictWriter(stream, columns, lineterminator="\n", restval="", quoting=_QUOTING)
    writer.writeheader()
    return writer


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a header and rows of text, with Unix line ends."""
    stream = io.StringIO(newline="")
    _start_csv(stream, columns).writerows(rows)
    write_atomic(path, stream.getvalue().encode())


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the preprocessed dataset. Run `medgen preprocess` or `dvc repro`")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        schema = description["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"unreadable ({error}); expected a dataset's description") from None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema {schema}; expected {SCHEMA}. Run `medgen preprocess` again")
    expected = {"classes", "image_shape", "counts", "fingerprint", "files", "source", "name", "preprocessing"}
    if missing := expected - description.keys():
        raise _damaged(path, f"found no {', '.join(sorted(missing))}; expected a complete description")
    parts = (description[name] for name in ("classes", "image_shape", "files", "conditions") if name in description)
    digest = config.fingerprint(SCHEMA, *parts)
    if digest != description["fingerprint"]:
        raise _damaged(path, f"found content of fingerprint {digest}; expected {description['fingerprint']}")
    return dict(description)


def _check_file(path: Path, expected: Mapping[str, Any], earlier: object = None) -> tuple[list[Any], str]:
    """Time stamp and expected SHA-256 of a file, and its damage, "" without. Hashed unless `earlier` has the same."""
    try:
        status = path.stat()
    except OSError:
        return [], f"found no such file; expected {expected['bytes']} bytes"
    stamp = [status.st_mtime_ns, expected["sha256"]]
    if status.st_size != expected["bytes"]:
        return stamp, f"found {status.st_size} bytes; expected {expected['bytes']}"
    if stamp != earlier and (digest := hash_file(path)) != expected["sha256"]:
        return stamp, f"found sha256 {digest[:12]}…; expected {expected['sha256'][:12]}…"
    return stamp, ""


def _checked_path(folder: Path) -> Path:
    """File beside the folder, whose bytes are reproducible and belong to DVC."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.checked.json")


def _read_checked(folder: Path) -> dict[str, list[Any]]:
    """Name of each checked file to its time stamp and SHA-256; empty if the record is missing or unreadable."""
    with suppress(OSError, ValueError):
        if isinstance(found := json.loads(_checked_path(folder).read_text(encoding="utf-8")), dict):
            return found
    return {}


def _write_checked(folder: Path, checked: Mapping[str, list[Any]]) -> None:
    """Record the checked files, unless the record has them already or cannot be written."""
    latest = time.time_ns() - _SETTLED_NS
    settled = {name: stamp for name, stamp in checked.items() if stamp[0] < latest}
    if settled != _read_checked(folder):
        with suppress(OSError):
            write_atomic(_checked_path(folder), to_json(settled))


def map_array(path: Path) -> NDArray[Any]:
    """The array of an .npy file, mapped into memory.

    Raises:
        ValueError: it is no such file.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, TypeError, ArithmeticError, tokenize.TokenError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays")
    return array


def _open_array(path: Path) -> NDArray[Any]:
    try:
        return map_array(path)
    except ValueError as error:
        raise _damaged(path, f"unreadable ({error}); expected a NumPy array") from None


def _open_shards(folder: Path, kind: str) -> ShardedArray | None:
    """The images, masks or paired images of a split; None if it has none."""
    paths = sorted(folder.glob(f"{kind}-*.npy"))
    return ShardedArray([_open_array(path) for path in paths]) if paths else None


def read_csv(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """Rows of a CSV file, which may have some of the optional columns after the others.

    Raises:
        UserError: the file is no CSV, or has other columns.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            names = tuple(reader.fieldnames or ())
            if names[: len(columns)] != tuple(columns) or not set(names[len(columns) :]) <= set(optional):
                raise _damaged(path, f"found columns {reader.fieldnames}; expected {list(columns)}")
            for row in reader:
                if None in row or None in row.values():
                    raise _damaged(path, f"found another number of columns in line {reader.line_num}")
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise _damaged(path, f"unreadable ({error}); expected a table") from None


def _damaged(path: Path, damage: str) -> UserError:
    return UserError(f"{path}: damaged: {damage}. Run `medgen preprocess` again")
