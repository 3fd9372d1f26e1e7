"""Who waits and who runs: a first-come queue for each tenant, and the set of running sequences. Engine thread only."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.engine.fairness import VirtualTokenCounters
from app.engine.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class TenantShare:
    """One tenant's part of the server."""

    weight: float = 1.0  # > 0; twice the weight, twice the service when there is a queue
    max_waiting: int | None = None
    max_running: int | None = None


EVEN_SHARE = TenantShare()
ShareOf = Callable[[str], TenantShare]  # cheap and never blocking: it is asked in every step


@dataclass(frozen=True, slots=True)
class _RowWait:
    sequence: Sequence
    since: float  # time.monotonic()


class TenantQueues:
    """Invariant: a sequence in a queue holds nothing, is counted once, and its tenant is known to wait."""

    def __init__(self, fairness: VirtualTokenCounters) -> None:
        self.fairness = fairness
        self.num_waiting = 0
        self._queues: dict[str, OrderedDict[str, Sequence]] = {}  # by tenant, then request id, oldest first; none empty
        self._row_waits: dict[str, _RowWait] = {}  # by tenant

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue.values()

    def append(self, seq: Sequence) -> None:
        """A new request."""
        self._queues.setdefault(seq.request.tenant, OrderedDict())[seq.id] = seq
        self.num_waiting += 1
        self.fairness.arrive(seq.request.tenant)

    def put_back(self, seq: Sequence) -> None:
        """A preempted sequence goes before all others of its tenant."""
        queue = self._queues.setdefault(seq.request.tenant, OrderedDict())
        queue[seq.id] = seq
        queue.move_to_end(seq.id, last=False)
        self.num_waiting += 1
        self.fairness.come_back(seq.request.tenant)

    def remove(self, seq: Sequence) -> None:
        tenant = seq.request.tenant
        queue = self._queues[tenant]
        del queue[seq.id]
        if not queue:
            del self._queues[tenant]
        self.num_waiting -= 1
        self.fairness.leave(tenant)
        wait = self._row_waits.get(tenant)
        if wait is not None and wait.sequence is seq:
            del self._row_waits[tenant]

    def find(self, request_id: str) -> Sequence | None:
        return next((queue[request_id] for queue in self._queues.values() if request_id in queue), None)

    def num_waiting_of(self, tenant: str) -> int:
        return len(self._queues.get(tenant, ()))

    def of(self, tenant: str) -> tuple[Sequence, ...]:
        """The tenant's sequences now, oldest first."""
        return tuple(self._queues[tenant].values())

    def turns(self) -> list[tuple[float, float, str]]:
        """(service had, arrival of its oldest request, tenant) of all who wait, unordered: a heap's beginning."""
        return [
            (self.fairness.served(tenant), next(iter(queue.values())).request.arrival, tenant)
            for tenant, queue in self._queues.items()
        ]

    def note_row_wait(self, seq: Sequence, now: float) -> None:
        """Rank rows are missing for it, from now until it leaves the queue.

        One sequence of each tenant ages at a time: many cold adapters earn no more than one.
        """
        self._row_waits.setdefault(seq.request.tenant, _RowWait(seq, now))

    def starved(self, before: float) -> list[Sequence]:
        """Those that have waited for rows since `before` or longer; the tenant that was served least first."""
        old = [wait for wait in self._row_waits.values() if wait.since <= before]
        old.sort(key=lambda wait: (self.fairness.served(wait.sequence.request.tenant), wait.since))
        return [wait.sequence for wait in old]

    @property
    def num_row_waits(self) -> int:
        return len(self._row_waits)

    def check(self) -> None:
        """Raise AssertionError when the books are wrong."""
        queued = list(self)
        assert all(self._queues.values()), "an empty queue is kept"
        assert len(queued) == self.num_waiting, "num_waiting is wrong"
        assert not any(s.blocks or s.has_lease or s.num_computed for s in queued), "a waiting sequence holds something"
        assert all(seq.phase in (Phase.WAITING, Phase.FETCHING) for seq in queued), "who does not wait is queued"
        assert all(wait.sequence in queued for wait in self._row_waits.values()), "who left still ages"


class RunningSet:
    """The sequences that run, in order of admission, counted by tenant."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._num_of: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, seq: Sequence) -> None:
        self._sequences[seq.id] = seq
        self._num_of[seq.request.tenant] += 1

    def remove(self, seq: Sequence) -> None:
        tenant = seq.request.tenant
        del self._sequences[seq.id]
        self._num_of[tenant] -= 1
        if not self._num_of[tenant]:
            del self._num_of[tenant]

    def find(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def num_of(self, tenant: str) -> int:
        return self._num_of[tenant]

    def tenants(self) -> Iterator[str]:
        return iter(self._num_of)

    def latest_of(self, tenant: str) -> Sequence:
        """The tenant's most recently admitted one."""
        return next(seq for seq in reversed(self._sequences.values()) if seq.request.tenant == tenant)

    def check(self) -> None:
        """Raise AssertionError when the books are wrong."""
        assert self._num_of == Counter(seq.request.tenant for seq in self), "running sequences are miscounted"
        for seq in self:
            assert seq.phase is Phase.RUNNING, "a sequence that left still runs"
            assert seq.has_lease == (seq.adapter_key is not None), (
                "a running sequence lacks its lease, or has one too many"
            )
