"""Sends due webhook messages in threads of its own: a few at a time, one to an endpoint, two of a tenant.

An endpoint that answers slowly holds up its own messages and nobody else's, and no other chore.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from app.training.webhooks import DueMessage, Webhooks

logger = logging.getLogger(__name__)

EVERY_S = 2.0
MAX_IN_FLIGHT = 8
MAX_OF_TENANT = 2


class Courier:
    """Looks for due messages every `every_s` seconds until closed. Any number of processes may have one."""

    def __init__(self, webhooks: Webhooks, *, every_s: float = EVERY_S) -> None:
        self._webhooks, self._every_s = webhooks, every_s
        self._pool = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="webhook")
        self._lock = threading.Lock()
        self._in_flight: dict[str, str] = {}  # endpoint -> tenant
        self._stop = threading.Event()
        self._news = threading.Event()  # an attempt is over: there may be room, or a next message
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Begin nothing more; what is being sent ends within its own time, or is sent again by the next process."""
        self._stop.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join(self._every_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._news.clear()
            try:
                self._round()
            except Exception:  # the next round may have more luck
                logger.exception("webhooks not looked for", extra={"action": "courier_failed"})
            self._news.wait(self._every_s)

    def _round(self) -> None:
        for message in self._webhooks.due():
            if self._stop.is_set() or not self._has_room(message):
                continue
            with self._lock:
                self._in_flight[message.endpoint_id] = message.tenant
            self._pool.submit(self._deliver, message)

    def _has_room(self, message: DueMessage) -> bool:
        with self._lock:
            if len(self._in_flight) >= MAX_IN_FLIGHT or message.endpoint_id in self._in_flight:
                return False
            return Counter(self._in_flight.values())[message.tenant] < MAX_OF_TENANT

    def _deliver(self, message: DueMessage) -> None:
        try:
            self._webhooks.deliver(message)
        except Exception:
            logger.exception("webhook attempt failed", extra={"action": "webhook_attempt_failed"})
            self._stop.wait(self._every_s)  # the database may be away: no busy loop
        finally:
            with self._lock:
                del self._in_flight[message.endpoint_id]
            self._news.set()
