"""A folder -> one record for each picture: label, patient, split and mask; and what each other file is.

listing = scan(Path("data"), params.data, params.preprocess)

Read are, in any mixture: CLASS/file, SPLIT/CLASS/file (under wrapper folders too), flat folders, images/ beside
masks/, NAME_mask or NAME@ beside NAME, files of many pictures, and a manifest.csv with path and any of label, patient
(or group) and split. The manifest is the list of pictures where there is one; what it leaves empty comes from the
file itself (a DICOM header, the labels in an NPZ file), then from folders and names.
"""

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medgen import config
from medgen.errors import UserError
from medgen.ingest import images, patients
from medgen.ingest.formats.raw import Contents, UnreadableImage
from medgen.ingest.list_files import walk
from medgen.ingest.manifest import MANIFEST, Row, read_manifest
from medgen.ingest.masks import Pairs, folder_of
from medgen.ingest.path_labels import Place, Places

_ONE = Contents((0,))


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one picture before it is read."""

    path: str  # posix, relative to the data folder
    label: str | None
    patient: str  # a salted hash, unless data.keep_patient_ids; of the path where nothing says more
    split: str | None  # train, val, test where the data says so
    mask: str | None  # as path
    index: int = 0  # which picture of its file; a mask has the same index in its own

    @property
    def name(self) -> str:
        """The path and, after the first, which picture of it: scan.nii.gz#7."""
        return f"{self.path}#{self.index}" if self.index else self.path


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder holds: each of its files is in one of these, or is manifest.csv or .salt."""

    records: list[Record]  # by path and index
    foreign: list[tuple[str, str]]  # path, and why it is neither picture nor mask
    companions: list[str]  # files that belong to a record's: labels, or a volume's second half
    identified: bool = False  # whether a file says who its patient is


def scan(folder: Path, data: config.Data, preprocess: config.Preprocess) -> Listing:
    """Lists a folder's pictures. Of files that hold one picture only the name is read.

    Raises:
        UserError: nothing is there, manifest.csv or .salt is wrong, or a path leads out of the folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected the raw images there. Run `medgen data sample`, "
            "`medgen data import PATH` or `dvc pull`"
        )
    people = _People(folder, data)
    files: set[str] = set()
    foreign: list[tuple[str, str]] = []
    for path, reason in walk(folder):
        if reason is None:
            files.add(path)
        elif path != patients.SALT:
            foreign.append((path, reason))
    files.discard(MANIFEST)
    rows = read_manifest(folder, files)
    foreign = [(path, reason) for path, reason in foreign if path not in (rows or ())]  # whoever lists it wants it
    found = _look_into(folder, files, rows or {}, preprocess)
    pairs = Pairs(list(found.contents), rows)
    foreign += [*found.foreign.items(), *pairs.foreign]
    if not pairs.images:
        raise _nothing_found(folder, foreign)

    places = Places(pairs.images, {folder_of(path) for path in files})
    records: list[Record] = []
    for path in sorted(pairs.images):
        contents, row, place = found.contents[path], (rows or {}).get(path, Row()), places.of(path)
        patient = people.of_file(path, contents, row, place)
        mask = pairs.mask_of(path)
        for at, index in enumerate(contents.indices):
            records.append(
                Record(
                    path=path,
                    label=row.label or _at(contents.labels, at) or place.label,
                    patient=patient or people.of_picture(path, index),
                    split=row.split or _at(contents.splits, at) or place.split,
                    mask=mask,
                    index=index,
                )
            )
    identified = any(contents.patient for contents in found.contents.values())
    return Listing(records, sorted(foreign), sorted(found.companions), identified)


@dataclass(slots=True)
class _Found:
    """Files by what they are."""

    contents: dict[str, Contents] = field(default_factory=dict)  # of image files, pictures and masks alike
    foreign: dict[str, str] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)


def _look_into(folder: Path, files: Collection[str], listed: Collection[str], preprocess: config.Preprocess) -> _Found:
    """What each file is. A listed one is an image file by its user's word; reading it shows whether that is true."""
    found = _Found()
    unreadable: set[str] = set()
    for path in sorted({*files, *listed}):
        if path in found.companions:
            continue
        kind = images.kind_of(folder / path)
        if kind is None and path not in listed:
            found.foreign[path] = images.describe(folder / path)
            continue
        found.contents[path] = _ONE
        if kind not in (None, "picture"):
            try:
                found.contents[path] = contents = images.inspect(folder / path, preprocess)
            except UnreadableImage:
                unreadable.add(path)  # one record all the same: reading it gives the reason
                continue
            if not contents.indices:
                del found.contents[path]
                found.foreign[path] = "none of its pictures is asked for by preprocess.volume"
            names = {companion.relative_to(folder).as_posix() for companion in contents.companions}
            found.companions |= {name for name in names if name in files and name not in listed}
    # A file that was met before the one it belongs to has been taken for something else.
    for path in found.companions & (found.foreign.keys() | unreadable):
        found.foreign.pop(path, None)
        found.contents.pop(path, None)
    found.companions -= found.contents.keys()
    return found


def _at(values: Sequence[str | None] | None, at: int) -> str | None:
    return None if values is None else values[at]


class _People:
    """Who is on each picture, under the name that the store may know."""

    def __init__(self, folder: Path, data: config.Data) -> None:
        self._pattern = patients.compile_pattern(data.patient_pattern)
        self._salt = None if data.keep_patient_ids else patients.salt_of(folder)

    def of_file(self, path: str, contents: Contents, row: Row, place: Place) -> str | None:
        """The patient of all pictures of a file; None where each picture is another's."""
        if row.patient is None and contents.independent:
            return None
        return self._hide(row.patient or self._named(path, contents, place) or path)

    def of_picture(self, path: str, index: int) -> str:
        """The patient of one picture of a file of many patients."""
        return self._hide(f"{path}#{index}")

    def _named(self, path: str, contents: Contents, place: Place) -> str | None:
        name = path[len(folder_of(path)) :]
        # the user's word goes before the file's, which may be "ANONYMOUS" throughout
        if self._pattern is not None and (named := patients.named_in_file(name, self._pattern)):
            return named
        return contents.patient or patients.named_in_file(name) or place.patient

    def _hide(self, identifier: str) -> str:
        return sys.intern(identifier if self._salt is None else patients.pseudonym(self._salt, identifier))


def _nothing_found(folder: Path, foreign: Sequence[tuple[str, str]]) -> UserError:
    reasons = Counter(reason for _, reason in foreign).most_common(3)
    instead = ", ".join(f"{count} x {reason}" for reason, count in reasons) or "no files"
    return UserError(
        f"{folder}: no pictures found; found {instead}; expected PNG, JPEG, BMP, TIFF, DICOM, NIfTI, MGZ, Analyze, "
        f"NPZ, IDX or CIFAR files in class folders, in train/ and test/ folders, or listed in {MANIFEST}"
    )
