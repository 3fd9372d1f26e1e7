"""The worker's side of jobs: claim, heartbeat, metrics, checkpoints, the end. Every write carries the claim's fence.

A claim raises the job's fence; giving it back, losing it, cancelling and erasing do too. A write under an old fence
raises StaleFence and changes nothing, so a worker that was stopped for an hour and wakes can do no harm.

No clock of a database or of another machine decides who is alive: a heartbeat is a counter, and `Reaper` judges its
silence by its own monotonic clock. All calls block; thread-safe.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.database import reading, writing
from app.training import job_rows, tables
from app.training.config import TrainingConfig
from app.training.job import (
    Checkpoint,
    Job,
    JobError,
    JobStatus,
    StaleFence,
    StepMetrics,
    Succeeded,
    model_name,
    new_id,
)
from app.training.queue_rows import count_turn, has_unclaimed, unclaimed
from app.training.turns import claim_order

if TYPE_CHECKING:
    from collections.abc import Iterator

KEEP_CHECKPOINTS = 3  # the newest ones; the best by validation loss stays besides
MAX_LOST_WORKERS = 20  # without durable progress in between; then the job itself is to blame


class Signal(enum.Enum):
    """What a heartbeat brings back. A cancelled job has none: its fence is stale."""

    GO_ON = "go_on"
    PAUSE = "pause"  # write a durable state, then `paused`


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker may write to, until its fence is stale."""

    job: Job
    fence: int

    @property
    def id(self) -> str:
        return self.job.id


class WorkQueue:
    """What workers do to jobs. Invariant: at most one live fence per job."""

    def __init__(
        self,
        engine: Engine,
        *,
        base_id: str,
        base_digest: str | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`base_digest`: only jobs made for this base are claimed; None claims all."""
        self._engine, self._base_id, self._base_digest, self._wall = engine, base_id, base_digest, wall

    # ---- taking and giving back

    def claim(self, worker: str) -> ClaimedJob | None:
        """Take the next queued job, tenants in turns; None when there is none. It is `running` afterwards."""
        return self._claim(worker, JobStatus.QUEUED)

    def claim_validation(self, worker: str) -> ClaimedJob | None:
        """Take a job whose files are to be validated; its status stays `validating_files`."""
        return self._claim(worker, JobStatus.VALIDATING)

    def _claim(self, worker: str, status: JobStatus) -> ClaimedJob | None:
        with reading(self._engine) as connection:
            if not has_unclaimed(connection, status, self._base_digest):
                return None
        with writing(self._engine) as connection:
            for waiting in claim_order(**unclaimed(connection, status, self._base_digest)):
                job = job_rows.load(connection, waiting.id)
                if job is None or job.status is not status or job.worker is not None:
                    continue  # somebody else was faster
                claim = {"worker": worker, "fence": job.fence + 1, "heartbeat": 0}
                if status is JobStatus.VALIDATING:
                    taken = job_rows.update(connection, job, **claim)
                else:
                    taken = self._start(connection, job, claim)
                if taken:
                    count_turn(connection, job.tenant)
                    claimed = job_rows.load(connection, job.id)
                    assert claimed is not None
                    return ClaimedJob(claimed, claimed.fence)
        return None

    def _start(self, connection: Connection, job: Job, claim: Mapping[str, Any]) -> bool:
        now = self._wall()
        note = connection.execute(sa.select(tables.jobs.c.resume_note).where(tables.jobs.c.id == job.id)).scalar()
        started = job.started_at if job.started_at is not None else now
        if not job_rows.move(connection, job, JobStatus.RUNNING, now, started_at=started, resume_note=None, **claim):
            return False
        if job.started_at is None:
            job_rows.add_event(connection, job.id, now, "Fine-tuning job started")
        elif note in ("paused", "returned"):
            job_rows.add_event(connection, job.id, now, f"Job resumed from step {_durable_step(job)}")
        elif note == "lost":
            message = f"The job's worker was lost; training continues from step {_durable_step(job)}"
            job_rows.add_event(connection, job.id, now, message, level="warn")
        return True

    def starved(self) -> frozenset[str]:
        """Ids of the jobs in the queue whose tenants have none at work, here or elsewhere."""
        with reading(self._engine) as connection:
            if not has_unclaimed(connection, JobStatus.QUEUED, self._base_digest):
                return frozenset()
            found = unclaimed(connection, JobStatus.QUEUED, self._base_digest)
        return frozenset(waiting.id for waiting in found["waiting"] if not found["running"][waiting.tenant])

    def release(self, claim: ClaimedJob, *, is_told: bool = False) -> None:
        """Give the job back; another worker continues from its durable state. `is_told`: in the job's events, which is
        for what happens seldom: a fault may bring a job back every few seconds."""
        with self._fenced(claim) as (connection, job):
            if job.status is JobStatus.VALIDATING:
                self._require(job_rows.update(connection, job, worker=None, fence=job.fence + 1))
            else:
                to = JobStatus.PAUSED if job.status is JobStatus.PAUSING else JobStatus.QUEUED
                now, is_told = self._wall(), is_told and to is JobStatus.QUEUED
                note = "paused" if to is JobStatus.PAUSED else "returned" if is_told else None
                self._require(job_rows.put_back(connection, job, to, now, note))
                if is_told:
                    job_rows.add_event(
                        connection, job.id, now, f"Job returned to the queue at step {_durable_step(job)}"
                    )

    def lose(self, job_id: str, fence: int, heartbeat: int) -> bool:
        """Take a silent worker's job back, unless it showed a sign of life since. The reaper's call."""
        with writing(self._engine) as connection:
            job = job_rows.load(connection, job_id)
            if job is None or job.worker is None or (job.fence, job.heartbeat) != (fence, heartbeat):
                return False
            now, jobs = self._wall(), tables.jobs
            lost = connection.execute(sa.select(jobs.c.num_lost).where(jobs.c.id == job_id)).scalar_one() + 1
            if job.status is JobStatus.VALIDATING and lost <= MAX_LOST_WORKERS:
                return job_rows.update(connection, job, worker=None, fence=fence + 1, num_lost=lost)
            if lost > MAX_LOST_WORKERS:
                message = f"{lost} workers were lost at step {_durable_step(job)}. Quote {job.id} to your operator."
                return self._fail(connection, job, JobError("server_error", message), fence=fence + 1)
            to = JobStatus.PAUSED if job.status is JobStatus.PAUSING else JobStatus.QUEUED
            return job_rows.put_back(connection, job, to, now, "lost", num_lost=lost)

    def heartbeats(self) -> dict[str, tuple[int, int]]:
        """(fence, heartbeat) of every claimed job."""
        jobs = tables.jobs
        query = sa.select(jobs.c.id, jobs.c.fence, jobs.c.heartbeat).where(jobs.c.worker.is_not(None))
        with reading(self._engine) as connection:
            return {job_id: (fence, beat) for job_id, fence, beat in connection.execute(query)}

    # ---- while it is worked on

    def heartbeat(self, claim: ClaimedJob) -> Signal:
        """Say that the worker lives, every third of the lease. Raises StaleFence when the job is no longer its."""
        with self._fenced(claim) as (connection, job):
            self._require(job_rows.update(connection, job, heartbeat=job.heartbeat + 1))
            return Signal.PAUSE if job.status is JobStatus.PAUSING else Signal.GO_ON

    def check(self, claim: ClaimedJob) -> None:
        """Raise StaleFence unless the claim still holds. Changes nothing; for the moment before a step outside SQL."""
        with reading(self._engine) as connection:
            self._held(job_rows.load(connection, claim.id), claim)

    def validated(
        self, claim: ClaimedJob, config: TrainingConfig, report: Mapping[str, Any], total_tokens: int
    ) -> None:
        """The files are sound: put the job in the queue, every "auto" resolved. The claim ends."""
        with self._fenced(claim) as (connection, job):
            now = self._wall()
            done = {
                "config": config.to_dict(),
                "report": report,
                "total_steps": config.total_steps,
                "total_tokens": total_tokens,
                "worker": None,
                "fence": job.fence + 1,
                "num_lost": 0,
            }
            self._require(job_rows.move(connection, job, JobStatus.QUEUED, now, **done))
            if report.get("counts"):
                message = "The files can be used, with warnings"
                job_rows.add_event(connection, job.id, now, message, level="warn", data=report)
            message = "Files validated, moving job to queued state"
            job_rows.add_event(connection, job.id, now, message, data={"report": report})

    def record_event(
        self, claim: ClaimedJob, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None
    ) -> None:
        with self._fenced(claim) as (connection, job):
            job_rows.add_event(connection, job.id, self._wall(), message, level=level, data=data)

    def record_metrics(self, claim: ClaimedJob, metrics: Sequence[StepMetrics]) -> None:
        """Keep what was measured, one event per step. A step that is run again after a restart replaces its values in
        the result file and makes no second event. Progress moves the estimated finish."""
        with self._fenced(claim) as (connection, job):
            total = job.total_steps or 0
            for measured in metrics:
                values = measured.to_dict()
                if _keep_metrics(connection, job.id, measured.step, values):
                    data = {"total_steps": total, **values}
                    message = measured.sentence(total)
                    job_rows.add_event(connection, job.id, self._wall(), message, data=data, type_="metrics")
            step = max((measured.step for measured in metrics), default=job.step)
            finish = self._estimated_finish(job, step)
            self._require(job_rows.update(connection, job, step=step, estimated_finish=finish))

    def _estimated_finish(self, job: Job, step: int) -> float | None:
        if job.started_at is None or not job.total_steps or step < 1:
            return job.estimated_finish
        now = self._wall()
        return now + max(0.0, now - job.started_at) / step * max(0, job.total_steps - step)

    def save_state(self, claim: ClaimedJob, step: int, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Point the job to a durable state of the trainer (its blobs are written already). Returns the one before,
        whose blobs may now be deleted."""
        with self._fenced(claim) as (connection, job):
            self._require(job_rows.update(connection, job, state={**state, "step": step}, step=step, num_lost=0))
            return job.state

    def add_checkpoint(
        self, claim: ClaimedJob, metrics: StepMetrics, manifest: Mapping[str, Any]
    ) -> tuple[Checkpoint, list[Checkpoint]]:
        """List an adapter of a step. Returns it and the checkpoints that this one pushes out, whose blobs may go.

        `manifest`: the fields of an AdapterManifest whose blobs are stored. May be repeated for the same step.
        """
        with self._fenced(claim) as (connection, job):
            table, now, step = tables.checkpoints, self._wall(), metrics.step
            known = sa.select(table).where(table.c.job_id == job.id, table.c.step == step)
            row = connection.execute(known).first()
            if row is None:
                name = f"{model_name(self._base_id, job)}:ckpt-step-{step}"
                values = {"id": new_id("ftckpt_"), "job_id": job.id, "step": step, "name": name, "created_at": now}
                values |= {"metrics": metrics.to_dict(), "manifest": manifest, "is_dropped": False}
                connection.execute(sa.insert(table).values(**values))
                message = f"Checkpoint created at step {step} with Snapshot ID: {name}"
                job_rows.add_event(connection, job.id, now, message, data={"step": step})
                row = connection.execute(known).one()
            else:
                same = sa.update(table).where(table.c.id == row.id)
                connection.execute(same.values(metrics=metrics.to_dict(), manifest=manifest, is_dropped=False))
                row = connection.execute(known).one()
            return job_rows.checkpoint_of(row), _drop_checkpoints(connection, job.id)

    # ---- its end

    def paused(self, claim: ClaimedJob) -> bool:
        """The durable state is written: pause. False when the job was resumed meanwhile; then go on with it."""
        with self._fenced(claim) as (connection, job):
            if job.status is not JobStatus.PAUSING:
                return False
            now = self._wall()
            self._require(job_rows.put_back(connection, job, JobStatus.PAUSED, now, "paused"))
            job_rows.add_event(connection, job.id, now, f"Job paused at step {_durable_step(job)}")
            return True

    def begin_publish(self, claim: ClaimedJob) -> str:
        """From here on the job cannot be cancelled. Returns the immutable name that the model will have.

        The version's number is reserved by the catalog, which knows the job's id: a repeat finds its own manifest.
        """
        with self._fenced(claim) as (connection, job):
            self._require(job_rows.update(connection, job, is_publishing=True))
            return model_name(self._base_id, job)

    def succeed(self, claim: ClaimedJob, outcome: Succeeded) -> None:
        """The adapter is published and answers: say so."""
        with self._fenced(claim) as (connection, job):
            now, name = self._wall(), model_name(self._base_id, job)
            done = {
                "fine_tuned_model": name,
                "adapter_version": outcome.adapter_version,
                "trained_tokens": outcome.trained_tokens,
                "total_tokens": outcome.total_tokens,
                "result_file": outcome.result_file,
                "gate": dict(outcome.gate),
                "is_publishing": False,
            }
            self._require(job_rows.move(connection, job, JobStatus.SUCCEEDED, now, **done))
            if not outcome.gate.get("passed", True):
                reason = outcome.gate.get("reason") or "the gate held it back"
                message = (
                    f"The alias '{job.spec.publish.alias}' was not moved to version {outcome.adapter_version}: {reason}"
                )
                job_rows.add_event(connection, job.id, now, message, level="warn", data=outcome.gate)
            job_rows.add_event(connection, job.id, now, f"New fine-tuned model created: {name}")
            job_rows.add_event(connection, job.id, now, "The job has successfully completed")

    def fail(self, claim: ClaimedJob, error: JobError, *, data: Mapping[str, Any] | None = None) -> None:
        """End the job with an error that its owner can act on. `data`: findings, for the event."""
        with self._fenced(claim) as (connection, job):
            self._require(self._fail(connection, job, error, data=data))

    def _fail(
        self, connection: Connection, job: Job, error: JobError, *, data: Mapping[str, Any] | None = None, **more: Any
    ) -> bool:
        now = self._wall()
        body = {"code": error.code, "message": error.message, "param": error.param}
        if not job_rows.move(connection, job, JobStatus.FAILED, now, error=body, is_publishing=False, **more):
            return False
        job_rows.add_event(connection, job.id, now, error.message, level="error", data=data)
        return True

    # ---- fences

    @contextmanager
    def _fenced(self, claim: ClaimedJob) -> Iterator[tuple[Connection, Job]]:
        """One transaction on the claimed job; whatever it writes is undone if the claim does not hold."""
        with writing(self._engine) as connection:
            if connection.dialect.name == "postgresql":  # SQLite's write lock is held already
                lock = sa.select(tables.jobs.c.id).where(tables.jobs.c.id == claim.id).with_for_update()
                connection.execute(lock)
            job = self._held(job_rows.load(connection, claim.id), claim)
            yield connection, job

    def _held(self, job: Job | None, claim: ClaimedJob) -> Job:
        if job is None or job.fence != claim.fence or job.worker is None or job.status.is_over:
            raise StaleFence
        return job

    def _require(self, written: bool) -> None:
        if not written:
            raise StaleFence


def _durable_step(job: Job) -> int:
    return int(job.state["step"]) if job.state else 0


def _keep_metrics(connection: Connection, job_id: str, step: int, values: Mapping[str, Any]) -> bool:
    """Write a step's values; True when the step is new."""
    table = tables.job_metrics
    same = sa.update(table).where(table.c.job_id == job_id, table.c.step == step).values({"values": values})
    if connection.execute(same).rowcount:
        return False
    connection.execute(sa.insert(table).values({"job_id": job_id, "step": step, "values": values}))
    return True


def _drop_checkpoints(connection: Connection, job_id: str) -> list[Checkpoint]:
    """Keep the newest few and the best by validation loss; unlist and return the others."""
    table = tables.checkpoints
    query = sa.select(table).where(table.c.job_id == job_id, ~table.c.is_dropped).order_by(table.c.step)
    kept = [job_rows.checkpoint_of(row) for row in connection.execute(query)]
    measured = [one for one in kept if "full_valid_loss" in one.metrics]
    best = min(measured, key=lambda one: float(one.metrics["full_valid_loss"]), default=None)
    dropped = [one for one in kept[:-KEEP_CHECKPOINTS] if best is None or one.id != best.id]
    if dropped:
        gone = sa.update(table).where(table.c.id.in_([one.id for one in dropped]))
        connection.execute(gone.values(is_dropped=True))
    return dropped
