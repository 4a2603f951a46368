"""Checkpoints in runs/<fingerprint>/: written atomically, read without pickle."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from medgen.errors import UserError
from medgen.io import write_atomic

NAME = "checkpoint.pt"


def save(scratch: Path, state: dict[str, Any]) -> None:
    """Replace the run's checkpoint atomically."""
    write_atomic(scratch / NAME, _serialise(state))


def load(scratch: Path) -> dict[str, Any] | None:
    """The run's checkpoint on the CPU; None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = scratch / NAME
    try:
        return torch.load(path, weights_only=True, map_location="cpu")  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}); remove the file to train this run from the start"
        ) from None


def remove(scratch: Path) -> None:
    """Remove the run's checkpoint if there is one; the run can then not be resumed."""
    (scratch / NAME).unlink(missing_ok=True)


def _serialise(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
