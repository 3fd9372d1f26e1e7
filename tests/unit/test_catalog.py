"""Resolving, listing and forgetting: what the catalog answers, when it asks the store, and when the store fails."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import (
    AdapterBaseMismatch,
    AdapterDigestMismatch,
    AdapterNotFound,
    AdapterUnavailable,
)
from adapters.manifest import BaseModelSpec, version_key
from tests.catalog_lab import BASE, Lab


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.store.os.fsync", lambda fd: None)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


class TestResolve:
    def test_a_name_means_live_and_selectors_mean_what_they_say(self, lab: Lab) -> None:
        first, second = lab.publish("support", "one"), lab.publish("support", "two")
        lab.catalog.set_alias("acme", "support", "canary", 1)
        for selector, expected in ((None, second), ("live", second), ("v1", first), ("v2", second), ("canary", first)):
            assert lab.catalog.resolve("acme", "support", selector) == expected
        for selector in ("v3", "nightly", "v01", "V1", "", "../v1"):
            with pytest.raises(AdapterNotFound):
                lab.catalog.resolve("acme", "support", selector or "-")

    def test_the_versions_carry_what_was_published(self, lab: Lab) -> None:
        published = lab.publish("support", "one", renderer_digest="r", parent="p", job_id="j", extra={"loss": 0.5})
        assert (published.label, published.renderer_digest, published.parent) == ("support@v1", "r", "p")
        assert (published.job_id, published.extra, published.base_digest) == ("j", {"loss": 0.5}, BASE.digest)
        assert lab.open().resolve("acme", "support") == published
        assert lab.weights_of(published) == "one"

    def test_tenants_with_like_names_share_nothing(self, lab: Lab) -> None:
        for tenant in ("acme", "acme-corp", "a"):
            lab.publish("x", tenant, tenant=tenant)
        for tenant in ("acme", "acme-corp", "a"):
            manifest = lab.open().resolve(tenant, "x")
            assert (manifest.tenant, lab.weights_of(manifest)) == (tenant, tenant)
            assert [summary.name for summary in lab.open().list(tenant)] == ["x"]
        lab.catalog.erase_tenant("acme")
        assert lab.weights_of(lab.open().resolve("acme-corp", "x")) == "acme-corp"
        lab.publish("x-1", "neighbour", tenant="a")
        assert len(lab.open().versions("a", "x")) == 1

    def test_another_tenants_adapter_is_absent_also_when_warm(self, lab: Lab) -> None:
        lab.publish("secret", "one", tenant="globex")
        lab.catalog.resolve("globex", "secret")
        for name in ("secret", "no-such"):
            with pytest.raises(AdapterNotFound) as found:
                lab.catalog.resolve("acme", name)
            assert found.value.message == AdapterNotFound().message
        assert lab.catalog.peek("acme", "secret") is None

    @pytest.mark.parametrize("name", ["../x", "a/b", "__base__", "default", "", "x" * 64, "%2e", "A"])
    def test_a_name_that_cannot_be_costs_no_call(self, lab: Lab, name: str) -> None:
        with pytest.raises(AdapterNotFound):
            lab.catalog.resolve("acme", name)
        assert lab.catalog.versions("acme", name) == []
        assert lab.store.calls.total() == 0

    def test_an_adapter_for_another_base_is_refused(self, lab: Lab) -> None:
        lab.publish("support", "one")
        other = lab.open(base=BaseModelSpec("other", "c" * 64, (), BASE.linears))
        with pytest.raises(AdapterBaseMismatch):
            other.resolve("acme", "support")
        assert other.peek("acme", "support") is None

    def test_a_damaged_manifest_is_told_and_hides_no_neighbour(self, lab: Lab) -> None:
        lab.publish("bad", "one")
        lab.publish("good", "two")
        lab.plain.put(version_key("acme", "bad", 1), b"{]")
        fresh = lab.open()
        with pytest.raises(AdapterDigestMismatch):
            fresh.resolve("acme", "bad")
        assert [(s.name, s.live is None) for s in fresh.list("acme")] == [("bad", True), ("good", False)]

    def test_a_manifest_copied_to_another_place_is_not_believed(self, lab: Lab) -> None:
        lab.publish("mine", "one", tenant="globex")
        body = lab.plain.get(version_key("globex", "mine", 1), max_bytes=1 << 20)
        lab.publish("mine", "two")
        lab.plain.put(version_key("acme", "mine", 1), body)
        with pytest.raises(AdapterDigestMismatch):
            lab.open().resolve("acme", "mine")

    def test_a_whole_training_folder_beside_the_versions_hides_none(self, lab: Lab) -> None:
        lab.publish("support", "one")
        for number in range(1100):
            path = lab.plain.root / "tenants/acme/adapters/support" / f"checkpoint-{number}"
            path.mkdir()
            (path / "optimizer.pt").write_bytes(b"")
        assert lab.open().resolve("acme", "support").version == 1


class TestRemembering:
    def test_a_resolved_name_costs_no_call_for_fifteen_seconds(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.resolve("acme", "support")
        calls = lab.store.calls.total()
        lab.clock.now += 14.9
        assert lab.catalog.resolve("acme", "support").version == 1
        assert lab.store.calls.total() == calls
        lab.clock.now += 0.2
        lab.catalog.resolve("acme", "support")
        assert lab.store.calls.total() == calls + 1  # one listing; what it names is known

    def test_another_process_is_heard_after_fifteen_seconds(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.publish("support", "two", catalog=lab.open())
        assert lab.catalog.resolve("acme", "support").version == 1
        lab.clock.now += 15
        assert lab.catalog.resolve("acme", "support").version == 2

    def test_a_version_just_published_elsewhere_is_not_denied(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.publish("support", "two", catalog=lab.open())
        lab.clock.now += 1.1
        assert lab.catalog.resolve("acme", "support", "v2").version == 2
        calls = lab.store.calls.total()
        for _ in range(5):
            with pytest.raises(AdapterNotFound):
                lab.catalog.resolve("acme", "support", "v3")
        assert lab.store.calls.total() == calls  # asking for what is not there is no way to make calls

    def test_own_writes_are_seen_at_once(self, lab: Lab) -> None:
        with pytest.raises(AdapterNotFound):
            lab.catalog.resolve("acme", "support")
        assert lab.catalog.list("acme") == []
        lab.publish("support", "one")
        assert lab.catalog.resolve("acme", "support").version == 1
        assert [summary.versions for summary in lab.catalog.list("acme")] == [(1,)]

    def test_absent_names_are_asked_for_every_ten_seconds(self, lab: Lab) -> None:
        for _ in range(3):
            with pytest.raises(AdapterNotFound):
                lab.catalog.resolve("acme", "nobody")
        assert lab.store.calls.total() == 1
        lab.publish("nobody", "one", catalog=lab.open())
        lab.clock.now += 10
        assert lab.catalog.resolve("acme", "nobody").version == 1

    def test_a_flood_of_absent_names_costs_no_other_its_place(self, lab: Lab) -> None:
        catalog = lab.open(capacity=10)
        lab.publish("support", "one")
        catalog.resolve("acme", "support")
        for number in range(50):
            with pytest.raises(AdapterNotFound):
                catalog.resolve("globex", f"no-{number}")
        assert catalog.peek("acme", "support") is not None

    def test_what_is_remembered_is_bounded(self, lab: Lab) -> None:
        catalog = lab.open(capacity=10)
        for number in range(30):
            lab.publish(f"a{number}", "same")
            catalog.resolve("acme", f"a{number}")
        known = [number for number in range(30) if catalog.peek("acme", f"a{number}") is not None]
        assert known == list(range(20, 30))
        assert catalog.resolve("acme", "a0").version == 1

    def test_peek_never_calls_and_only_tells_what_is_fresh(self, lab: Lab) -> None:
        lab.publish("support", "one")
        assert lab.catalog.peek("acme", "support") is None
        manifest = lab.catalog.resolve("acme", "support")
        calls = lab.store.calls.total()
        assert lab.catalog.peek("acme", "support") == manifest
        assert lab.catalog.peek("acme", "support", "v1") == manifest
        assert lab.catalog.peek("acme", "support", "v2") is None
        lab.clock.now += 15
        assert lab.catalog.peek("acme", "support") is None
        assert lab.store.calls.total() == calls

    def test_a_name_in_use_is_read_ahead_once_and_nobody_waits_for_its_end(self, lab: Lab) -> None:
        lab.publish("support", "one")
        assert not lab.catalog.is_due("acme", "support")
        lab.catalog.resolve("acme", "support")
        lab.publish("support", "two", catalog=lab.open())
        lab.clock.now += 11.2
        assert not lab.catalog.is_due("acme", "support")
        lab.clock.now += 0.1
        assert [lab.catalog.is_due("acme", "support") for _ in range(3)] == [True, False, False]
        calls = lab.store.calls.total()
        lab.catalog.refresh("acme", "support")
        assert lab.store.calls.total() > calls
        assert lab.catalog.peek("acme", "support").version == 2
        lab.clock.now += 11.2
        assert lab.catalog.peek("acme", "support").version == 2
        assert not lab.catalog.is_due("acme", "support")
        lab.clock.now += 0.1
        assert lab.catalog.is_due("acme", "support")

    def test_a_store_that_fails_while_reading_ahead_leaves_what_was_known(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.clock.now += 12
        assert lab.catalog.is_due("acme", "support")
        lab.store.is_down = True
        lab.catalog.refresh("acme", "support")
        assert lab.catalog.num_stale_served == 0, "it is not too old yet"
        assert lab.catalog.peek("acme", "support").version == 1
        assert not lab.catalog.is_due("acme", "support")
        for _ in range(3):  # each time when the store may be tried again, somebody does so and nobody waits
            lab.clock.now += 3.1
            calls = lab.store.calls.total()
            assert [lab.catalog.is_due("acme", "support") for _ in range(2)] == [True, False]
            assert lab.catalog.peek("acme", "support").version == 1
            assert lab.store.calls.total() == calls
            lab.catalog.refresh("acme", "support")
            assert lab.store.calls.total() == calls + 1
        assert lab.catalog.num_stale_served > 0
        lab.clock.now += 86_400
        assert not lab.catalog.is_due("acme", "support")
        assert lab.catalog.peek("acme", "support") is None

    def test_a_herd_makes_one_listing_and_one_read_of_each_record(self, lab: Lab) -> None:
        lab.publish("support", "one")
        for selector in (None, "v1", "canary"):
            lab.catalog.set_alias("acme", "support", "canary", 1)
            catalog, num_threads = lab.open(), 40
            lab.store.calls.clear()
            start = threading.Barrier(num_threads)

            def ask(_: int, selector: str | None = selector, start: threading.Barrier = start, catalog=catalog) -> int:  # type: ignore[no-untyped-def]
                start.wait()
                return catalog.resolve("acme", "support", selector).version

            with ThreadPoolExecutor(num_threads) as pool:
                assert set(pool.map(ask, range(num_threads))) == {1}
            assert lab.store.calls["list"] == 1
            assert lab.store.calls["get"] <= 3  # live, canary, the manifest

    def test_a_change_made_while_it_was_read_is_not_lost(self, lab: Lab) -> None:
        lab.publish("support", "one")
        published = threading.Event()

        def publish_in_between(op: str, key: str) -> None:
            if op == "list" and not published.is_set():
                published.set()
                lab.store.after = None
                lab.publish("support", "two")

        lab.clock.now += 20
        lab.store.after = publish_in_between
        assert lab.catalog.resolve("acme", "support").version == 2


class TestStoreDown:
    def test_what_was_known_goes_on_and_is_counted(self, lab: Lab) -> None:
        manifest = lab.publish("support", "one")
        lab.catalog.set_alias("acme", "support", "canary", 1)
        for selector in (None, "canary", "v1"):
            lab.catalog.resolve("acme", "support", selector)
        lab.catalog.list("acme")
        lab.store.is_down = True
        lab.clock.now += 60
        calls = lab.store.calls.total()
        for _ in range(5):
            for selector in (None, "canary", "v1"):
                assert lab.catalog.resolve("acme", "support", selector) == manifest
                assert lab.catalog.peek("acme", "support", selector) == manifest
        assert [summary.live for summary in lab.catalog.list("acme")] == [manifest]
        assert lab.store.calls.total() == calls + 2  # one attempt for the adapter and one for the listing
        assert lab.catalog.num_stale_served == 31

    def test_after_a_day_nothing_is_served_from_memory(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.store.is_down = True
        lab.clock.now += 86_399
        lab.catalog.resolve("acme", "support")
        lab.clock.now += 5
        with pytest.raises(AdapterUnavailable):
            lab.catalog.resolve("acme", "support")

    def test_cold_names_are_unavailable_at_one_call_per_two_seconds(self, lab: Lab) -> None:
        lab.publish("support", "one", catalog=lab.open(lab.plain))
        lab.store.is_down = True
        for _ in range(5):
            with pytest.raises(AdapterUnavailable) as failed:
                lab.catalog.resolve("acme", "support")
            assert "down" not in failed.value.message
        assert lab.store.calls.total() == 1
        lab.clock.now += 3
        lab.store.is_down = False
        assert lab.catalog.resolve("acme", "support").version == 1

    def test_a_store_that_fails_between_listing_and_reading_moves_nobody(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.set_alias("acme", "support", "prod", 1)
        lab.catalog.resolve("acme", "support", "prod")
        other = lab.open()
        lab.publish("support", "two", catalog=other)
        other.set_alias("acme", "support", "prod", 2)
        lab.clock.now += 20

        def no_reading(op: str, key: str) -> None:
            lab.store.is_down = op == "list"

        lab.store.after = no_reading
        assert lab.catalog.resolve("acme", "support").version == 1
        assert lab.catalog.resolve("acme", "support", "prod").version == 1

    def test_the_store_is_asked_again_and_the_newest_is_served(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.resolve("acme", "support")
        lab.publish("support", "two", catalog=lab.open())
        lab.store.is_down = True
        lab.clock.now += 20
        assert lab.catalog.resolve("acme", "support").version == 1
        lab.store.is_down = False
        lab.clock.now += 3.1
        assert lab.catalog.resolve("acme", "support").version == 2

    def test_a_wall_clock_set_back_changes_nothing(self, lab: Lab) -> None:
        now = [1_700_000_000.0]
        catalog = lab.open()
        catalog._publisher._wall = catalog._aliases._wall = lambda: now[0]
        for weights in ("one", "two", "three"):
            lab.publish("support", weights, catalog=catalog)
            now[0] -= 3600
        assert catalog.resolve("acme", "support").version == 3
        assert [m.version for m in catalog.versions("acme", "support")] == [1, 2, 3]
        assert catalog.roll_back("acme", "support").version == 2


class TestListing:
    def test_it_tells_versions_aliases_and_live(self, lab: Lab) -> None:
        lab.publish("support", "one")
        second = lab.publish("support", "two")
        lab.publish("draft", "three", alias=None)
        lab.catalog.set_alias("acme", "support", "canary", 1)
        draft, support = lab.catalog.list("acme")
        assert (draft.name, draft.versions, draft.aliases, draft.live) == ("draft", (1,), {}, None)
        assert (support.versions, support.aliases) == ((1, 2), {"canary": 1, "live": 2})
        assert support.live == second
        assert lab.catalog.aliases("acme", "support") == support.aliases
        assert [m.version for m in lab.catalog.versions("acme", "support")] == [1, 2]
        assert lab.catalog.aliases("acme", "nobody") == {}
        assert lab.catalog.list("nobody") == []

    def test_thousands_of_foreign_files_hide_no_adapter(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("adapters.records.TENANT_LISTING_KEYS", 5)
        for name in ("a", "b", "c"):
            lab.publish(name, name)
        assert [summary.name for summary in lab.catalog.list("acme")] == ["a", "b", "c"]

    def test_a_listing_is_used_for_fifteen_seconds(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.list("acme")
        lab.publish("other", "one", catalog=lab.open())
        assert len(lab.catalog.list("acme")) == 1
        lab.clock.now += 15
        assert len(lab.catalog.list("acme")) == 2
