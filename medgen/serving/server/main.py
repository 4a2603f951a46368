"""Load a model folder and serve it: the command line of ../app.py."""

import argparse
import gc
import json
import logging
import os
import shutil
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import mlflow
from mlflow.version import VERSION

from .app import LOG, App, Limits
from .clients import is_loopback
from .connections import Server, max_connections
from .model import ServedModel
from .monitoring import JsonFormatter, RepeatFilter

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}


def main() -> NoReturn:
    """Serve until a signal or the end of standard input ends it, and remove the temporary folder."""
    parser = argparse.ArgumentParser(prog="app.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="the version's files")
    parser.add_argument("--temporary", type=Path, required=True, help="the folder to remove at the end")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--about", type=json.loads, required=True, help="the content of /version, as JSON")
    parser.add_argument("--tokens", type=Path, help="JSON file: SHA-256 of each client's token, by name")
    parser.add_argument("--parent", action="store_true", help="end when standard input ends, after open requests")
    arguments = parser.parse_args()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        shutil.rmtree(arguments.temporary, ignore_errors=True)
        os._exit(EXIT_CODES[number])  # does not wait for a prediction's thread: the server has waited STOP_SECONDS

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(arguments.temporary / "torchinductor")  # not a known name in /tmp
    ready = os.dup(1)
    os.dup2(2, 1)  # what the version's code prints is no answer to the process that waits for the line of `serve`
    for number in EXIT_CODES:
        signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)  # `medgen serve` blocked them
    try:
        digests = json.loads(arguments.tokens.read_bytes()) if arguments.tokens else {}
        parent = sys.stdin.fileno() if arguments.parent else None
        serve(arguments.folder, arguments.about, socket.socket(fileno=arguments.fd), digests, parent, ready)
    finally:
        shutil.rmtree(arguments.temporary, ignore_errors=True)
    os._exit(0)


def serve(
    folder: Path,
    about: dict[str, Any],
    listener: socket.socket,
    digests: dict[str, str],
    parent: int | None,
    ready: int,
) -> None:
    """Load the model, write the address to the file descriptor `ready`, and serve the model on the listening socket."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    LOG.setLevel(logging.INFO)
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # its warnings contain parts of requests
    model = mlflow.pyfunc.load_model(str(folder))
    about = {**about, "medgen": _medgen_version(folder), "mlflow": VERSION}
    gc.freeze()  # excludes the loaded objects from garbage collection, which a large response would trigger
    host, port = listener.getsockname()[:2]
    limits = replace(Limits(), connections=max_connections())
    app = App(ServedModel(model).respond, about, limits, digests, only_local_hosts=is_loopback(host))
    server = Server(app, parent)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    os.write(ready, f"{about['uri']} on http://{address} (Ctrl-C ends it)\n".encode())  # its backlog takes requests
    os.close(ready)
    server.run(sockets=[listener])


def _medgen_version(folder: Path) -> str:
    """The version of the loaded medgen package; exits if the package is not the one in the model's folder."""
    medgen = sys.modules.get("medgen")
    file = None if medgen is None else medgen.__file__
    if medgen is None or file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
        sys.exit(f"error: {folder}: the model uses {file or 'no medgen'}; expected the medgen code in this folder")
    return str(medgen.__version__)
