"""The one thread in which a job's blocking calls run: SQL, the blob store, files. In order, tried again when it helps.

The engine thread only ever looks whether a call is done. Neither it nor the event loop waits for a store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from adapters.errors import AdapterUnavailable, StoreUnavailable
from app.errors import ServerBusy

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

RETRY_AFTER_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
PASSING = (StoreUnavailable, AdapterUnavailable, ServerBusy)  # what may be better in a moment


class JobThread:
    """Calls of one job. `wake` is called in this thread after each, so that a sleeping engine looks again."""

    def __init__(self, job_id: str, wake: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"job-{job_id[-6:]}")
        self._wake = wake
        self._hurry = threading.Event()

    def call(self, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call. What a failing store or database throws is waited out for half a minute, then raised."""
        future = self._pool.submit(self._patiently, lambda: run(*args, **kwargs))
        future.add_done_callback(lambda _: self._wake())
        return future

    def _patiently(self, run: Callable[[], T]) -> T:
        for seconds in RETRY_AFTER_S:
            try:
                return run()
            except PASSING as exc:
                if self._hurry.is_set():
                    raise
                logger.warning("tried again", extra={"action": "job_call_retried", "error": type(exc).__name__})
                self._hurry.wait(seconds)
        return run()

    def hurry(self) -> None:
        """The process ends: wait nothing out any more."""
        self._hurry.set()

    def close(self) -> None:
        """Let what was queued run to its end; returns at once."""
        self._pool.shutdown(wait=False)
