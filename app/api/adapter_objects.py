"""How adapters look in answers, and the steps that several routes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.errors import AdapterNotFound
from adapters.manifest import VERSION_PATTERN, AdapterManifest
from app.api.context import ApiContext
from app.errors import RequestInvalid


def model_object(
    model: str, adapter: AdapterManifest | None, aliases: Mapping[str, int], *, owner: str
) -> dict[str, Any]:
    """OpenAI's model object; `adapter` is None for a directory that has not been imported yet."""
    shown: dict[str, Any] = {
        "id": model,
        "object": "model",
        "created": int(adapter.created_at) if adapter is not None else 0,
        "owned_by": owner,
    }
    if adapter is not None:
        shown["adapter"] = {
            "name": adapter.name,
            "digest": adapter.digest,
            "version": adapter.version,
            "aliases": sorted(alias for alias, version in aliases.items() if version == adapter.version),
            "base": adapter.base_id,
            "rank": adapter.rank,
            "parent": adapter.parent,
            "job_id": adapter.job_id,
            "status": "ready",
        }
    return shown


def version_object(adapter: AdapterManifest, aliases: Mapping[str, int], residency: Residency) -> dict[str, Any]:
    """One published version and where its bytes are now."""
    return {
        "id": adapter.label,
        "object": "adapter.version",
        "name": adapter.name,
        "version": adapter.version,
        "digest": adapter.digest,
        "created": int(adapter.created_at),
        "source": adapter.source,
        "rank": adapter.rank,
        "applied_modules": adapter.applied_modules,
        "bytes": adapter.weights.num_bytes + adapter.config.num_bytes,
        "base": adapter.base_id,
        "base_digest": adapter.base_digest,
        "parent": adapter.parent,
        "job_id": adapter.job_id,
        "aliases": sorted(alias for alias, version in aliases.items() if version == adapter.version),
        "tier": residency.tier(adapter),
        "resident": residency.is_resident(adapter),
        "pinned": residency.is_pinned(adapter),
    }


class Residency:
    """Where adapters lie: the rank pool as of one snapshot, the caches as of now."""

    def __init__(self, context: ApiContext) -> None:
        self._resident = {(held.tenant, held.digest): held for held in context.services.snapshot().resident}
        self._tier_of = context.services.tier_of

    def is_resident(self, adapter: AdapterManifest) -> bool:
        return (adapter.tenant, adapter.digest) in self._resident

    def tier(self, adapter: AdapterManifest) -> str:
        """The nearest that holds its bytes: "pool", "host", "disk", or "s3", which is the store of whatever kind."""
        return "pool" if self.is_resident(adapter) else self._tier_of(adapter)

    def is_pinned(self, adapter: AdapterManifest) -> bool:
        held = self._resident.get((adapter.tenant, adapter.digest))
        return held is not None and held.is_pinned


async def delete_named(context: ApiContext, tenant: str, name: str, selector: str | None) -> None:
    """Delete an adapter, or one version of it. Raises AdapterNotFound, or AdapterConflict for an aliased version."""
    services = context.services
    if selector is None:
        doomed = await context.store(services.catalog.versions, tenant, name)
        await context.store(services.catalog.delete, tenant, name)
    elif VERSION_PATTERN.fullmatch(selector):
        version = int(selector[1:])
        doomed = [m for m in await context.store(services.catalog.versions, tenant, name) if m.version == version]
        if not doomed:
            raise AdapterNotFound()
        await context.store(services.catalog.delete_version, tenant, name, version)
    else:
        raise RequestInvalid("Name a version to delete, not an alias: an alias may move meanwhile.", param="model")
    for manifest in doomed:
        services.engine.unload((tenant, manifest.digest))  # rows are taken back when nobody leases them
        await context.store(services.forget_adapter, manifest)
