"""`lodger tenants`: create, list, limits, delete. Works on the database, with or without a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.flags import STORES, WHERE, with_settings
from app.cli.output import moment, print_table, say
from app.cli.stores import open_tenants
from app.settings_sources import LoadedSettings

commands = typer.Typer(help="Create, list, limit and erase tenants.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The tenant's id: a-z, 0-9 and dash, at most 63 characters.")]
Limit = Annotated[str | None, typer.Option(metavar="N|default", show_default=False)]


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="tenants")


@commands.command()
@with_settings(*WHERE)
def create(
    loaded: LoadedSettings,
    name: Name,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Succeed when there is such a tenant already.")] = False,
) -> None:
    """Add a tenant; prints its id alone on the last line."""
    from app.tenants import TenantExists

    try:
        open_tenants(loaded.settings).create(name)
    except TenantExists:
        if not exist_ok:
            raise
    print(name)


@commands.command("list")
@with_settings(*WHERE)
def list_tenants(loaded: LoadedSettings) -> None:
    """Show all tenants and what their own limits say."""
    from app.tenants import LIMIT_NAMES

    rows = [
        [tenant.id, moment(tenant.created_at), *(_number(getattr(tenant.limits, name)) for name in LIMIT_NAMES)]
        for tenant in open_tenants(loaded.settings).list()
    ]
    print_table(["tenant", "created", *LIMIT_NAMES], rows)


@commands.command()
@with_settings(*WHERE)
def limits(
    loaded: LoadedSettings,
    name: Name,
    max_waiting: Limit = None,
    max_running: Limit = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_adapters: Limit = None,
    max_storage_bytes: Limit = None,
    max_jobs: Limit = None,
    training_tokens_per_day: Limit = None,
) -> None:
    """Show a tenant's limits, or set some; `default` gives one back to the server's setting."""
    from app.tenants import LIMIT_NAMES

    given = {
        "max_waiting": max_waiting,
        "max_running": max_running,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_adapters": max_adapters,
        "max_storage_bytes": max_storage_bytes,
        "max_jobs": max_jobs,
        "training_tokens_per_day": training_tokens_per_day,
    }
    changes = {limit: _parse(limit, text) for limit, text in given.items() if text is not None}
    store = open_tenants(loaded.settings)
    own = store.set_limits(name, **changes).limits if changes else store.get(name).limits
    effective = store.limits(name)
    rows = [[limit, _number(getattr(own, limit)), _number(getattr(effective, limit), "none")] for limit in LIMIT_NAMES]
    print_table(["limit", "own", "in force"], rows)


@commands.command()
@with_settings(*STORES)
def delete(
    loaded: LoadedSettings,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase a tenant: its keys, rows, adapters and files. The id is not used again."""
    if not yes:
        typer.confirm(f"Erase {name} with all its adapters, files and jobs?", abort=True, err=True)
    from app.cli.catalog import named_base, open_catalog

    open_tenants(loaded.settings).erase(name)  # first, so that nothing new is written under it
    open_catalog(loaded.settings, named_base(loaded.settings)).erase_tenant(name)
    say(f"erased {name}")
    print(name)


def _parse(limit: str, text: str) -> int | None:
    if text == "default":
        return None
    if not text.isdecimal():
        raise typer.BadParameter("give a number, or `default`", param_hint=f"--{limit.replace('_', '-')}")
    return int(text)


def _number(value: int | None, missing: str = "-") -> str:
    return missing if value is None else str(value)
