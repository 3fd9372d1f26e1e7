from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from app.engine.sequence import Timings
from app.metrics import HistogramSnapshot, Metrics, ResidentAdapter, ServingSnapshot, TierSnapshot

ADAPTER = ResidentAdapter("acme", "a" * 64, "support", rank=8, num_leases=1, is_pinned=False)
TIMINGS = Timings(
    arrival=100.0,
    admitted=100.5,
    first_token=101.0,
    finished=103.0,
    prompt_tokens=7,
    generated_tokens=5,
    cached_tokens=2,
    tier="s3",
)


def make(snapshot: ServingSnapshot | None = None, **options: Any) -> Metrics:
    return Metrics(model_name="base", snapshot=lambda: snapshot or ServingSnapshot(), **options)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    page = metrics.render()[0].decode()
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def test_finished_sequence_counts_once_everywhere() -> None:
    metrics = make()
    metrics.sequence_finished(TIMINGS, "stop")
    base = {"model_name": "base"}
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", **base) == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="length", **base) == 0
    assert value(metrics, "vllm:prompt_tokens_total", **base) == 7
    assert value(metrics, "vllm:generation_tokens_total", **base) == 5
    assert value(metrics, "lodger_adapter_requests_total", tier="s3") == 1
    for name, seconds in (
        ("time_to_first_token_seconds", 1.0),
        ("e2e_request_latency_seconds", 3.0),
        ("request_queue_time_seconds", 0.5),
        ("request_prefill_time_seconds", 0.5),
        ("request_decode_time_seconds", 2.0),
        ("request_inference_time_seconds", 2.5),
        ("request_prompt_tokens", 7),
        ("request_generation_tokens", 5),
    ):
        assert value(metrics, f"vllm:{name}_sum", **base) == pytest.approx(seconds), name
        assert value(metrics, f"vllm:{name}_count", **base) == 1, name


def test_what_a_sequence_never_reached_is_not_observed() -> None:
    metrics = make()
    queued = Timings(1.0, None, None, 2.0, 7, 0, 0, None)
    metrics.sequence_finished(queued, "deadline")
    metrics.sequence_finished(None, "error")
    base = {"model_name": "base"}
    assert value(metrics, "vllm:time_to_first_token_seconds_count", **base) == 0
    assert value(metrics, "vllm:request_queue_time_seconds_count", **base) == 0
    assert value(metrics, "vllm:e2e_request_latency_seconds_count", **base) == 1


def test_closed_labels_exist_at_zero_from_the_start() -> None:
    metrics = make()
    metrics.expect_routes(["/v1/chat/completions"])
    for reason in ("queue_full", "tenant_rate", "draining"):
        assert value(metrics, "lodger_requests_rejected_total", reason=reason) == 0
    assert value(metrics, "lodger_requests_total", route="/v1/chat/completions", outcome="ok", code="") == 0
    for tier in ("pool", "host", "disk", "s3"):
        assert value(metrics, "lodger_adapter_requests_total", tier=tier) == 0
    assert value(metrics, "lodger_oom_total", phase="decode") == 0


def test_gauges_follow_the_snapshot() -> None:
    snapshot = ServingSnapshot(
        num_waiting=3,
        num_running=4,
        kv_usage=0.25,
        kv_block_size=16,
        kv_num_blocks=100,
        resident=(ADAPTER,),
        free_rows=24,
        total_rows=32,
        tiers={"host": TierSnapshot(10, 2, 100, {"lru": 5})},
        step_seconds={"decode": HistogramSnapshot((0.1, 1.0), (2, 1, 1), 4.0)},
        batch_rows=HistogramSnapshot((1.0, 2.0), (1, 0, 0), 1.0),
        prefix_hits=9,
    )
    metrics = make(snapshot)
    labels = {"model_name": "base", "engine": "0"}
    assert value(metrics, "vllm:num_requests_waiting", **labels) == 3
    assert value(metrics, "vllm:num_requests_running", **labels) == 4
    assert value(metrics, "vllm:kv_cache_usage_perc", **labels) == 0.25
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1
    assert value(metrics, "lodger_adapter_cache_bytes", tier="host") == 10
    assert value(metrics, "lodger_adapter_evictions_total", tier="host", reason="lru") == 5
    assert value(metrics, "lodger_engine_step_seconds_bucket", phase="decode", le="1.0") == 3
    assert value(metrics, "lodger_engine_step_seconds_count", phase="decode") == 4
    assert value(metrics, "lodger_batch_rows_sum") == 1
    assert value(metrics, "lodger_adapter_leases") == 1
    assert value(metrics, "vllm:prefix_cache_hits_total", model_name="base") == 9


def lora_info(metrics: Metrics) -> tuple[dict[str, str], float]:
    page = metrics.render()[0].decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    (sample,) = families["vllm:lora_requests_info"].samples
    return sample.labels, sample.value


def test_lora_lists_are_one_series_that_names_the_resident_and_the_loading() -> None:
    state = [ServingSnapshot(resident=(ADAPTER,), loading=("sales",), free_rows=24)]
    metrics = Metrics(model_name="base", snapshot=lambda: state[0])
    labels, changed_at = lora_info(metrics)
    assert labels == {
        "max_lora": "4",
        "running_lora_adapters": "support",
        "waiting_lora_adapters": "sales",
    }
    assert changed_at == pytest.approx(time.time(), abs=5)
    assert lora_info(metrics)[1] == changed_at, "nothing changed"
    state[0] = ServingSnapshot(resident=(ADAPTER,), free_rows=24)
    assert lora_info(metrics)[1] > changed_at


def test_full_but_idle_pool_still_attracts_adapters() -> None:
    idle = [ResidentAdapter("t", str(i) * 64, f"a{i}", 16, 0, False) for i in range(4)]
    assert ServingSnapshot(resident=tuple(idle), free_rows=0).max_adapters == 8
    leased = [ResidentAdapter("t", str(i) * 64, f"a{i}", 16, 1, False) for i in range(4)]
    assert ServingSnapshot(resident=tuple(leased), free_rows=0).max_adapters == 4


def test_page_parses_in_both_formats_and_has_no_created_series() -> None:
    metrics = make(ServingSnapshot(tiers={"disk": TierSnapshot(0, 0, 1)}))
    metrics.sequence_finished(TIMINGS, "stop")
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    assert b"_created" not in text
    open_text, open_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert open_type.startswith("application/openmetrics-text")
    assert open_text.endswith(b"# EOF\n")
    assert {family.name for family in parse_openmetrics(open_text.decode())} >= {"lodger_requests", "lodger_draining"}


def many_adapters() -> Iterator[ResidentAdapter]:
    random.seed(0)
    for i in range(2000):
        yield ResidentAdapter(f"tenant-{i % 1000}", f"{i:064x}", f"adapter-{i}", 16, 0, False)


def test_page_stays_small_and_quick_with_thousands_of_adapters() -> None:
    metrics = make(ServingSnapshot(resident=tuple(many_adapters())))
    for i in range(5000):
        metrics.request_finished("/v1/chat/completions", "ok", "")
        metrics.sequence_finished(TIMINGS, ("stop", "length")[i % 2])
    took = []
    for _ in range(5):
        began = time.perf_counter()
        page, _ = metrics.render()
        took.append(time.perf_counter() - began)
    assert len(page) < 200_000
    assert min(took) < 0.02


def test_two_instances_do_not_share_anything() -> None:
    first, second = make(), make()
    first.rejected("queue_full")
    assert value(second, "lodger_requests_rejected_total", reason="queue_full") == 0
