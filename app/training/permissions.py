"""Who else may prompt a checkpoint: its tenant grants it to others ("projects"). All calls block; thread-safe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import reading, writing
from app.errors import ModelNotFound, RequestInvalid
from app.training import job_rows, tables
from app.training.job import new_id
from app.training.job_rows import Page


@dataclass(frozen=True, slots=True)
class Permission:
    """One tenant's right to use another's checkpoint or model."""

    id: str
    created_at: float
    project_id: str


class Permissions:
    """Rights on `ft:` names. A name that the tenant does not own is absent."""

    def __init__(self, engine: Engine, *, wall: Callable[[], float] = time.time) -> None:
        self._engine, self._wall = engine, wall

    def grant(self, tenant: str, checkpoint: str, projects: Sequence[str]) -> list[Permission]:
        """Let `projects` use the model; one that may already keeps its permission. Raises ModelNotFound."""
        table = tables.permissions
        with writing(self._engine) as connection:
            _require_owned(connection, tenant, checkpoint)
            for project in dict.fromkeys(projects):
                if _one(connection, checkpoint, project) is None:
                    names = {"tenant": tenant, "checkpoint": checkpoint, "project_id": project}
                    row = sa.insert(table).values(id=new_id("cp_"), **names, created_at=self._wall(), is_deleted=False)
                    connection.execute(row)
            granted = [_one(connection, checkpoint, project) for project in dict.fromkeys(projects)]
            return [one for one in granted if one is not None]

    def list(
        self,
        tenant: str,
        checkpoint: str,
        *,
        after: str | None = None,
        limit: int = 10,
        asc: bool = False,
        project: str | None = None,
    ) -> Page[Permission]:
        table = tables.permissions
        with reading(self._engine) as connection:
            _require_owned(connection, tenant, checkpoint)
            mine = (table.c.tenant == tenant) & (table.c.checkpoint == checkpoint)
            start = job_rows.position(connection, table, mine, after)
            query = sa.select(table).where(mine, ~table.c.is_deleted)
            if project is not None:
                query = query.where(table.c.project_id == project)
            rows, more = job_rows.page(connection, query, table.c.seq, after=start, limit=limit, asc=asc)
            return Page(tuple(Permission(row.id, row.created_at, row.project_id) for row in rows), more)

    def revoke(self, tenant: str, checkpoint: str, permission_id: str) -> None:
        """Raises RequestInvalid with the code `not_found`."""
        table = tables.permissions
        mine = (table.c.tenant == tenant) & (table.c.checkpoint == checkpoint) & (table.c.id == permission_id)
        with writing(self._engine) as connection:
            if connection.execute(sa.update(table).where(mine).values(is_deleted=True)).rowcount == 0:
                raise RequestInvalid("There is no such permission.", code="not_found")

    def may_use(self, project: str, checkpoint: str) -> bool:
        """True when the owner granted `project` the use of `checkpoint`."""
        with reading(self._engine) as connection:
            return _one(connection, checkpoint, project) is not None


def _one(connection: Connection, checkpoint: str, project: str) -> Permission | None:
    table = tables.permissions
    same = (table.c.checkpoint == checkpoint) & (table.c.project_id == project) & ~table.c.is_deleted
    row = connection.execute(sa.select(table).where(same)).first()
    return None if row is None else Permission(row.id, row.created_at, row.project_id)


def _require_owned(connection: Connection, tenant: str, name: str) -> None:
    jobs, points = tables.jobs, tables.checkpoints
    by_job = sa.select(jobs.c.id).where(jobs.c.tenant == tenant, jobs.c.fine_tuned_model == name)
    by_point = sa.select(points.c.id).join(jobs, jobs.c.id == points.c.job_id)
    by_point = by_point.where(jobs.c.tenant == tenant, points.c.name == name, ~points.c.is_dropped)
    if connection.execute(by_job).first() is None and connection.execute(by_point).first() is None:
        raise ModelNotFound(param="fine_tuned_model_checkpoint")
