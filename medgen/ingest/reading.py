"""Read the images of a dataset on all cores or on a Dask cluster, in the order of the records and in bounded memory.

for result in read_images(folder, records, preprocess, transform):
    …                                    # result.value is the transform's result, None if there is a reason

Threads read the files (OpenCV, Pillow and zlib release the GIL), or workers of `preprocess.scheduler`. The results and
their order do not depend on either. Threads open a file of many images once, and workers once for each part of it.
"""

import hashlib
import itertools
import math
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import cv2
import numpy as np

from medgen.config import Preprocess
from medgen.errors import UserError
from medgen.ingest.cluster import FilePart, map_on_cluster
from medgen.ingest.dataset_scan import ImageRecord, with_companions
from medgen.ingest.folders import Folder, local_files
from medgen.ingest.formats.raw import ImageFile, LeftOutImage, RawImage, UnreadableImage
from medgen.ingest.formats.streams import LoadOnce
from medgen.ingest.images import open_file, source_files
from medgen.ingest.transforms import paired_settings
from medgen.io import hash_file
from medgen.machine import num_cores

_MAX_FILE_BYTES = 64 << 30  # a year of CT in one file; a larger file is no image file
_BATCH_SIZE = 32  # images of one file that a thread reads in one task
_MAX_PENDING = 96  # images that are read ahead of the caller
_THREADS_PER_CORE_S3 = 8  # they wait mostly for the network
_MAX_PART_BYTES = 64 << 20  # results of one file that a worker of a cluster sends at once

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
# record, image, mask, paired images
Transform = Callable[[ImageRecord, RawImage, RawImage | None, Sequence[RawImage | None]], T]


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
    folder: Folder, records: Sequence[ImageRecord], preprocess: Preprocess, transform: Transform[T]
) -> Iterator[ReadResult[T]]:
    """Read each record's image, mask and paired images and apply `transform`, which may raise UnreadableImage.

    Raises:
        UserError: with `preprocess.scheduler`, as in `map_on_cluster`; the folder's bucket cannot be read.
    """
    if preprocess.scheduler is not None:
        yield from _read_on_cluster(preprocess.scheduler, _absolute(folder), records, preprocess, transform)
        return
    cv2_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the pool uses all cores already
    try:
        batches = _batches(folder, records, preprocess)
        yield from _map(lambda file, batch: _read_batch(file, batch, transform), batches, _num_threads(folder))
    finally:
        cv2.setNumThreads(cv2_threads)


def hash_sources(folder: Folder, records: Sequence[ImageRecord], preprocess: Preprocess) -> Iterator[str]:
    """`ReadResult.source` of each record, without decoding images."""
    if preprocess.scheduler is not None:
        parts = (FilePart(of_file[0].path, of_file[:1], len(of_file)) for of_file in _by_file(records))
        function = partial(_hash_part, _absolute(folder), preprocess)
        for part, digest in map_on_cluster(preprocess.scheduler, function, parts):
            yield from itertools.repeat(digest, part.num_images)
        return
    files = ((of_file[0], of_file) for of_file in _by_file(records))
    yield from _map(
        lambda record, of_file: [_hash_source(folder, record, preprocess)] * len(of_file), files, _num_threads(folder)
    )


def _read_on_cluster(
    scheduler: str, folder: Folder, records: Sequence[ImageRecord], preprocess: Preprocess, transform: Transform[T]
) -> Iterator[ReadResult[T]]:
    others = 1 + len(preprocess.paired_folders)  # channels of its mask and paired images
    image_bytes = (preprocess.channels * preprocess.bits // 8 + others) * math.prod(preprocess.sides)
    most = min(1024, max(_BATCH_SIZE, _MAX_PART_BYTES // image_bytes))
    parts = (
        FilePart(of_file[0].path, of_file[start : start + most], len(of_file))
        for of_file in _by_file(records)
        for start in range(0, len(of_file), most)
    )
    for part, results in map_on_cluster(scheduler, partial(_read_part, folder, preprocess, transform), parts):
        for record, result in zip(part.records, results, strict=True):
            yield replace(result, record=record)  # the record is not copied for each result


def _read_part(
    folder: Folder, preprocess: Preprocess, transform: Transform[T], part: FilePart
) -> Sequence[ReadResult[T]]:
    """Results of a part of a file, in a worker."""
    _require_folder(folder)
    cv2.setNumThreads(1)  # each core of a worker has a task of its own
    file = _SharedFile(folder, part.records[0], preprocess, part.num_images, num_batches=1)
    return _read_batch(file, part.records, transform)


def _hash_part(folder: Folder, preprocess: Preprocess, part: FilePart) -> str:
    _require_folder(folder)
    return _hash_source(folder, part.records[0], preprocess)


def _absolute(folder: Folder) -> Folder:
    return folder.absolute() if isinstance(folder, Path) else folder


def _require_folder(folder: Folder) -> None:
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(
            f"{folder}: not found by a worker on {platform.node()}; expected the images there. All workers of "
            "preprocess.scheduler need them under this path, such as on a shared file system"
        )


def _num_threads(folder: Folder) -> int:
    return num_cores() * (1 if isinstance(folder, Path) else _THREADS_PER_CORE_S3)


def _map(
    function: Callable[[Item, Sequence[ImageRecord]], Sequence[Result]],
    batches: Iterable[tuple[Item, Sequence[ImageRecord]]],
    num_threads: int,
) -> Iterator[Result]:
    """One result per record. At most `_MAX_PENDING` images are in flight, which bounds the memory."""
    pending: deque[tuple[int, Future[Sequence[Result]]]] = deque()  # number of images of each batch
    with ThreadPoolExecutor(num_threads) as pool:
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
    """An image file, its mask and paired files, shared by several batches: opened by the first, closed by the last."""

    def __init__(
        self, folder: Folder, record: ImageRecord, preprocess: Preprocess, num_images: int, num_batches: int
    ) -> None:
        # Images of one file share its hash. Only their pixels show which of them are duplicates.
        self.hashes_pixels = num_images > 1
        self.source = ""
        self._folder, self._record, self._preprocess = folder, record, preprocess
        self._batches_left = num_batches
        self.open = LoadOnce(self._open)
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def finish_batch(self) -> None:
        """Close the files after the last batch."""
        with self._lock:
            self._batches_left -= 1
            if self._batches_left == 0:
                self._stack.close()

    def _open(self) -> tuple[ImageFile, ImageFile | None, list[ImageFile | None]]:
        record = self._record
        with ExitStack() as stack:
            root = stack.enter_context(_source_files(self._folder, record))
            self.source = _hash_files(root, record, self._preprocess)
            path = root / record.path
            for name in _files(record):
                _check_file(root / name)
            self.hashes_pixels = self.hashes_pixels or len(_image_files(root, record, self._preprocess)) > 1
            slices = [root / name for name in record.slices]
            image = stack.enter_context(open_file(path, self._preprocess, slices=slices))

            def open_other(name: str | None, mask: bool) -> ImageFile | None:
                if name is None:
                    return None
                settings = self._preprocess if mask else paired_settings(self._preprocess)
                try:
                    file = stack.enter_context(open_file(root / name, settings, mask=mask))
                    if file.num_images != image.num_images:
                        raise UnreadableImage(f"{file.num_images} slices, and the image has {image.num_images}")
                except UnreadableImage as error:
                    raise type(error)(f"{'mask ' if mask else ''}{name}: {error}") from None
                return file

            mask_file = open_other(record.mask, mask=True)
            paired = [open_other(name, mask=False) for name in record.paired]
            self._stack = stack.pop_all()
        return image, mask_file, paired


def _batches(
    folder: Folder, records: Sequence[ImageRecord], preprocess: Preprocess
) -> Iterator[tuple[_SharedFile, Sequence[ImageRecord]]]:
    for of_file in _by_file(records):
        num_batches = -(-len(of_file) // _BATCH_SIZE)
        file = _SharedFile(folder, of_file[0], preprocess, len(of_file), num_batches)
        for start in range(0, len(of_file), _BATCH_SIZE):
            yield file, of_file[start : start + _BATCH_SIZE]


def _read_batch(file: _SharedFile, batch: Sequence[ImageRecord], transform: Transform[T]) -> list[ReadResult[T]]:
    try:
        return [_read_one(file, record, transform) for record in batch]
    finally:
        file.finish_batch()


def _read_one(file: _SharedFile, record: ImageRecord, transform: Transform[T]) -> ReadResult[T]:
    try:
        image_file, mask_file, paired_files = file.open()
        raw = image_file.read(record.index)
        mask = _read_other(mask_file, record.index, f"mask {record.mask}")
        others = zip(paired_files, record.paired, strict=True)
        paired = [_read_other(other, record.index, str(name)) for other, name in others]
        value = transform(record, raw, mask, paired)
    except UnreadableImage as error:
        reason = " ".join(str(error).split())
        return ReadResult(record, "", file.source, (0, 0), "", None, reason, isinstance(error, LeftOutImage))
    sha256 = _hash_pixels(raw) if file.hashes_pixels else file.source[:64]
    return ReadResult(record, sha256, file.source, raw.size, raw.mode, value)


def _read_other(file: ImageFile | None, index: int, name: str) -> RawImage | None:
    """A mask or paired image; None without its file."""
    try:
        return None if file is None else file.read(index)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name}: {error}") from None


def _files(record: ImageRecord) -> list[str]:
    """Paths of the image, its mask and its paired images."""
    return [path for path in (*record.files, record.mask, *record.paired) if path is not None]


def _hash_pixels(raw: RawImage) -> str:
    digest = hashlib.sha256(f"{raw.pixels.dtype}{raw.pixels.shape}".encode())
    digest.update(np.ascontiguousarray(raw.pixels).data)
    return digest.hexdigest()


def _source_files(folder: Folder, record: ImageRecord) -> AbstractContextManager[Path]:
    """The local folder of the files of a record."""
    return local_files(folder, (name for path in _files(record) for name in with_companions(path)))


def _image_files(root: Path, record: ImageRecord, preprocess: Preprocess) -> Sequence[Path]:
    """The files that contain the image."""
    return [root / name for name in record.slices] or source_files(root / record.path, preprocess)


def _hash_source(folder: Folder, record: ImageRecord, preprocess: Preprocess) -> str:
    with _source_files(folder, record) as root:
        return _hash_files(root, record, preprocess)


def _hash_files(folder: Path, record: ImageRecord, preprocess: Preprocess) -> str:
    """Joined hashes of the files of the image, its mask and paired images, up to the first that cannot be read."""
    digest = ""
    with suppress(UnreadableImage, OSError):
        others = [name for name in (record.mask, *record.paired) if name is not None]
        of_others = (file for name in others for file in source_files(folder / name, preprocess))
        for file in itertools.chain(_image_files(folder, record, preprocess), of_others):
            _check_file(file)
            digest += hash_file(file)
    return digest


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from None
    if path.is_dir():
        raise UnreadableImage("a folder; expected a file, or for volumes a folder of one DICOM series")
    if not path.is_file():
        raise UnreadableImage("not a regular file")
    if size > _MAX_FILE_BYTES:
        raise UnreadableImage(f"{size >> 30} GiB, more than any image file")
