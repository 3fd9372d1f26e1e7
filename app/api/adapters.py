"""/v1/adapters: register, list, alias, roll back, warm, pin and delete the caller's own adapters.

Names in paths carry no tenant: the tenant is the key's, so another tenant's adapter is simply not there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from adapters.errors import AdapterFileMissing, AdapterNameInvalid, AdapterNotFound
from adapters.manifest import (
    DEFAULT_ALIAS,
    AdapterManifest,
    adapter_prefix,
    is_adapter_name,
    is_alias,
)
from app.api.adapter_objects import Residency, delete_named, version_object
from app.api.auth import CallerDep
from app.api.context import ApiContext, ContextDep
from app.api.errors import from_validation
from app.api.idempotency import answered_once
from app.api.schemas import AliasBody, RegisterBody, RollbackBody
from app.api.uploads import AdapterUpload, received_upload
from app.errors import RateLimited, RequestInvalid, ServerBusy
from app.model_names import is_selector
from app.tenants import Caller

router = APIRouter()


@router.get("/v1/adapters")
async def list_adapters(caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """The caller's adapters by name, each with its aliases and numbers of versions."""
    summaries = await context.store(context.services.catalog.list, caller.tenant)
    residency = Residency(context)
    data = [
        {
            "id": summary.name,
            "object": "adapter",
            "name": summary.name,
            "versions": list(summary.versions),
            "aliases": dict(summary.aliases),
            "live": None if summary.live is None else version_object(summary.live, summary.aliases, residency),
        }
        for summary in summaries
    ]
    return {"object": "list", "data": data}


@router.post("/v1/adapters", response_model=None)
async def register_adapter(request: Request, caller: CallerDep, context: ContextDep) -> JSONResponse:
    """Publish an upload (multipart), or import a PEFT directory from the tenant's own prefix (JSON)."""

    async def answer(make: Awaitable[AdapterManifest]) -> JSONResponse:
        manifest = await make
        aliases = await context.store(context.services.catalog.aliases, caller.tenant, manifest.name)
        body = version_object(manifest, aliases, Residency(context))
        return JSONResponse(body, 201, headers=context.headers_for(manifest))

    if is_multipart(request):
        async with received_upload(request, context) as upload:
            make = partial(publish_upload, context, caller, upload)
            return await answered_once(request, context, caller.tenant, upload.sha256, lambda: answer(make()))
    body = await read_body(request)
    sha256 = hashlib.sha256(await request.body()).hexdigest()
    make = partial(import_from_prefix, context, caller, body)
    return await answered_once(request, context, caller.tenant, sha256, lambda: answer(make()))


@router.post("/v1/adapters/validate", response_model=None)
async def validate_adapter(request: Request, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Check an upload as publishing would, and publish nothing. Refused with the same codes."""
    if not is_multipart(request):
        raise RequestInvalid("Send the files as multipart/form-data: name, adapter_config, adapter_model.")
    async with received_upload(request, context) as upload:
        check_target(context, upload.name, upload.alias)
        return await context.long_work(caller.tenant, checked_object, context, upload)


def checked_object(context: ApiContext, upload: AdapterUpload) -> dict[str, Any]:
    """What the door found; runs in a worker thread."""
    checked = context.services.check_adapter(upload.config, upload.weights)
    return {
        "object": "adapter.validation",
        "valid": True,
        "name": upload.name,
        "digest": checked.digest,
        "rank": checked.rank,
        "applied_modules": len(checked.modules),
        "base": context.services.base.id,
        "warnings": list(checked.warnings),
    }


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """One adapter: every version, where each is resident, and what its aliases point to."""
    catalog = context.services.catalog
    if not is_adapter_name(name):
        raise AdapterNotFound()
    versions = await context.store(catalog.versions, caller.tenant, name)
    if not versions:  # perhaps a directory that nobody has asked for yet
        versions = [await context.store(catalog.resolve, caller.tenant, name, None)]
    aliases = await context.store(catalog.aliases, caller.tenant, name)
    residency = Residency(context)
    return {
        "id": name,
        "object": "adapter",
        "name": name,
        "aliases": dict(aliases),
        "versions": [version_object(manifest, aliases, residency) for manifest in versions],
    }


@router.get("/v1/adapters/{name}/aliases/{alias}")
async def get_alias(name: str, alias: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """What an alias points to."""
    aliases = await context.store(context.services.catalog.aliases, caller.tenant, known_name(name))
    if alias not in aliases:
        raise AdapterNotFound()
    return alias_object(name, alias, aliases[alias])


@router.put("/v1/adapters/{name}/aliases/{alias}")
@router.post("/v1/adapters/{name}/aliases/{alias}")
async def set_alias(name: str, alias: str, body: AliasBody, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Point an alias at a version; running requests finish on what they began with."""
    check_alias(alias)
    await context.store(context.services.catalog.set_alias, caller.tenant, known_name(name), alias, body.version)
    return alias_object(name, alias, body.version)


@router.delete("/v1/adapters/{name}/aliases/{alias}")
async def delete_alias(name: str, alias: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    await context.store(context.services.catalog.delete_alias, caller.tenant, known_name(name), alias)
    return {"id": f"{name}@{alias}", "object": "adapter.alias", "deleted": True}


@router.post("/v1/adapters/{name}/rollback")
async def roll_back(
    name: str, caller: CallerDep, context: ContextDep, body: RollbackBody | None = None
) -> dict[str, Any]:
    """Point an alias (`live`) back at the version that it pointed to before."""
    alias = (body and body.alias) or DEFAULT_ALIAS
    check_alias(alias)
    catalog = context.services.catalog
    await context.store(catalog.roll_back, caller.tenant, known_name(name), alias)
    aliases = await context.store(catalog.aliases, caller.tenant, name)
    return alias_object(name, alias, aliases[alias])


@router.post("/v1/adapters/{name}/load")
async def load_adapter(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Warm an adapter: fetch it and place it in the rank pool ahead of its first request."""
    return await make_resident(context, caller, name, pin=False)


@router.post("/v1/adapters/{name}/pin")
async def pin_adapter(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Warm an adapter and keep it resident until it is unpinned or the server restarts."""
    return await make_resident(context, caller, name, pin=True)


@router.post("/v1/adapters/{name}/unpin")
async def unpin_adapter(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Let a pinned adapter be evicted again."""
    manifest = await resolve_path_name(context, caller, name)
    await asyncio.wrap_future(context.services.engine.unpin((manifest.tenant, manifest.digest)))
    return {**residency_object(manifest), "pinned": False}


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Delete an adapter with all its versions and aliases. Running requests finish."""
    await delete_named(context, caller.tenant, known_name(name), None)
    return {"id": name, "object": "adapter", "deleted": True}


@router.delete("/v1/adapters/{name}/versions/{version}")
async def delete_version(name: str, version: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Delete one version (`3` or `v3`), unless an alias points to it."""
    selector = version if version.startswith("v") else f"v{version}"
    await delete_named(context, caller.tenant, known_name(name), selector)
    return {"id": f"{name}@{selector}", "object": "adapter.version", "deleted": True}


async def publish_upload(context: ApiContext, caller: Caller, upload: AdapterUpload) -> AdapterManifest:
    check_target(context, upload.name, upload.alias)
    await check_quota(context, caller.tenant, upload.name, upload.weights.stat().st_size)
    return await context.long_work(
        caller.tenant,
        context.services.catalog.publish,
        caller.tenant,
        upload.name,
        upload.config,
        upload.weights,
        alias=upload.alias or DEFAULT_ALIAS,
        source="upload",
    )


async def import_from_prefix(context: ApiContext, caller: Caller, body: RegisterBody) -> AdapterManifest:
    """Import `tenants/<t>/adapters/<name>/`; any other prefix is refused, another tenant's like an absent one."""
    check_target(context, body.name, body.alias)
    own = adapter_prefix(caller.tenant, body.name)
    given = body.prefix.strip("/") + "/"
    if given not in (own, own.removeprefix(f"tenants/{caller.tenant}/")):
        raise RequestInvalid(
            f"'prefix' is the adapter's own directory, '{own}'. Copy the files there first.", param="prefix"
        )
    catalog = context.services.catalog
    await check_quota(context, caller.tenant, body.name, 0)
    manifest = await context.long_work(caller.tenant, catalog.import_directory, caller.tenant, body.name)
    if manifest is None:
        raise AdapterFileMissing(f"There are no adapter files below '{own}'.", param="prefix")
    if body.alias is not None:
        await context.store(catalog.set_alias, caller.tenant, body.name, body.alias, manifest.version)
    return manifest


async def make_resident(context: ApiContext, caller: Caller, name: str, *, pin: bool) -> dict[str, Any]:
    manifest = await resolve_path_name(context, caller, name)
    warmed = await asyncio.wrap_future(context.services.engine.warm(manifest, pin=pin))
    if pin and not warmed.is_pinned:
        raise ServerBusy("The pool has no rows left for pins. Unpin another adapter first.")
    found = {"tier": warmed.tier, "resident": warmed.is_resident, "pinned": warmed.is_pinned}
    return {**residency_object(manifest), **found}


def residency_object(manifest: AdapterManifest) -> dict[str, Any]:
    return {"id": manifest.label, "object": "adapter.residency", "name": manifest.name, "digest": manifest.digest}


async def resolve_path_name(context: ApiContext, caller: Caller, path_name: str) -> AdapterManifest:
    """`support`, `support@v3` or `support@canary` of a path."""
    name, at, selector = path_name.partition("@")
    if not is_adapter_name(name) or (at and not is_selector(selector)):
        raise AdapterNotFound()
    catalog = context.services.catalog
    manifest = catalog.peek(caller.tenant, name, selector or None)
    if manifest is None:
        manifest = await context.store(catalog.resolve, caller.tenant, name, selector or None)
    return manifest


async def check_quota(context: ApiContext, tenant: str, name: str, num_bytes: int) -> None:
    """The tenant's limits on adapters and storage, as far as the catalog's listing tells. Raises RateLimited."""
    limits = await context.database(context.services.tenants.limits, tenant)
    if limits.max_adapters is None and limits.max_storage_bytes is None:
        return
    catalog = context.services.catalog
    summaries = await context.store(catalog.list, tenant)
    known = {summary.name for summary in summaries}
    if limits.max_adapters is not None and len(known | {name}) > limits.max_adapters:
        raise RateLimited(
            f"This tenant's limit of {limits.max_adapters} adapters is reached. Delete one first.",
            param="adapters",
            code="quota_exceeded",
        )
    if limits.max_storage_bytes is not None:
        stored = 0
        for summary in summaries:
            for manifest in await context.store(catalog.versions, tenant, summary.name):
                stored += manifest.weights.num_bytes + manifest.config.num_bytes
        if stored + num_bytes > limits.max_storage_bytes:
            raise RateLimited(
                f"This tenant's limit of {limits.max_storage_bytes} bytes is reached. Delete an adapter first.",
                param="storage",
                code="quota_exceeded",
            )


def known_name(name: str) -> str:
    """A path's adapter name; what no adapter can be called is not there."""
    if not is_adapter_name(name):
        raise AdapterNotFound()
    return name


def check_target(context: ApiContext, name: str, alias: str | None) -> None:
    if not is_adapter_name(name) or name == context.services.base.id:
        raise AdapterNameInvalid(param="name")
    if alias is not None:
        check_alias(alias)


def check_alias(alias: str) -> None:
    if not is_alias(alias):
        raise RequestInvalid(
            "Aliases are 1 to 31 characters of a-z, 0-9 and dash, begin with a letter, and look like no version.",
            param="alias",
        )


def alias_object(name: str, alias: str, version: int) -> dict[str, Any]:
    return {"id": f"{name}@{alias}", "object": "adapter.alias", "name": name, "alias": alias, "version": version}


def is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_body(request: Request) -> RegisterBody:
    """A JSON body on a route that also takes multipart, checked as the framework checks the others."""
    try:
        return RegisterBody.model_validate(json.loads(await request.body()))
    except ValidationError as exc:
        raise from_validation([{**finding, "loc": ("body", *finding["loc"])} for finding in exc.errors()]) from None
    except (ValueError, RecursionError):
        raise RequestInvalid("The body is not valid JSON.", code="invalid_json") from None
