"""What happens to every request, as plain ASGI: its id, its one log line, its metrics, the size and time of its body.

RequestLog      id in and out, facts for the log line, the envelope for what nobody caught
BodyLimit       bytes and seconds of the body, counted as they arrive
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import ErrorAnswer, answer_for, answer_for_status
from app.errors import InternalError, RequestInvalid
from app.logs import describe_error
from app.metrics import Metrics

if TYPE_CHECKING:
    from app.api.generation import Generation

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_CLOSED = 499  # in logs and metrics only: nobody is there to read a status
MAX_DISCARDED_BYTES = 16 << 20
DISCARD_TIMEOUT_S = 5.0
REJECTION_BY_CODE = {
    "overloaded": "queue_full",
    "server_draining": "draining",
    "insufficient_memory": "memory",
    "rate_limit_exceeded": "tenant_rate",
    "quota_exceeded": "tenant_tokens",
}


@dataclass(slots=True)
class RequestFacts:
    """What the log line and the metrics tell of a request; routes fill it in as they learn it."""

    request_id: str
    started_at: float = field(default_factory=time.monotonic)
    tenant: str | None = None
    key_id: str | None = None
    adapter: str | None = None
    digest: str | None = None
    status: int = 0
    code: str = ""
    has_left: bool = False
    error: BaseException | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    queue_ms: int | None = None
    ttft_ms: int | None = None
    tier: str | None = None

    def note_error(self, answer: ErrorAnswer, error: BaseException) -> None:
        self.code = answer.code
        if answer.status >= 500:
            self.error = error

    def stream_failed(self, answer: ErrorAnswer, error: BaseException) -> None:
        """An error after the first byte: the status line said 200, the log says what became of it."""
        self.status = answer.status
        self.note_error(answer, error)

    def client_left(self) -> None:
        self.has_left, self.status = True, CLIENT_CLOSED

    def note_generation(self, generation: Generation) -> None:
        usage = generation.usage()
        self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        self.cached_tokens = usage.cached_tokens
        timings = generation.choices[0].timings
        if timings is not None:
            self.tier = timings.tier
            self.queue_ms = _ms(timings.arrival, timings.admitted)
            self.ttft_ms = _ms(timings.arrival, timings.first_token)

    @property
    def outcome(self) -> str:
        if self.has_left:
            return "cancelled"
        if self.status < 400:
            return "ok"
        if self.status in (429, 503):
            return "rejected"
        if self.status == 504:
            return "deadline"
        return "client_error" if self.status < 500 else "error"


def _ms(start: float, end: float | None) -> int | None:
    return None if end is None else round((end - start) * 1000)


def facts_of(scope: Scope) -> RequestFacts:
    facts: RequestFacts = scope["lodger.facts"]
    return facts


class RequestLog:
    """The outermost layer: nothing leaves without a request id, and nothing ends without one log line."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, headers: Mapping[str, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._headers = dict(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        facts = RequestFacts(given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}")
        scope["lodger.facts"] = facts
        has_started = False

        async def send_marked(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                facts.status = facts.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = facts.request_id
                headers["openai-processing-ms"] = str(_ms(facts.started_at, time.monotonic()))
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as exc:  # last resort: what no handler knew
            facts.error, facts.code, facts.status = exc, InternalError.code, 500
            if not has_started:  # else the connection is cut by returning: the answer is incomplete
                await send_answer(answer_for(exc), send_marked)
        finally:
            self._report(scope, facts)

    def _report(self, scope: Scope, facts: RequestFacts) -> None:
        route = route_of(scope)
        self._metrics.request_finished(route, facts.outcome, facts.code)
        if facts.outcome == "rejected":
            reason = REJECTION_BY_CODE.get(facts.code)
            if reason is not None:
                self._metrics.rejected(reason)
        if facts.has_left:
            self._metrics.cancelled("client_disconnect")
        extra = {
            "action": "request",
            "request_id": facts.request_id,
            "tenant": facts.tenant,
            "key_id": facts.key_id,
            "adapter": facts.adapter,
            "digest": facts.digest[:12] if facts.digest else None,
            "method": scope["method"],
            "route": route,
            "status": facts.status,
            "code": facts.code or None,
            "outcome": facts.outcome,
            "prompt_tokens": facts.prompt_tokens,
            "completion_tokens": facts.completion_tokens,
            "cached_tokens": facts.cached_tokens,
            "queue_ms": facts.queue_ms,
            "ttft_ms": facts.ttft_ms,
            "total_ms": _ms(facts.started_at, time.monotonic()),
            "tier": facts.tier,
        }
        if facts.error is not None:
            extra["error_class"], extra["error_at"] = describe_error(facts.error)
        quiet = facts.status < 400 and route in ("/livez", "/readyz", "/startupz", "/health", "/metrics")
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra=extra)


def route_of(scope: Scope) -> str:
    """The route's template, for labels and logs; a path that is none of ours is `other`, whatever it says."""
    route = scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "other"


async def send_answer(answer: ErrorAnswer, send: Send) -> None:
    body = answer.body
    headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class NoNul:
    """Refuses NUL in a path or query: no name here has one, and databases take none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http":
            if "\x00" in scope["path"]:
                answer = answer_for_status(404)
            elif b"%00" in scope["query_string"]:
                answer = answer_for(RequestInvalid("The query holds a NUL character."))
        if answer is None:
            await self._app(scope, receive, send)
        else:
            facts_of(scope).code = answer.code
            await send_answer(answer, send)


class BodyLimit:
    """Refuses bodies that are too large or too slow, declared or counted as they come in."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        timeout_s: float,
        is_upload: Callable[[Scope], bool],
        max_upload_bytes: int,
        upload_timeout_s: float,
    ) -> None:
        self._app = app
        self._usual = (max_bytes, timeout_s)
        self._upload = (max_upload_bytes, upload_timeout_s)
        self._is_upload = is_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes, timeout_s = self._upload if self._is_upload(scope) else self._usual
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and (len(declared) > 15 or int(declared) > max_bytes):
            await self._refuse(scope, receive, send)
            return
        num_bytes, is_complete = 0, False
        until = time.monotonic() + timeout_s

        async def counted() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408) from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                is_complete = not message.get("more_body", False)
                if num_bytes > max_bytes:
                    raise HTTPException(413)
            return message

        await self._app(scope, counted, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, after reading a little of the body away: a client that is still writing would see a reset."""
        answer = answer_for_status(413)
        facts_of(scope).code = answer.code
        num_bytes = 0
        try:
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                while num_bytes < MAX_DISCARDED_BYTES:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await send_answer(answer, send)
