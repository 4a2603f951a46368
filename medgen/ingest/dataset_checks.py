"""Check a dataset for leaks between splits, duplicates, conflicting labels, blank images and outliers.

with ImageIndex(scratch) as index:
    for result in read_images(…):
        index.add(result, thumbnail(raw.preview))
    results = check_dataset(index, splits)

A row is the position of an image in the index.
"""

import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medgen.ingest.dataset_scan import ImageRecord
from medgen.ingest.near_duplicates import (
    MAX_PAIRS,
    THUMBNAIL_SIZE,
    NearDuplicate,
    contrast,
    find_near_duplicates,
    find_outliers,
    is_blank,
    perceptual_hash,
    saturation,
    to_grey,
)
from medgen.ingest.reading import ReadResult

_BATCH = 512  # thumbnails


class ImageIndex:
    """Hash, size, contrast and thumbnail of each image that was read, in about 150 bytes of memory per image."""

    def __init__(self, scratch: Path) -> None:
        """`scratch` is a folder for a temporary file of thumbnails, 4 kB per image."""
        self.records: list[ImageRecord] = []
        self._digests = bytearray()
        self._hashes = array("Q")
        self._sizes = array("i")
        self._contrasts, self._saturations = array("f"), array("f")
        self.modes: Counter[str] = Counter()  # images of each pixel type
        scratch.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.records)

    def add(self, result: ReadResult[Any], thumb: NDArray[np.uint8]) -> None:
        """Append an image and its thumbnail (64, 64) or (64, 64, 3)."""
        self.records.append(result.record)
        self._digests += bytes.fromhex(result.sha256)
        self._hashes.append(perceptual_hash(thumb))
        self._sizes.extend(result.size)
        self._contrasts.append(contrast(thumb))
        self._saturations.append(saturation(thumb))
        self.modes[result.mode] += 1
        self._file.write(np.ascontiguousarray(to_grey(thumb)).data)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2) width and height of each image in its file."""
        return np.array(self._sizes, np.int32).reshape(-1, 2)

    @cached_property
    def mean_greys(self) -> NDArray[np.float32]:
        """(N,) mean grey value of each image, 0 to 255."""
        thumbnails = self._thumbnails()
        parts = [
            thumbnails[start : start + _BATCH].mean(axis=(1, 2), dtype=np.float32)
            for start in range(0, len(thumbnails), _BATCH)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    @cached_property
    def exact_duplicates(self) -> list[list[int]]:
        """Groups of two or more rows of identical content, sorted by first row. Blank images are not compared."""
        groups: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(~self._is_blank).tolist():
            groups.setdefault(bytes(self._digests[32 * row : 32 * row + 32]), []).append(row)
        return [rows for rows in groups.values() if len(rows) > 1]

    @cached_property
    def near_duplicates(self) -> list[NearDuplicate]:
        """Pairs of rows of different patients that show the same image. Of exact duplicates only the first is used."""
        skip = self._is_blank
        for group in self.exact_duplicates:
            skip[group[1:]] = True
        numbers: dict[str, int] = {}
        patients = np.array([numbers.setdefault(record.patient, len(numbers)) for record in self.records], np.int64)
        hashes, sides = np.array(self._hashes, np.uint64), self.sizes.min(axis=1)
        return find_near_duplicates(hashes, self._thumbnails(), skip, patients, sides)

    @cached_property
    def blank(self) -> list[int]:
        """Rows of blank images."""
        return [int(row) for row in np.flatnonzero(self._is_blank)]

    @cached_property
    def outliers(self) -> list[int]:
        """Rows of images unlike all others."""
        return find_outliers(self._thumbnails(), np.array(self._saturations, np.float32))

    @property
    def _is_blank(self) -> NDArray[np.bool_]:
        return is_blank(np.array(self._contrasts, np.float32))

    def _thumbnails(self) -> NDArray[np.uint8]:
        self._file.flush()
        if not self.records:
            return np.empty((0, THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.uint8)
        return np.memmap(self._file, np.uint8, "r", shape=(len(self), THUMBNAIL_SIZE, THUMBNAIL_SIZE))


@dataclass(frozen=True)
class DuplicateGroup:
    """Files that show the same image."""

    names: list[str]  # path, or path#index; starts with one name per combination of split and label
    labels: list[str]
    splits: list[str]
    correlation: float = 1.0  # below 1 for near-duplicates

    @property
    def is_across(self) -> bool:
        """True if the files are in several splits."""
        return len(self.splits) > 1


@dataclass(frozen=True)
class PatientLeak:
    """A patient with images in several splits."""

    patient: str
    counts: dict[str, int]  # images per split
    example: str


@dataclass(frozen=True)
class CheckResults:
    """Counts and problems of a dataset. All lists are complete, except that `near` ends after MAX_PAIRS pairs."""

    num_images: int
    num_patients: int  # where nothing names the patient, each file counts as one
    counts: dict[str, dict[str, int]]  # label -> split -> images; "" if there is none
    modes: dict[str, int]
    widths: tuple[int, int, int]  # smallest, median, largest
    heights: tuple[int, int, int]
    num_sizes: int
    patient_leaks: list[PatientLeak]
    exact: list[DuplicateGroup]
    near: list[DuplicateGroup]  # pairs
    conflicts: list[DuplicateGroup]  # exact or near duplicates with several labels
    blank: list[str]
    outliers: list[str]
    num_known_patients: int  # named by a manifest, a header or a name
    num_images_without_patient: int

    @property
    def num_duplicates(self) -> int:
        """Number of redundant files."""
        return sum(len(group.names) - 1 for group in self.exact)

    @property
    def imbalance(self) -> float | None:
        """Images in the largest class divided by those in the smallest; None for fewer than two classes."""
        sizes = [sum(splits.values()) for label, splits in self.counts.items() if label]
        return max(sizes) / min(sizes) if len(sizes) > 1 else None

    @property
    def leaks(self) -> list[str]:
        """A sentence for each leak between splits."""
        patients = [
            f"patient {leak.patient}, for example {leak.example}, is in "
            + _join(f"{split} ({number})" for split, number in leak.counts.items())
            for leak in self.patient_leaks
        ]
        duplicates = [
            f"{_join(group.names)} are the same image, in {_join(group.splits)}"
            for group in [*self.exact, *self.near]
            if group.is_across
        ]
        return [escaped(line) for line in patients + duplicates]

    def to_json(self) -> dict[str, Any]:
        """All values and the derived ones, as in audit.json."""
        values = {"parted" if key == "patient_leaks" else key: value for key, value in asdict(self).items()}
        derived = {"num_duplicates": self.num_duplicates, "imbalance": self.imbalance, "leaks": self.leaks}
        return values | derived | {"near_is_complete": len(self.near) < MAX_PAIRS}


def check_dataset(index: ImageIndex, splits: Sequence[str | None], dropped: Collection[int] = ()) -> CheckResults:
    """Run all checks. `splits` has an entry per row, None without a split. `dropped` rows are in no group."""
    records, sizes = index.records, index.sizes
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    patients: dict[str, Counter[str]] = defaultdict(Counter)
    examples: dict[str, str] = {}
    for row, (record, split) in enumerate(zip(records, splits, strict=True)):
        if row in dropped:
            continue
        counts[record.label or ""][split or ""] += 1
        patients[record.patient][split or ""] += 1
        examples.setdefault(record.patient, record.name)
    exact, near = _group_duplicates(index, splits, dropped)
    kept = [record for row, record in enumerate(records) if row not in dropped]
    return CheckResults(
        num_images=len(index),
        num_patients=len(patients),
        counts={label: dict(sorted(by_split.items())) for label, by_split in sorted(counts.items())},
        modes=dict(sorted(index.modes.items())),
        widths=_range(sizes[:, 0]),
        heights=_range(sizes[:, 1]),
        num_sizes=len(np.unique(sizes, axis=0)),
        patient_leaks=[
            PatientLeak(patient, {split: num for split, num in sorted(by_split.items()) if split}, examples[patient])
            for patient, by_split in sorted(patients.items())
            if len(by_split.keys() - {""}) > 1
        ],
        exact=exact,
        near=near,
        conflicts=[group for group in [*exact, *near] if len(group.labels) > 1],
        blank=[records[row].name for row in index.blank],
        outliers=[records[row].name for row in index.outliers],
        num_known_patients=len({record.patient for record in kept if record.patient_known}),
        num_images_without_patient=sum(not record.patient_known for record in kept),
    )


def _group_duplicates(
    index: ImageIndex, splits: Sequence[str | None], dropped: Collection[int]
) -> tuple[list[DuplicateGroup], list[DuplicateGroup]]:
    """Groups of exact duplicates and pairs of near-duplicates, without dropped rows."""
    kept_copy: dict[int, int | None] = {}  # dropped row -> its copy that is kept
    exact = []
    for rows in index.exact_duplicates:
        kept = [row for row in rows if row not in dropped]
        kept_copy |= dict.fromkeys(set(rows) & set(dropped), kept[0] if kept else None)
        if len(kept) > 1:
            exact.append(_group(index.records, splits, kept))
    near = []
    for pair in index.near_duplicates:
        first, second = (kept_copy.get(row, row) for row in (pair.first, pair.second))
        if first is not None and second is not None:
            near.append(_group(index.records, splits, (first, second), pair.correlation))
    return exact, near


def summary_lines(results: CheckResults) -> list[str]:
    """A line with a count and an example for each kind of problem."""
    lines = []
    if leaks := results.patient_leaks:
        lines.append(f"patients in several splits: {len(leaks)}, for example {leaks[0].example}'s")
    for kind, groups in (("exact duplicates", results.exact), ("near-duplicates", results.near)):
        for place, is_across in (("across splits", True), ("within a split", False)):
            if selected := [group for group in groups if group.is_across is is_across]:
                lines.append(f"{kind} {place}: {len(selected)}, for example {_join(selected[0].names[:2])}")
    if conflicts := results.conflicts:
        example = f"{_join(conflicts[0].names[:2])} ({_join(conflicts[0].labels)})"
        lines.append(f"images with several labels: {len(conflicts)}, for example {example}")
    for kind, names in (("blank images", results.blank), ("outliers", results.outliers)):
        if names:
            lines.append(f"{kind}: {len(names)}, for example {names[0]}")
    return [escaped(line) for line in lines]


def escaped(name: str) -> str:
    """A name on one line, with control characters and invalid characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def _group(
    records: Sequence[ImageRecord], splits: Sequence[str | None], rows: Sequence[int], correlation: float = 1.0
) -> DuplicateGroup:
    first_of = {(splits[row], records[row].label): row for row in reversed(rows)}
    ordered = sorted(rows, key=lambda row: row not in first_of.values())
    return DuplicateGroup(
        names=[records[row].name for row in ordered],
        labels=sorted({label for row in rows if (label := records[row].label)}),
        splits=sorted({split for row in rows if (split := splits[row])}),
        correlation=correlation,
    )


def _range(values: NDArray[np.int32]) -> tuple[int, int, int]:
    return (int(values.min()), int(np.median(values)), int(values.max())) if len(values) else (0, 0, 0)


def _join(words: Iterable[str]) -> str:
    return " and ".join(words)
