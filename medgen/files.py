"""Files that are whole or absent."""

import os
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Writes beside, flushes to the disk, and moves into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
