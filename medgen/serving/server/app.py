"""ASGI application: passes complete bodies to a model one at a time and enforces the limits."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .clients import Clients, check_host
from .monitoring import Metrics
from .responses import ImagesResponse, RequestError, busy, json_response

METHODS = {"/invocations": "POST"} | dict.fromkeys(("/ping", "/health", "/ready", "/version", "/metrics"), "GET")
OPEN_PATHS = {"/ping", "/health", "/ready"}  # without a token, for the probes of a process manager
CHUNK_BYTES = 2**16  # written to the connection at once, and so the most that is buffered for a slow client
MAX_ADDRESS = 64  # characters: a proxy can send any text
LOG = logging.getLogger("medgen.serving.app")


@dataclass(frozen=True)
class Limits:
    """Limits that keep one client from blocking the others."""

    connections: int = 512
    body_bytes: int = 16 * 2**20
    body_seconds: float = 20.0
    waiting: int = 128  # requests, with the one in progress
    held_bytes: int = 256 * 2**20  # of all bodies and responses together
    answer_seconds: float = 60.0
    send_seconds: float = 60.0
    client_requests_per_second: float = 20.0
    client_burst: int = 200  # requests at once
    client_concurrent: int = 32  # requests that wait or are processed


class App:
    """ASGI application of one model.

    Args:
        predict: responds to a body, as PNG if the second argument is True; called in a thread. The third argument
            returns True when nobody waits for the response any more.
        about: the content of /version.
        digests: SHA-256 of the clients' tokens by name; without any, no token is needed.
        only_local_hosts: refuse requests whose Host is no name of this machine's loopback interface.
    """

    def __init__(
        self,
        predict: Callable[[bytes, bool, Callable[[], bool]], Response],
        about: dict[str, Any],
        limits: Limits,
        digests: Mapping[str, str] | None = None,
        only_local_hosts: bool = False,
    ) -> None:
        self.limits = limits
        self.is_draining = False  # set when the server stops: the connections end after their present request
        self.open_connections: dict[Any, None] = {}  # oldest first
        self.num_surplus = 0  # connections closed because there were too many
        self._predict, self._about, self._only_local_hosts = predict, about, only_local_hosts
        rates = limits.client_requests_per_second, limits.client_burst, limits.client_concurrent
        self._clients = Clients(digests or {}, *rates)
        self._metrics = Metrics()
        self._prediction_lock = asyncio.Lock()  # one prediction uses all cores
        self._num_waiting = 0
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; no exception leaves it."""
        start, request, response = time.perf_counter(), Request(scope, receive), None
        request.state.client = (request.client.host if request.client else "?")[:MAX_ADDRESS]
        request.state.received_bytes = 0
        try:
            response = await self._respond(request)
        except RequestError as error:
            response = error.response
        except ClientDisconnect:
            pass
        except Exception:
            LOG.exception("the server failed")
            response = RequestError(500, "INTERNAL_ERROR", "the server failed; see its log").response
        if response is not None:
            await self._send(response, send)
        self._record(request, response, time.perf_counter() - start)

    async def _respond(self, request: Request) -> Response:
        if self._only_local_hosts:
            check_host(request.headers.get("host"))
        path = request.scope["path"]
        if path not in METHODS:
            raise RequestError(404, "ENDPOINT_NOT_FOUND", f"path: expected one of {', '.join(METHODS)}")
        if request.method != METHODS[path]:
            raise RequestError(405, "BAD_REQUEST", f"method: expected {METHODS[path]}", Allow=METHODS[path])
        if path not in OPEN_PATHS:
            request.state.client = self._clients.identify(request.headers, request.state.client)
        match path:
            case "/ping":
                return Response("\n", media_type="application/json")
            case "/health":
                return json_response({"status": "ok", "model": self._about["uri"]})
            case "/ready":
                is_ready = not self.is_draining
                return json_response({"status": "ready" if is_ready else "stopping"}, 200 if is_ready else 503)
            case "/version":
                return json_response(self._about)
            case "/metrics":
                return Response(self._render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")
        with self._clients.limit(request.state.client):
            return await self._invoke(request)

    async def _invoke(self, request: Request) -> Response:
        _check_content_type(request.headers.get("content-type"))
        accepted = request.headers.get("accept", "").split(",")
        as_png = any(kind.partition(";")[0].strip() == "image/png" for kind in accepted)
        self._check_queue()
        body = bytearray()
        try:
            await self._read_body(request, body)
            return await self._predict_with_deadline(bytes(body), as_png, request)
        finally:
            self._held_bytes -= len(body)
            request.state.received_bytes = len(body)

    def _check_queue(self) -> None:
        if self._num_waiting >= self.limits.waiting:
            raise busy(f"{self._num_waiting} requests are waiting")

    async def _predict_with_deadline(self, body: bytes, as_png: bool, request: Request) -> Response:
        """The prediction, unless the deadline passes or the client disconnects."""
        self._check_queue()  # a second time: requests do not count while their bodies arrive
        self._num_waiting += 1
        abandoned = threading.Event()
        try:
            prediction = asyncio.create_task(self._predict_locked(body, as_png, abandoned))
            disconnected = asyncio.ensure_future(request.receive())  # after the body only a disconnect can arrive
            seconds = self.limits.answer_seconds
            await asyncio.wait({prediction, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            disconnected.cancel()
            if prediction.done():
                return prediction.result()
            prediction.cancel()
            if disconnected.done():
                raise ClientDisconnect
            message = f"no response within {seconds:g} s; request fewer images, or try again later"
            raise RequestError(504, "DEADLINE_EXCEEDED", message)
        finally:
            abandoned.set()
            self._num_waiting -= 1

    async def _read_body(self, request: Request, body: bytearray) -> None:
        """Append the request's body to `body`; raise if it is too large or does not arrive in time."""
        limits = self.limits
        too_large = RequestError(413, "BAD_REQUEST", f"body: more than {limits.body_bytes} bytes")
        if int(request.headers.get("content-length", 0)) > limits.body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._held_bytes += len(chunk)
                    if len(body) > limits.body_bytes:
                        raise too_large
                    self._check_memory()
        except TimeoutError:
            late = f"body: not complete within {limits.body_seconds:g} s"
            raise RequestError(408, "BAD_REQUEST", late, Connection="close") from None

    def _check_memory(self) -> None:
        if self._held_bytes > self.limits.held_bytes:
            raise busy("requests and responses fill its memory")

    async def _predict_locked(self, body: bytes, as_png: bool, abandoned: threading.Event) -> Response:
        """Wait for the lock and predict in a thread.

        If it is cancelled while it waits, it leaves the queue. If it is cancelled later, the model stops when it next
        reads `abandoned`, and the lock is released when the thread ends.
        """

        def predict() -> Response:
            self._check_memory()
            return self._predict(body, as_png, abandoned.is_set)

        await self._prediction_lock.acquire()
        prediction = asyncio.create_task(asyncio.to_thread(predict))
        prediction.add_done_callback(self._release_lock)
        return await asyncio.shield(prediction)

    def _release_lock(self, prediction: asyncio.Task[Response]) -> None:
        self._prediction_lock.release()
        if not prediction.cancelled():
            prediction.exception()  # asyncio logs an exception that nobody has looked at

    async def _send(self, response: Response, send: Send) -> None:
        """Send in chunks, as fast as the client reads; give up if that takes too long."""
        body = bytes(response.body)
        if self.is_draining:
            response.headers["Connection"] = "close"
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        self._held_bytes += len(body)
        try:
            async with asyncio.timeout(self.limits.send_seconds):
                await send(start)
                for first in range(0, len(body), CHUNK_BYTES):
                    chunk = body[first : first + CHUNK_BYTES]
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            LOG.warning("a client did not read its response within %g s", self.limits.send_seconds)
        finally:
            self._held_bytes -= len(body)

    def _render_metrics(self) -> str:
        gauges = {
            "connections": len(self.open_connections),
            "waiting_requests": self._num_waiting,
            "held_bytes": self._held_bytes,
            "ready": not self.is_draining,
        }
        return self._metrics.render(gauges, {"surplus_connections": self.num_surplus}, self._about["uri"])

    def _record(self, request: Request, response: Response | None, seconds: float) -> None:
        """Count the request, and log it without any content, which may identify a patient."""
        status, sent_bytes = (0, 0) if response is None else (response.status_code, len(response.body))
        path = request.scope["path"] if request.scope["path"] in METHODS else "other"
        counts = {
            "received_bytes": request.state.received_bytes,
            "sent_bytes": sent_bytes,
            "images": response.num_images if isinstance(response, ImagesResponse) else 0,
        }
        self._metrics.count(path, status, seconds, **counts)
        who = {"client": request.state.client, "method": request.method if path != "other" else "other"}
        line = {**who, "path": path, "status": status, "seconds": round(seconds, 4), **counts}
        LOG.info("request", extra={"request": line})


def _check_content_type(text: str | None) -> None:
    kind, _, parameters = (text or "missing").partition(";")
    is_utf_8 = parameters.strip().lower().replace('"', "") in ("", "charset=utf-8")
    if kind.strip().lower() != "application/json" or not is_utf_8:
        message = f"content-type: found {text[:60] if text else 'none'}; expected application/json"
        raise RequestError(415, "BAD_REQUEST", message)
