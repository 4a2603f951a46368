"""List and download the files of a folder on S3, or on another service with its protocol (AWS_ENDPOINT_URL).

folder = S3Folder("s3://bucket/xrays")
folder.download("train/NORMAL/a.png", Path("/tmp/a.png"))

Keys come only from the environment and the AWS configuration files. Names in a bucket are untrusted input: a name that
could lead out of a local folder is refused.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from medgen.errors import UserError
from medgen.io import unsafe_name

PREFIX = "s3://"
NUM_CONNECTIONS = 16  # downloads at the same time: each waits mostly for the network
_SPARE = 64 << 20  # bytes to leave free on the disk
_URL = re.compile(r"s3://[a-z0-9][a-z0-9._-]+(/[^?#]*)?")


def is_s3(path: str | Path) -> bool:
    """True for an address that starts with s3://."""
    return str(path).startswith(PREFIX)


@dataclass(frozen=True)
class S3Folder:
    """A folder of a bucket. Raises UserError for an address that is not s3://BUCKET/FOLDER."""

    url: str

    def __post_init__(self) -> None:
        if not _URL.fullmatch(self.url):
            shown = self.url if "@" not in self.url else "s3://…@…"
            raise UserError(
                f"{shown}: not an address of a folder; expected s3://BUCKET/FOLDER. Keys belong in "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in ~/.aws/credentials"
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.url.removeprefix(PREFIX)).name

    def is_file(self) -> bool:
        """True if the address is that of one file."""
        with _errors(self.url):
            return bool(_file_system().isfile(self.url))

    def list_files(self) -> dict[str, int]:
        """Sizes in bytes of all files below the folder, by their sorted names relative to it.

        Raises:
            UserError: there are none, the bucket cannot be read, or a name could lead out of a local folder.
        """
        with _errors(self.url):
            found = _file_system().find(self.url, detail=True)
        start = len(self.url.removeprefix(PREFIX)) + 1
        sizes = {key[start:]: int(entry["size"]) for key, entry in sorted(found.items()) if not key.endswith("/")}
        for name in sizes:
            if (problem := unsafe_name(name)) or str(PurePosixPath(name)) != name:
                raise UserError(
                    f"{self.url}: file {name[:100]!a} {problem or 'has an invalid name'}; expected names that a local "
                    "folder can have. Rename or remove it in the bucket"
                )
        if not sizes:
            raise UserError(f"{self.url}: no files; expected a folder of the bucket. Check the address")
        return sizes

    def download(self, name: str, target: Path, max_bytes: int | None = None) -> None:
        """Download a file of the folder; "" is the address itself.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: the bucket cannot be read, the file is larger than `max_bytes`, or the disk lacks space.
        """
        key = f"{self.url}/{name}" if name else self.url
        target.parent.mkdir(parents=True, exist_ok=True)
        with _errors(key):
            system = _file_system()
            size = int(system.info(key)["size"])
            if max_bytes is not None and size > max_bytes:
                raise UserError(f"{key}: {size} bytes; expected at most {max_bytes}. Check the address")
            _require_space(target.parent, size, key)
            system.get_file(key, str(target))

    def download_all(self, sizes: Mapping[str, int], target: Path) -> None:
        """Download files, given as from `list_files`, to the same names in a local folder.

        Raises:
            UserError: as `download`, or a file was removed meanwhile.
        """
        target.mkdir(parents=True, exist_ok=True)
        _require_space(target, sum(sizes.values()), self.url)
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            futures = [pool.submit(self.download, name, target / name, size) for name, size in sizes.items()]
            try:
                for future in futures:
                    future.result()
            except FileNotFoundError:
                raise UserError(f"{self.url}: a file was removed during the download; run the command again") from None
            finally:
                for future in futures:
                    future.cancel()


def _require_space(folder: Path, num_bytes: int, source: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE:
        raise UserError(
            f"{folder}: {free / 1e6:.0f} MB free; expected {(num_bytes + _SPARE) / 1e6:.0f} MB for {source}. "
            "Free disk space, or set TMPDIR to a folder on another disk"
        )


@cache
def _file_system() -> Any:
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Raise the errors of s3fs as UserError, except for a missing file."""
    try:
        import s3fs  # noqa: F401
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError, NoCredentialsError
    except ModuleNotFoundError:
        raise UserError(
            f"{url}: reading from S3 needs s3fs, which is not installed; run `uv sync --extra s3`, or "
            "`pip install 'medgen[s3]'`"
        ) from None
    try:
        yield
    except NoCredentialsError:
        raise UserError(
            f"{url}: no credentials for S3; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or "
            "~/.aws/credentials. Set them and run the command again"
        ) from None
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            f"{url}: S3 does not answer ({error}); expected the bucket there. Check the network and AWS_ENDPOINT_URL"
        ) from None
    except FileNotFoundError as error:
        if "specified bucket" not in str(error):  # a missing file otherwise
            raise
        raise UserError(f"{url}: there is no such bucket; check the address and AWS_ENDPOINT_URL") from None
    except PermissionError as error:
        raise UserError(f"{url}: S3 refused to read it ({error}); check the keys and their permissions") from None
    except OSError as error:
        raise UserError(f"{url}: the download failed ({error}); check network and disk, and try again") from None
