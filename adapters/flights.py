"""Loads on their way, and whose turn it is. Plain book-keeping: the loader calls it under its own lock.

One load serves everybody who wants the same adapter. Among waiting loads the tenant with the fewest running goes first,
tenants in turn; a tenant never holds all workers, so a hundred slow adapters of one leave a worker for another's one.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from adapters.errors import AdapterError
from adapters.manifest import AdapterManifest

logger = logging.getLogger(__name__)

H = TypeVar("H")  # an adapter in host memory
OnDone = Callable[[AdapterManifest, H | None, AdapterError | None, str], None]


@dataclass(frozen=True, slots=True)
class Want(Generic[H]):
    """Somebody who waits for an adapter. Two wants of one flight may name it differently: each is told its own."""

    manifest: AdapterManifest
    on_done: OnDone[H]


@dataclass(frozen=True, slots=True)
class Answer(Generic[H]):
    """What a want, or all wants of a flight, are told: a value and its tier, or an error and no tier."""

    value: H | None
    error: AdapterError | None
    tier: str

    @classmethod
    def refusal(cls, error: AdapterError) -> Answer[H]:
        return cls(None, error, "")

    def tell(self, want: Want[H]) -> None:
        try:
            # Each gets its own copy of an error: raising one grows its traceback.
            want.on_done(want.manifest, self.value, copy.copy(self.error), self.tier)
        except Exception:
            logger.exception("an adapter's waiter failed", extra={"action": "adapter_answer_failed"})


@dataclass(slots=True, eq=False)
class Flight(Generic[H]):
    """One load of one adapter, from the first want to the answer."""

    manifest: AdapterManifest
    deadline: float  # on the loader's clock: for its turn while it waits, for its end once it runs
    waiters: list[Want[H]] = field(default_factory=list)
    is_running: bool = False
    is_expired: bool = False  # its waiters were told so; it may still arrive
    is_forgotten: bool = False  # its owner erased it: whatever arrives is thrown away


class FlightQueue(Generic[H]):
    """Invariant: a tenant has at most `max_running_per_tenant` flights running."""

    def __init__(self, workers: int, max_pending: int, max_pending_per_tenant: int) -> None:
        self.max_running_per_tenant = max(1, workers - max(1, workers // 4))
        self._max_pending = max_pending
        self._max_pending_per_tenant = max_pending_per_tenant
        self._pending: OrderedDict[str, deque[Flight[H]]] = OrderedDict()  # the tenant served longest ago first
        self._running: Counter[str] = Counter()

    @property
    def num_pending(self) -> int:
        return sum(len(flights) for flights in self._pending.values())

    @property
    def num_running(self) -> int:
        return self._running.total()

    def has_room(self, tenant: str) -> bool:
        waiting = len(self._pending.get(tenant, ()))
        return waiting < self._max_pending_per_tenant and self.num_pending < self._max_pending

    def push(self, flight: Flight[H]) -> None:
        self._pending.setdefault(flight.manifest.tenant, deque()).append(flight)

    def pop(self) -> Flight[H] | None:
        """Start the next flight; None if none may start now."""
        ready = [tenant for tenant in self._pending if self._running[tenant] < self.max_running_per_tenant]
        if not ready:
            return None
        tenant = min(ready, key=lambda tenant: self._running[tenant])
        flight = self._pending[tenant].popleft()
        self._pending.move_to_end(tenant)
        if not self._pending[tenant]:
            del self._pending[tenant]
        self._running[tenant] += 1
        flight.is_running = True
        return flight

    def finish(self, flight: Flight[H]) -> None:
        """A flight that `pop` returned has ended."""
        tenant = flight.manifest.tenant
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    def remove(self, flight: Flight[H]) -> None:
        """Take a flight that never started out of the queue."""
        tenant = flight.manifest.tenant
        self._pending[tenant].remove(flight)
        if not self._pending[tenant]:
            del self._pending[tenant]
