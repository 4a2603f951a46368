"""Where studies are kept, and who may do what: a journal file, or PostgreSQL for many machines.

Locks come from the file system or from the database, and both give them back the moment their holder dies: there is no
stale lock, no heartbeat and no clock.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend

from medgen.config import Project
from medgen.errors import UserError

POSTGRES = ("postgresql://", "postgresql+")
# how soon the database notices a machine that is gone, and frees its locks: one minute of silence, then four questions
KEEPALIVE = "-c tcp_keepalives_idle=60 -c tcp_keepalives_interval=15 -c tcp_keepalives_count=4"

FIRST = b'{"op_code":'  # what a journal begins with
LOST = (sqlalchemy.exc.OperationalError, optuna.exceptions.StorageInternalError)  # the database is out of reach

Release = Callable[[], object]


class Storage(Protocol):
    """A storage of studies, with locks by name."""

    @property
    def optuna(self) -> optuna.storages.BaseStorage:
        """What Optuna reads and writes."""
        ...

    def try_lock(self, name: str) -> Release | None:
        """Takes a lock and returns what gives it back; None where another process has it."""
        ...

    def turn(self) -> Any:
        """A context that one process at a time is in."""
        ...


def open_storage(project: Project, storage: str) -> Storage:
    """The storage that `tune.storage` names.

    Raises:
        UserError: it is of no known kind, or does not answer.
    """
    if storage.startswith(POSTGRES):
        try:
            return PostgresStorage(storage)
        except LOST:
            raise
        except (ValueError, RuntimeError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise UserError(f"tune.storage: not a database that can keep studies: {_first_line(error)}") from None
    if "://" in storage:
        raise UserError(
            f"tune.storage: {storage.partition('://')[0]}:// is not supported; expected a journal file, such as "
            "optuna.journal, or postgresql://user:password@host/database (SQLite breaks under parallel first use)"
        )
    try:
        return JournalStorage(project.root / storage)
    except OSError as error:
        raise UserError(f"tune.storage: {storage!r} cannot be a journal file: {error}") from None


class JournalStorage:
    """One file that events are appended to."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        path.touch()
        with path.open("rb") as file:
            head = file.read(len(FIRST))
        if not FIRST.startswith(head):
            raise UserError(f"tune.storage: {path} is another file; expected a new name, or a journal of Optuna's")
        backend = JournalFileBackend(str(path), JournalLock(path))  # type: ignore[arg-type]  # its base is private
        self.optuna = optuna.storages.JournalStorage(backend)

    def try_lock(self, name: str) -> Release | None:
        """See `Storage`."""
        folder = self._path.with_name(f"{self._path.name}.locks")
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock.release

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See `Storage`."""
        with FileLock(f"{self._path}.turn"):
            yield


class JournalLock:
    """The journal's lock. Optuna's own is a file that a killed process leaves behind, and waits half a minute for it.

    A line that a kill or a power cut tore is taken away before the next one is written behind it: the journal could
    not be read from there on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(f"{path}.flock")

    def acquire(self) -> bool:
        """Waits for it."""
        self._lock.acquire()
        with self._path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return True
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Gives it back."""
        self._lock.release()


class PostgresStorage:
    """A database that many machines reach."""

    def __init__(self, url: str) -> None:
        try:
            # a lock belongs to its connection: none is shared, and closing it gives the lock back
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
        with self.turn():  # two processes that make the tables at once break each other
            self.optuna = optuna.storages.RDBStorage(url)

    def try_lock(self, name: str) -> Release | None:
        """See `Storage`."""
        connection = self._engine.connect()
        taken = connection.execute(sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), {"key": _key(name)})
        if taken.scalar():
            return connection.close
        connection.close()
        return None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See `Storage`."""
        with self._engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": _key("turn")})
            yield


@contextmanager
def lost(storage: str) -> Iterator[None]:
    """Says in a line that the database is out of reach.

    Raises:
        UserError: it did not answer within the block.
    """
    try:
        yield
    except LOST as error:
        reason = _first_line(error)
        shown = sqlalchemy.make_url(storage).render_as_string(hide_password=True)
        raise UserError(
            f"tune.storage: {shown} does not answer ({reason}); start it, or mend the address; nothing is lost, the "
            "same command goes on"
        ) from None


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return (str(getattr(cause, "orig", cause)).strip() or type(error).__name__).splitlines()[0]


def _key(name: str) -> int:
    """A signed 64-bit number for a name."""
    return int.from_bytes(hashlib.sha256(f"medgen {name}".encode()).digest()[:8], "big", signed=True)
