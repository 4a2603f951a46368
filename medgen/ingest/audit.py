"""Audit a folder of images: counts, leaks between splits, duplicates, conflicting labels, outliers and damaged files.

medgen data audit [PATH]

Needs no dataset store. Every image is read once, in colour; those shown on the page are read again.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from medgen import config
from medgen.config import Project
from medgen.console import counting_bar, note
from medgen.errors import UserError
from medgen.ingest import dataset_scan, images
from medgen.ingest.audit_page import Audit, histogram, print_tables, render_page, shown_records
from medgen.ingest.dataset_checks import CheckResults, ImageIndex, check_dataset
from medgen.ingest.dataset_scan import ImageRecord
from medgen.ingest.folders import Folder, data_folder
from medgen.ingest.formats.raw import RawImage
from medgen.ingest.near_duplicates import thumbnail
from medgen.ingest.reading import read_images
from medgen.ingest.transforms import preprocess_mask, preprocess_paired
from medgen.io import to_json, write_atomic

_PAGE_IMAGE_SIZE = 160  # longer side in pixels


def run(
    project: Project,
    *,
    data: config.Data,
    preprocess: config.Preprocess,
    path: Path | str | None = None,
    out: Path | None = None,
    strict: bool = False,
    as_json: bool = False,
) -> CheckResults:
    """Check the data folder, or a folder or s3:// address, and write audit.html and audit.json to reports/ or `out`.

    Raises:
        UserError: the folder does not exist, is a file, contains no images, or has a wrong manifest; its bucket or the
            cluster cannot be used; `out` cannot be written; with `strict`, splits leak.
    """
    reports = out or project.reports
    folder = data_folder(project.root, data.path) if path is None else data_folder(Path(), str(path))
    if folder.is_file():
        raise UserError(
            f"{folder}: a file; expected a folder of images. Unpack an archive, or import it first with "
            "`medgen data import` and run `medgen data audit` without a path"
        )
    data = data.model_copy(update={"keep_patient_ids": False})  # reports may be shared
    preprocess = preprocess.model_copy(update={"channels": 3})  # to find colour images in a grey dataset
    try:
        audit = _check_folder(reports, folder, data, preprocess)
        content = to_json(audit.to_json())
        page = render_page(audit, _jpegs(folder, shown_records(audit), preprocess))
        write_atomic(reports / "audit.json", content)
        write_atomic(reports / "audit.html", page)
    except OSError as error:
        raise UserError(
            f"{error.filename or reports}: {error.strerror or error}; expected images that can be read and a folder "
            "for the page that can be written, which --out chooses"
        ) from error
    if as_json:
        print(content.decode(), end="")
    else:
        print_tables(audit)
    note(f"images and lists: {reports / 'audit.html'}")
    if strict and (leaks := audit.results.leaks):
        raise UserError(
            f"{folder}: {len(leaks)} leaks between splits, for example: {leaks[0]}. {reports / 'audit.html'} lists "
            "them. Set data.leaks to move, or data.splits to own"
        )
    return audit.results


def _check_folder(scratch: Path, folder: Folder, data: config.Data, preprocess: config.Preprocess) -> Audit:
    scanned = dataset_scan.scan(folder, data, preprocess)
    records = [replace(record, split=record.split if data.splits == "given" else None) for record in scanned.records]

    def transform(
        record: ImageRecord, raw: RawImage, mask: RawImage | None, paired: Sequence[RawImage | None]
    ) -> NDArray[np.uint8]:
        if mask is not None:
            preprocess_mask(mask, raw, str(record.mask), preprocess)  # raises UnreadableImage if it is invalid
        preprocess_paired(paired, raw, record.paired, preprocess)
        return thumbnail(raw.preview)

    unreadable: list[tuple[str, str]] = []
    left_out: list[tuple[str, str]] = []
    with ImageIndex(scratch) as index, counting_bar() as progress:
        task = progress.add_task("audit", total=len(records))
        for result in read_images(folder, records, preprocess, transform):
            if result.value is None:
                (left_out if result.left_out else unreadable).append((result.record.name, result.reason))
            else:
                index.add(result, result.value)
            progress.advance(task)
        results = check_dataset(index, [record.split for record in index.records])
        histograms = {
            "Longer side of the images in pixels": histogram(index.sizes.max(axis=1)) if len(index) else [],
            "Mean grey value of the images, from 0 (black) to 255 (white)": histogram(index.mean_greys, (0, 256)),
        }
    masks = {record.mask for record in scanned.records if record.mask}
    paired = {path for record in records for path in record.paired if path}
    num_image_files = len(masks | paired | {name for record in records for name in record.files})
    return Audit(
        folder=folder.resolve().name if isinstance(folder, Path) else folder.name,
        num_files=num_image_files + len(scanned.companions) + len(scanned.other_files),
        kinds=_count_kinds(folder, records),
        num_masks=len(masks),
        results=results,
        unreadable=unreadable,
        left_out=left_out,
        other_files=scanned.other_files,
        records={record.name: record for record in index.records},
        histograms=histograms,
    )


def _count_kinds(folder: Folder, records: Sequence[ImageRecord]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    num_images = Counter(record.path for record in records)
    for path, files in {record.path: record.files for record in records}.items():
        name = files[0].rpartition("/")[2]
        found = images.file_kind(folder / files[0]) if isinstance(folder, Path) else images.kind_of_name(name)
        kind = kinds.setdefault(found or "unknown", {"files": 0, "images": 0})
        kind["files"] += len(files)
        kind["images"] += num_images[path]
    return dict(sorted(kinds.items()))


def _jpegs(folder: Folder, records: Sequence[ImageRecord], preprocess: config.Preprocess) -> dict[str, bytes]:
    """Small JPEG files by image name, without those whose file has been removed since the checks."""
    results = read_images(folder, records, preprocess, lambda _record, raw, _mask, _paired: _small_jpeg(raw))
    return {result.record.name: result.value for result in results if result.value is not None}


def _small_jpeg(raw: RawImage) -> bytes:
    pixels: NDArray[Any] = raw.preview
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    height, width = pixels.shape[:2]
    factor = _PAGE_IMAGE_SIZE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)
    if small.ndim == 3:
        small = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1])
