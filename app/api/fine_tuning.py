"""/v1/fine_tuning: jobs, their events and checkpoints, and who may use a checkpoint."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from adapters.manifest import TENANT_PATTERN
from app.api.auth import CallerDep
from app.api.context import ApiContext, ContextDep
from app.api.fine_tuning_schemas import CreateJobBody
from app.api.idempotency import idempotency_key
from app.api.job_objects import checkpoint_object, event_object, job_object, preflight_object
from app.api.schemas import StoredBody
from app.api.training_services import TrainingDep, TrainingServices, list_object, page_object, seconds
from app.errors import RequestInvalid
from app.tenants import Caller
from app.training.fine_tuning import JobRequest
from app.training.job import Job, JobStatus
from app.training.jobs import MetadataFilter
from app.training.permissions import Permission

router = APIRouter()

STREAM_PAGE = 200  # events read at a time
KEEP_ALIVE_S = 15.0

After = Annotated[str | None, Query(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=1000)]
_METADATA_KEY = re.compile(r"metadata\[(.*)\]", re.DOTALL)


# ---- jobs


@router.post("/v1/fine_tuning/jobs")
async def create_job(
    body: CreateJobBody, request: Request, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    """Make a job. With an Idempotency-Key, or as a declared retry, the same call is the same job."""
    limits = await context.database(context.services.tenants.limits, caller.tenant)
    asked = _job_request(body, request)
    create = training.fine_tuning.create
    quota = limits.training_tokens_per_day
    job = await context.store(create, caller.tenant, asked, max_active=limits.max_jobs, max_tokens_per_day=quota)
    return await _shown(context, training, job)


@router.post("/v1/fine_tuning/preflight")
async def preflight(
    body: CreateJobBody, request: Request, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    """What creating this job would find and cost; no job is made."""
    asked = _job_request(body, request)
    return preflight_object(
        await context.preflight(caller.tenant, training.fine_tuning.preflight, caller.tenant, asked)
    )


def _job_request(body: CreateJobBody, request: Request) -> JobRequest:
    retries = request.headers.get("x-stainless-retry-count", "0")
    is_retry = retries.isascii() and retries.isdigit() and int(retries[:9]) > 0
    return body.request(idempotency_key=idempotency_key(request), is_retry=is_retry)


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(
    request: Request,
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    after: After = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    where = _metadata_filter(request)
    page = await context.database(training.jobs.list, caller.tenant, after=after, limit=limit, where=where)
    places: dict[str, int] = {}
    if any(job.status is JobStatus.QUEUED for job in page.items):
        places = await context.database(training.jobs.queue_positions)
    return page_object(page, lambda job: job_object(job, places.get(job.id)))


def _metadata_filter(request: Request) -> MetadataFilter:
    """`metadata[k]=v`, several of them, or `metadata=null`."""
    pairs: dict[str, str] = {}
    only_null = False
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null":
                raise RequestInvalid("Write metadata[key]=value, or metadata=null.", param="metadata")
            only_null = True
        elif (match := _METADATA_KEY.fullmatch(name)) and pairs.setdefault(match[1], value) != value:
            raise RequestInvalid("A metadata key is asked for twice.", param="metadata")
    if only_null and pairs:
        raise RequestInvalid("metadata=null and metadata[key]=value exclude each other.", param="metadata")
    return MetadataFilter(pairs, only_null)


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def retrieve_job(job_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep) -> dict[str, Any]:
    return await _shown(context, training, await context.database(training.jobs.get, caller.tenant, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/{action}")
async def change_job(
    job_id: str,
    action: Literal["cancel", "pause", "resume"],
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
) -> dict[str, Any]:
    """Each may be repeated: a client repeats a call whose answer was lost."""
    acts = {"cancel": training.jobs.cancel, "pause": training.jobs.pause, "resume": training.jobs.resume}
    return await _shown(context, training, await context.database(acts[action], caller.tenant, job_id))


async def _shown(context: ApiContext, training: TrainingServices, job: Job) -> dict[str, Any]:
    if job.status is not JobStatus.QUEUED:
        return job_object(job)
    places = await context.database(training.jobs.queue_positions)
    return job_object(job, places.get(job.id))


# ---- events and checkpoints


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def list_events(
    job_id: str,
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    after: After = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    page = await context.database(training.jobs.events, caller.tenant, job_id, after=after, limit=limit)
    return page_object(page, event_object)


@router.get("/v1/fine_tuning/jobs/{job_id}/events/stream", response_model=None)
async def stream_events(
    job_id: str,
    request: Request,
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    after: After = None,
) -> StreamingResponse:
    """A job's events as server-sent events, oldest first, until it is over; `Last-Event-ID` goes on after a break."""
    start = request.headers.get("last-event-id", after)
    read = training.jobs.events
    await context.database(read, caller.tenant, job_id, after=start, limit=1, asc=True)  # 404 and 400 before the 200
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    lines = _event_lines(context, training, caller, job_id, start)
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def _event_lines(
    context: ApiContext, training: TrainingServices, caller: Caller, job_id: str, after: str | None
) -> AsyncIterator[str]:
    silent_s = 0.0
    while True:
        # The status is read before the events: nothing is written after the last one of a job that is over.
        job = await context.database(training.jobs.get, caller.tenant, job_id)
        page = await context.database(
            training.jobs.events, caller.tenant, job_id, after=after, limit=STREAM_PAGE, asc=True
        )
        for event in page.items:
            after = event.id
            data = json.dumps(event_object(event))
            yield f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n"
        if page.has_more:
            continue
        if job.status.is_over:
            yield "data: [DONE]\n\n"
            return
        silent_s = 0.0 if page.items else silent_s + training.poll_s
        if silent_s >= KEEP_ALIVE_S:
            silent_s = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(training.poll_s)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str,
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    after: After = None,
    limit: Limit = 10,
) -> dict[str, Any]:
    page = await context.database(training.jobs.checkpoints, caller.tenant, job_id, after=after, limit=limit)
    return page_object(page, checkpoint_object)


# ---- permissions


class PermissionBody(StoredBody):
    """POST …/permissions: a project is a tenant."""

    project_ids: Annotated[list[Annotated[str, Field(max_length=63)]], Field(min_length=1, max_length=100)]


@router.get("/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions")
async def list_permissions(
    checkpoint: str,
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    after: After = None,
    limit: Limit = 10,
    order: Literal["ascending", "descending"] = "descending",
    project_id: Annotated[str | None, Query(max_length=63)] = None,
) -> dict[str, Any]:
    page = await context.database(
        training.permissions.list,
        caller.tenant,
        checkpoint,
        after=after,
        limit=limit,
        asc=order == "ascending",
        project=project_id,
    )
    return page_object(page, permission_object)


@router.post("/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions")
async def grant_permissions(
    checkpoint: str, body: PermissionBody, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    for project in body.project_ids:
        if TENANT_PATTERN.fullmatch(project) is None:
            raise RequestInvalid("A project is the id of a tenant.", param="project_ids")
    granted = await context.database(training.permissions.grant, caller.tenant, checkpoint, body.project_ids)
    return list_object(map(permission_object, granted), has_more=False)


@router.delete("/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions/{permission_id}")
async def revoke_permission(
    checkpoint: str, permission_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    await context.database(training.permissions.revoke, caller.tenant, checkpoint, permission_id)
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


def permission_object(permission: Permission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": seconds(permission.created_at),
        "project_id": permission.project_id,
    }
