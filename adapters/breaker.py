"""A circuit breaker: after several failures in a short time, refuse at once instead of waiting out every time limit.

Pure book-keeping on a monotonic clock; any thread may ask.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class CircuitBreaker:
    """Closed: all calls pass. Open: none. Half-open, a while after opening: one trial call passes and decides.

    Each call that `admit` let pass must be followed by exactly one `succeeded` or `failed`.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        max_failures: int = 5,
        window_s: float = 10.0,
        cool_down_s: float = 5.0,
    ) -> None:
        self._clock = clock
        self._window_s = window_s
        self._cool_down_s = cool_down_s
        self._failures: deque[float] = deque(maxlen=max_failures)
        self._opened_at: float | None = None
        self._is_trying = False
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        with self._lock:
            return self._opened_at is not None

    @property
    def state(self) -> int:
        """0 closed, 1 half-open (the next call is a trial, or one is under way), 2 open: as the metric shows it."""
        with self._lock:
            if self._opened_at is None:
                return 0
            return 1 if self._is_trying or self._clock() - self._opened_at >= self._cool_down_s else 2

    def admit(self) -> bool:
        """Return whether a call may be made now."""
        with self._lock:
            if self._opened_at is None:
                return True
            if self._is_trying or self._clock() - self._opened_at < self._cool_down_s:
                return False
            self._is_trying = True
            return True

    def succeeded(self) -> None:
        with self._lock:
            # A call from before the opening may end well after it: a success counts only while a trial is under way.
            if self._opened_at is None or self._is_trying:
                self._opened_at = None
                self._is_trying = False

    def failed(self) -> None:
        with self._lock:
            now = self._clock()
            self._failures.append(now)
            full = len(self._failures) == self._failures.maxlen
            if self._is_trying or (full and now - self._failures[0] <= self._window_s):
                self._opened_at = now
                self._is_trying = False
                self._failures.clear()
