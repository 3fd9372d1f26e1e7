"""What training costs those who are served, and what is left of its speed: a curve for each of several loads.

Load 1 is the throughput of a full batch that is never idle, without training. At the other loads as many requests as
make up that share of it come at random moments of a window, whether or not earlier ones are answered. The windows of
a load, without training and with each share of the time that it may take, take turns and get the same requests;
latencies are of all windows of a kind together. Training speed is told as a share of what a bare loop reaches.
No torch.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.bench.figures import Percentiles, RoundTrace
from app.bench.workload import Extra, Job, WorkloadSpec, make_jobs

WINDOW_S = 40.0


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of serving, and the speed of training while requests came."""

    trace: RoundTrace
    trained_per_s: float  # tokens; until the window's end, not while the last requests are answered after it


@dataclass(frozen=True, slots=True)
class Kind:
    """All windows of a load with one share for training."""

    training_share: float  # of the time while requests run, at most; 0: no training
    inter_token_ms: Percentiles
    ttft_ms: Percentiles
    window_p95_ms: tuple[float, ...]  # inter-token, of each window: how much chance there is in the figures
    tokens_per_s: float  # served
    trained_per_s: float  # tokens


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One load: without training (`off`), unless only training was asked for, and with it, by rising shares."""

    load: float
    off: Kind | None
    on: tuple[Kind, ...]

    def p95_ratio(self, kind: Kind) -> float | None:
        """p95 inter-token latency, training on / off."""
        return None if self.off is None else kind.inter_token_ms.p95 / self.off.inter_token_ms.p95


@dataclass(frozen=True, slots=True)
class CoservingResult:
    """The curves. Training speeds in tokens a second."""

    concurrency: int
    full_tokens_per_s: float  # served at load 1, without training
    alone_per_s: float  # a bare loop over the quanta
    idle_per_s: float  # the engine, serving nobody
    points: tuple[LoadPoint, ...]

    def share_kept(self, kind: Kind) -> float:
        """Of the bare loop's training speed."""
        return kind.trained_per_s / self.alone_per_s


Call = Callable[..., Any]


def measure_coserving(
    spec: WorkloadSpec, vocab_size: int, training_shares: Sequence[float], call: Call
) -> CoservingResult:
    """`call(method, *args)` runs a method of a `CoservingSystem`."""
    concurrency = min(spec.concurrency)
    jobs = make_jobs(replace(spec, cold_share=0.0), concurrency, vocab_size)
    full = call("serve", jobs, concurrency, (), 0.0, WINDOW_S).trace
    alone, idle = (float(call(method, WINDOW_S)) for method in ("train_alone", "train_idle"))
    shares = ((0.0,) if spec.train == "both" else ()) + tuple(sorted(training_shares))
    points = []
    for load in spec.loads:
        windows: dict[float, list[Window]] = {share: [] for share in shares}
        count = max(1, round(load * full.tokens_per_s * WINDOW_S / spec.output_tokens))
        for number in range(spec.rounds):
            seed = f"{spec.seed}/{load}/{number}"
            arrivals = [] if load >= 1 else random_arrivals(jobs, count, WINDOW_S, seed=seed)
            for share in shares if number % 2 == 0 else reversed(shares):  # what a window leaves behind meets each
                windows[share].append(call("serve", jobs, concurrency, arrivals, share, WINDOW_S))
        kinds = {share: _kind(share, found) for share, found in windows.items()}
        points.append(LoadPoint(load, kinds.pop(0.0, None), tuple(kinds.values())))
    return CoservingResult(concurrency, full.tokens_per_s, alone, idle, tuple(points))


def _kind(share: float, windows: Sequence[Window]) -> Kind:
    traces = [window.trace for window in windows]
    requests = [request for trace in traces for request in trace.requests]
    return Kind(
        share,
        _percentiles(gap for request in requests for gap in request.gaps_s),
        _percentiles(wait for request in requests if (wait := request.ttft_s) is not None),
        tuple(_percentiles(gap for request in trace.requests for gap in request.gaps_s).p95 for trace in traces),
        statistics.fmean(trace.tokens_per_s for trace in traces),
        statistics.fmean(window.trained_per_s for window in windows),
    )


def _percentiles(seconds: Iterable[float]) -> Percentiles:
    found = Percentiles.of(seconds)
    assert found is not None, "every window answers somebody"
    return found


def random_arrivals(jobs: Sequence[Job], count: int, seconds: float, *, seed: str) -> list[Extra]:
    """So many requests at independent uniform moments: a Poisson process of which the count is known, so that a window
    has the load it is said to have."""
    rng = random.Random(seed)
    moments = sorted(rng.uniform(0, seconds) for _ in range(count))
    return [Extra(at, jobs[number % len(jobs)]) for number, at in enumerate(moments)]
