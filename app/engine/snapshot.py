"""What the engine shows of itself: immutable, replaced after a step, read by `/metrics` and the API without a lock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.engine.sequence import Batch

if TYPE_CHECKING:
    from app.engine.residency import Resident
    from app.engine.scheduler import SchedulerSnapshot

STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SIZE_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts per bucket (not cumulative; the last one is what exceeds every bound) and the sum of all values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class HistogramBuilder:
    """Counts values in the engine thread; `freeze` makes the copy that others may read."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._total += value
        for i, bound in enumerate(self._bounds):
            if value <= bound:
                self._counts[i] += 1
                return
        self._counts[-1] += 1

    def freeze(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Counts since the start of the process."""

    steps: int
    prefill_tokens: int
    decode_tokens: int
    out_of_memory: int
    non_finite: int
    prefill_seconds: Histogram  # steps with at least one prefill chunk
    decode_seconds: Histogram  # steps of decodes alone
    batch_rows: Histogram  # sequences in a step
    batch_adapters: Histogram  # distinct adapters in a step


@dataclass(slots=True)
class StepCounters:
    """The engine thread's own counters behind `StepTotals`."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    out_of_memory: int = 0
    non_finite: int = 0
    _prefill: HistogramBuilder = field(default_factory=lambda: HistogramBuilder(STEP_BUCKETS_S))
    _decode: HistogramBuilder = field(default_factory=lambda: HistogramBuilder(STEP_BUCKETS_S))
    _rows: HistogramBuilder = field(default_factory=lambda: HistogramBuilder(SIZE_BUCKETS))
    _adapters: HistogramBuilder = field(default_factory=lambda: HistogramBuilder(SIZE_BUCKETS))

    def observe(self, batch: Batch, seconds: float) -> None:
        prefill = sum(chunk.count for chunk in batch.chunks if chunk.count > 1)
        self.steps += 1
        self.prefill_tokens += prefill
        self.decode_tokens += batch.num_tokens - prefill
        (self._prefill if prefill else self._decode).observe(seconds)
        self._rows.observe(len(batch.chunks))
        adapters = {chunk.sequence.adapter_key for chunk in batch.chunks} - {None}
        if adapters:
            self._adapters.observe(len(adapters))

    def freeze(self) -> StepTotals:
        return StepTotals(
            self.steps,
            self.prefill_tokens,
            self.decode_tokens,
            self.out_of_memory,
            self.non_finite,
            self._prefill.freeze(),
            self._decode.freeze(),
            self._rows.freeze(),
            self._adapters.freeze(),
        )


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment."""

    taken_at: float  # time.monotonic()
    scheduler: SchedulerSnapshot
    residents: tuple[Resident, ...]
    pool_rows: int
    pool_free_rows: int
    pool_leased_rows: int
    bytes_per_row: int  # of the pool, all linears together
    kv_block_size: int  # tokens
    kv_num_blocks: int
    quarantined: int
    placements: int
    place_seconds: Histogram  # copying an adapter into the pool, by the engine thread
    evictions: int
    counters: StepTotals
