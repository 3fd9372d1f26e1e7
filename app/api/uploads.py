"""An adapter's upload: a form of a name, an alias, the config and the weights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from adapters.errors import AdapterConfigTooLarge, AdapterFileMissing, AdapterTooLarge
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from app.api.context import ApiContext
from app.api.multipart import MAX_FIELD_BYTES, Form, FormShape, received_form
from app.errors import RequestInvalid

CONFIG_PART, WEIGHTS_PART = "adapter_config", "adapter_model"


@dataclass(frozen=True, slots=True)
class AdapterUpload:
    """What a client sent; `weights` lives until the end of the request."""

    name: str
    alias: str | None
    config: bytes
    weights: Path
    sha256: str  # of all of it


@asynccontextmanager
async def received_upload(request: Request, context: ApiContext) -> AsyncIterator[AdapterUpload]:
    """Read the multipart body; its scratch file is gone when the block ends, however it ends.

    Raises RequestInvalid for a body that is no such form, AdapterFileMissing, and AdapterTooLarge or
    AdapterConfigTooLarge for a part above its cap.
    """
    limits = context.services.limits
    fields = {"name": MAX_FIELD_BYTES, "alias": MAX_FIELD_BYTES, CONFIG_PART: limits.max_config_bytes}
    too_large = {CONFIG_PART: AdapterConfigTooLarge, WEIGHTS_PART: AdapterTooLarge}
    shape = FormShape(WEIGHTS_PART, limits.max_adapter_bytes, fields, too_large, _missing)
    async with received_form(request, context, shape) as form:
        yield _upload(form)


def _missing(part: str) -> Exception:
    file = {CONFIG_PART: CONFIG_FILE, WEIGHTS_PART: WEIGHTS_FILE}[part]
    return AdapterFileMissing(f"Missing part '{part}': send the file {file}.", param=part)


def _upload(form: Form) -> AdapterUpload:
    name = form.text("name")
    if name is None:
        raise RequestInvalid("Missing required part: 'name'.", param="name")
    if CONFIG_PART not in form.fields:
        raise _missing(CONFIG_PART)
    return AdapterUpload(name, form.text("alias") or None, form.fields[CONFIG_PART], form.path, form.sha256)
