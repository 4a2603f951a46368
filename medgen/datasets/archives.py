"""Unpack a zip, tar or tar.gz archive completely or not at all, and never outside the target folder.

unpack(Path("kaggle.zip"), Path("runs/unpacked"))

Archives are untrusted input. Only plain files and folders with names inside the target folder are unpacked.
"""

import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from medgen.errors import UserError
from medgen.io import replace_folder, unsafe_name

MAX_MEMBERS = 500_000
MAX_INDEX = 64 << 20  # bytes of a zip's central directory, which zipfile reads into memory
MAX_READ = 2 << 20  # bytes of a tar's extended header
MAX_RATIO = 100  # unpacked size over archive size; medical images compress to 1/2, blank background to 1/20
ALWAYS_ALLOWED = 256 << 20  # unpacked bytes to which MAX_RATIO does not apply
CHUNK = 1 << 20
SPARE = 64 << 20  # bytes to leave free on the disk
_ZIP, _GZIP = b"PK", b"\x1f\x8b"
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError,
    ValueError, IndexError, KeyError, OverflowError, NotImplementedError, RecursionError,
)  # fmt: skip


def is_archive(path: Path) -> bool:
    """True for a zip, tar or tar.gz by its first bytes; False for an .npz and for the .gz of a single file."""
    if path.suffix.lower() == ".npz":
        return False
    try:
        with path.open("rb") as file:
            start = file.read(512)
            if start.startswith(_GZIP):
                file.seek(0)
                with gzip.GzipFile(fileobj=file) as inner:
                    start = inner.read(512)
                return _is_tar(start)
            return start[:4] in (_ZIP + b"\x03\x04", _ZIP + b"\x05\x06") or _is_tar(start)
    except (OSError, EOFError, zlib.error):
        return False


def unpack(archive: Path, folder: Path) -> int:
    """Unpack an archive into a new folder, which replaces an existing one, and return the number of files.

    Raises:
        UserError: not an archive, or damaged; a member name that leads outside the folder, is absolute, too long or
            repeated; a link or device; encryption; more files or bytes than the limits allow; disk full.
    """
    try:
        with archive.open("rb") as file:
            is_zip = file.read(2) == _ZIP
        with replace_folder(folder) as building:
            writer = _Writer(archive, building)
            (_unpack_zip if is_zip else _unpack_tar)(archive, writer)
        return writer.num_files
    except _DAMAGE as error:
        raise _damaged(archive, error) from None
    except OSError as error:
        if error.errno is None:  # raised by gzip and bz2 themselves
            raise _damaged(archive, error) from None
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; expected to unpack {archive.name} there. "
            "Free disk space or grant write permission"
        ) from None


class _Writer:
    """Checks the members of an archive, writes them to a folder, and counts files.

    The limit on bytes applies to the declared sizes: zipfile and tarfile give at most that many bytes of a member.
    """

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive = archive
        self.folder = folder
        self.num_files = 0
        self._num_members = 0
        self._num_bytes = 0
        allowed = max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size)
        free = shutil.disk_usage(folder).free - SPARE
        self._max_bytes = min(allowed, free)
        self._limit = (
            f"{free / 1e6:.0f} MB are free on the disk of {folder.parent}. Free disk space and unpack it again"
            if free < allowed
            else f"The limit for an archive of its size is {allowed / 1e6:.0f} MB, as it may be a zip bomb. "
            "Unpack it by hand if you trust it"
        )

    def admit(self, name: str, size: int) -> Path:
        """Check the name and the declared size of a member, and return its target path."""
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise self.refusal(f"more than {MAX_MEMBERS} members", "Unpack it by hand and import the folder")
        self._num_bytes += max(size, 0)
        if size < 0 or self._num_bytes > self._max_bytes:
            raise UserError(f"{self.archive}: too large when unpacked; nothing was written. {self._limit}")
        return self._target(name)

    def write(self, target: Path, stream: IO[bytes]) -> None:
        """Write a file, which must not exist yet."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(stream, file, CHUNK)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise self._duplicate(target) from None
        self.num_files += 1

    def make_folder(self, target: Path) -> None:
        """Create a folder; it may exist already, but not as a file."""
        try:
            target.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise self._duplicate(target) from None

    def refusal(self, found: str, fix: str = "Unpack it by hand if you trust it") -> UserError:
        """The error for an archive that is not unpacked."""
        return UserError(f"{self.archive}: {found}; expected plain files and folders. Nothing was unpacked. {fix}")

    def _target(self, name: str) -> Path:
        if problem := unsafe_name(name):
            shown = ascii(name if len(name) < 100 else f"{name[:97]}...")
            raise self.refusal(f"member {shown} {problem}")
        return self.folder / PurePosixPath(name.replace("\\", "/"))

    def _duplicate(self, target: Path) -> UserError:
        return self.refusal(f"member {target.relative_to(self.folder).as_posix()!a} occurs twice")


def _unpack_zip(archive: Path, writer: _Writer) -> None:
    _check_index(archive, writer)
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:  # all checks come before the first write
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise writer.refusal(f"member {member.filename!a} is a link or a device")
            if member.flag_bits & 1:
                raise writer.refusal(f"member {member.filename!a} is encrypted", "Unpack it by hand")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA's memory is unbounded
                raise writer.refusal(f"member {member.filename!a} is not compressed with deflate", "Unpack it by hand")
        targets = [writer.admit(member.filename, member.file_size) for member in members]
        for member, target in zip(members, targets, strict=True):
            if member.filename.endswith(("/", "\\")):
                writer.make_folder(target)
            else:
                with file.open(member) as stream:
                    writer.write(target, stream)


def _check_index(archive: Path, writer: _Writer) -> None:
    """Refuse a zip with a huge central directory before zipfile reads it into memory."""
    with archive.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65_636))  # end records and the longest comment
        tail = file.read()
    length = 0
    for at in {len(tail) - 22, tail.rfind(_ZIP + b"\x05\x06")}:  # zipfile looks for the end record at both places
        zip64 = at - 76  # zip64 end record, followed by its locator of 20 bytes
        if zip64 >= 0 and tail[zip64 : zip64 + 4] == _ZIP + b"\x06\x06":
            length = max(length, int.from_bytes(tail[zip64 + 40 : zip64 + 48], "little"))
        elif at >= 0 and tail[at : at + 4] == _ZIP + b"\x05\x06":
            length = max(length, int.from_bytes(tail[at + 12 : at + 16], "little"))
    if length > MAX_INDEX:
        raise writer.refusal(f"a central directory of {length} bytes", "Unpack it by hand and import the folder")


def _unpack_tar(archive: Path, writer: _Writer) -> None:
    with _open_tar(archive) as (file, source):
        while member := file.next():
            file.members = []  # type: ignore[attr-defined]  # tarfile keeps all members, and memory would grow
            file.pax_headers = {}
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise writer.refusal(f"member {member.name!a} is a link, a device or a sparse file")
            target = writer.admit(member.name, member.size)
            if member.isdir():
                writer.make_folder(target)
            elif stream := file.extractfile(member):
                writer.write(target, stream)
        source.seek(file.offset)
        if source.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile stops silently at invalid data
            raise tarfile.ReadError("no end mark")
        for _ in range(MAX_READ // CHUNK):  # gzip compares its checksum at the end
            if not source.read(CHUNK):
                return
        raise tarfile.ReadError("data after the end mark")


@contextmanager
def _open_tar(archive: Path) -> Iterator[tuple[tarfile.TarFile, Any]]:
    with archive.open("rb") as plain:
        is_gzip = plain.read(2) == _GZIP
        plain.seek(0)
        source: Any = gzip.GzipFile(fileobj=plain) if is_gzip else plain
        with source, tarfile.open(fileobj=_LimitedReader(source), mode="r:", errorlevel=2) as file:
            yield file, source


class _LimitedReader(io.RawIOBase):
    """Stream that limits the size of one read: tarfile reads extended headers into memory, whatever their size."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> Any:
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError("header too large")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _damaged(archive: Path, error: BaseException) -> UserError:
    return UserError(
        f"{archive}: damaged or incomplete ({type(error).__name__}); expected a zip, tar or tar.gz. "
        "Remove it and download it again"
    )
