"""The tenant's side of jobs: create, look, cancel, pause, resume; events, checkpoints and who may use them.

A foreign id is an absent id. All calls block; thread-safe. The worker's side is `app.training.work_queue`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from adapters.manifest import AdapterManifest, canonical_json
from app.database import reading, writing
from app.errors import RateLimited, RequestInvalid
from app.idempotency import KEY_REUSED, REMEMBERED_S
from app.training import job_rows, tables
from app.training.job import (
    TRANSITIONS,
    Checkpoint,
    InvalidJobState,
    Job,
    JobEvent,
    JobNotFound,
    JobStatus,
    new_id,
    new_unique_id,
)
from app.training.job_rows import Page
from app.training.queue_rows import queue_positions
from app.training.spec import JobSpec

DAY_S = 24 * 3600.0
MERGE_RETRIES_S = 60.0
MAX_RACES = 20  # times that somebody else may change a job between our reading and writing it


@dataclass(frozen=True, slots=True)
class NewJob:
    """A create call. `asked` is the request as the client wrote it: what two calls must share to be the same one."""

    spec: JobSpec
    asked: Mapping[str, Any]
    metadata: Mapping[str, str] | None = None
    idempotency_key: str | None = None
    is_retry: bool = False  # the client says that an earlier attempt may have arrived
    base_digest: str | None = None  # workers of another base leave it alone; None is for any

    @property
    def hash(self) -> str:
        return _hash(self.asked, self.spec)


def _hash(asked: Mapping[str, Any], spec: JobSpec) -> str:
    pinned = [file.sha256 for file in spec.files]
    return hashlib.sha256(canonical_json([asked, pinned])).hexdigest()


@dataclass(frozen=True, slots=True)
class MetadataFilter:
    """Which jobs a list shows: those with all of `pairs`, or those without any metadata."""

    pairs: Mapping[str, str] = field(default_factory=dict)
    only_null: bool = False


@dataclass(frozen=True, slots=True)
class FineTunedModel:
    """What an `ft:` name stands for: a version of an adapter, or with `manifest` a checkpoint's own adapter."""

    name: str
    tenant: str
    job_id: str
    created_at: float
    adapter_name: str
    adapter_version: int | None
    manifest: Mapping[str, Any] | None


class JobStore:
    """Jobs as their tenants see them."""

    def __init__(self, engine: Engine, *, wall: Callable[[], float] = time.time) -> None:
        self._engine, self._wall = engine, wall

    def create(
        self,
        tenant: str,
        new: NewJob,
        *,
        max_active: int | None = None,
        max_tokens_per_day: int | None = None,
    ) -> Job:
        """Make a job, or find the one that the same call made before. `max_active`: unfinished jobs of the tenant;
        `max_tokens_per_day`: trained on by its jobs of 24 hours, as far as their files are counted.

        Raises RequestInvalid (`idempotency_key_reused`), RateLimited (`quota_exceeded`).
        """
        with writing(self._engine) as connection:
            job_rows.lock_tenant(connection, tenant)
            if (known := self._known(connection, tenant, new)) is not None:
                return known
            if max_active is not None and _num_active(connection, tenant) >= max_active:
                message = (
                    f"You have {max_active} unfinished fine-tuning jobs, as many as allowed. Wait for one or cancel it."
                )
                raise RateLimited(message, code="quota_exceeded")
            used = _tokens_since(connection, tenant, self._wall() - DAY_S) if max_tokens_per_day is not None else 0
            if max_tokens_per_day is not None and used >= max_tokens_per_day:
                message = f"Your jobs of the last 24 hours train on {used} tokens; {max_tokens_per_day} are allowed."
                raise RateLimited(message, code="quota_exceeded")
            _require_files(connection, tenant, new.spec)
            return self._insert(connection, tenant, new)

    def replayed(self, tenant: str, key: str, asked: Mapping[str, Any]) -> Job | None:
        """The job that the same call with this Idempotency-Key made; None where a new one is to be made.

        Needs no look at files and models: they may be gone, and the answer is the job all the same. Raises
        RequestInvalid (`idempotency_key_reused`).
        """
        keys = tables.job_keys
        fresh = keys.c.created_at >= self._wall() - REMEMBERED_S
        query = sa.select(keys.c.job_id, keys.c.spec_hash).where(keys.c.tenant == tenant, keys.c.key == key, fresh)
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
            job = None if row is None else job_rows.load(connection, row.job_id, tenant)
        if row is None or job is None:
            return None
        if _hash(asked, job.spec) != row.spec_hash:
            raise RequestInvalid(KEY_REUSED, code="idempotency_key_reused")
        return job

    def _known(self, connection: Connection, tenant: str, new: NewJob) -> Job | None:
        now = self._wall()
        if new.idempotency_key is not None:
            keys = tables.job_keys
            connection.execute(sa.delete(keys).where(keys.c.tenant == tenant, keys.c.created_at < now - REMEMBERED_S))
            mine = sa.select(keys).where(keys.c.tenant == tenant, keys.c.key == new.idempotency_key)
            if (row := connection.execute(mine).first()) is not None:
                if row.spec_hash != new.hash:
                    raise RequestInvalid(KEY_REUSED, code="idempotency_key_reused")
                return job_rows.load(connection, row.job_id, tenant)
            return None
        if not new.is_retry or new.spec.training.allow_duplicate:
            return None
        jobs = tables.jobs
        same = (jobs.c.tenant == tenant) & (jobs.c.spec_hash == new.hash)
        recent = same & (jobs.c.created_at >= now - MERGE_RETRIES_S)
        job_id = connection.execute(sa.select(jobs.c.id).where(recent).order_by(jobs.c.seq.desc()).limit(1)).scalar()
        if job_id is None:
            return None
        message = "A repeated create request was answered with this job; no second one was made"
        job_rows.add_event(connection, job_id, now, message, level="warn")
        return job_rows.load(connection, job_id, tenant)

    def _insert(self, connection: Connection, tenant: str, new: NewJob) -> Job:
        now, job_id, unique_id = self._wall(), new_id("ftjob-"), new_unique_id()
        values = {
            "id": job_id,
            "tenant": tenant,
            "status": JobStatus.VALIDATING.value,
            "unique_id": unique_id,
            "spec": new.spec.to_dict(),
            "spec_hash": new.hash,
            "base_digest": sa.null() if new.base_digest is None else new.base_digest,
            "metadata": sa.null() if new.metadata is None else dict(new.metadata),
            "priority": new.spec.training.priority,
            "created_at": now,
            "fence": 0,
            "heartbeat": 0,
            "num_lost": 0,
            "step": 0,
            "is_publishing": False,
            "adapter_name": new.spec.publish.name or f"ft-{unique_id}",
        }
        nothing = {name: sa.null() for name in ("config", "report", "state", "gate", "error")}
        connection.execute(sa.insert(tables.jobs).values({**values, **nothing}))
        pins = {file.sha256 for file in new.spec.files}
        connection.execute(sa.insert(tables.job_files), [{"job_id": job_id, "sha256": pin} for pin in sorted(pins)])
        for key, value in (new.metadata or {}).items():
            connection.execute(sa.insert(tables.job_metadata).values(job_id=job_id, key=key, value=value))
        if new.idempotency_key is not None:
            row = {"tenant": tenant, "key": new.idempotency_key, "spec_hash": new.hash}
            connection.execute(sa.insert(tables.job_keys).values(**row, job_id=job_id, created_at=now))
        job_rows.add_event(connection, job_id, now, f"Created fine-tuning job: {job_id}")
        message = f"Validating training file: {new.spec.training_file.id}"
        if new.spec.validation_file is not None:
            message += f" and validation file: {new.spec.validation_file.id}"
        job_rows.add_event(connection, job_id, now, message)
        job = job_rows.load(connection, job_id)
        assert job is not None
        return job

    # ---- looking

    def get(self, tenant: str, job_id: str) -> Job:
        """Raises JobNotFound."""
        with reading(self._engine) as connection:
            return _found(job_rows.load(connection, job_id, tenant))

    def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20, where: MetadataFilter | None = None
    ) -> Page[Job]:
        """The tenant's jobs, newest first. Raises RequestInvalid for an `after` that is not one of them."""
        jobs, pairs = tables.jobs, tables.job_metadata
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        for key, value in (where.pairs if where is not None else {}).items():
            matching = sa.select(pairs.c.job_id).where(pairs.c.key == key, pairs.c.value == value)
            query = query.where(jobs.c.id.in_(matching))
        if where is not None and where.only_null:
            query = query.where(jobs.c.metadata.is_(sa.null()))
        with reading(self._engine) as connection:
            mine = jobs.c.tenant == tenant
            start = job_rows.position(connection, jobs, mine, after)
            rows, more = job_rows.page(connection, query, jobs.c.seq, after=start, limit=limit, asc=False)
            return Page(tuple(map(job_rows.job_of, rows)), more)

    def queue_positions(self) -> dict[str, int]:
        """Of every queued job: 1 for the one that is claimed next, and so on."""
        with reading(self._engine) as connection:
            return queue_positions(connection)

    def events(
        self, tenant: str, job_id: str, *, after: str | None = None, limit: int = 20, asc: bool = False
    ) -> Page[JobEvent]:
        events = tables.job_events
        with reading(self._engine) as connection:
            _found(job_rows.load(connection, job_id, tenant))
            mine = events.c.job_id == job_id
            start = job_rows.position(connection, events, mine, after)
            query = sa.select(events).where(mine)
            rows, more = job_rows.page(connection, query, events.c.seq, after=start, limit=limit, asc=asc)
            return Page(tuple(map(job_rows.event_of, rows)), more)

    def checkpoints(self, tenant: str, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        table = tables.checkpoints
        with reading(self._engine) as connection:
            _found(job_rows.load(connection, job_id, tenant))
            mine = table.c.job_id == job_id
            start = job_rows.position(connection, table, mine, after)
            query = sa.select(table).where(mine, ~table.c.is_dropped)
            rows, more = job_rows.page(connection, query, table.c.seq, after=start, limit=limit, asc=False)
            return Page(tuple(map(job_rows.checkpoint_of, rows)), more)

    def metrics(self, job_id: str) -> Sequence[tuple[int, Mapping[str, Any]]]:
        """(step, values) of every step measured, in order; what the result file is made of."""
        table = tables.job_metrics
        query = sa.select(table.c.step, table.c["values"]).where(table.c.job_id == job_id).order_by(table.c.step)
        with reading(self._engine) as connection:
            return [(step, values) for step, values in connection.execute(query)]

    def speed_tokens_per_s(self) -> float | None:
        """Training tokens a second of the last jobs that ended here; None before the first."""
        jobs = tables.jobs
        over = (jobs.c.status == JobStatus.SUCCEEDED.value) & jobs.c.started_at.is_not(None)
        query = sa.select(jobs.c.total_tokens, jobs.c.started_at, jobs.c.finished_at).where(over)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(jobs.c.seq.desc()).limit(5)).all()
        seconds = sum(max(0.0, row.finished_at - row.started_at) for row in rows)
        return sum(row.total_tokens or 0 for row in rows) / seconds if seconds > 0 else None

    # ---- changing

    def cancel(self, tenant: str, job_id: str) -> Job:
        """End the job; its worker's fence is stale from here on. Again is fine. Raises InvalidJobState."""

        def act(connection: Connection, job: Job, now: float) -> bool:
            if job.is_publishing:
                raise InvalidJobState("The job's adapter is being published: too late to cancel it.")
            self._require_move(job, JobStatus.CANCELLED, "cancelled")
            done = job_rows.move(connection, job, JobStatus.CANCELLED, now, fence=job.fence + 1)
            if done:
                job_rows.add_event(connection, job.id, now, "Job cancelled")
            return done

        return self._change(tenant, job_id, frozenset({JobStatus.CANCELLED}), act)

    def pause(self, tenant: str, job_id: str) -> Job:
        """Pause at once if no worker has it, else as soon as the worker has a durable state (`pausing`)."""

        def act(connection: Connection, job: Job, now: float) -> bool:
            if job.is_publishing:
                raise InvalidJobState("The job's adapter is being published: too late to pause it.")
            if job.status is JobStatus.RUNNING:
                return job_rows.move(connection, job, JobStatus.PAUSING, now)
            self._require_move(job, JobStatus.PAUSED, "paused")
            step = job.state["step"] if job.state else 0
            done = job_rows.put_back(connection, job, JobStatus.PAUSED, now, "paused")
            if done:
                job_rows.add_event(connection, job.id, now, f"Job paused at step {step}")
            return done

        return self._change(tenant, job_id, frozenset({JobStatus.PAUSED, JobStatus.PAUSING}), act)

    def resume(self, tenant: str, job_id: str) -> Job:
        """Queue a paused job again; one that is still pausing just goes on."""

        def act(connection: Connection, job: Job, now: float) -> bool:
            if job.status is JobStatus.PAUSING:
                return job_rows.move(connection, job, JobStatus.RUNNING, now)
            if job.status is not JobStatus.PAUSED:
                raise InvalidJobState(f"The job is {job.status}; only a paused job can be resumed.")
            return job_rows.move(connection, job, JobStatus.QUEUED, now)

        return self._change(tenant, job_id, frozenset({JobStatus.QUEUED, JobStatus.RUNNING}), act)

    def _change(
        self,
        tenant: str,
        job_id: str,
        already: frozenset[JobStatus],
        act: Callable[[Connection, Job, float], bool],
    ) -> Job:
        """Read, act on what was read, and start again when somebody else wrote in between."""
        for _ in range(MAX_RACES):
            with writing(self._engine) as connection:
                job = _found(job_rows.load(connection, job_id, tenant))
                if job.status in already:
                    return job
                if act(connection, job, self._wall()):
                    return _found(job_rows.load(connection, job_id, tenant))
        raise InvalidJobState("The job is changing too fast. Try again.")

    def _require_move(self, job: Job, to: JobStatus, participle: str) -> None:
        if to not in TRANSITIONS[job.status]:
            raise InvalidJobState(f"The job is {job.status}; it cannot be {participle}.")

    # ---- names

    def find_model(self, name: str) -> FineTunedModel | None:
        """What an `ft:` name stands for, whoever asks; the caller compares tenants, or asks `is_shared_with`."""
        jobs, points = tables.jobs, tables.checkpoints
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.fine_tuned_model == name)).first()
            if row is not None:
                return FineTunedModel(
                    name, row.tenant, row.id, row.finished_at, row.adapter_name, row.adapter_version, None
                )
            query = sa.select(points, jobs.c.tenant, jobs.c.adapter_name).join(jobs, jobs.c.id == points.c.job_id)
            row = connection.execute(query.where(points.c.name == name, ~points.c.is_dropped)).first()
        if row is None:
            return None
        return FineTunedModel(name, row.tenant, row.job_id, row.created_at, row.adapter_name, None, row.manifest)

    def left_states(self, limit: int = 100) -> Sequence[tuple[str, str]]:
        """(tenant, job) of jobs that are over and whose durable states may still lie in the store."""
        jobs = tables.jobs
        over = jobs.c.status.in_([status.value for status in JobStatus if status.is_over])
        query = sa.select(jobs.c.tenant, jobs.c.id).where(over, jobs.c.state.is_not(sa.null()))
        with reading(self._engine) as connection:
            return [(tenant, job_id) for tenant, job_id in connection.execute(query.limit(limit))]

    def forget_state(self, job_id: str) -> None:
        """The states of a job that is over are deleted."""
        with writing(self._engine) as connection:
            connection.execute(sa.update(tables.jobs).where(tables.jobs.c.id == job_id).values(state=sa.null()))

    def needed_blobs(self, tenant: str, asked: Set[str]) -> Set[str]:
        """Those of `asked` that a listed checkpoint is made of, or the adapter that an open job continues from."""
        jobs, points = tables.jobs, tables.checkpoints
        listed = sa.select(points.c.manifest).join(jobs, jobs.c.id == points.c.job_id)
        is_open = jobs.c.status.in_([status.value for status in JobStatus if not status.is_over])
        with reading(self._engine) as connection:
            manifests = list(connection.execute(listed.where(jobs.c.tenant == tenant, ~points.c.is_dropped)).scalars())
            specs = connection.execute(sa.select(jobs.c.spec).where(jobs.c.tenant == tenant, is_open)).scalars()
            manifests += [parent for spec in specs if (parent := spec.get("parent")) is not None]
        return {sha256 for manifest in manifests for sha256 in AdapterManifest.from_dict(manifest).blobs} & asked

    def fine_tuned_models(self, tenant: str) -> Sequence[FineTunedModel]:
        """The tenant's finished models by their `ft:` names, newest first; their checkpoints are not among them."""
        jobs = tables.jobs
        mine = (jobs.c.tenant == tenant) & jobs.c.fine_tuned_model.is_not(None)
        columns = (jobs.c.fine_tuned_model, jobs.c.id, jobs.c.finished_at, jobs.c.adapter_name, jobs.c.adapter_version)
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(*columns).where(mine).order_by(jobs.c.seq.desc())).all()
        return [
            FineTunedModel(name, tenant, job_id, finished_at, adapter, version, None)
            for name, job_id, finished_at, adapter, version in rows
        ]


RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_RESULT_KEYS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


def result_csv(metrics: Sequence[tuple[int, Mapping[str, Any]]]) -> bytes:
    """A job's result file: one line per step, empty cells where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RESULT_COLUMNS)
    for step, values in metrics:
        cells = (values.get(key) for key in _RESULT_KEYS)
        writer.writerow([step, *("" if cell is None else float(f"{cell:.6g}") for cell in cells)])
    return text.getvalue().encode()


def _found(job: Job | None) -> Job:
    if job is None:
        raise JobNotFound
    return job


def _require_files(connection: Connection, tenant: str, spec: JobSpec) -> None:
    """The job's files must still be there: from this transaction on, their content is pinned."""
    table = tables.files
    for file in spec.files:
        mine = (table.c.tenant == tenant) & (table.c.id == file.id) & ~table.c.is_deleted
        if connection.execute(sa.select(table.c.id).where(mine)).first() is None:
            raise RequestInvalid(f"The file {file.id} was deleted.", code="not_found")


def _tokens_since(connection: Connection, tenant: str, since: float) -> int:
    """Tokens of the tenant's jobs made since then; what was cancelled before it began costs nothing."""
    jobs = tables.jobs
    counts = jobs.c.started_at.is_not(None) | jobs.c.status.not_in([s.value for s in JobStatus if s.is_over])
    mine = (jobs.c.tenant == tenant) & (jobs.c.created_at >= since) & counts
    return int(
        connection.execute(sa.select(sa.func.coalesce(sa.func.sum(jobs.c.total_tokens), 0)).where(mine)).scalar_one()
    )


def _num_active(connection: Connection, tenant: str) -> int:
    jobs = tables.jobs
    over = [status.value for status in JobStatus if status.is_over]
    query = sa.select(sa.func.count()).where(jobs.c.tenant == tenant, jobs.c.status.not_in(over))
    return int(connection.execute(query.select_from(jobs)).scalar_one())
