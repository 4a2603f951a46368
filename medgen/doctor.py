"""Checks this machine and project, and says how to mend what is wrong.

medgen doctor [--json]
"""

import dataclasses
import importlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from medgen.config import Data, Evaluate, Loss, Project, Tracking, Train
from medgen.datasets.weights import list_weights
from medgen.machine import num_cores
from medgen.tracking.mlflow_sync import store_uri

OLDEST_PYTHON = (3, 11)
LITTLE_MEMORY = 3e9  # bytes; the sample run takes about 2 GB
LITTLE_DISK, NO_DISK = 5e9, 1e9
DVC_SECONDS = 60.0
ISSUER = "MLFLOW_TRACKING_SERVER_CERT_PATH"  # MLflow's: who signed the tracking server's certificate


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `mend` says what to do about a warning or a failure."""

    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def run(
    project: Project, *, data: Data, loss: Loss, train: Train, evaluate: Evaluate, tracking: Tracking
) -> list[Finding]:
    """Looks at everything a run leans on; changes nothing, imports no MLflow, needs no network but the tracking server.

    A failure means that the pipeline cannot run as the parameters stand, a warning that something will be missing.
    """
    return [
        _python(),
        _torchvision(),
        _cpu(),
        *_gpus(train),
        _memory(),
        _disk(project),
        *_weights(loss, train, evaluate),
        _data(project, data),
        _dvc(project),
        _tracking(project, tracking),
    ]


def show(findings: Sequence[Finding], as_json: bool = False) -> bool:
    """Prints findings as a table or as JSON; True where nothing failed."""
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        table = Table("", "", "found", "what to do", box=None, padding=(0, 1))
        colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        for finding in findings:
            level = f"[{colours[finding.level]}]{finding.level}[/]"
            table.add_row(level, finding.name, _plain(finding.found), _plain(finding.mend))
        Console().print(table)
    return all(finding.level != "fail" for finding in findings)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich would take it for markup


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "fail", found, "Python 3.11 or newer is needed; `uv sync` brings one")
    return Finding("python", "ok", found)


def _torchvision() -> Finding:
    """Importing is the test: a torchvision built for another torch fails there, and only there."""
    mend = "The two were built for different versions: `uv sync` installs a pair that fits (plain pip may not)"
    try:
        torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return Finding("torch", "fail", f"does not import: {error}", mend)
    found = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    builds = {version.partition("+")[2] for version in (torch.__version__, torchvision.__version__)}
    return Finding("torch", "ok", found) if len(builds) == 1 else Finding("torch", "warn", found, mend)


def _cpu() -> Finding:
    import torch

    usable = num_cores()
    threads = torch.get_num_threads()
    found = f"{usable} cores, torch uses {threads} threads"
    if threads > usable:
        return Finding("cpu", "warn", found, f"More threads than cores slow each other: set OMP_NUM_THREADS={usable}")
    return Finding("cpu", "ok", found)


def _gpus(train: Train) -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    driver = _nvidia_driver()
    if driver:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        mend = "Update the NVIDIA driver, or install a torch built for this one"
        level: Literal["warn", "fail"] = "fail" if train.device == "cuda" else "warn"
        return [Finding("gpu", level, f"NVIDIA driver {driver}, but torch ({build}) sees no GPU", mend)]
    if train.device == "cuda":
        return [Finding("gpu", "fail", "none, but train.device is 'cuda'", "Set train.device to 'auto'")]
    return [Finding("gpu", "ok", "none: training runs on the CPU")]


def _gpu(index: int) -> Finding:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    precision = "bf16" if properties.major >= 8 else "fp32 (bf16 needs compute capability 8.0)"
    found = f"{properties.name}, {total / 1e9:.0f} GB, {free / 1e9:.0f} GB free, {precision}"
    if free < 2e9:
        return Finding(f"gpu {index}", "warn", found, "Something else holds its memory; see nvidia-smi")
    return Finding(f"gpu {index}", "ok", found)


def _nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    found = f"{free / 1e9:.1f} GB available"
    if free < LITTLE_MEMORY:
        mend = "Close other programs, or lower train.batch_size and preprocess.image_size"
        return Finding("memory", "warn", found, mend)
    return Finding("memory", "ok", found)


def _disk(project: Project) -> Finding:
    free = shutil.disk_usage(project.root).free
    found = f"{free / 1e9:.1f} GB free in {project.root}"
    if free < LITTLE_DISK:
        mend = "Make room: checkpoints, DVC's cache and MLflow's artifacts grow (`dvc gc -w` clears old cache)"
        return Finding("disk", "fail" if free < NO_DISK else "warn", found, mend)
    return Finding("disk", "ok", found)


def _weights(loss: Loss, train: Train, evaluate: Evaluate) -> list[Finding]:
    phases = [phase.weights for phase in train.phases if phase.weights]
    needed = {"vgg16"} if any(weights.perceptual > 0 for weights in [loss.weights, *phases]) else set()
    findings = []
    for name, path in list_weights().items():
        if path:
            findings.append(Finding(f"weights {name}", "ok", str(path)))
        elif name in evaluate.extractors:
            mend = f"`medgen weights fetch {name}`, or take it out of evaluate.extractors"
            findings.append(Finding(f"weights {name}", "warn", "not here: no Inception Score and no FID", mend))
        elif name in needed:
            mend = f"`medgen weights fetch {name}`, or set loss.weights.perceptual to 0"
            findings.append(Finding(f"weights {name}", "fail", "not here, and the perceptual loss needs them", mend))
        else:
            findings.append(Finding(f"weights {name}", "ok", "not here; these parameters do not need them"))
    return findings


def _data(project: Project, data: Data) -> Finding:
    folder = project.root / data.path
    if folder.is_dir() and any(folder.iterdir()):
        return Finding("data", "ok", str(folder))
    pointer = folder.with_name(folder.name + ".dvc")
    if pointer.is_file():
        return Finding("data", "warn", f"{data.path} is not pulled yet", f"`dvc pull {pointer.name}`")
    mend = "`medgen data sample` draws a dataset, `medgen data import PATH` takes yours"
    return Finding("data", "fail", f"{folder} is missing or empty", mend)


def _dvc(project: Project) -> Finding:
    if not any((folder / ".dvc").is_dir() for folder in (project.root, *project.root.parents)):
        return Finding(
            "dvc", "fail", f"{project.root} is in no DVC project", "`dvc init` in a clone of this repository"
        )
    command = [sys.executable, "-m", "dvc", "remote", "list"]  # outside a project it answers, with the user's remotes
    quiet = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    try:
        done = subprocess.run(
            command, cwd=project.root, env=quiet, capture_output=True, text=True, timeout=DVC_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("dvc", "fail", f"does not run: {error}", "`uv sync`")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        mend = "`uv sync` installs DVC; `dvc config --list` shows what it reads"
        return Finding("dvc", "fail", f"`dvc remote list` failed: {reason}", mend)
    remotes = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    if not remotes:
        return Finding("dvc", "warn", "no remote: data cannot be pushed", "`dvc remote add -d NAME PATH_OR_URL`")
    if not any(remote.endswith("(default)") for remote in remotes):
        return Finding("dvc", "warn", f"no default remote among {', '.join(remotes)}", "`dvc remote default NAME`")
    return Finding("dvc", "ok", ", ".join(remotes))


def _tracking(project: Project, tracking: Tracking) -> Finding:
    if not tracking.enabled:
        return Finding("tracking", "ok", "off (tracking.enabled); runs are recorded in runs/ only")
    uri = store_uri(project, tracking)
    scheme, separator, rest = uri.partition("://")
    if scheme == "sqlite" and rest.startswith("/"):
        return _tracking_file(project.root / rest[1:])
    if scheme in ("http", "https"):
        return _tracking_server(uri, tracking.timeout_seconds)
    if not separator or scheme == "file":
        mend = "MLflow 3 keeps runs in a database: set tracking.uri to sqlite:///mlflow.db or to a server"
        return Finding("tracking", "fail", f"{uri!r} is a folder", mend)
    return Finding("tracking", "ok", f"a store of kind {scheme!r}; not looked into")


def _tracking_file(path: Path) -> Finding:
    """Whether an SQLite store can be written, or made."""
    if not path.exists():
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            return Finding("tracking", "ok", f"{path} will be made by the first run")
        return Finding(
            "tracking", "fail", f"{path.parent} cannot be written", "Make that folder, or change tracking.uri"
        )
    if not os.access(path, os.W_OK):
        return Finding("tracking", "fail", f"{path} cannot be written", f"`chmod u+w {path}`, or change tracking.uri")
    try:
        connection = sqlite3.connect(path, timeout=0.2)
        try:
            verdict = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        finally:
            connection.close()
    except sqlite3.OperationalError as error:  # locked, for one
        mend = "Another program holds it; runs go on, and `medgen sync` sends what it missed"
        return Finding("tracking", "warn", f"{path}: {error}", mend)
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        return Finding("tracking", "fail", f"{path} is damaged: {verdict}", "Move it away and run `medgen sync`")
    return Finding("tracking", "ok", str(path))


def _tracking_server(uri: str, timeout: float) -> Finding:
    """Whether a tracking server answers. It may be away: a run does not need it."""
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]  # a password in the address is neither sent here nor shown
    address = urllib.parse.urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/health", "", ""))
    issuer = os.environ.get(ISSUER) if parts.scheme == "https" else None
    try:
        trusted = ssl.create_default_context(cafile=issuer)
    except OSError as error:
        return Finding("tracking", "fail", f"{ISSUER}: {issuer}: {error}", "Set it to the file of the certificate")
    try:
        with urllib.request.urlopen(address, timeout=timeout, context=trusted) as answer:
            answer.read(64)
    except urllib.error.HTTPError as error:
        mend = "Start the server with `--allowed-hosts` naming this host" if error.code == 403 else "Check tracking.uri"
        return Finding("tracking", "warn", f"{address} answers {error.code} {error.reason}", mend)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        mend = "Start the server or change tracking.uri; runs go on without, and `medgen sync` sends what it missed"
        return Finding("tracking", "warn", f"{address} does not answer: {reason}", mend)
    return Finding("tracking", "ok", f"{parts.scheme}://{host}{parts.path}")
