"""What is in a folder of images, and what is wrong with it: leaks, duplicates, wrong labels, odd and broken files.

medgen data audit [PATH]

No store is needed. Every picture is read once, in colour; those that the page shows once more.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from medgen import config
from medgen.config import Project
from medgen.console import counting_bar
from medgen.errors import UserError
from medgen.ingest import dataset_checks, dataset_scan, images
from medgen.ingest.audit_page import Audit, make_page, print_tables, shown_records
from medgen.ingest.dataset_checks import Facts, Findings
from medgen.ingest.dataset_scan import Record
from medgen.ingest.formats.raw import RawImage
from medgen.ingest.near_duplicates import thumbnail
from medgen.ingest.reading import read_all
from medgen.ingest.transforms import square_of_mask
from medgen.io import write_atomic

_SIDE = 160  # of the page's pictures


def run(
    project: Project,
    *,
    data: config.Data,
    preprocess: config.Preprocess,
    path: Path | None = None,
    as_json: bool = False,
) -> Findings:
    """Looks through a folder, the data folder unless `path` names another; writes reports/audit.html and .json.

    Raises:
        UserError: no such folder, an archive or a single file, no pictures, or a wrong manifest.
    """
    folder = project.root / data.path if path is None else path
    if folder.is_file():
        raise UserError(
            f"{folder}: a file; expected a folder of images. Unpack an archive, or `medgen data import` it first and "
            "run `medgen data audit` without a path"
        )
    data = data.model_copy(update={"keep_patient_ids": False})  # a report is passed on
    preprocess = preprocess.model_copy(update={"channels": 3})  # colour among grey is a finding
    console = Console(stderr=True)
    audit = _look(project.runs, folder, data, preprocess, console)
    text = json.dumps(audit.to_json(), indent=2) + "\n"
    shown = make_page(audit, _thumbnails(folder, shown_records(audit), preprocess))
    write_atomic(project.reports / "audit.json", text.encode())
    write_atomic(project.reports / "audit.html", shown)
    if as_json:
        print(text, end="")
    else:
        print_tables(audit)
    page = project.reports / "audit.html"
    console.print(f"pictures and lists: {page}", highlight=False, markup=False, soft_wrap=True)
    return audit.findings


def _look(scratch: Path, folder: Path, data: config.Data, preprocess: config.Preprocess, console: Console) -> Audit:
    listing = dataset_scan.scan(folder, data, preprocess)
    records = [replace(record, split=record.split if data.splits == "given" else None) for record in listing.records]

    def use(record: Record, raw: RawImage, mask: RawImage | None) -> NDArray[np.uint8]:
        if mask is not None:
            square_of_mask(mask, raw, str(record.mask), preprocess)  # for the reason, where it does not fit
        return thumbnail(raw.pixels)

    unreadable: list[tuple[str, str]] = []
    left_out: list[tuple[str, str]] = []
    with Facts(scratch) as facts, counting_bar(console) as progress:
        task = progress.add_task("audit", total=len(records))
        for read in read_all(folder, records, preprocess, use):
            if read.value is None:
                (left_out if read.left_out else unreadable).append((read.record.name, read.reason))
            else:
                facts.add(read, read.value)
            progress.advance(task)
        found = dataset_checks.find(facts, [record.split for record in facts.records])
    masks = {record.mask for record in listing.records if record.mask}
    images_of = Counter(record.path for record in records)
    return Audit(
        folder=folder.resolve().name,
        num_files=len(images_of) + len(masks - images_of.keys()) + len(listing.companions) + len(listing.foreign),
        kinds=_kinds(folder, images_of),
        num_masks=len(masks),
        findings=found,
        unreadable=unreadable,
        left_out=left_out,
        foreign=listing.foreign,
        records={record.name: record for record in facts.records},
    )


def _kinds(folder: Path, images_of: Counter[str]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    for path, number in images_of.items():
        kind = kinds.setdefault(images.kind_of(folder / path) or "unknown", {"files": 0, "images": 0})
        kind["files"] += 1
        kind["images"] += number
    return dict(sorted(kinds.items()))


def _thumbnails(folder: Path, records: Sequence[Record], preprocess: config.Preprocess) -> dict[str, bytes]:
    """Small JPEG files by name; a file that went away meanwhile has none."""
    pictures = read_all(folder, records, preprocess, lambda _record, raw, _mask: _small_jpeg(raw))
    return {read.record.name: read.value for read in pictures if read.value is not None}


def _small_jpeg(raw: RawImage) -> bytes:
    pixels: NDArray[Any] = raw.pixels if raw.pixels.dtype == np.uint8 else (raw.pixels >> 8).astype(np.uint8)
    height, width = pixels.shape[:2]
    factor = _SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)
    if small.ndim == 3:
        small = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1])
