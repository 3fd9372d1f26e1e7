"""Finds workers that went silent and gives their jobs to others. Runs wherever workers run; any number of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from app.training.work_queue import WorkQueue

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sign:
    """The last sign of life of a claim, and when this process first saw it (its own monotonic clock)."""

    fence: int
    heartbeat: int
    seen_at: float


class Reaper:
    """Judges silence by its own clock alone: a claim whose counter stood still for a lease under its eyes is lost.

    So a jump of any wall clock takes no job from anybody, and after a start every worker has a full lease to show
    itself. One thread.
    """

    def __init__(self, queue: WorkQueue, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue, self._lease_s, self._clock = queue, lease_s, clock
        self._signs: dict[str, _Sign] = {}

    def sweep(self) -> list[str]:
        """Look once; return the ids of the jobs that were taken back. Call it several times a lease."""
        now, before = self._clock(), self._signs
        self._signs, lost = {}, []
        for job_id, (fence, heartbeat) in self._queue.heartbeats().items():
            sign = before.get(job_id)
            if sign is None or (sign.fence, sign.heartbeat) != (fence, heartbeat):
                self._signs[job_id] = _Sign(fence, heartbeat, now)
            elif now - sign.seen_at < self._lease_s:
                self._signs[job_id] = sign
            elif self._queue.lose(job_id, fence, heartbeat):
                logger.warning("worker lost", extra={"action": "worker_lost", "job": job_id, "fence": fence})
                lost.append(job_id)
        return lost
