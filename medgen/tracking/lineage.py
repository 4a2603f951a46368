"""The lineage of a result: commit, data, parameters, device, versions."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path

from ruamel.yaml import YAML

from medgen import config
from medgen.config import Project, Section


def lineage(project: Project, *params: Section, device: str = "unknown", precision: str = "unknown") -> dict[str, str]:
    """The lineage of a result as tags; every key is present, with the value "unknown" if it cannot be determined.

    Args:
        project: the project; its git repository, dataset and .dvc file are read.
        params: all of params.yaml, or the sections that determine the result.
        device: PyTorch's name of the device, such as "cuda:0".
        precision: "fp32" or "bf16".

    git.dirty ignores the files that the pipeline itself writes (dvc.lock, reports/).
    """
    changes = _git(project.root, "status", "--porcelain", "--", ".", ":(exclude)dvc.lock", ":(exclude)reports")
    versions = {f"version.{name}": _version(name) for name in ("torch", "torchvision", "medgen", "dvc", "mlflow")}
    return {
        "git.commit": _git(project.root, "rev-parse", "HEAD") or "unknown",
        "git.branch": _git(project.root, "rev-parse", "--abbrev-ref", "HEAD") or "unknown",
        "git.dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "dataset.fingerprint": _dataset_fingerprint(project.dataset / "dataset.json"),
        "data.md5": _data_md5(project.root),
        "params.fingerprint": config.fingerprint(*params) if params else "unknown",
        "device": device,
        "gpu": _gpu_name(device),
        "precision": precision,
        "version.python": platform.python_version(),
        **versions,
    }


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None without git, repository or commit."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _dataset_fingerprint(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError):
        return "unknown"


def _data_md5(root: Path) -> str:
    """DVC's hash of the raw data, from data.dvc or else the first .dvc file."""
    found = [path for path in (root / "data.dvc", *sorted(root.glob("*.dvc"))) if path.is_file()]
    if not found:
        return "unknown"
    content = YAML(typ="safe", pure=True).load(found[0].read_text(encoding="utf-8"))
    return str(content["outs"][0].get("md5", "unknown"))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _gpu_name(device: str) -> str:
    if not device.startswith("cuda"):
        return "none" if device != "unknown" else "unknown"
    import torch

    return torch.cuda.get_device_name(device)
