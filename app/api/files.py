"""/v1/files: upload a dataset, list, look, download, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse

from app.api.auth import CallerDep
from app.api.context import ApiContext, ContextDep
from app.api.idempotency import answered_once
from app.api.multipart import MAX_FIELD_BYTES, FormShape, received_form
from app.api.training_services import TrainingDep, page_object, seconds
from app.errors import RequestInvalid
from app.training.files import RESULT_PURPOSE, NewFile, StoredFile, check_purpose

router = APIRouter()

EXPIRY_RANGE_S = (3600, 2_592_000)
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals", RESULT_PURPOSE)


@router.post("/v1/files", response_model=None)
async def create_file(request: Request, caller: CallerDep, context: ContextDep, training: TrainingDep) -> JSONResponse:
    """Take one file. Its size and encoding are checked here; its rows when a job reads them."""
    fields = dict.fromkeys(("purpose", ANCHOR, SECONDS), MAX_FIELD_BYTES)
    shape = FormShape("file", training.files.limits.max_file_bytes, fields)
    async with received_form(request, context, shape) as form:
        purpose = form.text("purpose")
        if purpose is None:
            raise RequestInvalid("Missing required parameter: 'purpose'.", param="purpose")
        check_purpose(purpose)
        new = NewFile(form.filename, purpose, _ttl(form.text(ANCHOR), form.text(SECONDS)))
        limit = await max_stored_bytes(context, caller.tenant)
        add = partial(training.files.add, caller.tenant, new, form.path, max_stored_bytes=limit)

        async def keep() -> JSONResponse:
            return JSONResponse(file_object(await context.long_work(caller.tenant, add)))

        return await answered_once(request, context, caller.tenant, form.sha256, keep)


@router.get("/v1/files")
async def list_files(
    caller: CallerDep,
    context: ContextDep,
    training: TrainingDep,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    if purpose is not None and purpose not in PURPOSES:
        raise RequestInvalid("There is no such purpose.", param="purpose")
    page = await context.database(
        training.files.list, caller.tenant, after=after, limit=limit, asc=order == "asc", purpose=purpose
    )
    return page_object(page, file_object)


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep) -> dict[str, Any]:
    return file_object(await context.database(training.files.get, caller.tenant, file_id))


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep) -> dict[str, Any]:
    """Unlist a file. A job that was created with it keeps its content until the job is over."""
    await context.store(training.files.delete, caller.tenant, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/v1/files/{file_id}/content", response_model=None)
async def download_file(
    file_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> StreamingResponse:
    """The bytes as they came; a result file as plain CSV."""
    file = await context.database(training.files.get, caller.tenant, file_id)
    chunks = training.files.content(file)
    first = await context.store(next, chunks, b"")  # a store that fails says so before the status is sent
    media = "text/csv; charset=utf-8" if file.purpose == RESULT_PURPOSE else "application/octet-stream"
    headers = {"content-length": str(file.num_bytes), "x-content-type-options": "nosniff"}
    return StreamingResponse(_from(context, first, chunks), media_type=media, headers=headers)


async def _from(context: ApiContext, first: bytes, rest: Iterator[bytes]) -> AsyncIterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        chunk = await context.store(next, rest, b"")


def _ttl(anchor: str | None, text: str | None) -> int | None:
    """`expires_after` of the form, in seconds; None for a file that stays."""
    if anchor is None and text is None:
        return None
    if anchor != "created_at":
        raise RequestInvalid("The anchor is 'created_at'.", param="expires_after.anchor")
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestInvalid("'expires_after[seconds]' is a number of seconds.", param="expires_after.seconds")
    return check_ttl(int(text))


def check_ttl(ttl_s: int) -> int:
    low, high = EXPIRY_RANGE_S
    if not low <= ttl_s <= high:
        raise RequestInvalid(f"A file expires after {low} to {high} seconds.", param="expires_after.seconds")
    return ttl_s


async def max_stored_bytes(context: ApiContext, tenant: str) -> int | None:
    limits = await context.database(context.services.tenants.limits, tenant)
    return limits.max_storage_bytes


def file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": seconds(file.created_at),
        "expires_at": seconds(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",  # stored and hashed before the answer; clients poll for this word
        "status_details": None,
    }
