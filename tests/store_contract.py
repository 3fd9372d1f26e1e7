"""What every blob store must do. Subclass StoreContract, give it a `store` fixture, and pytest runs all of it there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import ObjectKeyInvalid, ObjectNotFound, ObjectTooLarge
from adapters.store import BlobStore

NUM_WRITERS = 16


class StoreContract:
    def test_an_object_reads_back_as_it_was_put(self, store: BlobStore, tmp_path: Path) -> None:
        store.put("tenants/acme/a.bin", b"\x00\xff bytes")
        info = store.head("tenants/acme/a.bin")
        assert (info.key, info.size) == ("tenants/acme/a.bin", 8)
        assert store.get("tenants/acme/a.bin", max_bytes=8) == b"\x00\xff bytes"
        assert store.download("tenants/acme/a.bin", tmp_path / "a", max_bytes=8) == info
        assert (tmp_path / "a").read_bytes() == b"\x00\xff bytes"

    def test_a_file_is_stored_as_its_bytes_are(self, store: BlobStore, tmp_path: Path) -> None:
        data = bytes(range(256)) * 5000
        (tmp_path / "source").write_bytes(data)
        assert store.put_if_absent("files/created", tmp_path / "source")
        store.put("files/put", tmp_path / "source")
        for key in ("files/created", "files/put"):
            store.download(key, tmp_path / "copy", max_bytes=len(data))
            assert (tmp_path / "copy").read_bytes() == data

    def test_an_empty_object_is_an_object(self, store: BlobStore, tmp_path: Path) -> None:
        assert store.put_if_absent("empty", b"")
        assert store.get("empty", max_bytes=0) == b""
        assert store.download("empty", tmp_path / "e", max_bytes=0).size == 0

    def test_put_replaces_and_changes_the_etag(self, store: BlobStore) -> None:
        store.put("k", b"one")
        before = store.head("k").etag
        assert before
        store.put("k", b"two")
        assert store.get("k", max_bytes=9) == b"two"
        assert store.head("k").etag != before

    def test_listing_and_head_agree_on_size_and_etag(self, store: BlobStore) -> None:
        store.put("d/x", b"12345")
        assert store.list("d/") == [store.head("d/x")]

    def test_what_is_absent_is_not_found(self, store: BlobStore, tmp_path: Path) -> None:
        for read in (
            lambda: store.head("no/such"),
            lambda: store.get("no/such", max_bytes=1),
            lambda: store.get_range("no/such", 0, 1),
            lambda: store.get_range("no/such", 0, 0),
            lambda: store.download("no/such", tmp_path / "x", max_bytes=1),
        ):
            with pytest.raises(ObjectNotFound):
                read()
        assert store.list("no/") == []
        assert store.list_dirs("no/") == []

    def test_more_than_the_cap_is_refused(self, store: BlobStore, tmp_path: Path) -> None:
        store.put("big", b"x" * 100)
        with pytest.raises(ObjectTooLarge):
            store.get("big", max_bytes=99)
        with pytest.raises(ObjectTooLarge):
            store.download("big", tmp_path / "big", max_bytes=99)
        assert len(store.get("big", max_bytes=100)) == 100

    def test_ranges_are_cut_at_the_end(self, store: BlobStore) -> None:
        store.put("r", b"0123456789")
        assert store.get_range("r", 0, 3) == b"012"
        assert store.get_range("r", 8, 5) == b"89"
        assert store.get_range("r", 10, 5) == b""
        assert store.get_range("r", 4, 0) == b""

    def test_create_only_never_replaces(self, store: BlobStore) -> None:
        assert store.put_if_absent("once", b"first")
        assert not store.put_if_absent("once", b"second")
        assert store.get("once", max_bytes=9) == b"first"

    def test_of_racing_creators_one_wins(self, store: BlobStore) -> None:
        for round_number in range(3):
            start = threading.Barrier(NUM_WRITERS)
            key = f"race/{round_number}"

            def create(writer: int, key: str = key, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.put_if_absent(key, f"writer {writer}".encode())

            with ThreadPoolExecutor(NUM_WRITERS) as pool:
                outcomes = list(pool.map(create, range(NUM_WRITERS)))
            assert sum(outcomes) == 1
            assert store.get(key, max_bytes=99) == f"writer {outcomes.index(True)}".encode()

    def test_listing_is_sorted_by_utf8_key(self, store: BlobStore) -> None:
        keys = ["l/a/z", "l/a-b", "l/a.b", "l/a/b/c", "l/a0", "l/é", "l/z", "l/B"]
        for key in keys:
            store.put(key, b"")
        assert [info.key for info in store.list("l/")] == sorted(keys, key=str.encode)

    def test_listing_goes_on_after_a_key_and_stops_at_the_limit(self, store: BlobStore) -> None:
        keys = [f"p/{directory}/{n}" for directory in "abc" for n in range(4)]
        for key in keys:
            store.put(key, b"")
        assert [info.key for info in store.list("p/", limit=5)] == keys[:5]
        assert [info.key for info in store.list("p/", after=keys[4], limit=3)] == keys[5:8]
        assert [info.key for info in store.list("p/", after="p/a/9")] == keys[4:]
        assert store.list("p/", after=keys[-1]) == []
        assert store.list("p/", limit=0) == []

    def test_a_prefix_finds_nothing_of_a_longer_name(self, store: BlobStore) -> None:
        for tenant in ("acme", "acme-corp", "acmee"):
            store.put(f"tenants/{tenant}/x", b"")
        assert [info.key for info in store.list("tenants/acme/")] == ["tenants/acme/x"]
        assert store.list_dirs("tenants/") == ["acme", "acme-corp", "acmee"]
        with pytest.raises(ObjectKeyInvalid):
            store.list("tenants/acme")

    def test_directories_are_those_with_objects_below(self, store: BlobStore) -> None:
        for key in ("d/file", "d/one/x", "d/two/deep/er/x"):
            store.put(key, b"")
        assert store.list_dirs("d/") == ["one", "two"]
        store.delete("d/one/x")
        assert store.list_dirs("d/") == ["two"]
        assert store.list_dirs("") == ["d"]

    def test_deleting_twice_is_fine(self, store: BlobStore) -> None:
        store.put("gone", b"")
        store.delete("gone")
        store.delete("gone")
        with pytest.raises(ObjectNotFound):
            store.head("gone")
        assert store.put_if_absent("gone", b"again")

    @pytest.mark.parametrize(
        "key",
        ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a/.", "a\0b", "a\nb", "\ud800", "x" * 256, "a/" * 600 + "a"],
    )
    def test_unsafe_keys_are_refused(self, store: BlobStore, key: str) -> None:
        for call in (store.head, store.delete, lambda k: store.put(k, b""), lambda k: store.put_if_absent(k, b"")):
            with pytest.raises(ObjectKeyInvalid):
                call(key)

    def test_the_probe_finds_nothing_to_say(self, store: BlobStore) -> None:
        assert store.probe() == []
        assert store.probe() == []
        assert store.list("") == []
