"""The applications: which routes there are and what wraps them, read top to bottom.

`create_app` is the API; `create_admin_app` is the admin port, for installations that keep /admin and /metrics apart.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from adapters.errors import AdapterError, StoreError
from app import __version__
from app.api import adapters as adapter_routes
from app.api import admin, chat, completions, file_uploads, files, fine_tuning, health, models, webhooks
from app.api.auth import require_admin
from app.api.context import ApiContext
from app.api.errors import ErrorAnswer, answer_for, answer_for_status, from_validation
from app.api.middleware import BodyLimit, NoNul, RequestLog, facts_of
from app.api.services import Services
from app.errors import LodgerError
from app.training.uploads import MAX_PART_BYTES

UPLOAD_PATHS = frozenset({"/v1/adapters", "/v1/adapters/validate", "/v1/files"})
UPLOAD_PART_PATH = re.compile(r"/v1/uploads/[^/]+/parts")
FORM_BYTES = 1 << 20  # of a multipart body beside its file
LAG_EVERY_S = 0.5


def create_app(services: Services) -> FastAPI:
    """The API: /v1, the probes, and /admin and /metrics unless they have a port of their own."""
    app = _bare_app(services, title="Lodger")
    routers = [chat.router, completions.router, models.router, adapter_routes.router, health.probes]
    if services.training is not None:
        app.state.training = services.training
        routers += [files.router, file_uploads.router, fine_tuning.router, webhooks.router]
    if services.admin_here:
        routers.append(health.metrics_router)
        app.include_router(admin.router, dependencies=[Depends(require_admin)])
    for router in routers:
        app.include_router(router)
    services.metrics.expect_routes(route.path for router in routers for route in router.routes)  # type: ignore[attr-defined]
    return app


def create_admin_app(services: Services) -> FastAPI:
    """The admin port: /admin by key, /metrics without, and the probes."""
    app = _bare_app(services, title="Lodger admin")
    app.include_router(health.probes)
    app.include_router(health.metrics_router)
    app.include_router(admin.router, dependencies=[Depends(require_admin)])
    return app


def _bare_app(services: Services, *, title: str) -> FastAPI:
    app = FastAPI(title=title, version=__version__, lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.context = ApiContext(services)
    limits = services.limits
    # The last one added is the outermost.
    app.add_middleware(
        BodyLimit,
        max_bytes=limits.max_body_bytes,
        timeout_s=limits.body_timeout_s,
        is_upload=_is_upload,
        max_upload_bytes=_max_upload_bytes(services) + FORM_BYTES,
        upload_timeout_s=limits.upload_timeout_s,
    )
    app.add_middleware(NoNul)
    app.add_middleware(RequestLog, metrics=services.metrics, headers={"x-lodger-base-digest": services.base.digest})
    for error_class in (LodgerError, AdapterError, StoreError):
        app.add_exception_handler(error_class, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: ApiContext = app.state.context
    watch = asyncio.create_task(_measure_lag(context))
    yield
    watch.cancel()


async def _measure_lag(context: ApiContext) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        context.services.metrics.loop_lag(max(loop.time() - due, 0.0))


def _max_upload_bytes(services: Services) -> int:
    """Of the largest multipart body that any route takes; each route caps its own parts besides."""
    limits, training = services.limits, services.training
    largest_file = 0 if training is None else max(training.files.limits.max_file_bytes, MAX_PART_BYTES)
    return max(limits.max_adapter_bytes + limits.max_config_bytes, largest_file)


def _is_upload(scope: Scope) -> bool:
    """Only multipart bodies of the upload routes may be large."""
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    is_upload_path = scope["path"] in UPLOAD_PATHS or UPLOAD_PART_PATH.fullmatch(scope["path"]) is not None
    return is_upload_path and content_type.lower().startswith(b"multipart/form-data")


async def _on_error(request: Request, error: Exception) -> Response:
    context: ApiContext = request.app.state.context
    return _respond(request, answer_for(error, retry_after_s=context.retry_after_s()), error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    finding = from_validation(error.errors())
    return _respond(request, answer_for(finding), finding)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = answer_for_status(error.status_code)
    response = _respond(request, answer, error)
    if error.status_code == 405 and error.headers:
        response.headers.update(error.headers)
    return response


def _respond(request: Request, answer: ErrorAnswer, error: Exception) -> Response:
    facts_of(request.scope).note_error(answer, error)
    content: Any = answer.envelope
    return JSONResponse(content, answer.status, headers=dict(answer.headers))
