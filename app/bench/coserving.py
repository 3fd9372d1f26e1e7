"""What training costs those who are served, and what is left of its speed: measured at several loads.

Load 1 is the throughput of a full batch that is never idle, without training. At the other loads requests come at
random moments, at that share of its rate, whether or not earlier ones are answered. Training speed is told as a share
of what a bare loop reaches; windows with training off and on take turns. No torch.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.bench.figures import Percentiles, RoundTrace
from app.bench.workload import Extra, Job, WorkloadSpec, make_jobs

LOADS = (0.25, 0.5, 0.75, 1.0)
WINDOW_S = 40.0


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of serving, and the speed of training while requests came."""

    trace: RoundTrace
    trained_per_s: float  # tokens; until the window's end, not while the last requests are answered after it


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One load: every round's windows. Without training (`off`) or with it (`on`) may be missing, as asked for."""

    load: float
    off: tuple[Percentiles, ...]  # inter-token latency of each window, ms
    on: tuple[Percentiles, ...]
    off_tokens_per_s: tuple[float, ...]
    on_tokens_per_s: tuple[float, ...]
    trained_per_s: tuple[float, ...]

    @property
    def p95_ratio(self) -> float | None:
        """Median over rounds of p95(on) / p95(off)."""
        if not self.off or not self.on:
            return None
        return statistics.median(a.p95 / b.p95 for a, b in zip(self.on, self.off, strict=True))


@dataclass(frozen=True, slots=True)
class CoservingResult:
    """The curve. Training speeds in tokens a second."""

    concurrency: int
    full_tokens_per_s: float  # served at load 1, without training
    alone_per_s: float  # a bare loop over the quanta
    idle_per_s: float  # the engine, serving nobody
    points: tuple[LoadPoint, ...]

    def share_kept(self, point: LoadPoint) -> float | None:
        """Of the bare loop's training speed."""
        return statistics.median(point.trained_per_s) / self.alone_per_s if point.trained_per_s else None


Call = Callable[..., Any]


def measure_coserving(spec: WorkloadSpec, vocab_size: int, call: Call) -> CoservingResult:
    """`call(method, *args)` runs a method of a `CoservingSystem`."""
    concurrency = min(spec.concurrency)
    jobs = make_jobs(replace(spec, cold_share=0.0), concurrency, vocab_size)
    full = call("serve", jobs, concurrency, (), False, WINDOW_S).trace
    alone, idle = (float(call(method, WINDOW_S)) for method in ("train_alone", "train_idle"))
    kinds = {"off": (False,), "on": (True,), "both": (False, True)}[spec.train]
    points = [_point(load, full.tokens_per_s, spec, jobs, concurrency, kinds, call) for load in LOADS]
    return CoservingResult(concurrency, full.tokens_per_s, alone, idle, tuple(points))


def _point(
    load: float,
    full_tokens_per_s: float,
    spec: WorkloadSpec,
    jobs: Sequence[Job],
    concurrency: int,
    kinds: Sequence[bool],
    call: Call,
) -> LoadPoint:
    latencies: dict[bool, list[Percentiles]] = {False: [], True: []}
    speeds: dict[bool, list[float]] = {False: [], True: []}
    trained = []
    for number in range(spec.rounds):
        rate = load * full_tokens_per_s / spec.output_tokens
        arrivals = [] if load >= 1 else random_arrivals(jobs, rate, WINDOW_S, seed=f"{spec.seed}/{load}/{number}")
        for is_training in kinds:
            window: Window = call("serve", jobs, concurrency, arrivals, is_training, WINDOW_S)
            found = Percentiles.of(gap for r in window.trace.requests for gap in r.gaps_s)
            assert found is not None
            latencies[is_training].append(found)
            speeds[is_training].append(window.trace.tokens_per_s)
            if is_training:
                trained.append(window.trained_per_s)
    return LoadPoint(
        load,
        tuple(latencies[False]),
        tuple(latencies[True]),
        tuple(speeds[False]),
        tuple(speeds[True]),
        tuple(trained),
    )


def random_arrivals(jobs: Sequence[Job], rate: float, seconds: float, *, seed: str) -> list[Extra]:
    """At least one request; gaps between them are exponential with mean 1 / rate."""
    rng = random.Random(seed)
    arrivals, at = [Extra(0.0, jobs[0])], rng.expovariate(rate)
    while at < seconds:
        arrivals.append(Extra(at, jobs[len(arrivals) % len(jobs)]))
        at += rng.expovariate(rate)
    return arrivals
