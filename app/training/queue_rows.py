"""SQL of the queue: which jobs wait, who was served when, and who is next."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.training import tables
from app.training.job import JobStatus
from app.training.turns import Waiting, claim_order


def has_unclaimed(connection: Connection, status: JobStatus) -> bool:
    """A look that takes no write lock: workers look often, and mostly there is nothing."""
    jobs = tables.jobs
    free = sa.select(jobs.c.id).where(jobs.c.status == status.value, jobs.c.worker.is_(None))
    return connection.execute(free.limit(1)).first() is not None


def unclaimed(connection: Connection, status: JobStatus) -> dict[str, Any]:
    """What `claim_order` asks for: unclaimed jobs of `status`, jobs at work per tenant, last turns."""
    jobs, turns = tables.jobs, tables.turns
    free = (jobs.c.status == status.value) & jobs.c.worker.is_(None)
    rows = connection.execute(sa.select(jobs.c.id, jobs.c.tenant, jobs.c.priority, jobs.c.seq).where(free))
    busy = connection.execute(sa.select(jobs.c.tenant).where(jobs.c.worker.is_not(None))).scalars()
    served = connection.execute(sa.select(turns.c.tenant, turns.c.turn))
    return {
        "waiting": [Waiting(*row) for row in rows],
        "running": Counter(busy),
        "turns": {tenant: turn for tenant, turn in served},
    }


def queue_positions(connection: Connection) -> dict[str, int]:
    """1 for the job that is claimed next, and so on."""
    order = claim_order(**unclaimed(connection, JobStatus.QUEUED))
    return {waiting.id: place for place, waiting in enumerate(order, start=1)}


def count_turn(connection: Connection, tenant: str) -> None:
    """Note that the tenant was served now; its row is there since its first job was made."""
    turns = tables.turns
    latest = connection.execute(sa.select(sa.func.max(turns.c.turn))).scalar() or 0
    connection.execute(sa.update(turns).where(turns.c.tenant == tenant).values(turn=latest + 1))
