"""What one bad adapter, one failing step or one lack of memory does to everybody else in the batch: nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.errors import AdapterNormTooLarge, AdapterQuarantined
from adapters.manifest import AdapterManifest
from app.engine.base_model import BaseModel, load_base_model
from app.engine.engine import MAX_FAILURES_IN_A_ROW
from app.engine.sampler import Sampled
from app.engine.sequence import Batch, FinishReason, Request
from app.errors import EngineNotReady, InternalError, NonFiniteOutput, OutOfMemory
from tests.adapter_files import plain_tensors, raw
from tests.engine_rig import Answer, random_prompt, request
from tests.loader_rig import BASE_NAME, KINDS, Shop, Waiter
from tests.tiny import build_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = build_base(tmp_path_factory.mktemp("base"))
    data = tmp_path_factory.mktemp("data")
    return load_base_model(str(directory), data, name=BASE_NAME, quantization="none", dtype="float32", device="cpu")


@pytest.fixture
def shop(base: BaseModel, tmp_path: Path) -> Iterator[Shop]:
    made = Shop(base, tmp_path / "shop")
    yield made
    made.settle()


@pytest.fixture
def bomb(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> AdapterManifest:
    """An adapter of finite values whose product is more than fp32 can hold.

    The door's bound on norms refuses it, and must be lifted to see what stands behind the door.
    """
    tensors = plain_tensors(KINDS, 4, 77)
    for name, tensor in tensors.items():
        if "mlp" in name:
            tensors[name] = raw(np.full(tensor.shape, 1e15, dtype=np.float32))
    with pytest.raises(AdapterNormTooLarge):
        shop.publish("mallory", "bomb", seed=0, tensors=tensors)
    monkeypatch.setattr("adapters.door.MAX_TENSOR_NORM", 1e30)
    return shop.publish("mallory", "bomb", seed=0, tensors=tensors)


def neighbours(shop: Shop) -> list[Request]:
    vocab = shop.base.shapes.vocab_size
    adapters = [shop.publish(f"good{i}", "a", seed=i) for i in range(3)]
    return [
        *(request(f"n{i}", random_prompt(10 + i, vocab, i), a, max_tokens=40) for i, a in enumerate(adapters)),
        request("base", random_prompt(9, vocab, 9), None, max_tokens=40),
    ]


def test_an_adapter_that_overflows_spoils_its_own_request_alone(shop: Shop, bomb: AdapterManifest) -> None:
    others = neighbours(shop)
    before = {r.id: shop.run(r)[r.id].tokens for r in others}
    vocab = shop.base.shapes.vocab_size
    answers = shop.run(*others, request("bomb", random_prompt(12, vocab, 3), bomb, max_tokens=40))
    error = ended(answers["bomb"], FinishReason.ERROR)
    assert isinstance(error, NonFiniteOutput)
    assert error.code == "adapter_quarantined"
    assert {r.id: answers[r.id].tokens for r in others} == before

    later = shop.run(*others, request("bomb2", random_prompt(12, vocab, 3), bomb, max_tokens=4))
    assert isinstance(ended(later["bomb2"], FinishReason.ERROR), AdapterQuarantined)
    assert {r.id: later[r.id].tokens for r in others} == before
    assert shop.engine.snapshot.quarantined == 1
    assert shop.loader.snapshot().quarantined == 1


def test_a_better_version_of_a_quarantined_adapter_is_served(shop: Shop, bomb: AdapterManifest) -> None:
    prompt = random_prompt(12, shop.base.shapes.vocab_size, 3)
    shop.run(request("bomb", prompt, bomb, max_tokens=4))
    mended = shop.publish("mallory", "bomb", seed=5)
    ended(shop.run(request("mended", prompt, mended, max_tokens=4))["mended"], FinishReason.LENGTH)


def test_serving_changes_no_byte_of_the_base(shop: Shop, bomb: AdapterManifest) -> None:
    before = shop.base.checksums()
    others = neighbours(shop)
    shop.run(*others, request("bomb", random_prompt(12, 90, 3), bomb, max_tokens=4))
    assert shop.base.checksums() == before


def test_a_request_that_breaks_its_step_fails_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    others = neighbours(shop)
    before = {r.id: shop.run(r)[r.id].tokens for r in others}

    def holds_the_culprit(batch: Batch) -> bool:
        return any(chunk.sequence.id == "culprit" for chunk in batch.chunks)

    fail_when(shop, monkeypatch, holds_the_culprit, RuntimeError("a kernel broke"))
    answers = shop.run(*others, request("culprit", [5, 6, 7], None, tenant="mallory", max_tokens=4))
    assert isinstance(ended(answers["culprit"], FinishReason.ERROR), InternalError)
    assert {r.id: answers[r.id].tokens for r in others} == before


def test_an_engine_whose_device_is_lost_gives_up_and_leaves_nobody_waiting(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = shop.publish("acme", "support", seed=1)
    fail_when(shop, monkeypatch, lambda _: True, RuntimeError("the device is lost"))
    for number in range(MAX_FAILURES_IN_A_ROW):  # one after the other: the engine is idle in between
        sink = Waiter()
        shop.engine.submit(request(f"r{number}", [5, 6, 7], None, max_tokens=4), sink)
        sink.wait(1)
        assert isinstance(ended(sink.answers[f"r{number}"], FinishReason.ERROR), InternalError)
    assert shop.engine._stopped.wait(10)
    with pytest.raises(EngineNotReady):
        shop.engine.submit(request("late", [5, 6, 7], None, max_tokens=4), Waiter())
    with pytest.raises(EngineNotReady):
        shop.engine.warm(manifest).result(10)


def test_out_of_memory_splits_the_batch_and_fails_nobody_who_fits(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    others = neighbours(shop)
    before = {r.id: shop.run(r)[r.id].tokens for r in others}

    def too_large(batch: Batch) -> bool:
        return len(batch.chunks) > 1

    fail_when(shop, monkeypatch, too_large, torch.OutOfMemoryError())
    answers = shop.run(*others)
    assert {r.id: answers[r.id].tokens for r in others} == before
    assert shop.engine.counters.out_of_memory > 0


def test_whoever_does_not_fit_alone_fails_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    others = neighbours(shop)
    before = {r.id: shop.run(r)[r.id].tokens for r in others}

    def holds_the_big_one(batch: Batch) -> bool:
        return any(chunk.sequence.id == "big" for chunk in batch.chunks)

    fail_when(shop, monkeypatch, holds_the_big_one, torch.OutOfMemoryError())
    big = request("big", random_prompt(60, shop.base.shapes.vocab_size, 4), None, tenant="big", max_tokens=4)
    answers = shop.run(*others, big)
    assert isinstance(ended(answers["big"], FinishReason.ERROR), OutOfMemory)
    assert {r.id: answers[r.id].tokens for r in others} == before


def test_a_step_longer_than_the_drain_time_does_not_break_the_drain(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_stuck, go_on = threading.Event(), threading.Event()

    def stick(_: Batch) -> bool:
        is_stuck.set()
        go_on.wait(60)
        return False

    fail_when(shop, monkeypatch, stick, RuntimeError())
    sink = Waiter()
    shop.engine.submit(request("slow", [5, 6, 7], None, max_tokens=4), sink)
    assert is_stuck.wait(60)
    assert shop.engine.drain(0.1) is False
    go_on.set()
    shop.engine.stop()
    sink.wait(1)
    assert sink.answers["slow"].finished is not None


def ended(answer: Answer, reason: FinishReason) -> Exception | None:
    assert answer.finished is not None
    assert answer.finished.reason is reason, answer.finished
    return answer.finished.error


def fail_when(shop: Shop, monkeypatch: pytest.MonkeyPatch, wanted: Callable[[Batch], bool], error: Exception) -> None:
    runner = shop.engine._runner
    whole = runner.run

    def run(batch: Batch, rows_of: Callable[..., object]) -> Mapping[str, Sampled]:
        if wanted(batch):
            raise error
        return whole(batch, rows_of)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "run", run)
