"""The five rules of virtual token counters, and what is added to them."""

from __future__ import annotations

import pytest

from app.engine.fairness import VirtualTokenCounters


def test_a_tenant_first_seen_starts_at_zero():
    counters = VirtualTokenCounters()
    counters.arrive("a")
    assert counters.served("a") == 0.0


def test_input_costs_one_and_output_two_divided_by_weight():
    counters = VirtualTokenCounters({"a": 1.0, "b": 4.0}.__getitem__)
    for tenant in ("a", "b"):
        counters.charge_prompt(tenant, 10)
        counters.charge_output(tenant)
        counters.charge_output(tenant, 3)
    assert counters.served("a") == 18.0
    assert counters.served("b") == 4.5


def test_a_tenant_that_wakes_up_is_lifted_to_the_least_of_those_who_wait():
    counters = VirtualTokenCounters()
    counters.arrive("a")
    counters.arrive("b")
    counters.charge_prompt("a", 100)
    counters.charge_prompt("b", 40)
    counters.arrive("c")
    assert counters.served("c") == 40.0


def test_waking_up_never_lowers_a_counter():
    counters = VirtualTokenCounters()
    counters.charge_prompt("a", 500)
    counters.arrive("b")
    counters.arrive("a")
    assert counters.served("a") == 500.0


def test_a_tenant_that_waits_already_is_not_lifted_by_its_next_request():
    counters = VirtualTokenCounters()
    counters.arrive("a")
    counters.arrive("b")
    counters.charge_prompt("b", 100)
    counters.arrive("a")
    assert counters.served("a") == 0.0


def test_running_requests_alone_do_not_hold_the_floor_down():
    counters = VirtualTokenCounters()
    counters.arrive("idle")
    counters.leave("idle")  # runs now, with a counter of 0
    counters.arrive("busy")
    counters.charge_prompt("busy", 70)
    counters.arrive("new")
    assert counters.served("new") == 70.0


def test_when_nobody_waits_the_last_leaver_is_the_floor():
    counters = VirtualTokenCounters()
    counters.arrive("a")
    counters.arrive("b")
    counters.leave("b")
    counters.leave("a")
    counters.charge_prompt("a", 30)
    counters.charge_prompt("b", 99)
    counters.arrive("c")
    assert counters.served("c") == 30.0


def test_a_tenant_that_comes_back_after_a_preemption_is_not_lifted():
    counters = VirtualTokenCounters()
    counters.arrive("a")
    counters.leave("a")
    counters.arrive("b")
    counters.charge_prompt("b", 50)
    counters.come_back("a")
    assert counters.served("a") == 0.0


@pytest.mark.parametrize(("weight", "ratio"), [(1.0, 1.0), (3.0, 3.0)])
def test_backlogged_tenants_get_service_in_proportion_to_their_weights(weight, ratio):
    counters = VirtualTokenCounters({"a": 1.0, "b": weight}.__getitem__)
    counters.arrive("a")
    counters.arrive("b")
    work = {"a": 0, "b": 0}
    for turn in range(4000):
        tenant = min(work, key=counters.served)
        tokens = 5 + turn % 7
        counters.charge_prompt(tenant, tokens)
        work[tenant] += tokens
    assert work["b"] / work["a"] == pytest.approx(ratio, rel=0.01)
