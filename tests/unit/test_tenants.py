"""Tenants and keys on SQLite; the same contract runs on PostgreSQL in tests/real."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.database import migrate, open_database
from tests.tenant_contract import TenantContract, clocks, tenants

__all__ = ["clocks", "tenants"]


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with all tables; a copy is made faster than the tables are."""
    path = tmp_path_factory.mktemp("database") / "lodger.db"
    engine = open_database(f"sqlite:///{path}")
    migrate(engine)
    engine.dispose()  # the last connection folds the write-ahead log into the file
    return path


@pytest.fixture
def database(tmp_path: Path, migrated: Path) -> Iterator[sa.Engine]:
    shutil.copy(migrated, tmp_path / "lodger.db")
    engine = open_database(f"sqlite:///{tmp_path / 'lodger.db'}")
    yield engine
    engine.dispose()


class TestTenantsOnSqlite(TenantContract):
    pass
