"""List the files of a folder. Junk, special files and links out of the folder are reported or refused.

for path, reason in list_files(Path("data")):
    …                                    # reason is None for a file that may be an image

A bucket has only names (`list_names`).
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from medgen.errors import UserError

HIDDEN = "hidden"
_TOOL = "files of a tool, skipped"
_JUNK_FOLDERS = {  # lower-case names; files below them are listed but never read
    ".ipynb_checkpoints": "a notebook's checkpoint copy",
    "__macosx": "metadata of macOS",
    "__pycache__": "compiled Python",
}
_SKIPPED_FOLDERS = frozenset({".git", ".dvc", ".hg", ".svn"})  # one entry instead of thousands of a tool's files
_CACHE_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")  # target of DVC's links


def list_files(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Each file's posix path relative to `folder`, and the reason why it cannot be an image, or None.

    Bytes of a name that are not UTF-8 are escaped, because such a path cannot be written to a text file.

    Raises:
        UserError: a link leads out of the folder or to a folder, or a folder cannot be listed.
    """
    waiting: list[tuple[str, str | None]] = [("", None)]  # folders, and the reason that applies to all files below
    while waiting:
        parent, junk = waiting.pop()
        try:
            with os.scandir(folder / parent) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{folder / _escape(parent)}: cannot be listed ({error.strerror}); expected a folder of images. "
                "Make it readable, or move it out"
            ) from None
        for entry in found:
            name = parent + entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name in _SKIPPED_FOLDERS:
                    yield _escape(f"{name}/"), _TOOL
                else:
                    waiting.append((f"{name}/", junk or _junk_folder(entry.name)))
            else:
                reason = junk or _reason(folder, name, entry)
                yield (name, None) if reason is None else (_escape(name), reason)


def list_names(names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """As `list_files`, for the names of files that are not on this machine."""
    skipped: set[str] = set()
    for name in names:
        *folders, last = name.split("/")
        tool = next((at for at, folder in enumerate(folders) if folder in _SKIPPED_FOLDERS), None)
        if tool is not None:
            skipped.add("/".join(folders[: tool + 1]) + "/")
        else:
            junk = next(filter(None, map(_junk_folder, folders)), None)
            yield name, junk or (HIDDEN if last.startswith(".") else None)
    yield from ((folder, _TOOL) for folder in sorted(skipped))


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path that leads out of the folder, so that a downloaded dataset cannot make medgen read other files.

    Links to objects of DVC's cache are allowed in a repository of DVC, which makes such links.

    Raises:
        UserError: `path` leads out of `folder`.
    """
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return
    if _CACHE_OBJECT.search(target.as_posix()) and any((parent / ".dvc").is_dir() for parent in root.parents):
        return
    raise UserError(f"{path}: leads out of {folder}, to {target}; expected a file inside. Copy the file there")


def _junk_folder(name: str) -> str | None:
    return _JUNK_FOLDERS.get(name.lower()) or (HIDDEN if name.startswith(".") else None)


def _reason(folder: Path, name: str, entry: os.DirEntry[str]) -> str | None:
    if entry.name.startswith("."):
        return HIDDEN
    if _escape(name) != name:
        return "its name is not UTF-8: rename it"
    if entry.is_symlink():
        return _link_reason(folder, folder / name)
    return None if entry.is_file(follow_symlinks=False) else "not a regular file"


def _link_reason(folder: Path, path: Path) -> str | None:
    if path.is_dir():
        raise UserError(
            f"{path}: a link to a folder; expected a folder with the files themselves. "
            "Copy the files there, or give the real folder to `medgen data import`"
        )
    if not path.exists():  # the target is missing, or links form a cycle
        return "a link that leads nowhere"
    if not path.is_file():
        return "not a regular file"
    check_inside(folder, path)
    return None


def _escape(name: str) -> str:
    r"""The name with bytes that are not UTF-8 as \xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
