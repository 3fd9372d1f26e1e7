"""Taking away: a version, an adapter, the blobs that nothing names any more, a whole tenant. Any thread; blocks.

Deleting a version writes a tombstone beside its manifest, whose number so stays taken. Only blobs, plain directories
and erased tenants are removed for good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Set
from concurrent.futures import ThreadPoolExecutor

from adapters.aliases import Aliases
from adapters.collect import BlobCollector
from adapters.errors import AdapterConflict, AdapterNotFound
from adapters.manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    adapter_prefix,
    canonical_json,
    tenant_prefix,
)
from adapters.records import AdapterRecord, Records, erased_key, tombstone_key
from adapters.store import BlobStore

logger = logging.getLogger(__name__)

NUM_DELETERS = 8
ERASE_BATCH = 1000


class Retirer:
    def __init__(
        self,
        store: BlobStore,
        records: Records,
        aliases: Aliases,
        collector: BlobCollector,
        wall: Callable[[], float],
    ) -> None:
        self._store = store
        self._collector = collector
        self._records = records
        self._aliases = aliases
        self._wall = wall

    def delete_version(self, tenant: str, name: str, version: int) -> None:
        """Raises AdapterNotFound, and AdapterConflict while an alias points to the version."""
        record = self._records.read(tenant, name)
        if version not in record.versions:
            raise AdapterNotFound()
        self._refuse_aliased(record, version)
        manifest = self._records.manifest(record, version)
        if manifest.import_etags is not None and manifest.import_etags == record.etags:
            # Or it would be imported again as the next version.
            self._delete_directory(record)
        self._bury(record, version)
        try:
            # An alias that was set meanwhile wins; whoever sets one looks for a tombstone afterwards, as we do here.
            self._refuse_aliased(self._records.read(tenant, name), version)
        except AdapterConflict:
            self._store.delete(tombstone_key(tenant, name, version))
            raise
        self._collect(tenant, [manifest])

    def delete_adapter(self, tenant: str, name: str) -> None:
        """Delete the directory, every alias and every version. May be repeated. Raises AdapterNotFound."""
        record = self._records.read(tenant, name)
        if record.is_absent:
            raise AdapterNotFound()
        manifests = self._records.manifests(record)
        if record.has_directory:
            self._delete_directory(record)
        for alias in record.revisions:
            self._aliases.delete(tenant, name, alias)
        for version in record.versions:
            self._bury(record, version)
        self._collect(tenant, manifests)

    def erase_tenant(self, tenant: str) -> int:
        """Delete everything below the tenant's prefix but a tombstone, which keeps late writers out; return how many.

        May be repeated. A publication under way either sees the tombstone and takes its own objects away, or its
        objects are seen here.
        """
        tombstone = erased_key(tenant)
        self._store.put_if_absent(tombstone, canonical_json({"schema": 1, "at": self._wall()}))
        deleted = 0
        with ThreadPoolExecutor(NUM_DELETERS, "erase") as deleters:
            while True:
                found = self._store.list(tenant_prefix(tenant), limit=ERASE_BATCH)
                keys = [info.key for info in found if info.key != tombstone]
                if not keys:
                    break
                list(deleters.map(self._store.delete, keys))
                deleted += len(keys)
        self._records.forget_tenant(tenant)
        logger.info("tenant erased", extra={"action": "tenant_erased", "tenant": tenant, "objects": deleted})
        return deleted

    def _refuse_aliased(self, record: AdapterRecord, version: int) -> None:
        for alias in sorted(record.revisions):
            revision = self._records.revision(record, alias)
            if revision is not None and revision.version == version:
                raise AdapterConflict(
                    f"The alias {alias} points to version {version}. Point it elsewhere first.", param="version"
                )

    def _bury(self, record: AdapterRecord, version: int) -> None:
        body = canonical_json({"schema": 1, "at": self._wall()})
        self._store.put_if_absent(tombstone_key(record.tenant, record.name, version), body)

    def _delete_directory(self, record: AdapterRecord) -> None:
        """Weights first: what a crash leaves is incomplete and is not imported."""
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            self._store.delete(adapter_prefix(record.tenant, record.name) + name)

    def _collect(self, tenant: str, deleted: Iterable[AdapterManifest]) -> None:
        """Delete the blobs of deleted versions that no other version of the tenant names.

        Files and checkpoints may need one, too: the collector asks. Where the role may not delete, they stay for the
        eraser.
        """
        self._collector.collect(tenant, {sha256 for manifest in deleted for sha256 in manifest.blobs})
        if self._records.is_erased(tenant):  # the eraser may have passed before our tombstones were written
            self.erase_tenant(tenant)

    def named_blobs(self, tenant: str, asked: Set[str]) -> Set[str]:
        """Those of `asked` that any version of the tenant's adapters names."""
        named: set[str] = set()
        for record in self._records.read_all(tenant):
            for manifest in self._records.manifests(record):
                named |= manifest.blobs
        return named & asked
