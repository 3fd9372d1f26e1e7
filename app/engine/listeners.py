"""Who hears of which request. What a step has to say is gathered; each listener is told once, of all its requests."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

from app.engine.sequence import Event, Finished, FinishReason

logger = logging.getLogger(__name__)

Sink = Callable[[list[Event]], None]


class Listeners:
    """Engine thread only; but its length is a single number, for any thread."""

    def __init__(self) -> None:
        self._sinks: dict[str, Sink] = {}  # by request id
        self._outbox: dict[Sink, list[Event]] = {}

    def __len__(self) -> int:
        return len(self._sinks)

    def add(self, request_id: str, sink: Sink) -> None:
        self._sinks[request_id] = sink

    def tell(self, event: Event) -> None:
        """At the next `flush`. Nobody hears of a request after its Finished."""
        request_id = event.request_id
        is_last = isinstance(event, Finished)
        sink = self._sinks.pop(request_id, None) if is_last else self._sinks.get(request_id)
        if sink is not None:
            self._outbox.setdefault(sink, []).append(event)

    def tell_all(self, error: Exception) -> None:
        """End every request with an error of its own: each is raised in a task of its own."""
        for request_id in list(self._sinks):
            self.tell(Finished(request_id, FinishReason.ERROR, copy.copy(error)))

    def flush(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for sink, events in outbox.items():
            try:
                sink(events)
            except Exception:  # a closed event loop is the listener's end, not ours
                logger.warning("a listener is gone", extra={"action": "sink_failed"})
