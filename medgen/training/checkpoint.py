"""Checkpoints in runs/<fingerprint>/: written atomically, read without pickle.

A file ends with its SHA-256 and contains the name of its run's folder, so that neither a damaged checkpoint nor that of
another run is trained on.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from medgen.errors import UserError
from medgen.io import write_atomic

NAME = "checkpoint.pt"
HASH_BYTES = hashlib.sha256().digest_size


def save(scratch: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint atomically."""
    buffer = io.BytesIO()
    torch.save({"run": scratch.name, **state}, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write_atomic(scratch / NAME, buffer.getvalue())


def load(scratch: Path) -> dict[str, Any] | None:
    """The run's checkpoint on the CPU; None if there is none.

    Raises:
        UserError: the file is damaged, or of another run.
    """
    path = scratch / NAME
    again = "remove the file to train this run from the start"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        if hashlib.sha256(content[:-HASH_BYTES]).digest() != content[-HASH_BYTES:]:
            raise EOFError("its SHA-256 is not the one at its end")
        state: dict[str, Any] = torch.load(io.BytesIO(content[:-HASH_BYTES]), weights_only=True, map_location="cpu")
        run = state["run"]
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: damaged checkpoint ({error}); {again}") from None
    if run != scratch.name:
        raise UserError(f"{path}: the checkpoint of run {run}; expected one of {scratch.name}; {again}")
    return state


def exists(scratch: Path) -> bool:
    """Return True if the run has a checkpoint."""
    return (scratch / NAME).exists()


def remove(scratch: Path) -> None:
    """Remove the run's checkpoint if there is one; the run can then not be resumed."""
    (scratch / NAME).unlink(missing_ok=True)
