"""`lodger demo`: the server with a tenant, a key and a command to paste."""

from __future__ import annotations

import contextlib
import json
import sys

import typer

from app.cli.flags import with_settings
from app.cli.serve import require_safe_listener
from app.cli.stores import open_tenants
from app.settings_sources import LoadedSettings

TENANT = "demo"
QUESTION = "Write one sentence about the sea."


def register(app: typer.Typer) -> None:
    app.command()(demo)


@with_settings()
def demo(loaded: LoadedSettings) -> None:
    """Serve with a demo tenant: makes it a new key at each start, prints that once, and how to use it."""
    from app.tenants import TenantExists

    settings = loaded.settings
    require_safe_listener(settings)
    tenants = open_tenants(settings)
    with contextlib.suppress(TenantExists):
        tenants.create(TENANT)
    key = tenants.create_key(TENANT, name="made by lodger demo").text

    def tell(url: str) -> None:
        print(
            f"\nLodger serves {settings.base_id} at {url}\nA key of the tenant {TENANT}, shown this once:\n\n  {key}\n"
        )
        print(f"Ask something:\n\n{curl_line(url, key, settings.base_id)}\n", flush=True)

    from app.bootstrap import serve as run_server

    sys.exit(run_server(settings, on_ready=tell))


def curl_line(url: str, key: str, model: str) -> str:
    """A command that works in any POSIX shell as it is."""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64, "temperature": 0}
    )
    return (
        f"curl -s {url}/v1/chat/completions -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )
