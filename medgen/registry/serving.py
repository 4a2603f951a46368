"""A registered version behind HTTP: its files are fetched, and this process becomes medgen/serving/app.py."""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from medgen.config import Project, Registry, Tracking
from medgen.errors import UserError
from medgen.registry.model_package import PACKAGE
from medgen.registry.versions import CHAMPION, Version, answering, fetch, find
from medgen.tracking.mlflow_sync import connect

GATEWAY = PACKAGE / "serving" / "app.py"
ENDINGS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def serve(
    project: Project,
    *,
    tracking: Tracking,
    registry: Registry,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
) -> NoReturn:
    """Answers HTTP with a version's images until Ctrl-C or SIGTERM, which end this process with exit code 130 or 0.

    The store is asked at the start only: it may go away then.

    Args:
        project: whose store has the version, unless tracking.uri names another.
        tracking: where that store is.
        registry: the name of the model.
        model: models:/NAME@ALIAS or models:/NAME/NUMBER; None is the champion.
        host: address to listen at.
        port: 0 takes any that is free.

    Raises:
        UserError: there is no such version, the store does not answer, or the port is taken.
    """
    with _listen(host, port) as listener:
        with answering(project, tracking, "the model cannot be found: start the server first"):
            client, _ = connect(project, tracking)
            version = find(client, registry.model_name, model or CHAMPION)
        with _temporary_folder() as folder:
            files = fetch(version.uri, "", folder, project, tracking)
            _become_gateway(version, files, folder, listener)


def _become_gateway(version: Version, files: Path, folder: Path, listener: socket.socket) -> NoReturn:
    """A new program in this process: signals reach it, and nothing that was imported so far takes memory."""
    about = {
        "uri": version.uri,
        "model": version.name,
        "version": version.number,
        "run": version.tags.get("run"),
        "dataset": version.tags.get("dataset.fingerprint"),
    }
    command = [sys.executable, "-P", str(GATEWAY), str(files), "--temporary", str(folder)]
    command += ["--fd", str(listener.fileno()), "--about", json.dumps(about)]
    listener.set_inheritable(True)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # until the gateway can remove the folder
    os.chdir(folder)
    sys.stdout.flush()
    os.execve(sys.executable, command, _environment())


def _environment() -> dict[str, str]:
    """Without what would put other code before the version's own, and without the store's address and passwords."""
    return {
        name: text
        for name, text in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME") and not name.startswith("MLFLOW_TRACKING_")
    } | {"MLFLOW_DISABLE_TELEMETRY": "true"}


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Removed when what is within fails or is told to end; the gateway removes it otherwise."""
    folder = Path(tempfile.mkdtemp(prefix="medgen-serve-"))
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, earlier)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; bound here, nobody can take the port while the model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: no address; expected one of this machine, such as 127.0.0.1") from None
    try:
        listener = socket.create_server(address, family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None
    with listener:
        yield listener
