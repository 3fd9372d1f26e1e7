"""The header Idempotency-Key on routes that make something: a repeated call gets the first one's answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse

from app.api.context import ApiContext
from app.errors import RequestInvalid
from app.idempotency import KeptAnswer

MAX_KEY_CHARS = 255
REPLAYED = "idempotent-replayed"
_KEPT_HEADERS = ("x-lodger-adapter-digest",)


def idempotency_key(request: Request) -> str | None:
    """The header's value; None where there is none. Raises RequestInvalid."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        message = f"An Idempotency-Key has 1 to {MAX_KEY_CHARS} printable characters."
        raise RequestInvalid(message, param="Idempotency-Key")
    return key


async def answered_once(
    request: Request, context: ApiContext, tenant: str, body_sha256: str, act: Callable[[], Awaitable[JSONResponse]]
) -> JSONResponse:
    """`act`'s answer, or the one that the same call had before. Only what succeeds is remembered.

    Raises what `act` raises, RequestInvalid (`idempotency_key_reused`) and CallInProgress.
    """
    key, keys = idempotency_key(request), context.services.idempotency
    if key is None:
        return await act()
    fingerprint = hashlib.sha256(f"{request.method} {request.url.path} {body_sha256}".encode()).hexdigest()
    known = await context.database(keys.claim, tenant, key, fingerprint)
    if known is not None:
        return JSONResponse(known.body, known.status, headers={**known.headers, REPLAYED: "true"})
    try:
        answer = await act()
    except BaseException:
        with anyio.CancelScope(shield=True):
            await context.database(keys.release, tenant, key)
        raise
    headers = {name: answer.headers[name] for name in _KEPT_HEADERS if name in answer.headers}
    kept = KeptAnswer(answer.status_code, json.loads(bytes(answer.body)), headers)
    await context.database(keys.keep, tenant, key, kept)
    return answer
