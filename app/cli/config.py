"""`lodger config print`: every setting, its value and where that came from; secrets are masked."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.flags import with_settings
from app.cli.output import print_table
from app.settings import Settings
from app.settings_sources import FIELDS, LoadedSettings, shown_value

commands = typer.Typer(help="Look at the settings.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="config")


@commands.command("print")
@with_settings()
def print_settings(
    loaded: LoadedSettings,
    describe: Annotated[bool, typer.Option("--describe", help="Add what each setting means.")] = False,
) -> None:
    """Print each setting, its value, and which of flag, variable, file or default it came from."""
    rows = []
    for name in FIELDS:
        row = [name, shown_value(loaded.settings, name), loaded.sources[name]]
        rows.append([*row, Settings.model_fields[name].description or ""] if describe else row)
    print_table(["setting", "value", "from", *(["meaning"] if describe else [])], rows)
