"""From "somebody wants this adapter" to its tensors in host memory, without anybody waiting for it in the engine.

`want` returns at once; the answer comes by `on_done` in one of the loader's threads. One load serves all who want the
same (tenant, digest). Workers fetch, verify and parse; one courier thread answers what needs no load (host tier, known
failures) and tells waiters when a load's time is up, so neither stands behind a slow download.
Nothing here touches the engine: the H that arrives is immutable and may be copied from any thread, also once evicted.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar

from adapters.courier import Courier
from adapters.disk_tier import DiskTier
from adapters.errors import AdapterError, AdapterNotFound, AdapterQuarantined, AdapterUnavailable, LocalDiskFailed
from adapters.fetch import Fetcher, Loaded, LoaderLimits, LoadFailed
from adapters.flights import Answer, Flight, FlightQueue, OnDone, Want
from adapters.lru import ByteLRU, Eviction, TierStats
from adapters.manifest import AdapterManifest, FileFact
from adapters.refusals import REASONS, NegativeCache, NegativeTTL, failure_reason

if TYPE_CHECKING:
    from adapters.store import BlobStore

__all__ = ["AdapterLoader", "LoaderLimits", "LoaderSnapshot"]

logger = logging.getLogger(__name__)

H = TypeVar("H")
AdapterKey = tuple[str, str]  # (tenant, digest)
Parse = Callable[[AdapterManifest, Path, Path], H]
_DEFAULT_TTL = NegativeTTL()
_DEFAULT_LIMITS = LoaderLimits()


@dataclass(frozen=True, slots=True)
class LoaderSnapshot:
    """The loader at one moment. Counters only grow."""

    host: TierStats
    disk: TierStats
    pending: int  # loads that wait for a worker
    running: int
    waiters: int  # wants not yet answered by a load
    loads: Mapping[str, int]  # "host": wants answered from the tier; "disk", "s3": loads by where the files were
    failures: Mapping[str, int]  # loads by reason, see `refusals.REASONS`
    stage_seconds: Mapping[str, float]  # totals of "fetch", "verify", "parse"
    remembered_failures: int
    quarantined: int


class AdapterLoader(Generic[H]):
    """Invariant: each `want` is answered exactly once, and at most one load of a (tenant, digest) is on its way."""

    def __init__(
        self,
        *,
        fetch: BlobStore,
        disk: DiskTier,
        host: ByteLRU[AdapterKey, H],
        parse: Parse[H],
        size_of: Callable[[H], int],
        limits: LoaderLimits = _DEFAULT_LIMITS,
        negative_ttl: NegativeTTL = _DEFAULT_TTL,
        clock: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
        observe: Callable[[str, float], None] | None = None,
    ) -> None:
        """`parse(manifest, config, weights)` runs the door and raises AdapterRefused; `size_of` gives bytes of host
        memory; `observe(stage, seconds)` is called once per stage of each load that succeeds, in its thread."""
        self._disk = disk
        self._host = host
        self._size_of = size_of
        self._clock = clock
        self._timeout_s = limits.fetch_timeout_s
        self._observe = observe
        self._fetcher = Fetcher(fetch, disk, parse, size_of, clock=clock, limits=limits)
        # Guards everything below. Never held during I/O; the host tier's `on_evict` may run under it.
        self._wake = threading.Condition()
        self._flights: dict[AdapterKey, Flight[H]] = {}
        self._queue: FlightQueue[H] = FlightQueue(limits.workers, limits.max_pending, limits.max_pending_per_tenant)
        self._negative = NegativeCache(negative_ttl, clock, rand)
        self._quarantined: set[AdapterKey] = set()
        self._loads: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._stage_seconds: dict[str, float] = {}
        self._is_closed = False
        self._courier = Courier("adapter-courier", self._expire_late, lambda: bool(self._flights))
        self._workers = [
            threading.Thread(target=self._work, name=f"adapter-load-{i}", daemon=True) for i in range(limits.workers)
        ]
        for worker in self._workers:
            worker.start()

    def host(self, manifest: AdapterManifest) -> H | None:
        """Return the adapter if it is in host memory, and count it as used. Never blocks."""
        return self._host.get(manifest.ref.key)

    def tier_of(self, manifest: AdapterManifest) -> str:
        """Where its bytes are nearest: "host", "disk" or "s3". Never blocks, and does not count as a use."""
        if manifest.ref.key in self._host:
            return "host"
        is_on_disk = all(self._disk.holds(manifest.tenant, fact.sha256) for fact in (manifest.config, manifest.weights))
        return "disk" if is_on_disk else "s3"

    def want(self, manifest: AdapterManifest, on_done: OnDone[H]) -> None:
        """Have the adapter brought to host memory; `on_done(manifest, H or None, error or None, tier)` follows once.

        Never blocks and never raises: a full queue, a known failure, a closed loader are answers too. `tier` is "host",
        "disk" or "s3" ("" with an error). `on_done` runs in a loader thread and must be quick; once the loader is
        closed it runs in the caller's.
        """
        want: Want[H] = Want(manifest, on_done)
        with self._wake:
            is_closed = self._is_closed
            answer = self._known_answer(manifest)
            if answer is None:
                self._join_flight(want)
            elif not is_closed:
                self._courier.post(lambda: answer.tell(want))
        if answer is not None and is_closed:
            answer.tell(want)

    def put(self, manifest: AdapterManifest, value: H, files: tuple[Path, Path] | None = None) -> bool:
        """Hand over an adapter made here: into the host tier, and its (config, weights) files into the disk tier.

        Without `files` it never blocks; with them it copies and syncs, so call it from a worker thread. The files stay
        the caller's. Returns True if the host tier has it; the disk tier is a matter of luck and only logged.
        """
        key, num_bytes = manifest.ref.key, self._size_of(value)
        with self._wake:
            if self._is_closed or key in self._quarantined:
                return False
            self._negative.forget(key)
            is_kept = self._host.put(key, value, num_bytes)
        for fact, path in zip((manifest.config, manifest.weights), files or (), strict=False):
            try:
                self._disk.add(manifest.tenant, fact, path)
            except LocalDiskFailed:
                logger.warning("adapter not kept on disk", extra={"action": "adapter_disk_full"})
        return is_kept

    def forget(self, key: AdapterKey, reason: Eviction, *, files: tuple[FileFact, ...] = ()) -> None:
        """Drop (tenant, digest) from every tier. ERASED also ends a load under way: its waiters hear "not found" now.

        The disk tier knows files, not adapters: pass the manifest's (config, weights) to delete them too.
        """
        with self._wake:
            self._host.evict(key, reason)
            self._negative.forget(key)
            if reason is Eviction.ERASED:
                self._forget_flight(key)
        for fact in files:
            self._disk.drop(key[0], fact.sha256, reason)

    def forget_tenant(self, tenant: str) -> None:
        """Drop all that is a tenant's, in memory and on disk."""
        with self._wake:
            for key in self._host.oldest_first():
                if key[0] == tenant:
                    self._host.evict(key, Eviction.ERASED)
            for key in [key for key in self._flights if key[0] == tenant]:
                self._forget_flight(key)
            self._negative.forget_tenant(tenant)
            self._quarantined = {key for key in self._quarantined if key[0] != tenant}
        self._disk.drop_tenant(tenant)

    def quarantine(self, key: AdapterKey) -> None:
        """Never serve this (tenant, digest) again: it made values that are not finite."""
        with self._wake:
            if key not in self._quarantined:
                self._quarantined.add(key)
                self._failures[failure_reason(AdapterQuarantined())] += 1
            self._host.evict(key, Eviction.CORRUPT)

    def is_quarantined(self, key: AdapterKey) -> bool:
        with self._wake:
            return key in self._quarantined

    def snapshot(self) -> LoaderSnapshot:
        host, disk = self._host.stats(), self._disk.stats()
        with self._wake:
            return LoaderSnapshot(
                host=host,
                disk=disk,
                pending=self._queue.num_pending,
                running=self._queue.num_running,
                waiters=sum(len(flight.waiters) for flight in self._flights.values()),
                loads=MappingProxyType({tier: self._loads[tier] for tier in ("host", "disk", "s3")}),
                failures=MappingProxyType({reason: self._failures[reason] for reason in REASONS}),
                stage_seconds=MappingProxyType(dict(self._stage_seconds)),
                remembered_failures=len(self._negative),
                quarantined=len(self._quarantined),
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """Answer what waits, let what runs end within `timeout_s` in all, answer the rest. Later calls do nothing."""
        give_up = time.monotonic() + timeout_s
        with self._wake:
            if self._is_closed:
                return
            self._is_closed = True
            for flight in [flight for flight in self._flights.values() if not flight.is_running]:
                self._abandon(flight, _closing())
            self._wake.notify_all()
        for worker in self._workers:
            worker.join(max(0.0, give_up - time.monotonic()))
        with self._wake:
            for flight in list(self._flights.values()):
                self._abandon(flight, _closing())
        self._courier.stop(max(0.5, give_up - time.monotonic()))

    def _known_answer(self, manifest: AdapterManifest) -> Answer[H] | None:
        """What can be said without a load; None if one is needed or on its way."""
        key = manifest.ref.key
        if key in self._quarantined:
            return Answer.refusal(AdapterQuarantined())
        # Looked for first, lest each miss that `host` told the engine of be counted again.
        value = self._host.get(key) if key in self._host else None
        if value is not None:
            self._loads["host"] += 1
            return Answer(value, None, "host")
        if self._is_closed:
            return Answer.refusal(_closing())
        error = self._negative.get(key)
        if error is not None:
            return Answer.refusal(error)
        if key not in self._flights and not self._queue.has_room(manifest.tenant):
            self._failures["overload"] += 1
            return Answer.refusal(AdapterUnavailable("Too many adapters are waiting to be fetched. Try again shortly."))
        return None

    def _join_flight(self, want: Want[H]) -> None:
        key = want.manifest.ref.key
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(want.manifest, self._clock() + self._timeout_s)
            self._queue.push(flight)
            self._wake.notify()
            self._courier.wake()
        flight.waiters.append(want)

    def _forget_flight(self, key: AdapterKey) -> None:
        """Answer who waits now; what still arrives is thrown away, and whoever asks from now on gets a new flight."""
        flight = self._flights.pop(key, None)
        if flight is not None:
            flight.is_forgotten = True
            self._abandon(flight, AdapterNotFound())

    def _work(self) -> None:
        """A worker's life."""
        while True:
            with self._wake:
                while (flight := self._queue.pop()) is None:
                    if self._is_closed:
                        return
                    self._wake.wait()
                flight.deadline = self._clock() + self._timeout_s
            try:
                self._fly(flight)
            except Exception:  # an observer's; the flight has landed by then
                logger.exception("adapter load not observed", extra={"action": "adapter_load_unobserved"})

    def _fly(self, flight: Flight[H]) -> None:
        outcome = self._load(flight)
        with self._wake:
            answer = self._land(flight, outcome)
            waiters, flight.waiters = flight.waiters, []
        if flight.is_forgotten:
            for fact in (flight.manifest.config, flight.manifest.weights):
                self._disk.drop(flight.manifest.tenant, fact.sha256, Eviction.ERASED)
        for want in waiters:
            answer.tell(want)
        if self._observe is not None and isinstance(outcome, Loaded):
            for stage, seconds in outcome.seconds.items():
                self._observe(stage, seconds)

    def _load(self, flight: Flight[H]) -> Loaded[H] | LoadFailed:
        manifest = flight.manifest
        fields = {"tenant": manifest.tenant, "adapter": manifest.label, "digest": manifest.digest[:12]}
        try:
            return self._fetcher.load(manifest, flight.deadline)
        except LoadFailed as exc:
            fields |= {"code": exc.error.code, "reason": exc.reason}
            logger.warning("adapter load failed", extra={"action": "adapter_load_failed", **fields})
            return exc
        except Exception:  # whatever a tenant's file made the parser do costs that tenant's request alone
            logger.exception("adapter load failed", extra={"action": "adapter_load_failed", **fields})
            return LoadFailed(AdapterUnavailable(), "internal")

    def _land(self, flight: Flight[H], outcome: Loaded[H] | LoadFailed) -> Answer[H]:
        """End a flight's book-keeping, with the lock held, and say what its waiters are told."""
        key = flight.manifest.ref.key
        if self._flights.get(key) is flight:
            del self._flights[key]
        self._queue.finish(flight)  # this worker takes the next itself: nobody needs to be woken
        if flight.is_forgotten:
            return Answer.refusal(AdapterNotFound())
        if key in self._quarantined:
            return Answer.refusal(AdapterQuarantined())
        if isinstance(outcome, LoadFailed):
            self._negative.remember(key, outcome.error)
            if not flight.is_expired:  # else it was counted then
                self._failures[outcome.reason] += 1
            return Answer.refusal(outcome.error)
        self._negative.forget(key)
        # If it has no room, those who wait are served all the same.
        self._host.put(key, outcome.value, outcome.num_bytes)
        self._loads[outcome.tier] += 1
        for stage, seconds in outcome.seconds.items():
            self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + seconds
        return Answer(outcome.value, None, outcome.tier)

    def _expire_late(self) -> None:
        with self._wake:
            now = self._clock()
            for flight in [flight for flight in self._flights.values() if flight.deadline <= now]:
                self._expire(flight)

    def _expire(self, flight: Flight[H]) -> None:
        """Tell waiters that the time is up. A load that runs goes on, keeps its single flight, and may still arrive."""
        if flight.waiters:
            self._negative.remember(flight.manifest.ref.key, AdapterUnavailable())
        if not flight.is_expired:
            flight.is_expired = True
            self._failures["timeout" if flight.is_running else "overload"] += 1
        self._abandon(flight, AdapterUnavailable())

    def _abandon(self, flight: Flight[H], error: AdapterError) -> None:
        """Answer a flight's waiters through the courier; one that never started ends with that."""
        answer: Answer[H] = Answer.refusal(error)
        for want in flight.waiters:
            self._courier.post(functools.partial(answer.tell, want))
        flight.waiters = []
        if not flight.is_running:
            self._queue.remove(flight)
            self._flights.pop(flight.manifest.ref.key, None)


def _closing() -> AdapterUnavailable:
    return AdapterUnavailable("The server is shutting down. Send the request to another replica or try again.")
