"""A cold adapter costs its own requests alone: a store that hangs or is down, herds, new versions while one streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import AdapterUnavailable
from app.engine.base_model import BaseModel, load_base_model
from app.engine.sequence import FinishReason
from tests.engine_rig import Answer, random_prompt, request
from tests.loader_rig import BASE_NAME, Shop, Waiter
from tests.tiny import build_base

PROMPT_TOKENS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = build_base(tmp_path_factory.mktemp("base"))
    data = tmp_path_factory.mktemp("data")
    return load_base_model(str(directory), data, name=BASE_NAME, quantization="none", dtype="float32", device="cpu")


@pytest.fixture
def shop(base: BaseModel, tmp_path: Path) -> Iterator[Shop]:
    made = Shop(base, tmp_path / "shop", workers=64, max_waiting=512)
    yield made
    made.settle()


@pytest.fixture
def prompt(base: BaseModel) -> list[int]:
    return random_prompt(PROMPT_TOKENS, base.shapes.vocab_size, 1)


def ended(answer: Answer) -> FinishReason:
    assert answer.finished is not None
    return answer.finished.reason


def test_warm_tenants_keep_getting_tokens_while_a_cold_adapter_hangs(shop: Shop, prompt: list[int]) -> None:
    warm = shop.publish("warm", "w", seed=1)
    cold = shop.publish("cold", "c", seed=2)
    shop.run(request("first", prompt, warm, max_tokens=2))
    shop.store.hold(cold)
    sink = Waiter()
    shop.engine.submit(request("cold", prompt, cold, max_tokens=4), sink)
    shop.engine.submit(request("warm", prompt, warm, max_tokens=150), sink)
    shop.engine.submit(request("base", prompt, None, tenant="third", max_tokens=150), sink)
    sink.wait(2)
    assert len(sink.answers["warm"].tokens) == len(sink.answers["base"].tokens) == 150
    assert "cold" not in sink.answers, "its bytes are not here yet"
    shop.store.let_go()
    sink.wait(3)
    assert ended(sink.answers["cold"]) is FinishReason.LENGTH


def test_a_hundred_first_requests_are_one_download_per_object(shop: Shop, prompt: list[int]) -> None:
    cold = shop.publish("cold", "c", seed=3)
    shop.store.hold(cold)
    sinks = [Waiter() for _ in range(10)]
    start = threading.Barrier(10)

    def ask(number: int) -> None:
        start.wait(30)
        for i in range(10):
            shop.engine.submit(request(f"{number}-{i}", prompt, cold, max_tokens=2), sinks[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shop.engine.cancel("0-0")  # one of those who wait leaves; nobody else notices
    sinks[0].wait(1)
    shop.store.let_go()
    for sink in sinks:
        sink.wait(10)
    assert shop.store.downloads == {cold.weights.sha256: 1, cold.config.sha256: 1}
    answers = {name: answer for sink in sinks for name, answer in sink.answers.items()}
    assert ended(answers.pop("0-0")) is FinishReason.CANCELLED
    assert {tuple(answer.tokens) for answer in answers.values()} == {tuple(answers["1-0"].tokens)}


def test_fifty_cold_adapters_are_fetched_side_by_side(shop: Shop, prompt: list[int]) -> None:
    cold = [shop.publish(f"tenant{i}", "c", seed=100 + i) for i in range(50)]
    shop.store.hold(*cold)
    sink = Waiter()
    for i, adapter in enumerate(cold):
        shop.engine.submit(request(f"r{i}", prompt, adapter, max_tokens=2), sink)
    shop.store.wait_held(50)  # all of them at once: they take as long as the slowest, not as all together
    shop.store.let_go()
    sink.wait(50)
    assert {ended(answer) for answer in sink.answers.values()} == {FinishReason.LENGTH}


def test_what_is_cached_is_served_while_the_store_is_down_and_what_is_cold_fails_alone(
    shop: Shop, prompt: list[int]
) -> None:
    cached, cold = shop.publish("one", "a", seed=1), shop.publish("two", "b", seed=2)
    before = shop.run(request("before", prompt, cached, max_tokens=8))["before"]
    shop.store.is_down = True
    during = shop.run(
        request("cached", prompt, cached, max_tokens=8),
        request("cold", prompt, cold, max_tokens=8),
        request("again", prompt, cold, max_tokens=8),
    )
    assert during["cached"].tokens == before.tokens
    for name in ("cold", "again"):
        finished = during[name].finished
        assert finished is not None
        assert isinstance(finished.error, AdapterUnavailable)
    assert shop.store.downloads[cold.weights.sha256] == 1
    assert shop.store.downloads[cold.config.sha256] <= 2  # both adapters have the same


def test_a_new_version_while_the_old_one_streams(shop: Shop, prompt: list[int]) -> None:
    v1 = shop.publish("acme", "support", seed=1)
    alone_v1 = shop.run(request("alone-v1", prompt, v1, max_tokens=120))["alone-v1"].tokens
    sink = Waiter()
    shop.engine.submit(request("streams", prompt, v1, max_tokens=120), sink)
    sink.wait_tokens("streams", 3)
    v2 = shop.publish("acme", "support", seed=2)
    assert shop.catalog.resolve("acme", "support").version == 2
    shop.engine.submit(request("later", prompt, shop.catalog.resolve("acme", "support"), max_tokens=120), sink)
    sink.wait(2)
    assert sink.answers["streams"].tokens == alone_v1, "it ends on the version that it began with"
    assert sink.answers["later"].tokens != alone_v1
    again = shop.run(request("v2", prompt, v2, max_tokens=120))["v2"]
    assert sink.answers["later"].tokens == again.tokens


def test_going_back_to_the_old_bytes_equals_a_cold_run(shop: Shop, base: BaseModel, tmp_path: Path) -> None:
    """A -> B -> A under one name and one prompt: neither rows nor prefix blocks of B may answer for A."""
    prompt = random_prompt(64, base.shapes.vocab_size, 8)
    answers = {}
    for turn, seed in enumerate((1, 2, 1)):
        manifest = shop.publish("acme", "support", seed=seed)
        answers[turn] = shop.run(request(f"t{turn}", prompt, manifest, max_tokens=20))[f"t{turn}"].tokens
    cold = Shop(base, tmp_path / "cold", prefix_caching=False)
    fresh = cold.run(request("x", prompt, cold.publish("acme", "support", seed=1), max_tokens=20))["x"].tokens
    cold.settle()
    assert answers[0] == answers[2] == fresh
    assert answers[1] != answers[0]
