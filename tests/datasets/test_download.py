"""Tests of downloads from a local server that simulates faults."""

import errno
import hashlib
import itertools
import ssl
import threading
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

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
    return download.download_file(server.url, path, checksum, len(CONTENT))


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
        download.download_file("http://127.0.0.1:1/file", tmp_path / "file", SHA256, 1)


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
        download.download_file("file:///etc/passwd", tmp_path / "file", SHA256, 1)


@pytest.mark.parametrize("checksum", [f"md5:{MD5}", f"sha256:{SHA256}", SHA256[:8]])
def test_checksum_algorithms_and_first_digits(server: Any, tmp_path: Path, checksum: str) -> None:
    assert fetch(server, tmp_path / "file", checksum).read_bytes() == CONTENT
    server.content = b"another"
    with pytest.raises(UserError, match="expected MD5" if "md5" in checksum else "expected SHA-256"):
        fetch(server, tmp_path / "other", checksum)
    assert not (tmp_path / "other").exists()


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


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:1/file", "file:///etc/passwd", "data:,x"])
def test_redirects_lead_to_http_only(server: Any, tmp_path: Path, target: str) -> None:
    server.refuse(302, Location=target)
    with pytest.raises(UserError, match=r"302|redirected to"):
        fetch(server, tmp_path / "file", None)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_to_another_http_address_is_followed(server: Any, tmp_path: Path) -> None:
    server.refuse(302, Location=f"{server.address}/elsewhere.bin")
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


def test_https_is_not_left_by_a_redirect(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", server.url)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Redirect) as secure, authority.cert_pem.tempfile() as certificate:
        secure.socket = tls.wrap_socket(secure.socket, server_side=True)
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        thread = threading.Thread(target=secure.handle_request)
        thread.start()
        url = f"https://127.0.0.1:{secure.server_port}/file"
        with pytest.raises(UserError, match=f"redirected to {server.url}; expected an address that starts with https"):
            download.download_file(url, tmp_path / "file", None, len(CONTENT))
        thread.join()
    assert server.ranges == []
    assert list(tmp_path.iterdir()) == []


def send(server: Any, *headers: tuple[str, str], body: Iterable[bytes] = (), status: int = 200) -> None:
    """For the next request, send this answer; a reader that leaves early is no error."""

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        with suppress(ConnectionError):
            for chunk in body:
                handler.wfile.write(chunk)
        return True

    server.answers.append(answer)


@pytest.mark.parametrize("checksum", [SHA256, None])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_twice_the_size_is_refused(
    server: Any, tmp_path: Path, checksum: str | None, announced: bool
) -> None:
    headers = [("Content-Length", str(10**12))] if announced else []
    send(server, *headers, body=itertools.repeat(CONTENT))
    with pytest.raises(UserError, match=r"larger than 0\.6 MB, twice the size that is known"):
        fetch(server, tmp_path / "file", checksum)
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_checked_while_writing(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([10**12, 10**12, 10**6])
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    send(server, body=[CONTENT, CONTENT[:1]])
    monkeypatch.setattr(download, "_CHUNK", 200_000)
    with pytest.raises(UserError, match="1 MB free; expected 67 MB"):
        fetch(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "header", "value"),
    [
        (200, "Content-Length", "abc"),
        (200, "Content-Length", "\u00b2"),
        (200, "Content-Length", "-1"),
        (503, "Retry-After", "\u00b2"),
        (503, "Retry-After", "Mon, 01 Jan 0001 00:00:00 +2359"),
        (302, "Location", "http://[::1"),
        (302, "Location", "http://127.0.0.1:99999/"),
        (302, "Location", "http://127.0.0.1:port/"),
    ],
)
def test_values_of_the_server_raise_only_user_errors(
    server: Any, tmp_path: Path, status: int, header: str, value: str
) -> None:
    for _ in range(4):
        send(server, (header, value), status=status)
    with pytest.raises(UserError, match=server.url):
        fetch(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
