"""Read the images of a dataset on all cores, in the order of the records and in bounded memory.

for result in read_images(folder, records, preprocess, transform):
    …                                    # result.value is the transform's result, None if there is a reason

Threads read the files (OpenCV, Pillow and zlib release the GIL). The results and their order do not depend on the
number of threads. A file of many images is opened once.
"""

import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import cv2
import numpy as np

from medgen.config import Preprocess
from medgen.ingest.dataset_scan import ImageRecord
from medgen.ingest.formats.raw import ImageFile, LeftOutImage, RawImage, UnreadableImage
from medgen.ingest.formats.streams import LoadOnce
from medgen.ingest.images import open_file, source_files
from medgen.io import hash_file
from medgen.machine import num_cores

_MAX_FILE_BYTES = 64 << 30  # a year of CT in one file; a larger file is no image file
_BATCH_SIZE = 32  # images of one file that a thread reads in one task
_MAX_PENDING = 96  # images that are read ahead of the caller

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
Transform = Callable[[ImageRecord, RawImage, RawImage | None], T]  # record, image, mask


@dataclass(frozen=True, slots=True)
class ReadResult(Generic[T]):
    """The transformed image of one record, or the reason why there is none."""

    record: ImageRecord
    sha256: str  # of the file, or of the image's pixels if the file has several images
    source: str  # hashes of all files that the result depends on; "" if they cannot be read
    size: tuple[int, int]  # width, height
    mode: str
    value: T | None  # None if there is a reason
    reason: str = ""
    left_out: bool = False  # the image was left out by the settings and is not damaged


def read_images(
    folder: Path, records: Sequence[ImageRecord], preprocess: Preprocess, transform: Transform[T]
) -> Iterator[ReadResult[T]]:
    """Read each record's image and mask and apply `transform`, which may raise UnreadableImage."""
    cv2_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the pool uses all cores already
    try:
        batches = _batches(folder, records, preprocess)
        yield from _map(lambda file, batch: _read_batch(file, batch, transform), batches)
    finally:
        cv2.setNumThreads(cv2_threads)


def hash_sources(folder: Path, records: Sequence[ImageRecord], preprocess: Preprocess) -> Iterator[str]:
    """`ReadResult.source` of each record, without decoding images."""
    files = ((of_file[0], of_file) for of_file in _by_file(records))
    return _map(lambda record, of_file: [_hash_files(folder, record, preprocess)] * len(of_file), files)


def _map(
    function: Callable[[Item, Sequence[ImageRecord]], Sequence[Result]],
    batches: Iterable[tuple[Item, Sequence[ImageRecord]]],
) -> Iterator[Result]:
    """One result per record. At most `_MAX_PENDING` images are in flight, which bounds the memory."""
    pending: deque[tuple[int, Future[Sequence[Result]]]] = deque()  # number of images of each batch
    with ThreadPoolExecutor(num_cores()) as pool:
        try:
            for item, batch in batches:
                pending.append((len(batch), pool.submit(function, item, batch)))
                while len(pending) > 1 and sum(count for count, _ in pending) >= _MAX_PENDING:
                    yield from pending.popleft()[1].result()
            while pending:
                yield from pending.popleft()[1].result()
        finally:
            for _, future in pending:
                future.cancel()


def _by_file(records: Sequence[ImageRecord]) -> Iterator[Sequence[ImageRecord]]:
    return (list(group) for _, group in itertools.groupby(records, key=lambda record: record.path))


class _SharedFile:
    """An image file and its mask file, shared by several batches: opened by the first, closed after the last."""

    def __init__(self, folder: Path, record: ImageRecord, preprocess: Preprocess, num_images: int) -> None:
        # Images of one file share its hash. Only their pixels show which of them are duplicates.
        self.hashes_pixels = num_images > 1
        self.source = ""
        self._folder, self._record, self._preprocess = folder, record, preprocess
        self._batches_left = -(-num_images // _BATCH_SIZE)
        self.open = LoadOnce(self._open)
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def finish_batch(self) -> None:
        """Close the files after the last batch."""
        with self._lock:
            self._batches_left -= 1
            if self._batches_left == 0:
                self._stack.close()

    def _open(self) -> tuple[ImageFile, ImageFile | None]:
        self.source = _hash_files(self._folder, self._record, self._preprocess)
        path = self._folder / self._record.path
        _check_file(path)
        mask_path = None if self._record.mask is None else self._folder / self._record.mask
        if mask_path is not None:
            _check_file(mask_path)
        self.hashes_pixels = self.hashes_pixels or len(source_files(path, self._preprocess)) > 1
        with ExitStack() as stack:
            image = stack.enter_context(open_file(path, self._preprocess))
            mask: ImageFile | None = None
            try:
                if mask_path is not None:
                    mask = stack.enter_context(open_file(mask_path, self._preprocess, mask=True))
                    if mask.num_images != image.num_images:
                        raise UnreadableImage(f"{mask.num_images} slices, and the image has {image.num_images}")
            except UnreadableImage as error:
                raise type(error)(f"mask {self._record.mask}: {error}") from None
            self._stack = stack.pop_all()
        return image, mask


def _batches(
    folder: Path, records: Sequence[ImageRecord], preprocess: Preprocess
) -> Iterator[tuple[_SharedFile, Sequence[ImageRecord]]]:
    for of_file in _by_file(records):
        file = _SharedFile(folder, of_file[0], preprocess, len(of_file))
        for start in range(0, len(of_file), _BATCH_SIZE):
            yield file, of_file[start : start + _BATCH_SIZE]


def _read_batch(file: _SharedFile, batch: Sequence[ImageRecord], transform: Transform[T]) -> list[ReadResult[T]]:
    try:
        return [_read_one(file, record, transform) for record in batch]
    finally:
        file.finish_batch()


def _read_one(file: _SharedFile, record: ImageRecord, transform: Transform[T]) -> ReadResult[T]:
    try:
        image_file, mask_file = file.open()
        raw = image_file.read(record.index)
        try:
            mask = None if mask_file is None else mask_file.read(record.index)
        except UnreadableImage as error:
            raise UnreadableImage(f"mask {record.mask}: {error}") from None
        value = transform(record, raw, mask)
    except UnreadableImage as error:
        reason = " ".join(str(error).split())
        return ReadResult(record, "", file.source, (0, 0), "", None, reason, isinstance(error, LeftOutImage))
    sha256 = _hash_pixels(raw) if file.hashes_pixels else file.source[:64]
    return ReadResult(record, sha256, file.source, raw.size, raw.mode, value)


def _hash_pixels(raw: RawImage) -> str:
    digest = hashlib.sha256(f"{raw.pixels.dtype}{raw.pixels.shape}".encode())
    digest.update(np.ascontiguousarray(raw.pixels).data)
    return digest.hexdigest()


def _hash_files(folder: Path, record: ImageRecord, preprocess: Preprocess) -> str:
    """Joined hashes of the image's and the mask's files, up to the first that cannot be read."""
    digest = ""
    with suppress(UnreadableImage, OSError):
        for name in (record.path, record.mask):
            if name is not None:
                for file in source_files(folder / name, preprocess):
                    _check_file(file)
                    digest += hash_file(file)
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
