"""Every metric's name, and the only file that imports prometheus_client.

Counters and histograms are observed when something ends; gauges are read at scrape from one `ServingSnapshot`, so a
scrape holds no lock of the engine. Labels come from closed sets, created at zero, for `rate()` to see the first event.
No tenant, adapter, key or request id is a label, but for the lists that LoRA-aware routers read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from app.engine.sequence import Timings
from app.engine.snapshot import Histogram as HistogramSnapshot  # prometheus_client has a Histogram, too
from app.training.figures import LEASE_LOST, RETRY_REASONS, TrainingSnapshot

OUTCOMES = ("ok", "client_error", "rejected", "cancelled", "deadline", "error")
REJECTIONS = ("queue_full", "tenant_rate", "tenant_tokens", "draining", "memory", "breaker")
CANCELLATIONS = ("client_disconnect", "drain", "erase")
TIERS = ("pool", "host", "disk", "s3")
FINISH_REASONS = ("stop", "length", "abort", "deadline", "error")
AUTH_FAILURES = ("missing", "invalid", "tenant_required", "tenant_mismatch", "erased", "scope")
LOAD_STAGES = ("fetch", "verify", "parse", "place")
LOAD_FAILURES = ("not_found", "digest", "format", "rank", "base_mismatch", "no_modules", "nan", "timeout", "s3")
STORE_OPS = ("head", "get", "put", "create", "list", "delete")
EVICTIONS = ("lru", "superseded", "erased", "corrupt")

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTERVAL_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STORE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True, slots=True)
class TierSnapshot:
    """One cache tier: bytes and entries held, its budget, and evictions by reason since the start."""

    num_bytes: int
    num_entries: int
    capacity_bytes: int
    evictions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """One adapter in the rank pool."""

    tenant: str
    digest: str
    name: str  # as clients spell it
    rank: int
    num_leases: int
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class ServingSnapshot:
    """The state of the engine and its caches at one moment; immutable, made without waiting for a step."""

    num_waiting: int = 0
    num_running: int = 0
    kv_usage: float = 0.0  # fraction of KV blocks in use
    kv_block_size: int = 0  # tokens
    kv_num_blocks: int = 0
    resident: tuple[ResidentAdapter, ...] = ()
    loading: tuple[str, ...] = ()  # names of adapters that requests wait for
    free_rows: int = 0
    total_rows: int = 0
    heartbeat_age_s: float = 0.0
    is_loaded: bool = True  # the base is loaded and its digest known
    is_draining: bool = False
    tiers: Mapping[str, TierSnapshot] = field(default_factory=dict)
    load_failures: Mapping[str, int] = field(default_factory=dict)
    load_seconds: Mapping[str, HistogramSnapshot] = field(default_factory=dict)  # by stage
    step_seconds: Mapping[str, HistogramSnapshot] = field(default_factory=dict)  # by phase
    batch_rows: HistogramSnapshot | None = None
    batch_adapters: HistogramSnapshot | None = None
    num_generations: int = 0  # adapters replaced in the pool since the start
    num_quarantined: int = 0
    num_stale_served: int = 0
    num_oom: Mapping[str, int] = field(default_factory=dict)
    integrity_failures: Mapping[str, int] = field(default_factory=dict)
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0
    breaker_state: int | None = None  # 0 closed, 1 half-open, 2 open; None without an S3 store
    degraded: tuple[str, ...] = ()  # what is down without stopping cached work, e.g. "s3"

    @property
    def max_adapters(self) -> int:
        """How many adapters the pool could hold: those resident and those that unleased rows still attract.

        Routers compare it with resident + waiting, so a full but idle pool must still look inviting.
        """
        idle = sum(adapter.rank for adapter in self.resident if not adapter.num_leases and not adapter.is_pinned)
        ranks = sorted(adapter.rank for adapter in self.resident)
        median = ranks[len(ranks) // 2] if ranks else 16
        return len(self.resident) + (self.free_rows + idle) // max(median, 1)


class Metrics:
    """The program's metrics, on a registry of their own."""

    def __init__(
        self,
        *,
        model_name: str,
        snapshot: Callable[[], ServingSnapshot],
        training: Callable[[], TrainingSnapshot] = TrainingSnapshot,
        max_context: int = 8192,
        build: Mapping[str, str] | None = None,
    ) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series per child, read by nobody
        self.registry = CollectorRegistry(auto_describe=False)
        self._model = model_name
        self._make_request_metrics()
        self._make_vllm_metrics(max_context)
        info = Gauge(
            "lodger_build_info",
            "What runs here.",
            ("version", "commit", "base_model", "quant", "device"),
            registry=self.registry,
        )
        facts = build or {}
        info.labels(*(facts.get(name, "") for name in ("version", "commit", "base_model", "quant", "device"))).set(1)
        self.registry.register(_SnapshotCollector(snapshot, training, model_name))

    def _make_request_metrics(self) -> None:
        registry = self.registry
        self._requests = Counter(
            "lodger_requests_total", "HTTP requests answered.", ("route", "outcome", "code"), registry=registry
        )
        self._rejected = Counter(
            "lodger_requests_rejected_total", "Requests refused before any work.", ("reason",), registry=registry
        )
        self._cancelled = Counter(
            "lodger_requests_cancelled_total", "Requests ended from outside.", ("reason",), registry=registry
        )
        self._adapter_requests = Counter(
            "lodger_adapter_requests_total",
            "Sequences with an adapter, by where it was found.",
            ("tier",),
            registry=registry,
        )
        self._auth_failures = Counter(
            "lodger_auth_failures_total", "Requests refused for their key or tenant.", ("reason",), registry=registry
        )
        for counter, reasons in (
            (self._rejected, REJECTIONS),
            (self._cancelled, CANCELLATIONS),
            (self._adapter_requests, TIERS),
            (self._auth_failures, AUTH_FAILURES),
        ):
            for reason in reasons:
                counter.labels(reason)
        self._store_calls = Counter(
            "lodger_s3_requests_total", "Calls of the blob store.", ("op", "outcome"), registry=registry
        )
        self._store_seconds = Histogram(
            "lodger_s3_request_seconds",
            "How long calls of the blob store took.",
            ("op",),
            buckets=STORE_BUCKETS,
            registry=registry,
        )
        for op in STORE_OPS:
            self._store_calls.labels(op, "ok")
            self._store_seconds.labels(op)
        self._loop_lag = Histogram(
            "lodger_event_loop_lag_seconds",
            "How late the event loop runs a timer.",
            buckets=LAG_BUCKETS,
            registry=registry,
        )

    def _make_vllm_metrics(self, max_context: int) -> None:
        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", words, ("model_name",), buckets=buckets, registry=self.registry)
            return made.labels(self._model)

        def counter(name: str, words: str) -> Counter:
            return Counter(f"vllm:{name}", words, ("model_name",), registry=self.registry).labels(self._model)

        tokens = _token_buckets(max_context)
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._interval = histogram("inter_token_latency_seconds", "Between two tokens.", INTERVAL_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", LATENCY_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Arrival to admission.", LATENCY_BUCKETS)
        self._inference = histogram("request_inference_time_seconds", "Admission to end.", LATENCY_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "Admission to first token.", LATENCY_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "First token to end.", LATENCY_BUCKETS)
        self._prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", tokens)
        self._generated = histogram("request_generation_tokens", "Generated tokens of a sequence.", tokens)
        self._prompt_total = counter("prompt_tokens_total", "Prompt tokens of finished sequences.")
        self._generated_total = counter("generation_tokens_total", "Generated tokens of finished sequences.")
        self._success = Counter(
            "vllm:request_success_total",
            "Sequences ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        for reason in FINISH_REASONS:
            self._success.labels(self._model, reason)

    def expect_routes(self, routes: Iterable[str]) -> None:
        """Create each route's series at 0, so that `rate()` sees the first request."""
        for route in routes:
            self._requests.labels(route, "ok", "")

    def request_finished(self, route: str, outcome: str, code: str) -> None:
        """One HTTP request is answered; `route` is a template from our own routes, `code` from the error table."""
        self._requests.labels(route, outcome, code).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def cancelled(self, reason: str) -> None:
        self._cancelled.labels(reason).inc()

    def auth_failed(self, reason: str) -> None:
        self._auth_failures.labels(reason).inc()

    def store_call(self, op: str, outcome: str, seconds: float) -> None:
        """One call of an S3 store has ended; any thread."""
        self._store_calls.labels(op, outcome).inc()
        self._store_seconds.labels(op).observe(seconds)

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def token_intervals(self, seconds: Iterable[float]) -> None:
        """Times between consecutive tokens of running sequences, one step's worth."""
        for value in seconds:
            self._interval.observe(value)

    def sequence_finished(self, timings: Timings | None, reason: str) -> None:
        """A sequence reached its one end; what it never reached is not observed."""
        self._success.labels(self._model, reason).inc()
        if timings is None:
            return
        if timings.tier is not None:
            self._adapter_requests.labels(timings.tier).inc()
        self._e2e.observe(timings.finished - timings.arrival)
        self._prompt_total.inc(timings.prompt_tokens)
        self._generated_total.inc(timings.generated_tokens)
        self._prompt_tokens.observe(timings.prompt_tokens)
        self._generated.observe(timings.generated_tokens)
        if timings.admitted is None:
            return
        self._queue.observe(timings.admitted - timings.arrival)
        self._inference.observe(timings.finished - timings.admitted)
        if timings.first_token is None:
            return
        self._ttft.observe(timings.first_token - timings.arrival)
        self._prefill.observe(timings.first_token - timings.admitted)
        self._decode.observe(timings.finished - timings.first_token)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type, OpenMetrics where `accept` asks for it. Runs in a worker thread."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _SnapshotCollector(Collector):
    """Turns one snapshot into gauges at scrape: one consistent moment, no stale label sets."""

    def __init__(
        self, snapshot: Callable[[], ServingSnapshot], training: Callable[[], TrainingSnapshot], model_name: str
    ) -> None:
        self._snapshot, self._training = snapshot, training
        self._model = model_name
        self._lora: tuple[str, str] = ("", "")
        self._lora_changed_at = time.time()

    def collect(self) -> Iterator[Metric]:
        now, training = self._snapshot(), self._training()
        yield from self._engine_gauges(now)
        yield from self._lora_gauges(now)
        yield from self._cache_metrics(now)
        yield from self._totals(now, {**now.num_oom, "train": training.num_out_of_memory})
        yield from _training_metrics(training)

    def _engine_gauges(self, now: ServingSnapshot) -> Iterator[Metric]:
        labels = {"model_name": self._model, "engine": "0"}
        for name, words, value in (
            ("vllm:num_requests_waiting", "Sequences queued.", now.num_waiting),
            ("vllm:num_requests_running", "Sequences in the batch.", now.num_running),
            ("vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", now.kv_usage),
        ):
            yield _labelled_gauge(name, words, labels, value)
        blocks = {"block_size": str(now.kv_block_size), "num_gpu_blocks": str(now.kv_num_blocks)}
        yield _labelled_gauge("vllm:cache_config_info", "The KV cache's shape.", blocks, 1)
        yield _gauge("lodger_engine_heartbeat_age_seconds", "Since the engine last ticked.", now.heartbeat_age_s)
        if now.breaker_state is not None:
            yield _gauge("lodger_s3_breaker_state", "0 closed, 1 half-open, 2 open.", now.breaker_state)
        yield _gauge("lodger_draining", "1 while the server refuses new work.", float(now.is_draining))

    def _lora_gauges(self, now: ServingSnapshot) -> Iterator[Metric]:
        """Running means resident and ready, waiting means queued for a load: routers score by it."""
        running = ",".join(sorted({adapter.name for adapter in now.resident}))
        waiting = ",".join(sorted(set(now.loading)))
        if (running, waiting) != self._lora:
            self._lora, self._lora_changed_at = (running, waiting), time.time()
        lists = {
            "max_lora": str(now.max_adapters),
            "running_lora_adapters": running,
            "waiting_lora_adapters": waiting,
        }
        words = "Adapters resident and queued for a load; the value is the time of the last change."
        yield _labelled_gauge("vllm:lora_requests_info", words, lists, self._lora_changed_at)
        num_host = now.tiers["host"].num_entries if "host" in now.tiers else 0
        yield _gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters in the rank pool.", len(now.resident))
        yield _gauge("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.", num_host)
        yield _gauge("vllm:max_gpu_lora_adapters", "Adapters that the rank pool can hold now.", now.max_adapters)
        yield _gauge("lodger_adapter_leases", "Leases held.", sum(adapter.num_leases for adapter in now.resident))
        yield _gauge("lodger_adapter_pinned", "Adapters pinned.", sum(adapter.is_pinned for adapter in now.resident))
        yield _gauge("lodger_adapter_generations", "Adapters placed in the pool so far.", now.num_generations)
        yield _gauge("lodger_adapter_quarantined", "Adapter versions no longer served.", now.num_quarantined)

    def _cache_metrics(self, now: ServingSnapshot) -> Iterator[Metric]:
        held = GaugeMetricFamily("lodger_adapter_cache_bytes", "Bytes of adapters.", labels=("tier",))
        entries = GaugeMetricFamily("lodger_adapter_cache_entries", "Adapters.", labels=("tier",))
        budget = GaugeMetricFamily("lodger_adapter_cache_capacity_bytes", "The tier's budget.", labels=("tier",))
        evicted = CounterMetricFamily("lodger_adapter_evictions", "Entries let go.", labels=("tier", "reason"))
        for name, tier in now.tiers.items():
            held.add_metric((name,), tier.num_bytes)
            entries.add_metric((name,), tier.num_entries)
            budget.add_metric((name,), tier.capacity_bytes)
            for reason in EVICTIONS:
                evicted.add_metric((name, reason), tier.evictions.get(reason, 0))
        yield from (held, entries, budget, evicted)
        failed = CounterMetricFamily("lodger_adapter_load_failures", "Loads that failed.", labels=("reason",))
        for reason in LOAD_FAILURES:
            failed.add_metric((reason,), now.load_failures.get(reason, 0))
        yield failed
        yield from _histograms("lodger_adapter_load_seconds", "A load's stages.", "stage", now.load_seconds)
        yield from _histograms("lodger_engine_step_seconds", "Engine steps.", "phase", now.step_seconds)
        for name, words, histogram in (
            ("lodger_batch_rows", "Sequences in a step.", now.batch_rows),
            ("lodger_batch_distinct_adapters", "Adapters in a step.", now.batch_adapters),
        ):
            if histogram is not None:
                yield HistogramMetricFamily(name, words, buckets=_cumulative(histogram), sum_value=histogram.total)

    def _totals(self, now: ServingSnapshot, num_oom: Mapping[str, int]) -> Iterator[Metric]:
        stale = CounterMetricFamily("lodger_stale_served", "Names resolved from memory while the store was down.")
        stale.add_metric((), now.num_stale_served)
        yield stale
        for name, words, label, kinds, counts in (
            ("lodger_oom", "Times memory ran out.", "phase", ("prefill", "decode", "load", "train"), num_oom),
            (
                "lodger_integrity_failures",
                "Bytes that are not what was published.",
                "kind",
                ("base", "adapter", "receipt", "signature"),
                now.integrity_failures,
            ),
        ):
            family = CounterMetricFamily(name, words, labels=(label,))
            for kind in kinds:
                family.add_metric((kind,), counts.get(kind, 0))
            yield family
        for name, words, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", now.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", now.prefix_hits),
        ):
            counter = CounterMetricFamily(name, words, labels=("model_name",))
            counter.add_metric((self._model,), value)
            yield counter


def _training_metrics(now: TrainingSnapshot) -> Iterator[Metric]:
    """Jobs of all processes, and what this one's trainer did."""
    jobs = GaugeMetricFamily("lodger_jobs", "Fine-tuning jobs.", labels=("state",))
    for state, count in now.jobs.items():
        jobs.add_metric((state,), count)
    yield jobs
    yield _gauge("lodger_job_queue_age_seconds", "Age of the job that waits longest.", now.queue_age_s)
    if now.last_loss is not None:
        yield _gauge("lodger_train_loss", "Training loss of the newest step of any job.", now.last_loss)
    yield from _histograms("lodger_job_seconds", "Creation of a job to its end.", "outcome", now.job_seconds)
    retries = CounterMetricFamily("lodger_job_retries", "Work of jobs that is done again.", labels=("reason",))
    for reason in RETRY_REASONS:
        retries.add_metric((reason,), now.retries.get(reason, 0))
    yield retries
    for name, words, value in (
        ("lodger_job_lease_lost", "Jobs taken back from silent workers.", now.retries.get(LEASE_LOST, 0)),
        ("lodger_train_tokens", "Tokens that this process trained or measured.", now.num_tokens),
    ):
        counter = CounterMetricFamily(name, words)
        counter.add_metric((), value)
        yield counter


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(name, words, value=value)


def _labelled_gauge(name: str, words: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, words, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _histograms(name: str, words: str, label: str, values: Mapping[str, HistogramSnapshot]) -> Iterator[Metric]:
    if values:
        family = HistogramMetricFamily(name, words, labels=(label,))
        for key, histogram in values.items():
            family.add_metric((key,), buckets=_cumulative(histogram), sum_value=histogram.total)
        yield family


def _cumulative(histogram: HistogramSnapshot) -> list[tuple[str, float]]:
    buckets, seen = [], 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        seen += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(seen)))
    return buckets


def _token_buckets(max_context: int) -> tuple[float, ...]:
    """1 2 5 10 20 50 … up to the context limit."""
    buckets: list[float] = []
    scale = 1
    while scale <= max_context:
        buckets.extend(float(step * scale) for step in (1, 2, 5) if step * scale <= max_context)
        scale *= 10
    return tuple(buckets)
