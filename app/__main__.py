"""`lodger`, also `python -m app`: puts the commands together and turns errors into exit codes.

0 done (a server: drained) · 1 refused, and stderr says why · 2 usage · 70 watchdog or integrity · 78 configuration.
Nothing heavy is imported here or in `app.cli`: each command imports what it needs when it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import version

import typer

from adapters.errors import AdapterError, StoreError
from app.cli import adapters, config, demo, doctor, keys, serve, tenants
from app.errors import LodgerError
from app.settings_sources import ConfigurationError

EXIT_REFUSED, EXIT_CONFIGURATION = 1, 78
OPTIONAL = ("worker", "train", "plan", "merge", "bench")  # their modules bring dependencies of their own


def build_app() -> typer.Typer:
    """Every command of this installation."""
    app = typer.Typer(
        name="lodger",
        help="One NF4 base model, every tenant's LoRA adapter served on it in one mixed batch, and trained on it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    for module in (serve, demo, tenants, keys, adapters, config, doctor):
        module.register(app)
    for name in OPTIONAL:
        if importlib.util.find_spec(f"app.cli.{name}") is not None:
            importlib.import_module(f"app.cli.{name}").register(app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lodger {version('lodger')}")
        raise typer.Exit


def _root(
    wanted: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """The program's own options."""


def main() -> None:
    try:
        build_app()()
    except ConfigurationError as exc:
        _end(EXIT_CONFIGURATION, *exc.faults)
    except LodgerError as exc:
        _end(EXIT_REFUSED, exc.message)
    except AdapterError as exc:
        _end(EXIT_REFUSED, f"{exc.code}: {exc.message}" + (f" [{exc.param}]" if exc.param else ""))
    except StoreError as exc:
        _end(EXIT_REFUSED, f"store: {exc}")


def _end(code: int, *lines: str) -> None:
    for line in lines:
        print(f"lodger: {line}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main()
