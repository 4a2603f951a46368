"""Tests of downloads from a local server that simulates faults."""

import errno
import hashlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medgen.datasets import download
from medgen.errors import UserError

CONTENT = bytes(range(256)) * 1200  # of the server
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, in seconds; nothing waits."""
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


def fetch(server: Any, path: Path, checksum: str | None = SHA256) -> Path:
    return download.download_file(server.url, path, checksum)


def part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def test_download_leaves_only_the_file(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.bin"
    assert fetch(server, path) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_transfer_is_resumed(server: Any, tmp_path: Path, waits: list[float]) -> None:
    server.drop_after(100_000)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]
    assert len(waits) == 1


def test_interrupted_command_is_resumed(server: Any, tmp_path: Path) -> None:
    part(tmp_path / "file").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


@pytest.mark.parametrize(
    ("partial", "supports_range"),
    [(b"of another file", True), (CONTENT + b"too long", True), (CONTENT, True), (CONTENT[:1000], False)],
)
def test_unusable_partial_download_is_replaced(
    server: Any, tmp_path: Path, partial: bytes, supports_range: bool
) -> None:
    server.supports_range = supports_range
    part(tmp_path / "file").write_bytes(partial)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


def test_number_of_attempts_is_limited(server: Any, tmp_path: Path, waits: list[float]) -> None:
    server.drop_after(10)
    for _ in range(10):
        server.refuse(503)
    with pytest.raises(UserError, match=r"503.*to resume the download"):
        fetch(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert len(server.ranges) == 4
    assert waits == [1.0, 2.0, 4.0]  # no wait after the last attempt


def test_checksum_mismatch_removes_the_file(server: Any, tmp_path: Path) -> None:
    server.content = b"<html>log in to the hospital's network</html>"
    with pytest.raises(UserError, match="checksum mismatch: expected SHA-256"):
        fetch(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    assert len(server.ranges) == 1


def test_not_found_is_not_tried_again(server: Any, tmp_path: Path) -> None:
    server.refuse(404)
    with pytest.raises(UserError, match=r"404.*Check the address"):
        fetch(server, tmp_path / "file")
    assert len(server.ranges) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_header_sets_the_wait(server: Any, tmp_path: Path, waits: list[float], form: str) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    server.refuse(429, "7" if form == "seconds" else later)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    (wait,) = waits
    assert wait == 7 if form == "seconds" else 30 < wait <= 60


def test_long_retry_after_fails(server: Any, tmp_path: Path) -> None:
    server.refuse(429, "3600")
    with pytest.raises(UserError, match=r"3600 s\. Run the command again then"):
        fetch(server, tmp_path / "file")


def test_offline_error_explains_a_manual_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"not reachable.*another machine.* and save it as"):
        download.download_file("http://127.0.0.1:1/file", tmp_path / "file", SHA256)


def test_disk_space_is_checked_first(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="0 MB free; expected 67 MB"):
        fetch(server, tmp_path / "file")
    assert not part(tmp_path / "file").exists()


def test_disk_errors_are_not_tried_again(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        fetch(server, tmp_path / "file")
    assert len(server.ranges) == 1


def test_finished_file_is_not_changed(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    before = path.stat().st_mtime_ns
    fetch(server, path)
    assert path.stat().st_mtime_ns == before
    assert server.ranges == []


def test_other_file_is_not_overwritten(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="Remove the file"):
        fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_only_http_addresses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="https://"):
        download.download_file("file:///etc/passwd", tmp_path / "file", SHA256)


@pytest.mark.parametrize("checksum", [f"md5:{MD5}", f"sha256:{SHA256}", SHA256[:8]])
def test_checksum_algorithms_and_first_digits(server: Any, tmp_path: Path, checksum: str) -> None:
    assert fetch(server, tmp_path / "file", checksum).read_bytes() == CONTENT
    server.content = b"another"
    with pytest.raises(UserError, match="expected MD5" if "md5" in checksum else "expected SHA-256"):
        fetch(server, tmp_path / "other", checksum)
    assert not (tmp_path / "other").exists()


def test_without_checksum_the_sha256_is_printed(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.drop_after(1000)
    assert fetch(server, tmp_path / "file", None).read_bytes() == CONTENT
    assert SHA256 in capsys.readouterr().err


@pytest.mark.parametrize("checksum", [SHA256, None])
@pytest.mark.parametrize(("partial", "num_requests"), [(CONTENT, 1), (CONTENT + b"too long", 2)])
def test_partial_download_as_long_as_the_file_or_longer(
    server: Any, tmp_path: Path, partial: bytes, num_requests: int, checksum: str | None
) -> None:
    part(tmp_path / "file").write_bytes(partial)
    assert fetch(server, tmp_path / "file", checksum).read_bytes() == CONTENT
    assert len(server.ranges) == num_requests


def test_status_416_without_a_size_restarts_the_download(server: Any, tmp_path: Path) -> None:
    server.refuse(416)
    part(tmp_path / "file").write_bytes(CONTENT[:-1])
    assert fetch(server, tmp_path / "file", None).read_bytes() == CONTENT
