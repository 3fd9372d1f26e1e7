"""A claim's heart: a thread that beats while a worker is busy, and tells it what the last beat brought back."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from app.errors import ServerBusy
from app.training.job import StaleFence
from app.training.work_queue import ClaimedJob, Signal, WorkQueue

logger = logging.getLogger(__name__)


class Heartbeat:
    """Beats three times a lease from `with` to its end. `check` and `signal` may be called from any thread, at no cost.

    A database that does not answer is not the end: the claim may still hold, so the worker goes on and its next write
    decides. A stale fence is.
    """

    def __init__(self, queue: WorkQueue, claim: ClaimedJob, *, lease_s: float) -> None:
        self._queue, self._claim, self._every_s = queue, claim, lease_s / 3
        self._stop = threading.Event()
        self._is_stale = False
        self.signal = Signal.GO_ON
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{claim.id[-6:]}", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raise StaleFence when the job is no longer this worker's."""
        if self._is_stale:
            raise StaleFence

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.signal = self._queue.heartbeat(self._claim)
            except StaleFence:
                self._is_stale = True
                return
            except ServerBusy:
                logger.warning("heartbeat failed", extra={"action": "heartbeat_failed", "job": self._claim.id})
            self._stop.wait(self._every_s)
