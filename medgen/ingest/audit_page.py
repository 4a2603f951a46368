"""What an audit leaves to read: tables in the terminal, and reports/audit.html with the pictures in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medgen.data.store import SPLITS
from medgen.ingest.dataset_checks import Findings, Group, printable
from medgen.ingest.dataset_scan import Record
from medgen.reports.html import bullets, figure, page, table

_MOST = 12  # of a kind on the page; audit.json has all
_IMBALANCE = 3.0  # images of the largest class for each of the smallest, from which on it is worth a sentence


@dataclass(frozen=True)
class Audit:
    """A folder, what is in it and what was found; every list is complete."""

    folder: str
    num_files: int
    kinds: dict[str, dict[str, int]]  # picture, dicom, volume, npz … -> "files", and "images" in them
    num_masks: int  # files
    findings: Findings
    unreadable: list[tuple[str, str]]  # name, reason
    left_out: list[tuple[str, str]]  # pictures that were not wanted, such as empty slices
    foreign: list[tuple[str, str]]  # files that are no images
    records: Mapping[str, Record]  # by name, of the pictures that were read

    def to_json(self) -> dict[str, Any]:
        """The content of audit.json, plain values."""
        counted = {"folder": self.folder, "num_files": self.num_files, "kinds": self.kinds, "num_masks": self.num_masks}
        lists = {"unreadable": self.unreadable, "left_out": self.left_out, "foreign": self.foreign}
        reasons = {
            key: [{"path": name, "reason": reason} for name, reason in entries] for key, entries in lists.items()
        }
        return counted | self.findings.to_json() | reasons


@dataclass(frozen=True)
class Row:
    """One line of what was counted or looked for."""

    name: str
    value: str
    detail: str  # more numbers, or an example


@dataclass(frozen=True)
class _Section:
    """Pictures on the page: several beside each other are the same one."""

    title: str
    groups: Sequence[Group]


def rows(audit: Audit) -> list[Row]:
    """What was counted and looked for, with an example of each finding."""
    found = audit.findings
    return _counted(audit) + [
        Row("patients on several splits", f"{len(found.parted):,}", _first(one.example for one in found.parted)),
        *(Row(section.title, f"{len(section.groups):,}", _example(section)) for section in _sections(found)),
        Row("unreadable", f"{len(audit.unreadable):,}", _first(map(": ".join, audit.unreadable))),
        Row("left out", f"{len(audit.left_out):,}", _first(map(": ".join, audit.left_out))),
        Row("files that are no images", f"{len(audit.foreign):,}", _first(map(": ".join, audit.foreign))),
    ]


def verdict(audit: Audit) -> list[str]:
    """What was found in words, the worst first, and what to do about it."""
    found = audit.findings
    said = [_leaks(found)] if found.num_images else []
    if found.conflicts:
        said.append(
            f"{_count(found.conflicts, 'picture')} under several labels: look at them below and settle which is true. "
            "Setting data.duplicates to drop leaves out those that are identical."
        )
    if found.exact:
        said.append(
            f"{_count(found.exact, 'picture')} in several copies: {found.num_duplicates:,} could go without losing "
            "one. Set data.duplicates to drop."
        )
    if found.near:
        said.append(
            f"{_count(found.near, 'pair')} of images that are alike but for their encoding, size or brightness."
        )
    if found.outliers:
        said.append(f"{_count(found.outliers, 'image')} unlike the others: look below and remove what does not belong.")
    if found.blank:
        said.append(f"{_count(found.blank, 'image')} showing nothing.")
    if audit.unreadable:
        said.append(f"{_count(audit.unreadable, 'image')} that cannot be read; the reasons are below.")
    if found.imbalance is not None and found.imbalance >= _IMBALANCE:
        said.append(f"The largest class has {found.imbalance:.3g} images for each of the smallest.")
    return said


def print_tables(audit: Audit) -> None:
    """Classes by split, what was counted and found, and the verdict, for the terminal."""
    console = Console(highlight=False)
    head, body = _classes(audit.findings)
    classes = Table(title=Text(f"Images in {printable(audit.folder)}"), title_justify="left")
    for column, name in enumerate(head):
        classes.add_column(name, justify="right" if column else "left", overflow="fold")
    for cells in body:
        classes.add_row(*map(Text, cells))
    console.print(classes)
    shown = Table(title="What was looked at", title_justify="left")
    shown.add_column("", no_wrap=True)
    shown.add_column("number", justify="right", no_wrap=True)
    shown.add_column("more, or an example", overflow="fold")
    for row in rows(audit):
        shown.add_row(row.name, row.value, Text(row.detail))
    console.print(shown)
    for sentence in verdict(audit):
        console.print(f"- {sentence}", markup=False, soft_wrap=True)


def shown_records(audit: Audit) -> list[Record]:
    """The pictures that the page shows, by path and index."""
    groups = [group for section in _sections(audit.findings) for group in section.groups[:_MOST]]
    names = {name for group in groups for name in group.names[:2]}
    return sorted((audit.records[name] for name in names), key=lambda record: (record.path, record.index))


def make_page(audit: Audit, thumbnails: Mapping[str, bytes]) -> bytes:
    """The page, the same for the same data; `thumbnails` are JPEG files by picture's name."""
    found = audit.findings
    head, body = _classes(found)
    numbers = [(row.name, row.value, row.detail) for row in rows(audit)]
    parts = [
        f"<h1>What is in {escape(printable(audit.folder))}?</h1>",
        bullets(verdict(audit)),
        "<h2>Images by class</h2>",
        table(head, body, numeric=set(range(1, len(head)))),
        "<h2>What was looked at</h2>",
        table(("", "number", "more, or an example"), numbers, numeric={1}),
    ]
    if found.parted:
        people = [(one.patient, _places(one.counts), printable(one.example)) for one in found.parted]
        parts += [
            _title("patients on several splits", people),
            table(("pseudonym", "images", "one of them"), people[:_MOST]),
        ]
    for section in _sections(found):
        if section.groups:
            shown = "".join(_figures(audit, group, thumbnails) for group in section.groups[:_MOST])
            parts += [_title(section.title, section.groups), f'<div class="row">{shown}</div>']
    lists = {"unreadable": audit.unreadable, "left out": audit.left_out, "files that are no images": audit.foreign}
    for title, entries in lists.items():
        if entries:
            reasons = [(printable(name), printable(reason)) for name, reason in entries[:_MOST]]
            parts += [_title(title, entries), table(("file", "reason"), reasons)]
    parts.append("<p>All of it is in <code>reports/audit.json</code>.</p>")
    return page(f"medgen: audit of {printable(audit.folder)}", "\n".join(parts))


def _counted(audit: Audit) -> list[Row]:
    found = audit.findings
    kinds = [
        f"{name} {kind['files']:,}" + (f" ({kind['images']:,} images)" if kind["images"] != kind["files"] else "")
        for name, kind in audit.kinds.items()
    ]
    small, median, large = (f"{w} x {h}" for w, h in zip(found.widths, found.heights, strict=True))
    per_patient = found.num_images / max(found.num_patients, 1)
    balance = "one class" if found.imbalance is None else f"{found.imbalance:.3g} to 1, largest to smallest"
    num_classes = sum(1 for label in found.counts if label)
    return [
        Row("files", f"{audit.num_files:,}", ", ".join(kinds)),
        Row("images", f"{found.num_images:,}", ", ".join(f"{mode} {num:,}" for mode, num in found.modes.items())),
        Row("sizes", f"{found.num_sizes:,}", f"{small} to {large}, median {median}"),
        Row("classes", f"{num_classes:,}", balance if num_classes else "no labels"),
        Row("patients", f"{found.num_patients:,}", f"images of each: {per_patient:.3g}"),
        Row("masks", f"{audit.num_masks:,}", ""),
    ]


def _sections(found: Findings) -> list[_Section]:
    def alone(names: Sequence[str]) -> list[Group]:
        return [Group([name], [], []) for name in names]

    sections = []
    for title, groups in (("exact duplicates", found.exact), ("near-duplicates", found.near)):
        sections += [
            _Section(f"{title} across splits", [group for group in groups if group.is_across]),
            _Section(f"other {title}", [group for group in groups if not group.is_across]),
        ]
    return [
        *sections,
        _Section("one picture, several labels", found.conflicts),
        _Section("unlike the others", alone(found.outliers)),
        _Section("blank", alone(found.blank)),
    ]


def _leaks(found: Findings) -> str:
    across = [group for group in [*found.exact, *found.near] if group.is_across]
    leaks = [_count(things, noun) for things, noun in ((found.parted, "patient"), (across, "picture")) if things]
    if leaks:
        return (
            f"The splits leak: {' and '.join(leaks)} on several sides. A model would be judged on what it has seen. "
            "Set data.leaks to move, or data.splits to own."
        )
    splits = {split for counts in found.counts.values() for split in counts if split}
    if len(splits) == 1:
        return f"All of the data is {splits.pop()}, so nothing can leak."
    if splits:
        return "No patient and no picture was found on two sides of the data's split."
    return "The data brings no split; when one is cut, patients and duplicates stay together."


def _classes(found: Findings) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of images, label by split."""
    splits = [split for split in ("", *SPLITS) if any(split in counts for counts in found.counts.values())]
    splits = [] if splits == [""] else splits
    named = {label or "no label": counts for label, counts in found.counts.items()}
    if len(named) > 1:
        named["all"] = {split: sum(counts.get(split, 0) for counts in named.values()) for split in ("", *SPLITS)}
    body = [
        [
            printable(label),
            *(f"{counts.get(split, 0):,}" for split in splits),
            f"{sum(counts.values()):,}",
            f"{sum(counts.values()) / max(found.num_images, 1):.1%}",
        ]
        for label, counts in named.items()
    ]
    return ["label", *(split or "no split" for split in splits), "images", "share"], body


def _figures(audit: Audit, group: Group, thumbnails: Mapping[str, bytes]) -> str:
    figures = []
    for name in group.names[:2]:
        record = audit.records[name]
        caption = "\n".join(map(printable, filter(None, (name, record.split, record.label))))
        shown = thumbnails.get(name)
        figures.append(f"<p>{escape(caption)}</p>" if shown is None else figure(shown, "jpeg", caption))
    note = f"correlation {group.correlation:.3f}" if group.correlation < 1 else ""
    if len(group.names) > 2:
        note = f"and {len(group.names) - 2} more"
    return f'<div><div class="pair">{"".join(figures)}</div>{note}</div>'


def _title(title: str, entries: Sequence[object]) -> str:
    more = f", the first {_MOST}" if len(entries) > _MOST else ""
    return f"<h2>{title[:1].upper()}{title[1:]}: {len(entries):,}{more}</h2>"


def _example(section: _Section) -> str:
    return _first(" and ".join(group.names[:2]) for group in section.groups)


def _first(texts: Iterable[str]) -> str:
    return printable(next(iter(texts), ""))


def _places(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {number:,}" for split, number in counts.items())


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things):,} {noun}" + ("" if len(things) == 1 else "s")
