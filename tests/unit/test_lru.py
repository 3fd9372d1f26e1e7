"""ByteLRU against a small model, and the behaviours that random traffic does not show."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.lru import ByteLRU, Eviction

BUDGET = 10
KEYS = st.sampled_from("abcdef")


class LRUModel(RuleBasedStateMachine):
    """Entries as a list of [key, value, size, leases, pinned], least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[tuple[str, int, Eviction]] = []
        self.lru: ByteLRU[str, int] = ByteLRU(BUDGET, on_evict=lambda *args: self.gone.append(args))
        self.model: dict[str, dict[str, int]] = {}
        self.hidden: dict[str, dict[str, int]] = {}  # erased while leased
        self.serial = 0

    def used(self) -> int:
        return sum(entry["size"] for entry in [*self.model.values(), *self.hidden.values()])

    @rule(key=KEYS)
    def look_up(self, key: str) -> None:
        expected = self.model.get(key)
        assert self.lru.get(key) == (None if expected is None else expected["value"])
        if expected is not None:
            self.model[key] = self.model.pop(key)

    @rule(key=KEYS)
    def lease(self, key: str) -> None:
        expected = self.model.get(key)
        assert self.lru.lease(key) == (None if expected is None else expected["value"])
        if expected is not None:
            expected["leases"] += 1
            self.model[key] = self.model.pop(key)

    @precondition(lambda self: any(e["leases"] for e in [*self.model.values(), *self.hidden.values()]))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        leased = [key for group in (self.model, self.hidden) for key, e in group.items() if e["leases"]]
        key = data.draw(st.sampled_from(leased))
        entry = self.model.get(key) or self.hidden[key]
        self.lru.release(key)
        entry["leases"] -= 1
        if key in self.hidden and not entry["leases"]:
            del self.hidden[key]

    @rule(key=KEYS, size=st.integers(0, BUDGET + 2))
    def put(self, key: str, size: int) -> None:
        self.serial += 1
        old = self.model.get(key) or self.hidden.get(key)
        missing = self.used() - (old["size"] if old else 0) + size - BUDGET
        victims = []
        for other, entry in self.model.items():
            if missing > 0 and other != key and not entry["leases"] and not entry["pinned"]:
                victims.append(other)
                missing -= entry["size"]
        assert self.lru.put(key, self.serial, size) == (missing <= 0)
        if missing <= 0:
            for victim in victims:
                del self.model[victim]
            self.model.pop(key, None)
            self.hidden.pop(key, None)
            held = {"leases": old["leases"], "pinned": old["pinned"]} if old else {"leases": 0, "pinned": 0}
            self.model[key] = {"value": self.serial, "size": size, **held}

    @rule(key=KEYS, is_pinned=st.booleans())
    def pin(self, key: str, is_pinned: bool) -> None:
        assert (self.lru.pin if is_pinned else self.lru.unpin)(key) == (key in self.model)
        if key in self.model:
            self.model[key]["pinned"] = is_pinned

    @rule(key=KEYS)
    def erase(self, key: str) -> None:
        assert self.lru.evict(key, Eviction.ERASED) == (key in self.model)
        entry = self.model.pop(key, None)
        if entry is not None and entry["leases"]:
            self.hidden[key] = entry | {"pinned": 0}

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.lru.check()
        assert self.lru.oldest_first() == list(self.model)
        stats = self.lru.stats()
        assert stats.used_bytes == self.used() <= BUDGET
        assert sum(stats.evictions.values()) == len(self.gone)


LRUModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLRUModel = LRUModel.TestCase


def test_entry_larger_than_the_budget_is_refused_and_evicts_nothing() -> None:
    lru: ByteLRU[str, int] = ByteLRU(10)
    assert lru.put("a", 1, 10)
    assert not lru.put("b", 2, 11)
    assert lru.oldest_first() == ["a"]


def test_leased_and_pinned_entries_outlive_any_pressure() -> None:
    lru: ByteLRU[str, int] = ByteLRU(10)
    lru.put("leased", 1, 4)
    lru.put("pinned", 2, 4)
    assert lru.lease("leased") == 1
    assert lru.pin("pinned")
    for i in range(20):
        assert lru.put(f"other-{i}", i, 2)
    assert not lru.put("too much", 3, 3)
    assert {"leased", "pinned"} <= set(lru.oldest_first())


def test_erased_while_leased_is_hidden_at_once_and_freed_by_the_last_release() -> None:
    gone: list[object] = []
    lru: ByteLRU[str, int] = ByteLRU(10, on_evict=lambda *args: gone.append(args))
    lru.put("a", 1, 10)
    lru.lease("a")
    lru.lease("a")
    assert lru.evict("a", Eviction.ERASED)
    assert lru.get("a") is None
    assert not lru.put("b", 2, 1)
    lru.release("a")
    assert gone == []
    lru.release("a")
    assert gone == [("a", 1, Eviction.ERASED)]
    assert lru.put("b", 2, 10)


def test_release_without_a_lease_is_an_error() -> None:
    lru: ByteLRU[str, int] = ByteLRU(10)
    lru.put("a", 1, 1)
    with pytest.raises(KeyError):
        lru.release("a")
    with pytest.raises(KeyError):
        lru.release("b")


def test_reserved_bytes_count_until_put_or_given_back() -> None:
    lru: ByteLRU[str, int] = ByteLRU(10)
    lru.put("old", 1, 6)
    assert lru.reserve(6)
    assert lru.oldest_first() == []
    assert not lru.reserve(5)
    assert lru.put("new", 2, 6, reserved_bytes=6)
    assert lru.stats().used_bytes == 6
    assert lru.reserve(4)
    lru.unreserve(4)
    assert lru.stats().used_bytes == 6


def test_shrink_frees_the_least_recently_used_and_spares_leases() -> None:
    lru: ByteLRU[str, int] = ByteLRU(12)
    for key in "abcd":
        lru.put(key, 0, 3)
    lru.lease("a")
    lru.release("a")
    lru.lease("b")
    assert lru.shrink(4) == 6
    assert lru.oldest_first() == ["a", "b"]


def test_counters_tell_hits_misses_and_reasons() -> None:
    lru: ByteLRU[str, int] = ByteLRU(4)
    lru.put("a", 1, 2)
    lru.put("b", 1, 2)
    lru.get("a")
    lru.get("x")
    lru.put("c", 1, 2)
    lru.put("c", 2, 2)
    lru.evict("c", Eviction.CORRUPT)
    stats = lru.stats()
    assert (stats.hits, stats.misses) == (1, 1)
    assert {reason: n for reason, n in stats.evictions.items() if n} == {
        Eviction.LRU: 1,
        Eviction.SUPERSEDED: 1,
        Eviction.CORRUPT: 1,
    }


def test_on_evict_may_call_back() -> None:
    lru: ByteLRU[str, int] = ByteLRU(2, on_evict=lambda key, value, reason: seen.append(lru.oldest_first()))
    seen: list[list[str]] = []
    lru.put("a", 1, 2)
    lru.put("b", 1, 2)
    assert seen == [["b"]]


def test_threads_never_break_the_invariant() -> None:
    lru: ByteLRU[int, int] = ByteLRU(50)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(400):
                key = (i * 7 + seed) % 13
                if lru.lease(key) is not None:
                    assert key in lru
                    lru.release(key)
                else:
                    lru.put(key, key, key + 1)
                if i % 50 == 0:
                    lru.check()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    lru.check()
    assert lru.stats().leased == 0
