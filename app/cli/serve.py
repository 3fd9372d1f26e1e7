"""`lodger serve`: the server."""

from __future__ import annotations

import sys

import typer

from app.cli.flags import with_settings
from app.settings import Settings
from app.settings_sources import ConfigurationError, LoadedSettings


def register(app: typer.Typer) -> None:
    app.command()(serve)


@with_settings()
def serve(loaded: LoadedSettings) -> None:
    """Serve the base and every tenant's adapters, and train in idle time, until SIGTERM."""
    require_safe_listener(loaded.settings)
    from app.bootstrap import serve as run_server

    sys.exit(run_server(loaded.settings))


def require_safe_listener(settings: Settings) -> None:
    """Raise ConfigurationError rather than open the admin routes to others without a good key."""
    if faults := settings.listening_faults():
        raise ConfigurationError(faults)
