"""Deletes blobs that nobody needs any more. Several kinds of records name a tenant's blobs: each says what it needs.

A blob is marked before anybody is asked. Whoever begins to need one writes the record that names it first, then waits
for the mark to go, then looks whether the blob is there still: so either the record is seen or the blob put again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Set

from adapters.errors import ObjectNotFound, StoreDenied
from adapters.manifest import blob_key
from adapters.publish import collecting_key
from adapters.store import BlobStore

logger = logging.getLogger(__name__)

MARK_POLL_S = 0.05
MARK_WAIT_S = 10.0  # a mark that stays longer was left behind by a crash

Need = Callable[[str, Set[str]], Set[str]]  # tenant, digests -> those of them that are needed


class BlobCollector:
    """One per process. Any thread; blocks."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._needs: list[Need] = []

    def ask(self, need: Need) -> None:
        """Ask `need` from now on, before any blob is deleted."""
        self._needs.append(need)

    def collect(self, tenant: str, blobs: Iterable[str]) -> None:
        """Delete those of `blobs` (sha256) that nobody needs. Where the role may not delete, they stay."""
        mine = {sha256 for sha256 in blobs if self._store.put_if_absent(collecting_key(tenant, sha256), b"")}
        try:
            needed: set[str] = set()
            for need in self._needs:
                needed |= need(tenant, mine)
            for sha256 in mine - needed:
                self._store.delete(blob_key(tenant, sha256))
        except StoreDenied:
            logger.warning(
                "blobs that nobody needs stay: this role may not delete",
                extra={"action": "collect_denied", "tenant": tenant, "blobs": len(mine)},
            )
        finally:
            with contextlib.suppress(StoreDenied):
                for sha256 in mine:
                    self._store.delete(collecting_key(tenant, sha256))

    def is_kept(self, tenant: str, sha256: str) -> bool:
        """For whoever has just written a record that names the blob: True when it is there and stays."""
        until = time.monotonic() + MARK_WAIT_S
        while self._has(collecting_key(tenant, sha256)) and time.monotonic() < until:
            time.sleep(MARK_POLL_S)
        return self._has(blob_key(tenant, sha256))

    def _has(self, key: str) -> bool:
        try:
            self._store.head(key)
        except ObjectNotFound:
            return False
        return True
