"""One thread that runs small acts in the order of their posting, and looks around while there is a reason to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_TICK_S = 0.1


class Courier:
    """Acts must be quick and must not raise. `look` is called after each act, and each tick while `is_needed()`."""

    def __init__(self, name: str, look: Callable[[], None], is_needed: Callable[[], bool]) -> None:
        self._look = look
        self._is_needed = is_needed
        self._acts: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, act: Callable[[], None]) -> None:
        """Have `act` run soon. Never blocks; any thread."""
        self._acts.put(act)

    def wake(self) -> None:
        """`is_needed()` may have become true."""
        self._acts.put(_nothing)

    def stop(self, timeout_s: float) -> None:
        """Run what was posted before, then end."""
        self._acts.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                act = self._acts.get(timeout=_TICK_S if self._is_needed() else None)
            except queue.Empty:
                act = _nothing
            if act is None:
                return
            act()
            self._look()


def _nothing() -> None:
    """An act that only wakes the thread."""
