"""Atomic writes, hashes, and artifacts: folders with NAME.safetensors and NAME.json."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from medgen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
if sys.platform != "win32":
    import fcntl

_BAD_NAME = re.compile(r"[\x00-\x1f\x7f]|^[A-Za-z]:")


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary file in the same folder, flush it to disk and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(path.parent), open_atomic(path) as file:
        file.write(content)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file in the same folder, which is moved to `path` at the end of the block."""
    temporary = path.with_name(f"{path.name}.tmp")  # the next write replaces one that a killed process has left
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk keeps no half-written files
        raise


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread writes to `folder`; no effect where folders cannot be locked."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which unlocks it


def unsafe_name(name: str) -> str | None:
    """Reason against the use of a name from an archive or a bucket below a local folder, or None."""
    path = PurePosixPath(name.replace("\\", "/"))
    if _BAD_NAME.search(name) or path.is_absolute() or ".." in path.parts:
        return "has a path outside the folder or an invalid name"
    try:
        if len(os.fsencode(str(path))) > 1000 or any(len(part.encode()) > 255 for part in path.parts):
            return "has a name that is too long"
    except UnicodeEncodeError:
        return "has a name that is not valid Unicode"
    return None


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder, which replaces `folder` at the end of the block; after an error it is deleted."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
    building.mkdir(parents=True)
    try:
        yield building
        swap(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files, which replaces an earlier one after all of them are on disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder.parent), replace_folder(folder) as building:
        for name, content in files.items():
            write_atomic(building / name, content)


def swap(new: Path, target: Path) -> None:
    """Move the folder `new` to `target`, then remove the earlier folder there."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: object) -> bytes:
    """Indented JSON text."""
    return f"{json.dumps(value, indent=2)}\n".encode()


def save_artifact(folder: Path, name: str, tensors: Mapping[str, "Tensor"], description: Mapping[str, Any]) -> str:
    """Write NAME.safetensors and NAME.json, which replace the folder's content; return the SHA-256 of the tensors.

    The description gets the key `sha256`.
    """
    import safetensors.torch

    content = safetensors.torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    files = {f"{name}.safetensors": content, f"{name}.json": to_json({**description, "sha256": digest})}
    write_folder(folder, files)
    return digest


def read_description(folder: Path, name: str, command: str) -> dict[str, Any]:
    """Content of NAME.json.

    Raises:
        UserError: it is missing, or not a JSON object; the message names the command that writes it.
    """
    path = folder / f"{name}.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `{command}` (or `dvc repro`) first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run `{command}` again") from None
    if not isinstance(description, dict):
        raise UserError(f"{path}: expected a JSON object; run `{command}` again")
    return description


def read_tensors(folder: Path, name: str, command: str, digest: str | None = None) -> dict[str, "Tensor"]:
    """Tensors of NAME.safetensors, on the CPU; `digest` is their expected SHA-256.

    Raises:
        UserError: the file is missing or damaged; the message names the command that writes it.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    path = folder / f"{name}.safetensors"
    try:
        content = path.read_bytes()
        if digest is not None and digest != hashlib.sha256(content).hexdigest():
            raise UserError(f"{path}: damaged: its SHA-256 differs from {name}.json; run `{command}` again")
        return safetensors.torch.load(content)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `{command}` (or `dvc repro`) first") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); run `{command}` again") from None


@contextmanager
def parsing(path: Path, command: str) -> Iterator[None]:
    """Turn errors of wrong or missing values in a file into a UserError that names the command that writes it."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:  # ValidationError is a ValueError
        raise UserError(f"{path}: incomplete or damaged ({error}); run `{command}` again") from None
