"""/admin: tenants, their limits, and keys. For the admin key alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import Field

from app.api.context import ContextDep
from app.api.schemas import KeyBody, TenantBody
from app.errors import RequestInvalid, TenantErased
from app.tenants import KeyInfo, Tenant

router = APIRouter(prefix="/admin")

Limits = dict[str, Annotated[int, Field(strict=True)] | None]


@router.get("/tenants")
async def list_tenants(context: ContextDep) -> dict[str, Any]:
    tenants = await context.database(context.services.tenants.list)
    return {"object": "list", "data": [tenant_object(tenant) for tenant in tenants]}


@router.post("/tenants", status_code=201)
async def create_tenant(body: TenantBody, context: ContextDep) -> dict[str, Any]:
    """Add a tenant, with limits of its own if any are named."""
    tenants = context.services.tenants
    tenant = await context.database(tenants.create, body.id)
    if body.limits:
        tenant = await context.database(tenants.set_limits, body.id, **body.limits)
    return tenant_object(tenant)


@router.get("/tenants/{tenant}")
async def get_tenant(tenant: str, context: ContextDep) -> dict[str, Any]:
    return tenant_object(await context.database(context.services.tenants.get, tenant))


@router.delete("/tenants/{tenant}")
async def erase_tenant(tenant: str, context: ContextDep) -> dict[str, Any]:
    """Erase a tenant: its rows and keys first, so that nothing new comes, then its adapters. May be repeated."""
    services = context.services
    await context.database(services.tenants.erase, tenant)
    for _ in range(context.end_all(tenant, TenantErased())):
        services.metrics.cancelled("erase")
    for held in services.snapshot().resident:
        if held.tenant == tenant:
            services.engine.unpin((held.tenant, held.digest))
            services.engine.unload((held.tenant, held.digest))
    await context.store(services.catalog.erase_tenant, tenant)
    await context.store(services.forget_tenant, tenant)
    return {"id": tenant, "object": "tenant", "deleted": True}


@router.get("/limits/{tenant}")
async def get_limits(tenant: str, context: ContextDep) -> dict[str, Any]:
    """What holds for a tenant: its own row over the server's defaults."""
    return asdict(await context.database(context.services.tenants.limits, tenant))


@router.put("/limits/{tenant}")
@router.patch("/limits/{tenant}")
async def set_limits(tenant: str, body: Limits, context: ContextDep) -> dict[str, Any]:
    """Change a tenant's own limits; null is the server's default again."""
    return tenant_object(await context.database(context.services.tenants.set_limits, tenant, **body))


@router.get("/keys")
async def list_keys(context: ContextDep, tenant: Annotated[str | None, Query()] = None) -> dict[str, Any]:
    """All keys, or those that may act for one tenant; never the keys themselves."""
    keys = await context.database(context.services.tenants.list_keys, tenant)
    return {"object": "list", "data": [key_object(key) for key in keys]}


@router.post("/keys", status_code=201, response_model=None)
async def create_key(body: KeyBody, context: ContextDep) -> JSONResponse:
    """Make a key of one tenant, or a service key for several or all. It is shown in this answer and never again."""
    tenants = context.services.tenants
    named = [body.tenant is not None, body.tenants is not None, bool(body.all_tenants)]
    if sum(named) != 1:
        raise RequestInvalid("Name one of 'tenant', 'tenants' or 'all_tenants'.", param="tenant")
    if body.tenant is not None:
        key = await context.database(tenants.create_key, body.tenant, name=body.name, expires_at=body.expires_at)
    else:
        key = await context.database(
            tenants.create_service_key, body.tenants, name=body.name, expires_at=body.expires_at
        )
    shown = {"id": key.id, "object": "key", "key": key.text, "name": body.name, "expires_at": body.expires_at}
    return JSONResponse(shown, 201, headers={"cache-control": "no-store"})


@router.delete("/keys/{key_id}")
async def revoke_key(key_id: str, context: ContextDep) -> dict[str, Any]:
    """End a key; every server of this database refuses it within a second. May be repeated."""
    return key_object(await context.database(context.services.tenants.revoke_key, key_id))


def tenant_object(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "tenant",
        "created_at": int(tenant.created_at),
        "limits": asdict(tenant.limits),
    }


def key_object(key: KeyInfo) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "key",
        "kind": key.kind,
        "name": key.name,
        "tenants": list(key.tenants),
        "all_tenants": key.all_tenants,
        "created_at": int(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "revoked_at": _seconds(key.revoked_at),
    }


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
