"""Downloads against a real server on loopback that misbehaves as told."""

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

CONTENT = bytes(range(256)) * 1200  # what the server sends
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def fetch(server: Any, path: Path, checksum: str | None = SHA256, waits: list[float] | None = None) -> Path:
    return download.fetch(server.url, path, checksum, sleep=(waits if waits is not None else []).append)


def part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def test_a_file_arrives_whole_and_leaves_nothing_beside(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.bin"
    assert fetch(server, path) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_the_beginning_of_a_hash_is_enough(server: Any, tmp_path: Path) -> None:
    assert fetch(server, tmp_path / "file", SHA256[:8]).read_bytes() == CONTENT


def test_a_broken_download_goes_on_where_it_stopped(server: Any, tmp_path: Path) -> None:
    server.drop_after(100_000)
    waits: list[float] = []
    assert fetch(server, tmp_path / "file", waits=waits).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]
    assert len(waits) == 1


def test_an_interrupted_command_goes_on_where_it_stopped(server: Any, tmp_path: Path) -> None:
    part(tmp_path / "file").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_server_that_cannot_resume_sends_all_of_it_again(server: Any, tmp_path: Path) -> None:
    server.honours_range = False
    part(tmp_path / "file").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("left_over", [b"of another file", CONTENT + b"too long", CONTENT])
def test_what_another_try_left_is_never_trusted(server: Any, tmp_path: Path, left_over: bytes) -> None:
    part(tmp_path / "file").write_bytes(left_over)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


def test_a_download_that_never_gets_through_looks_incomplete(server: Any, tmp_path: Path) -> None:
    server.drop_after(10)
    for _ in range(10):
        server.refuse(503)
    waits: list[float] = []
    with pytest.raises(UserError, match=r"503.*goes on where this one stopped"):
        fetch(server, tmp_path / "file", waits=waits)
    assert not (tmp_path / "file").exists()
    assert len(server.ranges) == 4  # bounded
    assert waits == [1.0, 2.0, 4.0]  # and none after the last


def test_wrong_bytes_are_refused_and_removed(server: Any, tmp_path: Path) -> None:
    server.content = b"<html>log in to the hospital's network</html>"
    with pytest.raises(UserError, match="of what came, the SHA-256 is"):
        fetch(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    assert len(server.ranges) == 1


def test_not_found_is_said_at_once(server: Any, tmp_path: Path) -> None:
    server.refuse(404)
    with pytest.raises(UserError, match=r"404.*Check the address"):
        fetch(server, tmp_path / "file")
    assert len(server.ranges) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_busy_server_is_given_the_time_it_asks_for(server: Any, tmp_path: Path, form: str) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    server.refuse(429, "7" if form == "seconds" else later)
    waits: list[float] = []
    assert fetch(server, tmp_path / "file", waits=waits).read_bytes() == CONTENT
    (wait,) = waits
    assert wait == 7 if form == "seconds" else 30 < wait <= 60


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server: Any, tmp_path: Path) -> None:
    server.refuse(429, "3600")
    with pytest.raises(UserError, match=r"3600 s\. Run the command again after that"):
        fetch(server, tmp_path / "file")


def test_offline_says_how_to_do_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"not reachable.*another machine and put it at"):
        download.fetch("http://127.0.0.1:1/file", tmp_path / "file", SHA256, sleep=lambda _: None)


def test_a_full_disk_is_noticed_before_the_first_byte(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="0 MB free; expected 67 MB"):
        fetch(server, tmp_path / "file")
    assert not part(tmp_path / "file").exists()


def test_a_disk_that_fills_up_or_refuses_is_not_taken_for_the_network(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        fetch(server, tmp_path / "file")
    assert len(server.ranges) == 1


def test_a_finished_file_is_left_untouched(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    before = path.stat().st_mtime_ns
    fetch(server, path)
    assert path.stat().st_mtime_ns == before
    assert server.ranges == []


def test_another_file_in_its_place_is_not_overwritten(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="Remove the file"):
        fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_only_web_addresses_are_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="https://"):
        download.fetch("file:///etc/passwd", tmp_path / "file", SHA256)


@pytest.mark.parametrize("checksum", [f"md5:{MD5}", f"sha256:{SHA256}"])
def test_a_publisher_may_give_md5(server: Any, tmp_path: Path, checksum: str) -> None:
    assert fetch(server, tmp_path / "file", checksum).read_bytes() == CONTENT
    server.content = b"another"
    with pytest.raises(UserError, match="MD5 is" if "md5" in checksum else "SHA-256 is"):
        fetch(server, tmp_path / "other", checksum)
    assert not (tmp_path / "other").exists()


def test_a_publisher_may_give_no_checksum_then_ours_is_said(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.drop_after(1000)
    assert fetch(server, tmp_path / "file", None).read_bytes() == CONTENT
    assert SHA256 in capsys.readouterr().err


@pytest.mark.parametrize("checksum", [SHA256, None])
@pytest.mark.parametrize(("left_over", "num_requests"), [(CONTENT, 1), (CONTENT + b"too long", 2)])
def test_what_is_past_the_end_of_the_file_is_fetched_anew(
    server: Any, tmp_path: Path, left_over: bytes, num_requests: int, checksum: str | None
) -> None:
    part(tmp_path / "file").write_bytes(left_over)
    assert fetch(server, tmp_path / "file", checksum).read_bytes() == CONTENT
    assert len(server.ranges) == num_requests


def test_a_416_that_says_nothing_is_not_trusted(server: Any, tmp_path: Path) -> None:
    server.refuse(416)
    part(tmp_path / "file").write_bytes(CONTENT[:-1])
    assert fetch(server, tmp_path / "file", None).read_bytes() == CONTENT
