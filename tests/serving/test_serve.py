"""`medgen serve`: responses equal the version's own results, and bad requests neither stop nor block the server."""

import asyncio
import base64
import functools
import http.client
import importlib
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
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from PIL import Image
from starlette.responses import Response

from medgen import registry
from medgen.config import Model, Params, Preprocess, Prior, Project, Refiner, Registry, Tracking
from medgen.datasets.sample import draw
from medgen.errors import UserError
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import ANALYTIC, sample_images, save_prior
from medgen.priors import refiner as refinement
from medgen.priors.generator import load_generator
from medgen.priors.refiner import save_refiner
from medgen.registry import model_package
from medgen.serving.generate import load_image
from medgen.serving.server.app import App, Limits
from medgen.serving.server.model import ServedModel

SIZE = 16
CLASSES = ("NORMAL", "ILL")
JSON = {"Content-Type": "application/json"}
START_SECONDS = 400
OWN_VERSION = "the version's own"  # of the medgen in the registered version, which differs from the installed one


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Version 1, the candidate, of an untrained conditional model with a refiner; there is no champion."""
    project = Project(tmp_path_factory.mktemp("project"))
    (project.root / "params.yaml").write_text("registry: {model_name: xrays}\n")
    torch.manual_seed(0)
    sizes = Model(name="cvae", base_channels=8, max_channels=8, latent_channels=8)
    model = build_model(sizes, (1, SIZE, SIZE), len(CLASSES))
    preprocess = Preprocess(image_size=SIZE, clahe_tiles=2)
    info = BundleInfo(sizes, preprocess, (1, SIZE, SIZE), CLASSES, "ba9876543210", "0123456789ab", "2.15")
    bundle.save(project.model, model, info)
    latents, labels = torch.randn(64, *model.latent_shape), torch.arange(64) % 2
    prior = ANALYTIC["gmm"].fit(latents, labels, len(CLASSES), Prior(components=(1,)))
    save_prior(project.prior, prior, bundle.digest(project.model))
    params = Refiner(enabled=True, channels=8, blocks=1, sampling_steps=2)
    scales = torch.full((1,), 0.1), torch.ones(1, SIZE, SIZE // 2 + 1), torch.ones(model.latent_shape)
    refiner = refinement.Refiner.create(params, (1, SIZE, SIZE), len(CLASSES), *scales)
    save_refiner(project.refiner, refiner, bundle.digest(project.model))
    own = tmp_path_factory.mktemp("own") / "medgen"
    shutil.copytree(model_package.PACKAGE, own, ignore=shutil.ignore_patterns("__pycache__"))
    (own / "__init__.py").write_text(f"__version__ = {OWN_VERSION!r}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_package, "PACKAGE", own)
        registry.register(project, params=Params(registry=Registry(model_name="xrays")))
    return project


class Server:
    """A process of `medgen serve`."""

    def __init__(self, project: Project, folder: Path, *arguments: str, prelude: str = "", **environment: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        start = f"import sys; sys.path.insert(0, sys.argv.pop(1)); {prelude}\nfrom medgen.cli import main; main()"
        source = str(Path(registry.__file__).parents[2])
        command = [sys.executable, "-P", "-c", start, source, "serve", "--port", "0", *arguments]
        environment = os.environ | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"} | environment
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=project.root, env=environment, stdout=subprocess.PIPE, stderr=log
            )
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

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **options: Any
    ) -> Any:
        """Return status, headers and body of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {}, **options)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def invoke(self, *rows: dict[str, Any], **headers: str) -> Any:
        body = json.dumps({"dataframe_records": rows})
        return self.request("POST", "/invocations", body, JSON | headers)

    def images(self, *rows: dict[str, Any]) -> np.ndarray:
        status, _, body = self.invoke(*rows)
        assert status == 200, body
        return np.array(json.loads(body)["predictions"], np.uint8)


@pytest.fixture(scope="module")
def server(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the candidate; it must ignore another medgen on PYTHONPATH and in the current folder."""
    folder = tmp_path_factory.mktemp("server")
    for other in (folder / "medgen", project.root / "medgen"):
        other.mkdir()
        (other / "__init__.py").write_text("raise SystemExit('another medgen was loaded')\n")
    server = Server(project, folder, "--model", "models:/xrays@candidate", PYTHONPATH=str(folder), PGPASSWORD=SECRET)
    yield server
    assert server.stop() == 0  # after SIGTERM
    assert list(server.temporary.iterdir()) == []


@pytest.fixture(scope="module")
def xray_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("xray_files")
    draw(folder, num_images=3, size=40, seed=0)
    return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg"))


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def new_images(project: Project, n: int, label: int | None, seed: int, refine: bool = True) -> np.ndarray:
    loaded = load_generator(project.model, project.prior, project.refiner)
    labels = None if label is None else torch.full((n,), label)
    refiner = loaded.refiner if refine else None
    return as_pixels(sample_images(loaded.prior, loaded.model, n, labels, seed, refiner=refiner))


def as_pixels(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def reconstruction(project: Project, file: Path, label: int) -> np.ndarray:
    model, info = bundle.load_generative(project.model)
    with torch.no_grad():
        return as_pixels(model.reconstruct(load_image(file, info.preprocess), torch.tensor([label])))


def test_server_prints_its_address(server: Server) -> None:
    assert re.fullmatch(r"models:/xrays/1 on http://127\.0\.0\.1:\d+ \(Ctrl-C ends it\)\n", server.line)


def test_new_images_equal_those_of_the_model(project: Project, server: Server) -> None:
    images = server.images({"n": 3, "seed": 5}, {"n": 2, "label": "ILL", "seed": 6}, {"n": 1, "label": "0", "seed": 7})
    expected = [new_images(project, 3, None, 5), new_images(project, 2, 1, 6), new_images(project, 1, 0, 7)]
    np.testing.assert_array_equal(images, np.concatenate(expected))
    assert not np.array_equal(
        server.images({"n": 2}), server.images({"n": 2})
    )  # without a seed, each request draws other images


def test_reconstructions_equal_those_of_the_model(project: Project, server: Server, xray_files: list[Path]) -> None:
    rows = [{"image": in_base64(file.read_bytes()), "label": "ILL"} for file in xray_files]
    images = server.images(*rows, {"n": 1, "seed": 1})
    expected = [reconstruction(project, file, 1) for file in xray_files]
    np.testing.assert_array_equal(images, np.concatenate([*expected, new_images(project, 1, None, 1)]))
    np.testing.assert_array_equal(
        server.images(rows[0] | {"label": "NORMAL"}), reconstruction(project, xray_files[0], 0)
    )


def test_refine_is_set_by_row(project: Project, server: Server, xray_files: list[Path]) -> None:
    """By default new images are refined and reconstructions are not."""
    row = {"image": in_base64(xray_files[0].read_bytes()), "label": "ILL"}
    rows = [{"n": 2, "seed": 5, "refine": False}, {"n": 2, "seed": 5, "refine": True}, {"n": 2, "seed": 5}]
    plain, refined, default = server.images(*rows).reshape(3, 2, SIZE, SIZE, 1)
    np.testing.assert_array_equal(plain, new_images(project, 2, None, 5, refine=False))
    np.testing.assert_array_equal(refined, default)
    assert not np.array_equal(plain, refined)
    bare, first, again, other = server.images(
        row | {"refine": False}, *(row | {"refine": True, "seed": seed} for seed in (3, 3, 4))
    )
    np.testing.assert_array_equal(bare[None], reconstruction(project, xray_files[0], 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, bare) and not np.array_equal(first, other)


@pytest.mark.parametrize("n", [1, 5])
def test_png_response(project: Project, server: Server, n: int) -> None:
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
def test_all_json_formats_of_mlflow_are_accepted(project: Project, server: Server, body: dict[str, Any]) -> None:
    status, _, answer = server.request("POST", "/invocations", json.dumps(body), JSON)
    assert status == 200, answer
    np.testing.assert_array_equal(json.loads(answer)["predictions"], new_images(project, 2, None, 5))


def test_health_and_version(server: Server) -> None:
    import mlflow

    assert server.request("GET", "/ping")[0] == 200
    assert json.loads(server.request("GET", "/health")[2]) == {"status": "ok", "model": "models:/xrays/1"}
    assert json.loads(server.request("GET", "/version")[2]) == {
        "uri": "models:/xrays/1",
        "model": "xrays",
        "version": 1,
        "run": "0123456789ab",
        "dataset": "ba9876543210",
        "medgen": OWN_VERSION,
        "mlflow": mlflow.__version__,
    }
    status, headers, body = server.request("GET", "/ready")
    assert (status, json.loads(body)) == (200, {"status": "ready"})
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:8080", 200), ("evil.example", 421), ("127.0.0.1.evil", 421)],
)
def test_server_on_the_loopback_address_answers_only_its_names(server: Server, host: str, status: int) -> None:
    """A page of the web whose name resolves to 127.0.0.1 could read the answers otherwise."""
    assert server.request("GET", "/version", headers={"Host": host})[0] == status


def test_metrics_count_requests_and_images(server: Server) -> None:
    def read() -> dict[str, float]:
        lines = server.request("GET", "/metrics")[2].decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    server.invoke({"n": 3})
    server.invoke({"n": 0})
    after = read()
    assert after["medgen_images_total"] - before["medgen_images_total"] == 3
    for status in (200, 400):
        name = f'medgen_requests_total{{path="/invocations",status="{status}"}}'
        assert after[name] - before.get(name, 0) == 1
    assert after["medgen_ready"] == 1
    bucket, count = 'medgen_request_seconds_bucket{path="/invocations",le="+Inf"}', "medgen_request_seconds_count"
    assert after[bucket] == after[f'{count}{{path="/invocations"}}']


def test_code_of_the_version_gets_no_secret(server: Server) -> None:
    variables = Path(f"/proc/{server.process.pid}/environ")
    if not variables.exists():
        pytest.skip("the system shows no variables of processes")
    assert "OMP_NUM_THREADS=1" in variables.read_text()
    assert SECRET not in variables.read_text()


def png_header(width: int, height: int) -> bytes:
    """A PNG file whose header claims a size that its data does not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def records(*rows: Any) -> bytes:
    return json.dumps({"dataframe_records": rows}).encode()


SECRET = "Doe^Jane"
BAD_BODIES = {  # body, part of the message
    "empty": (b"", "body: not JSON: Expecting value at line 1, column 1"),
    "text": (SECRET.encode(), "body: not JSON"),
    "cut short": (b'{"dataframe_records": [{"n": 1}', "body: not JSON"),
    "not UTF-8": (b'{"dataframe_records": [{"n": 1, "label": "\xff"}]}', "body: not UTF-8 (at byte 42)"),
    "UTF-16": (records({"n": 1}).decode().encode("utf-16"), "body: not UTF-8"),
    "list": (b"[1]", "body: expected an object"),
    "no format": (b'{"n": 1}', "body: expected one of the fields dataframe_records"),
    "two formats": (b'{"inputs": {}, "instances": []}', "body: expected one of the fields"),
    "language model": (b'{"messages": []}', "body: expected one of the fields"),
    "params not an object": (b'{"inputs": {"n": [1]}, "params": 3}', "params: expected an object"),
    "nested 20,000 levels": (b'{"inputs": ' + b"[" * 20_000, "body: nested too deeply"),
    "nested 500 levels": (b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}", ""),
    "NaN": (b'{"dataframe_records": [{"n": NaN}]}', "body: a number is not finite"),
    "infinite": (b'{"dataframe_records": [{"n": 1e999}]}', "body: a number is not finite"),
    "many digits": (b'{"inputs": {"n": [' + b"9" * 5000 + b"]}}", "too many digits"),
    "rows not a list": (b'{"dataframe_records": 7}', "list of records"),
    "rows of numbers": (records(1, 2), "0: unknown column; expected n, label, seed, image"),
    "no rows": (records(), "rows: found 0"),
    "inputs not a table": (b'{"inputs": 5}', "rows: not a table with the columns n, label"),
    "duplicate columns": (b'{"dataframe_split": {"columns": ["n", "n"], "data": [[1, 2]]}}', ""),
    "ragged columns": (b'{"inputs": {"n": [1, 2], "seed": [1]}}', ""),
    "misspelt column": (records({"n": 1, "lable": SECRET}), "lable: unknown column; expected n, label"),
    "empty row": (records({}), "rows: found 0"),
    "neither n nor image": (records({"label": "ILL"}), "n, image: found neither"),
    "both n and image": (records({"n": 1, "image": "aGk="}), "n, image: found both"),
    "n 0": (records({"n": 0}), "n: found 0; expected a whole number from 1 to 65536"),
    "n negative": (records({"n": -1}), "n: found -1"),
    "n with a fraction": (records({"n": 1.5}), "n: found 1.5"),
    "n true": (records({"n": True}), "n: found True"),
    "n text": (records({"n": "3"}), "n: found '3'"),
    "n a list": (records({"n": [1]}), "n: found [1]"),
    "n too large": (records({"n": 65537}), "n: found 65537"),
    "n huge": (records({"n": 10**30}), "n: found 1000"),
    "sum of n too large": (records({"n": 65536}, {"n": 1}), "n: 65537 images requested; at most 65536 in one call"),
    "a million empty lists": (b'{"inputs": [' + b"[[]]," * 10**6 + b"[]]}", "body: more values than 1024 rows"),
    "a million keys": (
        b'{"dataframe_records": [{' + b",".join(b'"%d":1' % key for key in range(10**6)) + b"}]}",
        "body: more values than 1024 rows",
    ),
    "40 megapixels, twice": (
        records(*[{"image": in_base64(png_header(8000, 5000)), "label": "ILL"}] * 2),
        "image: 80 megapixels in all rows; at most 67 in one call",
    ),
    "too many rows": (records(*[{"n": 1}] * 1025), "rows: found 1025"),
    "seed negative": (records({"n": 1, "seed": -1}), "seed: found -1"),
    "seed huge": (records({"n": 1, "seed": 2**64}), "seed: found 18446744073709551616"),
    "unknown label": (records({"n": 1, "label": "DOG"}), "label: unknown name 'DOG'"),
    "long label": (records({"n": 1, "label": "x" * 10**6}), "label: found 'xxx"),
    "lone surrogate": (b'{"inputs": {"n": [1], "label": ["\\ud800"]}}', "rows: not a table with the columns n, label"),
    "not base64": (records({"image": SECRET, "label": "ILL"}), "image: invalid base64"),
    "not an image": (records({"image": in_base64(SECRET.encode()), "label": "ILL"}), "image: not readable as an image"),
    "empty image": (records({"image": "", "label": "ILL"}), "image: not readable as an image: empty file"),
    "truncated image": (records({"image": in_base64(png_header(50, 50)), "label": "ILL"}), "image: not readable"),
    "image of gigapixels": (records({"image": in_base64(png_header(30_000, 30_000)), "label": "ILL"}), "40 megapixels"),
    "image of 50 megapixels": (
        records({"image": in_base64(png_header(10_000, 5_000)), "label": "ILL"}),
        "5000 is more than 40 megapixels",
    ),
    "image without its label": (records({"image": "aGk="}), "needs one; expected one of"),
    "image with a seed": (records({"image": "aGk=", "seed": 1, "label": "ILL"}), "seed: found with image"),
    "image with a seed, not refined": (
        records({"image": "aGk=", "seed": 1, "label": "ILL", "refine": False}),
        "seed: found with image",
    ),
    "refine text": (records({"n": 1, "refine": "yes"}), "refine: found 'yes'; expected true or false"),
    "refine a number": (records({"n": 1, "refine": 1}), "refine: found 1; expected true or false"),
    "refine of an image a number": (
        records({"image": "aGk=", "label": "ILL", "refine": 0}),
        "refine: found 0; expected true or false",
    ),
}
BAD_REQUESTS = {name: (body, JSON, 400, message) for name, (body, message) in BAD_BODIES.items()} | {
    "no content type": (records({"n": 1}), {}, 415, "content-type: found none; expected application/json"),
    "wrong content type": (b"n\n1\n", {"Content-Type": "text/csv"}, 415, "content-type: found text/csv"),
    "wrong charset": (records({"n": 1}), {"Content-Type": "application/json; charset=latin-1"}, 415, "latin-1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_body_is_answered_with_one_message(server: Server, name: str) -> None:
    body, headers, expected, message = BAD_REQUESTS[name]
    status, response_headers, text = server.request("POST", "/invocations", body, headers)
    assert (status, response_headers["content-type"]) == (expected, "application/json"), text
    answer = json.loads(text)
    assert set(answer) == {"error_code", "message"}
    assert message in answer["message"]
    assert 0 < len(answer["message"]) <= 401
    assert SECRET not in answer["message"]
    assert "Traceback" not in answer["message"]


def test_bad_bodies_do_not_affect_other_requests(project: Project, server: Server) -> None:
    """Valid requests among bad ones are answered correctly, and the log contains nothing of either."""
    expected = new_images(project, 2, 1, 3)

    def request(number: int) -> tuple[int, bytes]:
        if number % 2:
            body, headers, _, _ = list(BAD_REQUESTS.values())[number % len(BAD_REQUESTS)]
            return server.request("POST", "/invocations", body, headers)[0], b""
        status, _, answer = server.invoke({"n": 2, "label": "ILL", "seed": 3})
        return status, answer

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(request, range(60)))
    assert {status for status, _ in answers[1::2]} <= {400, 415}
    for status, answer in answers[::2]:
        assert status == 200
        np.testing.assert_array_equal(json.loads(answer)["predictions"], expected)
    assert server.process.poll() is None
    log = server.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if not line.startswith("libpng ")]
    answered = [line for line in lines if line.get("path") == "/invocations" and line["status"] == 200]
    assert {"client": "127.0.0.1", "images": 2}.items() <= answered[-1].items()
    assert not any(text in log for text in (SECRET, "Traceback", "lable", "DOG", "ILL"))


class Chunks(io.RawIOBase):
    """A body without a content length."""

    def __init__(self, size: int) -> None:
        self.left = size

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(self.left // 2**16):
            yield b" " * 2**16


@pytest.mark.parametrize("encoding", ["whole", "chunked"])
def test_body_that_is_too_large(server: Server, encoding: str) -> None:
    size = 40 * 2**20
    body: Any = b" " * size if encoding == "whole" else iter(Chunks(size))
    status, _, answer = server.request("POST", "/invocations", body, JSON, encode_chunked=encoding == "chunked")
    assert status == 413
    assert json.loads(answer)["message"] == "body: more than 16777216 bytes"
    assert server.request("GET", "/ping")[0] == 200


def test_content_length_that_is_too_large(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999999\r\n\r\n"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/invocations", 405), ("POST", "/ping", 405), ("GET", "/docs", 404), ("GET", "/../etc/passwd", 404)],
)
def test_other_paths_and_methods(server: Server, method: str, path: str, status: int) -> None:
    found, _, body = server.request(method, path)
    assert (found, set(json.loads(body))) == (status, {"error_code", "message"})


@pytest.mark.slow
def test_idle_connections_are_closed(server: Server) -> None:
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, timeout=40) as silent, socket.create_connection(address, timeout=40) as half:
        half.sendall(b"POST /invocations HT")
        assert (silent.recv(1), half.recv(1)) == (b"", b"")


# Limits, with small values and a model that waits.


class Client:
    """A client that calls the app without a network and stores its response."""

    def __init__(self, *chunks: bytes, disconnects: bool = False, ends: bool = True) -> None:
        self.messages: list[Any] = []
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        for number, chunk in enumerate(chunks, 1):
            more = number < len(chunks) or not ends
            self.requests.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        if disconnects:
            self.requests.put_nowait({"type": "http.disconnect"})
        headers = [(b"content-type", b"application/json")]
        self.scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": headers}

    async def request(self, app: App) -> int:
        async def send(message: Any) -> None:
            self.messages.append(message)

        await app(self.scope, self.requests.get, send)
        return self.messages[0]["status"] if self.messages else 0

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])


def served_model(schema: Schema, predict: Callable[[Any], np.ndarray]) -> ServedModel:
    """A served model without files."""
    model: Any = SimpleNamespace(metadata=SimpleNamespace(get_input_schema=lambda: schema), predict=predict)
    model.unwrap_python_model = SimpleNamespace
    return ServedModel(model)


class WaitingModel:
    """A model that responds after `go` is set, and counts concurrent requests."""

    def __init__(self, is_ready: bool = False) -> None:
        self.go = threading.Event()
        if is_ready:
            self.go.set()
        self.num_begun = self.num_running = self.max_concurrent = 0

    def respond(self, body: bytes, as_png: bool, is_abandoned: Callable[[], bool]) -> Response:
        self.num_begun += 1
        self.num_running += 1
        self.max_concurrent = max(self.max_concurrent, self.num_running)
        self.go.wait(20)
        self.num_running -= 1
        return Response(b"{}")


GOOD = b'{"inputs": {"n": [1]}}'
ABOUT = {"uri": "models:/xrays/1"}


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make an asynchronous test an ordinary one."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


@in_event_loop
async def test_one_prediction_at_a_time_and_a_limited_queue() -> None:
    model = WaitingModel()
    app = App(model.respond, ABOUT, Limits(waiting=3))
    requests = [asyncio.create_task(Client(GOOD).request(app)) for _ in range(3)]
    await until(lambda: model.num_begun)
    one_more = Client(GOOD)
    assert await one_more.request(app) == 503
    assert one_more.headers[b"retry-after"] == b"5"
    model.go.set()
    assert await asyncio.gather(*requests) == [200, 200, 200]
    assert (model.num_begun, model.max_concurrent) == (3, 1)
    assert await Client(GOOD).request(app) == 200


@in_event_loop
async def test_late_prediction_holds_the_lock_until_its_thread_ends() -> None:
    model = WaitingModel()
    app = App(model.respond, ABOUT, Limits(answer_seconds=0.5))
    assert await Client(GOOD).request(app) == 504
    assert await asyncio.gather(*(Client(GOOD).request(app) for _ in range(5))) == [504] * 5
    assert model.num_begun == 1  # the others left the queue
    model.go.set()
    await until(lambda: model.num_running == 0)
    assert await Client(GOOD).request(app) == 200
    assert model.max_concurrent == 1


@in_event_loop
async def test_incomplete_bodies_take_no_place_in_the_queue() -> None:
    model = WaitingModel(is_ready=True)
    app = App(model.respond, ABOUT, Limits(waiting=1))
    incomplete = [asyncio.create_task(Client(GOOD[:5], ends=False).request(app)) for _ in range(3)]
    assert await Client(GOOD).request(app) == 200
    for task in incomplete:
        task.cancel()


@in_event_loop
async def test_disconnected_clients_leave_the_queue() -> None:
    model = WaitingModel()
    app = App(model.respond, ABOUT, Limits())
    first = asyncio.create_task(Client(GOOD).request(app))
    await until(lambda: model.num_begun)
    assert await Client(GOOD, disconnects=True).request(app) == 0
    assert await Client(GOOD[:5], disconnects=True, ends=False).request(app) == 0
    model.go.set()
    assert await first == 200
    assert model.num_begun == 1


@pytest.mark.parametrize(
    ("chunks", "limits", "status"),
    [
        ([GOOD[:5]], Limits(body_seconds=0.05), 408),
        ([b" " * 60, b" " * 60], Limits(body_bytes=100), 413),
        ([b" " * 60, b" " * 60], Limits(held_bytes=100), 503),
    ],
)
@in_event_loop
async def test_limits_of_a_body(chunks: list[bytes], limits: Limits, status: int) -> None:
    model = WaitingModel(is_ready=True)
    app = App(model.respond, ABOUT, limits)
    for _ in range(3):  # rejected bodies free their memory
        assert await Client(*chunks, ends=False).request(app) == status
    assert model.num_begun == 0
    assert await Client(GOOD).request(app) == 200


@in_event_loop
async def test_response_that_is_not_read_is_abandoned() -> None:
    model = WaitingModel(is_ready=True)
    app = App(model.respond, ABOUT, Limits(send_seconds=0.05))

    async def never(message: Any) -> None:
        await asyncio.Future()

    client = Client(GOOD)
    await app(client.scope, client.requests.get, never)
    assert await Client(GOOD).request(app) == 200


def test_internal_error_is_in_the_log_and_not_in_the_response(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*arguments: Any) -> Response:
        raise ZeroDivisionError("secrets")

    client = Client(GOOD)
    assert asyncio.run(client.request(App(fail, ABOUT, Limits()))) == 500
    assert b"secrets" not in b"".join(message.get("body", b"") for message in client.messages)
    assert "ZeroDivisionError" in caplog.text


def test_png_of_masks_spreads_class_numbers_over_grey_levels() -> None:
    """Grey levels 0, 1 and 2 of 255 would all look black."""
    masks = np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1) % 3
    schema = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 1))])
    response = served_model(schema, lambda data: masks).respond(b'{"inputs": [[[[0]]]]}', True, lambda: False)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(response.body))), masks[0, ..., 0] * 127)


@pytest.mark.parametrize("shape", [(3, 4, 2, 1), (3, 4, 2, 3)])
def test_png_has_the_bits_of_the_images(shape: tuple[int, ...]) -> None:
    """Images of other height than width, on a sheet of two columns; colours have 8 bits."""
    images = np.random.default_rng(0).integers(0, 2**16, shape, dtype=np.uint16)
    schema = Schema([ColSpec(DataType.long, "n")])
    response = served_model(schema, lambda data: images).respond(
        b'{"dataframe_records": [{"n": 3}]}', True, lambda: False
    )
    sheet = np.array(Image.open(io.BytesIO(response.body)))
    expected = images[..., 0] if shape[-1] == 1 else np.round(images / 257).astype(np.uint8)
    assert sheet.dtype == expected.dtype
    np.testing.assert_array_equal(sheet[:4, 4:6], expected[1])
    np.testing.assert_array_equal(sheet[6:, :2], expected[2])


# Start and end.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "models:/xrays@champion: no such version; run `medgen promote` to make the candidate champion"),
        ({"model": "models:/xrays/9"}, "models:/xrays/9: no such version"),
        ({"model": "models:/other@candidate"}, "no such version; expected models:/NAME@candidate"),
        ({"model": "artifacts"}, "models:/xrays@artifacts: no such version; expected models:/NAME@candidate"),
        ({"host": ".."}, "--host ..: not an address; expected one of this machine"),
        ({"host": "203.0.113.7"}, "--host 203.0.113.7 --port 0: cannot listen there"),
    ],
)
def test_errors_at_the_start(project: Project, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        registry.serve(project, tracking=Tracking(), registry=Registry(model_name="xrays"), port=0, **options)


def test_port_in_use(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there \(Address already in use\)"):
            registry.serve(project, tracking=Tracking(), registry=Registry(), port=port)


def test_version_gets_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may be someone else's."""
    secrets = (
        *("PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "KAGGLE_KEY", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_TRACKING_PASSWORD"),
        *("MEDGEN_SERVE_TOKENS", "PYTHONPATH", "PYTHONSTARTUP"),
    )
    for name in (*secrets, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LC_ALL"):
        monkeypatch.setenv(name, "0")
    found = importlib.import_module("medgen.registry.serve")._environment()
    assert not found.keys() & set(secrets)
    assert found.keys() >= {"PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LC_ALL"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no token; expected a client's name and its token"),
        ("clinic short", "line 1: expected a client's name, used once, and a token of at least 16 characters"),
        ("# of 2026\n\nclinic\n", "line 3: expected a client's name"),
        ("a 0123456789abcdef\na 0123456789abcdeg", "line 2: expected a client's name, used once"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_errors_of_a_token_file_name_the_line_and_no_token(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        registry.serve(Project(tmp_path), tracking=Tracking(), registry=Registry(), tokens=file)
    assert "short" not in str(error.value) and "0123456789" not in str(error.value)


def test_only_an_alias_can_be_followed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--follow needs an alias"):
        registry.serve(Project(tmp_path), tracking=Tracking(), registry=Registry(), model="models:/x/1", follow=True)


@pytest.mark.slow
def test_service_follows_the_alias_without_a_lost_request(project: Project, tmp_path: Path) -> None:
    """The new version answers; requests with a token are answered throughout, and the store may be gone afterwards."""
    store = Project(tmp_path / "store")
    shutil.copytree(project.root, store.root)
    tokens = tmp_path / "tokens"
    tokens.write_text("clinic 0123456789abcdef\n")
    options = ("--model", "models:/xrays@candidate", "--follow", "--tokens", str(tokens))
    prelude = "import medgen.registry.follow as follow; follow.POLL_SECONDS = 0.1"
    server = Server(store, tmp_path, *options, prelude=prelude)
    bearer = {"Authorization": "Bearer 0123456789abcdef"}
    found: list[tuple[int, Any]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.1):  # a client may send 20 requests a second
            status, _, body = server.request("GET", "/version", headers=bearer)
            found.append((status, json.loads(body).get("version")))
            found.append((server.invoke({"n": 1, "seed": 1}, **bearer)[0], None))

    client = threading.Thread(target=ask)
    try:
        assert server.request("GET", "/version")[0] == 401
        first = server.invoke({"n": 1, "seed": 1}, **bearer)[2]
        client.start()
        torch.manual_seed(1)
        model, _ = bundle.load_generative(store.model)
        latents, labels = torch.randn(64, *model.latent_shape), torch.arange(64) % 2
        prior = ANALYTIC["gmm"].fit(latents, labels, len(CLASSES), Prior(components=(1,)))
        save_prior(store.prior, prior, bundle.digest(store.model))
        registry.register(store, params=Params(registry=Registry(model_name="xrays")))
        while (200, 2) not in found and client.is_alive():
            client.join(0.1)
        store.root.rename(tmp_path / "away")
        num_found = len(found)
        while len(found) < num_found + 4 and client.is_alive():
            client.join(0.1)
        assert client.is_alive()
        assert server.invoke({"n": 1, "seed": 1}, **bearer)[2] != first
    finally:
        done.set()
        client.join(60)
        children = psutil.Process(server.process.pid).children(recursive=True)
        code = server.stop()
    assert code == 0
    assert {status for status, _ in found} == {200}
    numbers = [number for _, number in found if number]
    assert (numbers[0], numbers[-1]) == (1, 2)  # for a moment in between, both versions accept requests
    assert not any(child.is_running() for child in children)
    assert list(server.temporary.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_stops_a_server_whose_store_is_gone(project: Project, tmp_path: Path) -> None:
    store = Project(tmp_path / "store")
    shutil.copytree(project.root, store.root)  # artifacts have absolute paths and are not moved
    server = Server(store, tmp_path, "--model", "models:/xrays/1")
    assert len(list(server.temporary.glob("medgen-serve-*"))) == 1
    shutil.rmtree(store.root)
    assert server.images({"n": 1, "seed": 0}).shape == (1, SIZE, SIZE, 1)
    assert server.stop(signal.SIGINT) == 130
    assert list(server.temporary.iterdir()) == []
