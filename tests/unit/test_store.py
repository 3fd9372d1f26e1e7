from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from adapters.breaker import CircuitBreaker
from adapters.errors import LocalDiskFailed, ObjectKeyInvalid, ObjectNotFound, StoreDenied
from adapters.store import DirectoryStore
from tests.store_contract import StoreContract


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


class TestDirectoryStore(StoreContract):
    def test_a_link_is_no_object(self, store: DirectoryStore, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret")
        store.put("d/plain", b"")
        (store.root / "d" / "link").symlink_to(tmp_path / "secret")
        os.mkfifo(store.root / "d" / "pipe")
        for key in ("d/link", "d/pipe"):
            with pytest.raises((ObjectNotFound, StoreDenied)):
                store.get(key, max_bytes=99)
            with pytest.raises(ObjectNotFound):
                store.head(key)
        assert [info.key for info in store.list("d/")] == ["d/plain"]

    def test_a_linked_directory_leads_nowhere(self, store: DirectoryStore, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "x").write_bytes(b"x")
        (store.root / "way-out").symlink_to(outside)
        with pytest.raises(ObjectNotFound):
            store.get("way-out/x", max_bytes=9)
        with pytest.raises(ObjectKeyInvalid):
            store.put("way-out/y", b"")
        store.delete("way-out/x")
        assert (outside / "x").exists()
        assert not (outside / "y").exists()
        assert store.list("") == store.list("way-out/") == []

    def test_an_object_below_an_object_is_refused(self, store: DirectoryStore) -> None:
        store.put("a", b"")
        with pytest.raises(ObjectKeyInvalid):
            store.put("a/b", b"")
        store.put("c/d", b"")
        with pytest.raises(ObjectKeyInvalid):
            store.put("c", b"")

    def test_a_file_changed_in_place_changes_its_etag(self, store: DirectoryStore) -> None:
        store.put("k", b"same size")
        before = store.head("k").etag
        os.utime(store.root / "k", ns=(time.time_ns(), time.time_ns() + 1))
        assert store.head("k").etag != before

    def test_temporary_files_are_hidden_and_swept_when_old(self, store: DirectoryStore) -> None:
        old, new = store.root / ".tmp" / "old", store.root / ".tmp" / "new"
        old.write_bytes(b"")
        new.write_bytes(b"")
        os.utime(old, (0, 0))
        assert store.list("") == []
        assert store.list_dirs("") == []
        with pytest.raises(ObjectKeyInvalid):
            store.get(".tmp/new", max_bytes=1)
        DirectoryStore(store.root)
        assert (old.exists(), new.exists()) == (False, True)

    def test_a_write_leaves_no_temporary_file(self, store: DirectoryStore, tmp_path: Path) -> None:
        store.put("k", b"")
        store.put_if_absent("k", b"")
        with pytest.raises(LocalDiskFailed):
            store.put("j", tmp_path / "absent")
        assert os.listdir(store.root / ".tmp") == []

    def test_a_full_local_disk_is_not_the_stores_fault(self, store: DirectoryStore) -> None:
        store.put("k", b"x" * 100_000)
        with pytest.raises(LocalDiskFailed):
            store.download("k", Path("/dev/full"), max_bytes=1 << 20)

    def test_processes_share_a_directory(self, store: DirectoryStore) -> None:
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            created = pool.starmap(_create_many, [(str(store.root), writer) for writer in range(4)])
        assert sorted(key for keys in created for key in keys) == sorted(f"shared/{n}" for n in range(50))
        assert len(store.list("shared/")) == 50


def _create_many(root: str, writer: int) -> list[str]:
    store = DirectoryStore(Path(root))
    return [f"shared/{n}" for n in range(50) if store.put_if_absent(f"shared/{n}", str(writer).encode())]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestCircuitBreaker:
    def fail(self, breaker: CircuitBreaker, times: int) -> None:
        for _ in range(times):
            assert breaker.admit()
            breaker.failed()

    def test_it_opens_at_the_fifth_failure_in_ten_seconds(self) -> None:
        breaker = CircuitBreaker(Clock())
        self.fail(breaker, 4)
        assert breaker.admit()
        breaker.failed()
        assert not breaker.admit()

    def test_failures_far_apart_do_not_open_it(self) -> None:
        clock = Clock()
        breaker = CircuitBreaker(clock)
        for _ in range(50):
            clock.now += 2.6
            self.fail(breaker, 1)
        assert breaker.admit()

    def test_after_five_seconds_one_trial_decides(self) -> None:
        clock = Clock()
        breaker = CircuitBreaker(clock)
        self.fail(breaker, 5)
        clock.now += 4.9
        assert not breaker.admit()
        clock.now += 0.1
        assert breaker.admit()
        assert not breaker.admit()
        breaker.failed()
        clock.now += 4.9
        assert not breaker.admit()
        clock.now += 0.2
        assert breaker.admit()
        breaker.succeeded()
        self.fail(breaker, 4)
        assert breaker.admit()

    def test_a_late_success_from_before_the_opening_does_not_close_it(self) -> None:
        breaker = CircuitBreaker(Clock())
        self.fail(breaker, 5)
        breaker.succeeded()
        assert not breaker.admit()
