"""Routes and request bodies as rows of the reference page, from the routers and the pydantic models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute

from app.api import adapters, admin, chat, completions, file_uploads, files, fine_tuning, health, models, webhooks
from app.api.fine_tuning_schemas import CreateJobBody
from app.api.schemas import (
    AliasBody,
    Body,
    ChatBody,
    CompletionBody,
    KeyBody,
    Message,
    RegisterBody,
    RollbackBody,
    StreamOptions,
    TenantBody,
)

ROUTERS: tuple[APIRouter, ...] = (
    *(module.router for module in (chat, completions, models, adapters, files, file_uploads, fine_tuning, webhooks)),
    admin.router,
    health.probes,
    health.metrics_router,
)
# Title on the page -> the body. Every body that a route takes is here or within one of these; a test proves it.
BODIES: dict[str, type[Body]] = {
    "POST /v1/chat/completions": ChatBody,
    "A message": Message,
    "stream_options": StreamOptions,
    "POST /v1/completions": CompletionBody,
    "POST /v1/adapters, as JSON": RegisterBody,
    "PUT or POST /v1/adapters/{name}/aliases/{alias}": AliasBody,
    "POST /v1/adapters/{name}/rollback": RollbackBody,
    "POST /v1/uploads": file_uploads.UploadBody,
    "POST /v1/uploads/{upload_id}/complete": file_uploads.CompleteBody,
    "POST /v1/fine_tuning/jobs and /v1/fine_tuning/preflight": CreateJobBody,
    "POST /v1/fine_tuning/checkpoints/{checkpoint}/permissions": fine_tuning.PermissionBody,
    "POST /v1/webhook_endpoints": webhooks.EndpointBody,
    "POST /v1/webhook_endpoints/{endpoint_id}": webhooks.EndpointUpdateBody,
    "POST /v1/webhook_endpoints/{endpoint_id}/rotate_secret": webhooks.RotateBody,
    "POST /v1/webhook_endpoints/{endpoint_id}/test": webhooks.TestBody,
    "POST /admin/tenants": TenantBody,
    "POST /admin/keys": KeyBody,
}
# What the schema cannot say: fields that are checked by code of their own.
SHAPES = {
    "stop": "string, or list of up to 4, each 1 to 256 long",
    "prompt": "string, list of strings, token ids, or lists of token ids",
    "content": "string, or list of text parts",
    "tool_calls": "refused unless empty",
    "tool_call_id": "refused unless empty",
    "function_call": "refused unless empty",
    "audio": "refused unless empty",
    "annotations": "anything; no effect",
    "lora.target_modules": '"all-linear", or list of names such as "q_proj"',
    "method.reinforcement": "refused unless null",
    "integrations": "refused unless empty",
}
NAMED = {"Message": "message", "StreamOptions": "object"}


def routes() -> Iterator[APIRoute]:
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            yield route


def route_rows() -> Iterator[list[str]]:
    """One row a path and set of methods that one function answers."""
    for route in routes():
        words = (route.endpoint.__doc__ or _words_of(route.endpoint.__name__)).strip().splitlines()[0]
        methods = ", ".join(sorted(route.methods))
        query = ", ".join(f"`{field.alias}`" for field in route.dependant.query_params)
        yield [f"`{methods} {route.path.replace(':path', '')}`", query, words]


def _words_of(name: str) -> str:
    """`list_files` as `List files.`: functions whose name says it all have no docstring."""
    return name.replace("_", " ").capitalize() + "."


def body_tables() -> Iterator[tuple[str, list[list[str]]]]:
    for title, body in BODIES.items():
        schema = body.model_json_schema()
        yield title, list(_rows(schema, schema.get("$defs", {}), ""))


def _rows(schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str) -> Iterator[list[str]]:
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        inner = _object_of(field, defs)
        if inner is not None and inner.get("title") not in NAMED:
            yield from _rows(inner, defs, f"{prefix}{name}.")
            continue
        default = "required" if name in required else _value(field.get("default"))
        yield [f"`{prefix}{name}`", SHAPES.get(prefix + name) or _type(field, defs), default]


def _object_of(field: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of a nested body, or None for anything else."""
    for option in field.get("anyOf", [field]):
        if "$ref" in option:
            found: Mapping[str, Any] = defs[option["$ref"].rsplit("/", 1)[1]]
            return found
    return None


def _value(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def _type(field: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option, defs) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field:
        return "one of " + ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return NAMED[field["$ref"].rsplit("/", 1)[1]]
    kind = field["type"]
    if kind == "array":
        return f"list of {_type(field.get('items', {}), defs)}{_bounds(field, 'Items')}"
    if kind == "object":
        values = field.get("additionalProperties")
        return "object of " + _type(values, defs) if isinstance(values, dict) and values else "object"
    return str(kind) + _bounds(field, "Length")


def _bounds(field: Mapping[str, Any], noun: str) -> str:
    low, high = field.get("minimum", field.get(f"min{noun}")), field.get("maximum", field.get(f"max{noun}"))
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    unit = "" if noun == "Length" and "minLength" not in field and "maxLength" not in field else " long"
    parts = [
        *([f"above {_number(above)}"] if above is not None else []),
        *([f"from {_number(low)}"] if low is not None else []),
        *([f"to {_number(high)}"] if high is not None else []),
        *([f"below {_number(below)}"] if below is not None else []),
    ]
    return f", {' '.join(parts)}{unit}" if parts else ""


def _number(value: float) -> str:
    return f"{value:,}" if abs(value) < 1 << 40 else "2^63" if value > 0 else "-2^63"
