"""The lineage of a result: commit, files, data, parameters, device, versions.

What a result was made from is known by content, not by the state of the git work tree: the tag `files` has a hash of
each part that the result's stages depend on. A commit that contains these parts is an origin of the result, also if it
was made after the result. Other files (dvc.lock, reports/, plots, untracked files) never count.
"""

import importlib.metadata
import io
import json
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from medgen import config, source
from medgen.config import Project, Section

# Sections of params.yaml that each stage depends on, as in dvc.yaml.
SECTIONS = {
    "preprocess": ("data", "preprocess"),
    "features": ("features",),
    "train": ("model", "loss", "train"),
    "prior": ("prior",),
    "refiner": ("refiner",),
    "utility": ("features", "utility"),
    "evaluate": ("evaluate",),
}
# Stages that make a recorded result: its own, and those before it that record none.
STAGES_OF = {
    "train": ("preprocess", "train"),
    "prior": ("prior",),
    "refiner": ("refiner",),
    "evaluate": ("features", "utility", "evaluate"),
}
MAX_COMMITS = 50  # later commits that `find_commit` searches


def lineage(
    project: Project, *params: Section, stage: str | None = None, device: str = "unknown", precision: str = "unknown"
) -> dict[str, str]:
    """The lineage of a result as tags; every key is present, with the value "unknown" if it cannot be determined.

    Args:
        project: the project; its git repository, dataset, params.yaml, dvc.yaml and .dvc file are read.
        params: all of params.yaml, or the sections that determine the result.
        stage: the stage that made the result; None: all stages.
        device: PyTorch's name of the device, such as "cuda:0".
        precision: "fp32" or "bf16".

    git.dirty is "true" if the commit has other content of `files`.
    """
    root = project.root
    commit = _git(root, "rev-parse", "HEAD")
    files = hash_files(root, SECTIONS if stage is None else STAGES_OF[stage])
    dataset = _read_dataset(project.dataset / "dataset.json")
    versions = {f"version.{name}": _version(name) for name in ("torch", "torchvision", "medgen", "dvc", "mlflow")}
    return {
        "git.commit": commit or "unknown",
        "git.branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD") or "unknown",
        "git.dirty": "unknown" if commit is None else str(bool(find_changes(root, commit, files))).lower(),
        "files": json.dumps(files, sort_keys=True),
        "dataset.fingerprint": str(dataset.get("fingerprint", "unknown")),
        "dataset.name": str(dataset.get("name", "unknown")),
        "data.md5": _data_md5(root),
        "params.fingerprint": config.fingerprint(*params) if params else "unknown",
        "device": device,
        "gpu": _gpu_name(device),
        "precision": precision,
        "version.python": platform.python_version(),
        **versions,
    }


def hash_files(root: Path, stages: Collection[str]) -> dict[str, str]:
    """Hash of each part of the project's files that the stages depend on; parts that are absent are left out.

    The keys are FILE:PART: the code of a stage in medgen/, a section of params.yaml, a stage of dvc.yaml. The value of
    a .dvc file is DVC's hash of the data.
    """
    keys = [f"medgen:{stage}" for stage in stages]
    keys += [f"params.yaml:{section}" for stage in stages for section in SECTIONS[stage]]
    keys += [f"dvc.yaml:{stage}" for stage in stages]
    if "preprocess" in stages and (data := _data_file(root)) is not None:
        keys.append(data.name)

    def read(name: str) -> str | None:
        return (root / name).read_text(encoding="utf-8") if (root / name).is_file() else None

    hashes = {key: _hash_part(key, read, _code_hash) for key in keys}
    return {key: found for key, found in hashes.items() if found is not None}


def find_changes(root: Path, commit: str | None, files: Mapping[str, str]) -> list[str]:
    """The keys of `files`, as from `hash_files`, whose content is another one in a commit.

    Args:
        root: the project's folder.
        commit: the commit; None: the work tree as it is now.
        files: hashes to compare with. Code counts only if the commit contains medgen's source: an installed medgen is
            no file of the repository.
    """
    if commit is None:
        stages = {part for name, _, part in (key.partition(":") for key in files) if name == "medgen"}
        now = hash_files(root, [stage for stage in SECTIONS if stage in stages])
        return sorted(key for key, found in files.items() if now.get(key) != found)

    def read(name: str) -> str | None:
        return _git(root, "show", f"{commit}:./{name}")

    def code(stage: str) -> str | None:
        if read("medgen/source.py") is None:
            return None if source.PACKAGE.parent == root.resolve() else files[f"medgen:{stage}"]
        return _committed_code(root, _git(root, "rev-parse", f"{commit}:./medgen") or "", stage)

    cached = cache(read)
    return sorted(key for key, found in files.items() if _hash_part(key, cached, code) != found)


def find_commit(root: Path, files: Mapping[str, str], commits: Sequence[str]) -> str | None:
    """The first of `commits`, else the newest commit since then, that has the content of `files`; None without one."""
    known = [commit for commit in dict.fromkeys(commits) if re.fullmatch("[0-9a-f]{40,64}", commit)]
    since = ["rev-list", "--ignore-missing", f"--max-count={MAX_COMMITS}", "HEAD", *(f"^{commit}" for commit in known)]
    candidates = [*known, *(_git(root, *since) or "").split()]
    return next((commit for commit in candidates if not find_changes(root, commit, files)), None)


def _hash_part(key: str, read: Callable[[str], str | None], code: Callable[[str], str | None]) -> str | None:
    """The hash of a part of a file, with functions that read files and hash code; None if the file is absent."""
    name, _, part = key.partition(":")
    if name == "medgen":
        return code(part)
    text = read(name)
    if text is None:
        return None
    try:
        content = YAML(typ="safe", pure=True).load(text)
        if name.endswith(".dvc"):
            return _md5(content)
        section = content.get("stages", {}).get(part) if name == "dvc.yaml" else content.get(part)
    except (YAMLError, AttributeError, LookupError, TypeError):
        return None
    return config.fingerprint(json.dumps(section, sort_keys=True, default=str))


def _code_hash(stage: str, package: Path = source.PACKAGE) -> str:
    return config.fingerprint(dict(source.stage_hashes(source.STAGES[stage], package)))


@cache
def _committed_code(root: Path, tree: str, stage: str) -> str | None:
    """Hash of a stage's code in a git tree that holds medgen's source."""
    top = _git(root, "rev-parse", "--show-toplevel")
    archive = subprocess.run(["git", "archive", tree], cwd=top, capture_output=True, check=False)
    if archive.returncode:
        return None
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
        return _code_hash(stage, Path(folder))


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None without git, repository or commit."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _read_dataset(path: Path) -> dict[str, Any]:
    """The content of dataset.json; {} if it is missing or damaged."""
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return found


def _data_file(root: Path) -> Path | None:
    """data.dvc, or else the first .dvc file; None without one."""
    found = (path for path in (root / "data.dvc", *sorted(root.glob("*.dvc"))) if path.is_file())
    return next(found, None)


def _data_md5(root: Path) -> str:
    """DVC's hash of the raw data."""
    path = _data_file(root)
    return "unknown" if path is None else _md5(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))


def _md5(content: Any) -> str:
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
