from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from app import database
from app.database import DatabaseTooNew, migrate, open_database, reading, writing
from app.errors import DatabaseUnavailable
from app.tenants import tenants_table


def _url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'new' / 'lodger.db'}"


def test_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    """Each thread has an engine of its own, as each process would: only the database file is shared."""
    barrier = threading.Barrier(6)

    def start(_: int) -> int:
        engine = open_database(_url(tmp_path))
        barrier.wait()
        migrate(engine)
        with reading(engine) as connection:
            count = len(connection.execute(sa.text("SELECT * FROM alembic_version")).all())
        engine.dispose()
        return count

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(start, range(6))) == [1] * 6


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    engine = open_database(_url(tmp_path))
    migrate(engine)
    with writing(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseTooNew):
        migrate(engine)


def test_sqlite_survives_power_cuts_and_keeps_references(tmp_path: Path) -> None:
    engine = open_database(_url(tmp_path))
    with reading(engine) as connection:
        pragmas = {
            name: connection.execute(sa.text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    engine = open_database(_url(tmp_path))
    migrate(engine)

    def fail_halfway() -> None:
        with writing(engine) as connection:
            connection.execute(tenants_table.insert().values(id="acme", created_at=1.0))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    with reading(engine) as connection:
        assert connection.execute(sa.select(tenants_table)).all() == []


def test_read_then_write_transactions_queue_instead_of_failing(tmp_path: Path) -> None:
    """Deferred transactions that read first fail at once on SQLite when another has written since."""
    engine = open_database(_url(tmp_path))
    migrate(engine)
    with writing(engine) as connection:
        connection.execute(tenants_table.insert().values(id="acme", created_at=0.0))

    def add_one(_: int) -> None:
        with writing(engine) as connection:
            seen = connection.execute(sa.select(tenants_table.c.created_at)).scalar_one()
            connection.execute(tenants_table.update().values(created_at=seen + 1))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add_one, range(60)))
    with reading(engine) as connection:
        assert connection.execute(sa.select(tenants_table.c.created_at)).scalar() == 60


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    engine = open_database(_url(tmp_path))
    migrate(engine)
    with writing(engine) as writer:
        writer.execute(tenants_table.insert().values(id="acme", created_at=1.0))
        with reading(engine) as reader:
            assert reader.execute(sa.select(tenants_table)).all() == []


def test_a_database_that_cannot_be_used_is_said_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    engine = open_database(_url(tmp_path))
    migrate(engine)
    other = open_database(_url(tmp_path))
    with writing(engine), pytest.raises(DatabaseUnavailable) as caught, writing(other):
        pass
    assert "sqlite" not in caught.value.message.lower()


def test_other_databases_are_refused() -> None:
    with pytest.raises(ValueError, match="postgresql"):
        open_database("mysql://root@localhost/lodger")


def test_a_postgresql_url_takes_our_driver() -> None:
    assert open_database("postgresql://u:p@localhost/lodger").dialect.driver == "psycopg"
