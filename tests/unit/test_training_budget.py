"""The training budget: how much fits between two steps of serving."""

from __future__ import annotations

import itertools
import random

import pytest

from app.engine.training_budget import STEPS_PER_LATE_QUANTUM, TrainingBudget

DECODE, PREFILL = 0.1, 0.2


def fill(budget: TrainingBudget, quantum_s: float, *, prompt_waits: bool = False) -> float:
    """Train as the engine does until the budget says no; the seconds that took."""
    spent = 0.0
    while budget.allows(prompt_waits=prompt_waits):
        budget.trained(quantum_s)
        spent += quantum_s
    return spent


def served(budget: TrainingBudget, steps: int = 100, *, prefill_share: float = 0.1) -> TrainingBudget:
    """After steps of which that share took a prompt in."""
    every = round(1 / prefill_share) if prefill_share else steps + 1
    for number in range(steps):
        is_prefill = number % every == every - 1
        budget.stepped(PREFILL if is_prefill else DECODE, num_decodes=4, has_prefill=is_prefill)
    budget.stepped(DECODE, num_decodes=4, has_prefill=False)
    return budget


def test_the_gap_before_a_decode_is_filled_up_to_the_factor_of_a_slow_step():
    budget = served(TrainingBudget(1.2, share=0.9))
    assert fill(budget, 0.01) == pytest.approx(1.2 * PREFILL - DECODE, abs=0.011)


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("quantum_s", [0.01, 0.03, 0.07])
def test_training_gets_its_share_also_where_quanta_do_not_divide_the_gaps(share: float, quantum_s: float):
    budget, trained = served(TrainingBudget(10.0, share)), 0.0
    for _ in range(1000):
        trained += fill(budget, quantum_s)
        budget.stepped(DECODE, num_decodes=4, has_prefill=False)
    assert trained / (trained + 1000 * DECODE) == pytest.approx(share, rel=0.02)


def test_an_idle_hour_is_no_debt_and_no_gap():
    budget, other = (served(TrainingBudget(1.2, share=0.5)) for _ in range(2))
    for _ in range(100_000):
        budget.trained(0.036, is_idle=True)
    assert not budget.is_spent
    other.trained(0.036, is_idle=True)
    for _ in range(4):
        for one in (budget, other):
            one.stepped(DECODE, num_decodes=1, has_prefill=False)
        assert fill(budget, 0.036) == fill(other, 0.036)


def test_where_all_steps_are_alike_the_factor_is_over_those():
    assert fill(served(TrainingBudget(1.5, share=0.9), prefill_share=0), 0.01) == pytest.approx(DECODE / 2, abs=0.011)


def slow_step(prefill_decodes: int, decodes: int, training_s: float) -> float:
    """What the factor is over, where one step in ten takes a prompt in."""
    budget = TrainingBudget(1.0, share=0.9)
    for number in range(200):
        is_prefill = number % 10 == 9
        if not is_prefill:
            budget.trained(training_s)
        count = prefill_decodes if is_prefill else decodes
        budget.stepped(PREFILL if is_prefill else DECODE, num_decodes=count, has_prefill=is_prefill)
    return DECODE + fill(budget, 0.001)


def test_a_slow_step_counts_by_those_whose_tokens_it_makes():
    assert slow_step(4, 4, 0.0) == pytest.approx(PREFILL, abs=0.002)
    assert slow_step(1, 8, 0.0) == pytest.approx(DECODE, abs=0.002)


def test_decodes_count_for_as_many_as_would_have_fitted_without_training():
    assert slow_step(4, 4, 0.05) == pytest.approx(PREFILL, abs=0.002)
    assert slow_step(4, 4, 0.15) == pytest.approx(DECODE, abs=0.002)  # 9 x 2.5 to 1: fewer than one in twenty


def test_what_does_not_fit_is_not_begun():
    budget = served(TrainingBudget(1.5, share=0.5))
    budget.trained(0.01)
    budget.trained(0.15)  # the next is expected to be as long
    budget.stepped(DECODE, num_decodes=4, has_prefill=False)
    assert not budget.allows(prompt_waits=False)


def test_nobody_who_waits_for_a_first_token_waits_for_training():
    assert fill(served(TrainingBudget(1.5, share=0.5)), 0.01, prompt_waits=True) == 0


@pytest.mark.parametrize("prompt_waits", [False, True])
def test_training_that_never_fits_gets_one_quantum_now_and_then(prompt_waits: bool):
    budget = served(TrainingBudget(1.5, share=0.5))
    budget.trained(1.0)
    gaps = []
    for _ in range(10 * STEPS_PER_LATE_QUANTUM):
        budget.stepped(DECODE, num_decodes=4, has_prefill=False)
        gaps.append(fill(budget, 1.0, prompt_waits=prompt_waits))
    late = [number for number, spent in enumerate(gaps) if spent]
    assert set(gaps) == {0.0, 1.0}
    assert {b - a for a, b in itertools.pairwise(late)} == {STEPS_PER_LATE_QUANTUM + 1}


def test_is_spent_from_the_first_quantum_to_the_next_step():
    budget = served(TrainingBudget(1.5, share=0.5))
    assert not budget.is_spent
    budget.trained(0.01)
    assert budget.is_spent
    budget.stepped(DECODE, num_decodes=4, has_prefill=False)
    assert not budget.is_spent


def test_p95_of_the_gaps_stays_within_the_factor_under_random_arrivals():
    """Prompts come at random, are taken in by two slow steps, and steps vary; on a fake clock."""
    rng, factor = random.Random(0), 1.5
    budget = TrainingBudget(factor, share=0.5)
    gaps: dict[bool, list[float]] = {False: [], True: []}
    trained = 0.0
    for is_training in (False, True):
        chunks_due = 0
        for _ in range(4000):
            spent = fill(budget, rng.uniform(0.01, 0.03), prompt_waits=chunks_due > 0) if is_training else 0.0
            trained += spent
            # A prompt that comes after training waits for one decode, as the scheduler lets it.
            reads = chunks_due > 0
            chunks_due = chunks_due - 1 if reads else 2 if rng.random() < 0.05 else 0
            step = rng.uniform(0.9, 1.1) * (PREFILL if reads else DECODE)
            budget.stepped(step, num_decodes=4, has_prefill=reads)
            gaps[is_training].append(spent + step)
    p95 = {kind: sorted(values)[len(values) * 95 // 100] for kind, values in gaps.items()}
    assert p95[True] <= factor * p95[False]
    assert trained > 0.35 * sum(gaps[True])
