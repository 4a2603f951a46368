"""Tests of archives from untrusted sources: unpacked completely or refused, and never outside the folder."""

import contextlib
import gzip
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen.datasets import archives
from medgen.datasets.archives import is_archive, unpack
from medgen.errors import UserError

FILES = {"set/A/1.png": b"one" * 50, "set/B/2.png": b"two" * 70, "set/empty": b"", "set/ä ö.txt": b"x"}
Entry = tuple[str, bytes]


def make_zip(path: Path, *entries: Entry, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries:
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.compress_type = name, method  # ZipInfo(name) would clean the name
            file.writestr(info, content)
    return path


def make_tar(path: Path, *entries: Entry, mode: str = "w", kind: bytes = tarfile.REGTYPE, target: str = "") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, target
            file.addfile(info, io.BytesIO(content))
    return path


def make_tgz(path: Path, *entries: Entry) -> Path:
    return make_tar(path, *entries, mode="w:gz")


MAKERS = {"zip": make_zip, "tar": make_tar, "tar.gz": make_tgz}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The target folder, which holds an old file."""
    (tmp_path / "inside" / "out").mkdir(parents=True)
    (tmp_path / "inside" / "out" / "old").write_bytes(b"old")
    return tmp_path / "inside" / "out"


def assert_refused(archive: Path, target: Path, *words: str) -> None:
    """Unpacking raises an error that names the file, and changes no file."""
    around = target.parent.parent
    before = files(around)
    with pytest.raises(UserError) as error:
        unpack(archive, target)
    assert str(archive) in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert files(around) == before


@pytest.mark.parametrize("kind", MAKERS)
def test_archive_replaces_the_old_folder(tmp_path: Path, target: Path, kind: str) -> None:
    archive = MAKERS[kind](tmp_path / f"a.{kind}", *FILES.items())
    assert is_archive(archive)
    assert unpack(archive, target) == len(FILES)
    assert files(target) == FILES
    assert [path.name for path in target.parent.iterdir()] == ["out"]  # no other files remain


def test_backslashes_in_names_separate_folders(tmp_path: Path, target: Path) -> None:
    unpack(make_zip(tmp_path / "a.zip", ("set\\A\\1.png", b"1"), ("set\\B\\", b"")), target)
    assert files(target) == {"set/A/1.png": b"1"}
    assert (target / "set" / "B").is_dir()


def test_permissions_of_the_archive_are_ignored(tmp_path: Path, target: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        info = tarfile.TarInfo("run.sh")
        info.mode, info.size = 0o6777, 1
        file.addfile(info, io.BytesIO(b"x"))
    unpack(tmp_path / "a.tar", target)
    assert (target / "run.sh").stat().st_mode & 0o7111 == 0


NAMES = {
    "up": "../escaped", "up inside": "a/../../escaped", "up on Windows": "a\\..\\..\\escaped", "absolute": "/escaped",
    "drive": "C:\\escaped", "drive relative": "c:escaped", "share": "\\\\host\\escaped", "newline": "a\nb",
    "escape sequence": "\x1b[2Jx", "long part": "x" * 300, "long path": "/".join(["y" * 100] * 12),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_paths_outside_the_folder_are_refused(tmp_path: Path, target: Path, kind: str, name: str) -> None:
    archive = MAKERS[kind](tmp_path / f"a.{kind}", ("fine.png", b"x"), (NAMES[name], b"escaped"))
    assert_refused(archive, target, "member", "Nothing was unpacked")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("twice", [("a", "a"), ("a", "./a"), ("a", "a/b"), ("a/b", "a")])
def test_repeated_names_are_refused(tmp_path: Path, target: Path, kind: str, twice: tuple[str, str]) -> None:
    archive = MAKERS[kind](tmp_path / f"a.{kind}", *((name, b"x") for name in twice))
    assert_refused(archive, target, "occurs twice")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars_are_refused(tmp_path: Path, target: Path, kind: bytes) -> None:
    assert_refused(make_tar(tmp_path / "a.tar", ("link", b""), kind=kind, target="/etc"), target, "'link'")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_zips_are_refused(tmp_path: Path, target: Path, kind: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        file.writestr(info, "/etc/passwd")
        file.writestr("link/x", b"through the link")
    assert_refused(tmp_path / "a.zip", target, "'link'", "link or a device")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_zip_bombs_are_refused(tmp_path: Path, target: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 1 << 20)
    archive = MAKERS[kind](tmp_path / f"a.{kind}", *((f"{i}.bin", bytes(1 << 20)) for i in range(4)))
    assert archive.stat().st_size < 20_000
    assert_refused(archive, target, "too large when unpacked", "zip bomb")


def test_zip_with_wrong_sizes_is_refused(tmp_path: Path, target: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a.bin", bytes(5_000_000)))
    data = archive.read_bytes()
    size, wrong = (5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert size in data
    archive.write_bytes(data.replace(size, wrong))
    assert_refused(archive, target, "damaged")


def test_too_many_members_are_refused(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    entries = [(f"{i}.png", b"") for i in range(4)]
    assert_refused(make_zip(tmp_path / "a.zip", *entries), target, "more than 3 members")
    assert_refused(make_tar(tmp_path / "a.tar", *entries), target, "more than 3 members")


def test_huge_central_directory_is_refused_before_it_is_read(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a", b""), ("b", b""))
    monkeypatch.setattr(archives, "MAX_INDEX", 90)
    monkeypatch.setattr(archives.zipfile, "ZipFile", None)  # not even opened
    assert_refused(archive, target, "a central directory of 94 bytes")


def test_huge_tar_header_is_refused(tmp_path: Path, target: Path) -> None:
    """tarfile reads an extended header into memory: a few compressed kilobytes can be gigabytes."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(info.tobuf() + bytes(1 << 20))
    assert_refused(tmp_path / "a.tar.gz", target, "damaged")


def test_encrypted_and_lzma_zips_are_refused(tmp_path: Path, target: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a", b"x"))
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    archive.write_bytes(data)
    assert_refused(archive, target, "encrypted", "by hand")
    assert_refused(make_zip(tmp_path / "b.zip", ("a", b"x"), method=zipfile.ZIP_LZMA), target, "deflate", "by hand")


@pytest.mark.parametrize("kind", MAKERS)
def test_truncated_archives_are_refused(tmp_path: Path, target: Path, kind: str) -> None:
    entries = [(f"{i}.bin", os.urandom(700)) for i in range(8)]
    complete = MAKERS[kind](tmp_path / f"a.{kind}", *entries).read_bytes()
    content = len(complete) if kind != "tar" else 8 * (512 + 1024)  # without the end mark of zero blocks
    for length in range(0, content, 97):
        (tmp_path / f"a.{kind}").write_bytes(complete[:length])
        assert_refused(tmp_path / f"a.{kind}", target)


def test_full_disk(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a", b"x" * 1000))
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: SimpleNamespace(free=archives.SPARE + 900))
    assert_refused(archive, target, "0 MB are free", "Free disk space")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(archives._Writer, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        unpack(archive, target)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npz", b"PK\x03\x04", False),  # a dataset in zip format
        # one compressed file; mtime=0 because the content is part of the test's name
        ("digits.gz", gzip.compress(b"\0\0\x08\x03" * 300, mtime=0), False),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(600), False),
        ("short.gz", gzip.compress(b"x" * 600, mtime=0)[:12], False),
        ("empty", b"", False),
    ],
)
def test_files_that_are_not_archives(tmp_path: Path, name: str, content: bytes, expected: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_archive(tmp_path / name) is expected


def _mutant(data: bytes, cuts: list[tuple[int, int]]) -> bytes:
    mutant = bytearray(data)
    for at, value in cuts:
        mutant[at % len(mutant)] = value
    return bytes(mutant)


CUTS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", MAKERS)
def test_mutated_archives_write_only_inside_the_folder(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    make: Callable[..., Path] = MAKERS[kind]
    data = make(folder / "seed", *FILES.items(), ("..a", b"x"), ("set/..b/c", b"y")).read_bytes()
    (folder / "seed").unlink()
    archive, target = folder / "a", folder / "in" / "out"

    @settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @given(CUTS)
    def check(cuts: list[tuple[int, int]]) -> None:
        archive.write_bytes(_mutant(data, cuts))
        with contextlib.suppress(UserError):
            unpack(archive, target)
        assert {path.name for path in folder.iterdir()} <= {"a", "in"}
        assert {path.name for path in (folder / "in").iterdir()} <= {"out"}
        assert not any(path.is_symlink() for path in folder.rglob("*"))

    check()
