"""What a user is promised of `medgen serve`: the version's own answers over HTTP, and a server that nothing ends."""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.types import Schema, TensorSpec
from PIL import Image

from medgen import registry
from medgen.config import Model, Params, Preprocess, Prior, Project, Refiner, Registry, Tracking
from medgen.datasets.sample import draw
from medgen.errors import UserError
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import FITTED, sample_images, save_prior
from medgen.priors import refiner as refinement
from medgen.priors.generator import load_generator
from medgen.priors.refiner import save_refiner
from medgen.serving.app import JOB, Gateway, Job, Limits, Served
from medgen.serving.generate import load_image

SIZE = 16
CLASSES = ("NORMAL", "ILL")
JSON = {"Content-Type": "application/json"}
START_SECONDS = 180
OWN_VERSION = "the version's own"  # of medgen in the registered version, which is not the installed one


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Version 1 of an untrained model that looks at labels, with a refiner; the candidate. There is no champion."""
    project = Project(tmp_path_factory.mktemp("project"))
    (project.root / "params.yaml").write_text("registry: {model_name: films}\n")
    torch.manual_seed(0)
    sizes = Model(name="cvae", base_channels=8, max_channels=8, latent_channels=8)
    model = build_model(sizes, (1, SIZE, SIZE), len(CLASSES))
    preprocess = Preprocess(image_size=SIZE, clahe_tiles=2)
    info = BundleInfo(sizes, preprocess, (1, SIZE, SIZE), CLASSES, "ba9876543210", "0123456789ab", "2.15")
    bundle.save(project.model, model, info)
    latents, labels = torch.randn(64, *model.latent_shape), torch.arange(64) % 2
    prior = FITTED["gmm"].fit(latents, labels, len(CLASSES), Prior(components=(1,)))
    save_prior(project.prior, prior, bundle.digest(project.model))
    params = Refiner(enabled=True, channels=8, blocks=1, sampling_steps=2)
    scales = torch.full((1,), 0.1), torch.ones(1, SIZE, SIZE // 2 + 1), torch.ones(model.latent_shape)
    refiner = refinement.Refiner.start(params, (1, SIZE, SIZE), len(CLASSES), *scales)
    save_refiner(project.refiner, refiner, bundle.digest(project.model))
    registry.run(project, params=Params(registry=Registry(model_name="films")))
    (own,) = (project.root / "mlartifacts").rglob("code/medgen/__init__.py")
    own.write_text(f"__version__ = {OWN_VERSION!r}\n")
    return project


class Server:
    """`medgen serve` as a user starts it."""

    def __init__(self, project: Project, folder: Path, *words: str, **environment: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from medgen.cli import main; main()"
        own = str(Path(registry.__file__).parents[2])
        command = [sys.executable, "-P", "-c", start, own, "serve", "--port", "0", *words]
        setting = os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"} | environment
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=project.root, env=setting, stdout=subprocess.PIPE, stderr=log)
        try:
            self.line = self._first_line()
        except BaseException:
            self.stop()
            raise
        self.port = int(self.line.split(" (")[0].rpartition(":")[2])

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(START_SECONDS), self.log.read_text()
        line = self.process.stdout.readline().decode()
        assert line, self.log.read_text()
        return line

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **words: Any) -> Any:
        """Status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {}, **words)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def invoke(self, *rows: dict[str, Any], **headers: str) -> Any:
        body = json.dumps({"dataframe_records": rows})
        return self.ask("POST", "/invocations", body, JSON | headers)

    def images(self, *rows: dict[str, Any]) -> np.ndarray:
        status, _, body = self.invoke(*rows)
        assert status == 200, body
        return np.array(json.loads(body)["predictions"], np.uint8)


@pytest.fixture(scope="module")
def server(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With another medgen on PYTHONPATH and in the current folder, which must not get between. SIGTERM ends it well."""
    folder = tmp_path_factory.mktemp("server")
    for other in (folder / "medgen", project.root / "medgen"):
        other.mkdir()
        (other / "__init__.py").write_text("raise SystemExit('another medgen was loaded')\n")
    server = Server(project, folder, "--model", "models:/films@candidate", PYTHONPATH=str(folder))
    yield server
    assert server.stop() == 0
    assert list(server.temporary.iterdir()) == []


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    draw(folder, num_images=3, size=40, seed=0)
    return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg"))


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def new_images(project: Project, n: int, label: int | None, seed: int, refine: bool = True) -> np.ndarray:
    made = load_generator(project.model, project.prior, project.refiner)
    labels = None if label is None else torch.full((n,), label)
    refiner = made.refiner if refine else None
    return as_pixels(sample_images(made.prior, made.model, n, labels, seed, refiner=refiner))


def as_pixels(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def reconstruction(project: Project, file: Path, label: int) -> np.ndarray:
    model, info = bundle.load_generative(project.model)
    with torch.no_grad():
        return as_pixels(model.reconstruct(load_image(file, info.preprocess), torch.tensor([label])))


def test_it_says_where_it_answers(server: Server) -> None:
    assert re.fullmatch(r"models:/films/1 on http://127\.0\.0\.1:\d+ \(Ctrl-C ends it\)\n", server.line)


def test_new_images_are_what_the_bundle_makes(project: Project, server: Server) -> None:
    images = server.images({"n": 3, "seed": 5}, {"n": 2, "label": "ILL", "seed": 6}, {"n": 1, "label": "0", "seed": 7})
    expected = [new_images(project, 3, None, 5), new_images(project, 2, 1, 6), new_images(project, 1, 0, 7)]
    np.testing.assert_array_equal(images, np.concatenate(expected))
    assert not np.array_equal(server.images({"n": 2}), server.images({"n": 2}))  # without a seed, others each time


def test_reconstructions_are_what_medgen_makes_of_files(project: Project, server: Server, films: list[Path]) -> None:
    rows = [{"image": in_base64(film.read_bytes()), "label": "ILL"} for film in films]
    images = server.images(*rows, {"n": 1, "seed": 1})
    expected = [reconstruction(project, film, 1) for film in films]
    np.testing.assert_array_equal(images, np.concatenate([*expected, new_images(project, 1, None, 1)]))
    np.testing.assert_array_equal(server.images(rows[0] | {"label": "NORMAL"}), reconstruction(project, films[0], 0))


def test_each_row_says_whether_it_is_refined(project: Project, server: Server, films: list[Path]) -> None:
    """New images are by default, a reconstruction is not: it shows what the model kept of a picture."""
    film = {"image": in_base64(films[0].read_bytes()), "label": "ILL"}
    rows = [{"n": 2, "seed": 5, "refine": False}, {"n": 2, "seed": 5, "refine": True}, {"n": 2, "seed": 5}]
    plain, refined, default = server.images(*rows).reshape(3, 2, SIZE, SIZE, 1)
    np.testing.assert_array_equal(plain, new_images(project, 2, None, 5, refine=False))
    np.testing.assert_array_equal(refined, default)
    assert not np.array_equal(plain, refined)
    bare, first, again, other = server.images(
        film | {"refine": False}, *(film | {"refine": True, "seed": seed} for seed in (3, 3, 4))
    )
    np.testing.assert_array_equal(bare[None], reconstruction(project, films[0], 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, bare) and not np.array_equal(first, other)


@pytest.mark.parametrize("n", [1, 5])
def test_a_picture_is_answered_where_one_is_asked_for(project: Project, server: Server, n: int) -> None:
    status, headers, body = server.invoke({"n": n, "seed": 5}, Accept="image/png, */*;q=0.1")
    assert (status, headers["content-type"]) == (200, "image/png")
    sheet = np.array(Image.open(io.BytesIO(body)))
    columns = {1: 1, 5: 3}[n]
    for number, image in enumerate(new_images(project, n, None, 5)):
        top, left = (SIZE + 2) * (number // columns), (SIZE + 2) * (number % columns)
        np.testing.assert_array_equal(sheet[top : top + SIZE, left : left + SIZE], image[..., 0])
    assert sheet.shape == ((-(-n // columns) * (SIZE + 2) - 2), columns * (SIZE + 2) - 2)


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["n", "seed"], "data": [[2, 5]]}},
        {"inputs": {"n": [2], "seed": [5]}},
        {"instances": [{"n": 2, "seed": 5}], "params": {}},
        {"dataframe_records": [{"n": 2, "seed": 5, "label": None, "image": None, "refine": None}]},
    ],
    ids=lambda body: next(iter(body)),
)
def test_mlflows_ways_of_asking_are_one(project: Project, server: Server, body: dict[str, Any]) -> None:
    status, _, answer = server.ask("POST", "/invocations", json.dumps(body), JSON)
    assert status == 200, answer
    np.testing.assert_array_equal(json.loads(answer)["predictions"], new_images(project, 2, None, 5))


def test_it_says_what_it_is(server: Server) -> None:
    import mlflow

    assert server.ask("GET", "/ping")[0] == 200
    assert json.loads(server.ask("GET", "/health")[2]) == {"status": "ok", "model": "models:/films/1"}
    assert json.loads(server.ask("GET", "/version")[2]) == {
        "uri": "models:/films/1",
        "model": "films",
        "version": 1,
        "run": "0123456789ab",
        "dataset": "ba9876543210",
        "medgen": OWN_VERSION,
        "mlflow": mlflow.__version__,
    }


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def records(*rows: Any) -> bytes:
    return json.dumps({"dataframe_records": rows}).encode()


SECRET = "Doe^Jane"
BAD_BODIES = {  # body, headers; status, words of the message
    "empty": (b"", JSON, 400, "body: not JSON: Expecting value at line 1, column 1"),
    "text": (SECRET.encode(), JSON, 400, "body: not JSON"),
    "cut short": (b'{"dataframe_records": [{"n": 1}', JSON, 400, "body: not JSON"),
    "no UTF-8": (b'{"dataframe_records": [{"n": 1, "label": "\xff"}]}', JSON, 400, "body: not UTF-8 (at byte 42)"),
    "UTF-16": (records({"n": 1}).decode().encode("utf-16"), JSON, 400, "body: not UTF-8"),
    "a list": (b"[1]", JSON, 400, "body: expected an object"),
    "no format": (b'{"n": 1}', JSON, 400, "body: expected one of the fields dataframe_records"),
    "two formats": (b'{"inputs": {}, "instances": []}', JSON, 400, "body: expected one of the fields"),
    "a language model's": (b'{"messages": []}', JSON, 400, "body: expected one of the fields"),
    "odd params": (b'{"inputs": {"n": [1]}, "params": 3}', JSON, 400, "params: expected an object"),
    "deep": (b'{"inputs": ' + b"[" * 100_000, JSON, 400, "body: nested too deeply"),
    "less deep": (b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}", JSON, 400, ""),
    "NaN": (b'{"dataframe_records": [{"n": NaN}]}', JSON, 400, "body: a number that is not finite"),
    "infinite": (b'{"dataframe_records": [{"n": 1e999}]}', JSON, 400, "body: a number that is not finite"),
    "many digits": (b'{"inputs": {"n": [' + b"9" * 5000 + b"]}}", JSON, 400, "too many digits"),
    "rows that are none": (b'{"dataframe_records": 7}', JSON, 400, "list of records"),
    "rows of numbers": (records(1, 2), JSON, 400, "0: unknown column; expected n, label, seed, image"),
    "no rows": (records(), JSON, 400, "rows: found 0"),
    "a number for rows": (b'{"inputs": 5}', JSON, 400, "rows: no table of n, label"),
    "twin columns": (b'{"dataframe_split": {"columns": ["n", "n"], "data": [[1, 2]]}}', JSON, 400, ""),
    "ragged columns": (b'{"inputs": {"n": [1, 2], "seed": [1]}}', JSON, 400, ""),
    "mistyped column": (records({"n": 1, "lable": SECRET}), JSON, 400, "lable: unknown column; expected n, label"),
    "empty row": (records({}), JSON, 400, "rows: found 0"),
    "neither": (records({"label": "ILL"}), JSON, 400, "n, image: found neither"),
    "both": (records({"n": 1, "image": "aGk="}), JSON, 400, "n, image: found both"),
    "n of nothing": (records({"n": 0}), JSON, 400, "n: found 0; expected a whole number from 1 to 65536"),
    "n below": (records({"n": -1}), JSON, 400, "n: found -1"),
    "n with a fraction": (records({"n": 1.5}), JSON, 400, "n: found 1.5"),
    "n true": (records({"n": True}), JSON, 400, "n: found True"),
    "n in words": (records({"n": "3"}), JSON, 400, "n: found '3'"),
    "n a list": (records({"n": [1]}), JSON, 400, "n: found [1]"),
    "n too large": (records({"n": 65537}), JSON, 400, "n: found 65537"),
    "n huge": (records({"n": 10**30}), JSON, 400, "n: found 1000"),
    "too many in sum": (records({"n": 65536}, {"n": 1}), JSON, 400, "n: 65537 images asked for; at most 65536 at once"),
    "too many rows": (records(*[{"n": 1}] * 1025), JSON, 400, "rows: found 1025"),
    "seed below": (records({"n": 1, "seed": -1}), JSON, 400, "seed: found -1"),
    "seed huge": (records({"n": 1, "seed": 2**64}), JSON, 400, "seed: found 18446744073709551616"),
    "unknown label": (records({"n": 1, "label": "DOG"}), JSON, 400, "label: unknown name 'DOG'"),
    "long label": (records({"n": 1, "label": "x" * 10**6}), JSON, 400, "label: found 'xxx"),
    "half a letter": (b'{"inputs": {"n": [1], "label": ["\\ud800"]}}', JSON, 400, "rows: no table of n, label"),
    "no base64": (records({"image": SECRET, "label": "ILL"}), JSON, 400, "image: no base64"),
    "no image": (records({"image": in_base64(SECRET.encode()), "label": "ILL"}), JSON, 400, "image: not readable"),
    "empty image": (records({"image": "", "label": "ILL"}), JSON, 400, "image: not readable as an image: empty file"),
    "cut image": (records({"image": in_base64(png_header(50, 50)), "label": "ILL"}), JSON, 400, "image: not readable"),
    "image of gigapixels": (
        records({"image": in_base64(png_header(30_000, 30_000)), "label": "ILL"}), JSON, 400, "40 megapixels"
    ),
    "image of 50 megapixels": (
        records({"image": in_base64(png_header(10_000, 5_000)), "label": "ILL"}),
        JSON, 400, "10000 x 5000 is more than 40 megapixels",
    ),
    "image without its label": (records({"image": "aGk="}), JSON, 400, "looks at labels; give one"),
    "image with a seed": (records({"image": "aGk=", "seed": 1, "label": "ILL"}), JSON, 400, "seed: found beside image"),
    "image with a seed, not refined": (
        records({"image": "aGk=", "seed": 1, "label": "ILL", "refine": False}), JSON, 400, "seed: found beside image"
    ),
    "refine in words": (records({"n": 1, "refine": "yes"}), JSON, 400, "refine: found 'yes'; expected true or false"),
    "refine a number": (records({"n": 1, "refine": 1}), JSON, 400, "refine: found 1; expected true or false"),
    "refine an image by a number": (
        records({"image": "aGk=", "label": "ILL", "refine": 0}), JSON, 400, "refine: found 0; expected true or false"
    ),
    "no content type": (records({"n": 1}), {}, 415, "content-type: found none; expected application/json"),
    "wrong content type": (b"n\n1\n", {"Content-Type": "text/csv"}, 415, "content-type: found text/csv"),
    "wrong charset": (records({"n": 1}), {"Content-Type": "application/json; charset=latin-1"}, 415, "latin-1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_one_clear_message(server: Server, name: str) -> None:
    body, headers, expected, words = BAD_BODIES[name]
    status, answered, text = server.ask("POST", "/invocations", body, headers)
    assert (status, answered["content-type"]) == (expected, "application/json"), text
    answer = json.loads(text)
    assert set(answer) == {"error_code", "message"}
    assert words in answer["message"]
    assert 0 < len(answer["message"]) <= 401
    assert SECRET not in answer["message"]
    assert "Traceback" not in answer["message"]


def test_bad_bodies_do_no_harm(project: Project, server: Server) -> None:
    """Good requests among bad ones are answered as ever, and nothing of either stands in the log."""
    expected = new_images(project, 2, 1, 3)

    def ask(number: int) -> tuple[int, bytes]:
        if number % 2:
            body, headers, _, _ = list(BAD_BODIES.values())[number % len(BAD_BODIES)]
            return server.ask("POST", "/invocations", body, headers)[0], b""
        status, _, answer = server.invoke({"n": 2, "label": "ILL", "seed": 3})
        return status, answer

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(60)))
    assert {status for status, _ in answers[1::2]} <= {400, 415}
    for status, answer in answers[::2]:
        assert status == 200
        np.testing.assert_array_equal(json.loads(answer)["predictions"], expected)
    assert server.process.poll() is None
    log = server.log.read_text()
    assert "POST" not in log  # nor a line of another server
    assert "127.0.0.1 /invocations 200" in log
    assert not any(word in log for word in (SECRET, "Traceback", "lable", "DOG", "ILL"))


class Chunks(io.RawIOBase):
    """A body whose end the client does not tell beforehand."""

    def __init__(self, size: int) -> None:
        self.left = size

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(self.left // 2**16):
            yield b" " * 2**16


@pytest.mark.parametrize("way", ["whole", "chunked"])
def test_a_body_too_large_is_refused(server: Server, way: str) -> None:
    size = 40 * 2**20
    body: Any = b" " * size if way == "whole" else iter(Chunks(size))
    status, _, answer = server.ask("POST", "/invocations", body, JSON, encode_chunked=way == "chunked")
    assert status == 413
    assert json.loads(answer)["message"] == "body: more than 16777216 bytes"
    assert server.ask("GET", "/ping")[0] == 200


def test_a_body_that_only_says_it_is_large_is_refused_before_it_comes(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999999\r\n\r\n"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/invocations", 405), ("POST", "/ping", 405), ("GET", "/docs", 404), ("GET", "/../etc/passwd", 404)],
)
def test_nothing_else_is_answered(server: Server, method: str, path: str, status: int) -> None:
    found, _, body = server.ask(method, path)
    assert (found, set(json.loads(body))) == (status, {"error_code", "message"})


@pytest.mark.slow
def test_connections_without_a_request_are_closed(server: Server) -> None:
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, timeout=40) as silent, socket.create_connection(address, timeout=40) as half:
        half.sendall(b"POST /invocations HT")
        assert (silent.recv(1), half.recv(1)) == (b"", b"")


# The limits themselves, small, on an application that takes its time.


class Client:
    """One request to the gateway, without a network: what it sends, and what comes back."""

    def __init__(self, *chunks: bytes, stays: bool = True, ends: bool = True) -> None:
        self.messages: list[Any] = []
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        for number, chunk in enumerate(chunks, 1):
            more = number < len(chunks) or not ends
            self.requests.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        if not stays:
            self.requests.put_nowait({"type": "http.disconnect"})
        headers = [(b"content-type", b"application/json")]
        self.scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": headers}

    async def ask(self, gateway: Gateway) -> int:
        async def send(message: Any) -> None:
            self.messages.append(message)

        await gateway(self.scope, self.requests.get, send)
        return self.messages[0]["status"] if self.messages else 0

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])


class Slow:
    """An application that answers when it is told to, and notes how many it works on at once."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.num_begun = self.num_now = self.most_at_once = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_begun += 1
        self.num_now += 1
        self.most_at_once = max(self.most_at_once, self.num_now)
        await asyncio.to_thread(self.go.wait, 20)
        self.num_now -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


GOOD = b'{"inputs": {"n": [1]}}'
ABOUT = {"uri": "models:/films/1"}


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def test_one_prediction_at_a_time_and_a_bounded_queue() -> None:
    async def scenario() -> None:
        slow = Slow()
        gateway = Gateway(slow, ABOUT, Limits(waiting=3))
        asked = [asyncio.create_task(Client(GOOD).ask(gateway)) for _ in range(3)]
        await until(lambda: slow.num_begun)
        one_more = Client(GOOD)
        assert await one_more.ask(gateway) == 503
        assert one_more.headers[b"retry-after"] == b"5"
        slow.go.set()
        assert await asyncio.gather(*asked) == [200, 200, 200]
        assert (slow.num_begun, slow.most_at_once) == (3, 1)
        assert await Client(GOOD).ask(gateway) == 200

    asyncio.run(scenario())


def test_an_answer_that_is_late_keeps_its_turn_until_its_thread_ends() -> None:
    async def scenario() -> None:
        slow = Slow()
        gateway = Gateway(slow, ABOUT, Limits(answer_seconds=0.05))
        assert await Client(GOOD).ask(gateway) == 504
        assert await asyncio.gather(*(Client(GOOD).ask(gateway) for _ in range(5))) == [504] * 5
        assert slow.num_begun == 1  # the others left the queue
        slow.go.set()
        await until(lambda: slow.num_now == 0)
        assert await Client(GOOD).ask(gateway) == 200
        assert slow.most_at_once == 1

    asyncio.run(scenario())


def test_bodies_that_dribble_in_take_nobodys_place() -> None:
    async def scenario() -> None:
        slow = Slow()
        slow.go.set()
        gateway = Gateway(slow, ABOUT, Limits(waiting=1))
        dribbling = [asyncio.create_task(Client(GOOD[:5], ends=False).ask(gateway)) for _ in range(3)]
        assert await Client(GOOD).ask(gateway) == 200
        for task in dribbling:
            task.cancel()

    asyncio.run(scenario())


def test_who_leaves_the_queue_costs_nothing() -> None:
    async def scenario() -> None:
        slow = Slow()
        gateway = Gateway(slow, ABOUT, Limits())
        first = asyncio.create_task(Client(GOOD).ask(gateway))
        await until(lambda: slow.num_begun)
        assert await Client(GOOD, stays=False).ask(gateway) == 0
        assert await Client(GOOD[:5], stays=False, ends=False).ask(gateway) == 0
        slow.go.set()
        assert await first == 200
        assert slow.num_begun == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("chunks", "limits", "status"),
    [
        ([GOOD[:5]], Limits(body_seconds=0.05), 408),
        ([b" " * 60, b" " * 60], Limits(body_bytes=100), 413),
        ([b" " * 60, b" " * 60], Limits(held_bytes=100), 503),
    ],
)
def test_a_body_must_come_in_time_and_fit(chunks: list[bytes], limits: Limits, status: int) -> None:
    async def scenario() -> None:
        slow = Slow()
        slow.go.set()
        gateway = Gateway(slow, ABOUT, limits)
        for _ in range(3):  # what is refused is forgotten
            assert await Client(*chunks, ends=False).ask(gateway) == status
        assert slow.num_begun == 0
        assert await Client(GOOD).ask(gateway) == 200

    asyncio.run(scenario())


def test_an_answer_that_nobody_reads_is_given_up() -> None:
    async def scenario() -> None:
        slow = Slow()
        slow.go.set()
        gateway = Gateway(slow, ABOUT, Limits(send_seconds=0.05))

        async def never(message: Any) -> None:
            await asyncio.Future()

        client = Client(GOOD)
        await gateway(client.scope, client.requests.get, never)
        assert await Client(GOOD).ask(gateway) == 200

    asyncio.run(scenario())


def test_a_failure_within_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        JOB.get().begun = True
        raise ZeroDivisionError("secrets")

    client = Client(GOOD)
    assert asyncio.run(client.ask(Gateway(fails, ABOUT, Limits()))) == 500
    assert b"secrets" not in b"".join(message.get("body", b"") for message in client.messages)
    assert "ZeroDivisionError" in caplog.text


def test_masks_are_spread_over_grey() -> None:
    """0, 1 and 2 of 255 would all look black."""
    masks = np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1) % 3
    schema = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 1))])
    model: Any = SimpleNamespace(metadata=SimpleNamespace(get_input_schema=lambda: schema))
    model.predict = lambda data, params: masks
    job = Job(as_png=True)

    def predict() -> None:
        JOB.set(job)
        Served(model).predict(np.zeros((1, 5, 5, 1), np.uint8))

    copy_context().run(predict)
    assert job.answer is not None
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(job.answer.body))), masks[0, ..., 0] * 127)


# Starting and ending.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "models:/films@champion: no such version; expected a champion: `medgen promote` makes the candidate one"),
        (["--model", "models:/films/9"], "models:/films/9: no such version"),
        (["--model", "models:/other@candidate"], "no such version; expected models:/NAME@candidate"),
        (["--model", "artifacts"], "models:/films@artifacts: no such version; expected models:/NAME@candidate"),
        (["--host", ".."], "--host ..: no address; expected one of this machine"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7 --port 0: cannot listen there"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_said(project: Project, words: list[str], message: str) -> None:
    options = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    with pytest.raises(UserError, match=re.escape(message)):
        registry.serve(project, tracking=Tracking(), registry=Registry(model_name="films"), port=0, **options)


def test_a_taken_port_is_said(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there \(Address already in use\)"):
            registry.serve(project, tracking=Tracking(), registry=Registry(), port=port)


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_store_may_die_before(project: Project, tmp_path: Path) -> None:
    store = Project(tmp_path / "store")
    shutil.copytree(project.root, store.root)  # the artifacts' places are absolute: they stay where they are
    server = Server(store, tmp_path, "--model", "models:/films/1")
    assert len(list(server.temporary.glob("medgen-serve-*"))) == 1
    shutil.rmtree(store.root)
    assert server.images({"n": 1, "seed": 0}).shape == (1, SIZE, SIZE, 1)
    assert server.stop(signal.SIGINT) == 130
    assert list(server.temporary.iterdir()) == []
