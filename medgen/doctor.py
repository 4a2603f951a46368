"""Check this machine and this project, and say how to fix each problem.

medgen doctor [--json]
"""

import importlib
import importlib.util
import json
import os
import platform
import shutil
import sqlite3
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table
from rich.text import Text

from medgen.config import Data, Evaluate, Loss, Preprocess, Project, Tracking, Train, without_credentials
from medgen.console import show as print_table
from medgen.data.s3 import is_s3
from medgen.datasets.weights import WEIGHTS, list_weights
from medgen.machine import num_cores
from medgen.tracking.mlflow_sync import check_database, store_uri

WARN_MEMORY = 3e9  # bytes; the sample project needs about 2 GB
WARN_DISK, MIN_DISK = 5e9, 1e9  # free bytes
DVC_TIMEOUT = 60.0  # seconds
CA_FILE = "MLFLOW_TRACKING_SERVER_CERT_PATH"  # MLflow's variable: certificate authority of the tracking server


@dataclass(frozen=True)
class Check:
    """A check and its result; `fix` says what to do about a warning or a failure."""

    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def _rate(name: str, found: str, fix: str, *, fails: bool = False, warns: bool = False) -> Check:
    """A check with the level of the worst condition that holds."""
    if fails or warns:
        return Check(name, "fail" if fails else "warn", found, fix)
    return Check(name, "ok", found)


def run(
    project: Project,
    *,
    data: Data,
    preprocess: Preprocess,
    loss: Loss,
    train: Train,
    evaluate: Evaluate,
    tracking: Tracking,
) -> list[Check]:
    """Check software, hardware, weights, data, DVC and tracking; the only network access is to the tracking server.

    "fail" means that the pipeline cannot run with these parameters, "warn" that it runs with restrictions.
    """
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _check_torch(),
        _check_cpu(),
        *_check_gpus(train),
        _check_memory(),
        _check_disk(project),
        *_check_weights(loss, train, evaluate),
        _check_data(project, data),
        Check("intensities", "ok", preprocess.intensities),
        _check_dvc(project),
        _check_tracking(project, tracking),
    ]


def show(results: Sequence[Check], as_json: bool = False) -> bool:
    """Print results as a table or as JSON, and return True if nothing failed."""
    if as_json:
        rows = [asdict(each) | {"mend": each.fix} for each in results]  # the name of `fix` in the version before
        print(json.dumps(rows, indent=2))
    else:
        table = Table("", "", "found", "what to do", box=None, padding=(0, 1))
        colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        for result in results:
            table.add_row(Text(result.level, style=colours[result.level]), result.name, result.found, result.fix)
        print_table(table)
    return all(result.level != "fail" for result in results)


def _check_torch() -> Check:
    """Import both: a torchvision built for another torch fails at import."""
    fix = "The two are built for different versions. Install a matching pair (in a clone: `make setup`)"
    try:
        torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return Check("torch", "fail", f"import failed: {error}", fix)
    found = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    builds = {version.partition("+")[2] for version in (torch.__version__, torchvision.__version__)}
    return _rate("torch", found, fix, warns=len(builds) > 1)


def _check_cpu() -> Check:
    import torch

    usable, threads = num_cores(), torch.get_num_threads()
    fix = f"More threads than cores are slow. Set OMP_NUM_THREADS={usable}"
    return _rate("cpu", f"{usable} cores, torch uses {threads} threads", fix, warns=threads > usable)


def _check_gpus(train: Train) -> list[Check]:
    import torch

    if torch.cuda.is_available():
        return [_check_gpu(index) for index in range(torch.cuda.device_count())]
    needed = train.device == "cuda"
    if driver := _nvidia_driver():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        found = f"NVIDIA driver {driver}, but torch ({build}) finds no GPU"
        fix = "Update the NVIDIA driver, or install a torch built for this driver"
        return [_rate("gpu", found, fix, fails=needed, warns=True)]
    if needed:
        return [Check("gpu", "fail", "none, but train.device is 'cuda'", "Set train.device to 'auto'")]
    return [Check("gpu", "ok", "none: training runs on the CPU")]


def _check_gpu(index: int) -> Check:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    precision = "bf16" if properties.major >= 8 else "fp32 (bf16 needs compute capability 8.0)"
    found = f"{properties.name}, {total / 1e9:.0f} GB, {free / 1e9:.0f} GB free, {precision}"
    fix = "Other processes use its memory; list them with nvidia-smi"
    return _rate(f"gpu {index}", found, fix, warns=free < 2e9)


def _nvidia_driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _check_memory() -> Check:
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    fix = "Close other programs, or lower train.batch_size and preprocess.image_size"
    return _rate("memory", f"{free / 1e9:.1f} GB available", fix, warns=free < WARN_MEMORY)


def _check_disk(project: Project) -> Check:
    free = shutil.disk_usage(project.root).free
    found = f"{free / 1e9:.1f} GB free in {project.root}"
    fix = "Free disk space; `dvc gc -w` removes old files from DVC's cache"
    return _rate("disk", found, fix, fails=free < MIN_DISK, warns=free < WARN_DISK)


def _check_weights(loss: Loss, train: Train, evaluate: Evaluate) -> list[Check]:
    phases = [phase.weights for phase in train.phases if phase.weights]
    needed = {"vgg16"} if any(weights.perceptual > 0 for weights in [loss.weights, *phases]) else set()
    results = []
    for name, path in list_weights().items():
        starts = train.init_from is not None and train.init_from.partition("#")[0] == f"weights:/{name}"
        if WEIGHTS[name].model and not starts:
            continue  # one of the autoencoders that a training may start from
        if path:
            results.append(Check(f"weights {name}", "ok", str(path)))
        elif name in evaluate.extractors:
            fix = f"Run `medgen weights fetch {name}`, or remove it from evaluate.extractors"
            results.append(Check(f"weights {name}", "warn", "missing: no Inception Score and no FID", fix))
        elif starts:
            fix = f"Run `medgen weights fetch {name}`, or change train.init_from"
            results.append(Check(f"weights {name}", "fail", "missing, and the training starts from them", fix))
        elif name in needed:
            fix = f"Run `medgen weights fetch {name}`, or set loss.weights.perceptual to 0"
            results.append(Check(f"weights {name}", "fail", "missing, and the perceptual loss needs them", fix))
        else:
            results.append(Check(f"weights {name}", "ok", "missing; these parameters do not use them"))
    return results


def _check_data(project: Project, data: Data) -> Check:
    if is_s3(data.path):
        missing = importlib.util.find_spec("s3fs") is None
        fix = "Run `uv sync --extra s3`, or `pip install 'medgen[s3]'`"
        return _rate("data", f"{data.path}{', which needs s3fs' if missing else ''}", fix, fails=missing)
    folder = project.root / data.path
    if folder.is_dir() and any(folder.iterdir()):
        return Check("data", "ok", str(folder))
    pointer = folder.with_name(folder.name + ".dvc")
    if pointer.is_file():
        return Check("data", "warn", f"{data.path} is not pulled yet", f"Run `dvc pull {pointer.name}`")
    fix = "Run `medgen data sample` to draw a dataset, or `medgen data import PATH` to import yours"
    return Check("data", "fail", f"{folder} is missing or empty", fix)


def _check_dvc(project: Project) -> Check:
    if not any((folder / ".dvc").is_dir() for folder in (project.root, *project.root.parents)):
        fix = "Run `dvc init` in a clone of this repository"
        return Check("dvc", "fail", f"{project.root} is not in a DVC project", fix)
    command = [sys.executable, "-m", "dvc", "remote", "list"]  # outside a project it lists the user's remotes
    quiet = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    try:
        done = subprocess.run(
            command, cwd=project.root, env=quiet, capture_output=True, text=True, timeout=DVC_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("dvc", "fail", f"does not run: {error}", "Install medgen again (in a clone: `make setup`)")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        fix = "Install medgen again (in a clone: `make setup`); `dvc config --list` shows its configuration"
        return Check("dvc", "fail", f"`dvc remote list` failed: {reason}", fix)
    remotes = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    if not remotes:
        return Check("dvc", "warn", "no remote: data cannot be pushed", "Run `dvc remote add -d NAME PATH_OR_URL`")
    if not any(remote.endswith("(default)") for remote in remotes):
        return Check("dvc", "warn", f"no default remote among {', '.join(remotes)}", "Run `dvc remote default NAME`")
    return Check("dvc", "ok", ", ".join(remotes))


def _check_tracking(project: Project, tracking: Tracking) -> Check:
    if not tracking.enabled:
        return Check("tracking", "ok", "off (tracking.enabled); only runs/ records the runs")
    uri = store_uri(project, tracking)
    scheme, separator, rest = uri.partition("://")
    if scheme == "sqlite" and rest.startswith("/"):
        return _check_tracking_file(project.root / rest[1:])
    if scheme in ("http", "https"):
        return _check_tracking_server(uri, tracking.timeout_seconds)
    if scheme.startswith("postgresql"):
        return _check_tracking_database(uri, tracking.timeout_seconds)
    if not separator or scheme == "file":
        fix = "MLflow 3 stores runs in a database. Set tracking.uri to sqlite:///mlflow.db or to a server"
        return Check("tracking", "fail", f"{uri!r} is a folder", fix)
    return Check("tracking", "ok", f"a {scheme} store; not checked")


def _check_tracking_file(path: Path) -> Check:
    """Check that an SQLite store can be written or created."""
    if not path.exists():
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            return Check("tracking", "ok", f"the first run creates {path}")
        fix = "Create that folder, or change tracking.uri"
        return Check("tracking", "fail", f"{path.parent} cannot be written", fix)
    if not os.access(path, os.W_OK):
        return Check("tracking", "fail", f"{path} cannot be written", f"Run `chmod u+w {path}`, or change tracking.uri")
    try:
        with closing(sqlite3.connect(path, timeout=0.2)) as connection:
            status = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:  # for example, locked
        fix = "Another program may lock it. Runs continue; `medgen sync` sends the missing records later"
        return Check("tracking", "warn", f"{path}: {error}", fix)
    except sqlite3.DatabaseError as error:
        status = str(error)
    if status == "ok":
        return Check("tracking", "ok", str(path))
    fix = "Move the file to another folder and run `medgen sync`"
    return Check("tracking", "fail", f"{path} is damaged: {status}", fix)


def _check_tracking_database(uri: str, timeout: float) -> Check:
    shown = without_credentials(uri)
    try:
        check_database(uri, timeout)
    except ConnectionError as error:
        reason = str(error).strip().splitlines()[0]
        fix = "Start the database or change tracking.uri. Runs continue; `medgen sync` sends the missing records later"
        return Check("tracking", "warn", f"{shown} does not answer: {reason}", fix)
    return Check("tracking", "ok", shown)


def _check_tracking_server(uri: str, timeout: float) -> Check:
    """Check that a tracking server answers; a failure is a warning, because runs continue without it."""
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]  # without user and password, which are neither sent nor shown
    address = urllib.parse.urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/health", "", ""))
    ca_file = os.environ.get(CA_FILE) if parts.scheme == "https" else None
    try:
        ssl_context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        return Check("tracking", "fail", f"{CA_FILE}: {ca_file}: {error}", "Set it to the certificate file")
    try:
        with urllib.request.urlopen(address, timeout=timeout, context=ssl_context) as response:
            response.read(64)
    except urllib.error.HTTPError as error:
        fix = "Start the server with `--allowed-hosts` naming this host" if error.code == 403 else "Check tracking.uri"
        return Check("tracking", "warn", f"{address} answers {error.code} {error.reason}", fix)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        fix = "Start the server or change tracking.uri. Runs continue; `medgen sync` sends the missing records later"
        return Check("tracking", "warn", f"{address} does not answer: {reason}", fix)
    return Check("tracking", "ok", f"{parts.scheme}://{host}{parts.path}")
