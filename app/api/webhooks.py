"""/v1/webhook_endpoints: where a tenant is told that a job is over, and /v1/webhook_event_types."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from app.api.auth import CallerDep
from app.api.context import ContextDep
from app.api.schemas import Body, StoredBody
from app.api.training_services import TrainingDep, page_object, seconds
from app.training.webhook_post import MAX_URL_CHARS
from app.training.webhooks import EVENT_TYPES, Endpoint, EndpointChange

router = APIRouter()

Name = Annotated[str, Field(min_length=1, max_length=256)]
Url = Annotated[str, Field(max_length=MAX_URL_CHARS)]
EventTypes = Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64)]


class EndpointBody(StoredBody):
    """POST /v1/webhook_endpoints."""

    name: Name
    url: Url
    event_types: EventTypes


class EndpointUpdateBody(StoredBody):
    """POST /v1/webhook_endpoints/{id}."""

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None


class RotateBody(Body):
    keep_old_secret_active_for_24_hours: bool = False


class TestBody(StoredBody):
    event_type: Annotated[str, Field(max_length=64)]


@router.get("/v1/webhook_event_types")
async def list_event_types(caller: CallerDep) -> dict[str, Any]:
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/v1/webhook_endpoints")
async def create_endpoint(
    body: EndpointBody, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    create = training.webhooks.create
    endpoint = await context.database(create, caller.tenant, body.name, body.url, body.event_types)
    return endpoint_object(endpoint, with_secret=True)


@router.get("/v1/webhook_endpoints")
async def list_endpoints(
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    page = await context.database(training.webhooks.list, caller.tenant, after=after, limit=limit)
    return page_object(page, endpoint_object)


@router.get("/v1/webhook_endpoints/{endpoint_id}")
async def retrieve_endpoint(
    endpoint_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    return endpoint_object(await context.database(training.webhooks.get, caller.tenant, endpoint_id))


@router.post("/v1/webhook_endpoints/{endpoint_id}")
async def update_endpoint(
    endpoint_id: str, body: EndpointUpdateBody, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    change = EndpointChange(body.name, body.url, body.event_types)
    return endpoint_object(await context.database(training.webhooks.update, caller.tenant, endpoint_id, change))


@router.delete("/v1/webhook_endpoints/{endpoint_id}")
async def delete_endpoint(
    endpoint_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    await context.database(training.webhooks.delete, caller.tenant, endpoint_id)
    return {"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/v1/webhook_endpoints/{endpoint_id}/rotate_secret")
async def rotate_secret(
    endpoint_id: str,
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    body: RotateBody | None = None,
) -> dict[str, Any]:
    keep_old = body is not None and body.keep_old_secret_active_for_24_hours
    rotate = training.webhooks.rotate_secret
    endpoint = await context.database(rotate, caller.tenant, endpoint_id, keep_old=keep_old)
    return endpoint_object(endpoint, with_secret=True)


@router.post("/v1/webhook_endpoints/{endpoint_id}/test")
async def test_endpoint(
    endpoint_id: str, body: TestBody, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    """Send a sample event and tell how the endpoint answered."""
    status = await context.long_work(caller.tenant, training.webhooks.test, caller.tenant, endpoint_id, body.event_type)
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": endpoint_id,
        "event_type": body.event_type,
        "status_code": status,
        "success": True,
    }


def endpoint_object(endpoint: Endpoint, *, with_secret: bool = False) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "created_at": seconds(endpoint.created_at),
        "updated_at": seconds(endpoint.updated_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "signing_secret_hint": endpoint.secret_hint,
    }
    return shown | {"signing_secret": endpoint.secret} if with_secret else shown
