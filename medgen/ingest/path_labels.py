"""Folders and published sets' names -> split and class of a picture.

CLASS/file, SPLIT/CLASS/file, CLASS/SPLIT/file, SPLIT/file and NAME_SPLIT/file, below wrapper folders too.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from medgen.ingest.manifest import SPLITS
from medgen.ingest.masks import IMAGE_FOLDERS, bare_parts, folder_of, plain
from medgen.ingest.patients import named_in_folder


class Place(NamedTuple):
    """What a folder says of the pictures in it."""

    split: str | None
    label: str | None
    patient: str | None


class _Naming(NamedTuple):
    """A published set whose file names give the class."""

    pattern: re.Pattern[str]  # group 1 is the class
    classes: Mapping[str, str] = MappingProxyType({})  # what group 1 means; itself where it is not listed
    beside: str = ""  # a folder that stands beside the pictures' own in this set alone


_NAMINGS = (
    _Naming(re.compile(r"(?:MCUCXR|CHNCXR)_\d+_([01])\D"), {"0": "normal", "1": "tuberculosis"}),
    _Naming(re.compile(r"(.+)_\d+\.\w+"), beside="annotations/trimaps/"),  # Oxford-IIIT Pet: Abyssinian_1.jpg
)


class Places:
    """What is known of each picture by its place."""

    def __init__(self, images: Iterable[str], folders: Collection[str]) -> None:
        """`images` are the pictures' paths, `folders` those of all files, with the slash."""
        self._folders = folders
        self._places = _read(sorted({folder_of(path) for path in images}))

    def of(self, path: str) -> Place:
        """Split, label and patient, by folders and, where the folder is no class, by a published set's names."""
        folder = folder_of(path)
        place = self._places[folder]
        own = folder[:-1].rpartition("/")[2]
        if place.label is None or plain(own) in IMAGE_FOLDERS:
            parent = folder_of(folder[:-1])
            for naming in _NAMINGS:
                match = naming.pattern.match(path, len(folder))
                if match and (not naming.beside or parent + naming.beside in self._folders):
                    return place._replace(label=naming.classes.get(match[1], match[1]))
        return place


class _Parts(NamedTuple):
    split: str | None
    above: tuple[str, ...]
    below: tuple[str, ...]
    patient: str | None


def _read(folders: Iterable[str]) -> dict[str, Place]:
    found = {folder: _cut(bare_parts(folder)) for folder in folders}
    found = _with_compound_splits(found)
    # Folders above all files say nothing: chest_xray/, Data/. Below a split each folder is a class.
    wrapper = _num_shared([parts.below for parts in found.values() if parts.split is None])
    top = _num_shared([parts.above for parts in found.values() if parts.split is not None and not parts.below])
    places = {}
    for folder, parts in found.items():
        # CLASS/train/file is read too
        names = parts.below[wrapper:] if parts.split is None else parts.below or parts.above[top:]
        places[folder] = Place(parts.split, names[0] if names else None, parts.patient)
    return places


def _cut(parts: tuple[str, ...]) -> _Parts:
    """Parts of a path around its split; a patient's folder and what lies in it are no class."""
    at_patient = next((i for i, part in enumerate(parts) if named_in_folder(part)), len(parts))
    patient = named_in_folder(parts[at_patient]) if at_patient < len(parts) else None
    parts = parts[:at_patient]
    at = next((i for i, part in enumerate(parts) if part.lower() in SPLITS), None)
    if at is None:
        return _Parts(None, (), parts, patient)
    return _Parts(SPLITS[parts[at].lower()], parts[:at], parts[at + 1 :], patient)


def _with_compound_splits(found: dict[str, _Parts]) -> dict[str, _Parts]:
    """slices_train/ is a split where slices_test/ or slices_validate/ stands beside it; alone it is a mere name."""
    beside: dict[tuple[tuple[str, ...], str], set[str]] = defaultdict(set)
    compounds = {part: compound for parts in found.values() for part in parts.below if (compound := _compound(part))}
    loose = {folder: parts for folder, parts in found.items() if parts.split is None}
    for parts in loose.values():
        for at, part in enumerate(parts.below):
            if part in compounds:
                rest, split = compounds[part]
                beside[parts.below[:at], rest].add(split)
    result = dict(found)
    for folder, parts in loose.items():
        for at, part in enumerate(parts.below):
            rest, split = compounds.get(part, ("", ""))
            if len(beside.get((parts.below[:at], rest), ())) > 1:
                result[folder] = _Parts(split, parts.below[:at], parts.below[at + 1 :], parts.patient)
                break
    return result


def _compound(name: str) -> tuple[str, str] | None:
    """The rest of a name and its split: slices_train, train_images."""
    words = plain(name).split("_")
    for split, rest in ((words[-1], words[:-1]), (words[0], words[1:])):
        if rest and split in SPLITS:
            return "_".join(rest), SPLITS[split]
    return None


def _num_shared(folders: list[tuple[str, ...]]) -> int:
    """How many leading parts all have in common."""
    if not folders:
        return 0
    first, last = min(folders), max(folders)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
