"""Requests and tokens a minute for each tenant, as token buckets. Plain arithmetic: no I/O, no torch, one clock.

A bucket holds one minute's worth and refills evenly. A request must find one request and its prompt's tokens there;
what it generates is taken afterwards and may leave a debt, which later requests wait for.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.errors import RateLimited

MINUTE_S = 60.0


@dataclass(slots=True)
class _Bucket:
    level: float
    updated_at: float

    def refill(self, per_minute: int, now: float) -> None:
        self.level = min(float(per_minute), self.level + (now - self.updated_at) * per_minute / MINUTE_S)
        self.updated_at = now


@dataclass(frozen=True, slots=True)
class Allowance:
    """One bucket as the x-ratelimit headers tell it. `reset_s`: until it is full again."""

    limit: int
    remaining: int
    reset_s: float


class RateLimiter:
    """Thread-safe. Beyond `max_buckets`, those unused for longest are forgotten, which at worst forgives a debt."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_buckets: int = 100_000) -> None:
        self._clock = clock
        self._max_buckets = max_buckets
        self._lock = threading.Lock()
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()

    def check(
        self, tenant: str, tokens: int, *, requests_per_minute: int | None, tokens_per_minute: int | None
    ) -> dict[str, Allowance]:
        """Take one request and its prompt's `tokens`, or nothing at all. A limit of None is no limit.

        Returns what is left, by "requests" and "tokens". Raises RateLimited with `param` and `retry_after_s`. A prompt
        that is larger than a whole minute's tokens passes when the bucket is full, and leaves a debt.
        """
        wanted = [("requests", requests_per_minute, 1), ("tokens", tokens_per_minute, tokens)]
        limited = [(kind, limit, amount) for kind, limit, amount in wanted if limit is not None]
        with self._lock:
            buckets = [self._bucket(tenant, kind, limit) for kind, limit, _ in limited]
            for bucket, (kind, limit, amount) in zip(buckets, limited, strict=True):
                missing = min(amount, limit) - bucket.level
                if limit == 0 or missing > 1e-9:
                    raise RateLimited(
                        f"this tenant's limit of {limit} {kind} a minute is reached",
                        param=kind,
                        retry_after_s=None if limit == 0 else missing * MINUTE_S / limit,
                        allowances=_left(buckets, limited),
                    )
            for bucket, (_, _, amount) in zip(buckets, limited, strict=True):
                bucket.level -= amount
            return _left(buckets, limited)

    def spend(self, tenant: str, tokens: int, *, tokens_per_minute: int | None) -> None:
        """Take generated tokens, whether or not they are there."""
        if tokens_per_minute is not None:
            with self._lock:
                self._bucket(tenant, "tokens", tokens_per_minute).level -= tokens

    def _bucket(self, tenant: str, kind: str, per_minute: int) -> _Bucket:
        """The tenant's bucket, filled up to now; a new one is full."""
        now = self._clock()
        bucket = self._buckets.setdefault((tenant, kind), _Bucket(float(per_minute), now))
        self._buckets.move_to_end((tenant, kind))
        bucket.refill(per_minute, now)
        while len(self._buckets) > self._max_buckets:
            self._buckets.popitem(last=False)
        return bucket


def _left(buckets: Sequence[_Bucket], limited: Sequence[tuple[str, int, int]]) -> dict[str, Allowance]:
    """`limited`: kind, limit a minute, and what a request takes, of each bucket."""
    return {
        kind: Allowance(limit, max(0, int(bucket.level)), (limit - bucket.level) * MINUTE_S / max(1, limit))
        for bucket, (kind, limit, _) in zip(buckets, limited, strict=True)
    }
