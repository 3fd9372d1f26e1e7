"""What a slow store costs those who do not wait for it.

Warm streams run all the time, in windows of three kinds that take turns: alone; beside a few requests for adapters that
are resident; and beside as many requests for adapters that must first come from the slow store. Inter-token latencies
are of the warm streams only. Cold over alone is the whole cost of a cold arrival, the work of its own answer included;
cold over resident is what its coldness adds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from app.bench.figures import Percentiles, RoundTrace
from app.bench.workload import Extra, Job, WorkloadSpec, cold_labels, make_jobs

ARRIVALS = 2  # requests beside the streams in a window
OBJECTS = 2  # one after the other: config and weights
AFTERWARDS_S = 4.0  # of a window, once the cold ones have come
KINDS = ("alone", "resident", "cold")


@dataclass(frozen=True, slots=True)
class ColdResult:
    """Percentiles per kind and window, in milliseconds."""

    delay_s: float
    concurrency: int
    window_s: float
    windows: dict[str, tuple[Percentiles, ...]]
    arrival_ttft_ms: dict[str, Percentiles]  # of the requests beside the streams

    def p95(self, kind: str) -> float:
        return statistics.median(window.p95 for window in self.windows[kind])

    def ratio(self, to: str) -> float:
        """Median over rounds of p95(cold) / p95(to)."""
        pairs = zip(self.windows["cold"], self.windows[to], strict=True)
        return statistics.median(cold.p95 / other.p95 for cold, other in pairs)


def num_cold(spec: WorkloadSpec) -> int:
    """Cold adapters that the experiment uses up."""
    return ARRIVALS * spec.rounds if spec.cold_store_delay_s else 0


def window_s(spec: WorkloadSpec) -> float:
    return OBJECTS * spec.cold_store_delay_s + AFTERWARDS_S


def measure_cold(
    spec: WorkloadSpec,
    vocab_size: int,
    first_cold: int,
    window: Callable[[Sequence[Job], int, float, Sequence[Extra]], RoundTrace],
) -> ColdResult:
    """Run the windows; `window` is `EngineSystem.window`. Every warm adapter has been used before."""
    concurrency = min(spec.concurrency)
    streams = make_jobs(replace(spec, cold_share=0.0), concurrency, vocab_size)
    seconds = window_s(spec)
    measured: dict[str, list[Percentiles]] = {kind: [] for kind in KINDS}
    ttfts: dict[str, list[float]] = {"resident": [], "cold": []}
    for number in range(spec.rounds):
        labels = cold_labels(first_cold + number * ARRIVALS, ARRIVALS)
        for kind in KINDS:
            extras = _extras(kind, streams, labels, seconds)
            trace = window(streams, concurrency, seconds, extras)
            gaps = Percentiles.of(gap for r in trace.requests if not r.is_extra for gap in r.gaps_s)
            assert gaps is not None
            measured[kind].append(gaps)
            if kind in ttfts:
                ttfts[kind].extend(t for r in trace.requests if r.is_extra and (t := r.ttft_s) is not None)
    return ColdResult(
        spec.cold_store_delay_s,
        concurrency,
        seconds,
        {kind: tuple(found) for kind, found in measured.items()},
        {kind: found for kind, values in ttfts.items() if (found := Percentiles.of(values)) is not None},
    )


def _extras(kind: str, streams: Sequence[Job], cold: Sequence[str], seconds: float) -> list[Extra]:
    """Requests beside the streams: early, so that cold ones still answer within the window."""
    if kind == "alone":
        return []
    jobs = [
        replace(streams[i % len(streams)], adapter=label if kind == "cold" else streams[i % len(streams)].adapter)
        for i, label in enumerate(cold)
    ]
    return [Extra(0.5 + i * min(1.0, seconds / 10), job) for i, job in enumerate(jobs)]
