"""SQL of the queue: which jobs wait, who was served when, and who is next."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.training import tables
from app.training.job import JobStatus
from app.training.turns import Waiting, claim_order


def has_unclaimed(connection: Connection, status: JobStatus, base_digest: str | None = None) -> bool:
    """A look that takes no write lock: workers look often, and mostly there is nothing."""
    free = sa.select(tables.jobs.c.id).where(_free(status, base_digest))
    return connection.execute(free.limit(1)).first() is not None


def unclaimed(connection: Connection, status: JobStatus, base_digest: str | None = None) -> dict[str, Any]:
    """What `claim_order` asks for: unclaimed jobs of `status`, per tenant those of the kind at work, last turns.

    With a `base_digest`, jobs made for another base are left out. A file that is being validated takes no place from a
    tenant's training, nor the other way round.
    """
    jobs, turns = tables.jobs, tables.turns
    is_validating = jobs.c.status == JobStatus.VALIDATING.value
    of_kind = is_validating if status is JobStatus.VALIDATING else ~is_validating
    free = _free(status, base_digest)
    rows = connection.execute(sa.select(jobs.c.id, jobs.c.tenant, jobs.c.priority, jobs.c.seq).where(free))
    busy = connection.execute(sa.select(jobs.c.tenant).where(jobs.c.worker.is_not(None), of_kind)).scalars()
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


def _free(status: JobStatus, base_digest: str | None) -> sa.ColumnElement[bool]:
    jobs = tables.jobs
    free = (jobs.c.status == status.value) & jobs.c.worker.is_(None)
    return free if base_digest is None else free & (jobs.c.base_digest.is_(None) | (jobs.c.base_digest == base_digest))
