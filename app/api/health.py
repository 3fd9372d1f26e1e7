"""Probes and /metrics. None of them waits for the engine, the store or the database."""

from __future__ import annotations

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from app.api.auth import is_admin
from app.api.context import ApiContext, ContextDep
from app.errors import InsufficientScope, InvalidApiKey

probes = APIRouter()
metrics_router = APIRouter()


@probes.get("/livez")
async def livez() -> dict[str, str]:
    """The event loop answers."""
    return {"status": "ok"}


@probes.get("/startupz")
async def startupz(context: ContextDep) -> JSONResponse:
    """The base is loaded and its digest known."""
    loaded = context.services.snapshot().is_loaded
    return JSONResponse({"status": "ok" if loaded else "starting"}, 200 if loaded else 503)


@probes.get("/readyz")
@probes.get("/health")
async def readyz(context: ContextDep) -> JSONResponse:
    """New work is welcome. A store that is down degrades, it does not unready: cached adapters are served."""
    reasons = not_ready(context)
    if reasons:
        return JSONResponse({"status": "unready", "reasons": reasons}, 503, headers={"Retry-After": "1"})
    return JSONResponse({"status": "ready", "degraded": list(context.services.snapshot().degraded)})


def not_ready(context: ApiContext) -> list[str]:
    """Why the server should get no new work now; empty when it should."""
    now = context.services.snapshot()
    found = {
        "base_loading": not now.is_loaded,
        "draining": now.is_draining,
        "engine_stale": now.heartbeat_age_s > context.services.limits.stale_engine_s,
    }
    return [reason for reason, holds in found.items() if holds]


@metrics_router.get("/metrics", response_class=Response)
async def metrics(request: Request, context: ContextDep) -> Response:
    """The metrics page, rendered in a worker thread; OpenMetrics where the client asks for it."""
    services = context.services
    if not (services.metrics_open or is_admin(request, context)):
        services.metrics.auth_failed("scope")
        raise InsufficientScope() if request.headers.get("authorization") else InvalidApiKey()
    body, content_type = await anyio.to_thread.run_sync(services.metrics.render, request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
