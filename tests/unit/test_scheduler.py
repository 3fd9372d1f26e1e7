"""Who runs when: fairness, leases, ageing, preemption, the token budget; on a model and a rank pool made of dicts."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterQuarantined, AdapterUnavailable
from adapters.manifest import AdapterManifest
from app.engine.kv_cache import KVCache
from app.engine.scheduler import Acquired, Lease, Scheduler, SchedulerLimits, TenantShare
from app.engine.sequence import AdapterKey, Batch, Phase, Request, SamplingParams, Sequence
from app.errors import AccessDenied, ContextLengthExceeded, OutOfMemory, QueueFull, RateLimited
from tests.unit.test_kv_cache import manifest

BLOCK = 4


class Rows:
    """A rank pool that counts rows only: leases, eviction of what is not leased, fetches that take some steps."""

    def __init__(self, num_rows: int, fetch_s: float = 0.0, broken: Iterable[str] = ()) -> None:
        self.num_rows = num_rows
        self.fetch_s = fetch_s
        self.broken = set(broken)  # digests
        self.leases: Counter[AdapterKey] = Counter()
        self.ranks: OrderedDict[AdapterKey, int] = OrderedDict()
        self.arrives: dict[AdapterKey, float] = {}
        self.num_acquired = self.num_released = 0

    def acquire(self, adapter: AdapterManifest, now: float) -> Acquired:
        key = (adapter.tenant, adapter.digest)
        if adapter.digest in self.broken:
            return Acquired(Lease.FAILED, error=AdapterQuarantined())
        if key not in self.ranks:
            if now < self.arrives.setdefault(key, now + self.fetch_s):
                return Acquired(Lease.FETCHING)
            if not self._make_room(adapter.rank):
                return Acquired(Lease.NO_ROOM)
            self.ranks[key] = adapter.rank
        self.ranks.move_to_end(key)
        self.leases[key] += 1
        self.num_acquired += 1
        return Acquired(Lease.READY, tier="pool")

    def release(self, key: AdapterKey) -> None:
        assert self.leases[key] > 0, "released twice"
        self.leases[key] -= 1
        self.num_released += 1

    def _make_room(self, rank: int) -> bool:
        idle = [key for key in self.ranks if not self.leases[key]]
        free = self.num_rows - sum(self.ranks.values())
        if free + sum(self.ranks[key] for key in idle) < rank:
            return False
        for key in idle:
            if free >= rank:
                break
            free += self.ranks.pop(key)
            del self.arrives[key]
        return True


def next_token(seq: Sequence) -> int:
    """The fake model: a token depends on all before it and on the adapter, and on nothing else."""
    return zlib.crc32(repr((seq.tokens, seq.adapter_key)).encode()) % 50


class Rig:
    """Drives a scheduler as the engine does, with a clock of its own, and checks every step.

    Its KV cache holds for each block position which text it was computed from, so a wrong or overwritten block is seen.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        rows: Rows | None = None,
        share_of: Callable[[str], TenantShare] = lambda tenant: TenantShare(),
        prefix_caching: bool = True,
        step_s: float = 1.0,
        **limits: float,
    ) -> None:
        self.kv = KVCache(num_blocks, BLOCK, prefix_caching)
        self.rows = rows or Rows(1000)
        limits = {"max_context": 1000, "max_sequences": 8, "max_batch_tokens": 32, **limits}
        self.limits = SchedulerLimits(**limits)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.kv, self.rows, self.limits, share_of)
        self.now, self.step_s = 0.0, step_s
        self.cells: dict[tuple[int, int], object] = {}
        self.texts: dict[str, list[int]] = {}
        self.ends: dict[str, list[str]] = {}
        self.started: list[str] = []  # ids in order of first admission
        self.num_requests = 0

    def request(
        self, prompt: Iterable[int] | None = None, tenant: str = "acme", adapter: str | None = None, **fields
    ) -> Request:
        self.num_requests += 1
        """A prompt of five tokens that no other request has, unless given."""
        prompt = [10_000 + self.num_requests] * 5 if prompt is None else prompt
        rank = fields.pop("rank", 1)
        deadline = fields.pop("deadline", 1e9)
        name = fields.pop("id", f"r{self.num_requests}")
        return Request(
            id=name,
            tenant=tenant,
            prompt=tuple(prompt),
            sampling=SamplingParams(**{"max_tokens": 4, **fields}),
            adapter=None if adapter is None else manifest(tenant, adapter, rank=rank),
            arrival=self.now + self.num_requests * 1e-6,
            deadline=deadline,
        )

    def add(self, *args, **kwargs) -> Sequence:
        request = self.request(*args, **kwargs)
        self.scheduler.check_submit(request)
        seq = Sequence(request)
        self.scheduler.add(seq)
        return seq

    def end(self, seq: Sequence, how: str) -> None:
        assert seq.phase is Phase.FINISHED
        assert not seq.blocks
        assert not seq.has_lease
        self.ends.setdefault(seq.id, []).append(how)
        self.texts[seq.id] = seq.tokens[seq.num_prompt :]

    def step(self) -> Batch:
        scheduler = self.scheduler
        for seq in scheduler.expire(self.now):
            self.end(seq, "deadline")
        batch = scheduler.schedule(self.now)
        self.started += [seq.id for seq in scheduler.take_admitted()]
        for seq, _error in scheduler.take_failed():
            self.end(seq, "error")
        self.check_batch(batch)
        sampled = self.compute(batch)
        scheduler.commit(batch, sampled)
        for chunk in batch.chunks:
            seq = chunk.sequence
            if seq.id in sampled and seq.num_generated >= seq.request.sampling.max_tokens:
                scheduler.finish(seq)
                self.end(seq, "length")
        scheduler.check_books()
        leased = Counter(s.adapter_key for s in scheduler.sequences() if s.has_lease)
        assert +self.rows.leases == leased, "leases are not what running sequences hold"
        assert sum(self.rows.ranks.values()) <= self.rows.num_rows
        self.now += self.step_s
        return batch

    def check_batch(self, batch: Batch) -> None:
        running = [seq for seq in self.scheduler.sequences() if seq.phase is Phase.RUNNING]
        assert batch.num_tokens <= self.limits.max_batch_tokens
        assert len(running) <= self.limits.max_sequences
        assert {c.sequence.id for c in batch.chunks} == {s.id for s in running}, "a running sequence stands still"
        assert len(batch.chunks) == len(running)
        for chunk in batch.chunks:
            assert chunk.count >= 1
            assert chunk.start == chunk.sequence.num_computed
            assert len(chunk.sequence.blocks) * BLOCK >= chunk.start + chunk.count

    def compute(self, batch: Batch) -> dict[str, int]:
        sampled = {}
        for chunk in batch.chunks:
            seq = chunk.sequence
            for at in range(chunk.start, chunk.start + chunk.count):
                self.cells[seq.blocks[at // BLOCK], at % BLOCK] = self.cell(seq, at)
            for at in range(chunk.start + chunk.count):
                assert self.cells[seq.blocks[at // BLOCK], at % BLOCK] == self.cell(seq, at), "foreign K and V"
            if chunk.samples:
                sampled[seq.id] = next_token(seq)
        return sampled

    @staticmethod
    def cell(seq: Sequence, at: int) -> object:
        return (seq.request.tenant, seq.adapter_key, tuple(seq.tokens[: at + 1]))

    def run(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        self.scheduler.check()
        assert self.rows.num_acquired == self.rows.num_released
        assert all(len(ends) == 1 for ends in self.ends.values())


def alone(request: Request) -> list[int]:
    """What the fake model says to a request that has the server to itself."""
    seq = Sequence(request)
    for _ in range(request.sampling.max_tokens):
        seq.tokens.append(next_token(seq))
    return seq.tokens[seq.num_prompt :]


# Submitting.


def test_a_request_longer_than_the_context_is_refused_with_the_numbers():
    rig = Rig(max_context=10)
    rig.scheduler.check_fits(rig.request(range(6), max_tokens=4))
    with pytest.raises(ContextLengthExceeded, match=r"10 tokens; 7 in the prompt and 4 to generate are 11"):
        rig.scheduler.check_fits(rig.request(range(7), max_tokens=4))


def test_a_request_that_no_empty_kv_cache_holds_is_refused():
    rig = Rig(num_blocks=3)
    rig.scheduler.check_fits(rig.request(range(9), max_tokens=4))  # the last token's K and V are never needed
    with pytest.raises(OutOfMemory, match="12 tokens"):
        rig.scheduler.check_fits(rig.request(range(10), max_tokens=4))


def test_the_largest_request_that_is_accepted_runs():
    rig = Rig(num_blocks=3)
    seq = rig.add(range(9), max_tokens=4)
    rig.run()
    assert rig.texts[seq.id] == alone(seq.request)


def test_an_adapter_of_another_tenant_is_refused():
    rig = Rig()
    request = dataclasses.replace(rig.request(tenant="zeta"), adapter=manifest("acme"))
    with pytest.raises(AccessDenied):
        rig.scheduler.check_submit(request)


def test_a_full_queue_refuses_and_counts_what_is_in_the_inbox():
    rig = Rig(max_waiting=3)
    rig.add()
    rig.scheduler.check_submit(rig.request(), inbox=1)
    with pytest.raises(QueueFull):
        rig.scheduler.check_submit(rig.request(), inbox=2)


def test_a_tenants_own_cap_on_waiting_requests_binds_it_alone():
    rig = Rig(share_of=lambda tenant: TenantShare(max_waiting=1 if tenant == "acme" else None))
    rig.add()
    with pytest.raises(RateLimited):
        rig.add()
    rig.add(tenant="zeta")
    rig.add(tenant="zeta")


def test_limits_that_would_starve_decodes_are_refused():
    with pytest.raises(ValueError, match="max_batch_tokens"):
        SchedulerLimits(max_context=100, max_sequences=8, max_batch_tokens=7)


# A sequence's life.


def test_a_request_runs_to_its_end_and_leaves_nothing():
    rig = Rig()
    seq = rig.add(range(10), adapter="d1", max_tokens=6)
    assert rig.step().num_tokens == 10
    assert (seq.phase, seq.admitted_at, seq.tier) == (Phase.RUNNING, 0.0, "pool")
    rig.run()
    assert rig.texts[seq.id] == alone(seq.request)
    assert rig.started == [seq.id]


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_cancelled_request_leaves_nothing_wherever_it_was(steps):
    rig = Rig(rows=Rows(4, fetch_s=2.0))
    seq = rig.add(range(60), adapter="d1")
    for _ in range(steps):
        rig.step()
    assert rig.scheduler.cancel(seq.id) is seq
    assert rig.scheduler.cancel(seq.id) is None
    rig.scheduler.check()
    assert rig.rows.num_acquired == rig.rows.num_released


def test_waiting_and_running_sequences_end_at_their_deadline():
    rig = Rig(max_sequences=1)
    first = rig.add(max_tokens=50, deadline=3.0)
    second = rig.add(max_tokens=50, deadline=2.0)
    third = rig.add(max_tokens=2)
    rig.run()
    assert rig.ends == {second.id: ["deadline"], first.id: ["deadline"], third.id: ["length"]}
    assert rig.texts[first.id]
    assert not rig.texts[second.id]


def test_clear_ends_everything():
    rig = Rig(max_sequences=2)
    sequences = [rig.add(adapter="d1", max_tokens=9) for _ in range(4)]
    rig.step()
    assert set(rig.scheduler.clear()) == set(sequences)
    rig.scheduler.check()


def test_a_sequence_ends_once():
    rig = Rig()
    seq = rig.add()
    rig.scheduler.finish(seq)
    with pytest.raises(AssertionError):
        rig.scheduler.finish(seq)


def test_check_sees_what_an_idle_scheduler_still_holds():
    rig = Rig()
    rig.add()
    with pytest.raises(AssertionError):
        rig.scheduler.check()


def test_a_row_without_a_token_is_not_committed_and_its_prefix_is_never_shared():
    rig = Rig()
    seq = rig.add(range(10), adapter="d1")
    batch = rig.scheduler.schedule(0.0)
    rig.scheduler.commit(batch, {})
    assert seq.num_computed == 0
    rig.scheduler.finish(seq)
    assert rig.kv.lookup(Sequence(rig.request(range(10), adapter="d1"))) == []
    rig.scheduler.check()


def test_a_sequence_that_ended_between_schedule_and_commit_is_left_alone():
    rig = Rig()
    seq = rig.add(range(10))
    batch = rig.scheduler.schedule(0.0)
    rig.scheduler.cancel(seq.id)
    rig.scheduler.commit(batch, {seq.id: 7})
    assert seq.num_generated == 0
    rig.scheduler.check()


def test_the_snapshot_counts_by_adapter():
    rig = Rig(max_sequences=1, rows=Rows(4, fetch_s=100.0))
    rig.add(tenant="zeta", max_tokens=9)
    rig.add(adapter="d1")
    rig.add(adapter="d1")
    rig.step()
    snapshot = rig.scheduler.snapshot()
    assert (snapshot.num_running, snapshot.num_waiting) == (1, 2)
    [load] = snapshot.adapters
    assert (load.adapter.key, load.num_waiting, load.num_running) == (("acme", "d1"), 2, 0)
    assert 0 < snapshot.kv_usage < 1


# The step's tokens.


def test_a_long_prompt_is_chunked_while_decodes_go_on_in_every_step():
    rig = Rig(max_batch_tokens=16)
    talker = rig.add(max_tokens=30)
    rig.step()
    book = rig.add(range(100), max_tokens=2)
    counts = []
    while book.num_generated == 0:
        generated = talker.num_generated
        batch = rig.step()
        assert talker.num_generated == generated + 1
        counts += [chunk.count for chunk in batch.chunks if chunk.sequence is book]
    assert counts == [15, 15, 15, 15, 15, 15, 10]


def test_a_short_prompt_does_not_wait_behind_another_tenants_long_ones():
    rig = Rig(max_batch_tokens=32, num_blocks=256)
    for number in range(4):
        rig.add(range(number * 1000, number * 1000 + 200), tenant="books")
    behind = rig.add(tenant="books")
    rig.step()
    short = rig.add(tenant="light")
    rig.step()
    assert short.num_generated == 1
    assert behind.admitted_at is None, "within a tenant, first come is first served"
    rig.run()


def test_no_more_long_prompts_start_than_fill_the_step():
    rig = Rig(max_batch_tokens=32, num_blocks=256)
    books = [rig.add(range(number * 1000, number * 1000 + 200)) for number in range(4)]
    rig.step()
    assert [seq.phase for seq in books] == [Phase.RUNNING] * 2 + [Phase.WAITING] * 2


def test_prompts_fill_the_step_even_when_all_are_long():
    rig = Rig(max_batch_tokens=32, num_blocks=256)
    for number in range(8):
        rig.add(range(number * 1000, number * 1000 + 9))
    assert rig.step().num_tokens == 32


def test_no_more_prompts_start_than_the_step_can_finish():
    """Eight prompts at half speed would all be answered later than four and four."""
    rig = Rig(max_batch_tokens=32)
    sequences = [rig.add(range(number * 100, number * 100 + 8)) for number in range(8)]
    rig.step()
    assert [seq.num_generated for seq in sequences] == [1] * 4 + [0] * 4
    assert [seq.phase for seq in sequences[4:]] == [Phase.WAITING] * 4


def test_no_more_sequences_run_than_allowed():
    rig = Rig(max_sequences=3)
    sequences = [rig.add() for _ in range(5)]
    rig.step()
    rig.step()
    assert sum(seq.phase is Phase.RUNNING for seq in sequences) == 3


def test_a_prompt_is_cut_small_where_most_decode_and_not_where_most_wait():
    rig = Rig(max_batch_tokens=64, max_prefill_tokens=8, num_blocks=256)
    decoding = [rig.add((n,), max_tokens=50) for n in range(3)]
    rig.step()
    late = rig.add(range(100, 140))
    assert [c.count for c in rig.step().chunks if c.sequence is late] == [8]
    assert all(seq.num_generated == 2 for seq in decoding), "nobody who decodes is skipped"
    others = [rig.add(range(n, n + 12)) for n in range(200, 800, 100)]  # now seven wait and three decode
    batch = rig.step()
    assert batch.num_tokens == 64
    assert {c.sequence.id for c in batch.chunks} >= {late.id, others[0].id}


def test_a_step_of_decodes_only_reads_no_prompt_unless_nobody_decodes():
    rig = Rig(max_batch_tokens=64)
    first = rig.add(max_tokens=9)
    assert [c.sequence for c in rig.scheduler.schedule(rig.now, decodes_only=True).chunks] == [first]
    rig.step()
    late = rig.add()
    assert [c.sequence for c in rig.scheduler.schedule(rig.now, decodes_only=True).chunks] == [first]
    assert rig.scheduler.has_unread_prompts
    assert late in {chunk.sequence for chunk in rig.step().chunks}
    assert not rig.scheduler.has_unread_prompts
    rig.run()


def test_who_waits_for_a_place_has_an_unread_prompt_and_who_waits_for_an_adapter_has_not():
    rig = Rig(rows=Rows(8, fetch_s=20.0), max_sequences=1)
    rig.add(adapter="cold")
    rig.add(max_tokens=3)
    rig.step()
    assert not rig.scheduler.has_unread_prompts
    rig.add()
    rig.step()
    assert rig.scheduler.has_unread_prompts
    rig.run()


# Fairness.


def test_requests_of_one_tenant_start_in_the_order_they_came():
    rig = Rig(max_sequences=1)
    ids = [rig.add().id for _ in range(5)]
    rig.run()
    assert rig.started == ids


def test_a_flooding_tenant_does_not_delay_a_light_one():
    rig = Rig(max_sequences=2)
    flood = [rig.add(tenant="flood", max_tokens=10) for _ in range(40)]
    for _ in range(15):
        rig.step()
    light = [rig.add(tenant="light", max_tokens=10) for _ in range(3)]
    rig.run()
    # At least every second start is the light tenant's, from the moment it asks.
    asked = sum(1 for seq in flood if seq.admitted_at is not None and seq.admitted_at < 15)
    assert max(rig.started.index(seq.id) for seq in light) <= asked + 2 * len(light)


def test_two_backlogged_tenants_share_by_weight():
    rig = Rig(
        max_sequences=2, num_blocks=256, share_of=lambda tenant: TenantShare(weight=3.0 if tenant == "big" else 1.0)
    )
    for _ in range(100):
        rig.add(tenant="big")
        rig.add(tenant="small")
    for _ in range(160):
        rig.step()
    counts = Counter(seq_id for seq_id in rig.started)
    big = sum(1 for seq_id in counts if int(seq_id[1:]) % 2 == 1)
    assert big / (len(rig.started) - big) == pytest.approx(3.0, rel=0.15)


def test_a_tenants_cap_on_running_sequences_leaves_the_places_to_others():
    rig = Rig(share_of=lambda tenant: TenantShare(max_running=1 if tenant == "flood" else None))
    flood = [rig.add(tenant="flood") for _ in range(4)]
    other = [rig.add(tenant="other") for _ in range(4)]
    rig.step()
    assert [seq.phase is Phase.RUNNING for seq in flood] == [True, False, False, False]
    assert all(seq.phase is Phase.RUNNING for seq in other)
    rig.run()


def test_who_waits_for_kv_blocks_is_not_overtaken():
    rig = Rig(num_blocks=10)
    rig.add(range(20), tenant="first", max_tokens=10)
    rig.step()
    large = rig.add(range(100, 120), tenant="large", max_tokens=2)
    small = rig.add((1,), tenant="small", max_tokens=2)
    rig.step()
    # The least served is tried first; both were lifted to the same counter, and the large one came first.
    assert (large.phase, small.phase) == (Phase.WAITING, Phase.WAITING)
    rig.run()
    assert rig.started.index(large.id) < rig.started.index(small.id)


# Adapters.


def test_a_fetch_delays_its_own_requests_only_and_costs_its_tenant_nothing():
    rig = Rig(rows=Rows(8, fetch_s=20.0))
    cold = rig.add(adapter="cold", max_tokens=2)
    warm = [rig.add(max_tokens=3) for _ in range(3)]
    other = rig.add(tenant="other", max_tokens=3)
    rig.step()
    assert cold.phase is Phase.FETCHING
    assert all(seq.phase is Phase.RUNNING for seq in (*warm, other))
    assert rig.scheduler.snapshot().num_fetching == 1
    for _ in range(5):
        rig.step()
    before = rig.scheduler.served("acme")
    assert before == 3 * (5 + 2 * 3)
    rig.run()
    assert cold.admitted_at == 20.0
    assert rig.scheduler.served("acme") == before + 5 + 2 * 2


def test_the_tier_of_a_fetch_is_noted_with_all_who_waited_for_it():
    rig = Rig(rows=Rows(8, fetch_s=3.0))
    cold = [rig.add(adapter="cold") for _ in range(2)]
    rig.step()
    assert rig.scheduler.adapter_arrived(("acme", "cold"), None, "s3") == []
    rig.run()
    late = rig.add(adapter="cold")
    rig.run()
    assert [seq.tier for seq in (*cold, late)] == ["s3", "s3", "pool"]


def test_a_failed_fetch_ends_all_who_waited_for_it_and_nobody_else():
    rig = Rig(rows=Rows(8, fetch_s=1e9))
    cold = [rig.add(adapter="cold") for _ in range(2)]
    other = rig.add(adapter="other")
    rig.step()
    assert rig.scheduler.adapter_arrived(("acme", "cold"), AdapterUnavailable(), None) == cold
    assert all(seq.phase is Phase.FINISHED for seq in cold)
    assert other.phase is Phase.FETCHING


def test_an_adapter_that_cannot_be_used_fails_its_requests_only():
    rig = Rig(rows=Rows(8, broken=["bad"]))
    bad, good = rig.add(adapter="bad"), rig.add(adapter="good")
    rig.run()
    assert rig.ends == {bad.id: ["error"], good.id: ["length"]}


def test_others_pass_a_sequence_that_waits_for_rows_while_it_is_young():
    rig = Rig(rows=Rows(1), step_s=0.1)
    rig.add(adapter="a", max_tokens=20)
    waiting = rig.add(adapter="b")
    rig.step()
    younger = rig.add(adapter="a")
    rig.step()
    assert (waiting.phase, younger.phase) == (Phase.WAITING, Phase.RUNNING)
    assert rig.scheduler.snapshot().num_row_waits == 1


@pytest.mark.parametrize("same_tenant", [True, False])
def test_ageing_bounds_the_wait_for_rows_under_a_steady_stream(same_tenant):
    """Room for one adapter; A's requests keep coming and overlap, so A is never idle unless it is made to be."""
    rig = Rig(rows=Rows(1), step_s=0.1)
    tenant = "acme" if same_tenant else "other"
    rig.add(adapter="a", max_tokens=10)
    rig.step()
    starved = rig.add(adapter="b", tenant=tenant)
    base = []
    for step in range(100):
        if step % 5 == 0:
            rig.add(adapter="a", max_tokens=10)
        if starved.admitted_at is not None:
            break
        base.append(rig.add((step, step), tenant="base", max_tokens=1))
        rig.step()
    assert starved.admitted_at is not None
    # 3 s until it is old, and one step for each token of the last A that was let in before.
    assert 3.0 < starved.admitted_at <= 3.0 + 10 * 0.1 + 0.3
    assert all(seq.admitted_at is not None for seq in base), "the base needs no rows and goes on"
    rig.run()


def test_without_ageing_the_stream_would_starve_it():
    rig = Rig(rows=Rows(1), step_s=0.1, max_adapter_wait_s=1e9)
    rig.add(adapter="a", max_tokens=10)
    rig.step()
    starved = rig.add(adapter="b")
    for step in range(100):
        if step % 5 == 0:
            rig.add(adapter="a", max_tokens=10)
        rig.step()
    assert starved.admitted_at is None


def test_a_wide_adapter_gets_its_rows_although_narrow_ones_keep_coming():
    rig = Rig(rows=Rows(4), step_s=0.1)
    for number in range(4):
        rig.add(adapter=f"n{number}", max_tokens=8)
    rig.step()
    wide = rig.add(adapter="wide", rank=4)
    for step in range(100):
        rig.add(adapter=f"n{step % 4}", max_tokens=8)
        rig.step()
        if wide.admitted_at is not None:
            break
    assert wide.admitted_at is not None
    assert wide.admitted_at < 5.0


def test_a_sequence_keeps_its_age_when_its_turn_is_put_off_in_between():
    """A pool that copies few adapters a step answers "fetching" when others were first; that is no new beginning."""

    class Reluctant(Rows):
        def acquire(self, adapter: AdapterManifest, now: float) -> Acquired:
            if adapter.digest == "wide" and now < 3.0 and round(now * 10) % 2:
                return Acquired(Lease.FETCHING)
            return super().acquire(adapter, now)

    rig = Rig(rows=Reluctant(2), step_s=0.1)
    rig.add(adapter="a", max_tokens=8)
    rig.step()
    wide = rig.add(adapter="wide", rank=2)
    for _ in range(100):
        rig.add(adapter="a", max_tokens=8)
        rig.step()
    assert wide.admitted_at is not None
    assert wide.admitted_at < 3.0 + 8 * 0.1 + 0.5


def test_many_cold_adapters_of_one_tenant_age_one_at_a_time():
    rig = Rig(rows=Rows(1), step_s=0.5, max_sequences=2)
    rig.add(adapter="a", tenant="light", max_tokens=4)
    rig.step()
    flood = [rig.add(adapter=f"f{number}", tenant="flood", max_tokens=8) for number in range(10)]
    light = [rig.add(adapter="a", tenant="light", max_tokens=4) for _ in range(10)]
    rig.run()
    order = [seq_id for seq_id in rig.started if seq_id in {seq.id for seq in light}]
    last_light = rig.started.index(order[-1])
    before = [seq for seq in flood if rig.started.index(seq.id) < last_light]
    assert len(before) <= len(light), "ten cold adapters do not pass ten requests of another tenant"


# Preemption.


def test_preemption_gives_the_same_tokens_and_charges_the_prompt_once():
    rig = Rig(num_blocks=12, max_sequences=4)
    sequences = [rig.add(range(n * 100, n * 100 + 6), tenant=f"t{n % 2}", max_tokens=20) for n in range(4)]
    rig.run()
    assert rig.scheduler.snapshot().num_preemptions > 0
    for seq in sequences:
        assert rig.texts[seq.id] == alone(seq.request)
    assert rig.scheduler.served("t0") == rig.scheduler.served("t1") == 2 * (6 + 2 * 20)
    assert len(rig.started) == 4, "a sequence is admitted to its client once"


def test_the_most_served_tenant_gives_up_its_latest_sequence():
    rig = Rig(num_blocks=8, prefix_caching=False)
    rows = [rig.add(range(n, n + 4), tenant="much" if n else "little", max_tokens=10) for n in range(3)]
    while not rig.scheduler.snapshot().num_preemptions:
        rig.step()
    assert [seq.num_preemptions for seq in rows] == [0, 0, 1]
    assert rows[2].num_generated > 0


def test_a_preempted_sequence_goes_before_its_tenants_other_requests():
    rig = Rig(num_blocks=8, prefix_caching=False, max_sequences=3)
    rows = [rig.add(range(n, n + 4), max_tokens=12) for n in range(3)]
    late = rig.add((1, 2), max_tokens=1)
    while not rig.scheduler.snapshot().num_preemptions:
        rig.step()
    preempted = next(seq for seq in rows if seq.phase is Phase.WAITING)
    while preempted.phase is Phase.WAITING:
        assert late.admitted_at is None
        rig.step()
    rig.run()


def test_nobody_is_admitted_into_the_blocks_that_a_preemption_made_free():
    rig = Rig(num_blocks=8, prefix_caching=False, max_sequences=3)
    for n in range(3):
        rig.add(range(n, n + 4), max_tokens=12)
    rig.step()
    small = rig.add((1, 2), tenant="light", max_tokens=1)
    while not rig.scheduler.snapshot().num_preemptions:
        rig.step()
    assert small.admitted_at is None
    rig.run()


def test_a_preempted_sequence_gives_its_lease_back():
    rig = Rig(num_blocks=8, rows=Rows(8))
    for n in range(3):
        rig.add(range(n, n + 4), adapter=f"d{n}", max_tokens=12)
    rig.run()
    assert rig.scheduler.snapshot().num_preemptions > 0
    assert rig.rows.num_acquired == rig.rows.num_released > 3


# Prefixes.


def test_n_equal_prompts_are_computed_once():
    rig = Rig(max_batch_tokens=64)
    sequences = [rig.add(range(33), adapter="d1") for _ in range(6)]
    assert rig.step().num_tokens == 33
    assert rig.step().num_tokens == 1 + 5 * 1  # the leader decodes; eight blocks are found, one token is left
    assert [seq.num_cached for seq in sequences] == [0, 32, 32, 32, 32, 32]
    assert len({tuple(seq.blocks[:8]) for seq in sequences}) == 1
    rig.run()


def test_who_waits_for_a_prefix_that_is_cancelled_goes_on_alone():
    rig = Rig(max_batch_tokens=16)
    leader, follower = rig.add(range(60)), rig.add(range(60))
    rig.step()
    assert follower.phase is Phase.WAITING
    rig.scheduler.cancel(leader.id)
    rig.run()
    assert rig.texts[follower.id] == alone(follower.request)


def test_equal_prompts_of_two_tenants_share_nothing():
    rig = Rig(max_batch_tokens=64)
    for tenant in ("acme", "zeta"):
        rig.add(range(20), tenant=tenant)
    assert rig.step().num_tokens == 40
    rig.run()
    assert rig.kv.hit_tokens == 0


# Any traffic.


@st.composite
def traffic(draw: st.DrawFn) -> list[dict[str, object]]:
    return [
        {
            "at": draw(st.integers(0, 20)),
            "prompt": draw(st.lists(st.integers(0, 1), min_size=1, max_size=20)),
            "tenant": draw(st.sampled_from(["a", "b", "c"])),
            "adapter": draw(st.sampled_from([None, "d1", "d2", "d3", "bad"])),
            "max_tokens": draw(st.integers(1, 12)),
            "cancel_at": draw(st.sampled_from([None, None, None, 3, 8])),
            "deadline": draw(st.sampled_from([1e9, 1e9, 1e9, 12.0])),
            "prompt_logprobs": draw(st.sampled_from([None, None, 0])),
        }
        for _ in range(draw(st.integers(1, 14)))
    ]


RANKS = {"d1": 1, "d2": 2, "d3": 3, "bad": 1}


@settings(max_examples=80, deadline=None)
@given(traffic(), st.integers(8, 20), st.integers(3, 5), st.integers(4, 24), st.booleans(), st.sampled_from([0.0, 3.0]))
def test_every_request_ends_once_and_nothing_leaks(requests, num_blocks, num_rows, budget, caching, fetch_s):
    rig = Rig(
        num_blocks=num_blocks,
        rows=Rows(num_rows, fetch_s, broken=["bad"]),
        prefix_caching=caching,
        max_sequences=4,
        max_batch_tokens=budget,
    )
    sequences: list[Sequence] = []
    cancels: list[tuple[float, Sequence]] = []
    for tick in range(21):
        for spec in [r for r in requests if r["at"] == tick]:
            fields = {k: v for k, v in spec.items() if k not in ("at", "cancel_at")}
            seq = rig.add(rank=RANKS.get(spec["adapter"], 1), **fields)
            sequences.append(seq)
            if spec["cancel_at"] is not None:
                cancels.append((tick + spec["cancel_at"], seq))
        for seq in [seq for at, seq in cancels if at == tick]:
            if rig.scheduler.cancel(seq.id) is not None:
                rig.end(seq, "cancelled")
        rig.step()
    rig.run()
    assert set(rig.ends) == {seq.id for seq in sequences}
    for seq in sequences:
        if rig.ends[seq.id] == ["length"]:
            assert rig.texts[seq.id] == alone(seq.request)
        if seq.request.adapter is not None and seq.request.adapter.digest == "bad":
            assert not rig.texts[seq.id]
