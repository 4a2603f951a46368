"""`medgen serve`: downloads a registered version and replaces this process by medgen/serving/app.py."""

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
from medgen.machine import signal_handler
from medgen.registry.model_package import PACKAGE
from medgen.registry.versions import CHAMPION, Version, download_checked, find_version, mlflow_client

APP = PACKAGE / "serving" / "app.py"
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def serve(
    project: Project,
    *,
    tracking: Tracking,
    registry: Registry,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
) -> NoReturn:
    """Serve a version over HTTP until Ctrl-C (exit code 130) or SIGTERM (exit code 0).

    The MLflow store is used only at the start and may become unavailable afterwards.

    Args:
        model: models:/NAME@ALIAS or models:/NAME/NUMBER; None is the champion.
        port: 0 is any free one.

    Raises:
        UserError: there is no such version, the MLflow store does not answer, or the port is in use.
    """
    with _listen(host, port) as listener:
        with mlflow_client(project, tracking, "the model cannot be found: start the server first") as (client, _):
            version = find_version(client, registry.model_name, model or CHAMPION)
        with _temporary_folder() as folder:
            files = download_checked(version.uri, "", folder, project, tracking)
            _exec_app(version, files, folder, listener)


def _exec_app(version: Version, files: Path, folder: Path, listener: socket.socket) -> NoReturn:
    """Replace the program of this process, so that signals reach the app and unused imports take no memory."""
    about = {
        "uri": version.uri,
        "model": version.name,
        "version": version.number,
        "run": version.tags.get("run"),
        "dataset": version.tags.get("dataset.fingerprint"),
    }
    command = [sys.executable, "-P", str(APP), str(files), "--temporary", str(folder)]
    command += ["--fd", str(listener.fileno()), "--about", json.dumps(about)]
    listener.set_inheritable(True)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the app is ready to remove the folder
    os.chdir(folder)
    sys.stdout.flush()
    os.execve(sys.executable, command, _environment())


def _environment() -> dict[str, str]:
    """Environment without paths that could hide the version's own code, and without the store's credentials."""
    return {
        name: text
        for name, text in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME") and not name.startswith("MLFLOW_TRACKING_")
    } | {"MLFLOW_DISABLE_TELEMETRY": "true"}


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
