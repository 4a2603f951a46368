"""MLflow's page: showing it, and what it tells of a version."""

import os
import socket
import sys
from typing import NoReturn
from urllib.parse import urlsplit

from rich.console import Console

from medgen.config import Project, Tracking
from medgen.errors import UserError
from medgen.tracking.mirror import connect, store_uri, without_password


def ui(project: Project, *, tracking: Tracking, port: int = 5000) -> NoReturn:
    """Shows MLflow's page on this project's store at 127.0.0.1:`port`; this process becomes the server.

    Raises:
        UserError: the store is a server with a page of its own, or the port is taken.
    """
    uri = store_uri(project, tracking)
    if urlsplit(uri).scheme in ("http", "https"):
        raise UserError(f"tracking.uri: {without_password(uri)} is a server with its own page; open it in a browser")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"--port {port}: something answers there already; choose another port")
    connect(project, tracking)  # an empty project gets its store first
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(project.root / "mlartifacts")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    # Without its job runner the server is 2 processes in place of 15.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    Console(highlight=False).print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)")
    os.chdir(project.root)
    os.execve(sys.executable, command, environment)  # in place of this process: signals reach the server
