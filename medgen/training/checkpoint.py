"""Resume checkpoints in runs/<fingerprint>/: written atomically, read without pickle."""

import ast
import hashlib
import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import medgen
from medgen.errors import UserError
from medgen.io import write_atomic

NAME = "checkpoint.pt"
# files that decide the result of every training; a stage adds its own
TRAINING_CODE = tuple(f"training/{name}.py" for name in ("guard", "loader", "loop", "losses", "optimizers", "state"))


def save(scratch: Path, state: dict[str, Any]) -> None:
    """Replaces the run's checkpoint; a kill at any moment leaves the old one or the new one whole."""
    write_atomic(scratch / NAME, _serialise(state))


def load(scratch: Path) -> dict[str, Any] | None:
    """The run's checkpoint on the CPU, or None where there is none.

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
            f"{path}: damaged checkpoint ({error}); remove the file to train this run from its start"
        ) from None


def remove(scratch: Path) -> None:
    """Removes the run's checkpoint, if there is one: what is left cannot be trained on."""
    (scratch / NAME).unlink(missing_ok=True)


def code_fingerprint(sources: Iterable[Path]) -> str:
    """Hash of what Python files do: comments, docstrings and layout leave it as it is.

    Part of a run's fingerprint, so that a changed model is trained anew and not resumed.
    """
    digest = hashlib.sha256()
    for source in sorted(sources):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                constant = body[0].value
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    body[:1] = [] if len(body) > 1 else [ast.Pass()]
        digest.update(f"{source.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def package_fingerprint(*patterns: str) -> str:
    """`code_fingerprint` of the files of medgen that match glob patterns relative to its folder."""
    folder = Path(medgen.__file__).parent
    return code_fingerprint(source for pattern in patterns for source in folder.glob(pattern))


def _serialise(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
