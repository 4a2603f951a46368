"""Hashes of a version's files: recorded when it is registered, and checked each time it is downloaded.

The version's file LIST lists the SHA-256 of each file, its code included; the version's tag FILES_TAG is the SHA-256
of the list. The evaluation, which is added later, has a digest of its own (`medgen.registry.evaluations`).
"""

import hashlib
import json
from pathlib import Path

from medgen.errors import UserError
from medgen.io import hash_file, to_json, write_atomic

HASHES = "hashes"  # folder of the list: MLflow lists folders, but not single files
LIST = f"{HASHES}/files.json"
FILES_TAG = "medgen.files"


def list_files(folder: Path) -> str:
    """Write LIST to a version's folder; return its SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    content = to_json({path.relative_to(folder).as_posix(): hash_file(path) for path in paths})
    write_atomic(folder / LIST, content)
    return hashlib.sha256(content).hexdigest()


def signed_text(name: str, digest: str) -> str:
    """Text that a version's signature signs: the registered model's name and the value of FILES_TAG."""
    return json.dumps({"model": name, "files": digest})


def check_files(folder: Path, subfolder: str, listed: Path, digest: str, uri: str) -> None:
    """Check a downloaded version, or one subfolder of it, against its list of files.

    Files that are not in the list are removed: nothing else may be loaded or executed.

    Args:
        folder: the downloaded files.
        subfolder: the part of the version that `folder` has; "" for the whole.
        listed: the downloaded file LIST.
        digest: its SHA-256, from the version's tag.
        uri: name of the version, for messages.

    Raises:
        UserError: a file is missing or differs.
    """

    def changed(name: str) -> UserError:
        return UserError(
            f"{uri}: {name} in MLflow's store is not the file that was registered; nothing of it was used. Restore the "
            "store from a backup, or register the model again"
        )

    if not listed.is_file() or hash_file(listed) != digest:
        raise changed(LIST)
    prefix = f"{subfolder}/" if subfolder else ""
    hashes = {
        name.removeprefix(prefix): expected
        for name, expected in json.loads(listed.read_bytes()).items()
        if name.startswith(prefix)
    }
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file() or hash_file(path) != expected:
            raise changed(prefix + name)
    for path in sorted(folder.rglob("*"), reverse=True):  # the files of a folder before the folder itself
        if path.is_symlink() or path.is_file():
            if path.relative_to(folder).as_posix() not in hashes:
                path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()
