"""What a request's `model` may say: one grammar for every route, resolved to a tenant's adapter once, at the edge.

    smollm2-135m-instruct                     the base, by its served name
    support · support@v3 · support@canary     an adapter: its `live` alias, a version, an alias
    acme/support@v3                           the same with the tenant in front
    ft:<base>:<tenant>:<suffix>:<8>           one immutable version; with `:ckpt-step-<n>` a checkpoint of it

Knows nothing of who asks: the caller compares `tenant` with the key's own, and treats a foreign one as absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapters.manifest import TENANT_PATTERN, VERSION_PATTERN, is_adapter_name, is_alias
from app.errors import ModelNotFound

MAX_MODEL_CHARS = 512

_CHECKPOINT = re.compile(r"ckpt-step-[0-9]{1,9}")
_FINE_TUNED_ID = re.compile(r"[A-Za-z0-9]{8}")
_FINE_TUNED_SUFFIX = re.compile(r"[A-Za-z0-9._-]{0,64}")


@dataclass(frozen=True, slots=True)
class BaseModelName:
    """The base model itself, no adapter."""


@dataclass(frozen=True, slots=True)
class AdapterName:
    """An adapter of the catalog. `tenant` is None when the name was written without one."""

    tenant: str | None
    name: str
    selector: str | None  # "v3", an alias, or None for the default alias


@dataclass(frozen=True, slots=True)
class FineTunedName:
    """A fine-tuned model's immutable id, with `:ckpt-step-<n>` where a checkpoint is meant."""

    tenant: str
    id: str


ModelName = BaseModelName | AdapterName | FineTunedName


def model_not_found(model: str) -> ModelNotFound:
    """The one answer for an absent name, a malformed one and another tenant's: nobody can tell them apart."""
    shown = model if len(model) <= 128 else model[:125] + "..."
    return ModelNotFound(
        f"The model '{shown}' does not exist or this key may not use it. GET /v1/models lists what there is.",
        param="model",
    )


def parse_model_name(model: str, base_id: str) -> ModelName:
    """Read `model` by the grammar above. Raises ModelNotFound for what no name can look like."""
    if model == base_id:
        return BaseModelName()
    if len(model) > MAX_MODEL_CHARS:
        raise model_not_found(model)
    tenant, name = None, model
    if not model.startswith("ft:") and "/" in model:
        tenant, name = model.split("/", 1)
        if TENANT_PATTERN.fullmatch(tenant) is None:
            raise model_not_found(model)
    if name.startswith("ft:"):
        return _parse_fine_tuned(model, name, base_id, tenant)
    name, at, selector = name.partition("@")
    if not is_adapter_name(name) or name == base_id or (at and not is_selector(selector)):
        raise model_not_found(model)
    return AdapterName(tenant, name, selector if at else None)


def is_selector(text: str) -> bool:
    """True for a version (`v3`) or something that may be an alias."""
    return VERSION_PATTERN.fullmatch(text) is not None or is_alias(text)


def _parse_fine_tuned(model: str, name: str, base_id: str, tenant: str | None) -> FineTunedName:
    """Read from the right: the base may hold a slash, and the suffix may be empty."""
    parts = name.split(":")
    tail = parts[:-1] if _CHECKPOINT.fullmatch(parts[-1]) else parts
    if len(tail) != 5:
        raise model_not_found(model)
    _, base, owner, suffix, unique = tail
    fits = (
        base == base_id
        and TENANT_PATTERN.fullmatch(owner)
        and _FINE_TUNED_SUFFIX.fullmatch(suffix)
        and _FINE_TUNED_ID.fullmatch(unique)
    )
    if not fits or tenant not in (None, owner):
        raise model_not_found(model)
    return FineTunedName(owner, name)
