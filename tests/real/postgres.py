"""A PostgreSQL server for tests: a new cluster in a temporary directory, on loopback, thrown away afterwards.

Import `postgres_url` (a session's server) into a test module; `clean_database` makes an empty database on it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.database import open_database


def _bin_dir() -> Path | None:
    """Debian keeps the server's programs out of PATH, one directory a version."""
    found = shutil.which("initdb")
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).parent if found else newest[-1].parent if newest else None


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a running server, without a database's name. Its owner is an unprivileged user, as PostgreSQL demands."""
    programs = _bin_dir()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (`make test-real` as root installs it)")
    as_owner = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = Path(tempfile.mkdtemp(prefix="lodger-postgres-", dir="/tmp"))
    if as_owner:
        shutil.chown(directory, "postgres")
    cluster = directory / "data"

    def run(*command: str) -> None:
        done = subprocess.run(
            [*as_owner, *command], cwd=directory, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    try:
        run(str(programs / "initdb"), "-D", str(cluster), "-U", "lodger", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} -c fsync=off"
        log = str(directory / "log")
        run(str(programs / "pg_ctl"), "-D", str(cluster), "-l", log, "-w", "-t", "60", "-o", options, "start")
        yield f"postgresql://lodger@127.0.0.1:{port}"
        run(str(programs / "pg_ctl"), "-D", str(cluster), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def clean_database(server_url: str) -> str:
    """Make an empty database and return its URL."""
    name = f"lodger_{uuid.uuid4().hex}"
    admin = open_database(f"{server_url}/postgres").execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return f"{server_url}/{name}"
