"""Byte streams of image files: gzip detection, and reads bounded by the size that a header claims."""

import gzip
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from medgen.ingest.formats.raw import UnreadableImage

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


def read_exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    """Read `num_bytes` bytes.

    Raises:
        UnreadableImage: the stream ends earlier.
    """
    data = b""
    while len(data) < num_bytes:  # one read of a zip member may return fewer bytes than asked for
        more = stream.read(num_bytes - len(data))
        if not more:
            raise UnreadableImage("cut short")
        data += more
    return data


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
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if num_bytes > free:
        raise UnreadableImage(
            f"inflated it takes {num_bytes >> 20} MiB, and the temporary folder has {free >> 20} MiB free; "
            "set TMPDIR to a larger folder"
        )
    with tempfile.TemporaryFile() as file:
        for start in range(0, num_bytes, CHUNK):
            file.write(read_exactly(stream, min(CHUNK, num_bytes - start)))
        file.flush()
        return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
