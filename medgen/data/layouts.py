"""A folder -> one record for each picture: label, patient, split and mask, from names or manifest.csv.

Read are, in any mixture: CLASS/file, SPLIT/CLASS/file (under wrapper folders too), flat folders,
images/ beside masks/, NAME_mask or NAME@ beside NAME, and a manifest.csv with path and any of label, patient
(or group) and split. The manifest is the list of pictures where there is one; what it leaves empty comes from
folders and names.
"""

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medgen.data.images import looks_like_image
from medgen.errors import UserError

MANIFEST = "manifest.csv"
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img"})
_MASK_FOLDERS = frozenset({"masks", "mask", "lung_masks", "lung_mask"})
_MASK_STEM = re.compile(r"(?P<stem>.+?)(?:[_-]mask(?:_\d+)?|@)", re.IGNORECASE)
_JUNK_FOLDERS = frozenset({"__macosx", "__pycache__"})  # hidden ones are left out anyway
_CACHE_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")  # where DVC's own links lead

# How published sets name their patients; the first that fits decides.
_PATIENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(person\d+)_",  # Kermany chest X-rays: person12_bacteria_46
        r"^((?:[A-Z]+\d*-)?IM-\d+)-",  # the same set's normal films: IM-0001-0001, NORMAL2-IM-0530-0001
        r"^(case[_-]\d+)(?:[_.-]|$)",  # OASIS as case_001_slice_0
        r"^(OAS\d_\d{4})_",  # OASIS itself
        r"^(\d{8})_\d{3}",  # NIH ChestX-ray14: 00001280_004
        r"^(COVID-\d+)[a-z]?(?:\D|$)",  # Figure 1: COVID-00015a, COVID-00015b
        r"^(sub-[0-9a-z]+)_",  # BIDS
        r"^(patient[_-]?\d+)(?:[_.-]|$)",
    )
)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one picture before it is read."""

    path: str  # posix, relative to the data folder
    label: str | None
    patient: str  # a salted hash, unless data.keep_patient_ids; of the path where nothing says more
    split: str | None  # train, val, test where the data says so
    mask: str | None  # as path
    index: int = 0  # which picture of its file; a mask has the same index in its own


def scan(folder: Path, patient_pattern: str | None = None) -> list[Record]:
    """Lists a folder's pictures, sorted by path.

    `patient_pattern` is a regular expression searched in the file name; its group 1 is the patient.

    Raises:
        UserError: nothing is there, manifest.csv is wrong, or a path leads out of the folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected the raw images there. Run `medgen data sample`, "
            "`medgen data import PATH` or `dvc pull`"
        )
    pattern = _compile(patient_pattern)
    rows = _read_manifest(folder)
    images, masks = _pair([PurePosixPath(name) for name in _walk(folder)])
    paths = images if rows is None else [PurePosixPath(name) for name in rows]
    if not paths:
        raise UserError(
            f"{folder}: no pictures found; expected PNG, JPEG, BMP or TIFF files in class folders, "
            "in train/ and test/ folders, or listed in manifest.csv"
        )
    places = _read_places(paths)
    records = []
    for path in paths:
        row = {} if rows is None else rows[str(path)]
        split, label = places[path]
        records.append(
            Record(
                path=str(path),
                label=row.get("label") or label,
                patient=row.get("patient") or _patient(path, pattern),
                split=row.get("split") or split,
                mask=masks.get(_key(path)),
            )
        )
    return sorted(records, key=lambda record: record.path)


def _walk(folder: Path) -> Iterator[str]:
    """Relative posix paths of picture files; hidden files and folders and known junk left out."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in _JUNK_FOLDERS)
        for name in folders:
            if (here / name).is_symlink():
                raise UserError(
                    f"{here / name}: a link to a folder; expected the files themselves. "
                    "Put them there, or name the real folder to `medgen data import`"
                )
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or not path.is_file() or not looks_like_image(path):
                continue
            if path.is_symlink():
                _refuse_outside(folder, path)
            yield path.relative_to(folder).as_posix()


def _refuse_outside(folder: Path, path: Path) -> None:
    """A downloaded folder must not make us read files elsewhere; DVC's links into its cache are fine."""
    target = path.resolve()
    if target.is_relative_to(folder.resolve()) or _CACHE_OBJECT.search(target.as_posix()):
        return
    raise UserError(f"{path}: leads out of {folder}, to {target}; expected a file inside. Copy the file there")


def _pair(files: Sequence[PurePosixPath]) -> tuple[list[PurePosixPath], dict[tuple[str, ...], str]]:
    """Pictures, and each mask by the key of its picture."""
    keys = {_key(path) for path in files if not _in_mask_folder(path)}
    images: list[PurePosixPath] = []
    masks: dict[tuple[str, ...], str] = {}
    for path in files:
        key = _key(path)
        marked = _MASK_STEM.fullmatch(path.stem)
        bare = (*key[:-1], marked["stem"]) if marked else key  # the key without the mark of a mask
        if _in_mask_folder(path):
            masks.setdefault(bare if bare in keys else key, str(path))
        elif bare != key and (bare in keys or path.stem.lower().endswith("_mask")):
            masks.setdefault(bare, str(path))  # a mask whose picture is missing is no picture either
        else:
            images.append(path)
    return images, masks


def _in_mask_folder(path: PurePosixPath) -> bool:
    return any(_plain(part) in _MASK_FOLDERS for part in path.parts[:-1])


def _key(path: PurePosixPath) -> tuple[str, ...]:
    """The same for a picture and its mask: folders without images/ and masks/, then the stem."""
    roles = _IMAGE_FOLDERS | _MASK_FOLDERS
    return (*(part for part in path.parts[:-1] if _plain(part) not in roles), path.stem)


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _read_places(paths: Sequence[PurePosixPath]) -> dict[PurePosixPath, tuple[str | None, str | None]]:
    """Split and label of each path, from its folders."""
    places: dict[PurePosixPath, tuple[str | None, tuple[str, ...], tuple[str, ...]]] = {}
    for path in paths:
        parts = _key(path)[:-1]
        at = next((i for i, part in enumerate(parts) if part.lower() in SPLITS), None)
        if at is None:
            places[path] = (None, (), parts)
        else:
            places[path] = (SPLITS[parts[at].lower()], parts[:at], parts[at + 1 :])
    # Folders above all files say nothing: chest_xray/, Data/. Below a split each folder is a class.
    loose = [below for split, _, below in places.values() if split is None]
    wrapper = _num_shared(loose)
    tops = [above for split, above, below in places.values() if split is not None and not below]
    top = _num_shared(tops)
    found: dict[PurePosixPath, tuple[str | None, str | None]] = {}
    for path, (split, above, below) in places.items():
        names = below[wrapper:] if split is None else below or above[top:]  # CLASS/train/file is read too
        found[path] = (split, names[0] if names else None)
    return found


def _num_shared(folders: Sequence[tuple[str, ...]]) -> int:
    """How many leading parts all have in common."""
    if not folders:
        return 0
    first, last = min(folders), max(folders)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _compile(patient_pattern: str | None) -> re.Pattern[str] | None:
    if patient_pattern is None:
        return None
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise UserError(f"data.patient_pattern: {patient_pattern!r} is no regular expression: {error}") from None
    if pattern.groups < 1:
        raise UserError(
            f"data.patient_pattern: {patient_pattern!r} has no group; expected the patient in round brackets, "
            r"such as '^(person\d+)_'"
        )
    return pattern


def _patient(path: PurePosixPath, pattern: re.Pattern[str] | None) -> str:
    for candidate in _PATIENTS if pattern is None else (pattern,):
        if (match := candidate.search(path.name)) and match[1]:
            return match[1]
    return str(path)


def _read_manifest(folder: Path) -> dict[str, Mapping[str, str]] | None:
    """manifest.csv's rows by path, with the keys label, patient and split; None where there is none."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    _refuse_outside(folder, file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            if "path" not in names:
                raise UserError(
                    f"{file}: columns are {', '.join(names) or 'none'}; expected path, and any of label, patient, split"
                )
            patient = "patient" if "patient" in names else "group"
            columns = {"path": "path", "label": "label", "patient": patient, "split": "split"}
            rows: dict[str, Mapping[str, str]] = {}
            for line in reader:
                row = {key: (line.get(names.get(name, "")) or "").strip() for key, name in columns.items()}
                path = _manifest_path(folder, file, reader.line_num, row["path"])
                if path in rows:
                    raise UserError(f"{file}, line {reader.line_num}: {path} is listed twice; expected each file once")
                rows[path] = {**row, "split": _manifest_split(file, reader.line_num, row["split"])}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not readable as CSV in UTF-8: {error}") from None
    return rows


def _manifest_path(folder: Path, file: Path, line: int, text: str) -> str:
    path = PurePosixPath(text.replace("\\", "/"))
    if not text or path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", text):
        raise UserError(f"{file}, line {line}: path {text!r}; expected a path inside {folder}, relative to it")
    _refuse_outside(folder, folder / path)
    return str(path)


def _manifest_split(file: Path, line: int, text: str) -> str:
    if not text:
        return ""
    if text.lower() not in SPLITS:
        raise UserError(f"{file}, line {line}: split {text!r}; expected train, val or test, or nothing")
    return SPLITS[text.lower()]
