"""From master weights to an adapter that answers: pack, keep as a checkpoint, publish in two phases, hand over.

What is published is what was packed, byte for byte: the host tier gets the very file that the store gets, so that an
answer after the caches were wiped is the answer from before. All calls block; the job's own thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from adapters.catalog import AdapterCatalog
from adapters.checked import CheckedAdapter, DoorLimits
from adapters.door import check_adapter
from adapters.errors import AdapterError, AdapterUnavailable
from adapters.manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterManifest,
    BaseModelSpec,
    blob_key,
)
from adapters.peft_format import peft_config_json, write_weights
from adapters.store import BlobStore
from adapters.weights import HostAdapter, LoraPair, load_host_adapter, read_pairs
from app.training.config import TrainingConfig
from app.training.job import Job, model_name

logger = logging.getLogger(__name__)

SOURCE = "training"
FINE_TUNED_MODEL = "fine_tuned_model"  # in a manifest's `extra`: the immutable id by which clients name the version


class HostTier(Protocol):
    """Where serving finds an adapter at once: `adapters.loader.AdapterLoader`."""

    def put(self, manifest: AdapterManifest, value: HostAdapter, files: tuple[Path, Path] | None = None) -> bool: ...


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as files and as serving wants it. The manifest has no version yet."""

    config: Path
    weights: Path
    checked: CheckedAdapter
    manifest: AdapterManifest
    host: HostAdapter


class AdapterOutput:
    """Turns trained weights into files, blobs and versions."""

    def __init__(
        self,
        *,
        base: BaseModelSpec,
        dtype: torch.dtype,
        catalog: AdapterCatalog,
        store: BlobStore,
        host: HostTier,
        limits: DoorLimits,
        renderer_digest: str,
        pin_memory: bool = False,
    ) -> None:
        self._base, self._dtype, self._catalog, self._store, self._host = base, dtype, catalog, store, host
        self._limits, self._renderer_digest, self._pin_memory = limits, renderer_digest, pin_memory

    def pack(
        self, job: Job, config: TrainingConfig, pairs: Mapping[str, LoraPair], facts: Mapping[str, Any], out: Path
    ) -> PackedAdapter:
        """Write both files into `out`, in the dtype that serving computes in, and put them through the door.

        Raises AdapterRefused, for example when a value is not finite.
        """
        out.mkdir(parents=True, exist_ok=True)
        kinds = tuple(sorted({path.rsplit(".", 1)[1] for path in pairs}))
        peft = AdapterConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=kinds,
            use_rslora=config.use_rslora,
            base_model_name_or_path=self._base.id,
        )
        config_path, weights_path = out / CONFIG_FILE, out / WEIGHTS_FILE
        config_path.write_bytes(peft_config_json(peft))
        write_weights(weights_path, {path: (pair.a, pair.b) for path, pair in pairs.items()}, self._dtype)
        checked = check_adapter(config_path.read_bytes(), weights_path, self._base, self._limits)
        manifest = self._draft(job, checked, facts)
        host = load_host_adapter(
            manifest.ref.key, checked, weights_path, dtype=self._dtype, pin_memory=self._pin_memory
        )
        return PackedAdapter(config_path, weights_path, checked, manifest, host)

    def _draft(self, job: Job, checked: CheckedAdapter, facts: Mapping[str, Any]) -> AdapterManifest:
        return AdapterManifest(
            tenant=job.tenant,
            name=job.adapter_name,
            version=0,
            digest=checked.digest,
            config=checked.config_file,
            weights=checked.weights,
            rank=checked.rank,
            applied_modules=len(checked.modules),
            base_id=self._base.id,
            base_digest=self._base.digest,
            created_at=job.created_at,
            source=SOURCE,
            renderer_digest=self._renderer_digest,
            parent=_parent_digest(job),
            job_id=job.id,
            extra={**facts, FINE_TUNED_MODEL: model_name(self._base.id, job)},
        )

    def warm(self, packed: PackedAdapter, *, with_files: bool = False) -> None:
        """Put it where the next request finds it at once."""
        files = (packed.config, packed.weights) if with_files else None
        self._host.put(packed.manifest, packed.host, files)

    def keep(self, packed: PackedAdapter) -> None:
        """Store the files under their digests, for a checkpoint that is to be prompted. May be repeated."""
        facts = ((packed.checked.config_file, packed.config), (packed.checked.weights, packed.weights))
        for fact, path in facts:
            self._store.put_if_absent(blob_key(packed.manifest.tenant, fact.sha256), path)

    def drop(self, manifests: Sequence[AdapterManifest]) -> None:
        """Delete the files of checkpoints that are listed no more, where nothing else is made of them."""
        for manifest in manifests:
            self._catalog.collector.collect(manifest.tenant, manifest.blobs)

    def publish(self, job: Job, packed: PackedAdapter, *, alias: str | None) -> AdapterManifest:
        """Store it as the job's one version and point `alias` at it, if any. May be repeated by the same job."""
        manifest = packed.manifest
        return self._catalog.publish(
            manifest.tenant,
            manifest.name,
            packed.checked.config_bytes,
            packed.weights,
            alias=alias,
            source=SOURCE,
            job_id=job.id,
            renderer_digest=self._renderer_digest,
            parent=manifest.parent,
            extra=manifest.extra,
        )

    def published(self, packed: PackedAdapter, manifest: AdapterManifest) -> PackedAdapter:
        return replace(packed, manifest=manifest)

    def retract(self, manifest: AdapterManifest) -> None:
        """Take a version away that its job may not have: it was cancelled while this worker was stopped."""
        try:
            self._catalog.delete_version(manifest.tenant, manifest.name, manifest.version)
        except AdapterError:
            logger.warning("version not retracted", extra={"action": "retract_failed", "adapter": manifest.label})

    def current(self, job: Job) -> AdapterManifest | None:
        """The version that the job's alias points to now; None without one for this base."""
        try:
            return self._catalog.resolve(job.tenant, job.adapter_name, job.spec.publish.alias)
        except AdapterUnavailable:
            raise
        except AdapterError:  # not found, or made for another base
            return None

    def fetch(self, manifest: AdapterManifest, scratch: Path) -> dict[str, LoraPair]:
        """Another adapter's factors in fp32, by path. Raises StoreError, AdapterRefused."""
        directory = scratch / f"fetched-{manifest.digest[:12]}"
        directory.mkdir(parents=True, exist_ok=True)
        weights = directory / WEIGHTS_FILE
        config = self._store.get(
            blob_key(manifest.tenant, manifest.config.sha256), max_bytes=self._limits.max_config_bytes
        )
        key = blob_key(manifest.tenant, manifest.weights.sha256)
        self._store.download(key, weights, max_bytes=manifest.weights.num_bytes)
        checked = check_adapter(config, weights, self._base, self._limits)
        if checked.weights != manifest.weights:
            raise AdapterUnavailable("The stored bytes of the adapter are not those that were published.")
        return read_pairs(checked, weights)


def parent_of(job: Job) -> AdapterManifest | None:
    """The adapter version that the job continues from."""
    return None if job.spec.parent is None else AdapterManifest.from_dict(job.spec.parent)


def _parent_digest(job: Job) -> str | None:
    parent = parent_of(job)
    return None if parent is None else parent.digest
