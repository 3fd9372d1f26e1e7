"""Settings as flags: gives a command one option per setting and hands it the loaded settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from app.settings import Settings
from app.settings_sources import FIELDS, flag_of, load_settings, variable_of

WHERE = ("config", "data_dir", "database_url")  # what the commands on tenants and keys need
STORES = (*WHERE, "store", *(name for name in FIELDS if name.startswith(("s3_", "base_"))), "quantization", "max_rank")

SHORTER = {
    "training": "--train"
}  # flags that may be written otherwise, too, where a command has no such flag of its own


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command whose first parameter is `loaded: LoadedSettings`; flags of `names` (default: all) fill it."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        fields = names or FIELDS

        @wraps(command)
        def run(**values: Any) -> None:
            flags = {name: values.pop(name) for name in fields}
            command(load_settings(flags), **values)

        taken = {flag_of(p.name) for p in own}
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [_flag(name, [s for s in [SHORTER.get(name)] if s and s not in taken]) for name in fields]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _flag(name: str, shorter: list[str]) -> inspect.Parameter:
    """One optional text option; its value is checked by `Settings`, with the same words wherever it came from."""
    field = Settings.model_fields[name]
    default = "" if field.default_factory or field.default in (None, "") else f"default {field.default}, "
    option = typer.Option(
        flag_of(name),
        *shorter,
        help=f"{field.description} [{default}{variable_of(name)}]",
        metavar=_metavar(name, field),
        show_default=False,
        rich_help_panel="Settings",
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _metavar(name: str, field: FieldInfo) -> str:
    """What to write for the value: the choices, or the unit."""
    choices = [arg for arg in get_args(field.annotation) if isinstance(arg, str)]
    if choices:
        return "|".join(choices)
    if field.annotation is bool:
        return "true|false"
    return {"bytes": "SIZE", "s": "SECONDS", "url": "URL", "dir": "DIR"}.get(name.rsplit("_", 1)[-1], "VALUE")
