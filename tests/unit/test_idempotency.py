"""Idempotency keys: who may begin, what is answered again, and when a key is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.database import migrate, open_database
from app.errors import CallInProgress, RequestInvalid
from app.idempotency import CLAIM_S, REMEMBERED_S, IdempotencyKeys, KeptAnswer

ANSWER = KeptAnswer(201, {"id": "file-1", "n": [1, None]}, {"x-a": "b"})


class World:
    def __init__(self, path: Path) -> None:
        self.now = 1_000_000.0
        self.engine = open_database(f"sqlite:///{path}")
        migrate(self.engine)
        self.keys = IdempotencyKeys(self.engine, wall=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "lodger.db")
    yield world
    world.engine.dispose()


def test_the_same_call_gets_the_first_ones_answer(world: World) -> None:
    assert world.keys.claim("acme", "k", "f") is None
    world.keys.keep("acme", "k", ANSWER)
    assert world.keys.claim("acme", "k", "f") == ANSWER
    assert world.keys.claim("acme", "k", "f") == ANSWER


def test_a_key_is_its_tenants_own(world: World) -> None:
    world.keys.claim("acme", "k", "f")
    world.keys.keep("acme", "k", ANSWER)
    assert world.keys.claim("globex", "k", "other") is None


def test_another_call_under_the_key_is_refused(world: World) -> None:
    world.keys.claim("acme", "k", "f")
    for _ in range(2):  # while the first is at work, and afterwards
        with pytest.raises(RequestInvalid) as refused:
            world.keys.claim("acme", "k", "other")
        assert refused.value.code == "idempotency_key_reused"
        world.keys.keep("acme", "k", ANSWER)


def test_a_call_at_work_is_not_begun_again_until_its_maker_must_be_dead(world: World) -> None:
    world.keys.claim("acme", "k", "f")
    world.now += CLAIM_S - 1
    with pytest.raises(CallInProgress):
        world.keys.claim("acme", "k", "f")
    world.now += 2
    assert world.keys.claim("acme", "k", "f") is None


def test_after_a_failure_the_key_is_free(world: World) -> None:
    world.keys.claim("acme", "k", "f")
    world.keys.release("acme", "k")
    assert world.keys.claim("acme", "k", "other") is None


def test_a_kept_answer_is_not_released(world: World) -> None:
    world.keys.claim("acme", "k", "f")
    world.keys.keep("acme", "k", ANSWER)
    world.keys.release("acme", "k")
    assert world.keys.claim("acme", "k", "f") == ANSWER


def test_a_key_is_forgotten_after_a_day(world: World) -> None:
    world.keys.claim("acme", "k", "f")
    world.keys.keep("acme", "k", ANSWER)
    world.now += REMEMBERED_S + 1
    assert world.keys.claim("acme", "k", "other") is None


def test_one_of_many_at_once_begins(world: World) -> None:
    def claim(_: int) -> bool:
        try:
            return world.keys.claim("acme", "k", "f") is None
        except CallInProgress:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claim, range(16))) == 1
