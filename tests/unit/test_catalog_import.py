"""Plain PEFT directories: when they are imported, what `live` does, and what happens while they are being copied."""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import (
    AdapterConfigInvalid,
    AdapterConfigTooLarge,
    AdapterFileMissing,
    AdapterFormatUnsupported,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
)
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, adapter_prefix
from tests.catalog_lab import Lab


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.store.os.fsync", lambda fd: None)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


class TestFirstUse:
    def test_a_copied_directory_answers_by_its_name(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        manifest = lab.catalog.resolve("acme", "support")
        assert (manifest.label, manifest.source, lab.weights_of(manifest)) == ("support@v1", "import", "one")
        assert lab.catalog.peek("acme", "support") == manifest
        assert lab.catalog.aliases("acme", "support") == {"live": 1}

    def test_it_is_imported_once_for_a_herd_and_for_two_processes(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        catalogs, start = [lab.open(), lab.open()], threading.Barrier(24)

        def ask(number: int) -> str:
            start.wait()
            return catalogs[number % 2].resolve("acme", "support").publish_id

        with ThreadPoolExecutor(24) as pool:
            assert len(set(pool.map(ask, range(24)))) == 1
        assert lab.num_checks <= 2
        assert len(lab.open().versions("acme", "support")) == 1

    def test_a_restart_imports_nothing_again(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        lab.catalog.resolve("acme", "support")
        for _ in range(2):
            assert lab.open().resolve("acme", "support").version == 1
        assert lab.num_checks == 1

    def test_looking_imports_nothing(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        (summary,) = lab.catalog.list("acme")
        assert (summary.name, summary.versions, summary.live, summary.has_directory) == ("support", (), None, True)
        assert lab.catalog.versions("acme", "support") == []
        assert lab.catalog.aliases("acme", "support") == {}
        assert lab.num_checks == 0

    def test_a_name_is_no_tenants_neighbour(self, lab: Lab) -> None:
        lab.copy_in("support", "corp's", tenant="acme-corp")
        lab.copy_in("support-2", "second")
        with pytest.raises(AdapterNotFound):
            lab.catalog.resolve("acme", "support")

    def test_a_directory_copied_after_a_denial_is_found_after_ten_seconds(self, lab: Lab) -> None:
        with pytest.raises(AdapterNotFound):
            lab.catalog.resolve("acme", "support")
        lab.copy_in("support", "one")
        lab.clock.now += 10
        assert lab.catalog.resolve("acme", "support").version == 1

    def test_it_can_be_asked_for(self, lab: Lab) -> None:
        assert lab.catalog.import_directory("acme", "support") is None
        lab.copy_in("support", "one")
        first = lab.catalog.import_directory("acme", "support")
        assert first is not None
        assert lab.catalog.import_directory("acme", "support") == first
        lab.copy_in("support", "two")
        second = lab.catalog.import_directory("acme", "support")
        assert second is not None
        assert (second.version, lab.weights_of(second)) == (2, "two")
        assert lab.catalog.resolve("acme", "support") == second


class TestChange:
    def test_a_changed_directory_is_the_next_version_and_live_follows(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        first = lab.catalog.resolve("acme", "support")
        lab.copy_in("support", "two", config=None)
        assert lab.catalog.resolve("acme", "support") == first
        lab.clock.now += 15
        second = lab.catalog.resolve("acme", "support")
        assert (second.version, lab.weights_of(second)) == (2, "two")
        assert lab.catalog.resolve("acme", "support", "v1") == first
        lab.copy_in("support", "one", config=None)
        lab.clock.now += 15
        third = lab.catalog.resolve("acme", "support")
        assert (third.version, third.digest) == (3, first.digest)

    def test_a_published_live_stays_and_a_warning_says_so(self, lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
        published = lab.publish("support", "published")
        lab.copy_in("support", "copied")
        lab.clock.now += 15
        with caplog.at_level(logging.WARNING):
            assert lab.catalog.resolve("acme", "support") == published
        assert [getattr(record, "action", "") for record in caplog.records] == ["import_not_live"]
        assert lab.weights_of(lab.catalog.resolve("acme", "support", "v2")) == "copied"
        for _ in range(3):
            lab.clock.now += 15
            assert lab.catalog.resolve("acme", "support") == published
            assert lab.open().resolve("acme", "support") == published
        assert len(lab.catalog.versions("acme", "support")) == 2

    def test_a_roll_back_of_an_import_holds_until_the_next_import(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.copy_in("support", "two")
        lab.catalog.import_directory("acme", "support")
        lab.catalog.roll_back("acme", "support")
        for catalog in (lab.catalog, lab.open()):
            assert catalog.resolve("acme", "support").version == 1
        lab.copy_in("support", "three")
        assert lab.open().resolve("acme", "support").version == 3

    def test_what_is_live_is_served_while_a_change_is_imported(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.copy_in("support", "two")
        lab.clock.now += 15
        importing, go_on = threading.Event(), threading.Event()

        def hold(op: str, key: str) -> None:
            if op == "download":
                importing.set()
                assert go_on.wait(10)

        lab.store.before = hold
        with ThreadPoolExecutor(1) as pool:
            leader = pool.submit(lab.catalog.resolve, "acme", "support")
            assert importing.wait(10)
            assert lab.catalog.resolve("acme", "support").version == 1
            go_on.set()
            assert leader.result().version == 2


class TestRefusal:
    def test_a_refused_pair_is_looked_at_again_when_it_has_changed(self, lab: Lab) -> None:
        lab.copy_in("support", "one", config=b"refuse")
        for _ in range(3):
            with pytest.raises(AdapterConfigInvalid):
                lab.catalog.resolve("acme", "support")
        lab.clock.now += 2
        with pytest.raises(AdapterConfigInvalid):
            lab.catalog.resolve("acme", "support")
        assert lab.num_checks == 1  # the same files are not read again
        assert lab.store.calls["download"] == 1
        problem = lab.catalog.list("acme")[0].problem
        assert isinstance(problem, AdapterConfigInvalid)
        lab.copy_in("support", None, config=b"{}")
        lab.clock.now += 2
        assert lab.catalog.resolve("acme", "support").version == 1

    def test_a_refused_change_does_not_take_away_what_is_live(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        first = lab.catalog.resolve("acme", "support")
        lab.copy_in("support", "two", config=b"refuse")
        lab.clock.now += 15
        assert lab.catalog.resolve("acme", "support") == first
        with pytest.raises(AdapterConfigInvalid):
            lab.catalog.import_directory("acme", "support")

    def test_half_a_copy_is_named_as_such(self, lab: Lab) -> None:
        lab.copy_in("no-weights", None)
        lab.copy_in("no-config", "one", config=None)
        for name, missing in (("no-weights", WEIGHTS_FILE), ("no-config", CONFIG_FILE)):
            with pytest.raises(AdapterFileMissing) as refused:
                lab.catalog.resolve("acme", name)
            assert refused.value.param == missing
        lab.copy_in("no-weights", "late")
        lab.clock.now += 2
        assert lab.weights_of(lab.catalog.resolve("acme", "no-weights")) == "late"

    def test_pickled_weights_are_named_as_such(self, lab: Lab) -> None:
        lab.copy_in("old", None)
        lab.plain.put(adapter_prefix("acme", "old") + "adapter_model.bin", b"pickle")
        with pytest.raises(AdapterFormatUnsupported):
            lab.catalog.resolve("acme", "old")

    def test_files_over_their_caps_are_not_read(self, lab: Lab) -> None:
        lab.copy_in("long-config", "one", config=b" " * (64 << 10) + b"{")
        lab.copy_in("big", "w" * (2 << 20))
        with pytest.raises(AdapterConfigTooLarge):
            lab.catalog.resolve("acme", "long-config")
        with pytest.raises(AdapterTooLarge):
            lab.catalog.resolve("acme", "big")
        assert lab.num_checks == 0
        assert list((lab.path / "scratch").iterdir()) == []

    def test_other_files_beside_the_two_do_not_matter(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        for name in ("README.md", "adapter_model.bin", "tokenizer.json", "checkpoint-1/optimizer.pt"):
            lab.plain.put(adapter_prefix("acme", "support") + name, b"x")
        assert lab.catalog.resolve("acme", "support").version == 1


class TestWhileItIsCopied:
    def test_files_that_change_while_read_are_read_again(self, lab: Lab) -> None:
        lab.copy_in("support", "old", config=b"{1}")

        def finish_copying(op: str, key: str) -> None:
            if op == "download":  # the config has been read
                lab.store.before = None
                lab.copy_in("support", "new", config=b"{2}")

        lab.store.before = finish_copying
        manifest = lab.catalog.resolve("acme", "support")
        assert lab.weights_of(manifest) == "new"
        assert (manifest.version, lab.store.calls["download"]) == (1, 2)
        assert lab.open().resolve("acme", "support") == manifest

    def test_files_that_never_settle_are_unavailable_for_two_seconds(self, lab: Lab) -> None:
        lab.copy_in("support", "0")
        counter = iter(range(1, 100))

        def keep_copying(op: str, key: str) -> None:
            if op == "download":
                lab.copy_in("support", f"{next(counter)}", config=None)

        lab.store.after = keep_copying
        for _ in range(3):
            with pytest.raises(AdapterUnavailable):
                lab.catalog.resolve("acme", "support")
        assert lab.store.calls["download"] == 3
        lab.store.after = None
        lab.clock.now += 2
        assert lab.weights_of(lab.catalog.resolve("acme", "support")) == "3"

    def test_a_store_that_fails_while_importing_is_tried_again(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        lab.store.before = lambda op, key: setattr(lab.store, "is_down", op == "download") if op != "list" else None
        with pytest.raises(AdapterUnavailable):
            lab.catalog.resolve("acme", "support")
        lab.store.before, lab.store.is_down = None, False
        with pytest.raises(AdapterUnavailable):
            lab.catalog.resolve("acme", "support")
        lab.clock.now += 3
        assert lab.catalog.resolve("acme", "support").version == 1

    def test_killed_at_any_call_an_import_ends_as_one_live_version(self, tmp_path: Path) -> None:
        for how in ("dies_at", "loses_answer_of"):
            k = 0
            while True:
                lab = Lab(tmp_path / how / str(k))
                lab.copy_in("support", "one")
                lab.open(lab.plain).resolve("acme", "support")
                lab.copy_in("support", "two")
                setattr(lab.store, how, k)
                with contextlib.suppress(AdapterUnavailable):
                    lab.catalog.resolve("acme", "support")
                manifest = lab.open(lab.plain).resolve("acme", "support")
                assert (manifest.version, lab.weights_of(manifest)) == (2, "two"), (how, k)
                assert len(lab.open(lab.plain).versions("acme", "support")) == 2
                if lab.store.calls.total() <= k:
                    break
                k += 1
            assert k > 10


class TestDeletingImports:
    def test_a_deleted_import_takes_its_directory_along(self, lab: Lab) -> None:
        lab.publish("support", "published")
        lab.copy_in("support", "copied")
        lab.catalog.import_directory("acme", "support")
        lab.catalog.delete_version("acme", "support", 2)
        assert lab.open().resolve("acme", "support").version == 1
        assert len(lab.open().versions("acme", "support")) == 1

    def test_a_directory_that_has_changed_since_stays(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        lab.catalog.import_directory("acme", "support")
        lab.copy_in("support", "two")
        lab.catalog.import_directory("acme", "support")
        lab.catalog.delete_version("acme", "support", 1)
        assert lab.weights_of(lab.open().resolve("acme", "support")) == "two"

    def test_a_deleted_adapter_is_imported_when_it_is_copied_again(self, lab: Lab) -> None:
        lab.copy_in("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.catalog.delete("acme", "support")
        with pytest.raises(AdapterNotFound):
            lab.catalog.resolve("acme", "support")
        lab.copy_in("support", "one")
        manifest = lab.open().resolve("acme", "support")
        assert (manifest.version, lab.weights_of(manifest)) == (2, "one")
