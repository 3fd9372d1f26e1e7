"""Settings as rows of the reference page: heading, variable, default, meaning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from app.settings import Settings
from app.settings_sources import variable_of

_UNITS = (("GiB", 1 << 30), ("GB", 10**9), ("MiB", 1 << 20), ("MB", 10**6), ("KiB", 1 << 10))


def setting_sections() -> Iterator[tuple[str, list[list[str]]]]:
    """The headings are the comments above groups of fields in `Settings` itself."""
    heading, rows, seen = "General", [], set()
    for line in inspect.getsource(Settings).splitlines():
        if found := re.fullmatch(r"    # (.+)", line):
            if rows:
                yield heading, rows
            heading, rows = found[1], []
        name = line.strip().partition(":")[0]
        if line.startswith("    ") and not line.startswith("     ") and name in Settings.model_fields:
            seen.add(name)
            rows.append(_row(name, Settings.model_fields[name]))
    yield heading, rows
    assert seen == set(Settings.model_fields), "every field was found in the source"


def _row(name: str, field: FieldInfo) -> list[str]:
    words = field.description or ""
    if choices := _choices(field.annotation, field.metadata):
        words += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
    return [f"`{variable_of(name)}`", _default(field), words]


def _choices(annotation: Any, metadata: list[Any]) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    for part in get_args(annotation):
        if found := _choices(part, []):
            return found
    return ()


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "of this machine"
    value = field.default
    if value in (None, "") or value is PydanticUndefined:
        return "unset"
    if isinstance(value, ByteSize):
        return _bytes(int(value))
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Path):
        return f"`{value}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _bytes(count: int) -> str:
    for unit, size in _UNITS:
        if count and count % size == 0:
            return f"`{count // size}{unit}`"
    return f"`{count}`"
