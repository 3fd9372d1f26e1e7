"""Which adapters lie in the rank pool: joins the pool's book-keeping, its tensors and the loader.

The scheduler asks it for leases; it never blocks: an adapter that is not in memory is asked for and arrives later
through the engine's inbox. Engine thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapters.errors import AdapterError, AdapterQuarantined, AdapterRefused
from adapters.layers import PoolTensors
from adapters.manifest import AdapterManifest
from adapters.rank_pool import RankPool
from adapters.weights import HostAdapter
from app.engine.model_runner import ResidentRows
from app.engine.scheduler import Acquired, Lease
from app.engine.snapshot import STEP_BUCKETS_S, HistogramBuilder

Key = tuple[str, str]
MAX_PARKED = 4


class Loader(Protocol):
    """The part of `AdapterLoader` that the engine thread uses. No call blocks."""

    def host(self, manifest: AdapterManifest) -> HostAdapter | None: ...

    def want(self, manifest: AdapterManifest, on_done: OnDone) -> None: ...

    def quarantine(self, key: Key) -> None: ...


OnDone = Callable[[AdapterManifest, HostAdapter | None, AdapterError | None, str], None]


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a fetch came to; posted by a loader thread into the engine's inbox."""

    manifest: AdapterManifest
    adapter: HostAdapter | None
    error: AdapterError | None
    tier: str  # "host", "disk" or "s3"

    @property
    def key(self) -> Key:
        return (self.manifest.tenant, self.manifest.digest)


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter in the pool, as the snapshot shows it."""

    key: Key
    label: str
    rank: int
    leases: int
    pinned: bool


class Residency:
    """Leases rows to sequences. Invariant: an adapter is known here exactly while it has rows in the pool."""

    def __init__(
        self,
        pool: RankPool,
        tensors: PoolTensors,
        loader: Loader,
        post: Callable[[Arrival], None],
        *,
        placements_per_step: int = 2,
    ) -> None:
        self.pool = pool
        self._tensors = tensors
        self._loader = loader
        self._post = post
        self._linears: dict[Key, int] = {}
        self._manifests: dict[Key, AdapterManifest] = {}
        self._fetching: set[Key] = set()
        self._quarantined: set[Key] = set()
        # Fetched, and neither in the pool (no room) nor in the host tier (larger than its budget allows): kept here for
        # whoever waits, or it would be fetched again and again.
        self._parked: dict[Key, HostAdapter] = {}
        # Copying an adapter into the pool takes some milliseconds that every running sequence waits for.
        self._placements_per_step = placements_per_step
        self._placements_left = placements_per_step
        self._is_torn = False
        self.placements = 0
        self.place_seconds = HistogramBuilder(STEP_BUCKETS_S)

    def new_step(self) -> None:
        self._placements_left = self._placements_per_step

    def acquire(self, manifest: AdapterManifest, now: float) -> Acquired:
        """Lease the adapter's rows if it is or can be made resident now; else say why not and ask for it."""
        key = (manifest.tenant, manifest.digest)
        if key in self._quarantined:
            return Acquired(Lease.FAILED, error=AdapterQuarantined())
        if self.pool.lease(key) is not None:
            return Acquired(Lease.READY, tier="pool")
        if not self.pool.fits(manifest.rank):
            return Acquired(Lease.FAILED, error=self._too_large(manifest))
        if key in self._fetching:
            return Acquired(Lease.FETCHING)
        host = self._parked.get(key) or self._loader.host(manifest)
        if host is None:
            self._fetch(key, manifest)
            return Acquired(Lease.FETCHING)
        if self._placements_left <= 0:
            return Acquired(Lease.FETCHING)  # it is here, and its turn is the next step
        if not self._place(key, manifest, host):
            return Acquired(Lease.NO_ROOM)
        leased = self.pool.lease(key)
        assert leased is not None
        return Acquired(Lease.READY, tier="host")

    def prefetch(self, manifest: AdapterManifest) -> None:
        """Begin to fetch what a queued request will want: a full batch is no reason to find the adapter cold later."""
        key = (manifest.tenant, manifest.digest)
        if key in self._quarantined or key in self._fetching or self.pool.extent_of(key) is not None:
            return
        if self.pool.fits(manifest.rank) and self._loader.host(manifest) is None:
            self._fetch(key, manifest)

    def release(self, key: Key) -> None:
        self.pool.release(key)
        if self.pool.extent_of(key) is None:  # it was unloaded while leased, and this was the last lease
            self._forget(key)

    def arrived(self, arrival: Arrival) -> None:
        """Place what was fetched while there is room for it, so that it waits in the pool and not in the host tier."""
        self._fetching.discard(arrival.key)
        adapter = arrival.adapter
        if adapter is None or arrival.key in self._quarantined or self.pool.extent_of(arrival.key) is not None:
            return
        placed = (
            self.pool.fits(adapter.rank)
            and self._placements_left > 0
            and self._place(arrival.key, arrival.manifest, adapter)
        )
        if not placed and self._loader.host(arrival.manifest) is None and len(self._parked) < MAX_PARKED:
            self._parked[arrival.key] = adapter

    def keep_parked(self, wanted: Callable[[], set[Key]]) -> None:
        """Let go of what was parked for requests that have left; `wanted` is asked only if there is anything."""
        if self._parked:
            still = wanted()
            self._parked = {key: adapter for key, adapter in self._parked.items() if key in still}

    def warm(self, manifest: AdapterManifest, on_done: OnDone) -> None:
        """Ask for an adapter that nobody waits for yet."""
        self._loader.want(manifest, on_done)

    def rows_of(self, key: Key) -> ResidentRows:
        """Where a leased adapter lies now; asked anew each step, since compaction moves rows between steps."""
        extent = self.pool.extent_of(key)
        assert extent is not None, "a running sequence's adapter has rows"
        return ResidentRows(extent.start, extent.count, self._linears[key])

    def unload(self, key: Key) -> bool:
        """Take an unleased adapter out of the pool; False while it is leased."""
        if self.pool.extent_of(key) is None:
            return True
        if not self.pool.drop(key):
            return False
        self._forget(key)
        return True

    def reset_if_torn(self) -> None:
        """After a copy into the pool failed half-way: forget all that is in it, since no row can be trusted."""
        if self._is_torn:
            for resident in self.pool.resident():
                self.unload(resident.key)
            self._is_torn = False

    def quarantine(self, key: Key) -> None:
        """Never serve this digest again in this process: it made values that are not finite."""
        self._quarantined.add(key)
        self.unload(key)  # its rows fall free with its last lease
        self._loader.quarantine(key)

    @property
    def bytes_per_row(self) -> int:
        return self._tensors.num_bytes // self.pool.num_rows

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def residents(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(entry.key, self._manifests[entry.key].label, entry.extent.count, entry.leases, entry.is_pinned)
            for entry in self.pool.resident()
        )

    def _fetch(self, key: Key, manifest: AdapterManifest) -> None:
        self._fetching.add(key)
        self._loader.want(manifest, lambda m, adapter, error, tier: self._post(Arrival(m, adapter, error, tier)))

    def _place(self, key: Key, manifest: AdapterManifest, host: HostAdapter) -> bool:
        began = time.monotonic()
        placement = self.pool.place(key, host.rank)
        if placement is None:
            return False
        for evicted in placement.evicted:
            self._forget(evicted)
        self._is_torn = True  # until the rows are what the books already say
        for move in placement.moves:
            self._tensors.move(move.src, move.dst, move.count)
        self._linears[key] = self._tensors.write(placement.extent.start, host)
        self._is_torn = False
        self._manifests[key] = manifest
        self._parked.pop(key, None)
        self._placements_left -= 1
        self.placements += 1
        self.place_seconds.observe(time.monotonic() - began)
        return True

    def _forget(self, key: Key) -> None:
        self._linears.pop(key, None)
        self._manifests.pop(key, None)

    def _too_large(self, manifest: AdapterManifest) -> AdapterError:
        return AdapterRefused(
            f"rank {manifest.rank} is more than the {self.pool.num_rows} rows of the rank pool (LODGER_POOL_RANK)",
            param="r",
            code="adapter_rank_too_large",
        )
