"""Write files to the folder that a user names, without mixing them with earlier ones and without losing the user's.

with new_files(Path("outputs/new")) as folder:
    write_image(folder / "image.png", image)
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medgen.console import say
from medgen.errors import UserError
from medgen.io import hash_file, to_json, write_atomic

RECORD = ".medgen.json"  # in the folder: names and SHA-256 of the files that medgen wrote there
NUM_NAMES = 3  # of the user's files that an error names


@contextmanager
def new_files(out: Path) -> Iterator[Path]:
    """Yield an empty folder; at the end of the block its files replace those that an earlier call wrote to `out`.

    After an error in the block `out` is unchanged.

    Raises:
        UserError: `out` contains files of another origin, or changed ones, or cannot be written.
    """
    building = out / ".building"
    try:
        earlier = _earlier_files(out)
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir(parents=True)
        yield building
        _replace(building, out, earlier)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error}). Name a folder that you may write to"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _earlier_files(out: Path) -> list[Path]:
    """The files in `out`, if medgen wrote all of them; hidden files do not count."""
    files = [path for path in sorted(out.iterdir()) if not path.name.startswith(".")] if out.is_dir() else []
    record = out / RECORD
    written = json.loads(record.read_text(encoding="utf-8"))["files"] if record.exists() else {}
    others = [path.name for path in files if not (path.is_file() and written.get(path.name) == hash_file(path))]
    if others:
        more = f" and {len(others) - NUM_NAMES} more" if len(others) > NUM_NAMES else ""
        raise UserError(
            f"--out {out}: contains files that medgen did not write or that were changed since: "
            f"{', '.join(others[:NUM_NAMES])}{more}. Name a new folder, or move these files"
        )
    return files


def _replace(building: Path, out: Path, earlier: list[Path]) -> None:
    """Remove the earlier files before the new ones are moved, so that a crash never leaves both."""
    files = sorted(building.iterdir())
    for path in earlier:
        path.unlink()
    write_atomic(out / RECORD, to_json({"files": {path.name: hash_file(path) for path in files}}))
    for path in files:
        os.replace(path, out / path.name)
    if earlier:
        say(f"{out}: replaced {len(earlier)} files of an earlier call")
