"""Records -> what became of each: in their order, on all cores, in bounded memory.

for read in read_all(folder, records, preprocess, use):
    …                                    # read.value is what `use` made of the picture, None where there is a reason

Files are read by threads (OpenCV, Pillow and zlib release the interpreter's lock), so one thread and many give the
same results in the same order. A file of many pictures is opened once.
"""

import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import cv2
import numpy as np

from medgen.config import Preprocess
from medgen.ingest.dataset_scan import Record
from medgen.ingest.formats.raw import ImageFile, LeftOut, RawImage, UnreadableImage
from medgen.ingest.images import bytes_of, open_file
from medgen.io import hash_file
from medgen.machine import num_cores

_MAX_FILE_BYTES = 64 << 30  # a year of CT in one file; more is no image file
_PART = 32  # pictures of one file that one thread reads in one go
_AHEAD = 96  # pictures that may wait for the caller

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
Use = Callable[[Record, RawImage, RawImage | None], T]


@dataclass(frozen=True, slots=True)
class Read(Generic[T]):
    """What became of one record."""

    record: Record
    sha256: str  # of the file, or of the picture's pixels where the file has several
    source: str  # of the file and of its mask's: what the result depends on; "" where it cannot be read
    size: tuple[int, int]  # width, height
    mode: str
    value: T | None  # None where there is a reason
    reason: str = ""
    left_out: bool = False  # the reason is no damage: the picture was not wanted


def read_all(
    folder: Path, records: Sequence[Record], preprocess: Preprocess, use: Use[T], num_threads: int | None = None
) -> Iterator[Read[T]]:
    """Reads each record's picture, and its mask, and gives them to `use`, which may raise UnreadableImage."""
    own_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the pool fills the cores; OpenCV's own threads would only get in its way
    try:
        parts = ((part, shared) for shared, part in _parts(folder, records, preprocess))
        for _, results in _map(lambda part, shared: _read_part(shared, part, use), parts, num_threads):
            yield from results
    finally:
        cv2.setNumThreads(own_threads)


def hash_sources(
    folder: Path, records: Sequence[Record], preprocess: Preprocess, num_threads: int | None = None
) -> Iterator[str]:
    """`Read.source` of each record, without reading pictures."""
    files = ((records[start:end], records[start]) for start, end in _runs(records))
    for part, digest in _map(lambda _, record: _digest(folder, record, preprocess), files, num_threads):
        yield from itertools.repeat(digest, len(part))


def _map(
    function: Callable[[Sequence[Record], Item], Result],
    items: Iterable[tuple[Sequence[Record], Item]],
    num_threads: int | None,
) -> Iterator[tuple[Sequence[Record], Result]]:
    """As `pool.map`, with only so many pictures waiting that memory stays bounded."""
    waiting: deque[tuple[Sequence[Record], Future[Result]]] = deque()
    num_waiting = 0
    with ThreadPoolExecutor(num_threads or num_cores()) as pool:
        try:
            for part, item in items:
                waiting.append((part, pool.submit(function, part, item)))
                num_waiting += len(part)
                while num_waiting >= _AHEAD and len(waiting) > 1:
                    done, future = waiting.popleft()
                    num_waiting -= len(done)
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class _Shared:
    """A file, and its mask's, that several parts read; opened by the first, closed after the last."""

    def __init__(self, folder: Path, record: Record, preprocess: Preprocess, num_pictures: int) -> None:
        self.several = num_pictures > 1  # pictures, or files of one picture: then its pixels say who is its copy
        self.source = ""
        self._places = (folder / record.path, None if record.mask is None else folder / record.mask)
        self._folder, self._record, self._preprocess = folder, record, preprocess
        self._parts_left = -(-num_pictures // _PART)
        self._files: tuple[ImageFile, ImageFile | None] | None = None
        self._reason: UnreadableImage | None = None
        self._lock = threading.Lock()

    def open(self) -> tuple[ImageFile, ImageFile | None]:
        """The open files; a file that cannot be opened gives its reason each time."""
        with self._lock:
            if self._reason is not None:
                raise type(self._reason)(str(self._reason))  # a new one: threads must not share a traceback
            if self._files is None:
                try:
                    self._files = self._open()
                except UnreadableImage as reason:
                    self._reason = reason
                    raise
            return self._files

    def leave(self) -> None:
        """One part is done."""
        with self._lock:
            self._parts_left -= 1
            if self._parts_left == 0 and self._files is not None:
                for file in self._files:
                    if file is not None:
                        file.__exit__(None, None, None)

    def _open(self) -> tuple[ImageFile, ImageFile | None]:
        self.source = _digest(self._folder, self._record, self._preprocess)
        path, mask_path = self._places
        for place in (path, mask_path):
            if place is not None:
                _check_file(place)
        self.several = self.several or len(bytes_of(path, self._preprocess)) > 1
        image = open_file(path, self._preprocess).__enter__()
        mask: ImageFile | None = None
        try:
            if mask_path is not None:
                mask = open_file(mask_path, self._preprocess, mask=True).__enter__()
                if mask.num_pictures != image.num_pictures:
                    raise UnreadableImage(f"{mask.num_pictures} slices, and the image has {image.num_pictures}")
        except UnreadableImage as error:
            for file in (mask, image):
                if file is not None:
                    file.__exit__(None, None, None)
            raise type(error)(f"mask {self._record.mask}: {error}") from None
        return image, mask


def _parts(
    folder: Path, records: Sequence[Record], preprocess: Preprocess
) -> Iterator[tuple[_Shared, Sequence[Record]]]:
    for start, end in _runs(records):
        shared = _Shared(folder, records[start], preprocess, end - start)
        for place in range(start, end, _PART):
            yield shared, records[place : min(place + _PART, end)]


def _runs(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Start and end of each file's records."""
    start = 0
    for end in range(1, len(records) + 1):
        if end == len(records) or records[end].path != records[start].path:
            yield start, end
            start = end


def _read_part(shared: _Shared, part: Sequence[Record], use: Use[T]) -> list[Read[T]]:
    try:
        return [_read_one(shared, record, use) for record in part]
    finally:
        shared.leave()


def _read_one(shared: _Shared, record: Record, use: Use[T]) -> Read[T]:
    try:
        image_file, mask_file = shared.open()
        raw = image_file.read(record.index)
        try:
            mask = None if mask_file is None else mask_file.read(record.index)
        except UnreadableImage as error:
            raise UnreadableImage(f"mask {record.mask}: {error}") from None
        value = use(record, raw, mask)
    except UnreadableImage as error:
        reason = " ".join(str(error).split())
        return Read(record, "", shared.source, (0, 0), "", None, reason, isinstance(error, LeftOut))
    sha256 = _hash_pixels(raw) if shared.several else shared.source[:64]
    return Read(record, sha256, shared.source, raw.size, raw.mode, value)


def _hash_pixels(raw: RawImage) -> str:
    digest = hashlib.sha256(f"{raw.pixels.dtype}{raw.pixels.shape}".encode())
    digest.update(np.ascontiguousarray(raw.pixels).data)
    return digest.hexdigest()


def _digest(folder: Path, record: Record, preprocess: Preprocess) -> str:
    """Whatever can be hashed before the first failure."""
    digest = ""
    try:
        for name in (record.path, record.mask):
            if name is not None:
                for file in bytes_of(folder / name, preprocess):
                    _check_file(file)
                    digest += hash_file(file)
    except (UnreadableImage, OSError):
        pass
    return digest


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from None
    if not path.is_file():
        raise UnreadableImage("not a regular file")
    if size > _MAX_FILE_BYTES:
        raise UnreadableImage(f"{size >> 30} GiB, more than any image file")
