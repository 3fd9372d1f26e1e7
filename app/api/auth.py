"""Who asks: tenants' keys, service keys with X-Tenant-ID, and the admin key. Only the probes are open to all."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request

from app.api.context import ApiContext, ContextDep, FactsDep
from app.errors import AccessDenied, InsufficientScope, InvalidApiKey, TenantErased, TenantMismatch, TenantRequired
from app.tenants import Caller

MAX_KEY_CHARS = 512
FAILURE_REASONS: dict[type[AccessDenied], str] = {
    InvalidApiKey: "invalid",
    TenantRequired: "tenant_required",
    TenantMismatch: "tenant_mismatch",
    TenantErased: "erased",
    InsufficientScope: "scope",
}


def bearer_key(request: Request) -> str | None:
    """The key of `Authorization: Bearer <key>`, or None."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    key = key.strip()
    return key if scheme.lower() == "bearer" and 0 < len(key) <= MAX_KEY_CHARS and key.isascii() else None


async def get_caller(request: Request, context: ContextDep, facts: FactsDep) -> Caller:
    """The tenant that this request is for. Raises AccessDenied; checked on every request, cached adapters or not."""
    key = bearer_key(request)
    metrics = context.services.metrics
    if key is None:
        metrics.auth_failed("missing")
        raise InvalidApiKey()
    tenants, tenant = context.services.tenants, request.headers.get("x-tenant-id")
    try:
        caller = tenants.peek(key, tenant)
        if caller is None:
            caller = await context.database(tenants.authenticate, key, tenant)
    except AccessDenied as exc:
        metrics.auth_failed(FAILURE_REASONS.get(type(exc), "scope"))
        raise
    facts.tenant, facts.key_id = caller.tenant, caller.key_id
    return caller


def is_admin(request: Request, context: ApiContext) -> bool:
    """Compare digests in constant time, so that neither length nor content of the key can be measured."""
    expected, given = context.services.admin_key, bearer_key(request)
    if expected is None or given is None:
        return False
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(expected.encode()).digest())


async def require_admin(request: Request, context: ContextDep) -> None:
    if is_admin(request, context):
        return
    metrics = context.services.metrics
    if bearer_key(request) is None:
        metrics.auth_failed("missing")
        raise InvalidApiKey()
    metrics.auth_failed("scope")
    if context.services.admin_key is None:
        raise InsufficientScope("There is no admin key. Set LODGER_ADMIN_KEY and restart the server.")
    raise InsufficientScope()


CallerDep = Annotated[Caller, Depends(get_caller)]
AdminDep = Depends(require_admin)
