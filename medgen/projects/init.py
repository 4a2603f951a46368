"""Create a project: a folder in which `dvc repro` runs, without a clone of medgen's repository.

medgen init xray --recipe chest-xray-64 --data PATH
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from medgen import config
from medgen.config import Project
from medgen.console import say, warn
from medgen.datasets import import_data
from medgen.errors import UserError
from medgen.io import write_atomic
from medgen.projects.recipes import find
from medgen.projects.shipped import find_shipped

TEMPLATES = Path(__file__).with_name("templates")


def init(folder: Path, recipe: str | None = None, data: Path | None = None) -> None:
    """Write params.yaml, dvc.yaml, .gitignore, .dvcignore and README.md, initialize git and DVC, and import images.

    Args:
        folder: the project's folder; created if it does not exist. Its other files and its git repository are kept.
        recipe: name of the recipe that params.yaml is a copy of; by default the parameters of the sample project.
        data: folder or archive of images to import; its name becomes the dataset's.

    Raises:
        UserError: unknown recipe, no such data, a file that the project needs exists with other content, the folder
            cannot be written, or git, DVC or the import failed. The first three leave the folder unchanged.
    """
    params_file = find(recipe) if recipe else find_shipped("params.yaml")
    files = {
        "params.yaml": params_file.read_bytes(),
        "dvc.yaml": find_shipped("dvc.yaml").read_bytes(),
        ".dvcignore": find_shipped(".dvcignore").read_bytes(),
        ".gitignore": (TEMPLATES / "gitignore").read_bytes(),
        "README.md": (TEMPLATES / "README.md").read_text(encoding="utf-8").format(name=folder.resolve().name).encode(),
    }
    params = config.load(params_file)
    _check(folder, files, params.data, data)
    try:
        for name, content in files.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name a folder that you may create") from None
    _init_git_and_dvc(folder)
    origin = f"recipe {recipe!r}" if recipe else "the sample project"
    say(f"{folder}: a project with the parameters of {origin}. Next: cd {folder}; README.md lists the steps")
    if data is not None:
        import_data.import_folder(Project(folder), params.data, params.preprocess, data, file=folder / "params.yaml")


def _check(folder: Path, files: Mapping[str, bytes], section: config.Data, data: Path | None) -> None:
    """Refuse a folder in which a file, or the data, would be replaced."""
    paths = [folder / name for name, content in files.items() if not _is_free(folder / name, content)]
    if paths:
        raise UserError(
            f"{', '.join(map(str, paths))}: found with other content, which `medgen init` does not replace. Rename or "
            "move it and run the command again, or name a new folder"
        )
    if data is None:
        return
    if not data.exists():
        raise UserError(f"--data {data}: not found; expected a folder of images, or a zip, tar or tar.gz of one")
    if data.resolve() == (folder / section.path).resolve():
        raise UserError(
            f"--data {data}: this is already the project's data folder. Leave --data out, then run "
            f"`dvc add {section.path}` in {folder}"
        )
    import_data.require_replaceable(Project(folder), section)


def _is_free(path: Path, content: bytes) -> bool:
    """Return True if nothing is at `path`, or a file with this content."""
    return not path.exists() or (path.is_file() and path.read_bytes() == content)


def _init_git_and_dvc(folder: Path) -> None:
    """Make the folder a git and a DVC repository, unless it is one or, for git, part of one that does not ignore it."""
    if (folder / ".dvc").is_dir():
        return
    options: list[str] = []
    if shutil.which("git") is None:
        warn("git is not installed: the project has no versions, and its results cannot be traced to a commit")
        options = ["--no-scm"]
    elif _git(folder, "rev-parse", "--is-inside-work-tree") != 0 or _git(folder, "check-ignore", ".dvc") == 0:
        _run(folder, "git", "init", "--quiet")
    elif not (folder / ".git").exists():
        options = ["--subdir"]
    _run(folder, sys.executable, "-m", "dvc", "init", "--quiet", *options)
    _run(folder, sys.executable, "-m", "dvc", "config", "core.analytics", "false")


def _git(folder: Path, *arguments: str) -> int:
    """Exit code of a git command."""
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False).returncode


def _run(folder: Path, *command: str) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}  # `dvc init` runs before the project's own setting
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        name = " ".join(command[command.index("-m") + 1 :] if "-m" in command else command)
        raise UserError(f"{folder}: `{name}` failed: {(done.stderr or done.stdout).strip()}")
