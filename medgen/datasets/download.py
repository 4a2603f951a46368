"""Download of one file: resumed after interruptions, checked, and moved to its final name only when complete.

download_file("https://example.org/set.npz", folder / "set.npz", "md5:28209eda62fecd6e6a2d98b1501bb15f", 4_000_000)
"""

import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from medgen.console import ERR
from medgen.errors import UserError

_CHUNK = 1 << 20
_SPARE = 64 << 20  # bytes to leave free on the disk
NUM_ATTEMPTS = 4  # in all; only errors that may be temporary are tried again
_TIMEOUT = 30.0  # seconds without a byte after which an attempt fails
_MAX_WAIT = 120.0  # seconds; if a server asks for a longer wait, the download fails
_NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
RETRY_STATUSES = {408, 425, 429, 500, 502, 503, 504}


def cache_folder(kind: str) -> Path:
    """Folder of the downloads of a kind, "datasets" or "weights": $MEDGEN_KIND, or ~/.cache/medgen/KIND."""
    chosen = os.environ.get(f"MEDGEN_{kind.upper()}")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "medgen" / kind


def download_file(url: str, destination: Path, checksum: str | None, size: int) -> Path:
    """Download a file to `destination`, resume a broken download, and check the file before it gets its name.

    The bytes are in `<destination>.part` until the checksum matches. A finished file is checked, not downloaded.

    Args:
        url: http or https.
        destination: the file to write; its folder is created.
        checksum: SHA-256 in hexadecimal digits or their beginning, "md5:" and an MD5, or None if none is known.
        size: about how many bytes the file has; more than twice as many are refused.

    Raises:
        UserError: unreachable, not found, refused, redirected from https to http, too large, checksum mismatch, disk
            full, or `destination` is another file.
    """
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: expected an address that starts with https://")
    if destination.exists():
        check(destination, checksum)
        return destination
    part = destination.with_name(destination.name + ".part")
    problem = ""
    for attempt in range(NUM_ATTEMPTS):
        try:
            is_resumed = part.exists() and part.stat().st_size > 0
            _transfer(url, part, 2 * size)
            mismatch = _checksum_mismatch(part, checksum)
        except OSError as error:
            raise UserError(
                f"{part}: cannot be written ({error.strerror}). Free disk space or choose another folder"
            ) from None
        except _TemporaryError as error:
            problem, wait = str(error), error.wait if error.wait is not None else 2.0**attempt
            if wait > _MAX_WAIT:
                raise UserError(f"{url}: {problem}, retry after {wait:.0f} s. Run the command again then") from None
            if attempt < NUM_ATTEMPTS - 1:
                time.sleep(wait)
            continue
        if mismatch is None:
            os.replace(part, destination)
            return destination
        part.unlink()
        problem = mismatch
        if not is_resumed:  # a resumed file may mix two versions of the file, so one complete attempt follows
            raise UserError(
                f"{url}: checksum mismatch: {mismatch}. The server holds another file; {_get_elsewhere(destination)}"
            )
    raise UserError(
        f"{url}: {problem} ({NUM_ATTEMPTS} attempts). Run the command again later to resume the download, or "
        f"{_get_elsewhere(destination)}"
    )


def check(path: Path, checksum: str | None) -> None:
    """Compare a file with a checksum, given as for `download_file`.

    Raises:
        UserError: the checksum differs.
    """
    if mismatch := _checksum_mismatch(path, checksum):
        raise UserError(f"{path}: checksum mismatch: {mismatch}. Remove the file and download it again")


class _TemporaryError(Exception):
    """A failed attempt that may succeed later; `wait` is the time in seconds that the server asks for."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http and https only, and from https to https only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """The request of the new address."""
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise UserError(f"{req.full_url}: redirected to {newurl}; expected an address that starts with https://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, part: Path, limit: int) -> None:
    """Append the missing bytes of the file, which has at most `limit`, to `part`, in one attempt."""
    start = part.stat().st_size if part.exists() else 0
    part.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "medgen", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT) as response:
            if response.status != http.client.PARTIAL_CONTENT:
                start = 0  # the server sends the complete file
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink()
                raise _TemporaryError(f"the server sent a range that does not start at byte {start}")
            total = None if response.length is None else start + response.length
            if total is not None and total > limit:
                part.unlink(missing_ok=True)
                raise _too_large(url, limit, part)
            _require_space(part, (total or start) - start)
            try:
                with part.open("ab" if start else "wb") as file:
                    received = start + _copy(response, file, start, total, limit, part)
            except UserError:
                part.unlink()
                raise
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return _check_complete(part, start, error)
        _raise_for_status(url, error, part.with_name(part.stem))
    except _NETWORK_ERRORS as error:
        reason = getattr(error, "reason", None) or error
        raise _TemporaryError(f"not reachable or interrupted: {reason or type(error).__name__}") from None
    except (ValueError, OverflowError) as error:  # such as a redirect to http://[::1
        raise UserError(f"{url}: the server's answer is not valid: {error}") from None
    else:
        if total is not None and received < total:
            raise _TemporaryError(f"interrupted at {received} of {total} bytes")


def _copy(
    response: http.client.HTTPResponse, file: BinaryIO, start: int, total: int | None, limit: int, part: Path
) -> int:
    """Write a response to a file, show a progress bar, and return the number of bytes."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    received = 0
    with Progress("{task.description}", *columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        task = progress.add_task(part.stem, total=total, completed=start)
        while chunk := response.read(_CHUNK):
            received += len(chunk)
            if start + received > limit:
                raise _too_large(response.url, limit, part)
            _require_space(part, 0)
            file.write(chunk)
            progress.update(task, completed=start + received)
        file.flush()
        os.fsync(file.fileno())
    return received


def _too_large(url: str, limit: int, part: Path) -> UserError:
    return UserError(
        f"{url}: larger than {limit / 1e6:.1f} MB, twice the size that is known. The server holds another file; "
        f"{_get_elsewhere(part.with_name(part.stem))}"
    )


def _check_complete(part: Path, size: int, error: urllib.error.HTTPError) -> None:
    """Accept `part` if the server says that the file has its size; remove it otherwise, as it is of another file."""
    total = error.headers.get("Content-Range", "").removeprefix("bytes */")
    if total != str(size):
        part.unlink()
        raise _TemporaryError(f"the partial download has {size} bytes; the file has {total or 'fewer'}", wait=0.0)


def _raise_for_status(url: str, error: urllib.error.HTTPError, destination: Path) -> NoReturn:
    if error.code in RETRY_STATUSES:
        raise _TemporaryError(f"the server answered {error.code} {error.reason}", _retry_after(error))
    problem = "not found" if error.code in (404, 410) else "refused"
    raise UserError(
        f"{url}: {problem}: HTTP {error.code} {error.reason}. Check the address, or {_get_elsewhere(destination)}"
    ) from None


def _get_elsewhere(destination: Path) -> str:
    return f"download the file on another machine or from another server and save it as {destination}"


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None without one."""
    value = error.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _require_space(part: Path, size: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < size + _SPARE:
        raise UserError(
            f"{part.parent}: {free / 1e6:.0f} MB free; expected {(size + _SPARE) / 1e6:.0f} MB for {part.stem}. "
            "Free disk space, or set MEDGEN_WEIGHTS or MEDGEN_DATASETS to a folder on another disk"
        )


def _checksum_mismatch(path: Path, checksum: str | None) -> str | None:
    """The expected and the found checksum if they differ, else None."""
    if checksum is None:
        return None
    algorithm, _, expected = checksum.rpartition(":")
    found = _digest(path, algorithm or "sha256")
    if found.startswith(expected):
        return None
    name = {"md5": "MD5"}.get(algorithm, "SHA-256")
    return f"expected {name} {expected[:12]}…, found {found[:12]}…"


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
