"""Pretrained weights: fetched only when asked for, checked, and never half there.

medgen weights list
medgen weights fetch vgg16
medgen weights verify vgg16
"""

import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from medgen.config import unknown_name
from medgen.errors import UserError

CHUNK = 1 << 20
SPARE = 64 << 20  # bytes to leave free on the disk
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is left alone
NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers that may be better next time


@dataclass(frozen=True)
class Weight:
    """One file of pretrained weights."""

    url: str
    sha256: str
    size: int  # bytes
    use: str

    @property
    def file(self) -> str:
        """Its name in the weights folder."""
        return self.url.rsplit("/", 1)[-1]


WEIGHTS = {
    "vgg16": Weight(
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        size=553_433_881,
        use="perceptual loss (torchvision, ImageNet, BSD-3-Clause)",
    ),
}


def weights_folder() -> Path:
    """Where weights are kept: $MEDGEN_WEIGHTS, or ~/.cache/medgen/weights."""
    chosen = os.environ.get("MEDGEN_WEIGHTS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "medgen" / "weights"


def weights_path(name: str) -> Path:
    """The file of known weights on this machine. Never downloads; looks at the size, not at the hash.

    Raises:
        UserError: unknown name, no such file here (says how to get it), or a file of another size.
    """
    weight, path = _known(name)
    if not path.is_file():
        raise UserError(
            f"{path}: weights {name!r} are not here. Run `medgen weights fetch {name}`; on a machine without network, "
            f"fetch {weight.url} elsewhere and put it at that path, or set MEDGEN_WEIGHTS to the folder that holds it"
        )
    size = path.stat().st_size
    if size != weight.size:
        raise UserError(
            f"{path}: {size} bytes; expected {weight.size}. Remove it and run `medgen weights fetch {name}`"
        )
    return path


def verify_weights(name: str) -> Path:
    """Checks weights against their SHA-256, prints the outcome and returns the file.

    Raises:
        UserError: as `weights_path`, or the hash differs.
    """
    path = weights_path(name)
    _check(path, WEIGHTS[name].sha256)
    Console().print(f"{name}: {path} is whole (SHA-256 {WEIGHTS[name].sha256[:12]}…)", soft_wrap=True, highlight=False)
    return path


def fetch_weights(name: str, base_url: str | None = None) -> Path:
    """Downloads known weights into the weights folder, unless they are there, and returns the file.

    Args:
        name: a key of WEIGHTS.
        base_url: folder of a mirror that holds the file under its own name.

    Raises:
        UserError: as `fetch`.
    """
    weight, path = _known(name)
    url = f"{base_url.rstrip('/')}/{weight.file}" if base_url else weight.url
    fetch(url, path, weight.sha256)
    Console().print(f"{name}: {path}", soft_wrap=True, highlight=False)
    return path


def list_weights() -> dict[str, Path | None]:
    """The file of each known name, None where it is not here (or is not whole)."""
    found: dict[str, Path | None] = {}
    for name in WEIGHTS:
        weight, path = _known(name)
        found[name] = path if path.is_file() and path.stat().st_size == weight.size else None
    return found


def verify(name: str | None) -> None:
    """Checks the named weights, or all that are here, against their SHA-256.

    Raises:
        UserError: as `verify_weights`, or none are here.
    """
    names = [name] if name else [known for known, path in list_weights().items() if path]
    if not names:
        raise UserError("weights: none are here; get them with `medgen weights fetch NAME` (see `medgen weights list`)")
    for known in names:
        verify_weights(known)


def show_weights() -> None:
    """Prints the known weights, what they are for and whether they are here."""
    table = Table("name", "size", "for", "file")
    for name, path in list_weights().items():
        here = str(path) if path else f"not here; medgen weights fetch {name}"
        table.add_row(name, f"{WEIGHTS[name].size / 1e6:.0f} MB", WEIGHTS[name].use, here)
    Console().print(table)


def fetch(
    url: str,
    destination: Path,
    sha256: str,
    *,
    num_attempts: int = 4,
    timeout: float = 30.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Downloads a file, goes on where an earlier try broke off, and checks it before it gets its name.

    Until the hash fits, the bytes are in `<destination>.part`; a file of the right hash is left untouched.

    Args:
        url: http or https.
        destination: the file to make; its folder is made too.
        sha256: hexadecimal hash, or its beginning.
        num_attempts: how often to try where trying again may help.
        timeout: seconds without a byte after which a try has failed.
        sleep: how to wait between tries, for tests.

    Raises:
        UserError: not reachable, not found, refused, wrong hash, disk full, or another file is in its place.
    """
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: expected an address that starts with https://")
    if destination.exists():
        _check(destination, sha256)
        return destination
    part = destination.with_name(destination.name + ".part")
    problem = ""
    for attempt in range(num_attempts):
        resumed = part.exists() and part.stat().st_size > 0
        try:
            _transfer(url, part, timeout)
        except OSError as error:
            raise UserError(
                f"{part}: cannot be written ({error.strerror}). Make room or choose another folder"
            ) from None
        except _TryAgain as error:
            problem, wait = str(error), error.wait if error.wait is not None else 2.0**attempt
            if wait > LONGEST_WAIT:
                raise UserError(f"{url}: {problem}, for {wait:.0f} s. Run the command again after that") from None
            if attempt < num_attempts - 1:
                sleep(wait)
            continue
        found = _digest(part)
        if found.startswith(sha256):
            os.replace(part, destination)
            return destination
        part.unlink()
        problem = f"SHA-256 of what came is {found[:12]}…; expected {sha256[:12]}…"
        if not resumed:  # a resumed file may have been joined from two versions: worth one whole try
            raise UserError(f"{url}: {problem}. The file there is another one: name a mirror that has the right one")
    raise UserError(
        f"{url}: {problem} ({num_attempts} tries). Run the command again later, it goes on where this one stopped; "
        f"or fetch the file on another machine and put it at {destination}"
    )


class _TryAgain(Exception):
    """A try failed in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


def _transfer(url: str, part: Path, timeout: float) -> None:
    """One try: appends to `part` what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    part.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "medgen", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                have = 0  # the server sends all of it
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            _need_space(part, (total or have) - have)
            with part.open("ab" if have else "wb") as file:
                received = have + _copy(answer, file, have, total, part.stem)
    except urllib.error.HTTPError as error:
        _explain_status(url, error)
    except NETWORK_ERRORS as error:
        reason = getattr(error, "reason", None) or error
        raise _TryAgain(f"not reachable or broken off: {reason or type(error).__name__}") from None
    else:
        if total is not None and received < total:
            raise _TryAgain(f"broken off at {received} of {total} bytes")


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, have: int, total: int | None, name: str) -> int:
    """Streams an answer into a file under a progress bar; returns the number of bytes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    received = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total, completed=have)
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            received += len(chunk)
            progress.update(task, completed=have + received)
        file.flush()
        os.fsync(file.fileno())
    return received


def _explain_status(url: str, error: urllib.error.HTTPError) -> None:
    """Raises what an HTTP error means for the user."""
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        return  # nothing is left to send: what is here is whole or too long, and its hash will tell
    if error.code in AGAIN:
        raise _TryAgain(f"the server answered {error.code} {error.reason}", _retry_after(error))
    what = "not there (any more)" if error.code in (404, 410) else "refused"
    raise UserError(f"{url}: {what}: HTTP {error.code} {error.reason}. Check the address, or name a mirror") from None


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    value = error.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _need_space(part: Path, size: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < size + SPARE:
        raise UserError(
            f"{part.parent}: {free / 1e6:.0f} MB free; expected {(size + SPARE) / 1e6:.0f} MB for {part.stem}. "
            "Make room, or set MEDGEN_WEIGHTS to a folder on another disk"
        )


def _known(name: str) -> tuple[Weight, Path]:
    if name not in WEIGHTS:
        raise unknown_name("weights", name, WEIGHTS)
    return WEIGHTS[name], weights_folder() / WEIGHTS[name].file


def _check(path: Path, sha256: str) -> None:
    found = _digest(path)
    if not found.startswith(sha256):
        raise UserError(
            f"{path}: SHA-256 is {found[:12]}…; expected {sha256[:12]}…. Remove the file and fetch it again"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
