"""Trains in the engine's spare time: takes jobs from the queue and runs them a quantum at a time, several in turns.

Three kinds of threads: the engine's calls `quantum` (all torch work), one side thread claims and validates jobs and
takes back those of lost workers, and each job has one for its blocking calls. The engine's waits for none of them.
"""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import ServerBusy
from app.training.figures import LEASE_LOST, OUT_OF_MEMORY, SPOILED, TrainingCounters
from app.training.heartbeat import Heartbeat
from app.training.job import JobNotFound, JobStatus, StaleFence
from app.training.job_thread import JobThread
from app.training.micro_step import PartResult, micro_step
from app.training.reaper import Reaper
from app.training.run import JobRun
from app.training.work import Compute, Interrupted, OutOfMemory, PauseWanted, ReturnWanted, Spoiled, Turn, Wait, Work
from app.training.work_queue import ClaimedJob
from app.training.workroom import Desk, Workroom

logger = logging.getLogger(__name__)

MAX_JOBS = 4  # at work at once in one process: each holds its training state in memory
POLL_S = 0.5  # between two looks for new jobs
REST_S = 5.0  # after a job was given back for a fault that may pass: it is likely to meet it again here
SWEEPS_PER_LEASE = 4


@dataclass(slots=True, eq=False)
class _Active:
    """A claimed job at work here. The engine thread's, but for its heart and its desk's thread."""

    run: JobRun
    desk: Desk
    heart: Heartbeat
    scratch: tempfile.TemporaryDirectory[str]
    steps: Generator[Work, Any, None]
    wants: Work | None = None  # what the generator waits for; None before its first step
    tokens: int = 0  # trained or measured here: whose turn it is
    is_alone: bool = False  # shares no micro-step: one that it shared failed
    is_stale: bool = False  # set by the side thread: cancelled, erased or somebody else's
    is_pausing: bool = False  # likewise: its tenant wants it paused
    is_yielding: bool = False  # likewise: another tenant has no job at work, this one has several here

    @property
    def is_ready(self) -> bool:
        return not isinstance(self.wants, Wait) or self.wants.future.done()


@dataclass(slots=True)
class _Shared:
    """A micro-step under way and the jobs in it."""

    members: list[_Active]
    steps: Generator[None, None, list[PartResult]]


class Trainer:
    """A `TrainingStepper`. `start` and `close` belong to the process; the rest is the engine thread's."""

    def __init__(
        self,
        room: Workroom,
        *,
        worker: str,
        lease_s: float,
        wake: Callable[[], object],
        max_jobs: int = MAX_JOBS,
        poll_s: float = POLL_S,
        rest_s: float = REST_S,
    ) -> None:
        """`worker`: this process's name in the jobs table. `wake` makes a sleeping engine look again; any thread."""
        self._room, self._worker, self._lease_s, self._wake = room, worker, lease_s, wake
        self._max_jobs, self._poll_s, self._rest_s = max_jobs, poll_s, rest_s
        self._rest_until = 0.0  # time.monotonic()
        self._starved: frozenset[str] = frozenset()  # jobs of tenants without one at work, at the last look
        self._arrivals: queue.SimpleQueue[_Active] = queue.SimpleQueue()
        self._leaving: queue.SimpleQueue[_Active | None] = queue.SimpleQueue()
        self._active: list[_Active] = []
        self._served: dict[str, int] = {}  # tokens by tenant, comparable between those with jobs at work
        self._shared: _Shared | None = None
        self._claimed: list[_Active] = []  # guarded by _claim_lock; until their last thread has ended
        self._claim_lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._seek, name="training-claims", daemon=True),
            threading.Thread(target=self._validate, name="training-validation", daemon=True),
            threading.Thread(target=self._bid_farewell, name="training-farewell", daemon=True),
        ]
        self.counters = TrainingCounters()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def num_active(self) -> int:
        """Jobs at work here; any thread."""
        with self._claim_lock:
            return len(self._claimed)

    # ---- the engine thread

    def has_work(self) -> bool:
        """True while a quantum would do something. Does not block."""
        return self._shared is not None or not self._arrivals.empty() or any(job.is_ready for job in self._active)

    def quantum(self) -> None:
        """One layer of a micro-step, or one job's own next step. A job's faults end that job alone."""
        while not self._arrivals.empty():
            self._arrive(self._arrivals.get())
        if self._shared is not None:
            self._advance(self._shared)
            return
        self._interrupt_where_asked()
        ready = sorted((job for job in self._active if job.is_ready), key=self._turn)
        moving = next((job for job in ready if not isinstance(job.wants, Compute)), None)
        if moving is not None:
            self._resume(moving)
        elif ready:
            self._begin(ready)

    def leave(self) -> None:
        """Claim nothing more, and interrupt each job at its next border: it writes its state and is given back."""
        self._stop.set()
        self._wake_up()

    def _turn(self, job: _Active) -> tuple[int, int]:
        """Tenants by what they got, then their jobs likewise."""
        return self._served[job.run.tenant], job.tokens

    def _arrive(self, job: _Active) -> None:
        """A tenant that had nothing at work here begins level with those who have: an absence earns no credit."""
        tenants = {other.run.tenant for other in self._active}
        tenant = job.run.tenant
        if tenant not in tenants:
            least = min((self._served[other] for other in tenants), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), least)
        self._active.append(job)

    def _begin(self, ready: list[_Active]) -> None:
        """Start a micro-step for the first job, and let others of its kind come along as far as there is room."""
        members, rows, width = [ready[0]], *_size(ready[0])
        for job in ready[1:]:
            more, other = _size(job)
            if _may_share(ready[0], job) and (rows + more) * max(width, other) <= self._room.micro_batch_tokens:
                members.append(job)
                rows, width = rows + more, max(width, other)
        wanted = [_compute(job) for job in members]
        steps = micro_step(self._room.base, [one.part for one in wanted], train=wanted[0].train)
        self._shared = _Shared(members, steps)
        self.counters.num_micro_steps += 1
        if len(members) > 1:
            self.counters.num_joint_parts += len(members)
        self._advance(self._shared)

    def _advance(self, shared: _Shared) -> None:
        try:
            next(shared.steps)
        except StopIteration as end:
            self._shared = None
            for job, result in zip(shared.members, end.value, strict=True):
                job.tokens += result.num_tokens
                self.counters.num_tokens += result.num_tokens
                self._served[job.run.tenant] += result.num_tokens
                self._resume(job, result)
        except Exception as exc:
            self._shared = None
            out_of_memory = _is_out_of_memory(exc)
            if not out_of_memory:
                logger.exception("micro-step failed", extra={"action": "micro_step_failed"})
            self.counters.num_out_of_memory += out_of_memory
            is_shared = len(shared.members) > 1
            for job in shared.members:
                if out_of_memory:
                    self.counters.retries[OUT_OF_MEMORY] += 1
                    self._throw(job, OutOfMemory())
                elif not is_shared:
                    self._throw(job, exc)
                else:
                    job.is_alone = True
                    self.counters.retries[SPOILED] += 1
                    if _compute(job).train:  # else nothing was summed up, and it is just measured again
                        self._throw(job, Spoiled())
            if out_of_memory and torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _resume(self, job: _Active, result: PartResult | None = None) -> None:
        """Give a job what it waited for."""
        wants = job.wants
        if not isinstance(wants, Wait):
            self._drive(job, lambda: job.steps.send(result))
            return
        error = wants.future.exception()
        if error is not None:
            self._throw(job, error)
        else:
            self._drive(job, lambda: job.steps.send(wants.future.result()))

    def _throw(self, job: _Active, error: BaseException) -> None:
        self._drive(job, lambda: job.steps.throw(error))

    def _drive(self, job: _Active, step: Callable[[], Work]) -> None:
        try:
            job.wants = step()
        except StopIteration:
            self._let_go(job)
        except (StaleFence, Interrupted):
            logger.info("job dropped", extra={"action": "job_dropped", "job": job.desk.claim.id})
            self._let_go(job)
        except Exception as exc:
            # Even saying so failed: the heart stops, and the reaper gives the job to somebody else.
            logger.error("job lost", extra={"action": "job_lost", "job": job.desk.claim.id}, exc_info=exc)
            self._let_go(job)

    def _interrupt_where_asked(self) -> None:
        """Between micro-steps: tell jobs that were cancelled, taken away or paused, or that the process ends."""
        for job in list(self._active):
            if not job.run.may_interrupt or job.wants is None:
                continue
            reason = self._reason_to_stop(job)
            if reason is not None:
                job.run.may_interrupt = False
                self._throw(job, reason)

    def _reason_to_stop(self, job: _Active) -> Exception | None:
        if job.is_stale:
            return StaleFence()
        if self._stop.is_set() or job.is_yielding:
            return ReturnWanted()
        return PauseWanted() if job.is_pausing else None

    def _let_go(self, job: _Active) -> None:
        if job.run.met_fault:
            self._rest_until = time.monotonic() + self._rest_s
        self._active.remove(job)
        job.steps.close()
        self._leaving.put(job)

    # ---- side threads

    def _seek(self) -> None:
        """Claim jobs while there is room for them, and take back those of silent workers."""
        reaper = Reaper(self._room.fine_tuning.queue, lease_s=self._lease_s)
        looks = max(1, int(self._lease_s / SWEEPS_PER_LEASE / self._poll_s))
        since = 0
        while not self._stop.is_set():
            try:
                if since % looks == 0:
                    self.counters.retries[LEASE_LOST] += len(reaper.sweep())
                since += 1
                self._look_after()
                if not self._has_room():
                    self._make_room()
                elif not self._is_resting() and (claim := self._room.fine_tuning.queue.claim(self._worker)):
                    self._take(claim)
                    continue
            except ServerBusy:
                logger.warning("queue not reached", extra={"action": "queue_unreachable"})
            except Exception:
                logger.exception("claiming failed", extra={"action": "claim_failed"})
            self._stop.wait(self._poll_s)

    def _look_after(self) -> None:
        """See whether jobs at work here were cancelled, paused or taken away: sooner than a heartbeat would."""
        with self._claim_lock:
            watched = list(self._claimed)
        for job in watched:
            try:
                row = self._room.fine_tuning.jobs.get(job.run.tenant, job.desk.claim.id)
            except JobNotFound:
                job.is_stale = True
                continue
            job.is_stale = row.fence != job.desk.claim.fence or row.status.is_over
            job.is_pausing = row.status is JobStatus.PAUSING
            if job.is_stale or job.is_pausing:
                self._wake_up()

    def _is_resting(self) -> bool:
        return time.monotonic() < self._rest_until

    def _has_room(self) -> bool:
        return self.num_active < self._max_jobs

    def _make_room(self) -> None:
        """Where a tenant waits that has no job at work anywhere, one that has several here gives one back: of the
        lowest priority, its latest."""
        with self._claim_lock:
            claimed = list(self._claimed)
        held = Counter(job.run.tenant for job in claimed)
        tenant, count = held.most_common(1)[0] if held else ("", 0)
        if count < 2 or any(job.is_yielding for job in claimed):
            return
        before, self._starved = self._starved, self._room.fine_tuning.queue.starved()
        if not before & self._starved:  # a worker with room may be about to take it
            return
        mine = [job for job in reversed(claimed) if job.run.tenant == tenant]
        chosen = min(mine, key=lambda job: job.desk.claim.job.spec.training.priority)
        chosen.is_yielding = True
        logger.info("job makes room", extra={"action": "job_makes_room", "job": chosen.desk.claim.id, "tenant": tenant})
        self._wake_up()

    def _take(self, claim: ClaimedJob) -> None:
        thread = JobThread(claim.id, self._wake_up)
        scratch = tempfile.TemporaryDirectory(dir=self._room.scratch, prefix="training-")
        heart = Heartbeat(self._room.fine_tuning.queue, claim, lease_s=self._lease_s)
        heart.__enter__()
        desk = Desk(self._room, claim, thread, Path(scratch.name))
        run = JobRun(desk)
        active = _Active(run, desk, heart, scratch, run.steps())
        with self._claim_lock:
            self._claimed.append(active)
        self._arrivals.put(active)
        extra = {"action": "job_claimed", "job": claim.id, "tenant": claim.job.tenant, "fence": claim.fence}
        logger.info("job claimed", extra=extra)
        self._wake_up()

    def _wake_up(self) -> None:
        self._wake()

    def _validate(self) -> None:
        """Read new jobs' files; each may take minutes and must hold up no claim."""
        while not self._stop.is_set():
            try:
                if self._room.fine_tuning.validate_next(self._worker):
                    continue
            except Exception:
                logger.exception("validation failed", extra={"action": "validation_failed"})
            self._stop.wait(self._poll_s)

    def _bid_farewell(self) -> None:
        """End the hearts and threads of jobs that are through: both may wait for a database."""
        while (job := self._leaving.get()) is not None:
            job.heart.__exit__(None, None, None)
            job.desk.thread.close()
            job.scratch.cleanup()
            with self._claim_lock:
                self._claimed.remove(job)

    # ---- the end of the process

    def close(self, timeout_s: float = 20.0) -> None:
        """Write durable states and give all jobs back. Only once the engine thread has ended: this one takes over."""
        self._stop.set()
        for thread in self._threads[:2]:
            if thread.is_alive():
                thread.join(timeout_s)
        while not self._arrivals.empty():
            self._arrive(self._arrivals.get())
        self._shared = None  # gradients that were being summed up are made again by whoever continues
        for job in list(self._active):
            job.desk.thread.hurry()
            if job.wants is None:  # claimed and not begun
                job.wants = job.steps.send(None)
        self._interrupt_where_asked()
        while self._active:
            job = self._active[0]
            if isinstance(job.wants, Wait):
                try:
                    job.wants.future.exception(timeout=timeout_s)
                except TimeoutError:
                    self._let_go(job)  # the lease will run out
                    continue
                self._resume(job)
            elif isinstance(job.wants, Turn):  # a state is being copied
                self._resume(job)
            else:
                self._let_go(job)
        self._leaving.put(None)
        if self._threads[2].is_alive():
            self._threads[2].join(timeout_s)


def _compute(job: _Active) -> Compute:
    assert isinstance(job.wants, Compute)
    return job.wants


def _size(job: _Active) -> tuple[int, int]:
    """Rows and width of the micro-step that a job wants."""
    wanted = _compute(job)
    return wanted.num_rows, wanted.width


def _may_share(one: _Active, other: _Active) -> bool:
    """Measuring goes with measuring; and a preference step makes a second pass that others need not pay for."""
    if one.is_alone or other.is_alone:
        return False
    a, b = _compute(one), _compute(other)
    return a.train == b.train and (a.part.beta is None) == (b.part.beta is None)


def _is_out_of_memory(error: BaseException) -> bool:
    """CPUs say it in words of their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
