"""The engine: one thread that owns the model, the KV pool, the rank pool, the scheduler and the training stepper.

    step: absorb inbox -> schedule (expire, admit) -> run -> commit -> emit; then, if time allows, a quantum of training

Everything else talks to it through the inbox (`submit`, `cancel`, `call`, arrivals) and reads the immutable `snapshot`.
Hence no locks in the core.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from adapters.errors import AdapterError
from adapters.manifest import AdapterManifest
from adapters.weights import HostAdapter
from app.engine.model_runner import ModelRunner
from app.engine.residency import Arrival, Key, Residency
from app.engine.sampler import Sampled
from app.engine.scheduler import Scheduler
from app.engine.sequence import (
    Admitted,
    Batch,
    Event,
    Finished,
    FinishReason,
    Request,
    Sequence,
    Timings,
    Token,
)
from app.engine.snapshot import EngineSnapshot, StepCounters
from app.engine.stopping import finish_reason_after
from app.errors import (
    DeadlineExceeded,
    EngineNotReady,
    InternalError,
    LodgerError,
    NonFiniteOutput,
    OutOfMemory,
    ServerDraining,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Sink = Callable[[list[Event]], None]

IDLE_WAIT_S = 0.25  # how long an idle engine sleeps between heartbeats
SNAPSHOT_EVERY_S = 0.02
MAX_FAILURES_IN_A_ROW = 5


class TrainingStepper(Protocol):
    """Training work that the engine runs when serving leaves time for it."""

    def has_work(self) -> bool:
        """True while a quantum would do something. Does not block."""

    def quantum(self) -> None:
        """Do one small piece: a layer forward or backward, an optimizer step. Never raises for a job's own faults."""


@dataclass(frozen=True, slots=True)
class _Submit:
    request: Request
    sink: Sink


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Call:
    run: Callable[[], Any]
    future: concurrent.futures.Future[Any]


class Engine:
    """Runs requests on the base model. Public methods may be called from any thread."""

    def __init__(
        self,
        *,
        make_residency: Callable[[Callable[[Arrival], None]], Residency],
        make_scheduler: Callable[[Residency], Scheduler],
        runner: ModelRunner,
        latency_factor: float = 1.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Call | Arrival] = queue.SimpleQueue()
        # The residency posts what loader threads fetched; the scheduler asks the residency for leases.
        self._residency = make_residency(self._inbox.put)
        self._scheduler = make_scheduler(self._residency)
        self._runner = runner
        self._clock = clock
        self._latency_factor = latency_factor
        self.trainer: TrainingStepper | None = None
        self._sinks: dict[str, Sink] = {}
        self._outbox: dict[Sink, list[Event]] = {}
        self._queued = 0  # submitted and not yet absorbed; guarded by the one lock of this file
        self._submit_lock = threading.Lock()
        self._draining = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures_in_a_row = 0
        self._last_snapshot = 0.0
        self._training_credit_s = 0.0
        self._quantum_s = 0.0
        self.counters = StepCounters()
        self.heartbeat = clock()
        self.snapshot = self._take_snapshot()

    # ---- called from any thread

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its events reach `sink` in the engine thread, once a step, all of one sink together.

        Raises QueueFull, RateLimited, ServerDraining, EngineNotReady, ContextLengthExceeded or OutOfMemory (longer than
        the KV cache); then no event follows.
        """
        if self._draining:
            raise ServerDraining()
        if self._thread is None or self._stopped.is_set():
            raise EngineNotReady()
        with self._submit_lock:
            self._scheduler.check_submit(request, inbox=self._queued)
            self._queued += 1
        self._inbox.put(_Submit(request, sink))

    def cancel(self, request_id: str) -> None:
        """End a request within two steps; a Finished(CANCELLED) follows if it had not ended. May be repeated."""
        self._inbox.put(_Cancel(request_id))

    def call(self, run: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run a function in the engine thread between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._inbox.put(_Call(run, future))
        return future

    def warm(self, manifest: AdapterManifest, *, pin: bool = False) -> concurrent.futures.Future[str]:
        """Make an adapter resident ahead of its first request; the result is the tier where it was found."""
        future: concurrent.futures.Future[str] = concurrent.futures.Future()

        def place(adapter: HostAdapter | None, error: AdapterError | None, tier: str) -> None:
            key = (manifest.tenant, manifest.digest)
            if error is not None:
                future.set_exception(error)
                return
            self._residency.new_step()
            self._residency.arrived(Arrival(manifest, adapter, None, tier))
            if pin and self._residency.pool.extent_of(key) is not None:
                self._residency.pool.pin(key)
            future.set_result(tier)

        def fetched(_: AdapterManifest, adapter: HostAdapter | None, error: AdapterError | None, tier: str) -> None:
            self.call(lambda: place(adapter, error, tier))

        def begin() -> None:
            if self._residency.pool.extent_of((manifest.tenant, manifest.digest)) is not None:
                place(None, None, "pool")
            else:
                self._residency.warm(manifest, fetched)

        self.call(begin)
        return future

    def unpin(self, key: Key) -> concurrent.futures.Future[bool]:
        return self.call(lambda: self._residency.pool.unpin(key))

    def unload(self, key: Key) -> concurrent.futures.Future[bool]:
        """Take an adapter's rows back; the result is False while running sequences lease them."""
        return self.call(lambda: self._residency.unload(key))

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, let accepted ones finish for `timeout_s`, fail the rest; True when all finished."""
        self._draining = True
        until = self._clock() + timeout_s
        while self._clock() < until and self.is_running:
            try:
                if self.call(lambda: not self._sinks).result(timeout=max(until - self._clock(), 0.1) + 1):
                    return True
            except TimeoutError:  # a step that takes longer than the time that was left
                return False
            self._stopped.wait(0.02)
        return False

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread; every request that is left gets a Finished with ServerDraining."""
        self._draining = True
        if self._thread is None:
            return
        if self.is_running:
            self.call(self._fail_everything)
        self._stopped.set()
        self._thread.join(timeout_s)

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopped.is_set()

    # ---- the engine thread

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self.heartbeat = self._clock()
            busy = self._scheduler.has_work or self._wants_training()
            self._absorb(wait_s=0.0 if busy else IDLE_WAIT_S)
            try:
                self.step()
                self._train()
                self._failures_in_a_row = 0
            except Exception:
                logger.exception("engine step failed", extra={"action": "engine_step_failed"})
                self._failures_in_a_row += 1
                self._fail_everything()
                if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                    logger.critical("engine gives up", extra={"action": "engine_stopped"})
                    self._stopped.set()
        self._absorb(wait_s=0.0)
        self._fail_everything()

    def step(self) -> None:
        """One step; does nothing when no sequence can run."""
        now = self._clock()
        self._residency.new_step()
        self._residency.keep_parked(self._scheduler.waiting_keys)
        for sequence in self._scheduler.expire(now):
            self._emit_finished(sequence, FinishReason.DEADLINE, DeadlineExceeded())
        batch = self._scheduler.schedule(now)
        self._emit_admissions()
        if batch.chunks:
            self._run_and_commit(batch)
            self.counters.observe(batch, self._clock() - now)
        self._flush()
        if now - self._last_snapshot > SNAPSHOT_EVERY_S or not self._scheduler.has_work:
            self.snapshot = self._take_snapshot()

    def _absorb(self, wait_s: float) -> None:
        """Take everything out of the inbox; when idle, wait for the first message."""
        try:
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                self._take(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _take(self, message: _Submit | _Cancel | _Call | Arrival) -> None:
        match message:
            case _Submit(request, sink):
                with self._submit_lock:
                    self._queued -= 1
                self._sinks[request.id] = sink
                self._scheduler.add(Sequence(request))
                if request.adapter is not None:
                    self._residency.prefetch(request.adapter)
            case _Cancel(request_id):
                sequence = self._scheduler.cancel(request_id)
                if sequence is not None:
                    self._emit_finished(sequence, FinishReason.CANCELLED)
            case Arrival():
                self._residency.arrived(message)
                failed = self._scheduler.adapter_arrived(message.key, message.error, message.tier)
                for sequence in failed:
                    self._emit_finished(sequence, FinishReason.ERROR, message.error)
            case _Call(run, future):
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(run())
                    except Exception as exc:  # the caller's, through its future
                        future.set_exception(exc)

    def _run_and_commit(self, batch: Batch) -> None:
        sampled = self._run(batch)
        self._scheduler.commit(batch, {k: s.token for k, s in sampled.items() if s.is_finite})
        for chunk in batch.chunks:
            result = sampled.get(chunk.sequence.id)
            if result is not None:
                self._after_token(chunk.sequence, result)

    def _run(self, batch: Batch) -> Mapping[str, Sampled]:
        """Run a batch; out of memory, run its halves, and fail the one sequence that does not even fit alone."""
        try:
            return self._runner.run(batch, self._residency.rows_of)
        except torch.OutOfMemoryError:
            self.counters.out_of_memory += 1
            torch.cuda.empty_cache()
        if len(batch.chunks) == 1:
            self._finish(batch.chunks[0].sequence, FinishReason.ERROR, OutOfMemory())
            return {}
        half = len(batch.chunks) // 2
        parts = (Batch(batch.chunks[:half]), Batch(batch.chunks[half:]))
        return {**self._run(parts[0]), **self._run(parts[1])}

    def _after_token(self, sequence: Sequence, result: Sampled) -> None:
        if not result.is_finite:
            self.counters.non_finite += 1
            if sequence.adapter_key is not None:
                self._residency.quarantine(sequence.adapter_key)
            # Earlier chunks of this prompt may lie in the prefix cache with what made the row go astray.
            self._scheduler.kv.invalidate(sequence.adapter_key or (sequence.request.tenant, ""))
            error = NonFiniteOutput() if sequence.adapter_key is not None else InternalError()
            self._finish(sequence, FinishReason.ERROR, error)
            return
        scored = None
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
            if sequence.request.sampling.prompt_logprobs is not None:
                scored = tuple(sequence.prompt_logprobs)
        self._emit(sequence.id, Token(sequence.id, result.token, result.logprob, scored))
        reason = finish_reason_after(sequence, result.token, self._scheduler.limits.max_context)
        if reason is not None:
            self._finish(sequence, reason)

    def _emit_admissions(self) -> None:
        for sequence in self._scheduler.take_admitted():
            self._emit(sequence.id, Admitted(sequence.id, sequence.num_cached))
        for sequence, error in self._scheduler.take_failed():
            self._emit_finished(sequence, FinishReason.ERROR, error)

    # ---- endings

    def _finish(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        self._scheduler.finish(sequence)
        self._emit_finished(sequence, reason, error)

    def _emit_finished(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        request = sequence.request
        timings = Timings(
            arrival=request.arrival,
            admitted=sequence.admitted_at,
            first_token=sequence.first_token_at,
            finished=self._clock(),
            prompt_tokens=sequence.num_prompt,
            generated_tokens=sequence.num_generated,
            cached_tokens=sequence.num_cached,
            tier=sequence.tier,
        )
        self._emit(sequence.id, Finished(sequence.id, reason, error, timings))
        self._sinks.pop(sequence.id, None)

    def _fail_everything(self) -> None:
        """End every sequence with an error: the engine stops, or a step failed and no single one is to blame."""
        error: LodgerError = ServerDraining() if self._draining else InternalError()
        for sequence in self._scheduler.clear():
            self._emit_finished(sequence, FinishReason.ERROR, error)
        self._flush()

    # ---- events

    def _emit(self, request_id: str, event: Event) -> None:
        sink = self._sinks.get(request_id)
        if sink is not None:
            self._outbox.setdefault(sink, []).append(event)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for sink, events in outbox.items():
            try:
                sink(events)
            except Exception:  # a closed event loop is the listener's end, not ours
                logger.warning("a listener is gone", extra={"action": "sink_failed"})

    # ---- training

    def _wants_training(self) -> bool:
        return self.trainer is not None and not self._draining and self.trainer.has_work()

    def _train(self) -> None:
        """Run training quanta: freely when idle, and beside decoding as far as the latency budget has credit.

        A step that took s seconds earns (latency_factor - 1) * s of training time.
        """
        if not self._wants_training():
            self._training_credit_s = 0.0
            return
        assert self.trainer is not None
        if self._scheduler.has_running:
            self._training_credit_s += (self._latency_factor - 1) * self.counters.last_step_s
            if self._training_credit_s < self._quantum_s:
                return
        started = self._clock()
        self.trainer.quantum()
        took = self._clock() - started
        self._quantum_s = took if not self._quantum_s else 0.8 * self._quantum_s + 0.2 * took
        self._training_credit_s = min(max(self._training_credit_s - took, -took), took)

    # ---- views

    def _take_snapshot(self) -> EngineSnapshot:
        self._last_snapshot = self._clock()
        pool = self._residency.pool
        return EngineSnapshot(
            taken_at=self._last_snapshot,
            scheduler=self._scheduler.snapshot(),
            residents=self._residency.residents(),
            pool_rows=pool.num_rows,
            pool_free_rows=pool.free_rows,
            pool_leased_rows=pool.leased_rows,
            bytes_per_row=self._residency.bytes_per_row,
            kv_block_size=self._scheduler.kv.block_size,
            kv_num_blocks=self._scheduler.kv.num_blocks,
            quarantined=self._residency.num_quarantined,
            placements=self._residency.placements,
            evictions=pool.num_evictions,
            counters=self.counters.freeze(),
        )

    def check(self) -> None:
        """Raise AssertionError when an idle engine still holds blocks, leases or listeners."""
        self._scheduler.check()
        self._residency.pool.check()
        assert not self._sinks, f"{len(self._sinks)} listeners are left"
        assert self._residency.pool.leased_rows == 0, "leases are left"
