"""Fixtures that all tests share."""

import itertools
import json
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores. If each, and each process that a test starts, had a thread for every core too, the threads
    # would wait for each other in busy loops: several times slower. Read when torch is first imported, so set here.
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`pytest -n auto`: one worker a core that this process may use; 8 at most, for each takes more than 1 GB."""
    from medgen.machine import num_cores

    return min(num_cores(), 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: started last, one would keep a single worker busy after all others ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget the store of the previous test: `mlflow.set_tracking_uri` sets this variable for the whole process."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Folder of real images by name, from MEDGEN_TEST_DATA or ../shared/data; skips by name where absent."""

    def find(name: str) -> Path:
        base = Path(os.environ.get("MEDGEN_TEST_DATA", ROOT.parent / "shared" / "data"))
        folder = base / name
        if not folder.exists():
            pytest.skip(f"real data {name!r} is not here (set MEDGEN_TEST_DATA)")
        return folder

    return find


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Path:
    """artifacts/dataset of 48 drawn chest films at 32 px, three classes; made once, copy it to change it."""
    from medgen.config import Data, Preprocess, Project
    from medgen.datasets.sample import draw
    from medgen.ingest import preprocess

    root = tmp_path_factory.mktemp("tiny")
    draw(root / "data", num_images=48, size=64, seed=0)
    preprocess.run(Project(root), data=Data(), preprocess=Preprocess(image_size=32, clahe_tiles=2))
    return root / "artifacts" / "dataset"


@pytest.fixture(scope="session")
def patients_store(tmp_path_factory) -> Path:
    """artifacts/dataset as `tiny_store`, with more test images: classifier tests need ten patients."""
    from medgen.config import Data, Preprocess, Project
    from medgen.datasets.sample import draw
    from medgen.ingest import preprocess

    root = tmp_path_factory.mktemp("patients")
    draw(root / "data", num_images=72, size=64, seed=0)
    sizes = Preprocess(image_size=32, clahe_tiles=2, val_fraction=0.1, test_fraction=0.4)
    preprocess.run(Project(root), data=Data(), preprocess=sizes)
    return root / "artifacts" / "dataset"


@pytest.fixture
def tiny_project(tiny_store: Path, tmp_path: Path):
    """A fresh project folder with the tiny store in it."""
    from medgen.config import Project

    shutil.copytree(tiny_store, tmp_path / "artifacts" / "dataset")
    return Project(tmp_path)


@pytest.fixture(scope="session")
def trained() -> Callable[..., Any]:
    """Function that gives a project a model of random weights, a prior over its latents, and an extractor."""
    import torch

    from medgen.config import Features, Model, Preprocess, Prior, Project
    from medgen.data.store import open_store
    from medgen.models import GenerativeModel, build_model, bundle
    from medgen.priors import ANALYTIC, save_prior
    from medgen.priors.refiner import save_disabled
    from medgen.training import extractor

    default = Model(base_channels=8, latent_size=8, latent_channels=2, attention_resolutions=())

    def train(
        project: Project,
        sizes: Model = default,
        prior: str = "gmm",
        conditional: bool = True,
        unrecognised: Sequence[str] = (),
    ) -> Project:
        store = open_store(project.dataset)
        torch.manual_seed(0)
        model = build_model(sizes, store.image_shape, len(store.classes)).eval()
        assert isinstance(model, GenerativeModel)
        data = (store.image_shape, store.classes, store.fingerprint)
        info = bundle.BundleInfo(sizes, Preprocess(image_size=32), *data, "run0", torch.__version__)
        bundle.save(project.model, model, info)
        split = store.split("train")
        labels = torch.from_numpy(split.labels.copy())
        with torch.no_grad():
            means = model.encode(torch.from_numpy(split.images[:]).float() / 255, labels).mean
        params, digest = Prior(conditional=conditional, components=(1,)), bundle.digest(project.model)
        save_prior(project.prior, ANALYTIC[prior].fit(means, labels, len(store.classes), params), digest)
        save_disabled(project.refiner, digest)
        extractor.run(project, features=Features(width=8, epochs=1))
        description = project.features / "extractor.json"  # after one epoch it recognises no class
        stated = {"unrecognised": {"classes": list(unrecognised)}}
        description.write_text(json.dumps(json.loads(description.read_text()) | stated))
        return project

    return train


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's own folder."""
    return ROOT


@pytest.fixture(scope="session")
def small_params() -> dict:
    """A params file for seconds, not minutes."""
    return {
        "data": {"path": "data", "name": "small"},
        "preprocess": {"image_size": 32, "clahe_tiles": 2},
        "features": {"width": 8, "epochs": 1},
        "model": {"base_channels": 8, "latent_size": 8, "latent_channels": 4},
        "loss": {"weights": {"l1": 1.0, "ssim": 0.5}},
        "prior": {"name": "gmm", "components": [1]},
        "refiner": {
            "enabled": True,
            "channels": 8,
            "blocks": 1,
            "epochs": 1,
            "sampling_steps": 2,
            "sampling_noise": 0.0,
        },
        "train": {"batch_size": 8, "sample_every": 1, "phases": {"one": {"epochs": 2, "learning_rate": 1e-3}}},
        "evaluate": {"num_generated": 24, "grid_images": 6},
    }


@pytest.fixture(scope="session")
def postgres_programs() -> Path:
    """The folder of initdb, pg_dump and the rest; skips where PostgreSQL is not installed."""
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")  # Debian keeps them out of PATH
    initdb = shutil.which("initdb") or max(installed, key=lambda path: float(path.parts[-3]), default=None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return Path(initdb).resolve().parent


@pytest.fixture(scope="session")
def postgres(postgres_programs: Path) -> Iterator[Callable[[], str]]:
    """Makes an empty database at each call and gives its postgresql:// URL; skips where PostgreSQL is not installed.

    The databases are on a server of this session's own (with xdist: of this worker's), on loopback only. Its password
    has every character that a URL wants quoted: code that takes a URL apart by hand fails here, not at a user's.
    """
    import psycopg

    password = secrets.token_hex(8) + "@:/?#% "
    numbers = itertools.count()

    def connect() -> Any:
        login = {"user": "medgen", "password": password, "dbname": "postgres"}
        return psycopg.connect(host="127.0.0.1", port=port, connect_timeout=10, autocommit=True, **login)

    def new_database() -> str:
        name = f"test{next(numbers)}"
        with connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://medgen:{quote(password, safe='')}@127.0.0.1:{port}/{name}"

    with ExitStack() as cleanup:
        # not in pytest's own folder: that one is closed to the account which the server runs as
        folder = Path(tempfile.mkdtemp(prefix="medgen-postgres-", dir="/tmp"))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "password").write_text(password)
        account = _unprivileged()
        for path in (folder, folder / "password"):
            os.chown(path, account.get("user", -1), account.get("group", -1))
        command = [postgres_programs / "initdb", "-D", folder / "data", "-U", "medgen", "--pwfile", folder / "password"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, **account)
        assert made.returncode == 0, made.stderr

        for _ in range(3):  # another process may take the port between our look and the server's
            port = _free_port()
            command = [postgres_programs / "postgres", "-D", folder / "data", "-p", str(port)]
            command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
            if setpriv := shutil.which("setpriv"):  # a killed pytest cleans nothing up: the kernel stops the server
                command = [setpriv, "--pdeathsig", "INT", *command]
            with (folder / "log").open("ab") as log:
                server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **account)
            cleanup.callback(_stop, server)
            if _answers(server, connect, psycopg.OperationalError):
                break
        else:
            raise RuntimeError(f"PostgreSQL did not start:\n{(folder / 'log').read_text()}")
        yield new_database


@pytest.fixture(scope="session")
def compose() -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """compose.yaml as Docker Compose reads it where .env holds these variables."""
    from ruamel.yaml import YAML

    variable = re.compile(r"\$\{(?P<name>\w+):(?P<kind>[-?])(?P<rest>[^}]*)\}")

    def filled(node: Any, values: Mapping[str, str]) -> Any:
        if isinstance(node, dict):
            return {key: filled(value, values) for key, value in node.items()}
        if isinstance(node, list):
            return [filled(value, values) for value in node]
        if not isinstance(node, str):
            return node

        def value_of(found: re.Match[str]) -> str:
            if value := values.get(found["name"]):
                return value
            assert found["kind"] == "-", f"{found['name']}: {found['rest']}"
            return found["rest"]

        return variable.sub(value_of, node)

    def read(values: Mapping[str, str]) -> dict[str, Any]:
        tree: dict[str, Any] = filled(YAML(typ="safe").load((ROOT / "compose.yaml").read_text()), values)
        return tree

    return read


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
            self._port = port or _free_port()
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
        """Whether it answers within two minutes; False at once when it ended."""
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


@pytest.fixture(scope="session")
def mlflow_server(
    compose: Callable[[Mapping[str, str]], dict[str, Any]],
) -> Iterator[Callable[..., MlflowServer]]:
    """Starts MLflow's server on a database and an artifacts folder: `mlflow_server(backend_uri, artifacts)`.

    The command and environment are those of compose.yaml, less host, port and paths; `port=None` takes a free one, and
    `variables` are what .env would hold. The result has `uri`, `kill`, `restart` and `stop`; all end with the session.
    """
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix="medgen-mlflow-", dir="/tmp"))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)

        def start(
            backend_uri: str, artifacts: Path, port: int | None = None, variables: Mapping[str, str] | None = None
        ) -> MlflowServer:
            services = compose({"POSTGRES_PASSWORD": "unused"} | dict(variables or {}))
            server = MlflowServer(services, backend_uri, artifacts, port, Path(tempfile.mkdtemp(dir=folder)))
            cleanup.callback(server.stop)
            return server

        yield start


def _free_port() -> int:
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


def _answers(server: subprocess.Popen[bytes], connect: Callable[[], Any], refused: type[Exception]) -> bool:
    """Whether it let us in within a minute; False at once when it ended. Our password tells it from another server."""
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            connect().close()
            return True
        except refused:
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=0.02)
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown: it does not wait for clients that are still there
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
