"""RankPool against a small model that applies every placement to a simulated buffer of rows."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.rank_pool import AdapterKey, Extent, Placement, RankPool

ROWS = 24
SPARED = 8
KEYS = st.sampled_from([("acme", f"{i:02d}") for i in range(10)])


def apply(placement: Placement, rows: list[str | None], key: AdapterKey) -> None:
    """What the owner of the buffers does."""
    for move in placement.moves:
        rows[move.dst : move.dst + move.count] = list(rows[move.src : move.src + move.count])
    rows[placement.extent.start : placement.extent.end] = [f"{key}/{i}" for i in range(placement.extent.count)]


class PoolModel(RuleBasedStateMachine):
    """Resident adapters as key -> [rank, leases, pinned, dropped], least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = RankPool(ROWS, never_pinned_rows=SPARED)
        self.model: dict[AdapterKey, dict[str, int]] = {}
        self.rows: list[str | None] = [None] * ROWS

    def idle(self) -> dict[AdapterKey, dict[str, int]]:
        return {key: e for key, e in self.model.items() if not e["leases"] and not e["pinned"]}

    def free(self) -> int:
        return ROWS - sum(e["rank"] for e in self.model.values())

    @rule(key=KEYS, rank=st.integers(1, 12))
    def place(self, key: AdapterKey, rank: int) -> None:
        if key in self.model:
            with pytest.raises(ValueError, match="resident"):
                self.pool.place(key, rank)
            return
        idle, free = self.idle(), self.free()
        has_room = rank <= free + sum(e["rank"] for e in idle.values())
        assert self.pool.can_place(rank) == has_room
        placement = self.pool.place(key, rank)
        assert (placement is not None) == has_room
        if placement is None:
            return
        assert set(placement.evicted) <= set(idle)
        for spared in placement.evicted:  # as few as possible: sparing any one of them would leave too little
            assert free + sum(idle[v]["rank"] for v in placement.evicted if v != spared) < rank
        for victim in placement.evicted:
            del self.model[victim]
        apply(placement, self.rows, key)
        self.model[key] = {"rank": rank, "leases": 0, "pinned": 0, "dropped": 0}

    @rule(key=KEYS)
    def lease(self, key: AdapterKey) -> None:
        entry = self.model.get(key)
        extent = self.pool.lease(key)
        assert (extent is not None) == (entry is not None)
        if extent is not None and entry is not None:
            entry["leases"] += 1
            entry["dropped"] = 0
            self.model[key] = self.model.pop(key)

    @precondition(lambda self: any(e["leases"] for e in self.model.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key, e in self.model.items() if e["leases"]]))
        self.pool.release(key)
        entry = self.model[key] = self.model.pop(key)
        entry["leases"] -= 1
        if entry["dropped"] and not entry["leases"]:
            del self.model[key]

    @rule(key=KEYS)
    def pin(self, key: AdapterKey) -> None:
        entry = self.model.get(key)
        pinned = sum(e["rank"] for e in self.model.values() if e["pinned"])
        may = entry is not None and not entry["dropped"]
        if entry is not None and not entry["pinned"]:
            may = may and pinned + entry["rank"] <= ROWS - SPARED
        assert self.pool.pin(key) == may
        if may and entry is not None:
            entry["pinned"] = 1

    @rule(key=KEYS)
    def unpin(self, key: AdapterKey) -> None:
        assert self.pool.unpin(key) == (key in self.model)
        if key in self.model:
            self.model[key]["pinned"] = 0

    @rule(key=KEYS)
    def drop(self, key: AdapterKey) -> None:
        entry = self.model.get(key)
        assert self.pool.drop(key) == (entry is None or not entry["leases"])
        if entry is not None and entry["leases"]:
            entry["dropped"], entry["pinned"] = 1, 0
        elif entry is not None:
            del self.model[key]

    @invariant()
    def every_adapter_keeps_its_own_rows(self) -> None:
        self.pool.check()
        assert [r.key for r in self.pool.resident()] == list(self.model)
        for resident in self.pool.resident():
            extent, expected = resident.extent, self.model[resident.key]
            assert self.rows[extent.start : extent.end] == [f"{resident.key}/{i}" for i in range(expected["rank"])]
            assert (resident.leases, resident.is_pinned) == (expected["leases"], bool(expected["pinned"]))
        assert self.pool.free_rows == self.free()
        assert self.pool.leased_rows == sum(e["rank"] for e in self.model.values() if e["leases"])


PoolModel.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestPoolModel = PoolModel.TestCase


def placed(pool: RankPool, name: str, rank: int) -> Placement:
    placement = pool.place(("t", name), rank)
    assert placement is not None
    return placement


def test_ranks_of_any_mix_fill_the_pool_without_padding() -> None:
    pool = RankPool(64)
    for name, rank in [("a", 8), ("b", 16), ("c", 5), ("d", 35)]:
        assert placed(pool, name, rank).evicted == ()
    assert pool.free_rows == 0


def test_best_fit_keeps_the_large_hole() -> None:
    pool = RankPool(32)
    for name, rank in [("a", 4), ("b", 4), ("c", 4)]:
        placed(pool, name, rank)
    pool.drop(("t", "b"))
    assert placed(pool, "d", 4).extent == Extent(4, 4)


def test_fragmented_free_rows_are_joined_before_anyone_is_evicted() -> None:
    pool = RankPool(16)
    for name in "abcd":
        placed(pool, name, 4)
    pool.lease(("t", "b"))
    pool.drop(("t", "a"))
    pool.drop(("t", "c"))
    placement = placed(pool, "e", 8)
    assert placement.evicted == ()
    assert [(m.src, m.dst, m.count) for m in placement.moves] == [(4, 0, 4)]
    assert pool.extent_of(("t", "b")) == Extent(0, 4)
    assert placement.extent == Extent(4, 8)


def test_compaction_moves_the_fewest_rows() -> None:
    pool = RankPool(26)
    for name, rank in [("a", 2), ("big", 12), ("b", 2), ("small", 1), ("c", 2), ("d", 7)]:
        placed(pool, name, rank)
    for name in "abc":
        pool.drop(("t", name))
    placement = placed(pool, "e", 4)
    assert [m.count for m in placement.moves] == [1]


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = RankPool(12)
    for name in "abc":
        placed(pool, name, 4)
    pool.lease(("t", "a"))
    pool.release(("t", "a"))
    assert placed(pool, "d", 4).evicted == (("t", "b"),)


def test_nobody_is_evicted_in_vain() -> None:
    pool = RankPool(12)
    placed(pool, "small", 2)
    placed(pool, "large", 10)
    assert placed(pool, "new", 10).evicted == (("t", "large"),)
    assert pool.extent_of(("t", "small")) is not None


def test_leased_and_pinned_rows_are_never_evicted() -> None:
    pool = RankPool(8)
    placed(pool, "leased", 4)
    placed(pool, "pinned", 4)
    pool.lease(("t", "leased"))
    assert pool.pin(("t", "pinned"))
    assert not pool.can_place(1)
    assert pool.place(("t", "new"), 1) is None
    pool.release(("t", "leased"))
    assert placed(pool, "new", 1).evicted == (("t", "leased"),)


def test_no_room_now_and_never_are_two_answers() -> None:
    pool = RankPool(8)
    placed(pool, "a", 8)
    pool.lease(("t", "a"))
    assert pool.fits(8)
    assert pool.place(("t", "b"), 8) is None
    assert not pool.fits(9)
    with pytest.raises(ValueError, match="rank 9 cannot fit a rank pool of 8 rows"):
        pool.place(("t", "c"), 9)
    with pytest.raises(ValueError, match="rank 0"):
        pool.place(("t", "c"), 0)


def test_pins_always_leave_room_for_the_largest_rank() -> None:
    pool = RankPool(12, never_pinned_rows=8)
    placed(pool, "a", 4)
    placed(pool, "b", 4)
    assert pool.pin(("t", "a"))
    assert pool.pin(("t", "a"))
    assert not pool.pin(("t", "b"))
    assert pool.can_place(8)


def test_dropped_while_leased_is_freed_by_its_last_release() -> None:
    pool = RankPool(8)
    placed(pool, "a", 8)
    pool.lease(("t", "a"))
    assert not pool.drop(("t", "a"))
    assert pool.extent_of(("t", "a")) == Extent(0, 8)
    pool.release(("t", "a"))
    assert pool.free_rows == 8
    assert placed(pool, "a", 8).extent == Extent(0, 8)


def test_dropped_while_leased_is_kept_when_it_is_wanted_again() -> None:
    pool = RankPool(8)
    placed(pool, "a", 8)
    pool.lease(("t", "a"))
    pool.drop(("t", "a"))
    assert pool.lease(("t", "a")) == Extent(0, 8), "whoever waits for rows would stop everybody else's adapters"
    pool.release(("t", "a"))
    pool.release(("t", "a"))
    assert pool.extent_of(("t", "a")) == Extent(0, 8)


def test_release_without_a_lease_is_an_error() -> None:
    pool = RankPool(8)
    placed(pool, "a", 8)
    with pytest.raises(KeyError):
        pool.release(("t", "a"))
    with pytest.raises(KeyError):
        pool.release(("t", "x"))


def test_equal_digests_of_two_tenants_are_two_adapters() -> None:
    pool = RankPool(8)
    assert pool.place(("acme", "d"), 4) is not None
    assert pool.lease(("globex", "d")) is None
    assert pool.place(("globex", "d"), 4) is not None
    assert pool.free_rows == 0
