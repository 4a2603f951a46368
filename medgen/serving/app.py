"""HTTP server of one model folder: MLflow's scoring server with limits. `medgen serve` starts it.

    python -P medgen/serving/app.py FOLDER --temporary FOLDER --fd 3 --about '{"uri": "models:/medgen/3", …}'

It imports no medgen module, so that the model runs with the medgen code in its own folder. -P keeps the modules next to
this file from hiding others of the same name.
"""

import argparse
import asyncio
import gc
import io
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import uvicorn
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR
from mlflow.pyfunc import PyFuncModel, scoring_server
from mlflow.version import VERSION
from numpy.typing import NDArray
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]

METHODS = {"/invocations": "POST", "/ping": "GET", "/health": "GET", "/version": "GET"}
FORMATS = ("dataframe_records", "dataframe_split", "inputs", "instances")  # of MLflow's protocol
IDLE_SECONDS = 10.0  # after which a connection without a request is closed
STOP_SECONDS = 10  # for responses in progress when the server stops
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}
MAX_ROWS = 1024  # of a table: MLflow checks each value in Python
MAX_MESSAGE = 400  # characters
CHUNK_BYTES = 2**16  # written to the connection at once, and so the most that is buffered for a slow client
SHEET_GAP = 2  # pixels between the images of a contact sheet
LOG = logging.getLogger("medgen.serving.app")


@dataclass(frozen=True)
class Limits:
    """Limits that keep one client from blocking the others."""

    body_bytes: int = 16 * 2**20
    body_seconds: float = 20.0
    waiting: int = 128  # requests, with the one in progress
    held_bytes: int = 256 * 2**20  # of all bodies and responses together
    answer_seconds: float = 60.0
    send_seconds: float = 60.0


@dataclass(frozen=True)
class Response:
    """A complete HTTP response."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


class RequestError(Exception):
    """A request that is answered with an error; `error_code` is one of MLflow's."""

    def __init__(self, status: int, error_code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        body = json.dumps({"error_code": error_code, "message": message}).encode()
        self.response = Response(status, body, headers={name.replace("_", "-"): text for name, text in headers.items()})


class ClientDisconnected(Exception):
    """The client has closed the connection."""


@dataclass
class PredictionRequest:
    """State of the request whose prediction is in progress."""

    as_png: bool
    is_parsed: bool = False  # the body was accepted, so later errors are the server's
    response: Response | None = None  # replaces MLflow's response, which converts images to JSON slowly


CURRENT_REQUEST: ContextVar[PredictionRequest] = ContextVar("request")


class ServedModel:
    """A loaded model with the interface that MLflow's scoring server calls."""

    def __init__(self, model: PyFuncModel) -> None:
        self.metadata = model.metadata
        self._model = model
        schema: Any = model.metadata.get_input_schema()  # type: ignore[no-untyped-call]
        self._takes_tensors = schema is not None and schema.is_tensor_spec()
        self._columns = schema.input_names() if schema is not None and schema.has_input_names() else None

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """The model's prediction; images are stored in the current request as JSON or PNG.

        Raises:
            MlflowException: from the model, or INTERNAL_ERROR for any other exception of the model.
        """
        request = CURRENT_REQUEST.get()
        request.is_parsed = True
        self._check_table(data)
        try:
            prediction: Any = self._model.predict(data, params=params)
        except MlflowException:
            raise
        except Exception:
            LOG.exception("the model failed")
            raise MlflowException("the model failed; see the server's log", INTERNAL_ERROR) from None
        if not isinstance(prediction, np.ndarray) or prediction.dtype != np.uint8 or prediction.ndim != 4:
            if request.as_png:
                message = "accept: this model's prediction is not an image; request JSON"
                raise MlflowException.invalid_parameter_value(message)
            return prediction
        if not request.as_png:
            request.response = Response(200, json.dumps({"predictions": prediction.tolist()}).encode())
            return None
        if self._takes_tensors:  # class numbers, spread over the grey levels to make them visible
            prediction = prediction * np.uint8(255 // max(1, int(prediction.max())))
        request.response = Response(200, contact_sheet(prediction), "image/png")
        return None

    def _check_table(self, data: Any) -> None:
        """Raise an error for unknown columns, which MLflow would drop: a misspelt label would count as no label."""
        if self._columns is None:
            return
        try:
            table = pd.DataFrame(data)
        except Exception:
            message = f"rows: not a table with the columns {', '.join(self._columns)}"
            raise MlflowException.invalid_parameter_value(message) from None
        if len(table) > MAX_ROWS:
            raise MlflowException.invalid_parameter_value(f"rows: found {len(table)}; expected 1 to {MAX_ROWS}")
        if unknown := sorted({str(name) for name in table.columns} - set(self._columns)):
            message = f"{unknown[0][:40]}: unknown column; expected {', '.join(self._columns)}"
            raise MlflowException.invalid_parameter_value(message)


def contact_sheet(images: NDArray[np.uint8]) -> bytes:
    """A PNG file of images (N, H, W, 1 or 3), row by row in a grid with about as many rows as columns."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    shape = (rows * (height + SHEET_GAP) - SHEET_GAP, columns * (width + SHEET_GAP) - SHEET_GAP, channels)
    sheet = np.full(shape, 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + SHEET_GAP), number % columns * (width + SHEET_GAP)
        sheet[top : top + height, left : left + width] = image
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(file, "PNG")
    return file.getvalue()


class LimitMiddleware:
    """ASGI middleware: passes complete requests to MLflow's app one at a time and enforces the limits."""

    def __init__(self, app: AsgiApp, about: dict[str, Any], limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._pages = {"/health": {"status": "ok", "model": about["uri"]}, "/version": about}
        self._prediction_lock = asyncio.Semaphore(1)  # one prediction uses all cores
        self._num_waiting = 0
        self._held_bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; no exception leaves it."""
        start = time.perf_counter()
        try:
            response = await self._respond(scope, receive)
        except RequestError as error:
            response = error.response
        except ClientDisconnected:
            response = None
        except Exception:
            LOG.exception("the server failed")
            response = _internal_error().response
        if response is not None:
            await self._send(response, send)
        self._log(scope, response, time.perf_counter() - start)

    async def _respond(self, scope: Message, receive: Receive) -> Response:
        path = scope["path"]
        if path not in METHODS:
            raise RequestError(404, "ENDPOINT_NOT_FOUND", f"path: expected one of {', '.join(METHODS)}")
        if scope["method"] != METHODS[path]:
            raise RequestError(405, "BAD_REQUEST", f"method: expected {METHODS[path]}", Allow=METHODS[path])
        if path == "/invocations":
            return await self._invoke(scope, receive)
        if path in self._pages:
            return Response(200, json.dumps(self._pages[path]).encode())
        return await self._call(scope, b"")

    async def _invoke(self, scope: Message, receive: Receive) -> Response:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        _check_content_type(headers.get("content-type"))
        as_png = any(kind.partition(";")[0].strip() == "image/png" for kind in headers.get("accept", "").split(","))
        self._check_queue()
        body = bytearray()
        try:
            await self._read_body(headers, receive, body)
            return await self._predict_with_deadline(bytes(body), PredictionRequest(as_png), receive)
        finally:
            self._held_bytes -= len(body)

    def _check_queue(self) -> None:
        if self._num_waiting >= self._limits.waiting:
            raise _busy(f"{self._num_waiting} requests are waiting")

    async def _predict_with_deadline(self, body: bytes, request: PredictionRequest, receive: Receive) -> Response:
        """The prediction, unless the deadline passes or the client disconnects."""
        self._check_queue()  # a second time: requests do not count while their bodies arrive
        self._num_waiting += 1
        try:
            prediction = asyncio.create_task(self._predict_locked(body, request))
            disconnected = asyncio.ensure_future(receive())  # after the body the only message is a disconnect
            seconds = self._limits.answer_seconds
            await asyncio.wait({prediction, disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            disconnected.cancel()
            if prediction.done():
                return prediction.result()
            prediction.cancel()
            if disconnected.done():
                raise ClientDisconnected
            message = f"no response within {seconds:g} s; request fewer images, or try again later"
            raise RequestError(504, "DEADLINE_EXCEEDED", message)
        finally:
            self._num_waiting -= 1

    async def _read_body(self, headers: dict[str, str], receive: Receive, body: bytearray) -> None:
        """Append the request's body to `body`; raise if it is too large or does not arrive in time."""
        limits = self._limits
        too_large = RequestError(413, "BAD_REQUEST", f"body: more than {limits.body_bytes} bytes")
        if int(headers.get("content-length", 0)) > limits.body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    chunk = message.get("body", b"")
                    body += chunk
                    self._held_bytes += len(chunk)
                    if len(body) > limits.body_bytes:
                        raise too_large
                    self._check_memory()
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"body: not complete within {limits.body_seconds:g} s"
            raise RequestError(408, "BAD_REQUEST", late, Connection="close") from None

    def _check_memory(self) -> None:
        if self._held_bytes > self._limits.held_bytes:
            raise _busy("requests and responses fill its memory")

    async def _predict_locked(self, body: bytes, request: PredictionRequest) -> Response:
        """Wait for the lock and predict.

        If it is cancelled while it waits, it leaves the queue. If it is cancelled later, the prediction's thread cannot
        be stopped, and the lock is released when the thread ends.
        """
        await self._prediction_lock.acquire()
        prediction = asyncio.create_task(self._predict(body, request))
        prediction.add_done_callback(self._release_lock)
        return await asyncio.shield(prediction)

    def _release_lock(self, prediction: "asyncio.Task[Response]") -> None:
        self._prediction_lock.release()
        if not prediction.cancelled():
            prediction.exception()  # marks it as retrieved: after a timeout no other code does

    async def _predict(self, body: bytes, request: PredictionRequest) -> Response:
        self._check_memory()
        await asyncio.to_thread(check_body, body)
        CURRENT_REQUEST.set(request)
        scope = {"type": "http", "method": "POST", "path": "/invocations", "raw_path": b"/invocations"}
        scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1"}
        try:
            response = await self._call(scope, body)
        except RecursionError:
            raise _bad_body("nested too deeply") from None
        except Exception:
            if request.is_parsed:
                raise
            raise _bad_body(f"not valid as {' or '.join(FORMATS)}") from None
        if response.status != 200:
            raise _mlflow_error(response)
        return request.response or response

    async def _call(self, scope: Message, body: bytes) -> Response:
        """The response of MLflow's app to a request with this body."""
        messages: list[Message] = []
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if request:
                return request.pop()
            return await asyncio.Future()  # never reports a disconnect, since MLflow cannot stop its thread

        async def send(message: Message) -> None:
            messages.append(message)

        await self._app(scope, receive, send)
        return Response(messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:]))

    async def _send(self, response: Response, send: Send) -> None:
        """Send in chunks, as fast as the client reads; give up if that takes too long."""
        headers = {"content-type": response.media_type, "content-length": str(len(response.body)), **response.headers}
        pairs = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
        self._held_bytes += len(response.body)
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await send({"type": "http.response.start", "status": response.status, "headers": pairs})
                for start in range(0, len(response.body), CHUNK_BYTES):
                    chunk = response.body[start : start + CHUNK_BYTES]
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            LOG.warning("a client did not read its response within %g s", self._limits.send_seconds)
        finally:
            self._held_bytes -= len(response.body)

    def _log(self, scope: Message, response: Response | None, seconds: float) -> None:
        """Log one line without any content of the request, which may identify a patient."""
        client = (scope.get("client") or ("?",))[0]
        path = scope["path"] if scope["path"] in METHODS else "(unknown path)"
        result = "no response" if response is None else f"{response.status} {len(response.body)} bytes"
        LOG.info("%s %s %s %.0f ms", client, path, result, 1000 * seconds)


def check_body(body: bytes) -> None:
    """Reject bodies to which MLflow's server would respond with a stack trace or with the body itself.

    Raises:
        RequestError: the body is not a JSON object of MLflow's protocol.
    """
    try:
        tree = json.loads(body.decode(), parse_constant=_parse_finite, parse_float=_parse_finite)
    except UnicodeDecodeError as error:
        raise _bad_body(f"not UTF-8 (at byte {error.start})") from None
    except RecursionError:
        raise _bad_body("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _bad_body(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise _bad_body("a number is not finite or has too many digits") from None
    if not isinstance(tree, dict):
        raise _bad_body('expected an object such as {"dataframe_records": [{"n": 1}]}')
    if sum(name in tree for name in FORMATS) != 1 or set(tree) - {*FORMATS, "params"}:
        raise _bad_body(f"expected one of the fields {', '.join(FORMATS)}, and no other")
    if not isinstance(tree.get("params"), dict | None):
        raise _bad_body("params: expected an object")


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _check_content_type(text: str | None) -> None:
    kind, _, parameters = (text or "missing").partition(";")
    is_utf_8 = parameters.strip().lower().replace('"', "") in ("", "charset=utf-8")
    if kind.strip().lower() != "application/json" or not is_utf_8:
        message = f"content-type: found {text[:60] if text else 'none'}; expected application/json"
        raise RequestError(415, "BAD_REQUEST", message)


def _bad_body(reason: str) -> RequestError:
    return RequestError(400, "BAD_REQUEST", f"body: {reason}")


def _busy(reason: str) -> RequestError:
    return RequestError(503, "TEMPORARILY_UNAVAILABLE", f"busy: {reason}; try again", Retry_After="5")


def _internal_error(status: int = 500) -> RequestError:
    return RequestError(status, "INTERNAL_ERROR", "the server failed; see its log")


def _mlflow_error(response: Response) -> RequestError:
    """The error of MLflow's app without the request, which it puts before the message, and without the stack trace."""
    try:
        values = json.loads(response.body)
        error_code, message = str(values["error_code"]), str(values["message"])
    except (ValueError, TypeError, KeyError):
        return _internal_error(response.status)
    if message.startswith("Failed to"):
        message = message.rpartition("Error: ")[2]
    message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
    return RequestError(response.status, error_code, message)


class Protocol(H11Protocol):
    """HTTP protocol that closes idle connections, also those that keep sending a rejected body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the check."""
        super().connection_made(transport)
        self.loop.call_later(IDLE_SECONDS, self._close_if_idle, self.cycle)

    def _close_if_idle(self, earlier_cycle: object) -> None:
        if self.transport.is_closing():
            return
        is_responding = self.cycle is not None and not self.cycle.response_complete
        if not is_responding and self.cycle is earlier_cycle:  # no request has begun since the last check
            self.transport.close()
        else:
            self.loop.call_later(IDLE_SECONDS, self._close_if_idle, self.cycle)


class Server(uvicorn.Server):
    """uvicorn server that prints a message when it is ready."""

    def __init__(self, config: uvicorn.Config, ready_message: str) -> None:
        super().__init__(config)
        self._ready_message = ready_message

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen and print the message."""
        await super().startup(sockets)
        print(self._ready_message, flush=True)


def main() -> None:
    """Serve until a signal ends it, and remove the temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the version's files")
    parser.add_argument("--temporary", type=Path, required=True, help="the folder to remove at the end")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--about", type=json.loads, required=True, help="the content of /version, as JSON")
    arguments = parser.parse_args()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        shutil.rmtree(arguments.temporary, ignore_errors=True)
        os._exit(EXIT_CODES[number])  # does not wait for a prediction's thread: uvicorn has waited STOP_SECONDS

    for number in EXIT_CODES:
        signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)  # `medgen serve` blocked them
    try:
        serve(arguments.folder, arguments.about, socket.socket(fileno=arguments.fd))
    finally:
        shutil.rmtree(arguments.temporary, ignore_errors=True)


def serve(folder: Path, about: dict[str, Any], listener: socket.socket) -> None:
    """Load the model and serve it on the listening socket."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    LOG.setLevel(logging.INFO)
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # its warnings contain parts of requests
    # MLflow's own timeout would respond early and lose track of the thread that still runs.
    os.environ["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] = str(24 * 60 * 60)
    model = mlflow.pyfunc.load_model(str(folder))
    about = {**about, "medgen": _medgen_version(folder), "mlflow": VERSION}
    gc.freeze()  # excludes the loaded objects from garbage collection, which a large response would trigger
    app = LimitMiddleware(scoring_server.init(ServedModel(model)), about, Limits())  # type: ignore[arg-type]
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    Server(config, f"{about['uri']} on http://{address} (Ctrl-C ends it)").run(sockets=[listener])


def _medgen_version(folder: Path) -> str:
    """The version of the loaded medgen package; exits if the package is not the one in the model's folder."""
    medgen = sys.modules.get("medgen")
    file = None if medgen is None else medgen.__file__
    if medgen is None or file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
        sys.exit(f"error: {folder}: the model uses {file or 'no medgen'}; expected the medgen code in this folder")
    return str(medgen.__version__)


if __name__ == "__main__":
    main()
