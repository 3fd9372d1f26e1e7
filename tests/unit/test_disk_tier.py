"""The disk tier on a real directory: whole files or none, a budget, restarts, crashes, neighbours, a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from adapters.disk_tier import Arrival, DiskTier, file_matches
from adapters.errors import LocalDiskFailed
from adapters.lru import Eviction
from adapters.manifest import FileFact


def fact_of(data: bytes) -> FileFact:
    return FileFact(hashlib.sha256(data).hexdigest(), len(data))


def store(tier: DiskTier, data: bytes, tenant: str = "acme") -> FileFact:
    fact = fact_of(data)
    with tier.begin(tenant, fact) as arrival:
        arrival.path.write_bytes(data)
        assert file_matches(arrival.path, fact)
        arrival.commit().release()
    return fact


def has(tier: DiskTier, fact: FileFact, tenant: str = "acme") -> bool:
    file = tier.open(tenant, fact.sha256)
    if file is None:
        return False
    with file:
        assert file_matches(file.path, fact)
    return True


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("acme/*"))


def test_a_file_is_found_by_its_tenant_and_digest_only(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    fact = store(tier, b"weights")
    assert has(tier, fact)
    assert tier.open("acme-corp", fact.sha256) is None
    assert (tmp_path / "acme" / fact.sha256).read_bytes() == b"weights"


def test_names_that_are_not_tenants_or_digests_are_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    for tenant, sha256 in [
        ("../acme", "0" * 64),
        (".private-x", "0" * 64),
        ("acme", "../../etc/passwd"),
        ("", "0" * 64),
    ]:
        with pytest.raises(ValueError, match="tenant and 64 hex"):
            tier.open(tenant, sha256)


def test_an_aborted_arrival_leaves_nothing(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    fact = fact_of(b"weights")
    with tier.begin("acme", fact) as arrival:
        arrival.path.write_bytes(b"wei")
    assert not has(tier, fact)
    assert not arrival.path.exists()
    assert tier.stats().used_bytes == 0


def test_the_budget_holds_while_files_arrive_and_the_oldest_go_first(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 10)
    first, second = store(tier, b"1111"), store(tier, b"2222")
    assert has(tier, first)
    with tier.begin("acme", fact_of(b"3333")):
        assert names(tmp_path) == [first.sha256]
    tier.check()
    assert not has(tier, second)
    assert tier.stats().evictions[Eviction.LRU] == 1


def test_a_leased_file_is_not_evicted_and_a_newcomer_is_held_without_the_tier(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 10)
    old = store(tier, b"1" * 10)
    file = tier.open("acme", old.sha256)
    assert file is not None
    new = fact_of(b"2" * 10)
    with tier.begin("acme", new) as arrival:
        assert not arrival.is_kept
        arrival.path.write_bytes(b"2" * 10)
        with arrival.commit() as unkept:
            assert file_matches(unkept.path, new)
    assert not unkept.path.exists()
    file.release()
    assert has(tier, old)
    assert not has(tier, new)


def test_a_file_larger_than_the_budget_evicts_nobody(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 10)
    small = store(tier, b"1")
    with tier.begin("acme", fact_of(b"2" * 11)) as arrival:
        assert not arrival.is_kept
    assert has(tier, small)


def test_two_arrivals_of_one_file_end_as_one(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 20)
    fact = fact_of(b"config")
    arrivals: list[Arrival] = [tier.begin("acme", fact) for _ in range(2)]
    for arrival in arrivals:
        arrival.path.write_bytes(b"config")
    files = [arrival.commit() for arrival in arrivals]
    assert [file.path.read_bytes() for file in files] == [b"config", b"config"]
    for file in files:
        file.release()
        file.release()
    tier.check()
    assert (tier.stats().used_bytes, tier.stats().leased) == (6, 0)
    assert has(tier, fact)


def test_a_reader_reads_on_when_its_file_is_erased(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    fact = store(tier, b"weights")
    file = tier.open("acme", fact.sha256)
    assert file is not None
    tier.drop("acme", fact.sha256, Eviction.ERASED)
    assert file.path.read_bytes() == b"weights"
    assert names(tmp_path) == []
    assert not has(tier, fact)
    file.release()
    assert tier.stats().used_bytes == 0
    assert not file.path.exists()


def test_erasing_a_tenant_leaves_the_neighbour(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    mine, theirs = store(tier, b"mine"), store(tier, b"theirs", "acme-corp")
    unseen = tmp_path / "acme" / ("f" * 64)
    unseen.write_bytes(b"another process brought it")
    tier.drop_tenant("acme")
    assert not has(tier, mine)
    assert has(tier, theirs, "acme-corp")
    assert not (tmp_path / "acme").exists()


def test_order_of_use_outlives_a_restart(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 12)
    facts = [store(tier, data) for data in (b"1111", b"2222", b"3333")]
    for age, fact in enumerate(facts):
        os.utime(tmp_path / "acme" / fact.sha256, (1000 + age, 1000 + age))
    assert has(tier, facts[0])
    tier.close()
    again = DiskTier(tmp_path, 8)
    assert [has(again, fact) for fact in facts] == [True, False, True]
    again.check()


def test_a_start_sweeps_what_a_killed_process_left_and_spares_the_living(tmp_path: Path) -> None:
    living = DiskTier(tmp_path, 100)
    fact = fact_of(b"weights")
    arrival = living.begin("acme", fact)
    arrival.path.write_bytes(b"weights")
    code = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from adapters.disk_tier import DiskTier
        from adapters.manifest import FileFact
        tier = DiskTier(Path(sys.argv[1]), 100)
        tier.begin("acme", FileFact("a" * 64, 7)).path.write_bytes(b"half")
        os._exit(9)
    """)
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=30).returncode == 9
    assert len(list(tmp_path.glob(".private-*"))) == 2
    DiskTier(tmp_path, 100).close()
    assert list(tmp_path.glob(".private-*")) == [arrival.path.parent]
    arrival.commit().release()
    assert has(living, fact)


def test_foreign_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "acme").mkdir(parents=True)
    note = tmp_path / "acme" / "README"
    note.write_text("not ours")
    tier = DiskTier(tmp_path, 1)
    assert tier.stats().entries == 0
    assert note.exists()


def test_another_process_deleting_a_file_is_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    fact = store(tier, b"weights")
    (tmp_path / "acme" / fact.sha256).unlink()
    assert tier.open("acme", fact.sha256) is None
    assert tier.stats().used_bytes == 0
    assert store(tier, b"weights") == fact
    assert has(tier, fact)


def test_what_another_process_brought_is_found_and_counts_under_the_budget(tmp_path: Path) -> None:
    now = 0.0
    ours, theirs = DiskTier(tmp_path, 10, clock=lambda: now), DiskTier(tmp_path, 10)
    fact = store(theirs, b"11111")
    assert has(ours, fact)
    unseen = store(theirs, b"22222")
    now = 60.0
    mine = store(ours, b"33333")
    assert names(tmp_path) == sorted([unseen.sha256, mine.sha256])
    assert not has(theirs, fact)


def test_relief_frees_the_oldest_files(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    first, second = store(tier, b"1111"), store(tier, b"2222")
    assert tier.relieve(3) == 4
    assert not has(tier, first)
    assert has(tier, second)


def test_a_full_disk_is_a_typed_error_and_leaves_no_residue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 100)
    fact = fact_of(b"weights")
    arrival = tier.begin("acme", fact)
    arrival.path.write_bytes(b"weights")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LocalDiskFailed):
        arrival.commit()
    assert not has(tier, fact)
    assert not arrival.path.exists()
    assert tier.stats().used_bytes == 0


def test_files_handed_over_are_checked_and_copied(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "tier", 100)
    source = tmp_path / "adapter_model.safetensors"
    source.write_bytes(b"weights")
    assert not tier.add("acme", fact_of(b"other!!"), source)
    assert tier.add("acme", fact_of(b"weights"), source)
    source.unlink()
    assert has(tier, fact_of(b"weights"))
    assert tier.stats().used_bytes == 7


def test_a_directory_that_cannot_be_used_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalDiskFailed):
        DiskTier(tmp_path / "file", 100)


def test_an_operator_chosen_spill_directory_takes_what_is_not_kept(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "tier", 3, spill=tmp_path / "spill")
    with tier.begin("acme", fact_of(b"weights")) as arrival:
        assert arrival.path.is_relative_to(tmp_path / "spill")
    tier.close()
    assert [path.name for path in (tmp_path / "spill").iterdir()] == [".lock"]
