"""GET /v1/models, GET and DELETE /v1/models/{model}: the base and the caller's own adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from adapters.errors import AdapterNotFound
from adapters.manifest import AdapterManifest
from app.api.adapter_objects import delete_named, model_object
from app.api.answering import FINE_TUNED_MODEL, choose_model, resolve_model
from app.api.auth import CallerDep
from app.api.context import ApiContext, ContextDep, FactsDep
from app.api.services import Services
from app.errors import RequestInvalid
from app.model_names import AdapterName, BaseModelName, model_not_found, parse_model_name

router = APIRouter()


@router.get("/v1/models")
async def list_models(caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """The base first, then the caller's adapters by bare name, then fine-tuned ids."""
    data = [base_object(context), *await context.store(adapter_objects, context.services, caller.tenant)]
    return {"object": "list", "data": data}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, caller: CallerDep, context: ContextDep, facts: FactsDep) -> dict[str, Any]:
    """One model by any of the names that a request's `model` may be."""
    adapter = (await choose_model(context, caller, model)).adapter
    if adapter is None:
        return base_object(context)
    facts.adapter, facts.digest = adapter.label, adapter.digest
    return model_object(model, adapter, await _aliases(context, caller.tenant, adapter), owner=adapter.tenant)


async def _aliases(context: ApiContext, tenant: str, adapter: AdapterManifest) -> Mapping[str, int]:
    """None for a checkpoint: it is shared by another tenant, or its adapter has no version yet."""
    if adapter.tenant != tenant:
        return {}
    try:
        return await context.store(context.services.catalog.aliases, tenant, adapter.name)
    except AdapterNotFound:
        return {}


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, caller: CallerDep, context: ContextDep) -> dict[str, Any]:
    """Delete an adapter by name, or one version by `name@v3`. Running requests finish."""
    name = parse_model_name(model, context.services.base.id)
    if isinstance(name, BaseModelName):
        raise RequestInvalid("The base model cannot be deleted.", param="model")
    if name.tenant not in (None, caller.tenant):
        raise model_not_found(model)
    try:
        if isinstance(name, AdapterName):
            await delete_named(context, caller.tenant, name.name, name.selector)
        else:
            adapter = await resolve_model(context, caller, model)
            assert isinstance(adapter, AdapterManifest)
            await delete_named(context, caller.tenant, adapter.name, f"v{adapter.version}")
    except AdapterNotFound:
        raise model_not_found(model) from None
    return {"id": model, "object": "model", "deleted": True}


def adapter_objects(services: Services, tenant: str) -> list[dict[str, Any]]:
    """A tenant's adapters by name, and the id of every version that training made; blocks.

    A bare name means `live`: an adapter without that alias has none, though its versions have ids.
    """
    by_name, fine_tuned = [], {}
    jobs = services.training.jobs if services.training is not None else None
    trained = {model.adapter_name for model in jobs.fine_tuned_models(tenant)} if jobs is not None else set()
    for summary in services.catalog.list(tenant):
        if summary.live is not None or not summary.versions:  # or a directory that its first request imports
            by_name.append(model_object(summary.name, summary.live, summary.aliases, owner=tenant))
        is_trained = summary.live is not None and FINE_TUNED_MODEL in summary.live.extra
        if not is_trained and summary.name not in trained:
            continue  # spares a look at each version of what was uploaded
        for manifest in services.catalog.versions(tenant, summary.name):
            model = manifest.extra.get(FINE_TUNED_MODEL)
            if model is not None:
                fine_tuned[model] = model_object(model, manifest, summary.aliases, owner=tenant)
    return [*by_name, *fine_tuned.values()]


def base_object(context: ApiContext) -> dict[str, Any]:
    services = context.services
    return {
        "id": services.base.id,
        "object": "model",
        "created": services.started_at,
        "owned_by": "lodger",
        "max_model_len": services.limits.max_context,
        "digest": services.base.digest,
    }
