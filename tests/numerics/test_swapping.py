"""Two hundred adapters through a pool with room for eight, with random arrivals and departures: no answer changes."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from adapters.manifest import AdapterManifest
from app.engine.base_model import BaseModel, load_base_model
from app.engine.sequence import FinishReason
from tests.engine_rig import Answer, random_prompt, request
from tests.loader_rig import BASE_NAME, Shop, Waiter
from tests.tiny import build_base

NUM_ADAPTERS = 200
RANK = 4
ROWS = 8 * RANK
TENANTS = 20
NUM_THREADS = 8
REQUESTS_A_THREAD = 30
COUNT = 8  # tokens of an answer
PROMPTS = 3
ADAPTER_BYTES = RANK * 4 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))  # in fp32, on all linears


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = build_base(tmp_path_factory.mktemp("base"))
    data = tmp_path_factory.mktemp("data")
    return load_base_model(str(directory), data, name=BASE_NAME, quantization="none", dtype="float32", device="cpu")


@pytest.fixture
def shop(base: BaseModel, tmp_path: Path) -> Iterator[Shop]:
    """Tiers that hold a few of the adapters: 40 on disk, 16 in host memory, 8 in the pool."""
    made = Shop(
        base,
        tmp_path / "shop",
        disk_bytes=40 * (ADAPTER_BYTES + 6000),
        host_bytes=16 * ADAPTER_BYTES,
        pool_rows=ROWS,
        max_pinned_leaves_rows=RANK,
        max_sequences=12,
    )
    yield made
    made.settle()


def publish_all(shop: Shop) -> list[AdapterManifest]:
    return [shop.publish(f"tenant{i % TENANTS}", f"a{i}", seed=i, rank=RANK) for i in range(NUM_ADAPTERS)]


def prompts(base: BaseModel) -> list[list[int]]:
    return [random_prompt(length, base.shapes.vocab_size, length) for length in (5, 24, 70)[:PROMPTS]]


class Guard:
    """Looks at every tier, over and over, and remembers the first that is over its budget."""

    def __init__(self, shop: Shop) -> None:
        self.num_samples = 0
        self.fault: str | None = None
        self._shop = shop
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _files(self) -> dict[str, int]:
        sizes = {}
        for file in self._shop.disk.directory.glob("[a-z0-9]*/*"):
            with contextlib.suppress(FileNotFoundError):
                sizes[str(file)] = file.stat().st_size
        return sizes

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            snapshot = self._shop.engine.snapshot
            before, after = self._files(), self._files()
            # A walk takes time: a file that it counted may be gone before it counts the one that took its room.
            on_disk = sum(after.values()) if before == after else 0
            held = {
                "host": (self._shop.host.stats().used_bytes, self._shop.host.budget_bytes),
                "disk": (self._shop.disk.stats().used_bytes, self._shop.disk.stats().budget_bytes),
                "files": (on_disk, self._shop.disk.stats().budget_bytes),
                "rows": (sum(r.rank for r in snapshot.residents), ROWS),
                "leased rows": (snapshot.pool_leased_rows, ROWS),
            }
            for tier, (used, budget) in held.items():
                if used > budget:
                    self.fault = self.fault or f"{tier}: {used} of {budget}"
            self.num_samples += 1


def storm(
    shop: Shop, adapters: list[AdapterManifest], seed: int, sink: Waiter, cases: dict[str, tuple[int, int]]
) -> None:
    """One client: a few requests open at a time, one in six cancelled at a moment of its own."""
    draw = random.Random(seed)
    texts = prompts(shop.base)
    for number in range(REQUESTS_A_THREAD):
        which, prompt = draw.randrange(len(adapters)), draw.randrange(PROMPTS)
        name = f"{seed}-{number}"
        cases[name] = (which, prompt)
        shop.engine.submit(request(name, texts[prompt], adapters[which], max_tokens=COUNT), sink)
        if draw.random() < 1 / 6:
            time.sleep(draw.random() * 0.02)
            shop.engine.cancel(name)
        if number >= 4:
            sink.wait(number - 3, 120)


@pytest.mark.timeout(600)
def test_no_answer_changes_and_nothing_is_left(shop: Shop, base: BaseModel, tmp_path: Path) -> None:
    adapters = publish_all(shop)
    sinks = [Waiter() for _ in range(NUM_THREADS)]
    cases: list[dict[str, tuple[int, int]]] = [{} for _ in range(NUM_THREADS)]
    threads = [
        threading.Thread(target=storm, args=(shop, adapters, seed, sinks[seed], cases[seed]))
        for seed in range(NUM_THREADS)
    ]
    with Guard(shop) as guard:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for sink in sinks:
            sink.wait(REQUESTS_A_THREAD, 120)
    assert guard.fault is None
    assert guard.num_samples > 20
    assert shop.engine.snapshot.evictions > 100, "the pool was too small for all, and swapped"

    alone = Solo(base, tmp_path / "solo")
    num_cancelled = 0
    try:
        for sink, mine in zip(sinks, cases, strict=True):
            for name, (which, prompt) in mine.items():
                answer = sink.answers[name]
                assert answer.finished is not None
                want = alone(which, prompt)
                if answer.finished.reason is FinishReason.CANCELLED:
                    num_cancelled += 1
                    assert answer.tokens == want[: len(answer.tokens)], name
                else:
                    assert answer.finished.reason is FinishReason.LENGTH, (name, answer.finished)
                    assert answer.tokens == want, name
    finally:
        alone.shop.settle()
    assert num_cancelled > 5


class Solo:
    """What an adapter answers when the engine holds nothing else: one request at a time, no cache of prefixes."""

    def __init__(self, base: BaseModel, directory: Path) -> None:
        self.shop = Shop(base, directory, pool_rows=RANK, max_pinned_leaves_rows=RANK, prefix_caching=False)
        self._adapters: dict[int, AdapterManifest] = {}
        self._known: dict[tuple[int, int], list[int]] = {}
        self._prompts = prompts(base)

    def __call__(self, which: int, prompt: int) -> list[int]:
        if which not in self._adapters:
            name, tenant = f"a{which}", f"tenant{which % TENANTS}"
            self._adapters[which] = self.shop.publish(tenant, name, seed=which, rank=RANK)
        if (which, prompt) not in self._known:
            asked = request(f"{which}-{prompt}", self._prompts[prompt], self._adapters[which], max_tokens=COUNT)
            self._known[which, prompt] = self.shop.run(asked)[asked.id].tokens
        return self._known[which, prompt]


@pytest.mark.real
@pytest.mark.timeout(900)
def test_resident_memory_is_flat_over_2000_loads(shop: Shop, base: BaseModel) -> None:
    adapters = publish_all(shop)
    prompt = prompts(base)[0]
    process = psutil.Process()
    loaded, memory = 0, []

    def load(number: int) -> None:
        nonlocal loaded
        for first in range(0, number, 20):
            batch = [adapters[(loaded + i) % NUM_ADAPTERS] for i in range(20)]
            answers = shop.run(*(request(f"{loaded}-{i}", prompt, a, max_tokens=1) for i, a in enumerate(batch)))
            assert all(_ended_well(answer) for answer in answers.values()), first
            loaded += 20

    load(400)  # allocators and caches fill first
    for _ in range(4):
        load(400)
        gc.collect()
        memory.append(process.memory_info().rss)
    assert shop.engine.snapshot.placements >= 1900, "nearly every request found its adapter evicted"
    assert max(memory) - memory[0] < 0.02 * memory[0], [f"{rss >> 20} MiB" for rss in memory]


def _ended_well(answer: Answer) -> bool:
    return answer.finished is not None and answer.finished.reason is FinishReason.LENGTH
