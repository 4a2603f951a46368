"""A local web server that simulates faults."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Answer = Callable[[BaseHTTPRequestHandler], bool]  # True: it sent a response; False: the server sends the file


@dataclass
class Server:
    """Serves `files` by name, or `content` under any name; `answers` holds the faults of the next requests."""

    address: str = ""
    content: bytes = bytes(range(256)) * 1200  # 307,200 bytes
    files: dict[str, bytes] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)  # the Range header of each request
    supports_range: bool = True

    @property
    def url(self) -> str:
        return f"{self.address}/weights.bin"

    def drop_after(self, count: int) -> None:
        """For the next request, send `count` bytes of the content and close the connection."""

        def answer(handler: BaseHTTPRequestHandler) -> bool:
            content = self.find(handler.path) or b""
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:count])
            return True

        self.answers.append(answer)

    def refuse(self, code: int, retry_after: str | None = None, **headers: str) -> None:
        """For the next request, send a status without content."""

        def answer(handler: BaseHTTPRequestHandler) -> bool:
            handler.send_response(code)
            if retry_after is not None:
                handler.send_header("Retry-After", retry_after)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return True

        self.answers.append(answer)

    def find(self, path: str) -> bytes | None:
        name = path.partition("?")[0].rpartition("/")[2]
        return self.files.get(name) if self.files else self.content


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested = self.headers.get("Range")
            state.ranges.append(requested)
            if state.answers and state.answers.pop(0)(self):
                return
            content = state.find(self.path)
            if content is None:
                self.send_error(404)
                return
            start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and state.supports_range else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{running.server_address[1]}"
    yield state
    running.shutdown()
    thread.join()
    running.server_close()
