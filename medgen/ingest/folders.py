"""The folder of a dataset: local, or on S3 and then read file by file through a temporary folder.

with local_files(folder, ["a/scan.hdr", "a/scan.img"]) as root:
    image = nibabel.load(root / "a/scan.hdr")
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medgen.data.s3 import S3Folder, is_s3
from medgen.errors import UserError

Folder = Path | S3Folder


def data_folder(root: Path, path: str) -> Folder:
    """The folder that `data.path` names, for a project in `root`."""
    return S3Folder(path) if is_s3(path) else root / path


@contextmanager
def local_files(folder: Folder, names: Iterable[str]) -> Iterator[Path]:
    """A local folder in which these files have their names: `folder` itself, or a temporary one if it is on S3.

    Files that do not exist are left out. The temporary folder is removed at the end of the block.

    Raises:
        UserError: the bucket cannot be read, or the disk lacks space.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="medgen-") as temporary:
        for name in names:
            with suppress(FileNotFoundError):
                folder.download(name, Path(temporary, name))
        try:
            yield Path(temporary)
        except UserError as error:
            raise UserError(str(error).replace(temporary, folder.url)) from None
