"""The SQL database: opening it, its transactions, its migrations. SQLAlchemy Core on SQLite or PostgreSQL.

Tables are declared in the module that owns them, on `metadata`, and made by a migration in `app/migrations/versions`
(one file per change, numbered). A column named `tenant` marks a tenant's row: erasing the tenant deletes such rows in
every table, so rows that hang on them (a job's events) need `ondelete="CASCADE"`. Times are Unix seconds (`Float`),
order is by an integer sequence, never by time.

All calls block; call them in worker threads. The engine object is thread-safe, a connection is not.
"""

from __future__ import annotations

import functools
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url

from app.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from alembic.config import Config

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 30.0
_MIGRATION_LOCK = 0x10D6E5  # PostgreSQL advisory lock of `migrate`; any constant that is ours

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class DatabaseTooNew(Exception):
    """The database was written by a newer Lodger. Run that version, or restore an older copy."""


def open_database(url: str, *, pool_size: int = 8) -> Engine:
    """Return an engine for `url`; nothing is connected yet, but SQLite's directory is made. Raises ValueError."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 5},
            hide_parameters=True,
        )
    raise ValueError("the database must be sqlite:///file or postgresql://user@host/name")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that may write: all of it or nothing. Raises DatabaseUnavailable."""
    with _translated(), engine.begin() as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One transaction that only reads; on SQLite it waits for no writer. Raises DatabaseUnavailable."""
    with _translated(), engine.connect() as connection:
        connection = connection.execution_options(lodger_reads_only=True)
        with connection.begin():
            yield connection


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.TimeoutError, sa.exc.InterfaceError) as exc:
        logger.error("database unavailable", extra={"action": "database_unavailable", "error": type(exc).__name__})
        raise DatabaseUnavailable from exc


def _open_sqlite(url: URL) -> Engine:
    in_memory = url.database in (None, "", ":memory:")
    if not in_memory:
        Path(str(url.database)).expanduser().parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        url,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
        poolclass=sa.pool.StaticPool if in_memory else None,
        hide_parameters=True,
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Set up a new connection. synchronous=FULL: what was committed survives a power cut, also in WAL mode."""
    connection.isolation_level = None  # the driver opens no transactions of its own; `_begin_sqlite` does
    connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging. SQLite does not apply its busy timeout to this switch, so first openers race."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at once unless told otherwise: a reader that turns writer can fail without waiting."""
    only_reads = connection.get_execution_options().get("lodger_reads_only", False)
    connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


def migrate(engine: Engine) -> None:
    """Bring the schema to this version's. Any number of processes may do so at once; one works, the others wait.

    Raises DatabaseTooNew, DatabaseUnavailable.
    """
    if _revision(engine) == head_revision():
        return
    from alembic import command  # slow to import, and nearly always not needed
    from alembic.util.exc import CommandError

    config = _alembic_config()
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as exc:
            if "Can't locate revision" in str(exc):
                raise DatabaseTooNew(DatabaseTooNew.__doc__) from exc
            raise


@functools.cache
def head_revision() -> str:
    """The newest migration's number, which its file name begins with."""
    return max(path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*_*.py"))


_MIGRATIONS = Path(__file__).parent / "migrations"


def _revision(engine: Engine) -> str | None:
    """The database's migration number; None before the first."""
    with reading(engine) as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _alembic_config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
