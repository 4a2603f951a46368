"""Read manifest.csv, the user's own labels, patients and splits. They take precedence over folder and file names.

path,label,patient,split,sex,age,view
scans/17.png,NORMAL,p17,train,F,63,PA
"""

import contextlib
import csv
import re
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from medgen.data.store import ATTRIBUTES
from medgen.errors import UserError
from medgen.ingest.list_files import check_inside

MANIFEST = "manifest.csv"
SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class ManifestRow(NamedTuple):
    """The manifest's values for a file; None if empty."""

    label: str | None = None
    patient: str | None = None
    split: str | None = None
    attributes: Mapping[str, str] = {}  # sex, age, view and conditions, those that are given


def read_manifest(
    folder: Path, present: Container[str], columns: Sequence[str] = ATTRIBUTES
) -> dict[str, ManifestRow] | None:
    """Rows by path, or None without a manifest.csv.

    `present` are the files known to be inside the folder, `columns` the names of the attributes.

    Raises:
        UserError: the file is no CSV in UTF-8, lacks the column path, lists a file twice, or contains a path outside
            the folder or an unknown split.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    check_inside(folder, file)
    rows: dict[str, ManifestRow] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            if "path" not in names:
                raise UserError(
                    f"{file}: no column named path among {len(names)}; expected a header with path, and any of "
                    "label, patient, split, sex, age, view"
                )
            patient_column = "patient" if "patient" in names else "group"
            for line in reader:
                at = f"{file}, line {reader.line_num}"
                text, label, patient, split = (
                    (line.get(names.get(name, "")) or "").strip() for name in ("path", "label", patient_column, "split")
                )
                path = _path(folder, at, text, present)
                if path in rows:
                    raise UserError(f"{at}: {path} is listed twice; expected each file once")
                found = ((name, (line.get(names.get(name, "")) or "").strip()) for name in columns)
                attributes = {name: sys.intern(value) for name, value in found if value}
                rows[path] = ManifestRow(sys.intern(label) or None, patient or None, _split(at, split), attributes)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); make the file readable") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as CSV in UTF-8: {error}. Save it as CSV in UTF-8") from None
    return rows


def _path(folder: Path, at: str, text: str, present: Container[str]) -> str:
    path = PurePosixPath(text.replace("\\", "/"))
    if not text or "\0" in text or path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", text):
        raise UserError(f"{at}: path {text!r}; expected a path inside {folder}, relative to it")
    if str(path) not in present:
        with contextlib.suppress(OSError, RuntimeError):  # name too long or a cycle of links; reading reports it
            check_inside(folder, folder / path)
    return str(path)


def _split(at: str, text: str) -> str | None:
    if text and text.lower() not in SPLIT_ALIASES:
        raise UserError(f"{at}: split {text!r}; expected train, val, test or an empty cell")
    return SPLIT_ALIASES.get(text.lower())
