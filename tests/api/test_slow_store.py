"""A store that does not answer: who waits for it, and who must not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from adapters.catalog import AdapterCatalog
from adapters.checked import DoorLimits
from adapters.door import check_adapter
from adapters.store import DirectoryStore, ObjectInfo
from app.api.context import ApiContext
from app.errors import ServerBusy
from tests.adapter_files import tiny_base
from tests.api.serving import Serving, serve

NUM_COLD = 48  # more than any pool of threads


class StuckStore(DirectoryStore):
    """Once stuck, whoever asks for something of `globex` waits until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self.go.set()
        self.num_waiting = 0

    def _wait(self, key: str) -> None:
        if "/globex/" in f"/{key}" and not self.go.is_set():
            self.num_waiting += 1
            self.go.wait(30)

    def head(self, key: str) -> ObjectInfo:
        self._wait(key)
        return super().head(key)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self._wait(key)
        return super().get(key, max_bytes=max_bytes)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        self._wait(prefix)
        return super().list(prefix, after=after, limit=limit)

    def list_dirs(self, prefix: str) -> list[str]:
        self._wait(prefix)
        return super().list_dirs(prefix)


@contextmanager
def stuck(directory: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[Serving, StuckStore]]:
    store = StuckStore(directory / "store")
    catalog = AdapterCatalog(store, tiny_base(), DoorLimits(), check=check_adapter, scratch=directory, clock=clock)
    with serve(directory, catalog=catalog) as serving:
        try:
            yield serving, store
        finally:
            store.go.set()


def ask(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2})


def test_cold_adapters_at_a_store_that_hangs_delay_neither_base_nor_warm_ones(tmp_path: Path) -> None:
    with stuck(tmp_path) as (serving, store):
        serving.publish("acme", "support")
        with serving.client() as client:
            assert ask(client, "support").status_code == 200  # known from here on
            store.go.clear()
            cold = [threading.Thread(target=_ask_alone, args=(serving, f"cold-{n}")) for n in range(NUM_COLD)]
            for thread in cold:
                thread.start()
            until = time.monotonic() + 10
            while store.num_waiting < 16:
                assert time.monotonic() < until
                time.sleep(0.01)
            for _ in range(3):
                time.sleep(0.6)  # what is remembered of keys and limits ages: the database is asked again
                began = time.monotonic()
                assert ask(client, serving.base).status_code == 200
                assert ask(client, "support").status_code == 200
                assert time.monotonic() - began < 2
            assert not store.go.is_set()
            store.go.set()
        for thread in cold:
            thread.join(20)


def test_an_adapter_in_use_never_waits_for_a_look_into_a_store_that_hangs(tmp_path: Path) -> None:
    now = [1000.0]
    with stuck(tmp_path, lambda: now[0]) as (serving, store), serving.client("globex") as client:
        serving.publish("globex", "support")
        assert ask(client, "support").status_code == 200
        store.go.clear()
        now[0] += 12  # it is still used, and read ahead meanwhile
        assert ask(client, "support").status_code == 200
        until = time.monotonic() + 10
        while not store.num_waiting:
            assert time.monotonic() < until, "nobody reads ahead"
            time.sleep(0.01)
        now[0] += 4  # its time is over
        began = time.monotonic()
        assert ask(client, "support").status_code == 200
        assert time.monotonic() - began < 5
        assert store.num_waiting == 1


def _ask_alone(serving: Serving, model: str) -> None:
    with serving.client("globex") as client:
        client.timeout = httpx.Timeout(30)
        assert ask(client, model).status_code == 404


def test_a_tenant_has_two_long_calls_at_a_time_and_others_still_get_theirs(serving: Serving) -> None:
    context: ApiContext = ApiContext(replace(serving.services))
    go = threading.Event()

    async def scene() -> None:
        running = [asyncio.create_task(context.long_work("acme", go.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ServerBusy):
            await context.long_work("acme", go.wait, 10)
        assert await context.long_work("globex", lambda: "done") == "done"
        go.set()
        await asyncio.gather(*running)
        assert await context.long_work("acme", lambda: "again") == "again"

    asyncio.run(scene())
