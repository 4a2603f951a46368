"""Read the split, class and patient of an image from the names of its folders and of published datasets' files.

CLASS/file, SPLIT/CLASS/file, CLASS/SPLIT/file, SPLIT/file and NAME_SPLIT/file, also below wrapper folders.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from medgen.ingest.manifest import SPLIT_ALIASES
from medgen.ingest.masks import IMAGE_FOLDERS, folder_of, label_folders, normalize_name
from medgen.ingest.patients import patient_from_folder_name


class PathLabels(NamedTuple):
    """The metadata that an image's path contains; None if it contains none."""

    split: str | None
    label: str | None
    patient: str | None


class _FileNameRule(NamedTuple):
    """A published dataset whose file names contain the class."""

    pattern: re.Pattern[str]  # group 1 is the class
    classes: Mapping[str, str] = MappingProxyType({})  # meaning of group 1; a missing value stands for itself
    sibling: str = ""  # folder next to the image folder that identifies the dataset


_FILE_NAME_RULES = (
    _FileNameRule(re.compile(r"(?:MCUCXR|CHNCXR)_\d+_([01])\D"), {"0": "normal", "1": "tuberculosis"}),
    _FileNameRule(re.compile(r"(.+)_\d+\.\w+"), sibling="annotations/trimaps/"),  # Oxford-IIIT Pet: Abyssinian_1.jpg
)


class PathLabeler:
    """Labels of all images of a dataset from their paths."""

    def __init__(self, images: Iterable[str], folders: Collection[str]) -> None:
        """`images` are paths; `folders` are the folders of all files, each with a trailing slash."""
        self._folders = folders
        self._labels = _labels_by_folder(sorted({folder_of(path) for path in images}))

    def labels_of(self, path: str) -> PathLabels:
        """Split, label and patient of an image; a file name rule gives the label if the folder is not a class."""
        folder = folder_of(path)
        labels = self._labels[folder]
        name = folder[:-1].rpartition("/")[2]
        if labels.label is None or normalize_name(name) in IMAGE_FOLDERS:
            parent = folder_of(folder[:-1])
            for rule in _FILE_NAME_RULES:
                match = rule.pattern.match(path, len(folder))
                if match and (not rule.sibling or parent + rule.sibling in self._folders):
                    return labels._replace(label=rule.classes.get(match[1], match[1]))
        return labels


class _PathParts(NamedTuple):
    split: str | None
    above: tuple[str, ...]  # folders above the split folder
    below: tuple[str, ...]  # folders below it, or all folders if there is no split
    patient: str | None


def _labels_by_folder(folders: Iterable[str]) -> dict[str, PathLabels]:
    found = _apply_compound_splits({folder: _split_path(label_folders(folder)) for folder in folders})
    # Folders that contain all files, such as chest_xray/ or Data/, are no classes. Below a split every folder is one.
    num_wrappers = _num_common([parts.below for parts in found.values() if parts.split is None])
    top = _num_common([parts.above for parts in found.values() if parts.split is not None and not parts.below])
    labels = {}
    for folder, parts in found.items():
        # `above` supports CLASS/train/file
        names = parts.below[num_wrappers:] if parts.split is None else parts.below or parts.above[top:]
        labels[folder] = PathLabels(parts.split, names[0] if names else None, parts.patient)
    return labels


def _split_path(parts: tuple[str, ...]) -> _PathParts:
    """Divide a path at its split folder, without a patient's folder and what is below it: these are no classes."""
    at_patient = next((i for i, part in enumerate(parts) if patient_from_folder_name(part)), len(parts))
    patient = patient_from_folder_name(parts[at_patient]) if at_patient < len(parts) else None
    parts = parts[:at_patient]
    at = next((i for i, part in enumerate(parts) if part.lower() in SPLIT_ALIASES), None)
    if at is None:
        return _PathParts(None, (), parts, patient)
    return _PathParts(SPLIT_ALIASES[parts[at].lower()], parts[:at], parts[at + 1 :], patient)


def _apply_compound_splits(found: dict[str, _PathParts]) -> dict[str, _PathParts]:
    """Treat slices_train/ as a split if its parent also contains slices_test/ or slices_validate/, else as a name."""
    siblings: dict[tuple[tuple[str, ...], str], set[str]] = defaultdict(set)
    compounds = {part: compound for parts in found.values() for part in parts.below if (compound := _compound(part))}
    without_split = {folder: parts for folder, parts in found.items() if parts.split is None}
    for parts in without_split.values():
        for at, part in enumerate(parts.below):
            if part in compounds:
                rest, split = compounds[part]
                siblings[parts.below[:at], rest].add(split)
    result = dict(found)
    for folder, parts in without_split.items():
        for at, part in enumerate(parts.below):
            rest, split = compounds.get(part, ("", ""))
            if len(siblings.get((parts.below[:at], rest), ())) > 1:
                result[folder] = _PathParts(split, parts.below[:at], parts.below[at + 1 :], parts.patient)
                break
    return result


def _compound(name: str) -> tuple[str, str] | None:
    """The other words of a name and its split: slices_train, train_images."""
    words = normalize_name(name).split("_")
    for split, rest in ((words[-1], words[:-1]), (words[0], words[1:])):
        if rest and split in SPLIT_ALIASES:
            return "_".join(rest), SPLIT_ALIASES[split]
    return None


def _num_common(folders: list[tuple[str, ...]]) -> int:
    """Number of leading parts that all paths have in common."""
    if not folders:
        return 0
    first, last = min(folders), max(folders)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
