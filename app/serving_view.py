"""One `ServingSnapshot` out of the engine's and the loader's: what a scrape and the API's residency columns read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from adapters.breaker import CircuitBreaker
from adapters.loader import AdapterLoader, LoaderSnapshot
from adapters.lru import TierStats
from adapters.weights import HostAdapter
from app.engine.engine import Engine
from app.engine.snapshot import Histogram, HistogramBuilder
from app.metrics import ResidentAdapter, ServingSnapshot, TierSnapshot

LOAD_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class LoadTimes:
    """How long the loader's stages took; observed by its threads, read at scrape."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages = {stage: HistogramBuilder(LOAD_BUCKETS_S) for stage in ("fetch", "verify", "parse")}

    def observe(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._stages[stage].observe(seconds)

    def freeze(self) -> dict[str, Histogram]:
        with self._lock:
            return {stage: builder.freeze() for stage, builder in self._stages.items()}


class ServingView:
    """Builds snapshots from immutable parts; never waits for a step."""

    def __init__(
        self,
        engine: Engine,
        loader: AdapterLoader[HostAdapter],
        load_times: LoadTimes,
        *,
        is_draining: Callable[[], bool],
        num_stale_served: Callable[[], int],
        breaker: CircuitBreaker | None,
    ) -> None:
        self._engine = engine
        self._loader = loader
        self._load_times = load_times
        self._is_draining = is_draining
        self._num_stale_served = num_stale_served
        self._breaker = breaker

    def __call__(self) -> ServingSnapshot:
        engine, loader = self._engine.snapshot, self._loader.snapshot()
        scheduler, steps = engine.scheduler, engine.counters
        residents = tuple(
            ResidentAdapter(r.key[0], r.key[1], r.label.partition("@")[0], r.rank, r.leases, r.pinned)
            for r in engine.residents
        )
        held = {(r.tenant, r.digest) for r in residents}
        return ServingSnapshot(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            kv_usage=scheduler.kv_usage,
            kv_block_size=engine.kv_block_size,
            kv_num_blocks=engine.kv_num_blocks,
            resident=residents,
            loading=tuple(a.adapter.name for a in scheduler.adapters if a.num_waiting and a.adapter.key not in held),
            free_rows=engine.pool_free_rows,
            total_rows=engine.pool_rows,
            heartbeat_age_s=max(0.0, time.monotonic() - self._engine.heartbeat),
            is_draining=self._is_draining(),
            tiers={"host": _tier(loader.host), "disk": _tier(loader.disk), "pool": self._pool()},
            load_failures=loader.failures,
            load_seconds={**self._load_times.freeze(), "place": engine.place_seconds},
            step_seconds={"prefill": steps.prefill_seconds, "decode": steps.decode_seconds},
            batch_rows=steps.batch_rows,
            batch_adapters=steps.batch_adapters,
            num_generations=engine.placements,
            num_quarantined=_quarantined(engine.quarantined, loader),
            num_stale_served=self._num_stale_served(),
            num_oom={"decode": steps.out_of_memory},
            prefix_queries=scheduler.prefix_query_tokens,
            prefix_hits=scheduler.prefix_hit_tokens,
            breaker_state=None if self._breaker is None else self._breaker.state,
            degraded=("s3",) if self._breaker is not None and self._breaker.is_open else (),
        )

    def _pool(self) -> TierSnapshot:
        engine = self._engine.snapshot
        used = engine.pool_rows - engine.pool_free_rows
        return TierSnapshot(
            num_bytes=used * engine.bytes_per_row,
            num_entries=len(engine.residents),
            capacity_bytes=engine.pool_rows * engine.bytes_per_row,
            evictions={"lru": engine.evictions},
        )


def _tier(stats: TierStats) -> TierSnapshot:
    evictions = {reason.value: count for reason, count in stats.evictions.items()}
    return TierSnapshot(stats.used_bytes, stats.entries, stats.budget_bytes, evictions)


def _quarantined(engine: int, loader: LoaderSnapshot) -> int:
    """Both know the same digests; the loader may have found more (bytes that never matched)."""
    return max(engine, loader.quarantined)
