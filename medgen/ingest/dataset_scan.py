"""Scan a data folder: one record per image with its label, patient, split and mask, and a reason for every other file.

scanned = scan(Path("data"), params.data, params.preprocess)

Supported layouts, in any mixture: CLASS/file, SPLIT/CLASS/file (also below wrapper folders), flat folders, images/ next
to masks/ and to the folders that `preprocess.conditions` names, NAME_mask or NAME@ next to NAME, files of many images,
DICOM series (with `preprocess.has_volumes`), and a manifest.csv with the column path and any of label, patient (or
group), split and the columns of
`preprocess.conditions`. If there is a manifest, it is the list of images. Values that it leaves empty come from the
file (a DICOM header, the labels in an NPZ file), then from the names of folders and files.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medgen import config
from medgen.data.store import ATTRIBUTES
from medgen.errors import UserError
from medgen.ingest import images, patients
from medgen.ingest.folders import Folder, local_files
from medgen.ingest.formats.raw import Contents, SeriesKey, UnreadableImage
from medgen.ingest.list_files import list_files, list_names
from medgen.ingest.manifest import MANIFEST, SPLIT_ALIASES, ManifestRow, read_manifest
from medgen.ingest.masks import MaskPairs, folder_of, in_folder, pair_images
from medgen.ingest.path_labels import PathLabeler, PathLabels

_SINGLE_IMAGE = Contents((0,))


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """Metadata of one image, known before its pixels are read."""

    path: str  # posix, relative to the data folder
    label: str | None
    patient: str  # a salted hash, unless data.keep_patient_ids; derived from the path if the patient is unknown
    split: str | None  # train, val, test if the dataset defines it
    mask: str | None  # path of the mask file
    index: int = 0  # position of the image in its file; the mask has the same index in the mask file
    patient_known: bool = field(default=True, compare=False)  # False: nothing names the patient
    group: str = field(default="", compare=False)  # the patient for the split, independent of the salt; never written
    paired: tuple[str | None, ...] = ()  # path of the file of each condition of kind image
    slices: tuple[str, ...] = ()  # files of a DICOM series, which is one volume

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files with the image."""
        return self.slices or (self.path,)

    @property
    def name(self) -> str:
        """The path, with the index unless it is 0: scan.nii.gz#7."""
        return f"{self.path}#{self.index}" if self.index else self.path


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The files of a folder. Each is of a record, a mask, in one of the other lists, or manifest.csv or .salt."""

    records: list[ImageRecord]  # sorted by path and index
    other_files: list[tuple[str, str]]  # path, and the reason why it is neither an image nor a mask
    companions: list[str]  # files that belong to an image file: labels, or the voxels of a header
    has_patient_ids: bool = False  # manifest.csv or a file contains an identifier of a patient
    has_salt: bool = False  # the folder has a salt of its own
    # path -> sex, age, view and conditions; path and index -> conditions that a file of many images has for each
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    findings: Mapping[tuple[str, int], Mapping[str, str]] = field(default_factory=dict)

    def attributes_of(self, record: ImageRecord) -> Mapping[str, str]:
        """Attributes and conditions of an image by column; those of manifest.csv take precedence."""
        return {**self.findings.get((record.path, record.index), {}), **self.attributes.get(record.path, {})}


def scan(
    folder: Folder, data: config.Data, preprocess: config.Preprocess, salt_folder: Path | None = None
) -> ScanResult:
    """List the images of a folder. Files of a single image are not opened if their name shows their format.

    A folder without a salt uses that of `salt_folder`. Without both, pseudonyms of patient identifiers are different in
    each call.

    Raises:
        UserError: there are no images, manifest.csv or .salt is wrong, a path leads out of the folder, or its bucket
            cannot be read.
    """
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected the original images there. Run `medgen data sample`, "
            "`medgen data import PATH` or `dvc pull`"
        )
    files: set[str] = set()
    other_files: list[tuple[str, str]] = []
    for path, reason in list_files(folder) if isinstance(folder, Path) else list_names(folder.list_files()):
        if reason is None:
            files.add(path)
        elif path != patients.SALT_FILE:
            other_files.append((path, reason))
    files.discard(MANIFEST)
    with local_files(folder, (MANIFEST, patients.SALT_FILE)) as root:
        not_columns = {*ATTRIBUTES, *preprocess.paired_folders}
        columns = (*ATTRIBUTES, *(name for name in preprocess.conditions if name not in not_columns))
        rows, has_own_salt = read_manifest(root, files, columns), patients.has_salt(root)
    has_salt = has_own_salt or (salt_folder is not None and patients.has_salt(salt_folder))
    other_files = [(path, reason) for path, reason in other_files if path not in (rows or ())]  # listed: use it
    inspected, not_images, companions, series = _inspect_files(folder, files, rows or {}, preprocess)
    folders = preprocess.paired_folders.values()
    beside = {
        name: [path for path in inspected if path not in (rows or ()) and in_folder(path, name)] for name in folders
    }
    others_of_images = {path for paths in beside.values() for path in paths}
    pairs = MaskPairs([path for path in inspected if path not in others_of_images], rows)
    other_files += [*not_images.items(), *pairs.other_files]
    if not pairs.images:
        raise _no_images(folder, other_files)
    paired = [pair_images(pairs.images, paths, name) for name, paths in beside.items()]
    other_files += [item for _, reasons in paired for item in reasons.items()]

    has_patient_ids = any(row.patient for row in (rows or {}).values())
    has_patient_ids = has_patient_ids or any(contents.patient for contents in inspected.values())
    with local_files(folder, (patients.SALT_FILE,)) as root:
        salted = root if has_own_salt or salt_folder is None else salt_folder
        patient_ids = _PatientIds(salted, data, has_patient_ids)
    masks = {path: mask for path in pairs.images if (mask := pairs.mask_of(path)) is not None}
    if of_series := sorted(path for path, mask in masks.items() if mask in series):
        raise UserError(
            f"{folder}: {masks[of_series[0]]}, the mask of {of_series[0]}, is a DICOM series; expected a volume in one "
            "file: convert the masks to NIfTI"
        )
    paired_series = sorted(file for files, _ in paired for file in files.values() if file in series)
    if paired_series:
        raise UserError(
            f"{folder}: {paired_series[0]}, a condition of an image, is a DICOM series; expected a volume in one file: "
            "convert these series to NIfTI"
        )
    labeler = PathLabeler(pairs.images, {folder_of(path) for path in files})
    records: list[ImageRecord] = []
    for path in sorted(pairs.images):
        contents, row, labels = inspected[path], (rows or {}).get(path, ManifestRow()), labeler.labels_of(path)
        if path in series and labels.label == contents.patient:
            labels = labels._replace(label=None)  # a download sorted by patient
        identifier = patient_ids.find(path, contents, row, labels)
        is_known = identifier is not None
        names_all = identifier is not None or not contents.independent  # else each image has its own patient
        for at, index in enumerate(contents.indices):
            name = identifier or path if names_all else f"{path}#{index}"
            records.append(
                ImageRecord(
                    path=path,
                    label=row.label or _item(contents.labels, at) or labels.label,
                    patient=patient_ids.pseudonym(name),
                    group=patient_ids.group(name),
                    split=row.split or _item(contents.splits, at) or labels.split,
                    mask=masks.get(path),
                    index=index,
                    patient_known=is_known,
                    paired=tuple(files.get(path) for files, _ in paired),
                    slices=series.get(path, ()),
                )
            )
    attributes = {path: row.attributes for path, row in (rows or {}).items() if row.attributes}
    findings = {
        (path, index): {name: texts[at]}
        for name, condition in preprocess.conditions.items()
        for path in pairs.images
        if condition.kind == "multilabel" and (texts := inspected[path].findings) is not None
        for at, index in enumerate(inspected[path].indices)
    }
    scanned = (sorted(other_files), sorted(companions), has_patient_ids, has_salt, attributes, findings)
    return ScanResult(records, *scanned)


def _inspect_files(
    folder: Folder, files: Collection[str], listed: Collection[str], preprocess: config.Preprocess
) -> tuple[dict[str, Contents], dict[str, str], set[str], dict[str, tuple[str, ...]]]:
    """Contents of image and mask files, reasons for other files, companions, and the files of each DICOM series.

    A file listed in the manifest counts as an image; reading it later reports any error.
    """
    found: dict[str, Contents] = {}
    other_files: dict[str, str] = {}
    companions: set[str] = set()
    unreadable: set[str] = set()
    slices: dict[str, SeriesKey] = {}
    for path in sorted({*files, *listed}):
        if path in companions:
            continue
        needed = [] if images.kind_of_name(_file_name(path)) == "raster" else with_companions(path)
        with local_files(folder, [name for name in needed if name in files]) as root:
            kind = images.file_kind(root / path)
            if kind is None and path not in listed:
                other_files[path] = images.describe_file(root / path)
                continue
            found[path] = _SINGLE_IMAGE
            if kind in (None, "raster"):
                continue
            try:
                if kind == "dicom" and preprocess.has_volumes:
                    slices[path] = images.series_key(root / path)
                    continue
                contents = images.inspect(root / path, preprocess)
            except UnreadableImage:
                unreadable.add(path)  # keep one record: reading it reports the reason
                continue
            names = {companion.relative_to(root).as_posix() for companion in contents.companions}
        found[path] = contents
        if not contents.indices:
            del found[path]
            other_files[path] = "preprocess.volume selects none of its images"
        companions |= {name for name in names if name in files and name not in listed}
    # A companion that sorts before its image file was classified as something else above.
    for path in companions & (other_files.keys() | unreadable):
        other_files.pop(path, None)
        found.pop(path, None)
    series = _join_series(slices, listed)
    for path, of_series in series.items():
        for name in of_series:
            del found[name]
            if name in listed and name != path:
                other_files[name] = f"a slice of {path}, which is one volume"
        patients_named = (slices[name].patient for name in of_series)
        found[path] = Contents((0,), patient=next(filter(None, patients_named), None))
    return found, other_files, companions - found.keys(), series


def _join_series(slices: Mapping[str, SeriesKey], listed: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The files of each series in a folder by the volume's path.

    A series alone in its folder has the path of the folder, so that the folder's name is the volume's and no class. Of
    others it is the first file by name. A file that the manifest lists takes precedence.
    """
    by_folder: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(slices):
        by_folder[folder_of(path)][slices[path].uid].append(path)
    paths = {}
    for folder, groups in by_folder.items():
        for files in groups.values():
            is_alone = (
                len(groups) == 1 and len(files) > 1 and _file_name(folder[:-1]).lower() not in ("", *SPLIT_ALIASES)
            )
            own = folder[:-1] if is_alone else files[0]
            paths[own if own in listed else next((name for name in files if name in listed), own)] = tuple(files)
    return paths


def with_companions(path: str) -> list[str]:
    """A file's path, and those of the files that may belong to it."""
    return [path, *(folder_of(path) + name for name in images.companion_names(_file_name(path)))]


def _file_name(path: str) -> str:
    return path[len(folder_of(path)) :]


def _item(values: Sequence[str | None] | None, at: int) -> str | None:
    return None if values is None else values[at]


class _PatientIds:
    """The patient of each image, as a pseudonym unless data.keep_patient_ids is set."""

    def __init__(self, folder: Path, data: config.Data, has_patient_ids: bool) -> None:
        self._pattern = patients.compile_pattern(data.patient_pattern)
        self._salt = None if data.keep_patient_ids else patients.find_salt(folder, has_patient_ids)

    def find(self, path: str, contents: Contents, row: ManifestRow, labels: PathLabels) -> str | None:
        """The patient's identifier of a file; None if nothing names the patient."""
        if row.patient is None and contents.independent:
            return None
        return row.patient or self._find(path, contents, labels)

    def pseudonym(self, identifier: str) -> str:
        """Text that the store has instead of the identifier."""
        return sys.intern(identifier if self._salt is None else patients.pseudonymize(self._salt, identifier))

    def group(self, identifier: str) -> str:
        """The patient for the split: the same on every machine, whatever the salt."""
        return sys.intern(identifier if self._salt is None else patients.pseudonymize(patients.NO_SALT, identifier))

    def _find(self, path: str, contents: Contents, labels: PathLabels) -> str | None:
        name = _file_name(path)
        # The user's pattern takes precedence over the file, which may contain "ANONYMOUS" for all patients.
        if self._pattern is not None and (named := patients.patient_from_file_name(name, self._pattern)):
            return named
        return contents.patient or patients.patient_from_file_name(name) or labels.patient


def _no_images(folder: Folder, other_files: Sequence[tuple[str, str]]) -> UserError:
    reasons = Counter(reason for _, reason in other_files).most_common(3)
    found = ", ".join(f"{count} x {reason}" for reason, count in reasons) or "no files"
    return UserError(
        f"{folder}: no images found; found {found}; expected PNG, JPEG, BMP, TIFF, DICOM, NIfTI, MGZ, Analyze, "
        f"NPZ, IDX or CIFAR files in class folders, in train/ and test/ folders, or listed in {MANIFEST}"
    )
