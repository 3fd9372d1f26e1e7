"""Publishing under crashes and races, aliases and their history, deleting and erasing."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRefused,
    AdapterUnavailable,
    ObjectNotFound,
)
from adapters.manifest import blob_key, version_key
from adapters.publish import collecting_key
from adapters.records import tombstone_key
from tests.catalog_lab import Lab, TrickyStore


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.store.os.fsync", lambda fd: None)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def num_calls_of(lab: Lab, act: Callable[[Lab], object]) -> int:
    before = lab.store.calls.total()
    act(lab)
    return lab.store.calls.total() - before


class TestPublish:
    def test_sixteen_publishers_make_sixteen_versions(self, lab: Lab) -> None:
        start = threading.Barrier(16)

        def publish(number: int) -> int:
            catalog = lab.open()
            start.wait()
            return lab.publish("support", f"weights {number}", catalog=catalog).version

        with ThreadPoolExecutor(16) as pool:
            versions = list(pool.map(publish, range(16)))
        assert sorted(versions) == list(range(1, 17))
        manifests = lab.open().versions("acme", "support")
        assert {lab.weights_of(m) for m in manifests} == {f"weights {number}" for number in range(16)}
        for number, version in enumerate(versions):
            assert lab.weights_of(manifests[version - 1]) == f"weights {number}"
        assert lab.open().resolve("acme", "support").version == 16

    def test_a_refused_adapter_leaves_nothing(self, lab: Lab) -> None:
        with pytest.raises(AdapterRefused):
            lab.publish("support", "one", config=b"refuse")
        assert lab.plain.list("") == []

    def test_equal_bytes_are_stored_once_and_are_two_versions(self, lab: Lab) -> None:
        first, second = lab.publish("a", "same"), lab.publish("b", "same")
        assert first.digest == second.digest
        assert len(lab.plain.list("tenants/acme/blobs/")) == 2

    @pytest.mark.parametrize("name", ["base", "default", "__base__", "toy-base", "A", "../x", "a/b", "", "x" * 64])
    def test_a_name_that_cannot_be_is_refused(self, lab: Lab, name: str) -> None:
        with pytest.raises(AdapterNameInvalid):
            lab.publish(name, "one")
        assert lab.plain.list("") == []

    @pytest.mark.parametrize("alias", ["v1", "ckpt-3", "Live", "", "a/b", "x" * 32])
    def test_an_alias_that_cannot_be_is_refused(self, lab: Lab, alias: str) -> None:
        with pytest.raises(AdapterNameInvalid):
            lab.publish("support", "one", alias=alias)

    def test_publishing_may_leave_aliases_alone_or_move_another(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.publish("support", "two", alias=None)
        lab.publish("support", "three", alias="canary")
        assert lab.catalog.aliases("acme", "support") == {"live": 1, "canary": 3}

    def test_a_publisher_whose_answer_was_lost_knows_its_own_manifest(self, lab: Lab) -> None:
        class Retrying(TrickyStore):
            def put_if_absent(self, key: str, data: bytes | Path) -> bool:
                self.inner.put_if_absent(key, data)
                return False  # carried out, answer lost, tried again: "exists"

        catalog = lab.open(Retrying(lab.plain))
        assert lab.publish("support", "one", catalog=catalog).version == 1
        assert lab.publish("support", "two", catalog=catalog).version == 2
        assert lab.open().resolve("acme", "support").version == 2
        assert catalog.roll_back("acme", "support").version == 1
        assert len(catalog.alias_history("acme", "support")) == 3


class TestCrashes:
    """Every call that publishing makes is, in turn, the last one that works; a reader looks; the job tries again."""

    def check(self, lab: Lab, *, version: int) -> None:
        for summary in lab.open(lab.plain).list("acme"):
            for manifest in lab.open(lab.plain).versions("acme", summary.name):
                lab.weights_of(manifest)  # no reader ever sees half a version
        manifest = lab.publish("support", "job's", catalog=lab.open(lab.plain), job_id="job-1")
        assert manifest.version == version
        resolved = lab.open(lab.plain).resolve("acme", "support")
        assert resolved == manifest
        assert lab.weights_of(resolved) == "job's"
        assert [m.version for m in lab.open(lab.plain).versions("acme", "support")] == list(range(1, version + 1))
        again = lab.publish("support", "other bytes", catalog=lab.open(lab.plain), job_id="job-1")
        assert again == manifest

    def run(self, tmp_path: Path, break_at: Callable[[TrickyStore, int], None]) -> None:
        trial = Lab(tmp_path / "count")
        trial.publish("support", "before")
        num_calls = num_calls_of(trial, lambda lab: lab.publish("support", "job's", job_id="job-1"))
        assert num_calls > 8
        for k in range(num_calls):
            lab = Lab(tmp_path / str(k))
            lab.publish("support", "before", catalog=lab.open(lab.plain))
            break_at(lab.store, k)
            with pytest.raises(AdapterUnavailable):
                lab.publish("support", "job's", job_id="job-1")
            self.check(lab, version=2)

    def test_killed_before_any_call(self, tmp_path: Path) -> None:
        self.run(tmp_path, lambda store, k: setattr(store, "dies_at", k))

    def test_killed_after_any_call(self, tmp_path: Path) -> None:
        self.run(tmp_path, lambda store, k: setattr(store, "loses_answer_of", k))

    def test_one_job_in_many_workers_is_one_version(self, lab: Lab) -> None:
        start = threading.Barrier(8)

        def publish(number: int) -> str:
            catalog = lab.open()
            start.wait()
            return lab.publish("support", f"worker {number}", catalog=catalog, job_id="job-1").publish_id

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(publish, range(8)))) == 1
        assert len(lab.open().versions("acme", "support")) == 1

    def test_a_repeat_does_not_undo_a_roll_back(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.publish("support", "two", job_id="job-1")
        lab.catalog.roll_back("acme", "support")
        lab.publish("support", "two", job_id="job-1")
        assert lab.catalog.resolve("acme", "support").version == 1

    def test_a_slow_publisher_does_not_move_live_back(self, lab: Lab) -> None:
        slow = lab.publish("support", "one", alias=None)
        lab.publish("support", "two")
        lab.catalog._aliases.advance(slow, "live")
        assert lab.open().resolve("acme", "support").version == 2


class TestAliases:
    def test_history_is_append_only_and_roll_back_names_the_target_before(self, lab: Lab) -> None:
        for weights in ("one", "two", "three"):
            lab.publish("support", weights)
        assert lab.catalog.roll_back("acme", "support").version == 2
        assert lab.catalog.resolve("acme", "support").version == 2
        history = lab.catalog.alias_history("acme", "support")
        assert [(entry.seq, entry.version, entry.by) for entry in history] == [
            (1, 1, "publish"),
            (2, 2, "publish"),
            (3, 3, "publish"),
            (4, 2, "roll_back"),
        ]

    def test_rolling_back_again_goes_further_back_never_to_the_bad_one(self, lab: Lab) -> None:
        for weights in ("one", "two", "three"):
            lab.publish("support", weights)
        targets = [lab.catalog.roll_back("acme", "support").version for _ in range(2)]
        lab.publish("support", "four")
        targets += [lab.catalog.roll_back("acme", "support").version]
        assert targets == [2, 1, 1]
        with pytest.raises(AdapterConflict, match="no earlier") as conflict:
            lab.catalog.roll_back("acme", "support")
        assert conflict.value.code == "no_earlier_version"

    def test_roll_back_skips_what_was_deleted(self, lab: Lab) -> None:
        for weights in ("one", "two", "three"):
            lab.publish("support", weights)
        lab.catalog.delete_version("acme", "support", 2)
        assert lab.catalog.roll_back("acme", "support").version == 1

    def test_only_what_is_there_can_be_pointed_to(self, lab: Lab) -> None:
        lab.publish("support", "one")
        for act in (
            lambda: lab.catalog.set_alias("acme", "support", "canary", 2),
            lambda: lab.catalog.set_alias("acme", "nobody", "canary", 1),
            lambda: lab.catalog.roll_back("acme", "support", "canary"),
            lambda: lab.catalog.delete_alias("acme", "support", "canary"),
            lambda: lab.catalog.alias_history("acme", "support", "canary"),
        ):
            with pytest.raises(AdapterNotFound):
                act()

    def test_an_expectation_that_fails_moves_nothing(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.publish("support", "two")
        lab.catalog.set_alias("acme", "support", "canary", 1, expected=0)
        with pytest.raises(AdapterConflict) as conflict:
            lab.catalog.set_alias("acme", "support", "canary", 2, expected=0)
        assert conflict.value.code == "alias_moved"
        lab.catalog.set_alias("acme", "support", "canary", 2, expected=1)
        assert lab.catalog.aliases("acme", "support")["canary"] == 2

    def test_of_racing_setters_with_an_expectation_one_wins(self, lab: Lab) -> None:
        for number in range(6):
            lab.publish("support", str(number), alias=None)
        start = threading.Barrier(6)

        def move(version: int) -> bool:
            catalog = lab.open()
            start.wait()
            try:
                catalog.set_alias("acme", "support", "prod", version, expected=0)
            except AdapterConflict:
                return False
            return True

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(move, range(1, 7))) == 1

    def test_a_deleted_alias_is_gone_until_it_is_set(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.catalog.delete_alias("acme", "support", "live")
        with pytest.raises(AdapterNotFound):
            lab.catalog.resolve("acme", "support")
        assert lab.catalog.resolve("acme", "support", "v1").version == 1
        lab.publish("support", "two")
        assert lab.catalog.resolve("acme", "support").version == 2


class TestDeleting:
    def test_a_version_with_an_alias_stays(self, lab: Lab) -> None:
        lab.publish("support", "one")
        with pytest.raises(AdapterConflict) as conflict:
            lab.catalog.delete_version("acme", "support", 1)
        assert conflict.value.code == "adapter_in_use"
        assert lab.catalog.resolve("acme", "support").version == 1

    def test_a_deleted_version_is_absent_and_its_number_stays_used(self, lab: Lab) -> None:
        first = lab.publish("support", "one")
        lab.publish("support", "two", alias=None)
        lab.catalog.delete_version("acme", "support", 2)
        for catalog in (lab.catalog, lab.open()):
            with pytest.raises(AdapterNotFound):
                catalog.resolve("acme", "support", "v2")
            assert [m.version for m in catalog.versions("acme", "support")] == [1]
        with pytest.raises(AdapterNotFound):
            lab.catalog.delete_version("acme", "support", 2)
        assert lab.publish("support", "three").version == 3
        assert lab.weights_of(first) == "one"

    def test_blobs_go_when_no_version_of_the_tenant_names_them(self, lab: Lab) -> None:
        shared = lab.publish("a", "shared", config=b"{1}")
        lab.publish("a", "new", config=b"{2}")
        lab.publish("b", "shared", config=b"{3}")
        lab.publish("a", "shared", tenant="globex", config=b"{1}")
        lab.catalog.delete_version("acme", "a", 1)
        lab.plain.head(blob_key("acme", shared.weights.sha256))
        with pytest.raises(ObjectNotFound):
            lab.plain.head(blob_key("acme", shared.config.sha256))
        lab.catalog.delete("acme", "b")
        with pytest.raises(ObjectNotFound):
            lab.plain.head(blob_key("acme", shared.weights.sha256))
        lab.plain.head(blob_key("globex", shared.weights.sha256))
        assert lab.plain.list("tenants/acme/collecting/") == []

    def test_a_deleted_adapter_is_absent_and_comes_back_with_new_numbers(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.publish("support", "two")
        lab.catalog.set_alias("acme", "support", "canary", 1)
        lab.catalog.delete("acme", "support")
        for catalog in (lab.catalog, lab.open()):
            assert catalog.list("acme") == []
            for selector in (None, "v1", "canary"):
                with pytest.raises(AdapterNotFound):
                    catalog.resolve("acme", "support", selector)
        with pytest.raises(AdapterNotFound):
            lab.catalog.delete("acme", "support")
        assert lab.publish("support", "three").version == 3
        assert lab.catalog.aliases("acme", "support") == {"live": 3}

    def test_deleting_an_adapter_may_be_repeated_after_a_crash(self, tmp_path: Path) -> None:
        k = 0
        while True:
            lab = Lab(tmp_path / str(k))
            lab.publish("support", "one", catalog=lab.open(lab.plain))
            lab.copy_in("support", "directory")
            lab.open(lab.plain).import_directory("acme", "support")
            lab.store.dies_at = k
            try:
                lab.catalog.delete("acme", "support")
                break
            except AdapterUnavailable:
                pass
            with contextlib.suppress(AdapterNotFound):
                lab.open(lab.plain).delete("acme", "support")
            with pytest.raises(AdapterNotFound):
                lab.open(lab.plain).resolve("acme", "support")
            k += 1
        assert k > 8

    def test_an_alias_set_while_its_version_is_deleted_wins_or_is_refused(self, lab: Lab) -> None:
        for moment in ("before the tombstone", "after the tombstone"):
            name = moment.replace(" ", "-")
            lab.publish(name, "one", alias=None)
            outcome: list[str] = []

            def point(op: str, key: str, name: str = name, outcome: list[str] = outcome) -> None:
                if op == "put_if_absent" and key == tombstone_key("acme", name, 1):
                    lab.store.before = lab.store.after = None
                    try:
                        lab.open(lab.plain).set_alias("acme", name, "prod", 1)
                        outcome.append("set")
                    except AdapterNotFound:
                        outcome.append("refused")

            setattr(lab.store, moment.split()[0], point)
            try:
                lab.catalog.delete_version("acme", name, 1)
                outcome.append("deleted")
            except AdapterConflict:
                outcome.append("kept")
            assert outcome in (["set", "kept"], ["refused", "deleted"])
            fresh = lab.open(lab.plain)
            if outcome[0] == "set":
                assert lab.weights_of(fresh.resolve("acme", name, "prod")) == "one"
            else:
                assert fresh.aliases("acme", name) == {}

    def test_an_alias_is_taken_back_from_a_version_deleted_just_before(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.publish("support", "two", alias=None)

        def delete(op: str, key: str) -> None:
            if op == "put_if_absent":  # the setter has seen version 2 and is about to point at it
                lab.store.before = None
                lab.open(lab.plain).delete_version("acme", "support", 2)

        lab.store.before = delete
        with pytest.raises(AdapterNotFound):
            lab.catalog.set_alias("acme", "support", "live", 2)
        assert lab.open().resolve("acme", "support").version == 1

    def test_a_publisher_of_bytes_being_collected_ends_with_whole_blobs(self, lab: Lab) -> None:
        old = lab.publish("support", "same", alias=None)

        def publish_meanwhile(op: str, key: str) -> None:
            if op == "delete" and key == blob_key("acme", old.weights.sha256):
                lab.store.before = None
                # The collector has searched and is about to delete; its mark keeps the other one waiting.
                lab.plain.head(collecting_key("acme", old.weights.sha256))
                waiting.append(executor.submit(lab.publish, "other", "same", catalog=lab.open(lab.plain)))
                while not lab.plain.list("tenants/acme/adapters/other/versions/"):
                    pass

        waiting: list[Future[object]] = []
        with ThreadPoolExecutor(1) as executor:
            lab.store.before = publish_meanwhile
            lab.catalog.delete_version("acme", "support", 1)
        assert len(waiting) == 1
        assert lab.weights_of(lab.open().resolve("acme", "other")) == "same"


class TestErasing:
    def test_nothing_of_an_erased_tenant_is_left_and_neighbours_keep_all(self, lab: Lab) -> None:
        lab.publish("support", "one")
        lab.copy_in("plain", "two")
        lab.plain.put("tenants/acme/blobs/dataset", b"rows")
        lab.publish("support", "one", tenant="acme-corp")
        lab.catalog.resolve("acme", "support")
        before = lab.plain.list("tenants/acme-corp/")
        lab.catalog.erase_tenant("acme")
        assert [info.key for info in lab.plain.list("tenants/acme/")] == ["tenants/acme/erased"]
        assert lab.plain.list("tenants/acme-corp/") == before
        assert lab.catalog.peek("acme", "support") is None
        for name in ("support", "plain"):
            with pytest.raises(AdapterNotFound):
                lab.catalog.resolve("acme", name)
        assert lab.catalog.list("acme") == []
        lab.catalog.erase_tenant("acme")

    def test_an_erased_tenant_publishes_and_imports_no_more(self, lab: Lab) -> None:
        lab.catalog.erase_tenant("acme")
        with pytest.raises(AdapterConflict) as conflict:
            lab.publish("support", "one")
        assert conflict.value.code == "tenant_erased"
        lab.copy_in("plain", "one")
        with pytest.raises(AdapterConflict):
            lab.catalog.resolve("acme", "plain")
        assert not lab.plain.list("tenants/acme/blobs/")

    def test_a_publication_under_way_leaves_nothing_behind(self, tmp_path: Path) -> None:
        trial = Lab(tmp_path / "count")
        num_calls = num_calls_of(trial, lambda lab: lab.publish("support", "one"))
        for k in range(num_calls):
            lab = Lab(tmp_path / str(k))

            def erase(op: str, key: str, lab: Lab = lab, k: int = k) -> None:
                if lab.store.calls.total() == k + 1:
                    lab.open(lab.plain).erase_tenant("acme")

            lab.store.before = erase
            with contextlib.suppress(AdapterError):
                lab.publish("support", "one")
            left = {info.key for info in lab.plain.list("tenants/acme/")} - {"tenants/acme/erased"}
            assert not left, (k, left)

    @pytest.mark.parametrize("act", ["delete", "roll_back"])
    def test_whatever_else_is_under_way_leaves_nothing_behind(self, tmp_path: Path, act: str) -> None:
        def prepared(path: Path) -> Lab:
            lab = Lab(path)
            lab.publish("support", "one", catalog=lab.open(lab.plain))
            lab.publish("support", "two", catalog=lab.open(lab.plain))
            return lab

        num_calls = num_calls_of(prepared(tmp_path / "count"), lambda lab: getattr(lab.catalog, act)("acme", "support"))
        for k in range(num_calls):
            lab = prepared(tmp_path / str(k))

            def erase(op: str, key: str, lab: Lab = lab, k: int = k) -> None:
                if lab.store.calls.total() == k + 1:
                    lab.open(lab.plain).erase_tenant("acme")

            lab.store.before = erase
            with contextlib.suppress(AdapterError):
                getattr(lab.catalog, act)("acme", "support")
            assert [info.key for info in lab.plain.list("tenants/acme/")] == ["tenants/acme/erased"], k


class TestAnything:
    def test_random_lives_agree_with_a_plain_model(self, tmp_path: Path) -> None:
        """Publish, point, roll back and delete at random, from two processes, against a dictionary."""
        for seed in range(3):
            rng = random.Random(seed)
            lab = Lab(tmp_path / str(seed))
            catalogs = [lab.open(), lab.open()]
            weights: dict[int, str] = {}
            aliases: dict[str, int] = {}
            highest = 0
            for step in range(30):
                catalog = rng.choice(catalogs)
                action = rng.choice(["publish", "set", "delete", "drop"])
                alias = rng.choice(["live", "canary"])
                version = rng.randint(1, highest + 1)
                if action == "publish":
                    highest += 1
                    assert lab.publish("x", f"w{step}", catalog=catalog, alias=alias).version == highest
                    weights[highest] = f"w{step}"
                    aliases[alias] = highest
                elif action == "set":
                    if version in weights:
                        catalog.set_alias("acme", "x", alias, version)
                        aliases[alias] = version
                    else:
                        with pytest.raises(AdapterNotFound):
                            catalog.set_alias("acme", "x", alias, version)
                elif action == "delete":
                    expected = AdapterConflict if version in aliases.values() else AdapterNotFound
                    if version in weights and version not in aliases.values():
                        catalog.delete_version("acme", "x", version)
                        del weights[version]
                    else:
                        with pytest.raises(expected):
                            catalog.delete_version("acme", "x", version)
                elif alias in aliases:
                    catalog.delete_alias("acme", "x", alias)
                    del aliases[alias]
                fresh = lab.open()
                assert fresh.aliases("acme", "x") == aliases
                assert {m.version: lab.weights_of(m) for m in fresh.versions("acme", "x")} == weights
            assert len(lab.plain.list("tenants/acme/adapters/x/versions/")) >= highest
            assert lab.plain.head(version_key("acme", "x", highest))
