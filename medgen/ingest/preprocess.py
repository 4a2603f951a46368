"""Convert image files to the dataset store: read, equalise, resize and split.

medgen preprocess --set preprocess.image_size=128

Images are appended to the store as they are read. Splits are assigned at the end, when all images have been compared:
duplicates decide which patients must stay in one split.
"""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from medgen import config
from medgen.config import Project
from medgen.console import counting_bar, note, warn
from medgen.data import store
from medgen.data.conditions import MAX_VALUES, parse_number, split_findings
from medgen.errors import UserError
from medgen.ingest import dataset_scan, patients, splits
from medgen.ingest.dataset_checks import ImageIndex, check_dataset, escaped, summary_lines
from medgen.ingest.dataset_scan import ImageRecord, ScanResult
from medgen.ingest.folders import Folder, data_folder
from medgen.ingest.formats.raw import Affine, RawImage
from medgen.ingest.manifest import MANIFEST
from medgen.ingest.near_duplicates import THUMBNAIL_SIZE, thumbnail
from medgen.ingest.reading import ReadResult, hash_sources, read_images
from medgen.ingest.transforms import (
    Stored,
    preprocess_mask,
    preprocess_paired,
    preprocess_raw,
    resized_affine,
    voxel_size,
)

_Rejected = tuple[str, str]  # name of an image or path of a file, and the reason


# image or volume, mask of class numbers, paired images, thumbnail, place of a volume
_Sample = tuple[Stored, NDArray[np.uint8] | None, NDArray[np.uint8] | None, NDArray[np.uint8], Affine | None]


def run(project: Project, *, data: config.Data, preprocess: config.Preprocess) -> store.Store:
    """Create artifacts/dataset from the data folder, unless it is up to date.

    Raises:
        UserError: there are no images or no training images, the manifest is wrong, more than `max_rejected` of the
            images are unreadable, `data.duplicates` or `data.leaks` is "error" and there are some, or the bucket or the
            cluster that the parameters name cannot be used.
    """
    folder = data_folder(project.root, data.path)
    is_inside = isinstance(folder, Path) and folder.resolve().is_relative_to(project.root.resolve())
    salt_folder = folder if isinstance(folder, Path) and is_inside else project.root  # nothing is written elsewhere
    scanned = dataset_scan.scan(folder, data, preprocess, salt_folder)
    if scanned.has_patient_ids and not data.keep_patient_ids and not scanned.has_salt:
        patients.write_salt(salt_folder)
        path = salt_folder / patients.SALT_FILE
        note(escaped(f"{path}: new secret salt of the patients' pseudonyms; keep it with the data"))
        scanned = dataset_scan.scan(folder, data, preprocess, salt_folder)
    if data.splits == "own":
        scanned = replace(scanned, records=[replace(record, split=None) for record in scanned.records])
    current = _open_if_current(project, data, scanned, preprocess)
    state = "unchanged"
    if current is None:
        try:
            with _only_build(project) as waited:
                current = _open_if_current(project, data, scanned, preprocess) if waited else None
                if current is None:
                    _check_disk_space(project, len(scanned.records), preprocess)
                    current, state = _build(project, data, scanned, preprocess), "written"
        except OSError as error:
            raise UserError(
                f"{project.dataset}: cannot be written: {error.strerror or error}; expected a writable folder with "
                f"{_num_bytes(len(scanned.records), preprocess) / 1e6:.0f} MB of free space. Free disk space or change "
                "the folder's permissions"
            ) from error
    note(escaped(_summary(current, state)))
    return current


@contextmanager
def _only_build(project: Project) -> Iterator[bool]:
    """Wait until no other process builds the project's dataset; yields True if one did."""
    project.dataset.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(project.dataset.with_name("dataset.lock"))
    try:
        lock.acquire(timeout=0)
        waited = False
    except Timeout:
        note("another process is making the dataset; waiting for it")
        lock.acquire()
        waited = True
    try:
        yield waited
    finally:
        lock.release()


def _open_if_current(
    project: Project, data: config.Data, scanned: ScanResult, preprocess: config.Preprocess
) -> store.Store | None:
    """The existing store if it was made from the same files and settings. Compares file contents, not time stamps."""
    if not project.dataset.exists():
        return None
    try:
        existing = store.open_store(project.dataset)
    except UserError:
        return None  # damaged, so rebuild it
    source = _SourceDigest(data, scanned, preprocess)
    hashes = hash_sources(data_folder(project.root, data.path), scanned.records, preprocess)
    for record, digest in zip(scanned.records, hashes, strict=True):
        source.add(record, digest)
    return existing if existing.name == data.name and existing.source == source.digest() else None


def _build(project: Project, data: config.Data, scanned: ScanResult, preprocess: config.Preprocess) -> store.Store:
    folder, records = data_folder(project.root, data.path), scanned.records
    shape = (preprocess.channels, *preprocess.sides)
    with_masks = any(record.mask for record in records)
    unreadable: list[_Rejected] = []
    left_out: list[_Rejected] = []
    source = _SourceDigest(data, scanned, preprocess)
    voxel_sizes: list[tuple[float, float, float] | None] = []

    def transform(
        record: ImageRecord, raw: RawImage, mask: RawImage | None, paired: Sequence[RawImage | None]
    ) -> _Sample:
        image = preprocess_raw(raw, preprocess)
        small_mask = None if mask is None else preprocess_mask(mask, raw, str(record.mask), preprocess)
        others = preprocess_paired(paired, raw, record.paired, preprocess)
        return image, small_mask, others, thumbnail(raw.preview), resized_affine(raw, preprocess)

    columns = [name for name, condition in preprocess.conditions.items() if condition.kind != "mask"]
    num_paired = len(preprocess.paired_folders)
    _check_conditions(folder, scanned, preprocess)
    with (
        store.StoreWriter(
            project.dataset, shape, with_masks, bool(scanned.attributes), preprocess.bits, columns, num_paired
        ) as writer,
        ImageIndex(project.runs) as index,
        counting_bar() as progress,
    ):
        task = progress.add_task("preprocess", total=len(records))
        for result in read_images(folder, records, preprocess, transform):
            source.add(result.record, result.source)
            if result.value is None:
                (left_out if result.left_out else unreadable).append((result.record.name, result.reason))
            else:
                image, mask, paired, thumb, affine = result.value
                voxel_sizes.append(None if affine is None else voxel_size(affine))
                row = {**_manifest_row(result), **scanned.attributes_of(result.record)}
                for name, path in zip(preprocess.paired_folders, result.record.paired, strict=True):
                    row[name] = path or ""
                writer.add(image, mask, row, paired)
                index.add(result, thumb)
            progress.advance(task)
        _check_unreadable(project, unreadable, len(records), preprocess.max_rejected)
        assigned, dropped = _assign_splits(index, data, preprocess)
        rejected = [*unreadable, *left_out, *dropped]
        _check_splits(folder, assigned, rejected)
        rejected = sorted([*rejected, *scanned.other_files])
        of_train = [size for size, split in zip(voxel_sizes, assigned, strict=True) if size and split == "train"]
        if of_train and preprocess.voxel_size is None:
            depth, height, width = np.median(of_train, axis=0).round(4).tolist()
            preprocess = preprocess.model_copy(update={"voxel_size": (depth, height, width)})
        return writer.commit(assigned, rejected, preprocess.model_dump(mode="json"), source.digest(), data.name)


def _assign_splits(
    index: ImageIndex, data: config.Data, preprocess: config.Preprocess
) -> tuple[list[str | None], list[_Rejected]]:
    """Split of each indexed image, None for a dropped duplicate; and the dropped images with their reasons."""
    records = index.records
    exact = index.exact_duplicates
    if exact and data.duplicates == "error":
        raise UserError(
            f"data.duplicates is error: {len(exact)} images occur in several files, for example "
            f"{' and '.join(records[row].name for row in exact[0][:2])}; expected each image once. "
            "`medgen data audit` lists them; set data.duplicates to drop, or remove the copies"
        )
    dropped = dict(_find_dropped(records, exact)) if data.duplicates == "drop" else {}
    pairs = [(group[0], row) for group in exact for row in group[1:]]
    pairs += [(pair.first, pair.second) for pair in index.near_duplicates]
    # Dropped copies take part in the grouping: they may link two images that are kept.
    all_groups = splits.group_patients(records, pairs)
    kept = [row for row in range(len(records)) if row not in dropped]
    kept_records, groups = [records[row] for row in kept], [all_groups[row] for row in kept]
    if data.leaks == "move":
        kept_records = splits.unify_splits(kept_records, groups)
    names = splits.assign_splits(
        kept_records, preprocess.val_fraction, preprocess.test_fraction, preprocess.seed, groups
    )
    assigned: list[str | None] = [None] * len(records)
    for row, name in zip(kept, names, strict=True):
        assigned[row] = name
    results = check_dataset(index, assigned, dropped)
    for line in summary_lines(results):
        warn(line)
    if results.leaks and data.leaks == "error":
        raise UserError(
            f"data.leaks is error: {results.leaks[0]}; found {len(results.leaks)} leaks, expected none. "
            "`medgen data audit` lists them; set data.leaks to move, or correct the dataset's own split"
        )
    return assigned, [(records[row].name, reason) for row, reason in dropped.items()]


def _find_dropped(records: Sequence[ImageRecord], exact: Iterable[Sequence[int]]) -> Iterator[tuple[int, str]]:
    """Rows of exact duplicates to drop, with the reasons.

    One copy of each group is kept, from the test split if there is one, then val, then train. A group with several
    labels is dropped whole, because the correct label is unknown.
    """
    order = {"test": 0, "val": 1, "train": 2, None: 3}
    for group in exact:
        labels = sorted({label for row in group if (label := records[row].label)})
        if len(labels) > 1:
            yield from ((row, f"one image under the labels {', '.join(labels)}") for row in group)
        else:
            first, *rest = sorted(group, key=lambda row: (order[records[row].split], not records[row].label, row))
            yield from ((row, f"a duplicate of {records[first].name}") for row in rest)


class _SourceDigest:
    """Digest of all inputs of a store: settings, records and file hashes. Takes one record at a time."""

    def __init__(self, data: config.Data, scanned: ScanResult, preprocess: config.Preprocess) -> None:
        self._hash = hashlib.sha256(config.fingerprint(store.SCHEMA, data, preprocess).encode())
        for path, reason in scanned.other_files:
            self._hash.update(json.dumps([path, reason]).encode())
        for attributes in (scanned.attributes, scanned.findings):
            for place, values in sorted(attributes.items()):
                self._hash.update(json.dumps([place, *sorted(values.items())]).encode())

    def add(self, record: ImageRecord, digest: str) -> None:
        *values, paired, _ = astuple(record)  # the digest covers the slices of a series
        values += [paired] if paired else []  # as in versions without paired images
        self._hash.update(json.dumps([values, digest]).encode())

    def digest(self) -> str:
        return self._hash.hexdigest()[:12]


def _manifest_row(result: ReadResult[_Sample]) -> dict[str, str]:
    record = result.record
    return {
        "path": record.path,
        "index": str(record.index),
        "sha256": result.sha256,
        "label": record.label or "",
        "patient": record.patient,
        "width": str(result.size[0]),
        "height": str(result.size[1]),
        "mode": result.mode,
        "mask": record.mask or "",
    }


def _check_conditions(folder: Folder, scanned: ScanResult, preprocess: config.Preprocess) -> None:
    """Refuse a condition that no image has and a number that is none; warn about numbers out of range."""
    for name, condition in preprocess.conditions.items():
        key = f"preprocess.conditions.{name}"
        if condition.kind == "mask":
            if not any(record.mask for record in scanned.records):
                raise UserError(f"{key}: no image in {folder} has a mask; add masks, or remove the condition")
            continue
        if condition.folder is not None:
            at = list(preprocess.paired_folders).index(name)
            if not any(record.paired[at] for record in scanned.records):
                raise UserError(
                    f"{key}: no image in {folder} has a file of its name in a folder {condition.folder}; expected "
                    f"images/a.png with {condition.folder}/a.png. Add the files, or remove the condition"
                )
            continue
        texts = {record.name: scanned.attributes_of(record).get(name, "") for record in scanned.records}
        if not any(texts.values()):
            raise UserError(
                f"{key}: no image in {folder} has a value; expected a column {name} in {MANIFEST}, or remove the "
                "condition"
            )
        if condition.low is None or condition.high is None:
            split = split_findings if condition.kind == "multilabel" else lambda text: [text]
            if (count := len({value for text in texts.values() if text for value in split(text)})) > MAX_VALUES:
                raise UserError(
                    f"{key}: {count} different values in column {name}; expected at most {MAX_VALUES}, since a model's "
                    "files list them. A column of names or identifiers is no condition"
                )
            continue
        outside = []
        for image, text in texts.items():
            try:
                number = parse_number(text) if text else condition.low
            except ValueError:
                raise UserError(
                    f"{folder}/{MANIFEST}: {image} has {text[:40]!r} in column {name}; expected a number, or nothing "
                    "where it is unknown"
                ) from None
            if not condition.low <= number <= condition.high:
                outside.append(text)
        if outside:
            warn(
                f"{key}: {len(outside)} images have values outside of {condition.low:g} to {condition.high:g}, such as "
                f"{escaped(outside[0])}, which count as unknown"
            )


def _check_splits(folder: Folder, assigned: Sequence[str | None], rejected: Sequence[_Rejected]) -> None:
    """Refuse a dataset without training images; warn about other empty splits."""
    counts = Counter(name for name in assigned if name is not None)
    if not counts:
        reason, number = Counter(reason for _, reason in rejected).most_common(1)[0]
        raise UserError(
            f"{folder}: all {len(rejected)} images were rejected, {number} of them for this reason: {reason}. Expected "
            "at least one image: fix the files, or change preprocess.volume, preprocess.max_rejected or "
            "data.duplicates"
        )
    if not counts["train"]:
        raise UserError(
            f"{folder}: no training images among {counts.total()} ({dict(counts)}); expected some. Set data.splits=own "
            "to ignore the dataset's own splits, or lower preprocess.val_fraction and test_fraction"
        )
    if empty := [name for name in store.SPLITS if not counts[name]]:
        warn(
            f"no images in {' and '.join(empty)}: there are too few patients (see data.patient_pattern), or "
            "preprocess.val_fraction or test_fraction is 0"
        )


def _num_bytes(num_records: int, preprocess: config.Preprocess) -> int:
    """Peak disk use of a build: images as read, images by split, and thumbnails."""
    image_bytes = preprocess.channels * math.prod(preprocess.sides) * preprocess.bits // 8
    return num_records * (2 * image_bytes + THUMBNAIL_SIZE**2)


def _check_disk_space(project: Project, num_records: int, preprocess: config.Preprocess) -> None:
    needed, free = _num_bytes(num_records, preprocess), shutil.disk_usage(project.root).free
    if free < needed:
        raise UserError(
            f"{project.dataset}: {free / 1e6:.0f} MB free; expected {needed / 1e6:.0f} MB for {num_records} images. "
            "Free disk space, or lower preprocess.image_size"
        )


def _check_unreadable(project: Project, unreadable: Sequence[_Rejected], num_records: int, max_rejected: float) -> None:
    if len(unreadable) <= max_rejected * num_records:
        return
    path = project.runs / store.REJECTED  # artifacts/dataset is not written in this case
    rows = [{"path": name, "reason": reason} for name, reason in unreadable]
    store.write_csv(path, store.REJECTED_COLUMNS, rows)
    reasons = Counter(reason for _, reason in unreadable).most_common(3)
    raise UserError(
        f"{len(unreadable)} of {num_records} images are unreadable, more than preprocess.max_rejected = "
        f"{max_rejected:g} allows: "
        + "; ".join(f"{count} x {reason}" for reason, count in reasons)
        + f". Fix or remove the files listed in {path}, or raise preprocess.max_rejected"
    )


def _summary(current: store.Store, state: str) -> str:
    parts = []
    for name in store.SPLITS:
        labels = np.asarray(current.split(name).labels)
        per_class = ", ".join(f"{label} {int((labels == i).sum())}" for i, label in enumerate(current.classes))
        parts.append(f"{name} {current.counts[name]}" + (f" ({per_class})" if per_class else ""))
    rejected = current.folder / store.REJECTED
    num_rejected = sum(1 for _ in store.read_csv(rejected, store.REJECTED_COLUMNS))
    return f"dataset {current.fingerprint} {state}: {' · '.join(parts)} · rejected {num_rejected}, see {rejected}"
