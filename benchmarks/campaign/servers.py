"""PostgreSQL and the service `mlflow` of compose.yaml as processes of this machine, on loopback; tests use them too."""

import itertools
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
_VARIABLE = re.compile(r"\$\{(?P<name>\w+):(?P<kind>[-?])(?P<rest>[^}]*)\}")


def read_compose(values: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml as Docker Compose reads it where .env holds these variables."""
    from ruamel.yaml import YAML

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if isinstance(node, list):
            return [filled(value) for value in node]
        return _VARIABLE.sub(value_of, node) if isinstance(node, str) else node

    def value_of(found: re.Match[str]) -> str:
        if value := values.get(found["name"]):
            return value
        assert found["kind"] == "-", f"{found['name']}: {found['rest']}"
        return found["rest"]

    tree: dict[str, Any] = filled(YAML(typ="safe").load((ROOT / "compose.yaml").read_text()))
    return tree


def postgres_programs() -> Path | None:
    """The folder of initdb, pg_dump and the rest; None where PostgreSQL is not installed."""
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")  # Debian keeps them out of PATH
    initdb = shutil.which("initdb") or max(installed, key=lambda path: float(path.parts[-3]), default=None)
    return None if initdb is None else Path(initdb).resolve().parent


class PostgresServer:
    """A PostgreSQL server with a folder of its own, on loopback only.

    Its password has every character that a URL wants quoted: code that takes a URL apart by hand fails here, not at a
    user's.
    """

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._password = secrets.token_hex(8) + "@:/?#% "
        self._numbers = itertools.count()
        # not in pytest's own folder: that one is closed to the account which the server runs as
        self._folder = folder = Path(tempfile.mkdtemp(prefix="medgen-postgres-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "password").write_text(self._password)
        self._account = _unprivileged()
        for path in (folder, folder / "password"):
            os.chown(path, self._account.get("user", -1), self._account.get("group", -1))
        command = [programs / "initdb", "-D", folder / "data", "-U", "medgen", "--pwfile", folder / "password"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, **self._account)
        assert made.returncode == 0, made.stderr
        for _ in range(3):  # another process may take the port between our look and the server's
            self.port = free_port()
            if self._start():
                return
        raise RuntimeError(f"PostgreSQL did not start:\n{(folder / 'log').read_text()}")

    def connect(self, database: str = "postgres") -> Any:
        """A connection of the administrator."""
        import psycopg

        login = {"user": "medgen", "password": self._password, "dbname": database}
        return psycopg.connect(host="127.0.0.1", port=self.port, connect_timeout=10, autocommit=True, **login)

    def new_database(self) -> str:
        """Make an empty database and return its postgresql:// URL."""
        name = f"test{next(self._numbers)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://medgen:{quote(self._password, safe='')}@127.0.0.1:{self.port}/{name}"

    def kill(self) -> None:
        """End all its processes as a crash of one does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def restart(self) -> None:
        """Start it again, on the same port and data."""
        self.stop()
        if not self._start():
            raise RuntimeError(f"PostgreSQL did not start again:\n{(self._folder / 'log').read_text()}")

    def stop(self) -> None:
        """End it; nothing to do where it has ended."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # the fast shutdown does not wait for clients that are still there
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def remove(self) -> None:
        """End it and remove its data."""
        if self._process is not None:
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> bool:
        command = [self._programs / "postgres", "-D", self._folder / "data", "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        if setpriv := shutil.which("setpriv"):  # a killed parent cleans nothing up: the kernel stops the server
            command = [setpriv, "--pdeathsig", "INT", *command]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log, **self._account)
        return self._answers()

    def _answers(self) -> bool:
        """True if it let us in within a minute; False at once when it ended."""
        import psycopg

        assert self._process is not None
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self.connect().close()
                return True
            except psycopg.OperationalError:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=0.02)
        return False


class MlflowServer:
    """The service `mlflow` of compose.yaml as a process on loopback. What it stores outlives it."""

    def __init__(
        self, services: dict[str, Any], backend_uri: str, artifacts: Path, port: int | None, folder: Path
    ) -> None:
        parts = urlsplit(backend_uri)
        self._password = parts.password  # as the URI quotes it
        self._backend_uri = backend_uri.replace(f":{parts.password}@", "@") if parts.password else backend_uri
        self._service = services["services"]["mlflow"]
        self._artifacts = artifacts
        self._log = folder / "log"
        self._accounts = folder / "accounts.ini"
        written = services["configs"]["accounts"]["content"]
        database = self._service["environment"]["MLFLOW_BACKEND_STORE_URI"]
        self._accounts.write_text(written.replace(database, self._backend_uri))
        self._process: subprocess.Popen[bytes] | None = None
        for _ in range(3):  # another process may take the port between our look and the server's
            self._port = port or free_port()
            if self._start():
                return
            if port or "address already in use" not in self._log.read_text().lower():
                break
        raise RuntimeError(f"MLflow did not start:\n{self._log.read_text()}")

    @property
    def uri(self) -> str:
        """For tracking.uri and MLFLOW_TRACKING_URI."""
        return f"http://127.0.0.1:{self._port}"

    def kill(self) -> None:
        """Ends all its processes as a power cut does."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Ends it as `docker compose stop` does; nothing to do where it has ended."""
        assert self._process is not None
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        self.kill()

    def restart(self) -> None:
        """Starts it again, on the same port, database and artifacts."""
        self.stop()
        if not self._start():
            raise RuntimeError(f"MLflow did not start again:\n{self._log.read_text()}")

    def _start(self) -> bool:
        """True if it answers within two minutes; False at once if it has ended."""
        ours = {"host": "127.0.0.1", "port": str(self._port), "artifacts-destination": str(self._artifacts)}
        words = shlex.split(self._service["command"])
        for name, value in ours.items():
            words[words.index(f"--{name}") + 1] = value
        command = [sys.executable, "-m", *words]
        if setpriv := shutil.which("setpriv"):  # a killed pytest cleans nothing up: the kernel stops the server
            command = [setpriv, "--pdeathsig", "TERM", *command]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "PG", "AWS"))}
        environment = inherited | {key: value for key, value in self._service["environment"].items() if value}
        environment |= {"MLFLOW_BACKEND_STORE_URI": self._backend_uri, "MLFLOW_AUTH_CONFIG_PATH": str(self._accounts)}
        if self._password is not None:
            environment["PGPASSWORD"] = unquote(self._password)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._log.parent, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), direct.open(f"{self.uri}/health", timeout=5):
                return True
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.1)
        self.kill()
        return False


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _unprivileged() -> dict[str, Any]:
    """Popen's arguments that keep PostgreSQL from refusing to run: as root it does."""
    if os.geteuid() != 0:
        return {}
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
