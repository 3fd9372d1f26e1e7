"""The engine without HTTP: requests go in by `submit`, tokens come out through a sink. The whole cache is real:
directory store, disk tier, host tier, rank pool."""

from __future__ import annotations

import os
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from adapters.disk_tier import DiskTier
from adapters.store import BlobStore
from app.bench.figures import ProcessFacts, RequestTrace, RoundTrace
from app.bench.machine import process_age_s, rss_bytes
from app.bench.slow_store import SlowStore
from app.bench.tenancy import Tenancy
from app.bench.workload import BenchFailed, Extra, Job
from app.bootstrap import engine_config, load_base, make_loader
from app.engine.assembly import assemble_engine
from app.engine.base_model import BaseModel, choose_dtype, use_threads
from app.engine.sequence import Event, Finished, FinishReason, Request, SamplingParams, Token
from app.machine import keep_freed_memory
from app.settings import Settings
from app.storage import open_store

REQUEST_TIMEOUT_S = 3600.0


@dataclass(slots=True)
class _Open:
    """A request under way."""

    job: Job
    asked_at: float
    is_extra: bool
    tokens: list[int] = field(default_factory=list)
    news_at: list[float] = field(default_factory=list)

    def trace(self) -> RequestTrace:
        return RequestTrace(
            self.job.index,
            self.job.is_cold,
            self.asked_at,
            tuple(self.news_at),
            len(self.tokens),
            tuple(self.tokens),
            self.is_extra,
        )


class EngineSystem:
    """Lodger's engine in this process."""

    def __init__(self, tenancy: Tenancy, store_delay_s: float = 0.0, dtype: str | None = None) -> None:
        """`dtype` overrides the settings'; `store_delay_s` slows every object of the store."""
        settings = tenancy.settings
        if dtype is not None:
            settings = settings.model_copy(update={"dtype": dtype})
        keep_freed_memory()
        use_threads(1)  # the engine thread takes settings.threads for itself, as in the server
        self._threads = settings.threads
        self._manifests = tenancy.manifests
        self.base: BaseModel = load_base(settings)
        store: BlobStore = open_store(settings)
        if store_delay_s:
            store = SlowStore(store, store_delay_s)
        # Its own: what a server of the same run has downloaded must not make this engine's cold adapters warm.
        self._disk = DiskTier(tenancy.root / f"disk-{os.getpid()}", settings.disk_cache_bytes)
        self.loader = make_loader(settings, self.base, store, self._disk)
        self.engine = assemble_engine(self.base, self.loader, engine_config(settings))
        self._news: queue.SimpleQueue[tuple[float, list[Event]]] = queue.SimpleQueue()
        self._asked = 0
        self.engine.threads = settings.threads
        self.engine.start()
        self._start_s = process_age_s()

    def warm_up(self, jobs: Sequence[Job]) -> None:
        self.round(jobs, 1)

    def round(self, jobs: Sequence[Job], concurrency: int) -> RoundTrace:
        return self._drive(iter(jobs), concurrency, ())

    def window(self, jobs: Sequence[Job], concurrency: int, seconds: float, extras: Sequence[Extra]) -> RoundTrace:
        """Keep `concurrency` streams busy for so long with jobs that repeat, and answer the extras beside them."""
        return self._drive(_repeat(jobs, time.monotonic() + seconds), concurrency, extras)

    def facts(self) -> ProcessFacts:
        return ProcessFacts(
            self._start_s,
            rss_bytes(),
            self._threads,
            str(self.base.dtype).removeprefix("torch."),
            describe_weights(self.base.quantization, self.base.device),
        )

    def close(self) -> None:
        self.engine.stop()
        self.loader.close()
        self._disk.close()

    def _drive(self, jobs: Iterator[Job], concurrency: int, extras: Sequence[Extra]) -> RoundTrace:
        """A closed loop: each stream asks again once it is answered."""
        began = time.monotonic()
        pending = deque(sorted(extras, key=lambda extra: extra.at_s))
        under_way: dict[str, _Open] = {}
        done: list[RequestTrace] = []
        for _ in range(concurrency):
            self._ask(next(jobs, None), under_way)
        ended = began
        while under_way or pending:
            while pending and pending[0].at_s <= time.monotonic() - began:
                self._ask(pending.popleft().job, under_way, is_extra=True)
            wait_s = max(pending[0].at_s - (time.monotonic() - began), 0.001) if pending else REQUEST_TIMEOUT_S
            try:
                at, events = self._news.get(timeout=wait_s)
            except queue.Empty:
                continue
            for answered in self._absorb(at, events, under_way):
                done.append(answered.trace())
                ended = at
                if not answered.is_extra:
                    self._ask(next(jobs, None), under_way)
        return RoundTrace(ended - began, tuple(sorted(done, key=lambda trace: trace.asked_at)))

    def _ask(self, job: Job | None, under_way: dict[str, _Open], *, is_extra: bool = False) -> None:
        if job is None:
            return
        self._asked += 1
        now = time.monotonic()
        manifest = None if job.adapter is None else self._manifests[job.adapter]
        request = Request(
            id=f"bench-{self._asked}",
            tenant="base-only" if manifest is None else manifest.tenant,
            prompt=job.prompt,
            sampling=SamplingParams(max_tokens=job.output_tokens, temperature=0.0, ignore_eos=True),
            adapter=manifest,
            arrival=now,
            deadline=now + REQUEST_TIMEOUT_S,
            eos_ids=self.base.eos_ids,
        )
        under_way[request.id] = _Open(job, now, is_extra)
        self.engine.submit(request, self._sink)

    def _sink(self, events: list[Event]) -> None:
        """In the engine thread: the time is taken here, the work is done by the driver."""
        self._news.put((time.monotonic(), events))

    def _absorb(self, at: float, events: list[Event], under_way: dict[str, _Open]) -> Iterator[_Open]:
        for event in events:
            match event:
                case Token(request_id=name, token=token):
                    under_way[name].tokens.append(token)
                    under_way[name].news_at.append(at)
                case Finished(request_id=name, reason=reason, error=error):
                    answered = under_way.pop(name)
                    if reason is not FinishReason.LENGTH or len(answered.tokens) != answered.job.output_tokens:
                        raise BenchFailed(f"a request ended with {reason.value}: {error}")
                    yield answered


def describe_weights(quantization: str, device: torch.device) -> str:
    """How the linears are stored, and what is multiplied where that differs."""
    if quantization != "nf4":
        return "16 or 32 bit"
    return "nf4" if device.type == "cuda" else "nf4, dense copy"


def computes_in(settings: Settings) -> tuple[str, str]:
    """The dtype and the weights that an engine with these settings has, without loading anything."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device != "auto":
        device = torch.device(settings.device)
    dtype = str(choose_dtype(settings.dtype, device)).removeprefix("torch.")
    return dtype, describe_weights(settings.quantization, device)


def _repeat(jobs: Sequence[Job], until: float) -> Iterator[Job]:
    while True:
        for job in jobs:
            if time.monotonic() >= until:
                return
            yield job
