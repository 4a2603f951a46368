"""Storage of studies and their locks: a journal file, or PostgreSQL for many machines.

The file system and the database release a lock when its holder dies, so there are no stale locks, heartbeats or
timeouts.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend

from medgen.config import Project, without_credentials
from medgen.errors import UserError

POSTGRES = ("postgresql://", "postgresql+")
# the database notices a machine that is gone, and releases its locks, after 60 s of silence and 4 probes, 15 s apart
KEEPALIVE = "-c tcp_keepalives_idle=60 -c tcp_keepalives_interval=15 -c tcp_keepalives_count=4"

JOURNAL_START = b'{"op_code":'  # first bytes of every journal
STORAGE_ERRORS = (sqlalchemy.exc.OperationalError, optuna.exceptions.StorageInternalError)  # database unreachable

Release = Callable[[], object]


def open_storage(project: Project, storage: str) -> "Storage":
    """The storage that `tune.storage` names.

    Raises:
        UserError: it is of an unknown kind, or cannot be opened.
    """
    if storage.startswith(POSTGRES):
        try:
            return PostgresStorage(storage)
        except STORAGE_ERRORS:
            raise
        except (ValueError, RuntimeError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise UserError(f"tune.storage: this database cannot store studies: {_first_line(error)}") from None
    if "://" in storage:
        raise UserError(
            f"tune.storage: {storage.partition('://')[0]}:// is not supported; expected a journal file, such as "
            "optuna.journal, or postgresql://user@host/database (SQLite fails if processes create it at once)"
        )
    try:
        return JournalStorage(project.root / storage)
    except OSError as error:
        raise UserError(f"tune.storage: {storage!r} cannot be a journal file: {error}") from None


class JournalStorage:
    """A file that events are appended to, with locks by name; `optuna` is the storage that Optuna reads and writes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        path.touch()
        with path.open("rb") as file:
            start = file.read(len(JOURNAL_START))
        if not JOURNAL_START.startswith(start):
            raise UserError(
                f"tune.storage: {path} is not a journal of Optuna; expected the name of a new file or of a journal"
            )
        backend = JournalFileBackend(str(path), JournalLock(path))  # type: ignore[arg-type]  # its base is private
        self.optuna = optuna.storages.JournalStorage(backend)

    def try_lock(self, name: str) -> Release | None:
        """Take a lock without waiting; returns the function that releases it, or None if another process holds it."""
        folder = self._path.with_name(f"{self._path.name}.locks")
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock.release

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A context that only one process at a time can be in."""
        with FileLock(f"{self._path}.turn"):
            yield


class JournalLock:
    """Lock of the journal. Optuna's own is a file that a killed process leaves behind, with a timeout of 30 s.

    `acquire` removes a last line that a kill or a power cut left incomplete: with another line appended to it, the
    journal could not be read any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(f"{path}.flock")

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        self._lock.acquire()
        with self._path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()


class PostgresStorage:
    """A database for several machines, with the methods of `JournalStorage`."""

    def __init__(self, url: str) -> None:
        try:
            # an advisory lock belongs to its connection: connections are not shared, and closing one releases its lock
            self._engine = sqlalchemy.create_engine(
                url,
                poolclass=sqlalchemy.pool.NullPool,
                isolation_level="AUTOCOMMIT",
                connect_args={"options": KEEPALIVE},
            )
        except ModuleNotFoundError as error:
            raise UserError(
                f"tune.storage: postgresql:// needs the driver {error.name}; run `uv sync --extra postgres`, or "
                "`pip install medgen[postgres]`"
            ) from None
        with self.lock():  # creating the tables fails if two processes do it at once
            self.optuna = optuna.storages.RDBStorage(url)

    def try_lock(self, name: str) -> Release | None:
        """As `JournalStorage.try_lock`."""
        connection = self._engine.connect()
        taken = connection.execute(sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), {"key": _lock_key(name)})
        if taken.scalar():
            return connection.close
        connection.close()
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """As `JournalStorage.lock`."""
        with self._engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": _lock_key("turn")})
            yield


Storage = JournalStorage | PostgresStorage


@contextmanager
def storage_errors(storage: str) -> Iterator[None]:
    """A context that reports an unreachable database in one line.

    Raises:
        UserError: the database did not answer.
    """
    try:
        yield
    except STORAGE_ERRORS as error:
        raise UserError(
            f"tune.storage: {without_credentials(storage)} does not answer ({_first_line(error)}); start the database "
            "or correct the address, then run the same command again; no trial is lost"
        ) from None


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return (str(getattr(cause, "orig", cause)).strip() or type(error).__name__).splitlines()[0]


def _lock_key(name: str) -> int:
    """The signed 64-bit number that stands for a name in PostgreSQL."""
    return int.from_bytes(hashlib.sha256(f"medgen {name}".encode()).digest()[:8], "big", signed=True)
