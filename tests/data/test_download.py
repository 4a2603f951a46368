"""Downloads against a real server on loopback that misbehaves as told."""

import errno
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from medgen.data import download
from medgen.errors import UserError

CONTENT = bytes(range(256)) * 1200  # some 300 kB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does next; `answers` holds one behaviour per request, then it behaves."""

    url: str = ""
    content: bytes = CONTENT
    answers: list[Callable[[BaseHTTPRequestHandler], bool]] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)  # the Range header of each request
    honours_range: bool = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            if state.answers and state.answers.pop(0)(self):
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.honours_range else 0
            if start >= len(state.content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(state.content) - start))
            self.end_headers()
            self.wfile.write(state.content[start:])

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{running.server_address[1]}/weights.bin"
    yield state
    running.shutdown()
    thread.join()
    running.server_close()


def drop_after(count: int) -> Callable[[BaseHTTPRequestHandler], bool]:
    """Announces all of the content, sends `count` bytes and hangs up."""

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        handler.wfile.write(CONTENT[:count])
        return True

    return answer


def status(code: int, retry_after: str | None = None) -> Callable[[BaseHTTPRequestHandler], bool]:
    def answer(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(code)
        if retry_after is not None:
            handler.send_header("Retry-After", retry_after)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return answer


def fetch(server: Server, path: Path, sha256: str = SHA256, waits: list[float] | None = None) -> Path:
    return download.fetch(server.url, path, sha256, sleep=(waits if waits is not None else []).append)


def part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def test_a_file_arrives_whole_and_leaves_nothing_beside(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.bin"
    assert fetch(server, path) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_the_beginning_of_a_hash_is_enough(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path / "file", SHA256[:8]).read_bytes() == CONTENT


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.answers = [drop_after(100_000)]
    waits: list[float] = []
    assert fetch(server, tmp_path / "file", waits=waits).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]
    assert len(waits) == 1


def test_an_interrupted_command_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    part(tmp_path / "file").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_server_that_cannot_resume_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.honours_range = False
    part(tmp_path / "file").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("left_over", [b"of another file", CONTENT + b"too long", CONTENT])
def test_what_another_try_left_is_never_trusted(server: Server, tmp_path: Path, left_over: bytes) -> None:
    part(tmp_path / "file").write_bytes(left_over)
    assert fetch(server, tmp_path / "file").read_bytes() == CONTENT


def test_a_download_that_never_gets_through_looks_incomplete(server: Server, tmp_path: Path) -> None:
    server.answers = [drop_after(10)] + [status(503)] * 10
    waits: list[float] = []
    with pytest.raises(UserError, match=r"503.*goes on where this one stopped"):
        fetch(server, tmp_path / "file", waits=waits)
    assert not (tmp_path / "file").exists()
    assert len(server.ranges) == 4  # bounded
    assert waits == [1.0, 2.0, 4.0]  # and none after the last


def test_wrong_bytes_are_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>log in to the hospital's network</html>"
    with pytest.raises(UserError, match="SHA-256 of what came"):
        fetch(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    assert len(server.ranges) == 1


def test_not_found_is_said_at_once(server: Server, tmp_path: Path) -> None:
    server.answers = [status(404)]
    with pytest.raises(UserError, match=r"404.*Check the address"):
        fetch(server, tmp_path / "file")
    assert len(server.ranges) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_busy_server_is_given_the_time_it_asks_for(server: Server, tmp_path: Path, form: str) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    server.answers = [status(429, "7" if form == "seconds" else later)]
    waits: list[float] = []
    assert fetch(server, tmp_path / "file", waits=waits).read_bytes() == CONTENT
    (wait,) = waits
    assert wait == 7 if form == "seconds" else 30 < wait <= 60


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    server.answers = [status(429, "3600")]
    with pytest.raises(UserError, match=r"3600 s\. Run the command again after that"):
        fetch(server, tmp_path / "file")


def test_offline_says_how_to_do_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"not reachable.*another machine and put it at"):
        download.fetch("http://127.0.0.1:1/file", tmp_path / "file", SHA256, sleep=lambda _: None)


def test_a_full_disk_is_noticed_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="0 MB free; expected 67 MB"):
        fetch(server, tmp_path / "file")
    assert not part(tmp_path / "file").exists()


def test_a_disk_that_fills_up_or_refuses_is_not_taken_for_the_network(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        fetch(server, tmp_path / "file")
    assert len(server.ranges) == 1


def test_a_finished_file_is_left_untouched(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    before = path.stat().st_mtime_ns
    fetch(server, path)
    assert path.stat().st_mtime_ns == before
    assert server.ranges == []


def test_another_file_in_its_place_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="Remove the file"):
        fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_only_web_addresses_are_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="https://"):
        download.fetch("file:///etc/passwd", tmp_path / "file", SHA256)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server) -> Path:
    """A small known weight and an empty weights folder."""
    weight = download.Weight(url=server.url, sha256=SHA256, size=len(CONTENT), use="tests")
    monkeypatch.setattr(download, "WEIGHTS", {"small": weight})
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights" / "weights.bin"


def test_absent_weights_say_how_to_get_them_and_are_never_downloaded(known: Path, server: Server) -> None:
    with pytest.raises(UserError) as error:
        download.weights_path("small")
    for hint in ("medgen weights fetch small", str(known), "MEDGEN_WEIGHTS", server.url):
        assert hint in str(error.value)
    assert server.ranges == []
    assert download.list_weights() == {"small": None}


def test_fetched_weights_are_found_and_verified(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert download.fetch_weights("small") == known
    assert download.weights_path("small") == download.verify_weights("small") == known
    assert download.list_weights() == {"small": known}
    download.show_weights()
    assert "small" in capsys.readouterr().out


def test_a_mirror_serves_the_same_file(known: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = download.Weight(url="https://example.invalid/weights.bin", sha256=SHA256, size=len(CONTENT), use="")
    monkeypatch.setitem(download.WEIGHTS, "small", elsewhere)
    assert download.fetch_weights("small", base_url=server.url.rpartition("/")[0] + "/") == known


def test_damaged_weights_are_noticed(known: Path) -> None:
    known.parent.mkdir()
    known.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="307199 bytes; expected 307200"):
        download.weights_path("small")
    known.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(UserError, match="SHA-256"):
        download.verify_weights("small")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match="did you mean 'vgg16'"):
        download.weights_path("vgg19")


def test_known_files_carry_the_beginning_of_their_hash_in_their_name() -> None:
    for weight in download.WEIGHTS.values():
        assert weight.sha256[:8] in weight.file
        assert len(weight.sha256) == 64
