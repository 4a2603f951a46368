"""Download a preprocessed dataset from S3 once, check it against its hashes, and open the local copy.

store = open_store(fetch_store("s3://bucket/dataset"))

Copies are kept in ~/.cache/medgen/stores/FINGERPRINT, or in $MEDGEN_STORES/FINGERPRINT.
"""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from medgen.data.s3 import S3Folder
from medgen.data.store import DESCRIPTION
from medgen.datasets.download import cache_folder
from medgen.errors import UserError
from medgen.io import hash_file, replace_folder, unsafe_name

_MAX_DESCRIPTION = 64 << 20  # bytes of dataset.json; it has 150 for each file


def fetch_store(url: str) -> Path:
    """The folder of the local copy of a dataset on S3; only its description is downloaded if there is a copy already.

    Raises:
        UserError: the bucket cannot be read, `url` is no dataset, a file is damaged, or the disk lacks space.
    """
    folder = S3Folder(url)
    with TemporaryDirectory(prefix="medgen-") as temporary:
        path = Path(temporary, DESCRIPTION)
        try:
            folder.download(DESCRIPTION, path, max_bytes=_MAX_DESCRIPTION)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no {DESCRIPTION}; expected a preprocessed dataset, the folder artifacts/dataset of a "
                "project. Check the address"
            ) from None
        text = path.read_bytes()
    fingerprint, files = _parse(folder, text)
    copy = cache_folder("stores") / fingerprint
    if copy.is_dir():
        return copy
    with replace_folder(copy) as building:
        folder.download_all({name: size for name, (size, _) in files.items()}, building)
        for name, (_, sha256) in files.items():
            if (found := hash_file(building / name)) != sha256:
                raise UserError(
                    f"{folder}/{name}: damaged: found SHA-256 {found[:12]}…; expected {sha256[:12]}…. Upload the "
                    "dataset again"
                )
        (building / DESCRIPTION).write_bytes(text)
    return copy


def _parse(folder: S3Folder, text: bytes) -> tuple[str, dict[str, tuple[int, str]]]:
    """Fingerprint of a dataset, and size and SHA-256 of each file, from its description."""
    try:
        description = json.loads(text)
        fingerprint = str(description["fingerprint"])
        files = {str(name): (int(each["bytes"]), str(each["sha256"])) for name, each in description["files"].items()}
        is_valid = re.fullmatch("[0-9a-f]{12}", fingerprint) is not None and not any(map(unsafe_name, files))
    except (ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{folder}/{DESCRIPTION}: not the description of a preprocessed dataset; expected one that `medgen "
            "preprocess` wrote. Upload the dataset again"
        )
    return fingerprint, files
