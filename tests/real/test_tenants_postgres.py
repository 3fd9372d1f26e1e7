from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from app.database import head_revision, migrate, open_database, reading
from app.errors import DatabaseUnavailable
from tests.real.postgres import clean_database, postgres_url
from tests.tenant_contract import TenantContract, clocks, tenants

__all__ = ["clocks", "postgres_url", "tenants"]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[sa.Engine]:
    engine = open_database(clean_database(postgres_url))
    yield engine
    engine.dispose()


class TestTenantsOnPostgres(TenantContract):
    pass


def test_processes_that_start_together_migrate_once(postgres_url: str) -> None:
    url = clean_database(postgres_url)
    barrier = threading.Barrier(6)

    def start(_: int) -> str | None:
        engine = open_database(url)
        barrier.wait()
        migrate(engine)
        with reading(engine) as connection:
            revision = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()
        engine.dispose()
        return str(revision)

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(start, range(6))) == {head_revision()}


def test_a_server_that_is_gone_is_said_in_our_words() -> None:
    engine = open_database("postgresql://lodger@127.0.0.1:1/lodger")
    with pytest.raises(DatabaseUnavailable) as caught, reading(engine):
        pass
    assert "psycopg" not in caught.value.message
