"""`lodger keys`: create, list, revoke. Works on the database, with or without a running server."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from app.cli.flags import WHERE, with_settings
from app.cli.output import moment, print_table, say
from app.cli.stores import open_tenants
from app.settings_sources import LoadedSettings

commands = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="keys")


@commands.command()
@with_settings(*WHERE)
def create(
    loaded: LoadedSettings,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The key's tenant; for a service key a label.")] = "",
    service: Annotated[bool, typer.Option("--service", help="A key that acts for several tenants.")] = False,
    tenants: Annotated[str, typer.Option("--tenants", metavar="A,B", help="A service key's tenants.")] = "",
    all_tenants: Annotated[bool, typer.Option("--all-tenants", help="A service key of all tenants.")] = False,
    expires: Annotated[str, typer.Option("--expires", metavar="WHEN", help="30d, 12h or 2030-01-31T12:00:00Z.")] = "",
    label: Annotated[str, typer.Option("--label", help="What a tenant's key is for.")] = "",
) -> None:
    """Make a key; prints it alone on the last line, this once."""
    expires_at = _parse_expiry(expires, time.time()) if expires else None
    named = [tenant.strip() for tenant in tenants.split(",") if tenant.strip()]
    if service and bool(named) == all_tenants:
        raise typer.BadParameter("a service key takes either --tenants or --all-tenants")
    if not service and (named or all_tenants):
        raise typer.BadParameter("--tenants and --all-tenants need --service")
    if not service and not name:
        raise typer.BadParameter("name the key's tenant, or make a --service key", param_hint="NAME")
    store = open_tenants(loaded.settings)
    if service:
        key = store.create_service_key(None if all_tenants else named, name=label or name, expires_at=expires_at)
    else:
        key = store.create_key(name, name=label, expires_at=expires_at)
    say(f"key {key.id}; it is shown this once")
    print(key.text)


@commands.command("list")
@with_settings(*WHERE)
def list_keys(
    loaded: LoadedSettings,
    tenant: Annotated[str, typer.Option("--tenant", help="Only keys that may act for this tenant.")] = "",
) -> None:
    """Show keys: whose they are and whether they still work, never the keys themselves."""
    now = time.time()
    rows = [
        [
            key.id,
            key.kind,
            "(all)" if key.all_tenants else ",".join(key.tenants),
            key.name,
            moment(key.created_at),
            "revoked" if key.revoked_at else "expired" if key.expires_at and key.expires_at <= now else "works",
            moment(key.expires_at),
        ]
        for key in open_tenants(loaded.settings).list_keys(tenant or None)
    ]
    print_table(["key", "kind", "tenants", "label", "created", "state", "expires"], rows)


@commands.command()
@with_settings(*WHERE)
def revoke(
    loaded: LoadedSettings,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key's id, or the key itself.")],
) -> None:
    """End a key; a running server refuses it within a second."""
    print(open_tenants(loaded.settings).revoke_key(key).id)


def _parse_expiry(text: str, now: float) -> float:
    """A span from now (`30d`) or a moment (ISO 8601; without a zone it is UTC) as Unix seconds."""
    span = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if span:
        return now + int(span[1]) * _UNIT_S[span[2]]
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            "give a span such as 30d, or a moment such as 2030-01-31", param_hint="--expires"
        ) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
