"""How many of a tenant's sequences may run and wait at once. Event loop only.

Without limits a turn comes at once. With `max_running`, sequences beyond it wait here, first come first served, and the
engine's queue stays free for others; with `max_waiting`, a request that would wait behind too many is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from app.errors import DeadlineExceeded, RateLimited


@dataclass(slots=True)
class _Tenant:
    num_running: int = 0  # sequences whose turn has come and that have not ended
    num_waiting: int = 0  # requests without an admitted sequence
    queue: deque[Turn] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class Turn:
    """One request's place. `release` exactly once at its end, however it ends; the rest may be repeated."""

    turns: Turns
    tenant: str
    size: int  # sequences
    max_running: int | None
    ready: asyncio.Future[None]
    has_begun: bool = False
    is_waiting: bool = True
    is_released: bool = False

    async def wait(self, deadline: float) -> None:
        """Wait for the turn until `deadline` (time.monotonic()). Raises DeadlineExceeded."""
        if not self.ready.done():
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                    await self.ready
            except TimeoutError:
                raise DeadlineExceeded() from None

    def abandon(self) -> None:
        """Stop waiting: nobody is there any more."""
        if not self.ready.done():
            self.ready.set_result(None)

    def admitted(self) -> None:
        """A sequence runs: the request waits no longer."""
        if self.is_waiting:
            self.is_waiting = False
            self.turns.count(self.tenant).num_waiting -= 1

    def release(self) -> None:
        if self.is_released:
            return
        self.is_released = True
        self.admitted()
        self.turns.end(self)


class Turns:
    """All tenants' turns. A tenant without requests takes no memory."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}

    def ask(self, tenant: str, size: int, *, max_running: int | None, max_waiting: int | None) -> Turn:
        """Queue for `size` sequences to run. Raises RateLimited when too many of the tenant's requests wait."""
        state = self.count(tenant)
        if max_waiting is not None and state.num_waiting >= max_waiting:
            self._forget_idle(tenant)
            raise RateLimited(f"This tenant's limit of {max_waiting} waiting requests is reached.", param="concurrency")
        turn = Turn(self, tenant, size, max_running, asyncio.get_running_loop().create_future())
        state.num_waiting += 1
        state.queue.append(turn)
        self._advance(tenant)
        return turn

    def count(self, tenant: str) -> _Tenant:
        return self._tenants.setdefault(tenant, _Tenant())

    def end(self, turn: Turn) -> None:
        state = self.count(turn.tenant)
        if turn.has_begun:
            state.num_running -= turn.size
        else:
            state.queue.remove(turn)
        self._advance(turn.tenant)
        self._forget_idle(turn.tenant)

    def _advance(self, tenant: str) -> None:
        """Let the first in line begin while there is room; one larger than the limit begins when nothing else runs."""
        state = self.count(tenant)
        while state.queue:
            turn = state.queue[0]
            room = turn.max_running is None or state.num_running + turn.size <= turn.max_running
            if not room and state.num_running > 0:
                return
            state.queue.popleft()
            state.num_running += turn.size
            turn.has_begun = True
            turn.abandon()

    def _forget_idle(self, tenant: str) -> None:
        state = self._tenants.get(tenant)
        if state is not None and not (state.num_running or state.num_waiting or state.queue):
            del self._tenants[tenant]
