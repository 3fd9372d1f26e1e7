"""SQL of a job, shared by what tenants ask (`jobs`) and what workers write (`work_queue`): rows, moves, events.

Every status change and its event are one transaction. A change is conditional on the status and fence that were read,
so that of two who change a job at a time one is refused, on SQLite and PostgreSQL alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from app.errors import RequestInvalid
from app.training import tables
from app.training.config import TrainingConfig
from app.training.job import TRANSITIONS, Checkpoint, Job, JobError, JobEvent, JobStatus, new_id
from app.training.spec import JobSpec

T = TypeVar("T")

WEBHOOK_EVENTS: Mapping[JobStatus, str] = {
    JobStatus.SUCCEEDED: "fine_tuning.job.succeeded",
    JobStatus.FAILED: "fine_tuning.job.failed",
    JobStatus.CANCELLED: "fine_tuning.job.cancelled",
}


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list, in the asked order."""

    items: tuple[T, ...]
    has_more: bool


def job_of(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    error = values["error"]
    values |= {
        "status": JobStatus(values["status"]),
        "spec": JobSpec.from_dict(values["spec"]),
        "config": None if values["config"] is None else TrainingConfig.from_dict(values["config"]),
        "error": None if error is None else JobError(**error),
    }
    return Job(**{name: values[name] for name in Job.__slots__})


def event_of(row: Row[Any]) -> JobEvent:
    return JobEvent(**{name: row._mapping[name] for name in JobEvent.__slots__})


def checkpoint_of(row: Row[Any]) -> Checkpoint:
    return Checkpoint(**{name: row._mapping[name] for name in Checkpoint.__slots__})


def load(connection: Connection, job_id: str, tenant: str | None = None) -> Job | None:
    query = sa.select(tables.jobs).where(tables.jobs.c.id == job_id)
    if tenant is not None:
        query = query.where(tables.jobs.c.tenant == tenant)
    row = connection.execute(query).first()
    return None if row is None else job_of(row)


def update(connection: Connection, job: Job, **values: Any) -> bool:
    """Write `values` if the job still has the status and fence of `job`; False if somebody was faster."""
    jobs = tables.jobs
    same = (jobs.c.id == job.id) & (jobs.c.status == job.status.value) & (jobs.c.fence == job.fence)
    return connection.execute(sa.update(jobs).where(same).values(**_sql(values))).rowcount == 1


def move(connection: Connection, job: Job, to: JobStatus, now: float, **values: Any) -> bool:
    """Change the status, with the webhooks that an end rings. False if somebody was faster."""
    assert to in TRANSITIONS[job.status], (job.status, to)
    ends = {"finished_at": now, "estimated_finish": None, "worker": None} if to.is_over else {}
    if not update(connection, job, **{"status": to.value, **ends, **values}):
        return False
    if to in WEBHOOK_EVENTS:
        _ring(connection, job, WEBHOOK_EVENTS[to], now)
    return True


def put_back(connection: Connection, job: Job, to: JobStatus, now: float, note: str | None, **values: Any) -> bool:
    """Take the job from its worker. The fence rises at once, so the worker's later writes are refused.

    A job that was being published stays so, and cannot be cancelled: its version may be live already.
    """
    return move(connection, job, to, now, worker=None, fence=job.fence + 1, resume_note=note, **values)


def add_event(
    connection: Connection,
    job_id: str,
    now: float,
    message: str,
    *,
    level: str = "info",
    data: Mapping[str, Any] | None = None,
    type_: str = "message",
) -> None:
    connection.execute(
        sa.insert(tables.job_events).values(
            id=new_id("ftevent-"),
            job_id=job_id,
            created_at=now,
            level=level,
            type=type_,
            message=message,
            data=sa.null() if data is None else data,
        )
    )


def lock_tenant(connection: Connection, tenant: str) -> None:
    """Let a tenant's creates and deletes follow one another: of two equal creates the second sees the first, and no
    blob is deleted while a row that needs it is being written. Held until the transaction ends."""
    turns = tables.turns
    lock = sa.update(turns).where(turns.c.tenant == tenant).values(turn=turns.c.turn)
    if connection.execute(lock).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(turns).values(tenant=tenant, turn=0))
    except sa.exc.IntegrityError:
        connection.execute(lock)


def position(connection: Connection, table: sa.Table, mine: sa.ColumnElement[bool], after: str | None) -> int | None:
    """The `seq` of the row called `after`; a row that was dropped keeps its place. Raises RequestInvalid."""
    if after is None:
        return None
    seq: int | None = connection.execute(sa.select(table.c.seq).where(mine, table.c.id == after)).scalar()
    if seq is None:
        raise RequestInvalid("'after' is not the id of an item of this list.", param="after")
    return seq


def _sql(values: Mapping[str, Any]) -> dict[str, Any]:
    """None in a JSON column would be the JSON value null; it is SQL's NULL that is meant."""
    return {name: sa.null() if value is None else value for name, value in values.items()}


def _ring(connection: Connection, job: Job, event_type: str, now: float) -> None:
    """Queue one delivery for each endpoint that wants the event; they exist if and only if the status does."""
    endpoints = tables.webhook_endpoints
    query = sa.select(endpoints.c.id, endpoints.c.event_types).where(endpoints.c.tenant == job.tenant)
    body = {"object": "event", "type": event_type, "created_at": int(now), "data": {"id": job.id}}
    for endpoint_id, wanted in connection.execute(query).all():
        if event_type in wanted:
            queue_delivery(connection, job.tenant, endpoint_id, body, now)


def queue_delivery(connection: Connection, tenant: str, endpoint_id: str, body: Mapping[str, Any], now: float) -> str:
    """Put one webhook message in the outbox; return its id."""
    message_id = new_id("evt_")
    connection.execute(
        sa.insert(tables.webhook_deliveries).values(
            id=message_id,
            tenant=tenant,
            endpoint_id=endpoint_id,
            body=json.dumps({"id": message_id, **body}),
            num_attempts=0,
            due_at=now,
            status="due",
            created_at=now,
        )
    )
    return message_id


def page(
    connection: Connection,
    query: sa.Select[Any],
    seq: sa.ColumnElement[int],
    *,
    after: int | None,
    limit: int,
    asc: bool,
) -> tuple[Sequence[Row[Any]], bool]:
    """Rows by `seq` from `after` (exclusive) on, and whether there are more."""
    if after is not None:
        query = query.where(seq > after if asc else seq < after)
    rows = connection.execute(query.order_by(seq if asc else seq.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit
