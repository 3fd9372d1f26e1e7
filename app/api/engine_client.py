"""The bridge between the engine thread and the event loop.

The engine calls one sink once a step with every sequence's events; they cross to the loop in a single
`call_soon_threadsafe` and are dealt out there, so a step costs one wake-up however many streams it feeds.
Everything but `_sink` runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from app.api.services import EnginePort
from app.engine.sequence import Event, Finished, Request, Token
from app.errors import InternalError
from app.logs import describe_error
from app.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 60.0


class Receiver(Protocol):
    """One sequence's place in an HTTP request. Called in the event loop's thread."""

    def receive(self, event: Event) -> None:
        """Take the next event; Finished is the last."""

    def fail(self, error: Exception) -> None:
        """Events can no longer be understood: end with `error`."""

    @property
    def finish_label(self) -> str:
        """Why it ended, as metrics say it."""


@dataclass(slots=True)
class _Entry:
    receiver: Receiver
    last_token_at: float | None = None


class EngineClient:
    """Submits requests and deals their events to receivers. One per event loop."""

    def __init__(self, engine: EnginePort, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._entries: dict[str, _Entry] = {}
        self._finished_at: deque[float] = deque(maxlen=64)

    @property
    def num_open(self) -> int:
        """Sequences whose end has not been seen."""
        return len(self._entries)

    def submit(self, request: Request, receiver: Receiver) -> None:
        """Queue one sequence. Raises what the engine raises, and then nothing follows."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._entries[request.id] = _Entry(receiver)
        try:
            self._engine.submit(request, self._sink)
        except BaseException:
            del self._entries[request.id]
            raise

    def cancel(self, request_id: str) -> None:
        """Ask for a sequence's end; its Finished event still comes."""
        if request_id in self._entries:
            self._engine.cancel(request_id)

    def retry_after_s(self, num_waiting: int) -> float:
        """When a refused client should come back: the queue's length over the measured rate, with jitter."""
        if len(self._finished_at) < 2:
            return 1.0 + random.random()
        span = time.monotonic() - self._finished_at[0]
        wait = max(num_waiting, 1) * span / len(self._finished_at)
        return min(MAX_RETRY_AFTER_S, max(1.0, wait)) + random.random()

    def _sink(self, events: list[Event]) -> None:
        """Engine thread. A loop that has closed has nobody left to tell."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._deal, events, time.monotonic())

    def _deal(self, events: list[Event], now: float) -> None:
        intervals: list[float] = []
        for event in events:
            entry = self._entries.get(event.request_id)
            if entry is None:
                continue
            if type(event) is Token:
                if entry.last_token_at is not None:
                    intervals.append(now - entry.last_token_at)
                entry.last_token_at = now
            try:
                entry.receiver.receive(event)
            except Exception as exc:  # one sequence's fault must not cost the others of this step their tokens
                error_class, error_at = describe_error(exc)
                logger.error(
                    "events not understood",
                    extra={"action": "receiver_failed", "error_class": error_class, "error_at": error_at},
                )
                entry.receiver.fail(InternalError())
                self._engine.cancel(event.request_id)
            if type(event) is Finished:
                del self._entries[event.request_id]
                self._finished_at.append(now)
                self._metrics.sequence_finished(event.timings, entry.receiver.finish_label)
        if intervals:
            self._metrics.token_intervals(intervals)
