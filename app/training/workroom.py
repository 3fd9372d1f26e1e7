"""What the jobs of a process share, and what one of them has of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from adapters.store import BlobStore
from app.engine.base_model import BaseModel
from app.training.checkpoint import StateStore
from app.training.evaluate import GreedySampler
from app.training.fine_tuning import FineTuning
from app.training.job import Job, JobError
from app.training.job_thread import JobThread
from app.training.publish import AdapterOutput
from app.training.work import Steps, wait
from app.training.work_queue import ClaimedJob, WorkQueue

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workroom:
    """What all jobs of a process share."""

    base: BaseModel
    fine_tuning: FineTuning
    output: AdapterOutput
    sampler: GreedySampler
    store: BlobStore
    scratch: Path
    micro_batch_tokens: int  # of a micro-step, padding counted; fixed, since another cut rounds differently
    state_every_s: float = 60.0  # between two durable states; each epoch ends with one anyway
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Desk:
    """One claimed job's place in the workroom."""

    room: Workroom
    claim: ClaimedJob
    thread: JobThread  # for its blocking calls
    scratch: Path
    states: StateStore = field(init=False)

    def __post_init__(self) -> None:
        states = StateStore(self.room.store, self.job.tenant, self.job.id, scratch=self.scratch)
        object.__setattr__(self, "states", states)

    @property
    def job(self) -> Job:
        """As it was when it was claimed."""
        return self.claim.job

    @property
    def queue(self) -> WorkQueue:
        return self.room.fine_tuning.queue

    def call(self, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Steps[T]:
        """Run something that blocks in the job's own thread."""
        return (yield from wait(self.thread.call(run, *args, **kwargs)))


class JobFailed(Exception):
    """The job cannot go on, for a reason that its owner is told."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = JobError(code, message)
