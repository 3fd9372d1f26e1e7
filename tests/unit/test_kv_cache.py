"""Blocks are counted right, and a prefix is found by nobody but its own."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.manifest import AdapterManifest, FileFact
from app.engine.kv_cache import KVCache
from app.engine.sequence import Phase, Request, SamplingParams, Sequence

BLOCK = 4
PROMPT = tuple(range(10, 23))  # 13 tokens: three full blocks and one token


def manifest(tenant: str = "acme", digest: str = "d1", *, rank: int = 8, name: str = "support") -> AdapterManifest:
    return AdapterManifest(
        tenant=tenant,
        name=name,
        version=1,
        digest=digest,
        config=FileFact("c" * 64, 100),
        weights=FileFact("w" * 64, 1000),
        rank=rank,
        applied_modules=1,
        base_id="base",
        base_digest="b" * 64,
        created_at=0.0,
        source="upload",
    )


def sequence(prompt=PROMPT, *, tenant="acme", adapter=None, **sampling) -> Sequence:
    sampling = {"max_tokens": 8, **sampling}
    sequence.count = getattr(sequence, "count", 0) + 1
    return Sequence(
        Request(
            id=f"r{sequence.count}",
            tenant=tenant,
            prompt=tuple(prompt),
            sampling=SamplingParams(**sampling),
            adapter=adapter,
            arrival=0.0,
            deadline=1e9,
        )
    )


def compute(cache: KVCache, seq: Sequence) -> Sequence:
    """Give it its blocks and let a step compute all of its tokens."""
    assert cache.allocate(seq, len(seq.tokens), found=cache.lookup(seq))
    seq.phase = Phase.RUNNING
    seq.num_computed = len(seq.tokens)
    cache.commit(seq)
    return seq


def test_allocation_is_all_or_nothing():
    cache = KVCache(4, BLOCK)
    first = sequence()
    assert cache.allocate(first, 12)
    assert len(first.blocks) == 3
    second = sequence()
    assert not cache.allocate(second, 5)
    assert second.blocks == []
    assert cache.allocate(second, 4)
    assert cache.usage == 1.0
    cache.check([first, second])


def test_blocks_grow_one_at_a_time():
    cache = KVCache(4, BLOCK)
    seq = sequence(prompt=range(4))
    sizes = []
    for tokens in range(4, 10):
        assert cache.allocate(seq, tokens)
        sizes.append(len(seq.blocks))
    assert sizes == [1, 2, 2, 2, 2, 3]


def test_head_room_is_left_over():
    cache = KVCache(4, BLOCK)
    assert not cache.allocate(sequence(), 16, spare=1)
    assert cache.allocate(sequence(), 12, spare=1)


def test_computed_full_blocks_are_found_and_shared():
    cache = KVCache(16, BLOCK)
    first = compute(cache, sequence())
    second = compute(cache, sequence())
    third = compute(cache, sequence())
    assert second.blocks[:3] == third.blocks[:3] == first.blocks[:3]
    assert len({seq.blocks[3] for seq in (first, second, third)}) == 3
    assert cache.usage == 6 / 16
    cache.check([first, second, third])


def test_nothing_is_found_before_it_is_computed():
    cache = KVCache(16, BLOCK)
    first = sequence()
    cache.allocate(first, len(first.tokens))
    assert cache.lookup(sequence()) == []
    first.num_computed = 9  # two full blocks and a part of the third
    cache.commit(first)
    assert cache.lookup(sequence()) == first.blocks[:2]


@pytest.mark.parametrize(("length", "hit_blocks"), [(8, 1), (9, 2), (4, 0), (1, 0)])
def test_a_hit_never_covers_the_whole_prompt(length, hit_blocks):
    cache = KVCache(16, BLOCK)
    compute(cache, sequence())
    seq = sequence(prompt=PROMPT[:length])
    assert len(cache.lookup(seq)) == hit_blocks
    compute(cache, seq)
    assert hit_blocks * BLOCK < length


def test_hits_and_queries_are_counted_in_prompt_tokens():
    cache = KVCache(16, BLOCK)
    compute(cache, sequence())
    compute(cache, sequence())
    assert (cache.query_tokens, cache.hit_tokens) == (26, 12)


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation():
    cache = KVCache(16, BLOCK)
    first = compute(cache, sequence())
    for token in (90, 91, 92, 93):
        first.tokens.append(token)
        assert cache.allocate(first, len(first.tokens))
        first.num_computed = len(first.tokens)
        cache.commit(first)
    cache.free(first)
    turn = sequence(prompt=(*PROMPT, 90, 91, 92, 93, 7, 7))
    assert len(cache.lookup(turn)) == 4


OTHERS = {
    "another tenant": {"tenant": "zeta"},
    "another tenant's equal adapter": {"tenant": "zeta", "adapter": manifest("zeta", "d1")},
    "an adapter": {"adapter": manifest("acme", "d1")},
    "another adapter": {"adapter": manifest("acme", "d2")},
    "the base": {},
}


@pytest.mark.parametrize("mine", OTHERS)
@pytest.mark.parametrize("other", OTHERS)
def test_prefixes_are_apart_for_each_tenant_and_adapter_and_the_base(mine, other):
    cache = KVCache(16, BLOCK)
    compute(cache, sequence(**OTHERS[mine]))
    assert bool(cache.lookup(sequence(**OTHERS[other]))) == (mine == other)


def test_prefixes_are_apart_for_each_base_model():
    chains = set()
    for base_digest in ("b1", "b2"):
        cache = KVCache(16, BLOCK, base_digest=base_digest)
        chains.add(compute(cache, sequence()).block_hashes[0])
    assert len(chains) == 2


def test_an_adapters_name_and_version_do_not_matter_but_its_bytes_do():
    cache = KVCache(16, BLOCK)
    compute(cache, sequence(adapter=manifest(digest="d1", name="support")))
    renamed = dataclasses.replace(manifest(digest="d1", name="other"), version=7)
    assert len(cache.lookup(sequence(adapter=renamed))) == 3
    assert cache.lookup(sequence(adapter=manifest(digest="d2", name="support"))) == []


def test_equal_blocks_at_other_places_are_not_mixed_up():
    cache = KVCache(16, BLOCK)
    compute(cache, sequence(prompt=(1, 1, 1, 1, 2, 2, 2, 2, 3)))
    assert cache.lookup(sequence(prompt=(2, 2, 2, 2, 1, 1, 1, 1, 3))) == []
    assert len(cache.lookup(sequence(prompt=(1, 1, 1, 1, 1, 1, 1, 1, 3)))) == 1


def test_prompt_logprobs_get_no_hits_until_they_are_known():
    cache = KVCache(16, BLOCK)
    compute(cache, sequence())
    seq = sequence(prompt_logprobs=0)
    assert cache.lookup(seq) == []
    seq.tokens.append(5)  # the first token went out, and the log-probabilities with it
    assert len(cache.lookup(seq)) == 3


def test_freed_blocks_stay_findable_until_their_room_is_needed():
    cache = KVCache(4, BLOCK)
    first = compute(cache, sequence())
    cache.free(first)
    assert cache.usage == 0.0
    again = compute(cache, sequence())
    assert again.num_committed == 3
    cache.free(again)
    compute(cache, sequence(prompt=range(100, 116)))
    assert cache.lookup(sequence()) == []
    assert cache.num_evictions == 3


def test_the_least_recently_used_chain_is_evicted_first_and_from_its_end():
    cache = KVCache(8, BLOCK)
    old, new = compute(cache, sequence()), compute(cache, sequence(prompt=range(50, 63)))
    cache.free(old)
    cache.free(new)
    taker = sequence(prompt=range(200, 213))
    assert cache.allocate(taker, 16)  # two free blocks (the unfinished ends) and two of the older chain
    assert len(cache.lookup(sequence())) == 1
    assert len(cache.lookup(sequence(prompt=range(50, 63)))) == 3
    cache.check([taker])


def test_found_blocks_that_nobody_holds_count_as_taken():
    cache = KVCache(4, BLOCK)
    cache.free(compute(cache, sequence()))
    other = sequence(prompt=range(50, 54))
    assert cache.allocate(other, 4)  # takes the one free block
    seq = sequence()
    assert not cache.allocate(seq, 13, found=cache.lookup(seq))  # three found, a fourth is not there
    cache.check([other])


def test_invalidate_forgets_one_adapter_and_no_other():
    cache = KVCache(32, BLOCK)
    adapter, other = manifest(digest="d1"), manifest(digest="d2")
    cache.free(compute(cache, sequence(adapter=adapter)))
    compute(cache, sequence(adapter=other))
    compute(cache, sequence())
    assert cache.invalidate(("acme", "d1")) == 3
    assert cache.lookup(sequence(adapter=adapter)) == []
    assert len(cache.lookup(sequence(adapter=other))) == 3
    assert cache.invalidate(("acme", "")) == 3
    assert cache.lookup(sequence()) == []


def test_what_runs_when_its_adapter_is_invalidated_becomes_findable_no_more():
    cache = KVCache(32, BLOCK)
    adapter = manifest()
    seq = compute(cache, sequence(adapter=adapter))
    cache.invalidate(("acme", "d1"))
    for token in range(8):
        seq.tokens.append(token)
    assert cache.allocate(seq, len(seq.tokens))
    seq.num_computed = len(seq.tokens)
    cache.commit(seq)
    fresh = compute(cache, sequence(adapter=adapter))
    assert cache.lookup(sequence(prompt=(*PROMPT, *range(9)), adapter=adapter)) == fresh.blocks[:3]
    cache.check([seq, fresh])
    cache.free(seq)
    cache.free(fresh)
    cache.check()
    assert cache.num_available == 32


def test_a_prefix_under_way_can_be_waited_for():
    cache = KVCache(32, BLOCK)
    leader = sequence()
    cache.allocate(leader, 13)
    follower, stranger = sequence(), sequence(tenant="zeta")
    assert cache.is_being_computed(follower, 0)
    assert not cache.is_being_computed(stranger, 0)
    leader.num_computed = 12
    cache.commit(leader)
    assert not cache.is_being_computed(follower, len(cache.lookup(follower)))
    cache.free(leader)
    cache.check()


def test_nobody_waits_for_a_leader_that_left():
    cache = KVCache(32, BLOCK)
    leader = sequence()
    cache.allocate(leader, 13)
    cache.free(leader)
    assert not cache.is_being_computed(sequence(), 0)


def test_without_prefix_caching_nothing_is_found():
    cache = KVCache(16, BLOCK, prefix_caching=False)
    cache.free(compute(cache, sequence()))
    assert cache.lookup(sequence()) == []
    assert not cache.is_being_computed(sequence(), 0)
    assert cache.query_tokens == 0
    cache.check()


def test_a_cache_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match="num_blocks"):
        KVCache(0, BLOCK)


def test_check_sees_a_block_that_leaked():
    cache = KVCache(8, BLOCK)
    seq = compute(cache, sequence())
    seq.blocks.pop()
    with pytest.raises(AssertionError):
        cache.check([seq])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_books_stay_right_under_any_traffic(data):
    cache = KVCache(data.draw(st.integers(3, 12)), 2)
    live: list[Sequence] = []
    adapters = [None, manifest(digest="d1"), manifest(digest="d2")]
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["start", "grow", "free", "invalidate"]))
        if action == "start":
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
            seq = sequence(prompt=prompt, adapter=data.draw(st.sampled_from(adapters)))
            found = cache.lookup(seq)
            if cache.allocate(seq, len(seq.tokens), found=found):
                assert seq.num_computed == 2 * len(found) < len(seq.tokens)
                live.append(seq)
        elif action == "grow" and live:
            seq = data.draw(st.sampled_from(live))
            seq.num_computed = data.draw(st.integers(seq.num_computed, len(seq.tokens)))
            cache.commit(seq)
            if seq.num_computed == len(seq.tokens):
                seq.tokens.append(data.draw(st.integers(0, 1)))
                if not cache.allocate(seq, len(seq.tokens)):
                    cache.free(seq)
                    live.remove(seq)
        elif action == "free" and live:
            seq = live.pop(data.draw(st.integers(0, len(live) - 1)))
            cache.free(seq)
        elif action == "invalidate":
            cache.invalidate(("acme", data.draw(st.sampled_from(["", "d1", "d2"]))))
        cache.check(live)
    for seq in live:
        cache.free(seq)
    cache.check()
    assert cache.usage == 0.0
