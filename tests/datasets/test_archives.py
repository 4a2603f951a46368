"""Strangers' archives: unpacked whole, or refused with nothing written; never anything outside the folder."""

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
            info.filename, info.compress_type = name, method  # a ZipInfo of that name would mend it
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
def place(tmp_path: Path) -> Path:
    """Where archives are unpacked; an old folder is there already."""
    (tmp_path / "inside" / "out").mkdir(parents=True)
    (tmp_path / "inside" / "out" / "old").write_bytes(b"old")
    return tmp_path / "inside" / "out"


def refused(archive: Path, place: Path, *words: str) -> None:
    """One clear error that names the file; what was there stays, and nothing else is written."""
    around = place.parent.parent
    before = files(around)
    with pytest.raises(UserError) as error:
        unpack(archive, place)
    assert str(archive) in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert files(around) == before


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_becomes_a_folder_in_place_of_the_old(tmp_path: Path, place: Path, kind: str) -> None:
    archive = MAKERS[kind](tmp_path / f"a.{kind}", *FILES.items())
    assert is_archive(archive)
    assert unpack(archive, place) == len(FILES)
    assert files(place) == FILES
    assert [path.name for path in place.parent.iterdir()] == ["out"]  # nothing beside


def test_names_of_windows_zips_become_folders(tmp_path: Path, place: Path) -> None:
    unpack(make_zip(tmp_path / "a.zip", ("set\\A\\1.png", b"1"), ("set\\B\\", b"")), place)
    assert files(place) == {"set/A/1.png": b"1"}
    assert (place / "set" / "B").is_dir()


def test_permissions_are_normal_whatever_the_archive_says(tmp_path: Path, place: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        info = tarfile.TarInfo("run.sh")
        info.mode, info.size = 0o6777, 1
        file.addfile(info, io.BytesIO(b"x"))
    unpack(tmp_path / "a.tar", place)
    assert (place / "run.sh").stat().st_mode & 0o7111 == 0


NAMES = {
    "up": "../escaped", "up inside": "a/../../escaped", "up on Windows": "a\\..\\..\\escaped", "absolute": "/escaped",
    "drive": "C:\\escaped", "drive relative": "c:escaped", "share": "\\\\host\\escaped", "newline": "a\nb",
    "escape sequence": "\x1b[2Jx", "long part": "x" * 300, "long path": "/".join(["y" * 100] * 12),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_outside(tmp_path: Path, place: Path, kind: str, name: str) -> None:
    archive = MAKERS[kind](tmp_path / f"a.{kind}", ("fine.png", b"x"), (NAMES[name], b"escaped"))
    refused(archive, place, "member", "Nothing was unpacked")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("twice", [("a", "a"), ("a", "./a"), ("a", "a/b"), ("a/b", "a")])
def test_no_file_takes_the_place_of_another(tmp_path: Path, place: Path, kind: str, twice: tuple[str, str]) -> None:
    archive = MAKERS[kind](tmp_path / f"a.{kind}", *((name, b"x") for name in twice))
    refused(archive, place, "there twice")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_tars_bring_no_links_and_no_devices(tmp_path: Path, place: Path, kind: bytes) -> None:
    refused(make_tar(tmp_path / "a.tar", ("link", b""), kind=kind, target="/etc"), place, "'link'")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_zips_bring_no_links_and_no_devices(tmp_path: Path, place: Path, kind: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        file.writestr(info, "/etc/passwd")
        file.writestr("link/x", b"through the link")
    refused(tmp_path / "a.zip", place, "'link'", "link or a device")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_does_not_go_off(tmp_path: Path, place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_FINE", 1 << 20)
    archive = MAKERS[kind](tmp_path / f"a.{kind}", *((f"{i}.bin", bytes(1 << 20)) for i in range(4)))
    assert archive.stat().st_size < 20_000
    refused(archive, place, "than there is room for", "made to fill a disk")


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path: Path, place: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a.bin", bytes(5_000_000)))
    data = archive.read_bytes()
    size, lie = (5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert size in data
    archive.write_bytes(data.replace(size, lie))
    refused(archive, place, "damaged")


def test_more_members_than_any_dataset_has_are_refused(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    entries = [(f"{i}.png", b"") for i in range(4)]
    refused(make_zip(tmp_path / "a.zip", *entries), place, "more than 3 members")
    refused(make_tar(tmp_path / "a.tar", *entries), place, "more than 3 members")


def test_a_zips_own_list_is_not_read_where_it_would_fill_the_memory(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a", b""), ("b", b""))
    monkeypatch.setattr(archives, "MAX_INDEX", 90)
    monkeypatch.setattr(archives.zipfile, "ZipFile", None)  # not even opened
    refused(archive, place, "a list of members of 94 bytes")


def test_a_tar_header_does_not_fill_the_memory(tmp_path: Path, place: Path) -> None:
    """tarfile reads an extended header whole: a few packed kilobytes would be gigabytes."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(info.tobuf() + bytes(1 << 20))
    refused(tmp_path / "a.tar.gz", place, "damaged")


def test_what_is_locked_or_packed_otherwise_says_what_to_do(tmp_path: Path, place: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a", b"x"))
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    archive.write_bytes(data)
    refused(archive, place, "encrypted", "by hand")
    refused(make_zip(tmp_path / "b.zip", ("a", b"x"), method=zipfile.ZIP_LZMA), place, "deflate", "by hand")


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_that_is_cut_off_is_never_half_there(tmp_path: Path, place: Path, kind: str) -> None:
    entries = [(f"{i}.bin", os.urandom(700)) for i in range(8)]
    whole = MAKERS[kind](tmp_path / f"a.{kind}", *entries).read_bytes()
    content = len(whole) if kind != "tar" else 8 * (512 + 1024)  # a tar's end mark is ten blocks of zeros
    for length in range(0, content, 97):
        (tmp_path / f"a.{kind}").write_bytes(whole[:length])
        refused(tmp_path / f"a.{kind}", place)


def test_a_full_disk_is_noticed(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a", b"x" * 1000))
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: SimpleNamespace(free=archives.SPARE + 900))
    refused(archive, place, "0 MB are free", "Make room")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(archives._Writer, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        unpack(archive, place)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npz", b"PK\x03\x04", False),  # a dataset, though a zip
        # one packed file; without the time of day, for the content is part of the test's name
        ("digits.gz", gzip.compress(b"\0\0\x08\x03" * 300, mtime=0), False),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(600), False),
        ("short.gz", gzip.compress(b"x" * 600, mtime=0)[:12], False),
        ("empty", b"", False),
    ],
)
def test_what_is_no_archive(tmp_path: Path, name: str, content: bytes, expected: bool) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_archive(tmp_path / name) is expected


def _mutant(data: bytes, cuts: list[tuple[int, int]]) -> bytes:
    mutant = bytearray(data)
    for at, value in cuts:
        mutant[at % len(mutant)] = value
    return bytes(mutant)


CUTS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", MAKERS)
def test_mutated_archives_are_unpacked_inside_or_refused(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    make: Callable[..., Path] = MAKERS[kind]
    data = make(folder / "seed", *FILES.items(), ("..a", b"x"), ("set/..b/c", b"y")).read_bytes()
    (folder / "seed").unlink()
    archive, place = folder / "a", folder / "in" / "out"

    @settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @given(CUTS)
    def check(cuts: list[tuple[int, int]]) -> None:
        archive.write_bytes(_mutant(data, cuts))
        with contextlib.suppress(UserError):
            unpack(archive, place)
        assert {path.name for path in folder.iterdir()} <= {"a", "in"}
        assert {path.name for path in (folder / "in").iterdir()} <= {"out"}
        assert not any(path.is_symlink() for path in folder.rglob("*"))

    check()
