"""Whose turn it is among the loads that wait."""

from __future__ import annotations

from adapters.flights import Flight, FlightQueue
from adapters.manifest import AdapterManifest, FileFact

FILE = FileFact("0" * 64, 1)


def flight(tenant: str) -> Flight[bytes]:
    manifest = AdapterManifest(
        tenant=tenant,
        name="support",
        version=1,
        digest="0" * 64,
        config=FILE,
        weights=FILE,
        rank=8,
        applied_modules=1,
        base_id="base",
        base_digest="b" * 64,
        created_at=0.0,
        source="upload",
    )
    return Flight(manifest, deadline=0.0)


def pop_all(queue: FlightQueue[bytes]) -> list[Flight[bytes]]:
    started = []
    while (next_flight := queue.pop()) is not None:
        started.append(next_flight)
    return started


def test_a_tenant_never_holds_every_worker() -> None:
    queue: FlightQueue[bytes] = FlightQueue(workers=4, max_pending=200, max_pending_per_tenant=100)
    for _ in range(100):
        queue.push(flight("acme"))
    assert len(pop_all(queue)) == 3
    queue.push(flight("globex"))
    assert [started.manifest.tenant for started in pop_all(queue)] == ["globex"]


def test_one_worker_serves_any_tenant() -> None:
    queue: FlightQueue[bytes] = FlightQueue(workers=1, max_pending=2, max_pending_per_tenant=2)
    queue.push(flight("acme"))
    assert len(pop_all(queue)) == 1


def test_the_tenant_with_the_fewest_running_goes_first() -> None:
    queue: FlightQueue[bytes] = FlightQueue(workers=8, max_pending=20, max_pending_per_tenant=20)
    for _ in range(4):
        queue.push(flight("acme"))
    pop_all(queue)
    for tenant in ("acme", "globex", "globex", "initech"):
        queue.push(flight(tenant))
    assert [started.manifest.tenant for started in pop_all(queue)] == ["globex", "initech", "globex", "acme"]


def test_an_ended_flight_frees_its_tenants_share() -> None:
    queue: FlightQueue[bytes] = FlightQueue(workers=2, max_pending=9, max_pending_per_tenant=9)
    for _ in range(2):
        queue.push(flight("acme"))
    (running,) = pop_all(queue)
    queue.finish(running)
    assert (queue.num_running, queue.num_pending) == (0, 1)
    assert len(pop_all(queue)) == 1


def test_the_queue_is_bounded_in_all_and_per_tenant() -> None:
    queue: FlightQueue[bytes] = FlightQueue(workers=2, max_pending=3, max_pending_per_tenant=2)
    waiting = [flight("acme"), flight("acme")]
    for each in waiting:
        queue.push(each)
    assert not queue.has_room("acme")
    assert queue.has_room("globex")
    queue.push(flight("globex"))
    assert not queue.has_room("initech")
    queue.remove(waiting[0])
    assert queue.has_room("acme")
