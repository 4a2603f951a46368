"""Image files -> the uint8 store: read, equalise, resize and split, on all cores.

medgen preprocess --set preprocess.image_size=128

Pictures are written as they come and dealt to their splits at the end, when all have been compared: who shares a
picture with whom decides which side it may stand on.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from medgen import config
from medgen.config import Project
from medgen.console import counting_bar
from medgen.data import store
from medgen.errors import UserError
from medgen.ingest import dataset_checks, dataset_scan, patients, splits
from medgen.ingest.dataset_checks import Facts
from medgen.ingest.dataset_scan import Listing, Record
from medgen.ingest.formats.raw import RawImage
from medgen.ingest.near_duplicates import THUMB, thumbnail
from medgen.ingest.reading import Read, hash_sources, read_all
from medgen.ingest.transforms import square_of_mask, to_square


@dataclass(frozen=True, slots=True)
class _Picture:
    image: NDArray[np.uint8]  # (C, S, S)
    mask: NDArray[np.uint8] | None  # (1, S, S) of 0 and 1
    thumb: NDArray[np.uint8]


def run(
    project: Project, *, data: config.Data, preprocess: config.Preprocess, num_threads: int | None = None
) -> store.Store:
    """Makes artifacts/dataset from the data folder; returns at once where it already stands.

    Raises:
        UserError: no pictures, a wrong manifest, no training images, more than `max_rejected` unreadable pictures, or
            duplicates or leaks that `data.duplicates` or `data.leaks` forbid.
    """
    console = Console(stderr=True)
    folder = project.root / data.path
    listing = dataset_scan.scan(folder, data, preprocess)
    if data.splits == "own":
        listing = replace(listing, records=[replace(record, split=None) for record in listing.records])
    current = _current(project, data, listing, preprocess, num_threads)
    state = "unchanged"
    if current is None:
        if listing.identified and not data.keep_patient_ids and not patients.has_salt(folder):
            _warn(console, f"{folder}: patients' identifiers are hashed with a public salt; docs/data.md, Patients")
        _check_space(project, len(listing.records), preprocess)
        try:
            current, state = _build(project, data, listing, preprocess, num_threads, console), "written"
        except OSError as error:
            raise UserError(
                f"{project.dataset}: cannot be written: {error.strerror or error}; expected a folder with room for "
                f"{_num_bytes(len(listing.records), preprocess) / 1e6:.0f} MB. Make room or mend its rights"
            ) from error
    console.print(_summary(current, state), highlight=False, markup=False, soft_wrap=True)
    return current


def _current(
    project: Project, data: config.Data, listing: Listing, preprocess: config.Preprocess, num_threads: int | None
) -> store.Store | None:
    """The store that stands, if these files and settings made it. Contents are compared, not times."""
    if not project.dataset.exists():
        return None
    try:
        found = store.open_store(project.dataset)
    except UserError:
        return None  # damaged: made anew
    source = _Source(data, listing, preprocess)
    for record, digest in zip(
        listing.records, hash_sources(project.root / data.path, listing.records, preprocess, num_threads), strict=True
    ):
        source.add(record, digest)
    return found if found.name == data.name and found.source == source.digest() else None


def _build(
    project: Project,
    data: config.Data,
    listing: Listing,
    preprocess: config.Preprocess,
    num_threads: int | None,
    console: Console,
) -> store.Store:
    folder, records = project.root / data.path, listing.records
    shape = (preprocess.channels, preprocess.image_size, preprocess.image_size)
    with_masks = any(record.mask for record in records)
    unreadable: list[tuple[str, str]] = []
    left_out: list[tuple[str, str]] = []
    source = _Source(data, listing, preprocess)

    def use(record: Record, raw: RawImage, mask: RawImage | None) -> _Picture:
        return _Picture(
            image=to_square(raw.pixels, preprocess),
            mask=None if mask is None else square_of_mask(mask, raw, str(record.mask), preprocess),
            thumb=thumbnail(raw.pixels),
        )

    with (
        store.StoreWriter(project.dataset, shape, with_masks) as writer,
        Facts(project.runs) as facts,
        counting_bar(console) as progress,
    ):
        task = progress.add_task("preprocess", total=len(records))
        for read in read_all(folder, records, preprocess, use, num_threads):
            source.add(read.record, read.source)
            if read.value is None:
                (left_out if read.left_out else unreadable).append((read.record.name, read.reason))
            else:
                writer.add(read.value.image, read.value.mask, _row(read))
                facts.add(read, read.value.thumb)
            progress.advance(task)
        _check_unreadable(project, unreadable, len(records), preprocess.max_rejected)
        names, dropped = _decide(facts, data, preprocess, console)
        _check_splits(folder, names, [*unreadable, *left_out, *dropped], console)
        rejected = sorted([*unreadable, *left_out, *dropped, *listing.foreign])
        return writer.commit(names, rejected, preprocess.model_dump(mode="json"), source.digest(), data.name)


def _decide(
    facts: Facts, data: config.Data, preprocess: config.Preprocess, console: Console
) -> tuple[list[str | None], list[tuple[str, str]]]:
    """Split of each picture that was read, None for one that is dropped; and the dropped with their reasons."""
    records = facts.records
    exact = facts.exact_groups
    if exact and data.duplicates == "error":
        raise UserError(
            f"data.duplicates is error: {len(exact)} pictures stand in several files, such as "
            f"{' and '.join(records[row].name for row in exact[0][:2])}; expected each once. "
            "`medgen data audit` lists them; set data.duplicates to drop, or remove them"
        )
    dropped = dict(_drop(records, exact)) if data.duplicates == "drop" else {}
    pairs = [(group[0], row) for group in exact for row in group[1:]]
    pairs += [(near.one, near.other) for near in facts.near_pairs]
    joined = splits.join(records, pairs)  # a dropped copy still says who belongs together
    kept = [row for row in range(len(records)) if row not in dropped]
    chosen, groups = [records[row] for row in kept], [joined[row] for row in kept]
    if data.leaks == "move":
        chosen = splits.unite(chosen, groups)
    assigned = splits.assign(chosen, preprocess.val_fraction, preprocess.test_fraction, preprocess.seed, groups)

    names: list[str | None] = [None] * len(records)
    for row, name in zip(kept, assigned, strict=True):
        names[row] = name
    found = dataset_checks.find(facts, names, dropped)
    for line in dataset_checks.summary_lines(found):
        _warn(console, line)
    if found.leaks and data.leaks == "error":
        raise UserError(
            f"data.leaks is error: {found.leaks[0]}; {len(found.leaks)} such in all, expected none. "
            "`medgen data audit` lists them; set data.leaks to move, or mend the data's own split"
        )
    return names, [(records[row].name, reason) for row, reason in dropped.items()]


def _drop(records: Sequence[Record], exact: Iterable[Sequence[int]]) -> Iterator[tuple[int, str]]:
    """Rows of duplicates that go, and why. One stays: on the side that judges where they stand on several."""
    order = {"test": 0, "val": 1, "train": 2, None: 3}
    for group in exact:
        labels = sorted({label for row in group if (label := records[row].label)})
        if len(labels) > 1:  # nobody knows which is true
            yield from ((row, f"one picture under the labels {', '.join(labels)}") for row in group)
        else:
            first, *rest = sorted(group, key=lambda row: (order[records[row].split], not records[row].label, row))
            yield from ((row, f"a duplicate of {records[first].name}") for row in rest)


class _Source:
    """Digest of all that a store is made from; fed one record at a time."""

    def __init__(self, data: config.Data, listing: Listing, preprocess: config.Preprocess) -> None:
        self._hash = hashlib.sha256(config.fingerprint(store.SCHEMA, data, preprocess).encode())
        for path, reason in listing.foreign:
            self._hash.update(json.dumps([path, reason]).encode())

    def add(self, record: Record, digest: str) -> None:
        self._hash.update(json.dumps([astuple(record), digest]).encode())

    def digest(self) -> str:
        return self._hash.hexdigest()[:12]


def _row(read: Read[_Picture]) -> dict[str, str]:
    record = read.record
    return {
        "path": record.path,
        "index": str(record.index),
        "sha256": read.sha256,
        "label": record.label or "",
        "patient": record.patient,
        "width": str(read.size[0]),
        "height": str(read.size[1]),
        "mode": read.mode,
        "mask": record.mask or "",
    }


def _check_splits(
    folder: Path, names: Sequence[str | None], missing: Sequence[tuple[str, str]], console: Console
) -> None:
    """Refuses a dataset without training images, and says which other split is empty."""
    counts = Counter(name for name in names if name is not None)
    if not counts:
        reason, number = Counter(reason for _, reason in missing).most_common(1)[0]
        raise UserError(
            f"{folder}: none of {len(missing)} pictures is left; {number} x {reason}. Expected some: mend the files, "
            "or change preprocess.volume, preprocess.max_rejected or data.duplicates"
        )
    if not counts["train"]:
        raise UserError(
            f"{folder}: no training images among {counts.total()} ({dict(counts)}); expected some. Set data.splits=own "
            "to cut all splits anew, or lower preprocess.val_fraction and test_fraction"
        )
    if empty := [name for name in store.SPLITS if not counts[name]]:
        _warn(
            console,
            f"no images in {' and '.join(empty)}: too few patients, or all of them one (see data.patient_pattern), or "
            "preprocess.val_fraction and test_fraction are 0",
        )


def _num_bytes(num_records: int, preprocess: config.Preprocess) -> int:
    """What is on the disk before the old store goes: pictures as read, dealt to splits, and their thumbnails."""
    return num_records * (2 * preprocess.channels * preprocess.image_size**2 + THUMB**2)


def _check_space(project: Project, num_records: int, preprocess: config.Preprocess) -> None:
    needed, free = _num_bytes(num_records, preprocess), shutil.disk_usage(project.root).free
    if free < needed:
        raise UserError(
            f"{project.dataset}: {free / 1e6:.0f} MB free; expected {needed / 1e6:.0f} MB for {num_records} images. "
            "Make room, or lower preprocess.image_size"
        )


def _warn(console: Console, line: str) -> None:
    console.print(dataset_checks.printable(line), style="yellow", highlight=False, markup=False, soft_wrap=True)


def _check_unreadable(project: Project, unreadable: Sequence[tuple[str, str]], num_records: int, most: float) -> None:
    if len(unreadable) <= most * num_records:
        return
    listing = project.runs / store.REJECTED  # not in artifacts/dataset, which is not made
    rows = [{"path": path, "reason": reason} for path, reason in unreadable]
    store.write_csv(listing, store.REJECTED_COLUMNS, rows)
    reasons = Counter(reason for _, reason in unreadable).most_common(3)
    raise UserError(
        f"{len(unreadable)} of {num_records} images are unreadable, more than preprocess.max_rejected = {most:g} "
        "allows: "
        + "; ".join(f"{count} x {reason}" for reason, count in reasons)
        + f". Mend or remove the files listed in {listing}, or raise preprocess.max_rejected"
    )


def _summary(current: store.Store, state: str) -> str:
    parts = []
    for name in store.SPLITS:
        labels = np.asarray(current.split(name).labels)
        of_class = ", ".join(f"{label} {int((labels == i).sum())}" for i, label in enumerate(current.classes))
        parts.append(f"{name} {current.counts[name]}" + (f" ({of_class})" if of_class else ""))
    rejected = current.folder / store.REJECTED
    num_rejected = sum(1 for _ in store.read_csv(rejected, store.REJECTED_COLUMNS))
    return f"dataset {current.fingerprint} {state}: {' · '.join(parts)} · rejected {num_rejected}, see {rejected}"
