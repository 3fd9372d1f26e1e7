"""/v1/uploads: a file too large for one request, sent in parts."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from app.api.auth import CallerDep
from app.api.context import ContextDep
from app.api.files import check_ttl, file_object, max_stored_bytes
from app.api.multipart import FormShape, received_form
from app.api.schemas import Body, StoredBody
from app.api.training_services import TrainingDep, seconds
from app.training.files import MAX_FILENAME_CHARS, NewFile, StoredFile
from app.training.uploads import MAX_PART_BYTES, MAX_PARTS, Upload

router = APIRouter()


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: int


class UploadBody(StoredBody):
    """POST /v1/uploads."""

    bytes: Annotated[int, Field(ge=1)]
    filename: Annotated[str, Field(min_length=1, max_length=MAX_FILENAME_CHARS)]
    mime_type: Annotated[str, Field(max_length=255)]  # what a file is, its content says
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteBody(StoredBody):
    """POST /v1/uploads/{id}/complete."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_PARTS)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


@router.post("/v1/uploads")
async def create_upload(
    body: UploadBody, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    ttl_s = None if body.expires_after is None else check_ttl(body.expires_after.seconds)
    new = NewFile(body.filename, body.purpose, ttl_s)
    limit = await max_stored_bytes(context, caller.tenant)
    create = partial(training.uploads.create, caller.tenant, new, body.bytes, max_stored_bytes=limit)
    return upload_object(await context.database(create), None)


@router.post("/v1/uploads/{upload_id}/parts")
async def add_part(
    upload_id: str, request: Request, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    async with received_form(request, context, FormShape("data", MAX_PART_BYTES)) as form:
        part = await context.long_work(caller.tenant, training.uploads.add_part, caller.tenant, upload_id, form.path)
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": seconds(part.created_at),
        "upload_id": part.upload_id,
    }


@router.post("/v1/uploads/{upload_id}/complete")
async def complete_upload(
    upload_id: str, body: CompleteBody, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    """Join the parts, in the order given, to one file; checked as POST /v1/files checks it."""
    upload, file = await context.long_work(
        caller.tenant,
        training.uploads.complete,
        caller.tenant,
        upload_id,
        body.part_ids,
        md5=body.md5,
    )
    return upload_object(upload, file)


@router.post("/v1/uploads/{upload_id}/cancel")
async def cancel_upload(
    upload_id: str, caller: CallerDep, context: ContextDep, training: TrainingDep
) -> dict[str, Any]:
    return upload_object(await context.store(training.uploads.cancel, caller.tenant, upload_id), None)


def upload_object(upload: Upload, file: StoredFile | None) -> dict[str, Any]:
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.num_bytes,
        "created_at": seconds(upload.created_at),
        "expires_at": seconds(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": None if file is None else file_object(file),
    }
