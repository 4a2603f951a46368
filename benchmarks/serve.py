"""Serving speed of `medgen serve` and plain `mlflow models serve`; then malformed bodies among valid ones.

python benchmarks/serve.py [--requests 60] [--rounds 2]

Both serve one registered version of a small untrained model, as fast as a trained one, from separate processes; clients
are threads of this process.
"""

import argparse
import base64
import http.client
import io
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from medgen import registry
from medgen.config import Model, Params, Preprocess, Prior, Project
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import ANALYTIC, save_prior

SIDE, CLASSES = 64, ("NORMAL", "ILL")
JSON = {"Content-Type": "application/json"}
CLIENTS, SIZES = (1, 10, 100), (1, 16)
START_SECONDS = 180
MEMORY_ROUNDS = 4  # parts of the requests; memory must not grow from one to the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="per method and round; at least one per client")
    parser.add_argument("--rounds", type=int, default=2, help="each method is timed once per round, in turn")
    parser.add_argument(
        "--malformed", type=int, default=2000, help="number of bodies of the second part, including valid ones"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = prepare(Path(folder))
        with plain(project) as mlflow, ours(project) as medgen:
            compare(mlflow, medgen, arguments)
        with ours(project) as medgen:
            survive(medgen, arguments.malformed)


def prepare(folder: Path) -> Project:
    """Create a project with a registered version."""
    project = Project(folder)
    (folder / "params.yaml").write_text("{}")
    torch.manual_seed(0)
    sizes = Model(base_channels=16, latent_channels=16, latent_size=8)
    model = build_model(sizes, (1, SIDE, SIDE), len(CLASSES))
    info = BundleInfo(sizes, Preprocess(image_size=SIDE), (1, SIDE, SIDE), CLASSES, "data", "0123456789ab", "2")
    bundle.save(project.model, model, info)
    latents, labels = torch.randn(256, *model.latent_shape), torch.arange(256) % 2
    prior = ANALYTIC["gmm"].fit(latents, labels, len(CLASSES), Prior(components=(1,)))
    save_prior(project.prior, prior, bundle.digest(project.model))
    registry.register(project, params=Params())
    return project


class Server:
    """A server process and its client."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process, self.port = psutil.Process(process.pid), port

    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        return sum(one.memory_info().rss for one in [self.process, *self.process.children(recursive=True)])

    def request(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", "/invocations", body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@contextmanager
def running(command: list[str], project: Project, port: int, environment: dict[str, str]) -> Iterator[Server]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=project.root, env=os.environ | environment, stdout=log, stderr=log)
        server = Server(process, port)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    assert server.request(request(1), JSON)[0] == 200
                    break
                except ConnectionError:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.2)
            yield server
            assert process.poll() is None, "the server died"
        finally:
            family = [server.process, *server.process.children(recursive=True)]  # MLflow does not end its uvicorn
            for one in family:
                one.terminate()
            psutil.wait_procs(family, 60)
            process.wait()


def ours(project: Project):
    port = free_port()
    command = [sys.executable, "-m", "medgen", "serve", "--model", "models:/medgen@candidate", "--port", str(port)]
    return running(command, project, port, {})


def plain(project: Project):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
    command += ["--model-uri", "models:/medgen@candidate", "--port", str(port)]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return running(command, project, port, store | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(n: int, seed: int = 0) -> bytes:
    return json.dumps({"dataframe_records": [{"n": n, "seed": seed}]}).encode()


def compare(mlflow: Server, medgen: Server, arguments: argparse.Namespace) -> None:
    ways = {
        "mlflow models serve, JSON": (mlflow, JSON),
        "medgen serve, JSON": (medgen, JSON),
        "medgen serve, PNG": (medgen, JSON | {"Accept": "image/png"}),
    }
    print(f"{os.cpu_count()} cores, {SIDE} px\n")
    print("| images, clients | method | requests/s | ratio (min to max) | p50 | p95 |\n|---|---|---|---|---|---|")
    for n in SIZES:
        for clients in CLIENTS:
            rates: dict[str, list[float]] = {way: [] for way in ways}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(arguments.rounds):
                for way, (server, headers) in ways.items():
                    rate, times = load(server, request(n), headers, clients, max(clients, arguments.requests))
                    rates[way].append(rate)
                    seconds[way] += times
            first = next(iter(ways))
            for way in ways:
                ratios = [a / b for a, b in zip(rates[way], rates[first], strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                p50, p95 = (f"{1000 * q:.0f} ms" for q in np.quantile(seconds[way], [0.5, 0.95]))
                rate = f"{statistics.median(rates[way]):.1f}"
                print(f"| {n}, {clients} | {way} | {rate} | {spread} | {p50} | {p95} |", flush=True)


def load(
    server: Server, body: bytes, headers: dict[str, str], clients: int, requests: int
) -> tuple[float, list[float]]:
    """Requests per second, and the seconds of each request."""

    def one(_: int) -> float:
        start = time.perf_counter()
        status, _ = server.request(body, headers)
        assert status == 200, status
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = list(pool.map(one, range(requests)))
    return requests / (time.perf_counter() - start), times


def survive(server: Server, requests: int) -> None:
    """Send requests of 100 clients at once, three of four malformed, and check answers and memory."""
    bodies = malformed()
    expected = server.request(request(2), JSON)
    assert expected[0] == 200
    memory, peak, done = [server.memory()], 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, server.memory())

    numbers = count()
    statuses: dict[str, dict[int | str, int]] = {}
    lock = threading.Lock()

    def one(number: int) -> None:
        name = "valid" if number % 4 == 0 else list(bodies)[next(numbers) % len(bodies)]
        body, headers = bodies.get(name, (request(2), JSON))
        status, answer = server.request(body, headers)
        assert name != "valid" or status in (503, 504) or (status, answer) == expected, f"{status} {answer[:100]!r}"
        assert b"Traceback" not in answer
        with lock:
            statuses.setdefault(name, {}).setdefault(status, 0)
            statuses[name][status] += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(100) as pool:
            for _ in range(MEMORY_ROUNDS):
                list(pool.map(one, range(requests // MEMORY_ROUNDS)))
                memory.append(server.memory())
    finally:
        done.set()
        watcher.join()
    assert server.request(request(2), JSON) == expected
    print(f"\n{requests} requests by 100 clients; each answer to a valid one was equal bit by bit.\n")
    print("| body | answers |\n|---|---|")
    for name, found in statuses.items():
        print(f"| {name} | {', '.join(f'{status}: {times}' for status, times in found.items())} |")
    first, *others = (f"{value / 2**20:.0f}" for value in memory)
    print(f"\nresident memory in MiB: {first} before, {', '.join(others)} after each part, {peak / 2**20:.0f} at most")


def malformed() -> dict[str, tuple[bytes, dict[str, str]]]:
    """Bodies that the server must refuse, with their headers, by name."""

    def rows(*rows: object) -> bytes:
        return json.dumps({"dataframe_records": rows}).encode()

    def image(side: int) -> str:
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    bodies = {
        "empty": b"",
        "text": b"give me images",
        "cut short": b'{"dataframe_records": [{"n": 1}',
        "no UTF-8": b'{"dataframe_records": [{"n": 1, "label": "\xff"}]}',
        "a list": b"[1]",
        "another protocol": b'{"messages": [{"role": "user", "content": "an image"}]}',
        "100,000 brackets": b'{"inputs": ' + b"[" * 100_000,
        "8 MB of numbers": b'{"inputs": {"n": [' + b"1," * 4_000_000 + b"1]}}",
        "NaN": b'{"dataframe_records": [{"n": NaN}]}',
        "5,000 digits": b'{"inputs": {"n": [' + b"9" * 5000 + b"]}}",
        "16 MB of a label": rows({"n": 1, "label": "x" * (16 * 2**20 - 100)}),
        "17 MB": b" " * 17_000_000,
        "columns that do not fit": b'{"inputs": {"n": [1, 2], "seed": [1]}}',
        "twin columns": b'{"dataframe_split": {"columns": ["n", "n"], "data": [[1, 2]]}}',
        "mistyped column": rows({"n": 1, "lable": "ILL"}),
        "n true": rows({"n": True}),
        "n 10^30": rows({"n": 10**30}),
        "a million images": rows(*[{"n": 1000}] * 1000),
        "100,000 rows": rows(*[{"n": 1}] * 100_000),
        "3 million empty lists": b'{"inputs": [' + b"[[]]," * 3_000_000 + b"[[]]]}",
        "a million keys": b'{"dataframe_records": [{' + b",".join(b'"%d":1' % key for key in range(10**6)) + b"}]}",
        "unknown label": rows({"n": 1, "label": "DOG"}),
        "no base64": rows({"image": "?"}),
        "no image": rows({"image": base64.b64encode(os.urandom(1_000_000)).decode()}),
        "a bomb of 9 gigapixels": rows({"image": bomb()}),
        "an image of 49 megapixels": rows({"image": image(7000)}),
        "1,000 images of 39 megapixels": rows(*[{"image": image(6250)}] * 1000),
    }
    requests = {name: (body, JSON) for name, body in bodies.items()}
    requests["no content type"] = (request(1), {})
    requests["CSV"] = (b"n\n1\n", {"Content-Type": "text/csv"})
    return requests


def bomb() -> str:
    """Base64 of a PNG file whose header states 95,000 x 95,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 95_000, 95_000, 1, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10_000_000), 9))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")).decode()


if __name__ == "__main__":
    main()
