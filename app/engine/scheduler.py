"""Decides which sequences run, and which of their tokens a step computes. Integers and queues, no tensors.

    schedule: blocks for those who run -> admission -> chunks        (then the engine runs the batch)
    commit:   what was computed and sampled goes into the books

A step's tokens are first one for each sequence that decodes, then chunks of prompts up to `max_batch_tokens`. When KV
blocks run out, the tenant that was served most gives up its latest admitted sequence: blocks and lease go back, the
generated tokens stay, and it is computed again later, from the front of its tenant's queue.

Engine thread only, but for `num_waiting`, `check_submit` and `check_fits`: these read single numbers, for any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapters.manifest import AdapterRef
from app.engine.admission import Acquired, Admission, Lease, Residency, SchedulerLimits
from app.engine.fairness import VirtualTokenCounters
from app.engine.kv_cache import KVCache
from app.engine.queues import EVEN_SHARE, RunningSet, ShareOf, TenantQueues, TenantShare
from app.engine.sequence import AdapterKey, Batch, Chunk, Phase, Request, Sequence
from app.errors import AccessDenied, ContextLengthExceeded, OutOfMemory, QueueFull, RateLimited

__all__ = [
    "Acquired",
    "AdapterLoad",
    "Lease",
    "Residency",
    "Scheduler",
    "SchedulerLimits",
    "SchedulerSnapshot",
    "TenantShare",
]


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """How many sequences want one adapter; the base has no entry."""

    adapter: AdapterRef
    num_waiting: int  # with those whose adapter is being fetched
    num_running: int


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """The scheduler between two steps; safe to read from any thread."""

    num_waiting: int  # all that do not run yet
    num_fetching: int  # of these, those whose adapter is being fetched
    num_row_waits: int  # tenants of which a sequence ages, waiting for rank rows
    num_running: int
    adapters: tuple[AdapterLoad, ...]
    kv_usage: float  # 0 to 1
    prefix_query_tokens: int  # since the start, as are the next two
    prefix_hit_tokens: int
    num_preemptions: int


class Scheduler:
    """Invariant: a sequence waits (no blocks, no lease), or runs (both), or has left for good."""

    def __init__(
        self,
        kv: KVCache,
        residency: Residency,
        limits: SchedulerLimits,
        share_of: ShareOf = lambda tenant: EVEN_SHARE,
    ) -> None:
        self.kv = kv
        self.limits = limits
        self._share_of = share_of
        self._fairness = VirtualTokenCounters(lambda tenant: share_of(tenant).weight)
        self._queues = TenantQueues(self._fairness)
        self._running = RunningSet()
        self._admission = Admission(kv, residency, self._queues, self._running, limits)
        self._admitted: list[Sequence] = []
        self._failed: list[tuple[Sequence, Exception]] = []
        self._num_preemptions = 0

    # Submitting: any thread.

    @property
    def num_waiting(self) -> int:
        return self._queues.num_waiting

    def check_submit(self, request: Request, *, inbox: int = 0, inbox_of_tenant: int = 0) -> None:
        """Refuse what cannot be queued now. `inbox`: requests that were accepted before and are not added yet, and this
        tenant's share of them.

        Raises QueueFull, RateLimited, and what `check_fits` raises.
        """
        self.check_fits(request)
        if self.num_waiting + inbox >= self.limits.max_waiting:
            raise QueueFull
        cap = self._share_of(request.tenant).max_waiting
        if cap is not None and self._queues.num_waiting_of(request.tenant) + inbox_of_tenant >= cap:
            raise RateLimited(f"{cap} requests of this tenant are waiting already. Wait for some to finish.")

    def check_fits(self, request: Request) -> None:
        """Refuse what could never run, even alone.

        Raises ContextLengthExceeded, OutOfMemory (longer than the whole KV cache), AccessDenied (a foreign adapter).
        """
        total = len(request.prompt) + request.sampling.max_tokens
        if total > self.limits.max_context:
            raise ContextLengthExceeded(
                f"The model's context is {self.limits.max_context} tokens; {len(request.prompt)} in the prompt and "
                f"{request.sampling.max_tokens} to generate are {total}. Shorten the prompt or ask for fewer tokens."
            )
        if self.kv.blocks_for(total - 1) > self.kv.num_blocks:
            raise OutOfMemory(
                f"The server's KV cache holds {self.kv.num_blocks * self.kv.block_size} tokens; this request may need "
                f"{total - 1}. Shorten the prompt or ask for fewer tokens."
            )
        if request.adapter is not None and request.adapter.tenant != request.tenant and not request.is_shared:
            raise AccessDenied("This adapter belongs to another tenant.")

    # The life of a sequence: the engine thread alone from here on.

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose request passed the checks above."""
        self._queues.append(seq)

    def schedule(self, now: float, *, decodes_only: bool = False) -> Batch:
        """Choose the next step. `now`: time.monotonic(). `decodes_only`: read no prompts if any sequence decodes."""
        # Blocks that a preemption made free are for those who run: newcomers would only cause the next one.
        if not self._secure_blocks():
            # Into our own lists, so that a walk that ends in an exception loses nobody.
            self._admission.run(now, self._share_of, admitted=self._admitted, failed=self._failed)
        return Batch(self._chunks(decodes_only=decodes_only))

    def take_admitted(self) -> list[Sequence]:
        """Those that began to run since the last call, for the first time each."""
        taken, self._admitted = self._admitted, []
        return taken

    def take_failed(self) -> list[tuple[Sequence, Exception]]:
        """Those whose adapter turned out to be unusable at admission since the last call; they have left already."""
        taken, self._failed = self._failed, []
        return taken

    def commit(self, batch: Batch, sampled: Mapping[str, int]) -> None:
        """Book a step that ran: the tokens it computed, and those it sampled by request id.

        A sequence that should have sampled and did not (its row was not finite), or that ended meanwhile, is left as it
        was: nothing that it computed in this step can be found by others.
        """
        for chunk in batch.chunks:
            seq, samples = chunk.sequence, chunk.samples
            if seq.phase is not Phase.RUNNING or (samples and seq.id not in sampled):
                continue
            seq.num_computed = chunk.start + chunk.count
            self.kv.commit(seq)
            if samples:
                seq.tokens.append(sampled[seq.id])
                self._fairness.charge_output(seq.request.tenant)

    def finish(self, seq: Sequence) -> None:
        """End a sequence, wherever it is. Each ends once."""
        assert seq.phase is not Phase.FINISHED, "a sequence ends once"
        if seq.phase is Phase.RUNNING:
            self._stop(seq)
        else:
            self._queues.remove(seq)
        seq.phase = Phase.FINISHED

    def cancel(self, request_id: str) -> Sequence | None:
        """End a request that nobody wants any more; None when it is unknown or has ended."""
        seq = self._running.find(request_id) or self._queues.find(request_id)
        if seq is not None:
            self.finish(seq)
        return seq

    def expire(self, now: float) -> list[Sequence]:
        """End and return the sequences whose deadline has passed, waiting or running."""
        late = [seq for seq in self.sequences() if seq.request.deadline <= now]
        for seq in late:
            self.finish(seq)
        return late

    def clear(self) -> list[Sequence]:
        """End and return all sequences."""
        left = list(self.sequences())
        for seq in left:
            self.finish(seq)
        return left

    def adapter_arrived(self, key: AdapterKey, error: Exception | None, tier: str | None) -> list[Sequence]:
        """A fetch has ended: note its tier with all who wait for the adapter; after an error, end and return them."""
        waiting = [seq for seq in self._queues if seq.adapter_key == key]
        for seq in waiting:
            if error is None:
                seq.tier = seq.tier or tier
            else:
                self.finish(seq)
        return [] if error is None else waiting

    # Looking.

    @property
    def has_work(self) -> bool:
        return bool(len(self._running) or self._queues.num_waiting)

    @property
    def has_running(self) -> bool:
        return len(self._running) > 0

    @property
    def has_unread_prompts(self) -> bool:
        """True when somebody waits for a first token that computing brings nearer: not for an adapter to arrive."""
        reading = any(seq.num_uncomputed > 1 for seq in self._running)
        return reading or any(seq.phase is Phase.WAITING for seq in self._queues)

    def sequences(self) -> Iterator[Sequence]:
        """All that have not ended, running ones first."""
        yield from self._running
        yield from self._queues

    def waiting_keys(self) -> set[AdapterKey]:
        """The adapters that somebody waits for."""
        return {key for seq in self._queues if (key := seq.adapter_key) is not None}

    def served(self, tenant: str) -> float:
        """Weighted tokens of service that the tenant had."""
        return self._fairness.served(tenant)

    def snapshot(self) -> SchedulerSnapshot:
        refs: dict[AdapterKey, AdapterRef] = {}
        waiting: Counter[AdapterKey] = Counter()
        running: Counter[AdapterKey] = Counter()
        num_fetching = 0
        for seq in self.sequences():
            num_fetching += seq.phase is Phase.FETCHING
            adapter, key = seq.request.adapter, seq.adapter_key
            if adapter is not None and key is not None:
                if key not in refs:
                    refs[key] = adapter.ref
                (running if seq.phase is Phase.RUNNING else waiting)[key] += 1
        return SchedulerSnapshot(
            num_waiting=self.num_waiting,
            num_fetching=num_fetching,
            num_row_waits=self._queues.num_row_waits,
            num_running=len(self._running),
            adapters=tuple(AdapterLoad(ref, waiting[key], running[key]) for key, ref in refs.items()),
            kv_usage=self.kv.usage,
            prefix_query_tokens=self.kv.query_tokens,
            prefix_hit_tokens=self.kv.hit_tokens,
            num_preemptions=self._num_preemptions,
        )

    def check_books(self) -> None:
        """Raise AssertionError when the books disagree; true between any two calls."""
        self._queues.check()
        self._running.check()
        self.kv.check(self._running)

    def check(self) -> None:
        """Raise AssertionError when an idle scheduler still holds anything: sequences, blocks or leases."""
        self.check_books()
        assert not self.has_work, "sequences are left"
        assert self.kv.num_available == self.kv.num_blocks, "blocks are held by nobody"

    # Inside.

    def _secure_blocks(self) -> bool:
        """See that each running sequence has blocks for all its tokens; True if one was preempted for it.

        It ends: a sequence left alone always fits (`check_fits`). And it gets on: whoever is given blocks last in a
        step is not preempted after it, and makes a token that is never lost.
        """
        preempted = False
        for seq in list(self._running):
            while seq.phase is Phase.RUNNING and not self.kv.allocate(seq, len(seq.tokens)):
                tenant = max(self._running.tenants(), key=lambda t: (self._fairness.served(t), t))
                self._preempt(self._running.latest_of(tenant))
                preempted = True
        return preempted

    def _preempt(self, seq: Sequence) -> None:
        self._stop(seq)
        seq.phase = Phase.WAITING
        seq.num_preemptions += 1
        self._num_preemptions += 1
        self._queues.put_back(seq)

    def _stop(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._admission.vacate(seq)

    def _chunks(self, *, decodes_only: bool) -> tuple[Chunk, ...]:
        """One token for each decode; the prefills share the rest evenly, and long ones get what short ones leave."""
        chunks = [Chunk(seq, seq.num_computed, 1) for seq in self._running if seq.num_uncomputed == 1]
        if decodes_only and chunks:
            return tuple(chunks)
        prefills = sorted((s for s in self._running if s.num_uncomputed > 1), key=lambda s: s.num_uncomputed)
        step_tokens = self.limits.step_tokens(len(chunks), len(prefills) + self._queues.num_waiting)
        budget = max(step_tokens - len(chunks), len(prefills))  # nobody stands still
        for index, seq in enumerate(prefills):
            count = min(seq.num_uncomputed, budget // (len(prefills) - index))
            chunks.append(Chunk(seq, seq.num_computed, count))
            budget -= count
        return tuple(chunks)
