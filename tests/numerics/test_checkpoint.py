"""A job's durable states: whole or absent, the newest that verifies wins, nothing of others is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.errors import StoreUnavailable
from adapters.store import DirectoryStore
from app.training.checkpoint import COPY_BYTES, STATE_FILE, TENSORS_FILE, DurableState, StateStore, pack
from app.training.progress import Progress


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def states(store: DirectoryStore, tmp_path: Path) -> StateStore:
    return StateStore(store, "acme", "ftjob-1", scratch=tmp_path)


def state(step: int) -> DurableState:
    progress = Progress(step=step, pending={"train_loss": 0.5}, first_losses=[1.0, 2.0], best_loss=0.25)
    tensors = {"adapter": {"0.a": torch.full((2, 3), float(step))}, "optimizer": {"0.step": torch.tensor(step)}}
    return packed(progress, tensors)


def packed(progress: Progress, groups: dict[str, dict[str, torch.Tensor]], max_turns: int = 0) -> DurableState:
    """Run `pack` to its end; it may let others go first so many times."""
    steps = pack(progress, groups)
    for _ in range(max_turns + 1):
        try:
            next(steps)
        except StopIteration as end:
            state: DurableState = end.value
            return state
    raise AssertionError("too many turns")


def test_state_comes_back_as_it_was_written(states: StateStore) -> None:
    name = states.write(state(3), fence=1)
    read = states.read_newest(first=name)
    assert read is not None
    assert Progress.from_dict(read.progress) == Progress.from_dict(state(3).progress)
    assert torch.equal(read.part("adapter")["0.a"], torch.full((2, 3), 3.0))
    assert read.part("optimizer")["0.step"].item() == 3
    assert read.part("best") == {}


def test_packed_state_is_a_copy() -> None:
    tensor = torch.zeros(3)
    copied = packed(Progress(), {"adapter": {"0.a": tensor}})
    tensor.fill_(1)
    assert not copied.tensors["adapter.0.a"].any()


def test_large_state_is_copied_by_pieces() -> None:
    tensors = {f"{n}.a": torch.full((COPY_BYTES // 8,), float(n)) for n in range(6)}  # two fill a piece
    with pytest.raises(AssertionError, match="too many turns"):
        packed(Progress(), {"adapter": tensors}, max_turns=1)
    copied = packed(Progress(), {"adapter": tensors}, max_turns=2)
    assert all(torch.equal(copied.part("adapter")[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("file", [STATE_FILE, TENSORS_FILE])
def test_damaged_state_gives_way_to_the_one_before(states: StateStore, store: DirectoryStore, file: str) -> None:
    states.write(state(1), fence=1)
    name = states.write(state(2), fence=1)
    key = f"{states.prefix}{name}/{file}"
    data = bytearray(store.get(key, max_bytes=1 << 20))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))
    read = states.read_newest(first=name)
    assert read is not None
    assert read.progress["step"] == 1


@pytest.mark.parametrize("file", [STATE_FILE, TENSORS_FILE])
def test_state_without_one_of_its_files_does_not_count(states: StateStore, store: DirectoryStore, file: str) -> None:
    states.write(state(1), fence=1)
    name = states.write(state(2), fence=1)
    store.delete(f"{states.prefix}{name}/{file}")
    read = states.read_newest(first=name)
    assert read is not None
    assert read.progress["step"] == 1


def test_states_that_the_jobs_row_does_not_know_of_are_left_alone(states: StateStore) -> None:
    known = states.write(state(2), fence=1)
    states.write(state(9), fence=1)  # of a worker that lost the job before it could say so
    read = states.read_newest(first=known)
    assert read is not None
    assert read.progress["step"] == 2
    assert states.read_newest(first=None) is None


def test_two_newest_states_are_kept(states: StateStore, store: DirectoryStore) -> None:
    for step in (1, 2, 3):
        name = states.write(state(step), fence=1)
        states.prune(name, fence=1)
    assert store.list_dirs(states.prefix) == ["00000002-000001", "00000003-000001"]
    states.clear()
    assert store.list(states.prefix) == []


def test_store_that_fails_is_not_taken_for_a_damaged_state(
    states: StateStore, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = states.write(state(1), fence=1)

    def unavailable(*_: object, **__: object) -> None:
        raise StoreUnavailable("down")

    monkeypatch.setattr(store, "download", unavailable)
    with pytest.raises(StoreUnavailable):
        states.read_newest(first=name)


def test_worker_that_lost_the_job_deletes_no_state_of_its_successor(states: StateStore, store: DirectoryStore) -> None:
    stale = states.write(state(5), fence=1)
    for step in (3, 4, 6, 7):
        newest = states.write(state(step), fence=2)
    states.prune(stale, fence=1)
    assert len(store.list_dirs(states.prefix)) == 5
    states.prune(newest, fence=2)
    assert sorted(store.list_dirs(states.prefix)) == ["00000006-000002", "00000007-000002"]
