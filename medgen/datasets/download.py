"""One file from the web: checked, and never half there under its own name.

fetch("https://example.org/set.npz", folder / "set.npz", "md5:28209eda62fecd6e6a2d98b1501bb15f")
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
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from medgen.errors import UserError

CHUNK = 1 << 20
SPARE = 64 << 20  # bytes to leave free on the disk
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is left alone
NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers that may be better next time


def fetch(
    url: str,
    destination: Path,
    checksum: str | None,
    *,
    num_attempts: int = 4,
    timeout: float = 30.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Downloads a file, goes on where an earlier try broke off, and checks it before it gets its name.

    Until the checksum fits, the bytes are in `<destination>.part`; a file of the right checksum is left untouched.

    Args:
        url: http or https.
        destination: the file to make; its folder is made too.
        checksum: SHA-256 in hexadecimal digits or their beginning, "md5:" and an MD5, or None where the publisher
            gives none; then the SHA-256 of what came is printed.
        num_attempts: how often to try where trying again may help.
        timeout: seconds without a byte after which a try has failed.
        sleep: how to wait between tries, for tests.

    Raises:
        UserError: not reachable, not found, refused, wrong checksum, disk full, or another file is in its place.
    """
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: expected an address that starts with https://")
    if destination.exists():
        check(destination, checksum)
        return destination
    part = destination.with_name(destination.name + ".part")
    problem = ""
    for attempt in range(num_attempts):
        try:
            resumed = part.exists() and part.stat().st_size > 0
            _transfer(url, part, timeout)
            difference = _difference(part, checksum)
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
        if difference is None:
            os.replace(part, destination)
            if checksum is None:
                _print_checksum(destination)
            return destination
        part.unlink()
        problem = f"of what came, the {difference}"
        if not resumed:  # a resumed file may have been joined from two versions: worth one whole try
            raise UserError(f"{url}: {problem}. The file there is another one: name a mirror that has the right one")
    raise UserError(
        f"{url}: {problem} ({num_attempts} tries). Run the command again later, it goes on where this one stopped; "
        f"or fetch the file on another machine and put it at {destination}"
    )


def check(path: Path, checksum: str | None) -> None:
    """Checks a file that is here; `checksum` as for `fetch`.

    Raises:
        UserError: it is another file.
    """
    if difference := _difference(path, checksum):
        raise UserError(f"{path}: {difference}. Remove the file and fetch it again")


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
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                raise _TryAgain(f"the server sent another part than the one from byte {have}")
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            _need_space(part, (total or have) - have)
            with part.open("ab" if have else "wb") as file:
                received = have + _copy(answer, file, have, total, part.stem)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return _settle_range(part, have, error)
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


def _settle_range(part: Path, have: int, error: urllib.error.HTTPError) -> None:
    """Nothing is left to send: what is here is whole, or another file's."""
    total = error.headers.get("Content-Range", "").removeprefix("bytes */")
    if total != str(have):
        part.unlink()
        raise _TryAgain(f"{have} bytes were here; the file has {total or 'fewer'}", wait=0.0)


def _explain_status(url: str, error: urllib.error.HTTPError) -> NoReturn:
    """Raises what an HTTP error means for the user."""
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
            "Make room, or set MEDGEN_WEIGHTS or MEDGEN_DATASETS to a folder on another disk"
        )


def _difference(path: Path, checksum: str | None) -> str | None:
    """What of a file's checksum is not as expected; None where it is, or where none is known."""
    if checksum is None:
        return None
    kind, _, expected = checksum.rpartition(":")
    found = _digest(path, kind or "sha256")
    if found.startswith(expected):
        return None
    name = {"md5": "MD5"}.get(kind, "SHA-256")
    return f"{name} is {found[:12]}…; expected {expected[:12]}…"


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _print_checksum(path: Path) -> None:
    text = f"{path.name}: its publisher gives no checksum; the SHA-256 of what came is {_digest(path, 'sha256')}"
    Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)
