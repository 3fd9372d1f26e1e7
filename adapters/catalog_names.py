"""What callers may name: the checks at the catalog's door. No I/O."""

from __future__ import annotations

from adapters.errors import AdapterNameInvalid
from adapters.manifest import TENANT_PATTERN, VERSION_PATTERN, BaseModelSpec, is_adapter_name, is_alias


def check_names(tenant: str, name: str, base: BaseModelSpec, alias: str | None = None) -> None:
    """Raise AdapterNameInvalid unless all may be written under. The base's own name would hide an adapter's."""
    if TENANT_PATTERN.fullmatch(tenant) is None:
        raise AdapterNameInvalid("There can be no such tenant.", param="tenant")
    if not is_adapter_name(name) or name == base.id:
        raise AdapterNameInvalid(param="name")
    if alias is not None and not is_alias(alias):
        raise AdapterNameInvalid(
            "An alias is 1 to 31 characters of a-z, 0-9 and dash, begins with a letter and looks like no version.",
            param="alias",
        )


def version_of(selector: str | None) -> int | None:
    """The number of a selector such as `v3`; None for an alias."""
    return int(selector[1:]) if selector is not None and VERSION_PATTERN.fullmatch(selector) else None
