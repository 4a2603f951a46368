"""A folder -> each file in it, once; what is junk, no regular file or leads out of the folder is told apart.

for path, reason in walk(Path("data")):
    …                                    # reason is None for a file that may be a picture
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from medgen.errors import UserError

HIDDEN = "hidden"
_JUNK_FOLDERS = {  # in lower case; what lies below is listed and never read
    ".ipynb_checkpoints": "a notebook's checkpoint copy",
    "__macosx": "metadata of macOS",
    "__pycache__": "compiled Python",
}
_CLOSED_FOLDERS = frozenset({".git", ".dvc", ".hg", ".svn"})  # thousands of files of a tool: one row says enough
_CACHE_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")  # where DVC's own links lead


def walk(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Each file's posix path relative to `folder`, and why it cannot be a picture, or None.

    A name that is not UTF-8 is given with its bytes spelled out, as such a path cannot be written down.

    Raises:
        UserError: a link leads out of the folder or to a folder, or a folder cannot be listed.
    """
    waiting: list[tuple[str, str | None]] = [("", None)]  # folders, and why nothing below them is a picture
    while waiting:
        place, junk = waiting.pop()
        try:
            with os.scandir(folder / place) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{folder / _spelled(place)}: cannot be listed ({error.strerror}); expected a folder of images. "
                "Make it readable, or move it out"
            ) from None
        for entry in found:
            name = place + entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name in _CLOSED_FOLDERS:
                    yield _spelled(f"{name}/"), "files of a tool, not looked into"
                else:
                    waiting.append((f"{name}/", junk or _junk_folder(entry.name)))
            else:
                reason = junk or _reason(folder, name, entry)
                yield (name, None) if reason is None else (_spelled(name), reason)


def refuse_outside(folder: Path, path: Path) -> None:
    """A downloaded folder must not make us read files elsewhere; DVC's links into its cache are fine.

    Raises:
        UserError: `path` leads out of `folder`.
    """
    target = path.resolve()
    if target.is_relative_to(folder.resolve()) or _CACHE_OBJECT.search(target.as_posix()):
        return
    raise UserError(f"{path}: leads out of {folder}, to {target}; expected a file inside. Copy the file there")


def _junk_folder(name: str) -> str | None:
    return _JUNK_FOLDERS.get(name.lower()) or (HIDDEN if name.startswith(".") else None)


def _reason(folder: Path, name: str, entry: os.DirEntry[str]) -> str | None:
    if entry.name.startswith("."):
        return HIDDEN
    if _spelled(name) != name:
        return "its name is not UTF-8: rename it"
    if entry.is_symlink():
        return _reason_of_link(folder, folder / name)
    return None if entry.is_file(follow_symlinks=False) else "not a regular file"


def _reason_of_link(folder: Path, path: Path) -> str | None:
    if path.is_dir():
        raise UserError(
            f"{path}: a link to a folder; expected the files themselves. "
            "Put them there, or name the real folder to `medgen data import`"
        )
    if not path.exists():  # nothing, or a ring of links
        return "a link that leads nowhere"
    if not path.is_file():
        return "not a regular file"
    refuse_outside(folder, path)
    return None


def _spelled(name: str) -> str:
    """The name, with bytes that are not UTF-8 as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
