"""A plain PEFT directory that somebody copied into the store becomes a version, at first use and when its ETags change.

The directory stays where it is and is never written to. Blocks on the store; any thread.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapters.aliases import new_revision
from adapters.checked import CheckedAdapter, DoorLimits
from adapters.errors import (
    AdapterConfigTooLarge,
    AdapterError,
    AdapterFileMissing,
    AdapterFormatUnsupported,
    AdapterTooLarge,
    AdapterUnavailable,
    ObjectNotFound,
    ObjectTooLarge,
    StoreError,
)
from adapters.manifest import CONFIG_FILE, DEFAULT_ALIAS, WEIGHTS_FILE, AdapterManifest, BaseModelSpec, adapter_prefix
from adapters.publish import Facts, Publisher
from adapters.records import AdapterRecord, AliasRevision, Records
from adapters.remembered import KeyedLocks
from adapters.store import BlobStore

logger = logging.getLogger(__name__)

MAX_READS = 3  # of a pair that changes while it is read
SCRATCH_MAX_AGE_S = 24 * 3600.0
_SCRATCH_PREFIX = "import-"
_FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".ckpt")


class CheckAdapter(Protocol):
    """The door. Raises a subclass of AdapterRefused."""

    def __call__(self, config: bytes, weights: Path, base: BaseModelSpec, limits: DoorLimits) -> CheckedAdapter: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a directory as it was with these ETags."""

    etags: tuple[str, ...]
    problem: AdapterError | None
    until: float  # monotonic; the store's troubles pass, a refused pair stays refused


class Importer:
    def __init__(
        self,
        store: BlobStore,
        records: Records,
        publisher: Publisher,
        *,
        base: BaseModelSpec,
        limits: DoorLimits,
        check: CheckAdapter,
        scratch: Path,
        clock: Callable[[], float],
        wall: Callable[[], float],
        retry_s: float,
        capacity: int,
    ) -> None:
        self._store = store
        self._records = records
        self._publisher = publisher
        self._base = base
        self._limits = limits
        self._check = check
        self._scratch = scratch
        self._clock = clock
        self._wall = wall
        self._retry_s = retry_s
        self._capacity = capacity
        self._locks: KeyedLocks[tuple[str, str]] = KeyedLocks()
        self._verdicts: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._lock = threading.Lock()
        scratch.mkdir(parents=True, exist_ok=True)
        _sweep(scratch)

    def verdict(self, record: AdapterRecord) -> Verdict | None:
        """What this process found of the directory as listed; None when it has yet to be looked at."""
        with self._lock:
            verdict = self._verdicts.get((record.tenant, record.name))
        if verdict is None or verdict.etags != _seen(record) or self._clock() >= verdict.until:
            return None
        return verdict

    def is_busy(self, record: AdapterRecord) -> bool:
        """True while some thread imports this adapter."""
        return self._locks.is_busy((record.tenant, record.name))

    def settle(self, record: AdapterRecord) -> None:
        """Have a verdict on the directory, whatever it is. One thread looks, the others wait for it."""
        with contextlib.suppress(AdapterError, StoreError), self._locks.alone((record.tenant, record.name)):
            if self.verdict(record) is None:
                self._bring_in(record)

    def bring_in(self, record: AdapterRecord) -> AdapterManifest:
        """Make the directory a version unless it is one, and let `live` follow it. Needs `record.has_directory`.

        Raises AdapterRefused, AdapterUnavailable while the files are still being copied, and StoreErrors.
        """
        with self._locks.alone((record.tenant, record.name)):
            return self._bring_in(record)

    def _bring_in(self, record: AdapterRecord) -> AdapterManifest:
        etags = _seen(record)
        try:
            newest = self._publisher.newest_import(record)
            if newest is None or newest.import_etags != record.etags:
                newest, etags = self._import(record)
            self._follow(newest)
        except (AdapterUnavailable, StoreError) as exc:
            problem = exc if isinstance(exc, AdapterError) else AdapterUnavailable()
            self._remember(record, Verdict(etags, problem, self._clock() + self._retry_s))
            raise
        except AdapterError as exc:
            self._remember(record, Verdict(etags, exc, math.inf))
            logger.warning(
                "plain adapter directory refused",
                extra={"action": "import_refused", "tenant": record.tenant, "adapter": record.name, "code": exc.code},
            )
            raise
        self._remember(record, Verdict(etags, None, math.inf))
        return newest

    def _remember(self, record: AdapterRecord, verdict: Verdict) -> None:
        with self._lock:
            self._verdicts[(record.tenant, record.name)] = verdict
            self._verdicts.move_to_end((record.tenant, record.name))
            if len(self._verdicts) > self._capacity:
                self._verdicts.popitem(last=False)

    def _import(self, record: AdapterRecord) -> tuple[AdapterManifest, tuple[str, str]]:
        self._refuse_incomplete(record)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=self._scratch) as scratch:
            weights = Path(scratch) / WEIGHTS_FILE
            config, etags = self._read_pair(record, weights)
            checked = self._check(config, weights, self._base, self._limits)
            facts = Facts("import", import_etags=etags)
            manifest = self._publisher.publish(record.tenant, record.name, checked, weights, facts)
        logger.info(
            "plain adapter directory imported",
            extra={
                "action": "imported",
                "tenant": record.tenant,
                "adapter": manifest.label,
                "warnings": list(checked.warnings),
            },
        )
        return manifest, etags

    def _refuse_incomplete(self, record: AdapterRecord) -> None:
        if WEIGHTS_FILE not in record.files and any(name.endswith(_FOREIGN_WEIGHTS) for name in record.files):
            raise AdapterFormatUnsupported(param=WEIGHTS_FILE)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if name not in record.files:
                raise AdapterFileMissing(
                    f"{name} is missing or is not a plain file. An adapter is {CONFIG_FILE} and {WEIGHTS_FILE}.",
                    param=name,
                )

    def _read_pair(self, record: AdapterRecord, weights: Path) -> tuple[bytes, tuple[str, str]]:
        """Read both files such that neither changed from before the first byte until after the last."""
        prefix = adapter_prefix(record.tenant, record.name)
        for _ in range(MAX_READS):
            try:
                before = self._etags(prefix)
                config = self._read_config(prefix)
                etag = self._fetch_weights(prefix, weights)
                after = self._etags(prefix)
            except ObjectNotFound as exc:
                raise AdapterFileMissing() from exc
            if before == after and after[1] == etag:
                return config, after
        raise AdapterUnavailable("The adapter's files are still being copied. Try again shortly.")

    def _etags(self, prefix: str) -> tuple[str, str]:
        return self._store.head(prefix + CONFIG_FILE).etag, self._store.head(prefix + WEIGHTS_FILE).etag

    def _read_config(self, prefix: str) -> bytes:
        try:
            return self._store.get(prefix + CONFIG_FILE, max_bytes=self._limits.max_config_bytes)
        except ObjectTooLarge as exc:
            raise AdapterConfigTooLarge(param=CONFIG_FILE) from exc

    def _fetch_weights(self, prefix: str, weights: Path) -> str:
        try:
            cap = self._limits.weights_cap(self._base)
            return self._store.download(prefix + WEIGHTS_FILE, weights, max_bytes=cap).etag
        except ObjectTooLarge as exc:
            raise AdapterTooLarge(param=WEIGHTS_FILE) from exc

    def _follow(self, manifest: AdapterManifest) -> None:
        """Move `live` to an import, if it is unset or stood on an import, and nobody has decided otherwise since."""
        stays_on: int | None = None

        def decide(record: AdapterRecord, newest: AliasRevision | None) -> AliasRevision | None:
            nonlocal stays_on
            if manifest.version in record.deleted or (newest is not None and newest.settled >= manifest.version):
                return None
            target = self._records.target(record, DEFAULT_ALIAS)
            if target is not None and self._records.manifest(record, target).source != "import":
                stays_on = target
                return None
            return draft

        draft = new_revision(manifest.version, manifest.version, "import", self._wall)
        self._records.append(manifest.tenant, manifest.name, DEFAULT_ALIAS, decide)
        if stays_on is not None:
            logger.warning(
                "the directory was imported, but live stays on a published version: point live at the import by hand",
                extra={
                    "action": "import_not_live",
                    "tenant": manifest.tenant,
                    "adapter": manifest.label,
                    "live_version": stays_on,
                },
            )


def _seen(record: AdapterRecord) -> tuple[str, ...]:
    """What tells one state of the directory from another, an incomplete one included."""
    if record.etags is not None:
        return record.etags
    return tuple(sorted(f"{name} {info.etag}" for name, info in record.files.items()))


def _sweep(scratch: Path) -> None:
    """Remove what crashed imports left; processes that share the directory may be importing now."""
    oldest = time.time() - SCRATCH_MAX_AGE_S
    for entry in os.scandir(scratch):
        with contextlib.suppress(FileNotFoundError):
            if entry.name.startswith(_SCRATCH_PREFIX) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                shutil.rmtree(entry.path, ignore_errors=True)
