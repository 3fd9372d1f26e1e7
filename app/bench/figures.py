"""What was measured: traces of requests, and the figures made of them. No torch.

Times of one trace come from one clock of one process (seconds, monotonic), so differences count and nothing else does.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """One request: when it was asked, when news of it came, and what it said."""

    index: int
    is_cold: bool
    asked_at: float
    news_at: tuple[float, ...]  # of each token, or over HTTP of each chunk; empty where the answer came in one piece
    num_tokens: int
    tokens: tuple[int, ...] = ()  # empty over HTTP, which carries text
    is_extra: bool = False  # asked beside the measured streams

    @property
    def ttft_s(self) -> float | None:
        return self.news_at[0] - self.asked_at if self.news_at else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(b - a for a, b in zip(self.news_at, self.news_at[1:], strict=False))


@dataclass(frozen=True, slots=True)
class RoundTrace:
    """One round of one system. `wall_s` is from the first request's submission to the last one's end."""

    wall_s: float
    requests: tuple[RequestTrace, ...]

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.requests)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """The process that did the work. For HTTP the server's, not its clients'."""

    start_s: float  # from the start of the process until it was ready, base loaded
    rss_bytes: int  # after the last round
    threads: int
    dtype: str
    weights: str  # how the base's linears are stored and computed on


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Percentiles | None:
        values = sorted(seconds)
        if not values:
            return None
        return cls(*(1000 * percentile(values, share) for share in (0.50, 0.95, 0.99)))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated between neighbours."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a system at one load, over all rounds."""

    system: str
    concurrency: int
    adapters: int
    rounds_tokens_per_s: tuple[float, ...]
    ttft_ms: Percentiles | None
    inter_token_ms: Percentiles | None
    cold_ttft_ms: Percentiles | None
    facts: ProcessFacts

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.rounds_tokens_per_s)


def make_row(system: str, concurrency: int, adapters: int, rounds: Sequence[RoundTrace], facts: ProcessFacts) -> Row:
    """Throughput is the rounds' median; latencies are of all requests of all rounds together."""
    requests = [request for one in rounds for request in one.requests]
    return Row(
        system,
        concurrency,
        adapters,
        tuple(one.tokens_per_s for one in rounds),
        Percentiles.of(t for r in requests if not r.is_cold and (t := r.ttft_s) is not None),
        Percentiles.of(gap for r in requests for gap in r.gaps_s),
        Percentiles.of(t for r in requests if r.is_cold and (t := r.ttft_s) is not None),
        facts,
    )


def ratio(ours: Row, theirs: Row) -> float:
    """Median over rounds of ours / theirs: rounds are interleaved, so a pair saw the same machine."""
    pairs = zip(ours.rounds_tokens_per_s, theirs.rounds_tokens_per_s, strict=True)
    return statistics.median(a / b for a, b in pairs)
