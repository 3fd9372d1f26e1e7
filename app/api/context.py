"""What a route has at hand: the services, the bridge to the engine, and worker threads for calls that block.

Also the named dependencies that routes are written with: `ContextDep`, `FactsDep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from adapters.manifest import AdapterManifest
from app.api.engine_client import EngineClient
from app.api.generation import Generation
from app.api.middleware import RequestFacts, facts_of
from app.api.services import Services

P = ParamSpec("P")
T = TypeVar("T")

MAX_BLOCKING_CALLS = 16  # catalog, store and database calls at a time; more wait their turn
MAX_RENDERS = 2  # long prompts tokenized at a time


class ApiContext:
    """One per application; lives as long as it."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.client = EngineClient(services.engine, services.metrics)
        self.open: dict[str, set[Generation]] = {}  # by tenant
        self._blocking = anyio.CapacityLimiter(MAX_BLOCKING_CALLS)
        self._renders = anyio.CapacityLimiter(MAX_RENDERS)

    async def blocking(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that may wait for disk, store or database in a worker thread."""
        return await anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._blocking)

    async def rendering(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a long computation on text in a worker thread."""
        return await anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._renders)

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


def get_context(request: Request) -> ApiContext:
    context: ApiContext = request.app.state.context
    return context


def get_facts(request: Request) -> RequestFacts:
    return facts_of(request.scope)


ContextDep = Annotated[ApiContext, Depends(get_context, use_cache=True)]
FactsDep = Annotated[RequestFacts, Depends(get_facts, use_cache=True)]
