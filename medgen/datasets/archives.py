"""zip, tar and tar.gz -> a folder, whole or not at all, and nothing outside it.

unpack(Path("kaggle.zip"), Path("runs/unpacked"))

An archive is a stranger's list of names and sizes. Only plain files and folders are taken, under names that stay
inside; every byte is counted as it is written, as the sizes a header declares may be lies.
"""

import gzip
import io
import os
import re
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
from medgen.io import swap

MAX_MEMBERS = 500_000
MAX_INDEX = 64 << 20  # bytes of a zip's own list of members, which is read whole
MAX_READ = 2 << 20  # bytes a tar's extended header may have
MAX_RATIO = 100  # times the archive's own size; films and scans shrink to a half, empty ground to a twentieth
ALWAYS_FINE = 256 << 20  # bytes that no ratio forbids
CHUNK = 1 << 20
SPARE = 64 << 20  # bytes to leave free on the disk
_ZIP, _GZIP = b"PK", b"\x1f\x8b"
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f]|^[A-Za-z]:")
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError,
    ValueError, IndexError, KeyError, OverflowError, NotImplementedError, RecursionError,
)  # fmt: skip


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, tar or tar.gz by its first bytes; an .npz and the .gz of a single file are none."""
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
    """Unpacks an archive into a new folder, which takes the place of an earlier one; returns the number of files.

    Raises:
        UserError: no archive or a damaged one; a name that leads outside, is absolute, too long or there twice; a link
            or a device; encrypted; more files or bytes than a dataset has; no room on the disk.
    """
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        with archive.open("rb") as file:
            is_zip = file.read(2) == _ZIP
        building.mkdir(parents=True)
        writer = _Writer(archive, building)
        (_unpack_zip if is_zip else _unpack_tar)(archive, writer)
        swap(building, folder)
        return writer.num_files
    except _DAMAGE as error:
        raise UserError(f"{archive}: {_reason(error)}. Remove it and download it again") from None
    except OSError as error:
        if error.errno is None:  # gzip's and bz2's own
            raise UserError(f"{archive}: {_reason(error)}. Remove it and download it again") from None
        raise UserError(
            f"{error.filename or building}: {error.strerror}; expected to unpack {archive.name} there. "
            "Make room or give the right to write there"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _Writer:
    """Puts members into a folder and counts what it writes."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive = archive
        self.folder = folder
        self.num_files = 0
        self._num_members = 0
        self._num_bytes = 0
        self._num_declared = 0
        allowed = max(ALWAYS_FINE, MAX_RATIO * archive.stat().st_size)
        free = shutil.disk_usage(folder).free - SPARE
        self._room = min(allowed, free)
        self._no_room = (
            f"{free / 1e6:.0f} MB are free on the disk of {folder.parent}. Make room"
            if free < allowed
            else f"{allowed / 1e6:.0f} MB are the most that an archive of its size may hold. It is made to fill a disk"
        )

    def admit(self, name: str, size: int) -> Path:
        """The place of a member, after its name and declared size were looked at."""
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise self.refusal(f"more than {MAX_MEMBERS} members", "unpack it by hand and import the folder")
        self._num_declared += max(size, 0)
        if size < 0 or self._num_declared > self._room:
            raise self._too_large()
        return self._place(name)

    def write(self, place: Path, stream: IO[bytes]) -> None:
        """Copies a file's bytes; the file must be new."""
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as file:
                while chunk := stream.read(CHUNK):
                    self._num_bytes += len(chunk)
                    if self._num_bytes > self._room:
                        raise self._too_large()
                    file.write(chunk)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise self._twice(place) from None
        self.num_files += 1

    def make_folder(self, place: Path) -> None:
        """A folder may be named often, but not as a file."""
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise self._twice(place) from None

    def refusal(self, found: str, mend: str = "unpack it by hand if you trust it") -> UserError:
        """The error for an archive that is not taken."""
        return UserError(f"{self.archive}: {found}; expected plain files and folders. Nothing was unpacked; {mend}")

    def _place(self, name: str) -> Path:
        path = PurePosixPath(name.replace("\\", "/"))
        shown = ascii(name if len(name) < 100 else f"{name[:97]}...")
        if _BAD_NAME.search(name) or path.is_absolute() or ".." in path.parts:
            raise self.refusal(f"member {shown} leads out of the folder or is no name")
        try:
            if len(os.fsencode(str(path))) > 1000 or any(len(part.encode()) > 255 for part in path.parts):
                raise self.refusal(f"member {shown} has too long a name")
        except UnicodeEncodeError:
            raise self.refusal(f"member {shown} has a name in no known alphabet") from None
        return self.folder / path

    def _twice(self, place: Path) -> UserError:
        return self.refusal(f"member {place.relative_to(self.folder).as_posix()!a} is there twice")

    def _too_large(self) -> UserError:
        return UserError(
            f"{self.archive}: holds more than there is room for; {self._no_room}, or unpack it by hand. "
            "Nothing was unpacked"
        )


def _unpack_zip(archive: Path, writer: _Writer) -> None:
    _check_index(archive, writer)
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:  # the whole list first: nothing is written where one is refused
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise writer.refusal(f"member {member.filename!a} is a link or a device")
            if member.flag_bits & 1:
                raise writer.refusal(f"member {member.filename!a} is encrypted", "unpack it by hand")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA may ask for any memory
                raise writer.refusal(f"member {member.filename!a} is not packed by deflate", "unpack it by hand")
        places = [writer.admit(member.filename, member.file_size) for member in members]
        for member, place in zip(members, places, strict=True):
            if member.filename.endswith(("/", "\\")):
                writer.make_folder(place)
            else:
                with file.open(member) as stream:
                    writer.write(place, stream)


def _check_index(archive: Path, writer: _Writer) -> None:
    """Refuses a zip whose list of members would fill the memory, before zipfile reads it."""
    with archive.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65_636))  # the end records and the longest comment
        tail = file.read()
    length = 0
    for at in {len(tail) - 22, tail.rfind(_ZIP + b"\x05\x06")}:  # the two places where zipfile looks for the record
        wide = at - 76  # zip64's record, and the one of 20 bytes that leads to it
        if wide >= 0 and tail[wide : wide + 4] == _ZIP + b"\x06\x06":
            length = max(length, int.from_bytes(tail[wide + 40 : wide + 48], "little"))
        elif at >= 0 and tail[at : at + 4] == _ZIP + b"\x05\x06":
            length = max(length, int.from_bytes(tail[at + 12 : at + 16], "little"))
    if length > MAX_INDEX:
        raise writer.refusal(f"a list of members of {length} bytes", "unpack it by hand and import the folder")


def _unpack_tar(archive: Path, writer: _Writer) -> None:
    with _open_tar(archive) as (file, source):
        while member := file.next():
            file.members = []  # type: ignore[attr-defined]  # of those behind us, it would grow without end
            file.pax_headers = {}
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise writer.refusal(f"member {member.name!a} is a link, a device or a file with holes")
            place = writer.admit(member.name, member.size)
            if member.isdir():
                writer.make_folder(place)
            elif stream := file.extractfile(member):
                writer.write(place, stream)
        source.seek(file.offset)
        if source.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any nonsense for the end
            raise tarfile.ReadError("no end mark")
        for _ in range(MAX_READ // CHUNK):  # to the end, where gzip checks its sum
            if not source.read(CHUNK):
                return
        raise tarfile.ReadError("goes on after its end")


@contextmanager
def _open_tar(archive: Path) -> Iterator[tuple[tarfile.TarFile, Any]]:
    with archive.open("rb") as plain:
        packed = plain.read(2) == _GZIP
        plain.seek(0)
        source: Any = gzip.GzipFile(fileobj=plain) if packed else plain
        with source, tarfile.open(fileobj=_Bounded(source), mode="r:", errorlevel=2) as file:
            yield file, source


class _Bounded(io.RawIOBase):
    """A stream that gives no more at once than a header needs: tarfile reads extended headers whole."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> Any:
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError("a header of no sensible size")
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


def _reason(error: BaseException) -> str:
    return f"a damaged or cut off archive ({type(error).__name__}); expected a whole zip, tar or tar.gz"
