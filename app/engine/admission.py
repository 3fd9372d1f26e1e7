"""Who may start: tries the waiting sequences in the order of fairness, and takes and gives back what running ones hold.

The oldest request of the tenant that was served least is tried first (`fairness`). When it cannot start because

- KV blocks are missing: admission stops, nobody overtakes it;
- it is long, and long prompts fill the step: its tenant waits with it, others go on;
- its adapter is being fetched, or a running sequence computes the same prefix just now: it is passed over, uncharged,
  and blocks nobody;
- all rank rows are leased: others pass it until it has waited `max_adapter_wait_s`. From then on only sequences of the
  base are admitted, until enough rows have fallen free for it.

Engine thread only; no call blocks.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from adapters.manifest import AdapterManifest
from app.engine.kv_cache import KVCache
from app.engine.queues import RunningSet, ShareOf, TenantQueues
from app.engine.sequence import AdapterKey, Phase, Sequence

# A prompt with more left to compute than this part of a step's tokens is long. While so many long ones fill the step no
# other long one starts, which leaves the rest to short prompts: one tenant's book does not hold up another's question.
LONG_PART = 4
MAX_LONG_PREFILLS = 2


class Lease(enum.Enum):
    """What became of asking for an adapter's rows."""

    READY = "ready"  # leased: the caller owes one `release`
    FETCHING = "fetching"  # on its way; ask again at a later step
    NO_ROOM = "no_room"  # in host memory, but too few rows are free of leases
    FAILED = "failed"  # cannot be used; `Acquired.error` says why


@dataclass(frozen=True, slots=True)
class Acquired:
    """The answer of `Residency.acquire`."""

    state: Lease
    tier: str | None = None  # with READY: where the adapter was found
    error: Exception | None = None  # with FAILED


class Residency(Protocol):
    """The rows of the rank pool, as admission needs them. No call blocks."""

    def acquire(self, manifest: AdapterManifest, now: float, /) -> Acquired:
        """Look up and lease in one act. May evict unleased adapters or begin a fetch; may be repeated each step."""
        ...

    def release(self, key: AdapterKey, /) -> None:
        """Give one lease back."""
        ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue."""

    max_context: int  # tokens, prompt and answer together
    max_sequences: int = 32  # that run at once
    max_batch_tokens: int = 512  # computed in one step
    max_prefill_tokens: int | None = None  # of these, of each prompt, where most sequences decode; None: no such bound
    max_waiting: int = 256  # requests, of all tenants
    max_adapter_wait_s: float = 3.0  # who has waited longer for rank rows makes rows fall free

    def __post_init__(self) -> None:
        if self.max_sequences < 1 or self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_sequences ({self.max_sequences}), "
                "and that at least 1: each running sequence takes one token of every step"
            )

    def step_tokens(self, num_decodes: int, num_prefills: int) -> int:
        """What a step may compute. A prompt holds up those who decode, and waits itself when it is cut into small
        chunks: the more numerous of the two sides has its way.
        """
        if self.max_prefill_tokens is None or num_decodes <= num_prefills:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, num_decodes + self.max_prefill_tokens * num_prefills)


class _Verdict(enum.Enum):
    STARTED = "runs"
    PASSED = "passed over"
    NO_ROOM = "waits for rows"
    HELD = "its tenant waits with it"
    STOP = "nobody may overtake it"


@dataclass(slots=True)
class AdmissionPass:
    """One walk over the queues, and what came of it."""

    now: float
    budget: int  # tokens of this step
    wanted: int = 0  # tokens that running sequences have still to compute
    reserved: int = 0  # of these, what each is sure to get in this step
    num_long: int = 0  # long prefills under way
    base_only: bool = False
    admitted: list[Sequence] = field(default_factory=list)  # for the first time
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)


class Admission:
    """Starts sequences. Invariant: a running one has blocks for all its tokens and, with an adapter, one lease."""

    def __init__(
        self, kv: KVCache, residency: Residency, queues: TenantQueues, running: RunningSet, limits: SchedulerLimits
    ) -> None:
        self._kv = kv
        self._residency = residency
        self._queues = queues
        self._running = running
        self._limits = limits
        self._long_tokens = max(1, limits.max_batch_tokens // LONG_PART)

    def run(
        self, now: float, share_of: ShareOf, *, admitted: list[Sequence], failed: list[tuple[Sequence, Exception]]
    ) -> None:
        """Start as many waiting sequences as may start now; both lists are added to."""
        if not self._queues.num_waiting:
            return
        num_decodes = sum(seq.num_uncomputed == 1 for seq in self._running)
        num_prefills = len(self._running) - num_decodes + self._queues.num_waiting
        budget = self._limits.step_tokens(num_decodes, num_prefills)
        walk = AdmissionPass(now, budget, admitted=admitted, failed=failed)
        for seq in self._running:
            self._count(walk, seq)
        if self._start_starved(walk, share_of):
            self._start_by_turns(walk, share_of)

    def vacate(self, seq: Sequence) -> None:
        """Give blocks and lease back. The one place where either happens."""
        self._kv.free(seq)
        if seq.has_lease:
            seq.has_lease = False
            key = seq.adapter_key
            assert key is not None, "only an adapter is leased"
            self._residency.release(key)

    def _start_starved(self, walk: AdmissionPass, share_of: ShareOf) -> bool:
        """First refusal to those who have waited too long for rows; False if nobody else may start."""
        for seq in self._queues.starved(walk.now - self._limits.max_adapter_wait_s):
            if not self._has_room(walk):
                return False
            if self._is_capped(seq, share_of):
                continue
            verdict = self._try(seq, walk)
            if verdict is _Verdict.STOP:
                return False
            if verdict is _Verdict.NO_ROOM or verdict is _Verdict.HELD:
                # Any other adapter that is leased now, even one in the pool, would hold rows that this one waits for.
                walk.base_only = True
                break
        return True

    def _start_by_turns(self, walk: AdmissionPass, share_of: ShareOf) -> None:
        turns = self._queues.turns()
        heapq.heapify(turns)
        candidates: dict[str, Iterator[Sequence]] = {}
        while turns and self._has_room(walk):
            _, arrival, tenant = heapq.heappop(turns)
            if tenant not in candidates:
                candidates[tenant] = iter(self._queues.of(tenant))
            verdict = self._start_one_of(candidates[tenant], walk, share_of)
            if verdict is _Verdict.STOP:
                return
            if verdict is _Verdict.STARTED:
                heapq.heappush(turns, (self._queues.fairness.served(tenant), arrival, tenant))

    def _start_one_of(self, candidates: Iterator[Sequence], walk: AdmissionPass, share_of: ShareOf) -> _Verdict:
        """Start the tenant's oldest sequence that waits for nothing but its turn."""
        for seq in candidates:
            if self._is_capped(seq, share_of):
                break
            if walk.base_only and seq.request.adapter is not None:
                continue
            verdict = self._try(seq, walk)
            if verdict not in (_Verdict.PASSED, _Verdict.NO_ROOM):
                return verdict
        return _Verdict.PASSED

    def _try(self, seq: Sequence, walk: AdmissionPass) -> _Verdict:
        found = self._kv.lookup(seq)
        if self._kv.is_being_computed(seq, len(found)):
            return _Verdict.PASSED
        verdict = self._lease(seq, walk)
        if verdict is not None:
            return verdict
        if self._is_held(seq, found, walk):
            verdict = _Verdict.HELD
        elif not self._take_blocks(seq, found):
            verdict = _Verdict.STOP
        else:
            self._start(seq, walk)
            return _Verdict.STARTED
        self.vacate(seq)
        return verdict

    def _lease(self, seq: Sequence, walk: AdmissionPass) -> _Verdict | None:
        """Lease its adapter's rows; None when it has what it needs."""
        adapter = seq.request.adapter
        if adapter is None:
            return None
        acquired = self._residency.acquire(adapter, walk.now)
        if acquired.state is Lease.NO_ROOM:
            seq.phase = Phase.WAITING
            self._queues.note_row_wait(seq, walk.now)
            return _Verdict.NO_ROOM
        if acquired.state is Lease.FETCHING:
            seq.phase = Phase.FETCHING
            return _Verdict.PASSED
        if acquired.state is Lease.FAILED:
            assert acquired.error is not None, "a failure says why"
            self._queues.remove(seq)
            seq.phase = Phase.FINISHED
            walk.failed.append((seq, acquired.error))
            return _Verdict.PASSED
        seq.has_lease = True
        seq.phase = Phase.WAITING
        seq.tier = seq.tier or acquired.tier
        return None

    def _is_held(self, seq: Sequence, found: list[int], walk: AdmissionPass) -> bool:
        """True when it is long, and the long prefills under way take all that a step can compute."""
        is_long = len(seq.tokens) - len(found) * self._kv.block_size > self._long_tokens
        return is_long and walk.num_long >= MAX_LONG_PREFILLS and walk.wanted >= self._limits.max_batch_tokens

    def _take_blocks(self, seq: Sequence, found: list[int]) -> bool:
        """Take KV blocks for all its tokens, or none."""
        num_tokens = len(seq.tokens)
        # One block of head-room, or the first decode step would preempt; none if it will never need another.
        longest = seq.num_prompt + seq.request.sampling.max_tokens - 1
        spare = min(1, self._kv.blocks_for(longest) - self._kv.blocks_for(num_tokens))
        return self._kv.allocate(seq, num_tokens, found=found, spare=spare)

    def _start(self, seq: Sequence, walk: AdmissionPass) -> None:
        self._queues.remove(seq)
        self._running.add(seq)
        seq.phase = Phase.RUNNING
        if seq.admitted_at is None:
            seq.admitted_at, seq.num_cached = walk.now, seq.num_computed
            walk.admitted.append(seq)
            # Here and not below: a preempted prompt is computed twice and charged once.
            self._queues.fairness.charge_prompt(seq.request.tenant, seq.num_prompt)
        self._count(walk, seq)

    def _has_room(self, walk: AdmissionPass) -> bool:
        return len(self._running) < self._limits.max_sequences and walk.reserved < walk.budget

    def _count(self, walk: AdmissionPass, seq: Sequence) -> None:
        left = seq.num_uncomputed
        walk.wanted += left
        walk.num_long += left > self._long_tokens
        walk.reserved += min(left, self._long_tokens)

    def _is_capped(self, seq: Sequence, share_of: ShareOf) -> bool:
        cap = share_of(seq.request.tenant).max_running
        return cap is not None and self._running.num_of(seq.request.tenant) >= cap
