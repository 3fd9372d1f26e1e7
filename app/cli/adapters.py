"""`lodger adapters`: check a directory, push, list, alias, export. Works on the store; no server need run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from app.cli.flags import STORES, with_settings
from app.cli.output import moment, print_table, say
from app.settings_sources import LoadedSettings

commands = typer.Typer(help="Check, publish, list, alias and export adapters.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT directory: config and safetensors weights.")]
Tenant = Annotated[str, typer.Argument(metavar="TENANT")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="adapters")


@commands.command()
@with_settings(*STORES, "max_scale", "max_adapter_bytes")
def check(
    loaded: LoadedSettings,
    directory: Directory,
    any_base: Annotated[bool, typer.Option("--any-base", help="Do not compare the base's name in the config.")] = False,
) -> None:
    """Say whether an adapter would be accepted, with the code and the field that a server would name."""
    from adapters.door import check_directory
    from app.cli.catalog import base_spec
    from app.storage import door_limits

    settings = loaded.settings
    base = base_spec(settings)
    found = check_directory(directory, base, door_limits(settings), check_base_name=not any_base)
    for warning in found.warnings:
        say(f"warning: {warning}")
    print(f"accepted: rank {found.rank}, {len(found.modules)} of {len(base.linears)} linears, digest {found.digest}")


@commands.command()
@with_settings(*STORES, "max_scale", "max_adapter_bytes")
def push(
    loaded: LoadedSettings,
    directory: Directory,
    tenant: Tenant,
    name: Name,
    alias: Annotated[str, typer.Option("--alias", help="Points to the new version; empty for none.")] = "live",
) -> None:
    """Publish a directory as the adapter's next version; prints NAME@vN alone on the last line."""
    from adapters.door import check_directory
    from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
    from app.cli.catalog import base_spec, open_catalog
    from app.cli.stores import open_tenants
    from app.storage import door_limits

    settings = loaded.settings
    open_tenants(settings).get(tenant)
    base = base_spec(settings)
    check_directory(directory, base, door_limits(settings))  # symlinks and foreign files, which `publish` does not see
    config = (directory / CONFIG_FILE).read_bytes()
    manifest = open_catalog(settings, base).publish(
        tenant, name, config, directory / WEIGHTS_FILE, alias=alias or None, source="upload"
    )
    say(f"published {tenant}/{manifest.label}, digest {manifest.digest}" + (f", {alias} points to it" if alias else ""))
    print(manifest.label)


@commands.command("list")
@with_settings(*STORES)
def list_adapters(
    loaded: LoadedSettings,
    tenant: Tenant,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Show this adapter's versions.")] = "",
) -> None:
    """Show a tenant's adapters, or one adapter's versions."""
    from app.cli.catalog import named_base, open_catalog

    catalog = open_catalog(loaded.settings, named_base(loaded.settings))
    if not name:
        rows = [
            [entry.name, str(len(entry.versions)), _pointers(entry.aliases), entry.live.digest if entry.live else ""]
            for entry in catalog.list(tenant)
        ]
        print_table(["adapter", "versions", "aliases", "live digest"], rows)
        return
    print_table(
        ["version", "rank", "linears", "source", "created", "digest"],
        [
            [f"v{m.version}", str(m.rank), str(m.applied_modules), m.source, moment(m.created_at), m.digest]
            for m in catalog.versions(tenant, name)
        ],
    )
    say(_pointers(catalog.aliases(tenant, name)))


@commands.command()
@with_settings(*STORES)
def alias(
    loaded: LoadedSettings,
    tenant: Tenant,
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="`live`, or a name of your own.")] = "live",
    version: Annotated[str, typer.Argument(metavar="vN", help="The version it shall point to.")] = "",
    roll_back: Annotated[bool, typer.Option("--roll-back", help="Point to where it pointed before.")] = False,
) -> None:
    """Show an adapter's aliases, point one to a version, or roll it back."""
    from app.cli.catalog import named_base, open_catalog

    if version and roll_back:
        raise typer.BadParameter("give a version or --roll-back, not both")
    catalog = open_catalog(loaded.settings, named_base(loaded.settings))
    if roll_back:
        catalog.roll_back(tenant, name, alias)
    elif version:
        catalog.set_alias(tenant, name, alias, _number(version))
    print_table(["alias", "version"], [[key, f"v{n}"] for key, n in sorted(catalog.aliases(tenant, name).items())])


@commands.command()
@with_settings(*STORES)
def export(
    loaded: LoadedSettings,
    tenant: Tenant,
    name: Annotated[str, typer.Argument(metavar="NAME[@vN|@ALIAS]")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made; must not hold anything yet.")],
) -> None:
    """Write one version as a plain PEFT directory, checked against its digests."""
    from adapters.errors import AdapterDigestMismatch
    from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, blob_key
    from app.cli.catalog import base_spec, open_catalog
    from app.storage import open_store

    bare, _, selector = name.partition("@")
    manifest = open_catalog(loaded.settings, base_spec(loaded.settings)).resolve(tenant, bare, selector or None)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise typer.BadParameter(f"{directory} is not empty", param_hint="DIR")
    store = open_store(loaded.settings)
    for file_name, fact in ((CONFIG_FILE, manifest.config), (WEIGHTS_FILE, manifest.weights)):
        partial = directory / f".{file_name}.partial"
        store.download(blob_key(tenant, fact.sha256), partial, max_bytes=fact.num_bytes)
        with open(partial, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != fact.sha256:
                partial.unlink()
                raise AdapterDigestMismatch(param=file_name)
        os.replace(partial, directory / file_name)
    say(f"wrote {tenant}/{manifest.label}")
    print(directory)


def _number(version: str) -> int:
    digits = version.removeprefix("v")
    if not digits.isdecimal() or int(digits) < 1:
        raise typer.BadParameter("give a version such as v3", param_hint="vN")
    return int(digits)


def _pointers(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias} -> v{version}" for alias, version in sorted(aliases.items()))
