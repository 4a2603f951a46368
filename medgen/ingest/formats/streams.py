"""Byte streams of image files: gzip detection, bounded reads, and errors of damaged files."""

import gzip
import mmap
import shutil
import struct
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from medgen.ingest.formats.raw import UnreadableImage

T = TypeVar("T")

MAX_DEFLATE_RATIO = 1032  # output bytes per input byte, at most (zlib.net/zlib_tech.html)
CHUNK = 1 << 20  # bytes read at a time
_GZIP = b"\x1f\x8b"


@contextmanager
def open_inflated(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading and inflate it if its content is gzip, whatever its name."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP
        file.seek(0)
        if not is_gzip:
            yield file
            return
        with gzip.open(file) as stream:
            yield cast(IO[bytes], stream)


def max_inflated_bytes(path: Path) -> int:
    """Largest number of bytes that `open_inflated` can give for a file of this size."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP
    return path.stat().st_size * (MAX_DEFLATE_RATIO if is_gzip else 1)


def read_exactly(stream: IO[bytes], num_bytes: int) -> NDArray[np.uint8]:
    """Read `num_bytes` bytes.

    Raises:
        UnreadableImage: the stream ends earlier.
    """
    data, filled = np.empty(num_bytes, np.uint8), 0
    for chunk in _chunks(stream, num_bytes):
        data[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    return data


def _chunks(stream: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    """The next `num_bytes` bytes in pieces: one read of a zip member may return fewer bytes than asked for."""
    left = num_bytes
    while left:
        chunk = stream.read(min(CHUNK, left))
        if not chunk:
            raise UnreadableImage(f"cut short: {num_bytes - left} of {num_bytes} bytes")
        left -= len(chunk)
        yield chunk


def check_end(stream: IO[bytes]) -> None:
    """Check that the stream has ended; zip and gzip compare their checksums there.

    Raises:
        UnreadableImage: more bytes follow.
    """
    if stream.read(1):
        raise UnreadableImage("longer than its header says")


def copy_to_mmap(stream: IO[bytes], num_bytes: int) -> Any:
    """Copy the next `num_bytes` bytes of a stream to an unnamed temporary file and map it into memory.

    Raises:
        UnreadableImage: the stream ends earlier, or the temporary folder has too little space.
    """
    check_temporary_space(num_bytes)
    with tempfile.TemporaryFile() as file:
        file.writelines(_chunks(stream, num_bytes))
        file.flush()
        return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)


def check_temporary_space(num_bytes: int) -> None:
    """Check that the temporary folder has space for a file of `num_bytes`.

    Raises:
        UnreadableImage: it has too little.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if num_bytes > free:
        raise UnreadableImage(
            f"inflated it takes {num_bytes >> 20} MiB, and the temporary folder has {free >> 20} MiB free; "
            "set TMPDIR to a larger folder"
        )


class LoadOnce(Generic[T]):
    """The result of `load`, which is called once for all threads, also if it fails: a damaged file may be long."""

    def __init__(self, load: Callable[[], T]) -> None:
        self._load: Callable[[], T] | None = load  # until it was called
        self._loaded: T | None = None
        self._error: UnreadableImage | None = None
        self._lock = threading.Lock()

    def __call__(self) -> T:
        """Return the result; each call raises a new exception, as threads must not share a traceback."""
        with self._lock:
            if self._load is not None:
                try:
                    self._loaded = self._load()
                except UnreadableImage as error:
                    self._error = type(error)(str(error))
                self._load = None  # may be a method of the owner, which a cycle of references would keep in memory
            if self._error is not None:
                raise type(self._error)(str(self._error))
            return cast(T, self._loaded)


@contextmanager
def unreadable_errors(prefix: str = "", damaged: str = "damaged") -> Iterator[None]:
    """Raise what zipfile, gzip, numpy and nibabel raise on a damaged file as UnreadableImage."""
    try:
        yield
    except UnreadableImage as error:
        raise type(error)(f"{prefix}{error}") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, struct.error):
        raise UnreadableImage(f"{prefix}damaged or cut short") from None
    except OSError as error:
        raise UnreadableImage(f"{prefix}{error.strerror or 'damaged'}") from None
    except Exception as error:  # parsers raise errors of any type on damaged bytes
        raise UnreadableImage(f"{prefix}{damaged} ({type(error).__name__})") from None
