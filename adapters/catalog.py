"""A tenant's adapters by name: resolve, publish, list, alias, roll back, delete, erase.

Names are pointers; what they point to is an immutable version, and every request is resolved to one at its edge. What
was read is used for 15 s, and for a day while the store fails. The rest lives next door: `records` (what the store
says), `publish`, `aliases`, `importer` (plain directories), `listing`, `retire`. Any thread; all but `peek` may block.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters.aliases import Aliases
from adapters.catalog_names import check_names, version_of
from adapters.checked import DoorLimits
from adapters.collect import BlobCollector
from adapters.door import check_adapter, check_base
from adapters.errors import (
    AdapterError,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterUnavailable,
    StoreError,
)
from adapters.importer import CheckAdapter, Importer
from adapters.listing import AdapterSummary, summarize_adapters
from adapters.manifest import (
    DEFAULT_ALIAS,
    TENANT_PATTERN,
    AdapterManifest,
    BaseModelSpec,
    is_adapter_name,
)
from adapters.publish import Facts, Publisher
from adapters.records import AdapterRecord, AliasRevision, Records
from adapters.remembered import Lifetimes, Reading, Remembered
from adapters.retire import Retirer
from adapters.store import BlobStore

logger = logging.getLogger(__name__)

RECHECK_S = 1.0  # how old a listing may be that denies a version or alias of an adapter which is there

Key = tuple[str, str]  # tenant, name


# Named, since inside a class with a method `list` the word no longer means the type.
Summaries = list[AdapterSummary]
Manifests = list[AdapterManifest]
Revisions = list[AliasRevision]


class AdapterCatalog:
    """The catalog of all tenants. Whoever calls has authorised the tenant; nothing here is shared between tenants."""

    def __init__(
        self,
        store: BlobStore,
        base: BaseModelSpec,
        limits: DoorLimits,
        *,
        scratch: Path,
        check: CheckAdapter = check_adapter,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        pointer_ttl_s: float = 15.0,
        absent_ttl_s: float = 10.0,
        stale_ttl_s: float = 86_400.0,
        retry_s: float = 2.0,
        capacity: int = 10_000,
    ) -> None:
        """Of the times, `retry_s` passes before a failing store or a refused directory is looked at again.

        `scratch` takes files while they are checked. `capacity` bounds the adapters remembered, of all tenants.
        """
        times = Lifetimes(pointer_ttl_s, absent_ttl_s, stale_ttl_s, retry_s)
        self._base = base
        self._limits = limits
        self._check = check
        self._clock = clock
        self._retry_s = retry_s
        self._records = Records(store, capacity=2 * capacity)
        self._aliases = Aliases(self._records, wall)
        self._publisher = Publisher(store, self._records, base, wall)
        self.collector = BlobCollector(store)  # asks whoever else names blobs before one is deleted
        self._retirer = Retirer(store, self._records, self._aliases, self.collector, wall)
        self.collector.ask(self._retirer.named_blobs)
        self._importer = Importer(
            store,
            self._records,
            self._publisher,
            base=base,
            limits=limits,
            check=check,
            scratch=scratch,
            clock=clock,
            wall=wall,
            retry_s=retry_s,
            capacity=capacity,
        )
        self._adapters: Remembered[Key, AdapterRecord] = Remembered(
            self._read_adapter,
            is_absent=lambda record: record.is_absent,
            lifetimes=times,
            capacity=capacity,
            clock=clock,
        )
        self._listings: Remembered[str, tuple[AdapterSummary, ...]] = Remembered(
            self._read_listing,
            is_absent=lambda summaries: not summaries,
            lifetimes=times,
            capacity=max(1, capacity // 10),
            clock=clock,
        )

    @property
    def num_stale_served(self) -> int:
        """How often an answer was older than it should be because the store failed."""
        return self._adapters.num_stale_served + self._listings.num_stale_served

    # Reading

    def resolve(self, tenant: str, name: str, selector: str | None = None) -> AdapterManifest:
        """Return the version that `name@selector` means now; the selector is an alias, `v3`, or None for `live`.

        Imports a plain directory that is new or has changed. While a changed one is being imported, or when it is
        refused, whatever `live` points to goes on being served. Blocks unless known. Raises AdapterNotFound,
        AdapterRefused and AdapterUnavailable.
        """
        if TENANT_PATTERN.fullmatch(tenant) is None or not is_adapter_name(name):
            raise AdapterNotFound()
        with _store_errors_translated():
            manifest, record = self._look_up((tenant, name), selector, None)
            if manifest is None and not record.is_absent:
                # Another process may have published it since: a short look before we deny it.
                manifest, record = self._look_up((tenant, name), selector, self._clock() - RECHECK_S)
            if manifest is None:
                verdict = self._importer.verdict(record) if record.has_directory else None
                if verdict is not None and verdict.problem is not None:
                    raise copy.copy(verdict.problem)
                raise AdapterNotFound()
            check_base(manifest, self._base)
            return manifest

    def peek(self, tenant: str, name: str, selector: str | None = None) -> AdapterManifest | None:
        """What `resolve` would say, if that is known and fresh; never blocks. None says nothing about the adapter."""
        record = self._adapters.peek((tenant, name))
        if record is None or (record.has_directory and self._importer.verdict(record) is None):
            return None
        version = version_of(selector)
        if version is None:
            version = self._records.kept_target(record, selector or DEFAULT_ALIAS)
        manifest = None if version is None else self._records.kept_manifest(record, version)
        return manifest if manifest is not None and manifest.base_digest == self._base.digest else None

    def is_due(self, tenant: str, name: str) -> bool:
        """True, to one caller, when what `peek` tells will soon be too old: call `refresh` meanwhile. Never blocks."""
        return self._adapters.is_due((tenant, name))

    def refresh(self, tenant: str, name: str, selector: str | None = None) -> None:
        """Look into the store again before anybody has to wait for that. Raises what `resolve` raises."""
        with _store_errors_translated():
            self._adapters.reread((tenant, name))
            self._look_up((tenant, name), selector, None)  # imports a plain directory that has changed

    def list(self, tenant: str) -> Summaries:
        """All adapters of a tenant by name, plain directories that nobody has asked for yet included."""
        if TENANT_PATTERN.fullmatch(tenant) is None:
            return []
        with _store_errors_translated():
            return [*self._listings.get(tenant).value]

    def versions(self, tenant: str, name: str) -> Manifests:
        """An adapter's versions, oldest first; none for an adapter that does not exist. Imports nothing."""
        with _store_errors_translated():
            record = self._record(tenant, name)
            return [] if record is None else self._records.manifests(record)

    def aliases(self, tenant: str, name: str) -> dict[str, int]:
        """What each alias points to."""
        with _store_errors_translated():
            record = self._record(tenant, name)
            return {} if record is None else self._records.aliases(record)

    def alias_history(self, tenant: str, name: str, alias: str = DEFAULT_ALIAS) -> Revisions:
        """Every entry of an alias, oldest first. Raises AdapterNotFound if it never was."""
        check_names(tenant, name, self._base, alias)
        with _store_errors_translated():
            history = self._records.history(tenant, name, alias)
            if not history:
                raise AdapterNotFound()
            return history

    # Publishing

    def publish(
        self,
        tenant: str,
        name: str,
        config: bytes,
        weights: Path,
        *,
        alias: str | None = DEFAULT_ALIAS,
        source: str,
        job_id: str | None = None,
        renderer_digest: str | None = None,
        parent: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> AdapterManifest:
        """Check an adapter, store it as the next version and point `alias` at it.

        With a `job_id` it may be repeated: the same job has one version, and a repeat does what a crash left undone.
        Raises AdapterRefused, AdapterNameInvalid, AdapterUnavailable; AdapterConflict for an erased tenant.
        """
        check_names(tenant, name, self._base, alias)
        checked = self._check(config, weights, self._base, self._limits)
        facts = Facts(source, renderer_digest=renderer_digest, parent=parent, job_id=job_id, extra=extra or {})
        with _store_errors_translated(), self._changing(tenant, name):
            manifest = self._publisher.publish(tenant, name, checked, weights, facts)
            if alias is not None:
                self._aliases.advance(manifest, alias)
            return manifest

    def import_directory(self, tenant: str, name: str) -> AdapterManifest | None:
        """Import the plain directory of that name now, if it has changed; None when there is none."""
        check_names(tenant, name, self._base)
        with _store_errors_translated(), self._changing(tenant, name):
            record = self._records.read(tenant, name)
            return self._importer.bring_in(record) if record.has_directory else None

    # Aliases

    def set_alias(self, tenant: str, name: str, alias: str, version: int, *, expected: int | None = None) -> None:
        """Point an alias at a version.

        With `expected` only if it points to that one now (0: to none), else AdapterConflict. Raises AdapterNotFound.
        """
        check_names(tenant, name, self._base, alias)

        with _store_errors_translated(), self._changing(tenant, name):
            self._aliases.set(tenant, name, alias, version, expected)

    def roll_back(self, tenant: str, name: str, alias: str = DEFAULT_ALIAS) -> AdapterManifest:
        """Point an alias at the version it pointed to before, by a new entry; again, and it goes back one further.

        Raises AdapterNotFound without such an alias, AdapterConflict when there is nothing to go back to.
        """
        check_names(tenant, name, self._base, alias)

        with _store_errors_translated(), self._changing(tenant, name):
            version = self._aliases.roll_back(tenant, name, alias)
            return self._records.manifest(self._records.read(tenant, name), version)

    def delete_alias(self, tenant: str, name: str, alias: str) -> None:
        """Raises AdapterNotFound."""
        check_names(tenant, name, self._base, alias)
        with _store_errors_translated(), self._changing(tenant, name):
            if not self._aliases.delete(tenant, name, alias):
                raise AdapterNotFound()

    # Deleting

    def delete_version(self, tenant: str, name: str, version: int) -> None:
        """Raises AdapterNotFound, and AdapterConflict while an alias points to the version. Its number stays used."""
        check_names(tenant, name, self._base)
        with _store_errors_translated(), self._changing(tenant, name):
            self._retirer.delete_version(tenant, name, version)

    def delete(self, tenant: str, name: str) -> None:
        """Delete an adapter: its plain directory, aliases and versions. Raises AdapterNotFound."""
        check_names(tenant, name, self._base)
        with _store_errors_translated(), self._changing(tenant, name):
            self._retirer.delete_adapter(tenant, name)

    def erase_tenant(self, tenant: str) -> None:
        """Delete everything of a tenant, datasets and results included, for good. May be repeated."""
        if TENANT_PATTERN.fullmatch(tenant) is None:
            raise AdapterNameInvalid("There can be no such tenant.", param="tenant")
        try:
            with _store_errors_translated():
                self._retirer.erase_tenant(tenant)
        finally:
            self._adapters.forget_if(lambda key: key[0] == tenant)
            self._listings.forget(tenant)

    def forget(self, tenant: str, name: str) -> None:
        """Read the adapter anew next time: another process has changed it, and said so."""
        self._adapters.forget((tenant, name))
        self._listings.forget(tenant)

    # Within

    @contextlib.contextmanager
    def _changing(self, tenant: str, name: str) -> Iterator[None]:
        """Whatever comes of a change, what we remembered is no longer to be trusted."""
        try:
            yield
        finally:
            self.forget(tenant, name)

    def _record(self, tenant: str, name: str) -> AdapterRecord | None:
        if TENANT_PATTERN.fullmatch(tenant) is None or not is_adapter_name(name):
            return None
        return self._adapters.get((tenant, name)).value

    def _read_adapter(self, key: Key, last: AdapterRecord | None) -> AdapterRecord:
        """List the adapter, and read what requests will want: `live`, and the aliases in use. Should the store fail
        between the two, the last record stays in force, whose targets are at hand."""
        record = self._records.read(*key)
        for alias in record.revisions:
            if alias == DEFAULT_ALIAS or (last is not None and self._records.kept_target(last, alias) is not None):
                with contextlib.suppress(AdapterError):  # a damaged one is told to whoever asks for it
                    version = self._records.target(record, alias)
                    if version is not None:
                        self._records.manifest(record, version)
        return record

    def _read_listing(self, tenant: str, _: tuple[AdapterSummary, ...] | None) -> tuple[AdapterSummary, ...]:
        return summarize_adapters(tenant, self._records, self._importer)

    def _look_up(
        self, key: Key, selector: str | None, read_since: float | None
    ) -> tuple[AdapterManifest | None, AdapterRecord]:
        reading = self._adapters.get(key, read_since=read_since)
        if reading.value.has_directory and not reading.is_stale and self._importer.verdict(reading.value) is None:
            reading = self._import(key, selector, reading)
        return self._select(reading.value, selector), reading.value

    def _import(self, key: Key, selector: str | None, reading: Reading[AdapterRecord]) -> Reading[AdapterRecord]:
        if self._importer.is_busy(reading.value) and self._select(reading.value, selector) is not None:
            return reading  # what is live is served while another thread imports
        self._importer.settle(reading.value)
        verdict = self._importer.verdict(reading.value)
        if verdict is None or verdict.problem is None:
            self.forget(*key)
            return self._adapters.get(key)
        self._adapters.expire(key, self._retry_s)  # look at the directory again soon
        return reading

    def _select(self, record: AdapterRecord, selector: str | None) -> AdapterManifest | None:
        version = version_of(selector)
        if version is None:
            version = self._records.target(record, selector or DEFAULT_ALIAS)
        return self._records.manifest(record, version) if version in record.versions else None


@contextlib.contextmanager
def _store_errors_translated() -> Iterator[None]:
    """What the store said is for operators; tenants learn that it is not their fault and what to do."""
    try:
        yield
    except StoreError as exc:
        logger.warning("the adapter store failed", extra={"action": "store_failed", "error": str(exc)})
        raise AdapterUnavailable("The adapter store cannot be used now. Try again shortly.") from exc
