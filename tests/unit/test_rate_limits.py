from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import RateLimited
from app.rate_limits import RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _passes(
    limiter: RateLimiter, tokens: int = 1, *, requests: int | None = None, per_minute: int | None = None
) -> bool:
    try:
        limiter.check("acme", tokens, requests_per_minute=requests, tokens_per_minute=per_minute)
    except RateLimited:
        return False
    return True


def test_a_minutes_requests_pass_and_one_more_does_not() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    assert [_passes(limiter, requests=3) for _ in range(4)] == [True, True, True, False]
    clock.now += 20
    assert [_passes(limiter, requests=3) for _ in range(2)] == [True, False]


def test_a_refusal_says_which_limit_and_when_to_come_back() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    assert _passes(limiter, 50, per_minute=60)
    with pytest.raises(RateLimited) as caught:
        limiter.check("acme", 20, requests_per_minute=100, tokens_per_minute=60)
    assert caught.value.param == "tokens"
    assert caught.value.retry_after_s == pytest.approx(10)
    clock.now += 10
    assert _passes(limiter, 20, per_minute=60)


def test_a_refused_request_takes_nothing() -> None:
    limiter = RateLimiter(clock=Clock())
    assert _passes(limiter, 10, requests=2, per_minute=10)
    for _ in range(5):
        assert not _passes(limiter, 10, requests=2, per_minute=10)
    assert _passes(limiter, 0, requests=2, per_minute=10)  # the second request is still there


def test_generated_tokens_leave_a_debt_that_later_requests_wait_for() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    assert _passes(limiter, 10, per_minute=60)
    limiter.spend("acme", 110, tokens_per_minute=60)
    clock.now += 60
    assert not _passes(limiter, 1, per_minute=60)
    clock.now += 1
    assert _passes(limiter, 1, per_minute=60)


def test_a_prompt_longer_than_a_minutes_tokens_passes_on_a_full_bucket() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    assert _passes(limiter, 600, per_minute=60)
    clock.now += 540
    assert not _passes(limiter, 1, per_minute=60)
    clock.now += 1
    assert _passes(limiter, 1, per_minute=60)


def test_tenants_do_not_share_a_bucket() -> None:
    limiter = RateLimiter(clock=Clock())
    assert _passes(limiter, requests=1)
    assert not _passes(limiter, requests=1)
    left = limiter.check("acme-corp", 1, requests_per_minute=1, tokens_per_minute=None)
    assert left["requests"].remaining == 0
    assert left["requests"].reset_s == pytest.approx(60)


def test_no_limit_is_no_bucket_and_zero_is_never() -> None:
    limiter = RateLimiter(clock=Clock())
    assert limiter.check("acme", 10**9, requests_per_minute=None, tokens_per_minute=None) == {}
    with pytest.raises(RateLimited) as caught:
        limiter.check("acme", 0, requests_per_minute=0, tokens_per_minute=None)
    assert caught.value.retry_after_s is None


def test_a_clock_that_stands_still_or_leaps_never_overfills() -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    clock.now += 10**6
    assert [_passes(limiter, requests=2) for _ in range(3)] == [True, True, False]


def test_memory_is_bounded() -> None:
    limiter = RateLimiter(clock=Clock(), max_buckets=10)
    for i in range(1000):
        limiter.check(f"t{i}", 1, requests_per_minute=5, tokens_per_minute=5)
    assert len(limiter._buckets) == 10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), max_size=60), st.integers(1, 100))
def test_no_window_passes_more_than_a_bucket_and_its_refill(steps: list[tuple[float, int]], limit: int) -> None:
    clock = Clock()
    limiter = RateLimiter(clock=clock)
    passed: list[tuple[float, int]] = []
    for wait, tokens in steps:
        clock.now += wait
        if _passes(limiter, min(tokens, limit), per_minute=limit):
            passed.append((clock.now, min(tokens, limit)))
    for start, _ in passed:
        window = [tokens for at, tokens in passed if start <= at]
        assert sum(window) <= limit + (clock.now - start) * limit / 60 + 1e-6
