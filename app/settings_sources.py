"""Where settings come from: flags, environment, TOML file. Finds unknown names, says which value came from where.

Runs once at start, in the main thread. Errors name the setting the way its user wrote it.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from app.settings import PREFIX, Settings

FIELDS = tuple(Settings.model_fields)
_SERVICE_LINK = (
    "; in Kubernetes a Service called lodger sets such variables: use another name or `enableServiceLinks: false`"
)


class ConfigurationError(Exception):
    """The settings cannot be used; each line of the message is one fault. Exit code 78."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, and for each field where its value came from: `--flag`, `LODGER_X`, the file's name, or `default`."""

    settings: Settings
    sources: Mapping[str, str]


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    return PREFIX + field.upper()


def load_settings(flags: Mapping[str, Any] | None = None) -> LoadedSettings:
    """Read flags (field name -> text or value), the environment and the TOML file. Raises ConfigurationError."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    in_env = {name: variable_of(name) for name in FIELDS if _variable(name)}
    config = given.get("config") or _variable("config")
    in_file = _read_keys(Path(config).expanduser()) if config else frozenset()
    faults = _unknown("setting", given, FIELDS) + _unknown_variables() + _unknown(f"line in {config}", in_file, FIELDS)
    if faults:
        raise ConfigurationError(faults)
    sources = {
        name: flag_of(name) if name in given
        else in_env[name] if name in in_env
        else str(config) if name in in_file
        else "default"
        for name in FIELDS
    }  # fmt: skip
    try:
        return LoadedSettings(Settings(**given), sources)
    except ValidationError as exc:
        raise ConfigurationError(_say(exc, sources)) from None


def _variable(field: str) -> str:
    """The field's variable, matched in any case as pydantic-settings does; empty counts as unset."""
    wanted = variable_of(field)
    return next((value for name, value in os.environ.items() if name.upper() == wanted), "")


def _unknown_variables() -> list[str]:
    names = [name for name, value in os.environ.items() if name.upper().startswith(PREFIX) and value]
    known = [variable_of(name) for name in FIELDS]
    hints = {name: _SERVICE_LINK for name in names if "_PORT_" in name or "_SERVICE_" in name}
    return [fault + hints.get(name, "") for name in names for fault in _unknown("variable", [name], known)]


def _unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """One line for each name that is not known, with the nearest known one."""
    known = list(known)
    accepted = {name.upper() for name in known} if kind == "variable" else set(known)
    faults = []
    for name in names:
        if (name.upper() if kind == "variable" else name) in accepted:
            continue
        bare = {entry.removeprefix(PREFIX).lower(): entry for entry in known}
        near = difflib.get_close_matches(name.upper().removeprefix(PREFIX).lower(), bare, n=1)
        faults.append(f"unknown {kind}: {name}" + (f"; did you mean {bare[near[0]]}?" if near else ""))
    return faults


def _read_keys(path: Path) -> frozenset[str]:
    try:
        return frozenset(tomllib.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError([f"cannot read the configuration file {path}: {exc}"]) from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError([f"{path} is no TOML: {exc}"]) from None


def _say(error: ValidationError, sources: Mapping[str, str]) -> list[str]:
    """One line per fault; the value itself is never repeated, since it may be a secret."""
    faults = []
    for fault in error.errors(include_input=False, include_url=False):
        message = fault["msg"].removeprefix("Value error, ")
        field = str(fault["loc"][0]) if fault["loc"] else ""
        source = sources.get(field, "default")
        where = "" if not field else f"{variable_of(field) if source == 'default' else _spell(field, source)}: "
        link = _SERVICE_LINK if (os.environ.get(variable_of(field)) or "").startswith("tcp://") else ""
        faults.append(f"{where}{message}{link}")
    return faults


def _spell(field: str, source: str) -> str:
    return source if source.startswith(("--", PREFIX)) else f"{field} in {source}"


def shown_value(settings: Settings, field: str) -> str:
    """A field's value as text for people: secrets and a URL's password are masked."""
    value = getattr(settings, field)
    if isinstance(value, SecretStr):
        return "********"
    if field == "database_url":
        return mask_password(str(value))
    return (
        ""
        if value is None
        else str(int(value))
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
    )


def mask_password(url: str) -> str:
    """`postgresql://user:secret@host/db` -> `postgresql://user:********@host/db`; also a `password=` in the query."""
    scheme, separator, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    if at and ":" in credentials:
        rest = f"{credentials.partition(':')[0]}:********@{place}"
    head, mark, query = rest.partition("?")
    parts = ["password=********" if part.lower().startswith("password=") else part for part in query.split("&")]
    return f"{scheme}{separator}{head}{mark}{'&'.join(parts)}"
