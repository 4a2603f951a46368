"""Present an audit: tables in the terminal, and the page reports/audit.html with images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from medgen.console import say, show
from medgen.data.store import SPLITS
from medgen.ingest.dataset_checks import CheckResults, DuplicateGroup, escaped
from medgen.ingest.dataset_scan import ImageRecord
from medgen.reports.html import data_uri, render

_NUM_BINS = 32  # of a histogram, at most
_MAX_SHOWN = 12  # entries per section of the page; audit.json contains all
_MIN_IMBALANCE = 3.0  # ratio of the largest to the smallest class that is worth a sentence
_NAME_PATIENTS = "name them in manifest.csv (column patient), or set data.patient_pattern"
_CONTENT_COLUMNS = ("content", "number", "details")
_CHECK_COLUMNS = ("check", "number", "severity", "an example")
SEVERITIES = ("error", "serious", "note")  # the most severe first


@dataclass(frozen=True)
class Audit:
    """Counts and problems of a folder. The lists are complete."""

    folder: str
    num_files: int
    kinds: dict[str, dict[str, int]]  # raster, dicom, volume, npz … -> numbers of "files" and "images"
    num_masks: int  # files
    results: CheckResults
    unreadable: list[tuple[str, str]]  # name, reason
    left_out: list[tuple[str, str]]  # undamaged images that the settings leave out, such as empty slices
    other_files: list[tuple[str, str]]  # files that are not images
    records: Mapping[str, ImageRecord]  # by name, of the images that were read
    histograms: Mapping[str, list[tuple[str, int]]]  # title -> range of values and number of images of each bin

    def to_json(self) -> dict[str, Any]:
        """The content of audit.json."""
        counts = {"folder": self.folder, "num_files": self.num_files, "kinds": self.kinds, "num_masks": self.num_masks}
        lists = {"unreadable": self.unreadable, "left_out": self.left_out, "foreign": self.other_files}
        reasons = {
            key: [{"path": name, "reason": reason} for name, reason in entries] for key, entries in lists.items()
        }
        histograms = {
            title: [{"range": label, "images": count} for label, count in bins]
            for title, bins in self.histograms.items()
        }
        return counts | self.results.to_json() | reasons | {"histograms": histograms}


def histogram(values: NDArray[Any], limits: tuple[int, int] | None = None) -> list[tuple[str, int]]:
    """The range and the number of values in each of up to 32 bins of whole numbers, from low to high."""
    if len(values) == 0:
        return []
    low, high = limits or (int(values.min()), int(values.max()) + 1)
    width = max(1, -(-(high - low) // _NUM_BINS))
    edges = np.arange(low, high + width, width)
    counts, _ = np.histogram(values, edges)
    return [
        (str(edge) if width == 1 else f"{edge} to {edge + width - 1}", count)
        for edge, count in zip(edges[:-1].tolist(), counts.tolist(), strict=True)
    ]


def print_tables(audit: Audit) -> None:
    """Print the images by class and split, the checks and the conclusions."""
    head, body = _class_table(audit.results)
    classes = Table(title=f"Images in {escaped(audit.folder)}", title_justify="left")
    for column, name in enumerate(head):
        classes.add_column(name, justify="right" if column else "left", overflow="fold")
    for cells in body:
        classes.add_row(*cells)
    show(classes)
    for title, columns, rows in (
        ("Content", _CONTENT_COLUMNS, _content_rows(audit)),
        ("Checks", _CHECK_COLUMNS, _check_rows(audit)),
    ):
        table = Table(title=title, title_justify="left")
        for at, heading in enumerate(columns):
            last = at == len(columns) - 1
            table.add_column(heading, justify="right" if at == 1 else "left", no_wrap=not last, overflow="fold")
        for row in rows:
            table.add_row(*row)
        show(table)
    for sentence in _conclusions(audit):
        say(f"- {sentence}")


def shown_records(audit: Audit) -> list[ImageRecord]:
    """The images that the page shows, sorted by path and index."""
    sections = _sections(audit.results).values()
    names = {name for groups in sections for group in groups[:_MAX_SHOWN] for name in group.names[:2]}
    return sorted((audit.records[name] for name in names), key=lambda record: (record.path, record.index))


def render_page(audit: Audit, jpegs: Mapping[str, bytes]) -> bytes:
    """The HTML page, the same bytes for the same data; `jpegs` are JPEG files by image name."""
    results = audit.results
    class_head, class_rows = _class_table(results)
    return render(
        "audit.html",
        title=f"medgen: audit of {escaped(audit.folder)}",
        folder=escaped(audit.folder),
        conclusions=_conclusions(audit),
        class_head=class_head,
        class_rows=class_rows,
        histograms={title: bins for title, bins in audit.histograms.items() if bins},
        content_head=_CONTENT_COLUMNS,
        content_rows=_content_rows(audit),
        check_head=_CHECK_COLUMNS,
        check_rows=_check_rows(audit),
        leaks=[(leak.patient, _join(leak.counts), escaped(leak.example)) for leak in results.patient_leaks],
        sections=[
            (title, [_figures(audit, group, jpegs) for group in groups]) for title, groups in _sections(results).items()
        ],
        file_lists={
            title: [(escaped(name), escaped(reason)) for name, reason in entries]
            for title, entries in _file_lists(audit).items()
        },
        max_shown=_MAX_SHOWN,
    )


def _content_rows(audit: Audit) -> list[tuple[str, str, str]]:
    """Name, number and details of what the folder contains."""
    results = audit.results
    kinds = [
        f"{name} {kind['files']:,}" + (f" ({kind['images']:,} images)" if kind["images"] != kind["files"] else "")
        for name, kind in audit.kinds.items()
    ]
    small, median, large = (f"{w} x {h}" for w, h in zip(results.widths, results.heights, strict=True))
    num_classes = sum(1 for label in results.counts if label)
    balance = "one class" if results.imbalance is None else f"{results.imbalance:.3g} to 1, largest to smallest"
    modes = ", ".join(f"{mode} {num:,}" for mode, num in results.modes.items())
    return [
        ("files", f"{audit.num_files:,}", ", ".join(kinds)),
        ("images", f"{results.num_images:,}", modes),
        ("sizes", f"{results.num_sizes:,}", f"{small} to {large}, median {median}"),
        ("classes", f"{num_classes:,}", balance if num_classes else "no labels"),
        _patients_row(results),
        ("masks", f"{audit.num_masks:,}", ""),
    ]


def _patients_row(results: CheckResults) -> tuple[str, str, str]:
    unknown = results.num_images_without_patient
    known_images = results.num_images - unknown
    if not known_images:
        return "patients", "unknown", "no file name, header or manifest.csv names a patient"
    details = f"images per patient: {known_images / results.num_known_patients:.3g}"
    return (
        "patients",
        f"{results.num_known_patients:,}",
        details + (f"; unknown for {unknown:,} images" if unknown else ""),
    )


def _check_rows(audit: Audit) -> list[tuple[str, str, str, str]]:
    """Name, number, severity and an example of each kind of problem, the most severe first."""
    results = audit.results
    unknown = results.num_images_without_patient
    number, example = f"{len(results.patient_leaks):,}", _first(leak.example for leak in results.patient_leaks)
    if unknown and not results.patient_leaks:
        number = "unknown"
        known = results.num_images - unknown
        example = f"{unknown:,} images name no patient" + (f"; none among the other {known:,}" if known else "")
    severity = "error" if results.patient_leaks else "serious" if unknown else ""
    rows = [("patients in several splits", number, severity, example)]
    for title, groups in _sections(results).items():
        example = _first(" and ".join(group.names[:2]) for group in groups)
        rows.append((title, f"{len(groups):,}", _severity(title) if groups else "", example))
    for title, entries in _file_lists(audit).items():
        severity = _severity(title) if entries else ""
        rows.append((title, f"{len(entries):,}", severity, _first(map(": ".join, entries))))
    return sorted(rows, key=lambda row: SEVERITIES.index(row[2]) if row[2] else len(SEVERITIES))


def _severity(title: str) -> str:
    """The severity of a kind of problem: error for one that makes results wrong."""
    if title.endswith("across splits"):
        return "error"
    return "serious" if title in ("one image, several labels", "unreadable") else "note"


def _file_lists(audit: Audit) -> dict[str, list[tuple[str, str]]]:
    return {"unreadable": audit.unreadable, "left out": audit.left_out, "files that are not images": audit.other_files}


def _sections(results: CheckResults) -> dict[str, Sequence[DuplicateGroup]]:
    """Problems that the page shows with images, by title. The images of a group are shown side by side."""

    def single(names: Sequence[str]) -> list[DuplicateGroup]:
        return [DuplicateGroup([name], [], []) for name in names]

    sections: dict[str, Sequence[DuplicateGroup]] = {}
    for title, groups in (("exact duplicates", results.exact), ("near-duplicates", results.near)):
        sections[f"{title} across splits"] = [group for group in groups if group.is_across]
        sections[f"other {title}"] = [group for group in groups if not group.is_across]
    sections["one image, several labels"] = results.conflicts
    order = sorted(sections, key=lambda title: SEVERITIES.index(_severity(title)))
    return {title: sections[title] for title in order} | {
        "outliers": single(results.outliers),
        "blank": single(results.blank),
    }


def _conclusions(audit: Audit) -> list[str]:
    """Sentences about the problems, the most serious first, with the settings that solve them."""
    results = audit.results
    sentences = [_leak_conclusion(results)] if results.num_images else []
    if results.conflicts:
        sentences.append(
            f"{_count(results.conflicts, 'image')} with several labels: inspect them below and correct the labels. "
            "data.duplicates=drop leaves out those that are identical."
        )
    if results.exact:
        sentences.append(
            f"{_count(results.exact, 'image')} in several copies, {results.num_duplicates:,} files redundant. "
            "data.duplicates=drop leaves them out."
        )
    if results.near:
        sentences.append(f"{_count(results.near, 'pair')} of images that differ only in encoding, size or brightness.")
    if results.outliers:
        sentences.append(
            f"{_count(results.outliers, 'image')} unlike the others: inspect them below and remove the wrong ones."
        )
    if results.blank:
        sentences.append(f"{_count(results.blank, 'blank image')}.")
    if audit.unreadable:
        sentences.append(f"{_count(audit.unreadable, 'unreadable image')}; the reasons are below.")
    if results.imbalance is not None and results.imbalance >= _MIN_IMBALANCE:
        sentences.append(f"The largest class has {results.imbalance:.3g} times as many images as the smallest.")
    return sentences


def _leak_conclusion(results: CheckResults) -> str:
    across = [group for group in [*results.exact, *results.near] if group.is_across]
    leaks = [
        _count(entries, noun) for entries, noun in ((results.patient_leaks, "patient"), (across, "image")) if entries
    ]
    if leaks:
        return (
            f"The splits leak: {' and '.join(leaks)} in several splits. A model would be evaluated on images it was "
            "trained on. Set data.leaks to move, or data.splits to own."
        )
    splits = {split for counts in results.counts.values() for split in counts if split}
    unknown = results.num_images_without_patient
    if len(splits) == 1:
        return f"All images are in {splits.pop()}, so there are no leaks between splits."
    if splits and unknown:
        return (
            f"No image is in two of the dataset's splits. Patients are unknown for {unknown:,} of "
            f"{results.num_images:,} images, so leaks of patients cannot be found there: {_NAME_PATIENTS}."
        )
    if splits:
        return "No patient and no image is in two of the dataset's splits."
    text = "The dataset defines no splits; preprocess keeps patients and duplicates together when it assigns them."
    if unknown:
        text += (
            f" Patients are unknown for {unknown:,} of {results.num_images:,} images, whose files count as one patient "
            f"each: {_NAME_PATIENTS}."
        )
    return text


def _class_table(results: CheckResults) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of images by label and split."""
    splits = [split for split in ("", *SPLITS) if any(split in counts for counts in results.counts.values())]
    splits = [] if splits == [""] else splits
    named = {label or "no label": counts for label, counts in results.counts.items()}
    if len(named) > 1:
        named["all"] = {split: sum(counts.get(split, 0) for counts in named.values()) for split in ("", *SPLITS)}
    body = [
        [
            escaped(label),
            *(f"{counts.get(split, 0):,}" for split in splits),
            f"{sum(counts.values()):,}",
            f"{sum(counts.values()) / max(results.num_images, 1):.1%}",
        ]
        for label, counts in named.items()
    ]
    return ["label", *(split or "no split" for split in splits), "images", "share"], body


def _figures(
    audit: Audit, group: DuplicateGroup, jpegs: Mapping[str, bytes]
) -> tuple[list[tuple[str | None, str]], str]:
    """Image source, None without a JPEG, and caption of the first two images of a group, and a note."""
    images = []
    for name in group.names[:2]:
        record = audit.records[name]
        caption = "\n".join(map(escaped, filter(None, (name, record.split, record.label))))
        images.append((data_uri(jpegs[name], "jpeg") if name in jpegs else None, caption))
    note = f"correlation {group.correlation:.3f}" if group.correlation < 1 else ""
    if len(group.names) > 2:
        note = f"and {len(group.names) - 2} more"
    return images, note


def _first(texts: Iterable[str]) -> str:
    return escaped(next(iter(texts), ""))


def _join(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {number:,}" for split, number in counts.items())


def _count(entries: Sequence[object], noun: str) -> str:
    return f"{len(entries):,} {noun}" + ("" if len(entries) == 1 else "s")
