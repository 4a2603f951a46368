"""manifest.csv: what a dataset's maker, or its user, says of each file; it comes before folders and names.

path,label,patient,split
scans/17.png,NORMAL,p17,train
"""

import contextlib
import csv
import re
import sys
from collections.abc import Container
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from medgen.errors import UserError
from medgen.ingest.list_files import refuse_outside

MANIFEST = "manifest.csv"
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Row(NamedTuple):
    """What the manifest says of a file; None where it says nothing."""

    label: str | None = None
    patient: str | None = None
    split: str | None = None


def read_manifest(folder: Path, present: Container[str]) -> dict[str, Row] | None:
    """Rows by path, None where there is no manifest.csv. `present` are the files known to lie inside the folder.

    Raises:
        UserError: it is no CSV in UTF-8, lacks the column path, lists a file twice, names a path outside or an
            unknown split.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    refuse_outside(folder, file)
    rows: dict[str, Row] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            if "path" not in names:
                raise UserError(
                    f"{file}: no column named path among {len(names)}; expected a first line with path, and any of "
                    "label, patient, split"
                )
            patient = "patient" if "patient" in names else "group"
            for line in reader:
                at = f"{file}, line {reader.line_num}"
                text, label, person, split = (
                    (line.get(names.get(name, "")) or "").strip() for name in ("path", "label", patient, "split")
                )
                path = _path(folder, at, text, present)
                if path in rows:
                    raise UserError(f"{at}: {path} is listed twice; expected each file once")
                rows[path] = Row(sys.intern(label) or None, person or None, _split(at, split))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not readable as CSV in UTF-8: {error}") from None
    return rows


def _path(folder: Path, at: str, text: str, present: Container[str]) -> str:
    path = PurePosixPath(text.replace("\\", "/"))
    if not text or "\0" in text or path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", text):
        raise UserError(f"{at}: path {text!r}; expected a path inside {folder}, relative to it")
    if str(path) not in present:
        with contextlib.suppress(OSError, RuntimeError):  # name too long, ring of links: reading gives the reason
            refuse_outside(folder, folder / path)
    return str(path)


def _split(at: str, text: str) -> str | None:
    if text and text.lower() not in SPLITS:
        raise UserError(f"{at}: split {text!r}; expected train, val or test, or nothing")
    return SPLITS.get(text.lower())
