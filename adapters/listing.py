"""What a tenant's listing says of each adapter. Blocks on the store; imports nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.errors import AdapterError
from adapters.importer import Importer
from adapters.manifest import DEFAULT_ALIAS, AdapterManifest
from adapters.records import AdapterRecord, Records


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """One adapter of a listing."""

    name: str
    versions: tuple[int, ...]  # ascending; empty while a plain directory waits for its first use
    aliases: Mapping[str, int] = field(default_factory=dict)
    live: AdapterManifest | None = None
    has_directory: bool = False  # a plain PEFT directory, imported or not
    problem: AdapterError | None = None  # why the directory, as it is now, could not be imported by this process


def summarize_adapters(tenant: str, records: Records, importer: Importer) -> tuple[AdapterSummary, ...]:
    """All of a tenant's adapters by name, plain directories that nobody has asked for yet included."""

    def summarize(record: AdapterRecord) -> AdapterSummary:
        aliases: dict[str, int] = {}
        live: AdapterManifest | None = None
        with contextlib.suppress(AdapterError):  # one damaged record must not hide a tenant's other adapters
            aliases = records.aliases(record)
            live = records.manifest(record, aliases[DEFAULT_ALIAS]) if DEFAULT_ALIAS in aliases else None
        verdict = importer.verdict(record) if record.has_directory else None
        return AdapterSummary(
            record.name,
            tuple(record.versions),
            aliases,
            live,
            has_directory=record.has_directory,
            problem=None if verdict is None else verdict.problem,
        )

    return tuple(records.read_many(summarize, [record for record in records.read_all(tenant) if not record.is_absent]))
