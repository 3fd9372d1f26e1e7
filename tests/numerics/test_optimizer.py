"""AdamW steps, schedules and clipping against torch's own; a state that is saved and restored changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from app.training.adapter import MasterPair, TrainedAdapter
from app.training.optimizer import AdapterOptimizer, RateSchedule
from app.training.spec import OptimizerKind

SCHEDULE = RateSchedule("linear", peak=1e-2, warmup_steps=2, total_steps=10)


SMALL = ((4, 16), (8, 4))
LARGE = ((16, 576), (1536, 16))  # enough numbers for moments of 8 bits


def adapter(seed: int = 0, shapes: tuple[tuple[int, int], ...] = SMALL) -> TrainedAdapter:
    g = torch.Generator().manual_seed(seed)
    pairs = {
        n: MasterPair(*(torch.randn(shape, generator=g).requires_grad_(True) for shape in shapes)) for n in range(3)
    }
    return TrainedAdapter(pairs, 1.0)


def add_gradients(trained: TrainedAdapter, step: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for n, pair in trained.pairs.items():
        a, b = (torch.randn(t.shape, generator=g) * scale for t in (pair.a, pair.b))
        trained.accumulate(n, a, b)


def weights(trained: TrainedAdapter) -> list[torch.Tensor]:
    return [t.detach().clone() for t in trained.parameters]


def test_steps_equal_torch_adamw_with_clipping() -> None:
    ours, theirs = adapter(), [t.detach().clone().requires_grad_(True) for t in adapter().parameters]
    optimizer = AdapterOptimizer(ours, SCHEDULE, max_grad_norm=1.0)
    plain = torch.optim.AdamW(theirs, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(10):
        add_gradients(ours, step)
        for parameter, gradient in zip(theirs, ours.gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        plain.param_groups[0]["lr"] = SCHEDULE.rate(step)
        plain.step()
        taken = optimizer.step(step)
        assert taken.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert taken.rate == SCHEDULE.rate(step)
        assert not ours.grads
    for got, want in zip(weights(ours), theirs, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "shapes"), [("adamw", SMALL), ("adamw_8bit", LARGE)])
def test_continued_steps_are_bit_equal(kind: OptimizerKind, shapes: tuple[tuple[int, int], ...]) -> None:
    whole = adapter(shapes=shapes)
    optimizer = AdapterOptimizer(whole, SCHEDULE, max_grad_norm=1.0, kind=kind)
    for step in range(3):
        add_gradients(whole, step)
        optimizer.step(step)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    factors = weights(whole)
    again = adapter(seed=5, shapes=shapes)
    with torch.no_grad():
        for parameter, value in zip(again.parameters, factors, strict=True):
            parameter.copy_(value)
    continued = AdapterOptimizer(again, SCHEDULE, max_grad_norm=1.0, kind=kind)
    continued.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), factors, strict=True))
    for step in range(3, 6):
        for trained, stepper in ((whole, optimizer), (again, continued)):
            add_gradients(trained, step)
            stepper.step(step)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_state_of_another_adapter_is_refused() -> None:
    optimizer = AdapterOptimizer(adapter(), SCHEDULE, max_grad_norm=1.0)
    optimizer.step(0)
    state = optimizer.state()
    state.pop("0.exp_avg")
    with pytest.raises(ValueError, match="another adapter"):
        optimizer.restore(state)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    trained = adapter()
    optimizer = AdapterOptimizer(trained, SCHEDULE, max_grad_norm=1.0)
    before = weights(trained)
    add_gradients(trained, 0, scale=math.inf)
    taken = optimizer.step(0)
    assert not taken.is_finite
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trained), strict=True))
    assert not trained.grads


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedules_warm_up_to_the_peak_and_end_as_they_say(kind: str) -> None:
    schedule = RateSchedule(kind, peak=1.0, warmup_steps=4, total_steps=20)  # type: ignore[arg-type]
    rates = [schedule.rate(step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(rates) == 1.0
    assert all(rate > 0 for rate in rates)
    half = schedule.rate(12)
    assert half == pytest.approx({"linear": 0.5, "cosine": 0.5, "constant": 1.0}[kind])
    assert rates[-1] == pytest.approx(
        {"linear": 1 / 16, "cosine": 0.5 * (1 - math.cos(math.pi / 16)), "constant": 1}[kind]
    )
    assert RateSchedule(kind, 1.0, 0, 1).rate(0) == 1.0  # type: ignore[arg-type]


def test_eight_bit_moments_step_nearly_as_those_of_thirty_two_and_take_a_quarter() -> None:
    def run(kind: OptimizerKind) -> tuple[TrainedAdapter, AdapterOptimizer]:
        trained = adapter(shapes=LARGE)
        optimizer = AdapterOptimizer(trained, SCHEDULE, max_grad_norm=1e9, kind=kind)
        for step in range(8):
            add_gradients(trained, step)
            optimizer.step(step)
        return trained, optimizer

    (plain, exact), (small, quantized) = run("adamw"), run("adamw_8bit")
    for got, want, first in zip(weights(small), weights(plain), weights(adapter(shapes=LARGE)), strict=True):
        assert 0 < (got - want).norm() < 0.05 * (want - first).norm()

    def moments(optimizer: AdapterOptimizer) -> int:
        return sum(t.nbytes for name, t in optimizer.state().items() if "exp_avg" in name)

    assert moments(exact) == 4 * moments(quantized)


def test_a_job_goes_on_with_another_librarys_optimizer() -> None:
    """Small parameters have moments of 32 bits in bitsandbytes' optimizer too, as all have in the one used on CUDA."""
    whole, moved = adapter(), adapter()
    torchs = AdapterOptimizer(whole, SCHEDULE, max_grad_norm=1.0)
    theirs = AdapterOptimizer(moved, SCHEDULE, max_grad_norm=1.0, kind="adamw_8bit")
    for step in range(3):
        for trained, optimizer in ((whole, torchs), (moved, theirs)):
            add_gradients(trained, step)
            optimizer.step(step)
    state = theirs.state()
    assert set(state) == set(torchs.state())
    # As it was named before the names were the same everywhere.
    old = {key.replace("exp_avg_sq", "state2").replace("exp_avg", "state1"): tensor for key, tensor in state.items()}
    for kept in (state, old):
        resumed = adapter()
        with torch.no_grad():
            for parameter, value in zip(resumed.parameters, weights(moved), strict=True):
                parameter.copy_(value)
        continued = AdapterOptimizer(resumed, SCHEDULE, max_grad_norm=1.0)
        continued.restore(kept)
        reference = AdapterOptimizer(whole, SCHEDULE, max_grad_norm=1.0)
        reference.restore({key: tensor.clone() for key, tensor in torchs.state().items()})
        before = weights(whole)
        for trained, optimizer in ((whole, reference), (resumed, continued)):
            add_gradients(trained, 3)
            optimizer.step(3)
        for got, want in zip(weights(resumed), weights(whole), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for parameter, value in zip(whole.parameters, before, strict=True):
                parameter.copy_(value)


def test_state_of_another_kind_of_optimizer_is_refused() -> None:
    trained = adapter(shapes=LARGE)
    optimizer = AdapterOptimizer(trained, SCHEDULE, max_grad_norm=1.0, kind="adamw_8bit")
    add_gradients(trained, 0)
    optimizer.step(0)
    with pytest.raises(ValueError, match="another adapter or optimizer"):
        AdapterOptimizer(trained, SCHEDULE, max_grad_norm=1.0).restore(optimizer.state())
