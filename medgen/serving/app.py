"""MLflow's scoring server of one model folder, behind limits: what `medgen serve` becomes.

    python -P medgen/serving/app.py FOLDER --temporary FOLDER --fd 3 --about '{"uri": "models:/medgen/3", …}'

No medgen module is imported here, so that the version's own medgen, which it brings in its folder, does the work; -P
keeps the modules beside this one from hiding others of the same name.
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
App = Callable[[Message, Receive, Send], Awaitable[None]]

METHODS = {"/invocations": "POST", "/ping": "GET", "/health": "GET", "/version": "GET"}
FORMATS = ("dataframe_records", "dataframe_split", "inputs", "instances")  # of MLflow's protocol
HEAD_SECONDS = 10.0  # for a request to begin
STOP_SECONDS = 10  # for answers that are under way when the server ends
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}
MAX_ROWS = 1024  # of a table: MLflow looks at each value in Python
MAX_REASON = 400  # letters
CHUNK = 2**16  # bytes handed to the connection at once: only so much of an answer waits there for a slow reader
GAP = 2  # pixels between the pictures of a sheet
LOG = logging.getLogger("medgen.serving.app")


@dataclass(frozen=True)
class Limits:
    """What one client may take from the others."""

    body_bytes: int = 16 * 2**20
    body_seconds: float = 20.0
    waiting: int = 128  # requests, the one that is worked on included
    held_bytes: int = 256 * 2**20  # of all bodies and answers together
    answer_seconds: float = 60.0
    send_seconds: float = 60.0


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """A request that is not answered, and why; `error_code` is one of MLflow's."""

    def __init__(self, status: int, error_code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        body = json.dumps({"error_code": error_code, "message": message}).encode()
        self.answer = Answer(status, body, headers={name.replace("_", "-"): text for name, text in headers.items()})


class ClientGone(Exception):
    """Nobody waits for the answer."""


@dataclass
class Job:
    """The request that a prediction is made for."""

    as_png: bool
    begun: bool = False  # the body was understood: what goes wrong from here on is not the client's fault
    answer: Answer | None = None  # in place of MLflow's, which writes its JSON number by number in Python


JOB: ContextVar[Job] = ContextVar("job")


class Served:
    """A loaded model as MLflow's server calls it."""

    def __init__(self, model: PyFuncModel) -> None:
        self.metadata = model.metadata
        self._model = model
        schema: Any = model.metadata.get_input_schema()  # type: ignore[no-untyped-call]
        self._takes_tensors = schema is not None and schema.is_tensor_spec()
        self._columns = schema.input_names() if schema is not None and schema.has_input_names() else None

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """The model's answer; images are left in the job, as JSON or `as_png`.

        Raises:
            MlflowException: of the model, or INTERNAL_ERROR for whatever else it raises.
        """
        job = JOB.get()
        job.begun = True
        self._check_table(data)
        try:
            answer: Any = self._model.predict(data, params=params)
        except MlflowException:
            raise
        except Exception:
            LOG.exception("the model failed")
            raise MlflowException("the model failed; the server's log says why", INTERNAL_ERROR) from None
        if not isinstance(answer, np.ndarray) or answer.dtype != np.uint8 or answer.ndim != 4:
            if job.as_png:
                raise MlflowException.invalid_parameter_value("accept: this model's answer is no picture; ask for JSON")
            return answer
        if not job.as_png:
            job.answer = Answer(200, json.dumps({"predictions": answer.tolist()}).encode())
        elif self._takes_tensors:  # its answer are class numbers, which nobody could tell apart as they are
            job.answer = Answer(200, contact_sheet(answer * np.uint8(255 // max(1, int(answer.max())))), "image/png")
        else:
            job.answer = Answer(200, contact_sheet(answer), "image/png")
        return None

    def _check_table(self, data: Any) -> None:
        """MLflow leaves out columns a model does not know: a mistyped label would be answered as if there was none."""
        if self._columns is None:
            return
        try:
            table = pd.DataFrame(data)
        except Exception:
            raise MlflowException.invalid_parameter_value(f"rows: no table of {', '.join(self._columns)}") from None
        if len(table) > MAX_ROWS:
            raise MlflowException.invalid_parameter_value(f"rows: found {len(table)}; expected 1 to {MAX_ROWS}")
        if unknown := sorted({str(name) for name in table.columns} - set(self._columns)):
            message = f"{unknown[0][:40]}: unknown column; expected {', '.join(self._columns)}"
            raise MlflowException.invalid_parameter_value(message)


def contact_sheet(images: NDArray[np.uint8]) -> bytes:
    """Images (N, H, W, 1 or 3) -> a PNG file of all, row by row in a grid about as wide as high."""
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    sheet = np.full(shape, 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(file, "PNG")
    return file.getvalue()


class Gateway:
    """The ASGI application: what it lets through to MLflow's comes whole, in turn, and is answered in time."""

    def __init__(self, app: App, about: dict[str, Any], limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._pages = {"/health": {"status": "ok", "model": about["uri"]}, "/version": about}
        self._turn = asyncio.Semaphore(1)  # torch has all cores for one prediction already
        self._num_waiting = 0
        self._held = 0  # bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request; nothing that happens within ends the server."""
        start = time.perf_counter()
        try:
            answer = await self._answer(scope, receive)
        except Refusal as refusal:
            answer = refusal.answer
        except ClientGone:
            answer = None
        except Exception:
            LOG.exception("the gateway failed")
            answer = Refusal(500, "INTERNAL_ERROR", "the server failed; its log says why").answer
        if answer is not None:
            await self._send(answer, send)
        self._log(scope, answer, time.perf_counter() - start)

    async def _answer(self, scope: Message, receive: Receive) -> Answer:
        path = scope["path"]
        if path not in METHODS:
            raise Refusal(404, "ENDPOINT_NOT_FOUND", f"path: expected one of {', '.join(METHODS)}")
        if scope["method"] != METHODS[path]:
            raise Refusal(405, "BAD_REQUEST", f"method: expected {METHODS[path]}", Allow=METHODS[path])
        if path == "/invocations":
            return await self._invoke(scope, receive)
        if path in self._pages:
            return Answer(200, json.dumps(self._pages[path]).encode())
        return await self._call(scope, b"")

    async def _invoke(self, scope: Message, receive: Receive) -> Answer:
        """One prediction, when its turn has come."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        _check_content_type(headers.get("content-type"))
        as_png = any(kind.partition(";")[0].strip() == "image/png" for kind in headers.get("accept", "").split(","))
        self._check_room()
        body = bytearray()
        try:
            await self._read(headers, receive, body)
            return await self._wait_for(bytes(body), Job(as_png), receive)
        finally:
            self._held -= len(body)

    def _check_room(self) -> None:
        if self._num_waiting >= self._limits.waiting:
            raise _busy(f"{self._num_waiting} requests are waiting")

    async def _wait_for(self, body: bytes, job: Job, receive: Receive) -> Answer:
        """The prediction, unless it is late or the client leaves."""
        self._check_room()  # again: bodies that dribble in take nobody's place
        self._num_waiting += 1
        try:
            work = asyncio.create_task(self._predict_in_turn(body, job))
            gone = asyncio.ensure_future(receive())  # after the body nothing comes but the client's leaving
            seconds = self._limits.answer_seconds
            await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if work.done():
                return work.result()
            work.cancel()
            if gone.done():
                raise ClientGone
            raise Refusal(504, "DEADLINE_EXCEEDED", f"no answer within {seconds:g} s; ask for fewer images, or later")
        finally:
            self._num_waiting -= 1

    async def _read(self, headers: dict[str, str], receive: Receive, body: bytearray) -> None:
        """Takes the request's body, if it comes whole, in time, and is not too large."""
        limits = self._limits
        too_large = Refusal(413, "BAD_REQUEST", f"body: more than {limits.body_bytes} bytes")
        if int(headers.get("content-length", 0)) > limits.body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk = message.get("body", b"")
                    body += chunk
                    self._held += len(chunk)
                    if len(body) > limits.body_bytes:
                        raise too_large
                    if self._held > limits.held_bytes:
                        raise _busy("requests and answers fill its memory")
                    more = message.get("more_body", False)
        except TimeoutError:
            message_408 = f"body: not here within {limits.body_seconds:g} s"
            raise Refusal(408, "BAD_REQUEST", message_408, Connection="close") from None

    async def _predict_in_turn(self, body: bytes, job: Job) -> Answer:
        """Cancelled while it waits, it leaves the queue; later, the thread goes on and keeps its turn to its end."""
        await self._turn.acquire()
        prediction = asyncio.create_task(self._predict(body, job))
        prediction.add_done_callback(self._end_turn)
        return await asyncio.shield(prediction)

    def _end_turn(self, prediction: "asyncio.Task[Answer]") -> None:
        self._turn.release()
        if not prediction.cancelled():
            prediction.exception()  # looked at: of a request that has its answer already nobody else does

    async def _predict(self, body: bytes, job: Job) -> Answer:
        if self._held > self._limits.held_bytes:
            raise _busy("requests and answers fill its memory")
        await asyncio.to_thread(check_body, body)
        JOB.set(job)
        scope = {"type": "http", "method": "POST", "path": "/invocations", "raw_path": b"/invocations"}
        scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1"}
        try:
            answer = await self._call(scope, body)
        except RecursionError:
            raise _bad("nested too deeply") from None
        except Exception:
            if job.begun:
                raise
            raise _bad(f"not what {' or '.join(FORMATS)} holds") from None
        if answer.status != 200:
            raise _refusal_of(answer)
        return job.answer or answer

    async def _call(self, scope: Message, body: bytes) -> Answer:
        """MLflow's answer to a request whose body is here."""
        messages: list[Message] = []
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if request:
                return request.pop()
            return await asyncio.Future()  # never told that the client has left, as it cannot end its thread

        async def send(message: Message) -> None:
            messages.append(message)

        await self._app(scope, receive, send)
        return Answer(messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:]))

    async def _send(self, answer: Answer, send: Send) -> None:
        """Piece by piece, as fast as the client reads; what it leaves too long is given up."""
        headers = {"content-type": answer.media_type, "content-length": str(len(answer.body)), **answer.headers}
        pairs = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
        self._held += len(answer.body)
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
                for start in range(0, len(answer.body), CHUNK):
                    piece = answer.body[start : start + CHUNK]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            LOG.warning("an answer was not read within %g s", self._limits.send_seconds)
        finally:
            self._held -= len(answer.body)

    def _log(self, scope: Message, answer: Answer | None, seconds: float) -> None:
        """A line that holds nothing of what was sent."""
        client = (scope.get("client") or ("?",))[0]
        path = scope["path"] if scope["path"] in METHODS else "(unknown path)"
        result = "no answer" if answer is None else f"{answer.status} {len(answer.body)} bytes"
        LOG.info("%s %s %s %.0f ms", client, path, result, 1000 * seconds)


def check_body(body: bytes) -> None:
    """Refuses what MLflow's server would answer with a stack trace, or with the body itself.

    Raises:
        Refusal: the body is no JSON object of MLflow's protocol.
    """
    try:
        tree = json.loads(body.decode(), parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise _bad(f"not UTF-8 (at byte {error.start})") from None
    except RecursionError:
        raise _bad("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _bad(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise _bad("a number that is not finite or has too many digits") from None
    if not isinstance(tree, dict):
        raise _bad('expected an object such as {"dataframe_records": [{"n": 1}]}')
    if sum(name in tree for name in FORMATS) != 1 or set(tree) - {*FORMATS, "params"}:
        raise _bad(f"expected one of the fields {', '.join(FORMATS)}, and no other")
    if not isinstance(tree.get("params"), dict | None):
        raise _bad("params: expected an object")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _check_content_type(text: str | None) -> None:
    kind, _, parameters = (text or "missing").partition(";")
    is_utf_8 = parameters.strip().lower().replace('"', "") in ("", "charset=utf-8")
    if kind.strip().lower() != "application/json" or not is_utf_8:
        message = f"content-type: found {text[:60] if text else 'none'}; expected application/json"
        raise Refusal(415, "BAD_REQUEST", message)


def _bad(why: str) -> Refusal:
    return Refusal(400, "BAD_REQUEST", f"body: {why}")


def _busy(why: str) -> Refusal:
    return Refusal(503, "TEMPORARILY_UNAVAILABLE", f"busy: {why}; try again", Retry_After="5")


def _refusal_of(answer: Answer) -> Refusal:
    """MLflow's own refusal without the request, which stands before the reason, and the stack trace behind it."""
    try:
        told = json.loads(answer.body)
        error_code, message = str(told["error_code"]), str(told["message"])
    except (ValueError, TypeError, KeyError):
        error_code, message = "INTERNAL_ERROR", "the server failed; its log says why"
    if message.startswith("Failed to"):
        message = message.rpartition("Error: ")[2]
    return Refusal(answer.status, error_code, message if len(message) <= MAX_REASON else message[:MAX_REASON] + "…")


class Protocol(H11Protocol):
    """Closes a connection on which no request begins, or where a body goes on after its refusal: uvicorn waits."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to look."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._look, self.cycle)

    def _look(self, seen: object) -> None:
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and self.cycle is seen:  # nothing has begun since
            self.transport.close()
        else:
            self.loop.call_later(HEAD_SECONDS, self._look, self.cycle)


class Server(uvicorn.Server):
    """Says that it is ready."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        print(self._ready, flush=True)


def main() -> None:
    """Serves until it is told to end, and removes the temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the version's files")
    parser.add_argument("--temporary", type=Path, required=True, help="the folder to remove at the end")
    parser.add_argument("--fd", type=int, required=True, help="the socket that listens")
    parser.add_argument("--about", type=json.loads, required=True, help="what /version tells, as JSON")
    arguments = parser.parse_args()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        shutil.rmtree(arguments.temporary, ignore_errors=True)
        os._exit(EXIT_CODES[number])  # without waiting for a prediction's thread: uvicorn has given it its time

    for number in EXIT_CODES:
        signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)  # held back by `medgen serve`
    try:
        serve(arguments.folder, arguments.about, socket.socket(fileno=arguments.fd))
    finally:
        shutil.rmtree(arguments.temporary, ignore_errors=True)


def serve(folder: Path, about: dict[str, Any], listener: socket.socket) -> None:
    """Loads the model and answers."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    LOG.setLevel(logging.INFO)
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # its warnings repeat what was sent
    # MLflow's own limit would answer, and lose sight of the thread that goes on
    os.environ["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] = str(24 * 60 * 60)
    model = mlflow.pyfunc.load_model(str(folder))
    about = {**about, "medgen": _own_medgen(folder), "mlflow": VERSION}
    gc.freeze()  # what is loaded stays: the collector need not go through it while a large answer is made
    gateway = Gateway(scoring_server.init(Served(model)), about, Limits())  # type: ignore[arg-type]
    config = uvicorn.Config(
        gateway,
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
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    Server(config, f"{about['uri']} on http://{place} (Ctrl-C ends it)").run(sockets=[listener])


def _own_medgen(folder: Path) -> str:
    """The version of the medgen that was loaded; it must be the one in the folder, which the model was made with."""
    medgen = sys.modules.get("medgen")
    file = None if medgen is None else medgen.__file__
    if medgen is None or file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
        sys.exit(f"error: {folder}: its model uses {file or 'no medgen'} and not a medgen of its own")
    return str(medgen.__version__)


if __name__ == "__main__":
    main()
