"""PostgreSQL advisory locks, which a search on several machines needs: a lock ends with its holder's connection."""

import subprocess
import sys
from collections.abc import Callable

import sqlalchemy

LOCK, TRY, UNLOCK = (f"SELECT {name}(7)" for name in ("pg_advisory_lock", "pg_try_advisory_lock", "pg_advisory_unlock"))
HOLDER = f"""
import sys
import sqlalchemy
connection = sqlalchemy.create_engine(sys.argv[1]).connect()
connection.exec_driver_sql("{LOCK}")
print("held", flush=True)
sys.stdin.read()
"""


def test_each_database_is_new_and_separate(postgres: Callable[[], str]) -> None:
    first, second = (sqlalchemy.create_engine(postgres()) for _ in range(2))
    with first.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x int)")
    assert sqlalchemy.inspect(first).get_table_names() == ["t"]
    assert sqlalchemy.inspect(second).get_table_names() == []


def test_only_one_connection_holds_a_lock(postgres: Callable[[], str]) -> None:
    engine = sqlalchemy.create_engine(postgres())
    with engine.connect() as one, engine.connect() as other:
        assert one.exec_driver_sql(TRY).scalar()
        assert not other.exec_driver_sql(TRY).scalar()
        one.exec_driver_sql(UNLOCK)
        assert other.exec_driver_sql(TRY).scalar()


def test_killed_process_releases_its_lock(postgres: Callable[[], str]) -> None:
    url = postgres()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        sqlalchemy.create_engine(url).connect() as other,
        subprocess.Popen([sys.executable, "-c", HOLDER, url], **pipes) as holder,
    ):
        assert holder.stdout.readline() == "held\n"
        assert not other.exec_driver_sql(TRY).scalar()
        holder.kill()
        other.exec_driver_sql("SET statement_timeout = '20s'")  # fail instead of waiting forever
        other.exec_driver_sql(LOCK)
