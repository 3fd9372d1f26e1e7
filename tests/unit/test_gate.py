"""Which adapters get their alias: one rule at a time, and what is said of those that do not."""

from __future__ import annotations

import math

import pytest

from app.training.gate import GateFacts, judge, start_and_end
from app.training.progress import Progress
from app.training.watchdog import NUM_FIRST, has_diverged


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (GateFacts(loss=0.98, base_loss=1.0), None),
        (GateFacts(loss=0.995, base_loss=1.0), "not 1.0% below"),
        (GateFacts(loss=0.5, base_loss=1.0, live_loss=0.6, live_version=3), None),
        (GateFacts(loss=0.5, base_loss=1.0, live_loss=0.4, live_version=3), "above that of version 3"),
        (GateFacts(loss=math.nan, base_loss=1.0), "not finite"),
        (GateFacts(train_loss_start=2.0, train_loss_end=1.0), None),
        (GateFacts(train_loss_start=1.0, train_loss_end=1.0), "did not fall"),
        (GateFacts(train_loss_start=1.0, train_loss_end=math.inf), "not finite"),
        (GateFacts(), "nothing that shows"),
        (GateFacts(loss=0.5, base_loss=1.0, regression_loss=0.4, regression_live_loss=0.4), None),
        (GateFacts(loss=0.5, base_loss=1.0, regression_loss=0.5, regression_live_loss=0.4), "regression file"),
        (GateFacts(loss=0.5, base_loss=1.0, eos_rate=0.0, base_eos_rate=0.0), None),
        (GateFacts(loss=0.5, base_loss=1.0, eos_rate=0.0, base_eos_rate=0.5), "ends by itself"),
        (GateFacts(loss=0.5, base_loss=1.0, eos_rate=0.1, base_eos_rate=None), None),
    ],
)
def test_gate_passes_what_is_better_and_names_what_is_not(facts: GateFacts, reason: str | None) -> None:
    verdict = judge(facts, min_improvement=0.01)
    assert verdict.passed == (reason is None)
    if reason is not None:
        assert reason in str(verdict.reason)


def test_hold_keeps_the_alias_though_all_is_well() -> None:
    verdict = judge(GateFacts(loss=0.5, base_loss=1.0), min_improvement=0.01, hold=True)
    assert not verdict.passed
    assert "hold" in str(verdict.reason)


def test_stored_verdict_has_only_what_was_measured() -> None:
    body = judge(GateFacts(loss=0.5, base_loss=math.inf), min_improvement=0.01).to_dict()
    assert body == {"passed": True, "reason": None, "loss": 0.5}


def test_start_and_end_are_means_of_quarters() -> None:
    assert start_and_end([8, 6, 5, 4, 3, 2, 2, 0]) == (7.0, 1.0)
    assert start_and_end([2, 1]) == (2, 1)
    assert start_and_end([2]) == (None, None)


def test_watchdog_bears_single_hard_batches_and_not_a_lasting_spike() -> None:
    progress = Progress()
    losses = [2.0] * NUM_FIRST + [50.0, 2.0, 50.0, 50.0, 2.0]
    assert not any(has_diverged(progress, loss, 1.0, vocab_size=100) for loss in losses)
    assert [has_diverged(progress, 50.0, 1.0, vocab_size=100) for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_watchdog_ends_what_is_not_finite_at_once(loss: float, norm: float) -> None:
    assert has_diverged(Progress(), loss, norm, vocab_size=100)
