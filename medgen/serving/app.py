"""HTTP server of one model folder: MLflow's scoring protocol with limits. `medgen serve` starts it.

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import mlflow
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import uvicorn
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from mlflow.version import VERSION
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

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


class RequestError(Exception):
    """A request that is answered with an error; `error_code` is one of MLflow's."""

    def __init__(self, status: int, error_code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self.response = _json_response({"error_code": error_code, "message": message}, status, named)


class ServedModel:
    """A loaded model that answers requests of MLflow's protocol."""

    def __init__(self, model: PyFuncModel) -> None:
        self._model = model
        self._schema: Any = model.metadata.get_input_schema()  # type: ignore[no-untyped-call]

    def respond(self, body: bytes, as_png: bool) -> Response:
        """The model's images for a request's body, as JSON or PNG.

        Raises:
            RequestError: the body is invalid.
            Exception: the model failed.
        """
        tree = parse_body(body)
        params = tree.pop("params", None)
        try:
            data = scoring_server.infer_and_parse_data(tree, self._schema)
        except MlflowException as error:
            raise _mlflow_error(error) from None
        except Exception:
            raise _bad_body(f"not valid as {' or '.join(FORMATS)}") from None
        if self._schema.has_input_names():
            _check_table(data, self._schema.input_names())
        try:
            images: NDArray[np.uint8] = self._model.predict(data, params=params)  # (N, H, W, C)
        except MlflowException as error:
            raise _mlflow_error(error) from None
        if not as_png:
            return _json_response({"predictions": images.tolist()})
        if self._schema.is_tensor_spec():  # class numbers, spread over the grey levels to make them visible
            images = images * np.uint8(255 // max(1, int(images.max())))
        return Response(contact_sheet(images), media_type="image/png")


def contact_sheet(images: NDArray[np.uint8]) -> bytes:
    """A PNG file of images (N, H, W, 1 or 3), row by row in a grid with about as many rows as columns."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    tiles = np.full((rows * columns, height + SHEET_GAP, width + SHEET_GAP, channels), 255, np.uint8)
    tiles[:n, :height, :width] = images
    grid = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)  # (rows, H + gap, columns, W + gap, C)
    sheet = grid.reshape(rows * tiles.shape[1], columns * tiles.shape[2], channels)[:-SHEET_GAP, :-SHEET_GAP]
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(file, "PNG")
    return file.getvalue()


class App:
    """ASGI application: passes complete bodies to a model one at a time and enforces the limits.

    Args:
        predict: responds to a body, as PNG if the second argument is True; called in a thread.
        about: the content of /version.
    """

    def __init__(self, predict: Callable[[bytes, bool], Response], about: dict[str, Any], limits: Limits) -> None:
        self._predict, self._limits = predict, limits
        self._pages = {
            "/ping": Response("\n", media_type="application/json"),
            "/health": _json_response({"status": "ok", "model": about["uri"]}),
            "/version": _json_response(about),
        }
        self._prediction_lock = asyncio.Lock()  # one prediction uses all cores
        self._num_waiting = 0
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; no exception leaves it."""
        start, request, response = time.perf_counter(), Request(scope, receive), None
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
        _log(request, response, time.perf_counter() - start)

    async def _respond(self, request: Request) -> Response:
        path = request.scope["path"]
        if path not in METHODS:
            raise RequestError(404, "ENDPOINT_NOT_FOUND", f"path: expected one of {', '.join(METHODS)}")
        if request.method != METHODS[path]:
            raise RequestError(405, "BAD_REQUEST", f"method: expected {METHODS[path]}", Allow=METHODS[path])
        return self._pages[path] if path in self._pages else await self._invoke(request)

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

    def _check_queue(self) -> None:
        if self._num_waiting >= self._limits.waiting:
            raise _busy(f"{self._num_waiting} requests are waiting")

    async def _predict_with_deadline(self, body: bytes, as_png: bool, request: Request) -> Response:
        """The prediction, unless the deadline passes or the client disconnects."""
        self._check_queue()  # a second time: requests do not count while their bodies arrive
        self._num_waiting += 1
        try:
            prediction = asyncio.create_task(self._predict_locked(body, as_png))
            disconnected = asyncio.ensure_future(request.receive())  # after the body only a disconnect can arrive
            seconds = self._limits.answer_seconds
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
            self._num_waiting -= 1

    async def _read_body(self, request: Request, body: bytearray) -> None:
        """Append the request's body to `body`; raise if it is too large or does not arrive in time."""
        limits = self._limits
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
        if self._held_bytes > self._limits.held_bytes:
            raise _busy("requests and responses fill its memory")

    async def _predict_locked(self, body: bytes, as_png: bool) -> Response:
        """Wait for the lock and predict in a thread.

        If it is cancelled while it waits, it leaves the queue. If it is cancelled later, the prediction's thread cannot
        be stopped, and the lock is released when the thread ends.
        """

        def predict() -> Response:
            self._check_memory()
            return self._predict(body, as_png)

        await self._prediction_lock.acquire()
        prediction = asyncio.create_task(asyncio.to_thread(predict))
        prediction.add_done_callback(lambda _: self._prediction_lock.release())
        return await asyncio.shield(prediction)

    async def _send(self, response: Response, send: Send) -> None:
        """Send in chunks, as fast as the client reads; give up if that takes too long."""
        body = bytes(response.body)
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        self._held_bytes += len(body)
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await send(start)
                for first in range(0, len(body), CHUNK_BYTES):
                    chunk = body[first : first + CHUNK_BYTES]
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            LOG.warning("a client did not read its response within %g s", self._limits.send_seconds)
        finally:
            self._held_bytes -= len(body)


def _log(request: Request, response: Response | None, seconds: float) -> None:
    """Log one line without any content of the request, which may identify a patient."""
    client = request.client.host if request.client else "?"
    path = request.scope["path"] if request.scope["path"] in METHODS else "(unknown path)"
    result = "no response" if response is None else f"{response.status_code} {len(response.body)} bytes"
    LOG.info("%s %s %s %.0f ms", client, path, result, 1000 * seconds)


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; rejects what MLflow would answer with a stack trace or with the body itself.

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
    return tree


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _check_table(data: Any, columns: list[str]) -> None:
    """Raise an error for unknown columns, which MLflow would drop: a misspelt label would count as no label."""
    try:
        table = pd.DataFrame(data)
    except Exception:
        raise _invalid(f"rows: not a table with the columns {', '.join(columns)}") from None
    if len(table) > MAX_ROWS:
        raise _invalid(f"rows: found {len(table)}; expected 1 to {MAX_ROWS}")
    if unknown := sorted({str(name) for name in table.columns} - set(columns)):
        raise _invalid(f"{unknown[0][:40]}: unknown column; expected {', '.join(columns)}")


def _check_content_type(text: str | None) -> None:
    kind, _, parameters = (text or "missing").partition(";")
    is_utf_8 = parameters.strip().lower().replace('"', "") in ("", "charset=utf-8")
    if kind.strip().lower() != "application/json" or not is_utf_8:
        message = f"content-type: found {text[:60] if text else 'none'}; expected application/json"
        raise RequestError(415, "BAD_REQUEST", message)


def _json_response(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(tree), status, headers, "application/json")


def _invalid(message: str) -> RequestError:
    return RequestError(400, "INVALID_PARAMETER_VALUE", message)


def _bad_body(reason: str) -> RequestError:
    return RequestError(400, "BAD_REQUEST", f"body: {reason}")


def _busy(reason: str) -> RequestError:
    return RequestError(503, "TEMPORARILY_UNAVAILABLE", f"busy: {reason}; try again", Retry_After="5")


def _mlflow_error(error: MlflowException) -> RequestError:
    """The error of MLflow or the model without the request, which MLflow puts before the message."""
    message = error.message.rpartition("Error: ")[2] if error.message.startswith("Failed to") else error.message
    message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
    status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return RequestError(status, error.error_code, message)


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
    model = mlflow.pyfunc.load_model(str(folder))
    about = {**about, "medgen": _medgen_version(folder), "mlflow": VERSION}
    gc.freeze()  # excludes the loaded objects from garbage collection, which a large response would trigger
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"{about['uri']} on http://{address} (Ctrl-C ends it)", flush=True)  # its backlog takes requests already
    config = uvicorn.Config(
        App(ServedModel(model).respond, about, Limits()),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _medgen_version(folder: Path) -> str:
    """The version of the loaded medgen package; exits if the package is not the one in the model's folder."""
    medgen = sys.modules.get("medgen")
    file = None if medgen is None else medgen.__file__
    if medgen is None or file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
        sys.exit(f"error: {folder}: the model uses {file or 'no medgen'}; expected the medgen code in this folder")
    return str(medgen.__version__)


if __name__ == "__main__":
    main()
