"""Which examples make a step, and how steps are cut: by property, on random lengths."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.training.batching import GROUP_BATCHES, BatchOrder, ExampleSizes, in_length_order, micro_batches

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=200)


def sizes_of(lengths: list[int], num_rows: int = 1) -> ExampleSizes:
    widths = np.array(lengths, np.int64)
    return ExampleSizes(widths * num_rows, widths, widths, num_rows)


@given(LENGTHS, st.integers(1, 16), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_every_epoch_has_every_example_once(lengths: list[int], batch_size: int, seed: int) -> None:
    order = BatchOrder(np.array(lengths, np.int64), batch_size=batch_size, seed=seed)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        assert sum(len(batch) != batch_size for batch in batches) <= 1


def test_a_run_that_is_continued_sees_the_same_batches() -> None:
    lengths = np.arange(1, 101, dtype=np.int64)
    whole = BatchOrder(lengths, batch_size=8, seed=3)
    seen = [whole.batch(step).tolist() for step in range(40)]
    for step in (39, 0, 20):  # a fresh process, anywhere in the run
        assert BatchOrder(lengths, batch_size=8, seed=3).batch(step).tolist() == seen[step]


def test_order_differs_by_seed_and_epoch() -> None:
    lengths = np.arange(1, 101, dtype=np.int64)
    one, other = (BatchOrder(lengths, batch_size=100, seed=seed) for seed in (1, 2))
    small = BatchOrder(lengths, batch_size=8, seed=1)
    assert [small.batch(step).tolist() for step in range(5)] != [small.batch(step + 13).tolist() for step in range(5)]
    assert sorted(one.batch(0)) == sorted(other.batch(0))
    mixed = [BatchOrder(lengths, batch_size=8, seed=seed).batch(0).tolist() for seed in (1, 2)]
    assert mixed[0] != mixed[1]


def test_batches_hold_examples_of_like_length_but_not_in_order() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 8 * GROUP_BATCHES)
    order = BatchOrder(lengths, batch_size=8, seed=0)
    batches = [order.batch(step) for step in range(order.steps_per_epoch)]
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 0.2 * np.ptp(lengths)
    means = [float(lengths[batch].mean()) for batch in batches]
    assert means != sorted(means)


@given(LENGTHS, st.integers(1, 2), st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_micro_batches_keep_the_budget_and_lose_nothing(lengths: list[int], rows: int, budget: int) -> None:
    sizes = sizes_of(lengths, rows)
    parts = in_length_order(sizes, max_tokens=budget)
    assert sorted(p for part in parts for p in part) == list(range(len(lengths)))
    for part in parts:
        padded = max(lengths[p] for p in part) * len(part) * rows
        assert padded <= budget or len(part) == 1


def test_micro_batches_do_not_depend_on_the_order_of_the_batch() -> None:
    sizes = sizes_of([5, 9, 9, 2, 7])
    assert micro_batches([0, 1, 2, 3, 4], sizes, max_tokens=18) == micro_batches([4, 3, 2, 1, 0], sizes, max_tokens=18)
    assert micro_batches([0, 1, 2, 3, 4], sizes, max_tokens=18) == [[1, 2], [4, 0], [3]]
