"""What is wrong with a set of pictures: leaks over its splits, duplicates, two labels for one picture, odd ones.

with Facts(scratch) as facts:
    for read in read_all(…):
        facts.add(read, thumbnail(raw.pixels))
    found = find(facts, splits)

Rows are numbers of pictures in the order they were added.
"""

import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medgen.ingest import near_duplicates
from medgen.ingest.dataset_scan import Record
from medgen.ingest.near_duplicates import THUMB, Near
from medgen.ingest.reading import Read


class Facts:
    """One row for each picture that could be read; thumbnails are in a file, so a row takes about 150 bytes."""

    def __init__(self, scratch: Path) -> None:
        """`scratch` is a folder on a disk with room for 4 kB a picture; nothing stays in it."""
        self.records: list[Record] = []
        self._digests = bytearray()
        self._hashes = array("Q")
        self._sizes = array("i")
        self._contrasts, self._saturations = array("f"), array("f")
        self._modes: Counter[str] = Counter()
        scratch.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  # closed on leaving

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.records)

    def add(self, read: Read[Any], thumb: NDArray[np.uint8]) -> None:
        """Appends a picture and its thumbnail (64, 64) or (64, 64, 3)."""
        self.records.append(read.record)
        self._digests += bytes.fromhex(read.sha256)
        self._hashes.append(near_duplicates.perceptual_hash(thumb))
        self._sizes.extend(read.size)
        self._contrasts.append(near_duplicates.contrast(thumb))
        self._saturations.append(near_duplicates.saturation(thumb))
        self._modes[read.mode] += 1
        self._file.write(np.ascontiguousarray(near_duplicates.grey(thumb)).data)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2), width and height as in the file."""
        return np.array(self._sizes, np.int32).reshape(-1, 2)

    @property
    def modes(self) -> Mapping[str, int]:
        """How many pictures have each kind of pixels."""
        return self._modes

    @cached_property
    def exact_groups(self) -> list[list[int]]:
        """Rows of identical content, groups of two and more, by their first row; blank ones are copies of nothing."""
        groups: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(~self._is_blank).tolist():
            groups.setdefault(bytes(self._digests[32 * row : 32 * row + 32]), []).append(row)
        return [rows for rows in groups.values() if len(rows) > 1]

    @cached_property
    def near_pairs(self) -> list[Near]:
        """Rows of different patients that show one picture; of identical files the first stands for all."""
        skip = self._is_blank
        for group in self.exact_groups:
            skip[group[1:]] = True
        numbers: dict[str, int] = {}
        patients = np.array([numbers.setdefault(record.patient, len(numbers)) for record in self.records], np.int64)
        hashes = np.array(self._hashes, np.uint64)
        return near_duplicates.near_pairs(hashes, self._thumbnails(), skip, patients, self.sizes.min(axis=1))

    @cached_property
    def blank(self) -> list[int]:
        """Rows of pictures that show nothing."""
        return [int(row) for row in np.flatnonzero(self._is_blank)]

    @cached_property
    def outliers(self) -> list[int]:
        """Rows of pictures that are not of the others' kind."""
        return near_duplicates.outliers(self._thumbnails(), np.array(self._saturations, np.float32))

    @property
    def _is_blank(self) -> NDArray[np.bool_]:
        return near_duplicates.is_blank(np.array(self._contrasts, np.float32))

    def _thumbnails(self) -> NDArray[np.uint8]:
        self._file.flush()
        if not self.records:
            return np.empty((0, THUMB, THUMB), np.uint8)
        return np.memmap(self._file, np.uint8, "r", shape=(len(self), THUMB, THUMB))


@dataclass(frozen=True)
class Group:
    """Pictures that are the same one."""

    names: list[str]  # "path", or "path#index" in a file of several; first one for each split and label
    labels: list[str]
    splits: list[str]
    correlation: float = 1.0  # below 1: near-duplicates

    @property
    def is_across(self) -> bool:
        """On several sides of a split."""
        return len(self.splits) > 1


@dataclass(frozen=True)
class Parted:
    """A patient on several sides of a split."""

    patient: str
    counts: dict[str, int]  # images by split
    example: str


@dataclass(frozen=True)
class Findings:
    """What an audit found; every list is complete but `near`, which ends at near_duplicates.MAX_PAIRS."""

    num_images: int
    num_patients: int
    counts: dict[str, dict[str, int]]  # label -> split -> images; "" where there is none
    modes: dict[str, int]
    widths: tuple[int, int, int]  # smallest, median, largest
    heights: tuple[int, int, int]
    num_sizes: int
    parted: list[Parted]
    exact: list[Group]
    near: list[Group]  # pairs
    conflicts: list[Group]  # one picture, exact or near, under several labels
    blank: list[str]
    outliers: list[str]

    @property
    def num_duplicates(self) -> int:
        """Files that could go without losing a picture."""
        return sum(len(group.names) - 1 for group in self.exact)

    @property
    def imbalance(self) -> float | None:
        """Images of the largest class for each of the smallest; None with fewer than two classes."""
        sizes = [sum(splits.values()) for label, splits in self.counts.items() if label]
        return max(sizes) / min(sizes) if len(sizes) > 1 else None

    @property
    def leaks(self) -> list[str]:
        """Each way in which one split knows another, in words."""
        parted = [
            f"patient {one.patient}, as {one.example}, is in "
            + _list(f"{split} ({number})" for split, number in one.counts.items())
            for one in self.parted
        ]
        same = [
            f"{_list(group.names)} are one picture, in {_list(group.splits)}"
            for group in [*self.exact, *self.near]
            if group.is_across
        ]
        return [printable(line) for line in parted + same]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the derived numbers."""
        derived = {"num_duplicates": self.num_duplicates, "imbalance": self.imbalance, "leaks": self.leaks}
        return asdict(self) | derived | {"near_is_complete": len(self.near) < near_duplicates.MAX_PAIRS}


def find(facts: Facts, splits: Sequence[str | None], dropped: Collection[int] = ()) -> Findings:
    """All findings; `splits` is the split of each row, None where it has none. `dropped` rows are in no group."""
    records, sizes = facts.records, facts.sizes
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    patients: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[str, str] = {}
    for row, (record, split) in enumerate(zip(records, splits, strict=True)):
        if row in dropped:
            continue
        counts[record.label or ""][split or ""] += 1
        patients[record.patient][split or ""] += 1
        first.setdefault(record.patient, record.name)
    parted = [
        Parted(patient, {split: number for split, number in sorted(where.items()) if split}, first[patient])
        for patient, where in sorted(patients.items())
        if len(where.keys() - {""}) > 1
    ]
    stands_for: dict[int, int | None] = {}  # of a dropped row its copy that is kept
    kept = []
    for rows in facts.exact_groups:
        kept.append([row for row in rows if row not in dropped])
        stands_for |= dict.fromkeys(set(rows) & set(dropped), kept[-1][0] if kept[-1] else None)
    exact = [_group(records, splits, rows) for rows in kept if len(rows) > 1]
    near = []
    for pair in facts.near_pairs:
        one, other = (stands_for.get(row, row) for row in pair[:2])
        if one is not None and other is not None:
            near.append(_group(records, splits, (one, other), pair.correlation))
    return Findings(
        num_images=len(facts),
        num_patients=len(patients),
        counts={label: dict(sorted(where.items())) for label, where in sorted(counts.items())},
        modes=dict(sorted(facts.modes.items())),
        widths=_spread(sizes[:, 0]),
        heights=_spread(sizes[:, 1]),
        num_sizes=len(np.unique(sizes, axis=0)),
        parted=parted,
        exact=exact,
        near=near,
        conflicts=[group for group in [*exact, *near] if len(group.labels) > 1],
        blank=[records[row].name for row in facts.blank],
        outliers=[records[row].name for row in facts.outliers],
    )


def summary_lines(found: Findings) -> list[str]:
    """One line for each thing that is wrong, with a count and an example; none where all is well."""
    lines = []
    if found.parted:
        lines.append(f"{len(found.parted)} patients stand in several splits, such as {found.parted[0].example}'s")
    for kind, groups in (("exact duplicates", found.exact), ("near-duplicates", found.near)):
        across = [group for group in groups if group.is_across]
        if across:
            lines.append(f"{len(across)} {kind} across splits, such as {_list(across[0].names[:2])}")
        if within := [group for group in groups if not group.is_across]:
            lines.append(f"{len(within)} {kind} within a split, such as {_list(within[0].names[:2])}")
    if found.conflicts:
        group = found.conflicts[0]
        lines.append(
            f"{len(found.conflicts)} pictures under several labels, such as {_list(group.names[:2])} "
            f"({_list(group.labels)})"
        )
    for kind, names in (("blank pictures", found.blank), ("pictures not of the others' kind", found.outliers)):
        if names:
            lines.append(f"{len(names)} {kind}, such as {names[0]}")
    return [printable(line) for line in lines]


def printable(name: str) -> str:
    """A name on one line, without anything that a terminal would obey or that no file can hold."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def _group(
    records: Sequence[Record], splits: Sequence[str | None], rows: Sequence[int], correlation: float = 1.0
) -> Group:
    first_of = {(splits[row], records[row].label): row for row in reversed(rows)}
    ordered = sorted(rows, key=lambda row: row not in first_of.values())
    return Group(
        names=[records[row].name for row in ordered],
        labels=sorted({label for row in rows if (label := records[row].label)}),
        splits=sorted({split for row in rows if (split := splits[row])}),
        correlation=correlation,
    )


def _spread(values: NDArray[np.int32]) -> tuple[int, int, int]:
    return (int(values.min()), int(np.median(values)), int(values.max())) if len(values) else (0, 0, 0)


def _list(words: Iterable[str]) -> str:
    return " and ".join(words)
