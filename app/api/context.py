"""What a route has at hand: the services, the bridge to the engine, and worker threads for calls that block.

Also the named dependencies that routes are written with: `ContextDep`, `FactsDep`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from adapters.errors import AdapterError
from adapters.manifest import AdapterManifest
from app.api.engine_client import EngineClient
from app.api.generation import Generation
from app.api.middleware import RequestFacts, facts_of
from app.api.services import Services
from app.errors import LodgerError, ServerBusy

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Calls at a time, each kind by itself: what waits for a slow store holds up nobody who only asks the database.
MAX_DATABASE_CALLS = 8
MAX_STORE_CALLS = 32  # catalog and store
MAX_BACKGROUND_CALLS = 8  # looks into the store ahead of time
MAX_DISK_CALLS = 8  # scratch files of uploads that are coming in
MAX_LONG_CALLS = 4  # checks and copies of whole files
MAX_LONG_CALLS_PER_TENANT = 2
MAX_PREFLIGHTS = 1
MAX_PREFLIGHTS_PER_TENANT = 1
MAX_RENDERS = 2  # long prompts tokenized at a time


class _Shares:
    """Worker threads for long calls, of which one tenant has but a few; a tenant that wants more is asked to wait."""

    def __init__(self, total: int, per_tenant: int) -> None:
        self._limiter, self._per_tenant = anyio.CapacityLimiter(total), per_tenant
        self._open: Counter[str] = Counter()

    async def run(self, tenant: str, call: Callable[[], T]) -> T:
        if self._open[tenant] >= self._per_tenant:
            raise ServerBusy(f"{self._per_tenant} long calls of this tenant are under way. Wait for one to end.")
        self._open[tenant] += 1
        try:
            return await anyio.to_thread.run_sync(call, limiter=self._limiter)
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


class ApiContext:
    """One per application; lives as long as it."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.client = EngineClient(services.engine, services.metrics)
        self.open: dict[str, set[Generation]] = {}  # by tenant
        self._database = anyio.CapacityLimiter(MAX_DATABASE_CALLS)
        self._store = anyio.CapacityLimiter(MAX_STORE_CALLS)
        self._disk = anyio.CapacityLimiter(MAX_DISK_CALLS)
        self._long = _Shares(MAX_LONG_CALLS, MAX_LONG_CALLS_PER_TENANT)
        self._preflights = _Shares(MAX_PREFLIGHTS, MAX_PREFLIGHTS_PER_TENANT)
        self._renders = anyio.CapacityLimiter(MAX_RENDERS)
        self._background = anyio.CapacityLimiter(MAX_BACKGROUND_CALLS)
        self._tasks: set[asyncio.Task[None]] = set()

    async def database(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that asks the database, and nothing slower, in a worker thread."""
        return await anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._database)

    async def store(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that may wait for the store in a worker thread."""
        return await anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._store)

    async def disk(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that writes a piece of a scratch file in a worker thread."""
        return await anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._disk)

    async def long_work(self, tenant: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that reads or copies a whole file, or waits for a stranger's server. Raises ServerBusy."""
        return await self._long.run(tenant, partial(call, *args, **kwargs))

    async def preflight(self, tenant: str, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a long computation on a whole dataset in a worker thread. Raises ServerBusy."""
        return await self._preflights.run(tenant, partial(call, *args, **kwargs))

    async def rendering(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a long computation on text in a worker thread."""
        return await anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._renders)

    def later(self, call: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a call that no request waits for, and that may wait for the store, in a worker thread. What it raises is
        for whoever does the same in earnest."""
        task = asyncio.create_task(self._in_background(partial(call, *args, **kwargs)))
        self._tasks.add(task)  # the loop itself keeps no hold on it
        task.add_done_callback(self._tasks.discard)

    async def _in_background(self, call: Callable[[], object]) -> None:
        try:
            await anyio.to_thread.run_sync(call, limiter=self._background)
        except (AdapterError, LodgerError) as exc:
            logger.debug("a call in the background failed: %s", exc)

    def retry_after_s(self) -> float:
        return self.client.retry_after_s(self.services.snapshot().num_waiting)

    @contextmanager
    def tracking(self, tenant: str, generation: Generation) -> Iterator[None]:
        """Know which answers are being made for a tenant while the block lasts."""
        self.open.setdefault(tenant, set()).add(generation)
        try:
            yield
        finally:
            self.open[tenant].discard(generation)
            if not self.open[tenant]:
                del self.open[tenant]

    def end_all(self, tenant: str, error: Exception) -> int:
        """End every answer of a tenant with `error`; returns how many there were."""
        generations = list(self.open.get(tenant, ()))
        for generation in generations:
            generation.fail(error)
        return len(generations)

    def headers_for(self, adapter: AdapterManifest | None) -> dict[str, str]:
        """Whose bytes answer."""
        return {} if adapter is None else {"x-lodger-adapter-digest": adapter.digest}


async def get_context(request: Request) -> ApiContext:
    context: ApiContext = request.app.state.context
    return context


async def get_facts(request: Request) -> RequestFacts:
    return facts_of(request.scope)


ContextDep = Annotated[ApiContext, Depends(get_context, use_cache=True)]
FactsDep = Annotated[RequestFacts, Depends(get_facts, use_cache=True)]
