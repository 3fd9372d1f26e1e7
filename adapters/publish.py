"""Publishing: blobs, then the manifest; `aliases` then points to it. Each step is create-only: no crash leaves a half.

A version exists from the moment its manifest does, and whatever that names was stored before. Repeating a publication
(same job, or same plain directory) finds its own manifest and only does what is still missing. Any thread or process.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.checked import CheckedAdapter
from adapters.errors import AdapterConflict, AdapterDigestMismatch, ObjectNotFound
from adapters.manifest import AdapterManifest, BaseModelSpec, FileFact, blob_key, tenant_prefix, version_key
from adapters.records import AdapterRecord, Records
from adapters.store import BlobStore

COLLECT_WAIT_S = 5.0  # for a collector that is at one of our blobs; a crashed one leaves its mark for ever
COLLECT_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Facts:
    """Where a publication comes from; copied into its manifest."""

    source: str  # "upload", "import" or "training"
    renderer_digest: str | None = None
    parent: str | None = None
    job_id: str | None = None
    import_etags: tuple[str, str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def collecting_key(tenant: str, sha256: str) -> str:
    """Present while a collector looks whether the blob is still needed, and until it is gone if not."""
    return f"{tenant_prefix(tenant)}collecting/{sha256}"


class Publisher:
    def __init__(self, store: BlobStore, records: Records, base: BaseModelSpec, wall: Callable[[], float]) -> None:
        self._store = store
        self._records = records
        self._base = base
        self._wall = wall

    def publish(self, tenant: str, name: str, checked: CheckedAdapter, weights: Path, facts: Facts) -> AdapterManifest:
        """Store a version, or return the one that these facts' job or directory has already become."""
        self._records.refuse_erased(tenant)
        record = self._records.read(tenant, name)
        found = self._find_own(record, facts)
        if found is not None:
            return found
        files: list[tuple[FileFact, bytes | Path]] = [
            (checked.config_file, checked.config_bytes),
            (checked.weights, weights),
        ]
        for file, data in files:
            self._store.put_if_absent(blob_key(tenant, file.sha256), data)
        manifest = self._create(record, self._draft(tenant, name, checked, facts))
        for file, data in files:
            self._settle(tenant, file, data)
        try:
            self._records.refuse_erased(tenant)
        except AdapterConflict:  # the eraser passed while we wrote: take our own objects away again
            for key in (version_key(tenant, name, manifest.version), *(blob_key(tenant, f.sha256) for f, _ in files)):
                self._store.delete(key)
            raise
        return manifest

    def _draft(self, tenant: str, name: str, checked: CheckedAdapter, facts: Facts) -> AdapterManifest:
        extra = dict(facts.extra)
        if checked.warnings:
            extra["warnings"] = list(checked.warnings)
        return AdapterManifest(
            tenant=tenant,
            name=name,
            version=0,
            digest=checked.digest,
            config=checked.config_file,
            weights=checked.weights,
            rank=checked.rank,
            applied_modules=len(checked.modules),
            base_id=self._base.id,
            base_digest=self._base.digest,
            created_at=self._wall(),
            source=facts.source,
            renderer_digest=facts.renderer_digest,
            parent=facts.parent,
            job_id=facts.job_id,
            import_etags=facts.import_etags,
            publish_id=uuid.uuid4().hex,
            extra=extra,
        )

    def _create(self, record: AdapterRecord, draft: AdapterManifest) -> AdapterManifest:
        """Write the manifest under the first free number, or return what another writer made of the same job."""
        version = record.highest + 1
        while True:
            manifest = replace(draft, version=version)
            if self._store.put_if_absent(version_key(draft.tenant, draft.name, version), manifest.to_json()):
                return manifest
            there = self._records.manifest_at(draft.tenant, draft.name, version)
            if there is not None:
                if _is_same_publication(there, draft):
                    return there
                version += 1  # a lost race: the next number

    def _find_own(self, record: AdapterRecord, facts: Facts) -> AdapterManifest | None:
        if facts.import_etags is not None:
            newest = self.newest_import(record)
            return newest if newest is not None and newest.import_etags == facts.import_etags else None
        if facts.job_id is None:
            return None
        manifests = self._records.read_many(lambda n: self._records.manifest(record, n), sorted(record.manifests))
        return next((m for m in manifests if m.job_id == facts.job_id), None)

    def newest_import(self, record: AdapterRecord) -> AdapterManifest | None:
        """The last version that a plain directory became for this base, deleted ones apart."""
        for version in reversed(record.versions):
            manifest = self._records.manifest(record, version)
            if manifest.source == "import" and manifest.base_digest == self._base.digest:
                return manifest
        return None

    def _settle(self, tenant: str, file: FileFact, data: bytes | Path) -> None:
        """See to it that a blob which a manifest now names is there, and stays.

        A collector marks a blob before it looks for manifests, and we wrote ours before we look for marks. So either
        it sees the manifest and spares the blob, or we see its mark, wait until it is through, and look ourselves.
        """
        deadline = time.monotonic() + COLLECT_WAIT_S
        while self._has(collecting_key(tenant, file.sha256)) and time.monotonic() < deadline:
            time.sleep(COLLECT_POLL_S)
        try:
            num_bytes = self._store.head(blob_key(tenant, file.sha256)).size
        except ObjectNotFound:
            self._store.put_if_absent(blob_key(tenant, file.sha256), data)
            return
        if num_bytes != file.num_bytes:
            raise AdapterDigestMismatch("The store holds other bytes under this file's digest. Call the operator.")

    def _has(self, key: str) -> bool:
        try:
            self._store.head(key)
        except ObjectNotFound:
            return False
        return True


def _is_same_publication(there: AdapterManifest, draft: AdapterManifest) -> bool:
    return (
        there.publish_id == draft.publish_id
        or (draft.job_id is not None and there.job_id == draft.job_id)
        or (
            draft.import_etags is not None
            and (there.import_etags, there.base_digest) == (draft.import_etags, draft.base_digest)
        )
    )
