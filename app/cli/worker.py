"""`lodger worker`: trains jobs on a machine of its own."""

from __future__ import annotations

import sys

import typer

from app.cli.flags import with_settings
from app.settings_sources import LoadedSettings


def register(app: typer.Typer) -> None:
    app.command()(worker)


@with_settings()
def worker(loaded: LoadedSettings) -> None:
    """Validate and train jobs until SIGTERM, without HTTP. Needs the servers' store and database, and the same base."""
    from app.worker import run_worker

    sys.exit(run_worker(loaded.settings))
