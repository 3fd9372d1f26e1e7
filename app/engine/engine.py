"""The engine: one thread that owns the model, the KV pool, the rank pool, the scheduler and the training stepper.

    step: absorb inbox -> schedule (expire, admit) -> run -> commit -> emit; then, if time allows, a quantum of training

Everything else talks to it through the inbox (`submit`, `cancel`, `call`, arrivals) and reads the immutable `snapshot`.
Hence no locks in the core.
"""

from __future__ import annotations

import concurrent.futures
import copy
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from adapters.errors import AdapterError
from adapters.manifest import AdapterManifest
from adapters.weights import HostAdapter
from app.engine.listeners import Listeners, Sink
from app.engine.model_runner import ModelRunner
from app.engine.residency import Arrival, Key, Residency
from app.engine.sampler import Sampled
from app.engine.scheduler import Scheduler
from app.engine.sequence import (
    Admitted,
    Batch,
    Finished,
    FinishReason,
    Request,
    Sequence,
    Timings,
    Token,
    Warmed,
)
from app.engine.snapshot import EngineSnapshot, StepCounters
from app.engine.stopping import finish_reason_after
from app.engine.training_budget import TrainingBudget
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

IDLE_WAIT_S = 0.25  # how long an idle engine sleeps between heartbeats
FETCH_WAIT_S = 0.005  # how long it sleeps while all it could run waits for adapters; an arrival wakes it at once
SNAPSHOT_EVERY_S = 0.02
MAX_FAILURES_IN_A_ROW = 5


class TrainingStepper(Protocol):
    """Training work that the engine runs when serving leaves time for it."""

    def has_work(self) -> bool:
        """True while a quantum would do something. Does not block."""

    def quantum(self) -> None:
        """Do one small piece: a layer forward or backward, an optimizer step. Never raises for a job's own faults."""

    def leave(self) -> None:
        """The process is to end: take nothing new, and give back at the next border what is at work. Any thread."""


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


def is_out_of_memory(error: BaseException) -> bool:
    """CPUs say it in words of their own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


class Engine:
    """Runs requests on the base model. Public methods may be called from any thread."""

    def __init__(
        self,
        *,
        make_residency: Callable[[Callable[[Arrival], None]], Residency],
        make_scheduler: Callable[[Residency], Scheduler],
        runner: ModelRunner,
        latency_factor: float = 1.25,
        training_share: float = 0.4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Call | Arrival] = queue.SimpleQueue()
        # The residency posts what loader threads fetched; the scheduler asks the residency for leases.
        self._residency = make_residency(self._inbox.put)
        self._scheduler = make_scheduler(self._residency)
        self._runner = runner
        self._clock = clock
        self.trainer: TrainingStepper | None = None
        # OpenMP keeps a team a thread, and once teams outnumber the cores it sleeps at every barrier: a step took three
        # times as long. So whoever builds the engine stays at one thread, and this is the engine thread's own number.
        self.threads: int | None = None
        self._listeners = Listeners()
        self._queued: Counter[str] = Counter()  # submitted and not yet absorbed, by tenant; guarded by the lock
        self._is_closed = False  # nobody reads the inbox any more; guarded by the lock
        self._warming: set[concurrent.futures.Future[Warmed]] = set()
        self._inbox_lock = threading.Lock()
        self._draining = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures_in_a_row = 0
        self._last_snapshot = 0.0
        self.training_budget = TrainingBudget(latency_factor, training_share)
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
        if not self.is_running:
            raise EngineNotReady()
        with self._inbox_lock:
            if self._is_closed:
                raise EngineNotReady()
            waiting = self._queued.total()
            self._scheduler.check_submit(request, inbox=waiting, inbox_of_tenant=self._queued[request.tenant])
            self._queued[request.tenant] += 1
            self._inbox.put(_Submit(request, sink))

    def cancel(self, request_id: str) -> None:
        """End a request within two steps; a Finished(CANCELLED) follows if it had not ended. May be repeated."""
        self._inbox.put(_Cancel(request_id))

    def call(self, run: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run a function in the engine thread between two steps; EngineNotReady once that has ended."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._inbox_lock:
            if not self._is_closed:
                self._inbox.put(_Call(run, future))
                return future
        future.set_exception(EngineNotReady())
        return future

    def warm(self, manifest: AdapterManifest, *, pin: bool = False) -> concurrent.futures.Future[Warmed]:
        """Make an adapter resident ahead of its first request."""
        future: concurrent.futures.Future[Warmed] = concurrent.futures.Future()

        def answer(run: Callable[[], Warmed]) -> None:
            try:
                future.set_result(run())
            except Exception as exc:
                future.set_exception(exc)

        def fetched(_: AdapterManifest, adapter: HostAdapter | None, error: AdapterError | None, tier: str) -> None:
            arrival = Arrival(manifest, adapter, error, tier)
            self._tell(self.call(lambda: answer(lambda: self._warm_arrived(arrival, pin=pin))), future)

        def begin() -> None:
            self._warming.add(future)
            future.add_done_callback(self._warming.discard)
            if self._residency.pool.extent_of((manifest.tenant, manifest.digest)) is not None:
                answer(lambda: self._warm_arrived(Arrival(manifest, None, None, "pool"), pin=pin))
            else:
                self._residency.warm(manifest, fetched)

        self._tell(self.call(begin), future)
        return future

    @staticmethod
    def _tell(call: concurrent.futures.Future[None], future: concurrent.futures.Future[Warmed]) -> None:
        """Let `future` fail when the call that was to answer it could not be made."""

        def pass_on(done: concurrent.futures.Future[None]) -> None:
            error = done.exception()
            if error is not None and not future.done():
                future.set_exception(error)

        call.add_done_callback(pass_on)

    def _warm_arrived(self, arrival: Arrival, *, pin: bool) -> Warmed:
        if arrival.error is not None:
            raise arrival.error
        self._residency.new_step()
        self._residency.arrived(arrival)
        pool = self._residency.pool
        is_resident = pool.extent_of(arrival.key) is not None
        return Warmed(arrival.tier, is_resident, is_resident and pin and pool.pin(arrival.key))

    def unpin(self, key: Key) -> concurrent.futures.Future[bool]:
        return self.call(lambda: self._residency.pool.unpin(key))

    def unload(self, key: Key) -> concurrent.futures.Future[bool]:
        """Take an adapter's rows back; the result is False while running sequences lease them."""
        return self.call(lambda: self._residency.unload(key))

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait up to `timeout_s` for accepted ones to finish; True when all did.

        Training jobs are given back meanwhile.
        """
        self._draining = True
        if self.trainer is not None:
            self.trainer.leave()
        until = self._clock() + timeout_s
        while (left := until - self._clock()) > 0 and self.is_running:
            try:
                if self.call(lambda: not self._listeners).result(timeout=left):
                    return True
            except (TimeoutError, EngineNotReady):  # a step longer than the time that is left, or the thread's end
                return False
            self._stopped.wait(0.02)
        return False

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread; every request that is left gets a Finished with ServerDraining."""
        self._draining = True
        self._stopped.set()
        if self._thread is not None:
            self._inbox.put(_Call(lambda: None, concurrent.futures.Future()))  # wakes it
            self._thread.join(timeout_s)

    @property
    def is_ending(self) -> bool:
        """True once it was told to drain or to stop."""
        return self._draining

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopped.is_set()

    # ---- the engine thread

    def _loop(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            while not self._stopped.is_set():
                self._turn()
        finally:
            self._end()

    def _turn(self) -> None:
        """Absorb, step, train. Nothing that goes wrong in one turn ends the thread, but turns that all fail do."""
        self.heartbeat = self._clock()
        try:
            self._absorb(self._wait_s())
            if self.step():
                self._failures_in_a_row = 0
            self._train()
        except Exception:
            logger.exception("engine step failed", extra={"action": "engine_step_failed"})
            self._failures_in_a_row += 1
            self._fail_everything()
            self._residency.reset_if_torn()
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            logger.critical("engine gives up", extra={"action": "engine_stopped"})
            self._stopped.set()

    def _wait_s(self) -> float:
        if self._scheduler.has_running or self._wants_training():
            return 0.0
        return FETCH_WAIT_S if self._scheduler.has_work else IDLE_WAIT_S

    def _end(self) -> None:
        """Answer everybody who still waits: sequences, what lies in the inbox, warm-ups."""
        with self._inbox_lock:
            self._is_closed = True
        self._stopped.set()
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, _Submit):
                self._take(message)
            elif isinstance(message, _Call) and message.future.set_running_or_notify_cancel():
                message.future.set_exception(EngineNotReady())
        for future in list(self._warming):
            future.set_exception(EngineNotReady())
        self._fail_everything()

    def step(self) -> bool:
        """One step; True when it computed something. Does nothing when no sequence can run."""
        now = self._clock()
        self._residency.new_step()
        self._residency.keep_parked(self._scheduler.waiting_keys)
        for sequence in self._scheduler.expire(now):
            self._tell_end(sequence, FinishReason.DEADLINE, DeadlineExceeded())
        # After training, those who decode go first: their gap has been filled, and a prompt would come on top of it.
        batch = self._scheduler.schedule(now, decodes_only=self.training_budget.is_spent)
        self._tell_admissions()
        has_run = bool(batch.chunks) and self._run_and_commit(batch)
        if has_run:
            took = self._clock() - now
            self.counters.observe(batch, took)
            self.training_budget.stepped(took, num_decodes=batch.num_decodes, has_prefill=batch.has_prefill)
        self._listeners.flush()
        if now - self._last_snapshot > SNAPSHOT_EVERY_S or not self._scheduler.has_work:
            self.snapshot = self._take_snapshot()
        return has_run

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
                with self._inbox_lock:
                    self._queued[request.tenant] -= 1
                    if not self._queued[request.tenant]:
                        del self._queued[request.tenant]
                self._listeners.add(request.id, sink)
                self._scheduler.add(Sequence(request))
                if request.adapter is not None:
                    self._residency.prefetch(request.adapter)
            case _Cancel(request_id):
                sequence = self._scheduler.cancel(request_id)
                if sequence is not None:
                    self._tell_end(sequence, FinishReason.CANCELLED)
            case Arrival():
                self._residency.arrived(message)
                failed = self._scheduler.adapter_arrived(message.key, message.error, message.tier)
                for sequence in failed:
                    self._tell_end(sequence, FinishReason.ERROR, message.error)
            case _Call(run, future):
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(run())
                    except Exception as exc:  # the caller's, through its future
                        future.set_exception(exc)

    def _run_and_commit(self, batch: Batch) -> bool:
        """Run a batch and book it; False when not one sequence of it could be run."""
        culprits: list[tuple[Sequence, Exception]] = []
        sampled = self._run(batch, culprits)
        for sequence, error in culprits:
            self._finish(sequence, FinishReason.ERROR, error)
        self._scheduler.commit(batch, {k: s.token for k, s in sampled.items() if s.is_finite})
        for chunk in batch.chunks:
            result = sampled.get(chunk.sequence.id)
            if result is not None:
                self._after_token(chunk.sequence, result)
        if len(culprits) == len(batch.chunks):
            self._failures_in_a_row += 1  # perhaps it is not they: a device that is lost fails whoever comes
            return False
        return True

    def _run(self, batch: Batch, culprits: list[tuple[Sequence, Exception]]) -> Mapping[str, Sampled]:
        """Run a batch; if it fails, run its halves: whoever fails alone is the culprit, and nobody else suffers.

        Running a part again is harmless: it writes the same K and V to the same places.
        """
        try:
            return self._runner.run(batch, self._residency.rows_of)
        except Exception as exc:
            out_of_memory = is_out_of_memory(exc)
            if out_of_memory:
                self.counters.out_of_memory += 1
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            else:
                logger.exception("batch failed", extra={"action": "batch_failed", "count": len(batch.chunks)})
            if len(batch.chunks) == 1:
                culprits.append((batch.chunks[0].sequence, OutOfMemory() if out_of_memory else InternalError()))
                return {}
        half = len(batch.chunks) // 2
        first = self._run(Batch(batch.chunks[:half]), culprits)
        return {**first, **self._run(Batch(batch.chunks[half:]), culprits)}

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
        self._listeners.tell(Token(sequence.id, result.token, result.logprob, scored))
        reason = finish_reason_after(sequence, result.token, self._scheduler.limits.max_context)
        if reason is not None:
            self._finish(sequence, reason)

    def _tell_admissions(self) -> None:
        for sequence in self._scheduler.take_admitted():
            self._listeners.tell(Admitted(sequence.id, sequence.num_cached))
        for sequence, error in self._scheduler.take_failed():
            self._tell_end(sequence, FinishReason.ERROR, error)

    # ---- endings

    def _finish(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        self._scheduler.finish(sequence)
        self._tell_end(sequence, reason, error)

    def _tell_end(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
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
        self._listeners.tell(Finished(sequence.id, reason, error, timings))

    def _fail_everything(self) -> None:
        """End every sequence with an error: the engine stops, or a step failed and no single one is to blame."""
        error: LodgerError = ServerDraining() if self._draining else InternalError()
        try:
            left = self._scheduler.clear()
        except Exception:  # books that disagree cannot be mended here; at least nobody waits for ever
            logger.critical("books disagree", extra={"action": "books_broken"}, exc_info=True)
            self._stopped.set()
            self._listeners.tell_all(error)
            left = []
        for sequence in left:
            self._tell_end(sequence, FinishReason.ERROR, copy.copy(error))  # each is raised in a task of its own
        self._listeners.flush()

    # ---- training

    def _wants_training(self) -> bool:
        return self.trainer is not None and self.trainer.has_work()

    def _train(self) -> None:
        """Run training quanta: one at a time when idle, and beside decoding as many as the latency budget has room for.

        What arrives meanwhile waits for one quantum at most.
        """
        while self._wants_training() and self._may_train():
            assert self.trainer is not None
            started = self._clock()
            try:
                self.trainer.quantum()
            except Exception:  # a job's faults end in the trainer; this is its own, and serving goes on without it
                logger.critical("training stopped", extra={"action": "trainer_failed"}, exc_info=True)
                self.trainer = None
            is_idle = not self._scheduler.has_running
            self.training_budget.trained(self._clock() - started, is_idle=is_idle)
            if is_idle or not self._inbox.empty():
                return

    def _may_train(self) -> bool:
        scheduler = self._scheduler
        return not scheduler.has_running or self.training_budget.allows(prompt_waits=scheduler.has_unread_prompts)

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
            place_seconds=self._residency.place_seconds.freeze(),
            evictions=pool.num_evictions,
            counters=self.counters.freeze(),
        )

    def check(self) -> None:
        """Raise AssertionError when an idle engine still holds blocks, leases or listeners."""
        self._scheduler.check()
        self._residency.pool.check()
        assert not self._listeners, f"{len(self._listeners)} listeners are left"
        assert self._residency.pool.leased_rows == 0, "leases are left"
