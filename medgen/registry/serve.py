"""`medgen serve`: downloads a registered version and starts medgen/serving/app.py, in this process or as a child."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from medgen.config import Project, Registry, Tracking
from medgen.console import warn
from medgen.errors import UserError
from medgen.machine import signal_handler
from medgen.registry.follow import follow_alias
from medgen.registry.model_package import PACKAGE
from medgen.registry.versions import CHAMPION, Version, download_checked, find_version, mlflow_client

APP = PACKAGE / "serving" / "app.py"
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
TOKENS = "MEDGEN_SERVE_TOKENS"  # environment variable with the content of a token file
# Variables that the version's code gets: others hold secrets, and PYTHONPATH could hide the code.
ENVIRONMENT = {"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
ENVIRONMENT_PREFIXES = ("LC_", "CUDA", "NVIDIA", "OMP", "GOMP", "MKL", "PYTORCH_")
_TOKEN = re.compile(r"([A-Za-z0-9_.-]+)[ \t]+([!-~]{16,})")  # name, token


def serve(
    project: Project,
    *,
    tracking: Tracking,
    registry: Registry,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    follow: bool = False,
    tokens: Path | None = None,
) -> NoReturn:
    """Serve a version over HTTP until Ctrl-C (exit code 130) or SIGTERM (exit code 0).

    The MLflow store is used at the start, and with `follow` from time to time; it may become unavailable afterwards.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/NUMBER; None is the champion.
        port: 0 is any free one.
        follow: change to another version, without losing a request, when the alias moves to it.
        tokens: file with a client's name and token on each line; None is the environment variable MEDGEN_SERVE_TOKENS.
            Without both, clients need no token.

    Raises:
        UserError: there is no such version, the MLflow store does not answer, the port is in use, or the token file is
            invalid.
    """
    digests = _token_digests(tokens)
    reference = model or CHAMPION
    if follow and reference.rpartition("/")[2].isdecimal():
        raise UserError(f"--model {reference}: a number always names the same version; --follow needs an alias")

    def find() -> Version:
        with mlflow_client(project, tracking, "the model cannot be found: start the server first") as (client, _):
            return find_version(client, registry.model_name, reference)

    with _listen(host, port) as listener:
        if not digests and not listener.getsockname()[0].startswith(("127.", "::1")):
            warn(f"--host {host}: whoever reaches this port can use the model; --tokens FILE admits known clients")

        def prepare(version: Version, folder: Path) -> list[str]:
            files = download_checked(version.uri, "", folder, project, tracking)
            return _command(version, files, folder, listener, digests)

        listener.set_inheritable(True)
        if follow:
            follow_alias(find, prepare, _environment(), listener.fileno())
        version = find()
        with _temporary_folder() as folder:
            _exec_app(prepare(version, folder), folder)


def _command(
    version: Version, files: Path, folder: Path, listener: socket.socket, digests: Mapping[str, str]
) -> list[str]:
    about = {
        "uri": version.uri,
        "model": version.name,
        "version": version.number,
        "run": version.tags.get("run"),
        "dataset": version.tags.get("dataset.fingerprint"),
    }
    command = [sys.executable, "-P", str(APP), str(files), "--temporary", str(folder)]
    command += ["--fd", str(listener.fileno()), "--about", json.dumps(about)]
    if digests:
        file = folder / "tokens.json"  # in a folder that only this user may read
        file.write_text(json.dumps(digests), encoding="utf-8")
        command += ["--tokens", str(file)]
    return command


def _exec_app(command: list[str], folder: Path) -> NoReturn:
    """Replace the program of this process, so that signals reach the app and unused imports take no memory."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the app is ready to remove the folder
    os.chdir(folder)
    sys.stdout.flush()
    os.execve(sys.executable, command, _environment())


def _environment() -> dict[str, str]:
    """The variables of the environment that the version's code gets."""
    return {
        name: text for name, text in os.environ.items() if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)
    } | {"MLFLOW_DISABLE_TELEMETRY": "true"}


def _token_digests(file: Path | None) -> dict[str, str]:
    """SHA-256 of each client's token by name; messages contain no token."""
    try:
        text = os.environ.get(TOKENS, "") if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--tokens {file}: cannot be read ({reason})") from None
    source, digests = TOKENS if file is None else f"--tokens {file}", {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _TOKEN.fullmatch(line.strip())
        if match is None or match[1] in digests:
            raise UserError(
                f"{source}, line {number}: expected a client's name, used once, and a token of at least 16 characters, "
                'such as the output of `echo "clinic $(openssl rand -hex 32)"`'
            )
        digests[match[1]] = hashlib.sha256(match[2].encode()).hexdigest()
    if file is not None and not digests:
        raise UserError(f"{source}: no token; expected a client's name and its token on each line")
    return digests


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that is removed after an error or SIGTERM within the block; once started, the app removes it."""
    folder = Path(tempfile.mkdtemp(prefix="medgen-serve-"))
    try:
        with signal_handler([signal.SIGTERM], lambda *_: sys.exit(0)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, bound before the model is loaded so that no other process takes the port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: not an address; expected one of this machine, such as 127.0.0.1") from None
    try:
        listener = socket.create_server(address, family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None
    with listener:
        yield listener
