"""The HTTP server of `medgen serve`, in this process and with a model that only waits."""

import hashlib
import json
import logging
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.types import Schema, TensorSpec
from starlette.datastructures import Headers
from starlette.responses import Response

from medgen.serving.server import model
from medgen.serving.server.app import App, Limits
from medgen.serving.server.clients import Clients
from medgen.serving.server.connections import Server, max_connections
from medgen.serving.server.monitoring import JsonFormatter, RepeatFilter
from medgen.serving.server.responses import RequestError

ABOUT = {"uri": "models:/xrays/1"}
TOKEN = "0123456789abcdef"
DIGESTS = {"clinic": hashlib.sha256(TOKEN.encode()).hexdigest()}


class Model:
    """A model that answers after `go` is set or nobody waits for the answer, and counts its answers."""

    def __init__(self, is_ready: bool = True) -> None:
        self.go, self.begun, self.abandoned = threading.Event(), threading.Event(), threading.Event()
        if is_ready:
            self.go.set()

    def respond(self, body: bytes, as_png: bool, is_abandoned: Callable[[], bool]) -> Response:
        self.begun.set()
        while not self.go.wait(0.01):
            if is_abandoned():
                self.abandoned.set()
                raise ValueError("abandoned")
        return Response(b"{}")


class Running:
    """A server in a thread."""

    def __init__(self, app: App, parent: int | None = None) -> None:
        self.app, self.listener = app, socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.server = Server(app, parent)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def request(self, path: str, body: bytes | None = None, **headers: str) -> Any:
        """Status, headers and body."""
        connection = HTTPConnection(*self.address, timeout=30)
        try:
            return answer(connection, path, body, **headers)
        finally:
            connection.close()


def answer(connection: HTTPConnection, path: str, body: bytes | None = None, **headers: str) -> Any:
    method = "GET" if body is None else "POST"
    connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


@contextmanager
def running(app: App, parent: int | None = None) -> Iterator[Running]:
    server = Running(app, parent)
    try:
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(30)
        assert not server.thread.is_alive()


# Connections.


def test_surplus_connections_are_closed_and_keep_nobody_out() -> None:
    """An idle connection gives way to a new one; one with a request in progress does not."""
    waiter = Model(is_ready=False)
    with running(App(waiter.respond, ABOUT, Limits(connections=8))) as server:
        busy = HTTPConnection(*server.address, timeout=30)
        busy.request("POST", "/invocations", b"{}", {"Content-Type": "application/json"})
        assert waiter.begun.wait(30)
        idle = [socket.create_connection(server.address, timeout=30) for _ in range(50)]
        assert server.request("/ping")[0] == 200
        assert len(server.app.open_connections) <= 8
        for one in idle[:40]:
            with pytest.raises(ConnectionError):  # closed by the server, long before it closes idle ones
                assert one.recv(1) or _reset()
        assert server.app.num_surplus >= 43
        waiter.go.set()
        assert busy.getresponse().status == 200
        busy.close()
        for one in idle:
            one.close()


def _reset() -> None:
    raise ConnectionResetError


def test_connections_leave_half_of_the_file_descriptors() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 1 <= max_connections() <= min(512, soft // 2)


def test_repeated_errors_are_logged_once_a_minute() -> None:
    """A flood of connections made asyncio log 81,009 tracebacks in 20 s."""
    now = 0.0
    limit = RepeatFilter(lambda: now)

    def logged(message: str, level: int = logging.ERROR) -> str | None:
        record = logging.LogRecord("asyncio", level, "", 0, message, None, None)
        return record.getMessage() if limit.filter(record) else None

    flood = "socket.accept() out of system resource\nsocket: 7"
    assert [logged(flood) for _ in range(1000)] == [flood] + [None] * 999
    assert logged("another") == "another"
    assert logged("a request", logging.INFO) == logged("a request", logging.INFO) == "a request"
    now = 61.0
    assert logged(flood) == f"{flood} (999 more since the last such message)"


def test_log_is_one_json_object_a_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "two\nlines", None, None)
    record.created = 0.0
    assert json.loads(JsonFormatter().format(record)) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "ERROR",
        "message": "two\nlines",
    }
    assert "\n" not in JsonFormatter().format(record)


# Clients.


def test_only_clients_with_a_token_are_served() -> None:
    with running(App(Model().respond, ABOUT, Limits(), DIGESTS)) as server:
        for path in ("/ping", "/health", "/ready"):
            assert server.request(path)[0] == 200
        for path in ("/version", "/metrics"):
            assert server.request(path)[0] == 401
            assert server.request(path, Authorization=f"Bearer {TOKEN}")[0] == 200
        assert server.request("/invocations", b"{}", Authorization=f"Bearer {TOKEN}")[0] == 200
        for header in ("", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", "Bearer \xff", "Bearer"):
            status, headers, body = server.request("/invocations", b"{}", Authorization=header)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert TOKEN[:-1] not in body.decode()


def test_log_names_the_client_and_not_its_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medgen.serving.app")
    with running(App(Model().respond, ABOUT, Limits(), DIGESTS)) as server:
        server.request("/invocations", b"{}", Authorization=f"Bearer {TOKEN}")
        server.request("/invocations", b"{}", Authorization="Bearer wrongwrongwrong")
    lines = [record.request for record in caplog.records if hasattr(record, "request")]
    assert [(line["client"], line["status"], line["received_bytes"]) for line in lines] == [
        ("clinic", 200, 2),
        ("127.0.0.1", 401, 0),
    ]
    assert TOKEN not in str(lines) and "wrong" not in str(lines)


def test_rate_and_concurrency_of_a_client_are_limited() -> None:
    now = 0.0
    clients = Clients(DIGESTS, per_second=2.0, burst=3, concurrent=2, clock=lambda: now)

    def send(client: str) -> int:
        try:
            with clients.limit(client):
                return 200
        except RequestError as error:
            return error.response.status_code if error.response.headers["retry-after"] == "1" else 0

    assert [send("clinic") for _ in range(4)] == [200, 200, 200, 429]
    assert send("203.0.113.1") == 200  # another client
    assert [send("2001:db8::1"), send("2001:db8::2"), send("2001:db8::3"), send("2001:db8::4")] == [200] * 3 + [429]
    assert [send("127.0.0.1") for _ in range(9)] == [200] * 9  # a proxy of many clients
    now = 0.5
    assert [send("clinic"), send("clinic")] == [200, 429]
    now = 60.0
    with clients.limit("clinic"), clients.limit("clinic"):
        assert send("clinic") == 429
        assert send("203.0.113.1") == 200
    assert send("clinic") == 429  # three at once, of which one was refused


def test_guessing_tokens_is_slowed_down() -> None:
    clients = Clients(DIGESTS, per_second=1.0, burst=5, concurrent=9, clock=lambda: 0.0)
    found = []
    for number in range(7):
        with pytest.raises(RequestError) as error:
            clients.identify(Headers({"Authorization": f"Bearer {number}"}), "203.0.113.1")
        found.append(error.value.response.status_code)
    assert found == [401] * 5 + [429] * 2


def test_number_of_clients_that_are_remembered_is_limited() -> None:
    clients = Clients({}, per_second=1.0, burst=5, concurrent=9, clock=lambda: 0.0)
    for number in range(10_000):
        with clients.limit(f"10.0.{number // 256}.{number % 256}"):
            pass
    assert len(clients._usage) <= 4096


# Predictions that nobody waits for.


def test_model_stops_when_nobody_waits(caplog: pytest.LogCaptureFixture) -> None:
    waiter = Model(is_ready=False)
    with running(App(waiter.respond, ABOUT, Limits(answer_seconds=0.2))) as server:
        assert server.request("/invocations", b"{}")[0] == 504
        assert waiter.abandoned.wait(30)
        waiter.go.set()
        assert server.request("/invocations", b"{}")[0] == 200
        client = socket.create_connection(server.address)
        waiter.go.clear(), waiter.begun.clear(), waiter.abandoned.clear()
        client.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 2\r\n\r\n{}")
        assert waiter.begun.wait(30)
        client.close()
        assert waiter.abandoned.wait(30)
    assert "never retrieved" not in caplog.text


# Bodies that are refused before MLflow converts them.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"inputs": [' + b"[[[0]]], " * 10**6 + b"[[[0]]]]}", "images: more than 1024 in one request"),
        (b'{"inputs": [' + b"[[]]," * 10**6 + b"[[]]]}", "found an empty list"),
        (b'{"inputs": [' + b"[[ ]]," * 10**6 + b"[[]]]}", "found an empty list"),
        (b'{"inputs": [' + b"[0]," * 1024 + b"[0]]}", "images: more than 1024 in one request"),
        (b'{"inputs": 5}', "expected the field inputs with a list of images"),
        (b'{"dataframe_records": [{"n": 1}]}', "expected the field inputs with a list of images"),
        (b'{"inputs": {"a": [[[[0]]]]}}', "expected the field inputs with a list of images"),
    ],
    ids=["a million images", "empty lists", "spaces", "short lists", "number", "table", "names"],
)
def test_array_outside_the_limits_is_refused_before_it_is_converted(
    body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.scoring_server, "infer_and_parse_data", lambda *_: pytest.fail("converted by MLflow"))
    schema = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 1))])
    loaded: Any = SimpleNamespace(metadata=SimpleNamespace(get_input_schema=lambda: schema))
    loaded.unwrap_python_model = SimpleNamespace
    with pytest.raises(RequestError, match=message) as error:
        model.ServedModel(loaded).respond(body, False, lambda: False)
    assert error.value.response.status_code == 400


# The end.


def test_requests_are_answered_while_the_server_stops() -> None:
    """Also those that were on their way, on a connection that was open; new connections are refused."""
    waiter = Model(is_ready=False)
    with running(App(waiter.respond, ABOUT, Limits())) as server:
        waiting, fresh, kept = (HTTPConnection(*server.address, timeout=30) for _ in range(3))
        assert answer(kept, "/ready")[0] == 200
        fresh.connect()
        waiting.request("POST", "/invocations", b"{}", {"Content-Type": "application/json"})
        assert waiter.begun.wait(30)
        server.server.should_exit = True
        while not server.app.is_draining:
            pass
        status, headers, body = answer(fresh, "/ready")
        assert (status, json.loads(body), headers["Connection"]) == (503, {"status": "stopping"}, "close")
        assert answer(kept, "/ping")[0] == 200
        with pytest.raises(ConnectionRefusedError):
            server.request("/ping")
        waiter.go.set()
        assert waiting.getresponse().status == 200
        for one in (waiting, fresh, kept):
            one.close()


def test_server_ends_with_the_process_that_started_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, running(App(Model().respond, ABOUT, Limits()), theirs.fileno()) as server:
        assert server.request("/ping")[0] == 200
        ours.close()
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert server.server.config.timeout_graceful_shutdown == 150
    theirs.close()


def test_another_process_takes_over_without_a_lost_request() -> None:
    """Two servers share the listening socket; clients connect anew for each request while the first one ends."""
    first = Running(App(Model().respond, {"uri": "first"}, Limits()))
    found: list[tuple[int, str]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            status, _, body = first.request("/version")
            found.append((status, json.loads(body)["uri"]))

    listener = first.listener.dup()
    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    while not found:
        pass
    second = Server(App(Model().respond, {"uri": "second"}, Limits()))
    thread = threading.Thread(target=second.run, kwargs={"sockets": [listener]})
    thread.start()
    first.server.should_exit = True
    first.thread.join(30)
    count = len(found)
    while len(found) < count + 20 and all(client.is_alive() for client in clients):
        pass
    done.set()
    for client in clients:
        client.join(30)
    second.should_exit = True
    thread.join(30)
    assert {status for status, _ in found} == {200}
    assert {uri for _, uri in found[count + 4 :]} == {"second"}
