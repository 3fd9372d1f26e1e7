"""What the fleet's training comes to, for `/metrics`: read from the database now and then, and counted here.

Jobs, their ages and their durations are the database's, so every server shows the same, whichever process trained.
What only a process can know of itself (its tokens, its memory, the leases it saw run out) is counted by its trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from app.database import reading
from app.engine.snapshot import Histogram, HistogramBuilder
from app.training import tables
from app.training.job import JobStatus

JOB_BUCKETS_S = (10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0)
JOB_OUTCOMES = tuple(status.value for status in JobStatus if status.is_over)
LEASE_LOST, OUT_OF_MEMORY, SPOILED = RETRY_REASONS = ("lease_lost", "out_of_memory", "spoiled")
# A job that another machine's clock ended a little in the past is still seen.
OVERLAP_S = 60.0


@dataclass(frozen=True, slots=True)
class TrainingSnapshot:
    """Training at one moment; immutable. Ages and durations in seconds."""

    jobs: Mapping[str, int] = field(default_factory=dict)  # by status; those that are over since ever
    queue_age_s: float = 0.0  # of the job that waits longest for a worker
    last_loss: float | None = None  # of the newest step measured, of any job
    job_seconds: Mapping[str, Histogram] = field(default_factory=dict)  # creation to end, by outcome, since the start
    num_tokens: int = 0  # trained or measured by this process
    num_out_of_memory: int = 0  # micro-steps of this process
    retries: Mapping[str, int] = field(default_factory=dict)  # by reason, seen by this process


@dataclass(slots=True)
class TrainingCounters:
    """One trainer's own, since its start. Each number has one thread that writes it."""

    num_tokens: int = 0  # trained or measured
    num_micro_steps: int = 0
    num_joint_parts: int = 0  # parts that shared a micro-step with others
    num_out_of_memory: int = 0
    retries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RETRY_REASONS, 0))


class TrainingFigures:
    """The trainer's counters, where this process has one, and the last look into the database."""

    def __init__(
        self, engine: sa.Engine, counters: TrainingCounters | None, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._engine, self._wall = engine, wall
        self._counters = counters or TrainingCounters()
        self._seconds = {outcome: HistogramBuilder(JOB_BUCKETS_S) for outcome in JOB_OUTCOMES}
        self._began = wall()
        self._seen: dict[int, float] = {}  # jobs already observed, and when they ended: as far back as is asked again
        self._looked = TrainingSnapshot()

    def look(self) -> None:
        """Read the database; a chore, never done by a scrape."""
        jobs, events, now = tables.jobs, tables.job_events, self._wall()
        since = max([self._began, *self._seen.values()]) - OVERLAP_S
        with reading(self._engine) as connection:
            counts = connection.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status))
            by_status = {status: count for status, count in counts}
            waits = (jobs.c.status == JobStatus.QUEUED.value) & jobs.c.worker.is_(None)
            oldest = connection.execute(sa.select(sa.func.min(jobs.c.created_at)).where(waits)).scalar()
            measured = sa.select(events.c.data).where(events.c.type == "metrics").order_by(events.c.seq.desc())
            newest = connection.execute(measured.limit(1)).scalar()
            ends = sa.select(jobs.c.seq, jobs.c.status, jobs.c.created_at, jobs.c.finished_at)
            ended = connection.execute(ends.where(jobs.c.finished_at >= since)).all()
        for seq, status, created_at, finished_at in ended:
            if seq not in self._seen and finished_at >= self._began:
                self._seconds[status].observe(max(0.0, finished_at - created_at))
            self._seen[seq] = finished_at
        self._seen = {seq: at for seq, at in self._seen.items() if at >= since}
        self._looked = TrainingSnapshot(
            jobs={status.value: by_status.get(status.value, 0) for status in JobStatus},
            queue_age_s=0.0 if oldest is None else max(0.0, now - oldest),
            last_loss=(newest or {}).get("train_loss"),
            job_seconds={outcome: builder.freeze() for outcome, builder in self._seconds.items()},
        )

    def snapshot(self) -> TrainingSnapshot:
        """Without waiting for anything."""
        own = self._counters
        return replace(
            self._looked,
            num_tokens=own.num_tokens,
            num_out_of_memory=own.num_out_of_memory,
            retries=dict(own.retries),
        )
