"""Image files -> the uint8 store: read, equalise, resize and split, on all cores.

medgen preprocess --set preprocess.image_size=128

Files are read by threads (OpenCV and Pillow release the interpreter's lock) and written in the order of their
paths, so one thread and many give the same bytes.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medgen import config
from medgen.config import Project
from medgen.data import layouts, splits, store
from medgen.data.images import MAX_PIXELS, RawImage, UnreadableImage, decode, mask_to_square, to_square
from medgen.data.layouts import Record
from medgen.errors import UserError
from medgen.machine import num_cores

_MAX_FILE_BYTES = 8 * MAX_PIXELS  # four 16-bit channels, uncompressed
_ASPECT_TOLERANCE = 0.02  # a mask of another resolution may be rounded; one of another shape belongs elsewhere

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Outcome:
    """What became of one record; `reason` says why there is no image."""

    digest: str  # of the image's and mask's files
    sha256: str = ""  # of the image's file
    raw_size: tuple[int, int] = (0, 0)
    mode: str = ""
    image: NDArray[np.uint8] | None = None  # (S, S)
    mask: NDArray[np.uint8] | None = None  # (S, S) of 0 and 1
    reason: str = ""


def run(
    project: Project, *, data: config.Data, preprocess: config.Preprocess, num_threads: int | None = None
) -> store.Store:
    """Makes artifacts/dataset from the data folder; returns at once where it already stands.

    Raises:
        UserError: no pictures, a wrong manifest, no training images, or more than `max_rejected` unreadable files.
    """
    console = Console(stderr=True)
    folder = project.root / data.path
    records = layouts.scan(folder, data.patient_pattern)
    names = splits.assign(records, preprocess.val_fraction, preprocess.test_fraction, preprocess.seed)
    num_threads = num_threads or num_cores()
    with ThreadPoolExecutor(num_threads) as pool:
        current = _current(project, pool, data, records, names, preprocess)
        if current is None:
            current = _build(project, pool, data, records, names, preprocess, console)
            state = "written"
        else:
            state = "unchanged"
    _warn_leaks(records, names, console)
    console.print(_summary(current, state), highlight=False, soft_wrap=True)
    return current


def _current(
    project: Project,
    pool: ThreadPoolExecutor,
    data: config.Data,
    records: Sequence[Record],
    names: Sequence[str],
    preprocess: config.Preprocess,
) -> store.Store | None:
    """The store that stands, if these files and settings made it. Contents are compared, not times."""
    if not project.dataset.exists():
        return None
    try:
        found = store.open_store(project.dataset)
    except UserError:
        return None  # damaged: made anew
    folder = project.root / data.path
    digests = pool.map(lambda record: _hash_sources(folder, record), records)
    same = found.name == data.name and found.source == _source(records, names, digests, preprocess)
    return found if same else None


def _build(
    project: Project,
    pool: ThreadPoolExecutor,
    data: config.Data,
    records: Sequence[Record],
    names: Sequence[str],
    preprocess: config.Preprocess,
    console: Console,
) -> store.Store:
    folder = project.root / data.path
    rejected: list[tuple[str, str]] = []
    digests: list[str] = []
    counts: Counter[str] = Counter()
    with_masks = any(record.mask for record in records)
    own_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the pool fills the cores; OpenCV's own threads would only get in its way
    try:
        with (
            store.StoreWriter(project.dataset, preprocess.image_size, with_masks) as writer,
            _progress(console) as progress,
        ):
            task = progress.add_task("preprocess", total=len(records))
            outcomes = _map(pool, lambda record: _process(folder, record, preprocess), records)
            for record, split, outcome in zip(records, names, outcomes, strict=True):
                digests.append(outcome.digest)
                if outcome.image is None:
                    rejected.append((record.path, outcome.reason))
                else:
                    writer.add(split, outcome.image, record.label, outcome.mask, _row(record, outcome))
                    counts[split] += 1
                progress.advance(task)
            _check_rejected(project, rejected, len(records), preprocess.max_rejected)
            if not counts["train"]:
                raise UserError(
                    f"{folder}: no training images among {counts.total()} ({dict(counts)}); expected some. "
                    "Lower preprocess.val_fraction and test_fraction, or check the splits in the data"
                )
            source = _source(records, names, digests, preprocess)
            return writer.commit(rejected, preprocess.model_dump(mode="json"), source, data.name)
    finally:
        cv2.setNumThreads(own_threads)


def _process(folder: Path, record: Record, preprocess: config.Preprocess) -> _Outcome:
    digest = ""
    try:
        data = _read(folder / record.path)
        sha256 = digest = hashlib.sha256(data).hexdigest()
        mask_data = None
        if record.mask is not None:
            mask_data = _read(folder / record.mask)
            digest += hashlib.sha256(mask_data).hexdigest()
        raw = decode(data, preprocess.image_size if preprocess.reduced_decode else None)
        image = to_square(
            raw.pixels, preprocess.image_size, preprocess.fit, preprocess.clahe_clip, preprocess.clahe_tiles
        )
        mask = None if mask_data is None else _mask(decode(mask_data), raw, record, preprocess)
    except UnreadableImage as error:
        return _Outcome(digest, reason=" ".join(str(error).split()))
    return _Outcome(digest, sha256, raw.size, raw.mode, image, mask)


def _mask(mask: RawImage, image: RawImage, record: Record, preprocess: config.Preprocess) -> NDArray[np.uint8]:
    height, width = mask.pixels.shape
    aspect, expected = width / height, image.pixels.shape[1] / image.pixels.shape[0]
    if abs(aspect / expected - 1) > _ASPECT_TOLERANCE:
        raise UnreadableImage(f"mask {record.mask} is {width} x {height}, the image {image.size[0]} x {image.size[1]}")
    try:
        return mask_to_square(mask.pixels, preprocess.image_size, preprocess.fit)
    except UnreadableImage as error:
        raise UnreadableImage(f"{record.mask}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise UnreadableImage(
                f"{size // 1_000_000} MB, more than any picture of {MAX_PIXELS // 1_000_000} megapixels"
            )
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None


def _hash_sources(folder: Path, record: Record) -> str:
    """As `_Outcome.digest`: whatever was read before the first failure."""
    digest = ""
    try:
        for name in (record.path, record.mask):
            if name is not None:
                digest += hashlib.sha256(_read(folder / name)).hexdigest()
    except UnreadableImage:
        pass
    return digest


def _source(
    records: Sequence[Record], names: Sequence[str], digests: Iterable[str], preprocess: config.Preprocess
) -> str:
    parts = [[asdict(record), name, digest] for record, name, digest in zip(records, names, digests, strict=True)]
    return config.fingerprint(store.SCHEMA, parts, preprocess)


def _row(record: Record, outcome: _Outcome) -> dict[str, str]:
    return {
        "path": record.path,
        "sha256": outcome.sha256,
        "patient": record.patient,
        "width": str(outcome.raw_size[0]),
        "height": str(outcome.raw_size[1]),
        "mode": outcome.mode,
        "mask": record.mask or "",
    }


def _map(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """As `pool.map`, with only so many results waiting that memory stays bounded."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(waiting) >= 64:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _check_rejected(project: Project, rejected: Sequence[tuple[str, str]], num_files: int, most: float) -> None:
    if len(rejected) <= most * num_files:
        return
    listing = project.runs / store.REJECTED  # not in artifacts/dataset, which is not made
    rows = [{"path": path, "reason": reason} for path, reason in rejected]
    store.write_csv(listing, store.REJECTED_COLUMNS, rows)
    reasons = Counter(reason for _, reason in rejected).most_common(3)
    raise UserError(
        f"{len(rejected)} of {num_files} files are unreadable, more than preprocess.max_rejected = {most:g} allows: "
        + "; ".join(f"{count} x {reason}" for reason, count in reasons)
        + f". Mend or remove the files listed in {listing}, or raise preprocess.max_rejected"
    )


def _warn_leaks(records: Sequence[Record], names: Sequence[str], console: Console) -> None:
    """Only a split the data brings can part a patient; it is kept, but not in silence."""
    seen: dict[str, set[str]] = {}
    for record, name in zip(records, names, strict=True):
        seen.setdefault(record.patient, set()).add(name)
    parted = sorted(patient for patient, where in seen.items() if len(where) > 1)
    if parted:
        console.print(
            f"warning: the data's own split puts {len(parted)} patients into several splits, such as {parted[0]}; "
            "kept as it is, but measures on the test split will flatter",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _summary(current: store.Store, state: str) -> str:
    parts = []
    for name in store.SPLITS:
        labels = np.asarray(current.split(name).labels)
        of_class = ", ".join(f"{label} {int((labels == i).sum())}" for i, label in enumerate(current.classes))
        parts.append(f"{name} {current.counts[name]}" + (f" ({of_class})" if of_class else ""))
    rejected = current.folder / store.REJECTED
    num_rejected = len(store.read_csv(rejected, store.REJECTED_COLUMNS))
    return f"dataset {current.fingerprint} {state}: {' · '.join(parts)} · rejected {num_rejected}, see {rejected}"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
