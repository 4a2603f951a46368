"""Malformed and slow requests to `medgen serve` among good ones, while the champion changes.

The good requests get the bytes of one of the two champions, before, during and after; none is dropped, and the memory
of the server stays bounded.
"""

import base64
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable

import psutil

from benchmarks.campaign.lab import Lab
from benchmarks.campaign.mutations import mutate
from benchmarks.campaign.process import Child, Violation, start_function
from benchmarks.campaign.servers import free_port

JSON = {"Content-Type": "application/json"}
ATTACKERS, CLIENTS = 6, 2
ATTACK_SECONDS = 20.0
MEMORY = 2 << 30  # bytes of the process of a version
REFUSALS = {400, 404, 405, 408, 411, 413, 415, 421, 429, 431, 501, 503, 504}
BUSY = {429, 503, 504}  # to a good request too: it is sent again
SLOW_SECONDS = 2.0


def attack_server(lab: Lab, draws: random.Random) -> None:
    """A server under attack that follows the champion, which changes twice."""
    prepare()
    two_versions(lab)
    port = free_port()
    server = lab.start("serve", "--follow", "--port", str(port), prepare=[poll_often])
    try:
        wait_until_ready(port, server)
        first = {body: ask(port, body) for body in good_bodies(lab)}
        clients = start_function(lambda: attack(port, first, draws.random(), server.process.pid), lab.log("clients"))
        for words in (("rollback",), ("promote", "--version", "2", "--force", "again")):
            lab.run(*words)
            clients.process.join(ATTACK_SECONDS / 3)
        code = clients.wait()
        output = clients.output()
        for line in output.splitlines():
            if line.startswith("COUNT "):
                lab.counts["requests"] += int(line.split()[1])
        if code:
            raise Violation("crashed", f"{output[-4000:]}\n{server.output()[-4000:]}")
        wait_for_version(port, "models:/small/2")
        if any(ask(port, body) != answer for body, answer in first.items()):
            raise Violation("lost", "the same version answers other bytes after the attack")
    finally:
        if server.process.exitcode is None and server.process.pid is not None:
            os.kill(server.process.pid, 15)
        code = server.wait(60)
    if code or "Traceback" in server.output():
        raise Violation("crashed", f"medgen serve: exit code {code}\n{server.output()[-6000:]}")


def two_versions(lab: Lab) -> None:
    """Make `project` the finished one with a second version, of another seed, that is champion after the first."""
    if not lab.snapshot("served").exists():
        lab.restore("done")
        lab.run("promote", "--force", "the first")
        lab.run("train", "--set", "train.seed=1")
        for words in (("prior",), ("refiner",), ("register",), ("promote", "--force", "the second")):
            lab.run(*words)
        shutil.copytree(lab.project, lab.snapshot("served"))
    lab.restore("served")


def poll_often() -> None:
    """Let the server look for another champion every second."""
    from medgen.registry import follow

    follow.POLL_SECONDS = 1.0


def good_bodies(lab: Lab) -> list[bytes]:
    """Two requests: new images, and a reconstruction."""
    image = min((lab.snapshot("done") / "data").rglob("*.png"), default=None)
    image = image or min((lab.snapshot("done") / "data").rglob("*.jpg"))
    rows = [{"n": 2, "seed": 3}, {"image": base64.b64encode(image.read_bytes()).decode()}]
    return [json.dumps({"dataframe_records": [row]}).encode() for row in rows]


def ask(port: int, body: bytes) -> bytes:
    """The answer to a good request, which is sent again while the server is busy.

    Raises:
        Violation: another status.
        OSError: the connection is cut.
    """
    deadline = time.monotonic() + 120
    while True:
        status, answer = request(port, body, JSON)
        if status == 200:
            return answer
        if status not in BUSY or time.monotonic() > deadline:
            raise Violation("crashed", f"a good request: {status} {answer[:300]!r}")
        time.sleep(0.2)


def request(port: int, body: bytes, headers: dict[str, str], path: str = "/invocations") -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def wait_until_ready(port: int, server: Child) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + 240
    while server.process.exitcode is None and time.monotonic() < deadline:
        try:
            if get(port, "/ready")[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise Violation("lost", f"medgen serve does not start:\n{server.output()}")


def wait_for_version(port: int, uri: str) -> None:
    """Wait until this version answers."""
    deadline = time.monotonic() + 240
    while json.loads(get(port, "/version")[1])["uri"] != uri:
        if time.monotonic() > deadline:
            raise Violation("lost", f"{uri} is champion, and is not served")
        time.sleep(0.3)


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of an answer to GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# In a process of its own


def attack(port: int, first: dict[bytes, bytes], seed: float, server: int | None) -> None:
    """Good clients and attackers for some seconds; prints the number of requests, and ends with the first violation."""
    problems: list[str] = []
    count = 0
    lock, end = threading.Lock(), time.monotonic() + ATTACK_SECONDS
    answers = {body: {answer} for body, answer in first.items()}

    def repeat(work: Callable[[random.Random], None], name: str) -> None:
        nonlocal count
        draws = random.Random(f"{seed} {name}")
        while time.monotonic() < end and not problems:
            try:
                work(draws)
            except Exception as error:
                problems.append(f"{name}: {type(error).__name__}: {error}")
            with lock:
                count += work is not watch

    def good(draws: random.Random) -> None:
        body = draws.choice(sorted(answers))
        answers[body].add(ask(port, body))
        if len(answers[body]) > 2:
            problems.append("a good request has got three different answers from two versions")

    def watch(draws: random.Random) -> None:
        for version in psutil.Process(server).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if (size := version.memory_info().rss) > MEMORY:
                    problems.append(f"a version takes {size >> 20} MiB")
        time.sleep(0.1)

    def hostile(draws: random.Random) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # to close the connection is an answer too
            draws.choice(ATTACKS)(port, draws)

    works = [(good, f"client {number}") for number in range(CLIENTS)] + [(watch, "memory")]
    works += [(hostile, f"attacker {number}") for number in range(ATTACKERS)]
    threads = [threading.Thread(target=repeat, args=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ATTACK_SECONDS + 150)
    print(f"COUNT {count}", *problems, sep="\n", flush=True)
    raise SystemExit(1 if problems else 0)


def send_malformed(port: int, draws: random.Random) -> None:
    """A body that the server must refuse."""
    body, headers = draws.choice(list(BODIES.values()))
    check(*request(port, body, headers))


def send_mutated(port: int, draws: random.Random) -> None:
    """A damaged request: the JSON, or the image in it."""
    image = mutate(IMAGES[draws.randrange(len(IMAGES))], draws)
    row = draws.choice(({"n": 1}, {"image": base64.b64encode(image).decode()}))
    body = json.dumps({"dataframe_records": [row]}).encode()
    check(*request(port, mutate(body, draws) if draws.random() < 0.5 else body, JSON), allowed={200, *REFUSALS})


def send_raw(port: int, draws: random.Random) -> None:
    """Bytes that are no HTTP, or break its rules."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(draws.choice(RAW))
        connection.settimeout(SLOW_SECONDS)
        connection.recv(1000)


def send_slowly(port: int, draws: random.Random) -> None:
    """A request byte by byte, which is left in the middle."""
    whole = HEAD + b"Content-Length: 1000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        end = time.monotonic() + SLOW_SECONDS
        for byte in whole[: draws.randint(1, len(whole))]:
            if time.monotonic() > end:
                break
            connection.sendall(bytes([byte]))
            time.sleep(0.02)


def leave_early(port: int, draws: random.Random) -> None:
    """A valid request whose client does not wait for the answer."""
    body = json.dumps({"dataframe_records": [{"n": 50}]}).encode()
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(draws.uniform(0.0, 0.1))


def check(status: int, answer: bytes, allowed: set[int] = REFUSALS) -> None:
    """Raise Violation unless a hostile request got one of these answers, without a traceback."""
    if status not in allowed or b"Traceback" in answer:
        raise Violation("crashed", f"a hostile request: {status} {answer[:300]!r}")


ATTACKS = (send_malformed, send_mutated, send_mutated, send_raw, send_slowly, leave_early)
HEAD = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
RAW = (
    os.urandom(5000),
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n" * 10_000,
    HEAD + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
    HEAD + b"".join(b"X%d: a\r\n" % number for number in range(20_000)) + b"\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n{",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n{\r\n" * 5000,
    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nGET /secret HTTP/1.1\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n{}",
    HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
)
BODIES: dict[str, tuple[bytes, dict[str, str]]] = {}
IMAGES: list[bytes] = []


def prepare() -> None:
    """Make the bodies and images, once."""
    from benchmarks.campaign.files import rasters
    from benchmarks.serve import malformed

    if not BODIES:
        BODIES.update(malformed())
        IMAGES.extend(content for name, content in rasters().items() if not name.endswith((".gif", ".webp")))
