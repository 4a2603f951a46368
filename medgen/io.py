"""Files and folders that are whole or absent."""

import hashlib
import os
import shutil
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Writes beside, flushes to the disk, and moves into place; what a kill leaves beside is overwritten next time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk should not stay full of halves
        raise


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes a folder of files; it takes the place of an earlier one when all of it is on the disk."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    for name, content in files.items():
        write_atomic(building / name, content)
    swap(building, folder)


def swap(new: Path, place: Path) -> None:
    """Puts the folder `new` at `place`; what was there is removed only after that."""
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
