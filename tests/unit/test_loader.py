"""The loader over a small in-memory store that counts calls and can be made to wait, fail or lie."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.disk_tier import DiskTier
from adapters.errors import (
    AdapterDigestMismatch,
    AdapterError,
    AdapterNotFound,
    AdapterQuarantined,
    AdapterRefused,
    AdapterTooLarge,
    AdapterUnavailable,
    LocalDiskFailed,
    ObjectNotFound,
    ObjectTooLarge,
    StoreUnavailable,
)
from adapters.fetch import LoaderLimits
from adapters.loader import AdapterLoader
from adapters.lru import ByteLRU, Eviction
from adapters.manifest import AdapterManifest, FileFact, adapter_digest, blob_key
from adapters.store import ObjectInfo

WAIT_S = 10.0  # a test that waits longer has failed


class MemoryStore:
    """Blobs in a dict. `gates` hold a download back; `failures` are raised and `lies` given out once each."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.failures: list[Exception] = []
        self.lies: list[bytes] = []
        self.is_down = False
        self.started = threading.Semaphore(0)

    def download(self, key: str, path: Path, *, max_bytes: int) -> ObjectInfo:
        self.calls[key] += 1
        self.started.release()
        if key in self.gates:
            assert self.gates[key].wait(WAIT_S)
        if self.is_down:
            raise StoreUnavailable()
        if self.failures:
            raise self.failures.pop(0)
        if key not in self.blobs:
            raise ObjectNotFound()
        data = self.lies.pop(0) if self.lies else self.blobs[key]
        if len(data) > max_bytes:
            raise ObjectTooLarge()
        path.write_bytes(data)
        return ObjectInfo(key, len(data), "etag")

    def head(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self.get(key, max_bytes=1 << 30)), "etag")

    def get(self, key: str, *, max_bytes: int) -> bytes:
        if key not in self.blobs:
            raise ObjectNotFound()
        return self.blobs[key][:max_bytes]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.get(key, max_bytes=1 << 30)[start : start + length]

    def put(self, key: str, data: bytes | Path) -> None:
        self.blobs[key] = data if isinstance(data, bytes) else data.read_bytes()

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        if key in self.blobs:
            return False
        self.put(key, data)
        return True

    def delete(self, key: str) -> None:
        self.blobs.pop(key, None)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        keys = sorted(key for key in self.blobs if key.startswith(prefix) and key > after)
        return [self.head(key) for key in keys[:limit]]

    def list_dirs(self, prefix: str) -> list[str]:
        return sorted({key[len(prefix) :].split("/")[0] for key in self.blobs if key.startswith(prefix)})

    def probe(self) -> list[str]:
        return []


class Answers:
    """Collects what `on_done` is told, in whatever thread."""

    def __init__(self) -> None:
        self.got: list[tuple[AdapterManifest, bytes | None, AdapterError | None, str]] = []
        self.threads: list[str] = []
        self._more = threading.Condition()

    def __call__(self, manifest: AdapterManifest, value: bytes | None, error: AdapterError | None, tier: str) -> None:
        with self._more:
            self.got.append((manifest, value, error, tier))
            self.threads.append(threading.current_thread().name)
            self._more.notify_all()

    def wait(self, count: int = 1) -> list[tuple[AdapterManifest, bytes | None, AdapterError | None, str]]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.got) >= count, WAIT_S), f"{len(self.got)} of {count} answers"
            return list(self.got)

    @property
    def last(self) -> tuple[bytes | None, AdapterError | None, str]:
        return self.got[-1][1:]


class Bench:
    """A loader with everything around it, a clock to turn by hand, and a parser that returns the weights' bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = MemoryStore()
        self.now = 1000.0
        self.jitter = 0.0
        self.parsed: list[AdapterManifest] = []
        self.stages: list[str] = []
        self.open: list[AdapterLoader[bytes]] = []

    def loader(
        self, *, disk_bytes: int = 10_000, host_bytes: int = 10_000, limits: LoaderLimits | None = None
    ) -> AdapterLoader[bytes]:
        self.host: ByteLRU[tuple[str, str], bytes] = ByteLRU(host_bytes)
        self.disk = DiskTier(self.root, disk_bytes)
        loader = AdapterLoader(
            fetch=self.store,
            disk=self.disk,
            host=self.host,
            parse=self.parse,
            size_of=len,
            limits=limits or LoaderLimits(workers=4),
            clock=lambda: self.now,
            rand=lambda: self.jitter,
            observe=lambda stage, seconds: self.stages.append(stage),
        )
        self.open.append(loader)
        return loader

    def parse(self, manifest: AdapterManifest, config: Path, weights: Path) -> bytes:
        data = weights.read_bytes()
        assert config.read_bytes()
        self.parsed.append(manifest)
        if data.startswith(b"refused"):
            raise AdapterRefused("no", code="adapter_rank_too_large")
        if data.startswith(b"bug"):
            raise ZeroDivisionError
        return data

    def publish(self, weights: bytes, tenant: str = "acme", name: str = "support") -> AdapterManifest:
        config = b'{"name":"%s"}' % name.encode()
        facts = []
        for data in (config, weights):
            facts.append(FileFact(hashlib.sha256(data).hexdigest(), len(data)))
            self.store.put(blob_key(tenant, facts[-1].sha256), data)
        return AdapterManifest(
            tenant=tenant,
            name=name,
            version=1,
            digest=adapter_digest(config, facts[1].sha256),
            config=facts[0],
            weights=facts[1],
            rank=8,
            applied_modules=1,
            base_id="base",
            base_digest="b" * 64,
            created_at=0.0,
            source="upload",
        )

    def gate(self, manifest: AdapterManifest) -> threading.Event:
        return self.store.gates.setdefault(weights_key(manifest), threading.Event())


def weights_key(manifest: AdapterManifest) -> str:
    return blob_key(manifest.tenant, manifest.weights.sha256)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "cache")
    yield bench
    for gate in bench.store.gates.values():
        gate.set()
    for loader in bench.open:
        loader.close()


def ask(loader: AdapterLoader[bytes], manifest: AdapterManifest) -> tuple[bytes | None, AdapterError | None, str]:
    answers = Answers()
    loader.want(manifest, answers)
    answers.wait()
    return answers.last


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does after it has answered."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_hundred_wants_are_one_download_and_a_hundred_answers(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"weights"), Answers()
    gate = bench.gate(manifest)
    threads = [threading.Thread(target=loader.want, args=(manifest, answers)) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.got == []
    assert loader.snapshot().waiters == 100
    gate.set()
    assert {got[1:] for got in answers.wait(100)} == {(b"weights", None, "s3")}
    assert set(bench.store.calls.values()) == {1}
    assert len(bench.parsed) == 1
    loader.close()
    assert len(answers.got) == 100


def test_what_is_in_the_host_tier_is_there_at_once(bench: Bench) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    assert loader.host(manifest) is None
    assert ask(loader, manifest) == (b"weights", None, "s3")
    assert loader.host(manifest) == b"weights"
    assert ask(loader, manifest) == (b"weights", None, "host")
    assert sum(bench.store.calls.values()) == 2


def test_the_nearest_tier_is_told_and_a_forgotten_adapter_is_in_none(bench: Bench) -> None:
    loader, manifest, other = bench.loader(host_bytes=10), bench.publish(b"weights"), bench.publish(b"others", name="o")
    assert loader.tier_of(manifest) == "s3"
    ask(loader, manifest)
    assert loader.tier_of(manifest) == "host"
    ask(loader, other)
    assert (loader.tier_of(manifest), loader.tier_of(other)) == ("disk", "host"), "there is room for one in memory"
    loader.forget(other.ref.key, Eviction.SUPERSEDED, files=(other.config, other.weights))
    assert loader.tier_of(other) == "s3"


def test_answers_never_come_in_the_callers_thread(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"weights"), Answers()
    loader.want(manifest, answers)
    answers.wait(1)
    loader.want(manifest, answers)
    answers.wait(2)
    assert all(name.startswith("adapter-") for name in answers.threads)


def test_the_disk_tier_serves_a_restart_and_the_store_may_be_down(bench: Bench) -> None:
    manifest, cold = bench.publish(b"weights"), bench.publish(b"cold", name="cold")
    ask(bench.loader(), manifest)
    bench.store.is_down = True
    again = bench.loader()
    assert ask(again, manifest) == (b"weights", None, "disk")
    assert ask(again, manifest) == (b"weights", None, "host")
    value, error, _ = ask(again, cold)
    assert value is None
    assert type(error) is AdapterUnavailable


def test_one_tenants_slow_objects_do_not_delay_anothers(bench: Bench) -> None:
    loader = bench.loader()
    slow = [bench.publish(b"slow %d" % i, "acme", f"slow-{i}") for i in range(100)]
    other, slow_answers = bench.publish(b"quick", "globex"), Answers()
    gates = [bench.gate(manifest) for manifest in slow]
    for manifest in slow:
        loader.want(manifest, slow_answers)
    for _ in range(2 * 3):  # three workers hang at their second file; the fourth is kept from this tenant
        assert bench.store.started.acquire(timeout=WAIT_S)
    assert ask(loader, other) == (b"quick", None, "s3")
    assert slow_answers.got == []
    for gate in gates:
        gate.set()
    slow_answers.wait(100)


def test_tenants_take_turns(bench: Bench) -> None:
    loader = bench.loader(limits=LoaderLimits(workers=1))
    first = bench.publish(b"first", "acme", "first")
    gate, answers = bench.gate(first), Answers()
    loader.want(first, answers)
    for _ in range(2):
        assert bench.store.started.acquire(timeout=WAIT_S)
    for i in range(3):
        loader.want(bench.publish(b"a%d" % i, "acme", f"a{i}"), answers)
    for i in range(2):
        loader.want(bench.publish(b"g%d" % i, "globex", f"g{i}"), answers)
    gate.set()
    assert [value for _, value, _, _ in answers.wait(6)] == [b"first", b"a0", b"g0", b"a1", b"g1", b"a2"]


def test_a_full_queue_is_an_answer_and_leaves_room_for_others(bench: Bench) -> None:
    loader = bench.loader(limits=LoaderLimits(workers=1, max_pending=3, max_pending_per_tenant=2))
    manifests = [bench.publish(b"%d" % i, "acme", f"n{i}") for i in range(4)]
    gate, answers = bench.gate(manifests[0]), Answers()
    loader.want(manifests[0], answers)
    assert bench.store.started.acquire(timeout=WAIT_S)
    for manifest in manifests[1:]:
        loader.want(manifest, answers)
    refused = answers.wait(1)[0]
    assert refused[0] is manifests[3]
    assert isinstance(refused[2], AdapterUnavailable)
    loader.want(manifests[1], answers)  # joins its flight, queue full or not
    loader.want(bench.publish(b"g", "globex"), answers)
    gate.set()
    assert sorted(value for _, value, _, _ in answers.wait(6)[1:] if value) == [b"0", b"1", b"1", b"2", b"g"]


def test_a_broken_adapter_fails_alone_and_is_not_tried_again(bench: Bench) -> None:
    loader = bench.loader()
    broken, buggy, good = bench.publish(b"refused"), bench.publish(b"bug", name="bug"), bench.publish(b"ok", name="ok")
    value, error, tier = ask(loader, broken)
    assert (value, tier) == (None, "")
    assert isinstance(error, AdapterRefused)
    assert error.code == "adapter_rank_too_large"
    assert type(ask(loader, buggy)[1]) is AdapterUnavailable
    assert ask(loader, good) == (b"ok", None, "s3")
    bench.now += 1e6
    again = ask(loader, broken)[1]
    assert isinstance(again, AdapterRefused)
    assert again is not error
    assert again.code == "adapter_rank_too_large"
    assert bench.parsed.count(broken) == 1
    failures = loader.snapshot().failures
    assert {reason: n for reason, n in failures.items() if n} == {"rank": 1, "internal": 1}


def test_waiters_do_not_share_an_error_object(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"refused"), Answers()
    gate = bench.gate(manifest)
    for _ in range(2):
        loader.want(manifest, answers)
    gate.set()
    answers.wait(2)
    for _ in range(2):
        loader.want(manifest, answers)
    errors = [error for _, _, error, _ in answers.wait(4)]
    assert len({id(error) for error in errors}) == 4
    assert all(error is not None and error.__traceback__ is None for error in errors)


def test_not_found_is_remembered_for_ten_seconds(bench: Bench) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    blob = bench.store.blobs.pop(weights_key(manifest))
    assert isinstance(ask(loader, manifest)[1], AdapterNotFound)
    bench.store.put(weights_key(manifest), blob)
    bench.now += 9.9
    assert isinstance(ask(loader, manifest)[1], AdapterNotFound)
    assert bench.store.calls[weights_key(manifest)] == 1
    bench.now += 0.2
    assert ask(loader, manifest)[0] == b"weights"


def test_an_unavailable_store_is_asked_once_per_two_seconds_and_jitter(bench: Bench) -> None:
    bench.jitter = 0.5
    loader, manifest = bench.loader(), bench.publish(b"weights")
    bench.store.is_down = True
    for _ in range(20):
        assert isinstance(ask(loader, manifest)[1], AdapterUnavailable)
    bench.now += 2.4
    assert isinstance(ask(loader, manifest)[1], AdapterUnavailable)
    assert set(bench.store.calls.values()) == {1}
    bench.store.is_down = False
    bench.now += 0.2
    assert ask(loader, manifest)[0] == b"weights"
    assert loader.snapshot().failures["s3"] == 1


def test_a_flipped_byte_on_disk_is_dropped_and_refetched(bench: Bench) -> None:
    manifest = bench.publish(b"weights")
    ask(bench.loader(), manifest)
    (bench.root / "acme" / manifest.weights.sha256).write_bytes(b"Weights")
    loader = bench.loader()
    assert ask(loader, manifest) == (b"weights", None, "s3")
    assert bench.store.calls[weights_key(manifest)] == 2
    assert loader.snapshot().disk.evictions[Eviction.CORRUPT] == 1


def test_wrong_bytes_are_fetched_again_once(bench: Bench) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    bench.store.lies = [b'{"name":"SUPPORT"}']
    assert ask(loader, manifest)[0] == b"weights"
    assert sum(bench.store.calls.values()) == 3


@pytest.mark.parametrize("stored", [b"Weights", b"weigh", b"weights and more"])
def test_bytes_that_stay_wrong_are_a_digest_mismatch_and_never_parsed(bench: Bench, stored: bytes) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    bench.store.blobs[weights_key(manifest)] = stored
    assert isinstance(ask(loader, manifest)[1], AdapterDigestMismatch)
    assert bench.store.calls[weights_key(manifest)] == 2
    assert bench.parsed == []
    assert loader.snapshot().failures["digest"] == 1
    assert isinstance(ask(loader, manifest)[1], AdapterDigestMismatch)
    assert bench.store.calls[weights_key(manifest)] == 2


def test_a_manifest_cannot_ask_for_more_bytes_than_adapters_have(bench: Bench) -> None:
    loader, manifest = bench.loader(limits=LoaderLimits(max_weights_bytes=100)), bench.publish(b"weights")
    huge = replace(manifest, weights=FileFact(manifest.weights.sha256, 101))
    assert isinstance(ask(loader, huge)[1], AdapterTooLarge)
    assert not bench.store.calls


def test_equal_bytes_of_two_tenants_are_fetched_from_each_ones_own_prefix(bench: Bench) -> None:
    loader, mine = bench.loader(), bench.publish(b"weights", "acme")
    ask(loader, mine)
    assert isinstance(ask(loader, replace(mine, tenant="globex"))[1], AdapterNotFound)


def test_waiters_hear_of_a_deadline_while_the_load_keeps_its_single_flight(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"weights"), Answers()
    gate = bench.gate(manifest)
    loader.want(manifest, answers)
    for _ in range(2):
        assert bench.store.started.acquire(timeout=WAIT_S)
    bench.now += 20.0
    answers.wait(1)
    assert type(answers.last[1]) is AdapterUnavailable
    bench.now += 2.1
    loader.want(manifest, answers)
    answers.wait(2)
    assert bench.store.calls[weights_key(manifest)] == 1
    assert loader.snapshot().failures["timeout"] == 1
    gate.set()
    eventually(lambda: loader.host(manifest) is not None)
    assert ask(loader, manifest)[2] == "host"
    assert len(answers.got) == 2


def test_a_load_that_never_gets_a_worker_is_answered(bench: Bench) -> None:
    loader, answers = bench.loader(limits=LoaderLimits(workers=1)), Answers()
    blocking, waiting = bench.publish(b"1", name="n1"), bench.publish(b"2", "globex", "n2")
    bench.gate(blocking)
    loader.want(blocking, Answers())
    assert bench.store.started.acquire(timeout=WAIT_S)
    loader.want(waiting, answers)
    bench.now += 20.0
    answers.wait(1)
    assert type(answers.last[1]) is AdapterUnavailable
    assert bench.store.calls[weights_key(waiting)] == 0
    assert loader.snapshot().failures["overload"] == 1


def test_a_load_waits_for_its_slower_file_and_not_for_one_after_the_other(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"weights"), Answers()
    config_key = blob_key("acme", manifest.config.sha256)
    gates = [bench.gate(manifest), bench.store.gates.setdefault(config_key, threading.Event())]
    loader.want(manifest, answers)
    for _ in gates:
        assert bench.store.started.acquire(timeout=WAIT_S)
    assert answers.got == []
    for gate in gates:
        gate.set()
    assert answers.wait(1)[0][1:] == (b"weights", None, "s3")


@pytest.mark.parametrize("missing", ["config", "weights"])
def test_one_file_that_is_missing_leaves_no_lease_on_the_other(bench: Bench, missing: str) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    del bench.store.blobs[blob_key("acme", getattr(manifest, missing).sha256)]
    assert isinstance(ask(loader, manifest)[1], AdapterNotFound)
    assert loader.snapshot().disk.leased == 0
    assert bench.parsed == []


def test_no_object_is_asked_for_past_the_deadline(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"weights"), Answers()
    bench.store.blobs[weights_key(manifest)] = b"Weights"  # what is wrong is asked for again
    gate = bench.gate(manifest)
    loader.want(manifest, answers)
    for _ in range(2):
        assert bench.store.started.acquire(timeout=WAIT_S)
    bench.now += 20.0
    gate.set()
    answers.wait(1)
    eventually(lambda: loader.snapshot().running == 0)
    assert bench.store.calls[weights_key(manifest)] == 1
    assert loader.snapshot().failures["timeout"] == 1


def test_a_full_disk_serves_without_keeping(bench: Bench) -> None:
    loader, kept, manifest = bench.loader(), bench.publish(b"kept", name="kept"), bench.publish(b"weights")
    ask(loader, kept)
    bench.store.failures = [LocalDiskFailed()]
    assert ask(loader, manifest) == (b"weights", None, "s3")
    both = (manifest.config, manifest.weights)
    assert sum((bench.root / "acme" / fact.sha256).exists() for fact in both) == 1, "one of the two met the full disk"
    assert not [path for path in bench.root.glob(".private-*/*") if path.name != "owner"]
    bench.store.failures = [LocalDiskFailed()] * 4  # of each file both attempts
    assert type(ask(loader, bench.publish(b"more", name="more"))[1]) is AdapterUnavailable
    assert loader.snapshot().failures["disk"] == 1


def test_no_disk_budget_serves_from_the_store_alone(bench: Bench) -> None:
    loader, manifest = bench.loader(disk_bytes=0), bench.publish(b"weights")
    assert ask(loader, manifest) == (b"weights", None, "s3")
    assert not list(bench.root.glob("acme/*"))


def test_an_adapter_larger_than_the_host_tier_reaches_who_waits(bench: Bench) -> None:
    loader, manifest = bench.loader(host_bytes=3), bench.publish(b"weights")
    assert ask(loader, manifest) == (b"weights", None, "s3")
    assert loader.host(manifest) is None
    assert ask(loader, manifest) == (b"weights", None, "disk")


def test_what_a_killed_process_left_is_swept(bench: Bench) -> None:
    dead = bench.root / ".private-dead"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"wei")
    manifest = bench.publish(b"weights")
    loader = bench.loader()
    assert not dead.exists()
    assert ask(loader, manifest)[0] == b"weights"


def test_handed_over_adapters_are_served_without_the_store(bench: Bench, tmp_path: Path) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    files = tmp_path / "config", tmp_path / "weights"
    for path, fact in zip(files, (manifest.config, manifest.weights), strict=True):
        path.write_bytes(bench.store.blobs[blob_key("acme", fact.sha256)])
    assert loader.put(manifest, b"weights", files)
    shutil.rmtree(tmp_path / "config", ignore_errors=True)
    assert loader.host(manifest) == b"weights"
    assert ask(bench.loader(), manifest) == (b"weights", None, "disk")
    assert not bench.store.calls


def test_handing_over_ends_a_remembered_failure(bench: Bench) -> None:
    loader, manifest = bench.loader(host_bytes=3), bench.publish(b"weights")
    bench.store.is_down = True
    ask(loader, manifest)
    bench.store.is_down = False
    assert not loader.put(manifest, b"weights")
    assert ask(loader, manifest)[0] == b"weights"


def test_forgotten_adapters_leave_every_tier(bench: Bench) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    ask(loader, manifest)
    bench.store.delete(weights_key(manifest))
    loader.forget(manifest.ref.key, Eviction.ERASED, files=(manifest.config, manifest.weights))
    assert loader.host(manifest) is None
    assert not list(bench.root.glob("acme/*"))
    assert isinstance(ask(loader, manifest)[1], AdapterNotFound)
    assert loader.snapshot().host.evictions[Eviction.ERASED] == 1


def test_what_is_erased_while_it_loads_never_arrives(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"weights"), Answers()
    gate = bench.gate(manifest)
    loader.want(manifest, answers)
    for _ in range(2):
        assert bench.store.started.acquire(timeout=WAIT_S)
    loader.forget_tenant("acme")
    answers.wait(1)
    assert isinstance(answers.last[1], AdapterNotFound)
    gate.set()
    eventually(lambda: loader.snapshot().running == 0)
    loader.close()
    assert loader.host(manifest) is None
    assert not list(bench.root.glob("acme/*"))
    assert len(answers.got) == 1


def test_erasing_a_tenant_leaves_the_neighbours(bench: Bench) -> None:
    loader, mine, theirs = bench.loader(), bench.publish(b"a", "acme"), bench.publish(b"b", "acme-corp")
    ask(loader, mine)
    ask(loader, theirs)
    loader.forget_tenant("acme")
    assert loader.host(mine) is None
    assert loader.host(theirs) == b"b"


def test_a_quarantined_digest_is_refused_whatever_tier_has_it(bench: Bench) -> None:
    loader, bad, good = bench.loader(), bench.publish(b"nan"), bench.publish(b"good", name="good")
    ask(loader, bad)
    loader.quarantine(bad.ref.key)
    loader.quarantine(bad.ref.key)
    assert loader.host(bad) is None
    assert isinstance(ask(loader, bad)[1], AdapterQuarantined)
    assert not loader.put(bad, b"nan")
    loader.forget(bad.ref.key, Eviction.ERASED)
    assert loader.is_quarantined(bad.ref.key)
    assert ask(loader, good)[0] == b"good"
    snapshot = loader.snapshot()
    assert (snapshot.quarantined, snapshot.failures["nan"]) == (1, 1)


def test_a_quarantine_reaches_a_load_under_way(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"nan"), Answers()
    gate = bench.gate(manifest)
    loader.want(manifest, answers)
    loader.quarantine(manifest.ref.key)
    gate.set()
    answers.wait(1)
    assert isinstance(answers.last[1], AdapterQuarantined)
    assert loader.host(manifest) is None


def test_a_waiter_that_raises_harms_no_other(bench: Bench) -> None:
    loader, manifest, answers = bench.loader(), bench.publish(b"weights"), Answers()

    def raises(*args: object) -> None:
        raise RuntimeError

    gate = bench.gate(manifest)
    for on_done in (raises, answers):
        loader.want(manifest, on_done)
    gate.set()
    answers.wait(1)
    for on_done in (raises, answers):
        loader.want(manifest, on_done)
    assert answers.wait(2)[1][1:] == (b"weights", None, "host")


def test_closing_answers_everybody_once_and_does_not_wait_for_a_stuck_store(bench: Bench) -> None:
    loader, answers = bench.loader(limits=LoaderLimits(workers=1)), Answers()
    stuck, queued = bench.publish(b"1", name="n1"), bench.publish(b"2", name="n2")
    gate = bench.gate(stuck)
    for manifest in (stuck, queued):
        loader.want(manifest, answers)
    loader.close(timeout_s=0.05)
    assert [type(error) for _, _, error, _ in answers.wait(2)] == [AdapterUnavailable] * 2
    loader.want(queued, answers)
    assert answers.threads[-1] == threading.current_thread().name
    loader.close()
    gate.set()
    for worker in loader._workers:
        worker.join(WAIT_S)
    assert len(answers.got) == 3


def test_the_snapshot_counts_loads_stages_and_bytes(bench: Bench) -> None:
    loader, manifest = bench.loader(), bench.publish(b"weights")
    ask(loader, manifest)
    ask(loader, manifest)
    snapshot = loader.snapshot()
    assert snapshot.loads == {"host": 1, "disk": 0, "s3": 1}
    assert (snapshot.host.used_bytes, snapshot.host.entries) == (7, 1)
    assert snapshot.disk.used_bytes == 7 + manifest.config.num_bytes
    assert (snapshot.pending, snapshot.running, snapshot.waiters) == (0, 0, 0)
    eventually(lambda: sorted(bench.stages) == ["fetch", "parse", "verify"])
    assert set(snapshot.stage_seconds) == {"fetch", "verify", "parse"}


def test_every_want_is_answered_once_under_churn(bench: Bench) -> None:
    loader, answers = bench.loader(disk_bytes=120, host_bytes=20), Answers()
    manifests = [bench.publish(b"w%02d" % i, f"t{i % 3}", f"n{i}") for i in range(12)]

    def work(seed: int) -> None:
        for i in range(60):
            manifest = manifests[(i * 7 + seed * 5) % 12]
            loader.want(manifest, answers)
            if i % 20 == 19:
                loader.forget(manifest.ref.key, Eviction.SUPERSEDED, files=(manifest.weights,))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = answers.wait(240)
    assert all(error is None and value == b"w" + m.name[1:].zfill(2).encode() for m, value, error, _ in got)
    loader.close()
    assert len(answers.got) == 240
    bench.host.check()
    bench.disk.check()
    assert bench.disk.stats().leased == 0
