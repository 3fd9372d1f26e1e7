"""The benchmark's own arithmetic: workloads fixed by their seed, figures, refusals by name, what counts as equal."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import ObjectNotFound
from adapters.store import DirectoryStore
from app.__main__ import build_app
from app.bench import plot
from app.bench.cold import ARRIVALS, KINDS, measure_cold
from app.bench.coserving import (
    CoservingResult,
    Kind,
    LoadPoint,
    Window,
    measure_coserving,
    random_arrivals,
)
from app.bench.exactness import differences, require_equal
from app.bench.figures import Percentiles, ProcessFacts, RequestTrace, RoundTrace, make_row, percentile, ratio
from app.bench.http_client import news_times, sse_events
from app.bench.http_system import server_environment
from app.bench.machine import MachineFacts
from app.bench.process import Child
from app.bench.report import Report, wide_console
from app.bench.slow_store import SlowStore
from app.bench.workload import (
    BenchFailed,
    BenchOptionInvalid,
    Job,
    WorkloadSpec,
    by_adapter,
    cold_labels,
    make_jobs,
    warm_labels,
    warm_up_jobs,
)
from app.settings import Settings

VOCAB = 100
FACTS = ProcessFacts(1.0, 10**9, 2, "float32", "nf4, dense copy")


def trace(index: int, *news_at: float, asked_at: float = 0.0, cold: bool = False, extra: bool = False) -> RequestTrace:
    return RequestTrace(index, cold, asked_at, news_at, len(news_at), tuple(range(len(news_at))), extra)


# Workloads


def test_the_seed_fixes_prompts_adapters_and_order() -> None:
    spec = WorkloadSpec(zipf=1.0, prompt_tokens=(3, 9), seed=7)
    assert make_jobs(spec, 8, VOCAB) == make_jobs(spec, 8, VOCAB)
    assert make_jobs(spec, 8, VOCAB) != make_jobs(replace(spec, seed=8), 8, VOCAB)
    lengths = {len(job.prompt) for job in make_jobs(replace(spec, requests=200), 8, VOCAB)}
    assert (min(lengths), max(lengths)) == (3, 9)


def test_without_skew_every_batch_has_as_many_adapters_as_requests() -> None:
    jobs = make_jobs(WorkloadSpec(), 8, VOCAB)
    assert len(jobs) == 16
    assert [len(by_adapter(jobs[i : i + 8])) for i in (0, 8)] == [8, 8]


def test_skew_makes_the_first_adapter_the_most_popular() -> None:
    jobs = make_jobs(WorkloadSpec(adapters=20, zipf=1.2, requests=2000), 8, VOCAB)
    counts = Counter(job.adapter for job in jobs)
    assert counts["warm-0000"] > 2 * counts["warm-0003"] > 0
    assert set(counts) <= set(warm_labels(20))


def test_cold_requests_are_a_share_of_all_and_each_has_an_adapter_of_its_own() -> None:
    spec = WorkloadSpec(cold_share=0.25, requests=40)
    first = make_jobs(spec, 8, VOCAB, cold_labels(0, 10))
    second = make_jobs(spec, 8, VOCAB, cold_labels(10, 10))
    cold = [job.adapter for job in first if job.is_cold]
    assert sorted(map(str, cold)) == list(cold_labels(0, 10))
    assert [job.prompt for job in first] == [job.prompt for job in second]
    assert not set(cold) & {job.adapter for job in second}


def test_no_adapters_is_the_base_alone() -> None:
    spec = WorkloadSpec(adapters=0)
    assert {job.adapter for job in make_jobs(spec, 8, VOCAB)} == {None}
    assert [job.adapter for job in warm_up_jobs(spec, (), VOCAB)] == [None]
    assert [job.adapter for job in warm_up_jobs(spec, warm_labels(3), VOCAB)] == list(warm_labels(3))


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--adapters", {"adapters": -1}),
        ("--rank", {"rank": 0}),
        ("--rank", {"rank": 65}),
        ("--targets", {"targets": ("q_proj", "lm_head")}),
        ("--targets", {"targets": ()}),
        ("--concurrency", {"concurrency": ()}),
        ("--concurrency", {"concurrency": (0,)}),
        ("--concurrency", {"concurrency": (4, 4)}),
        ("--requests", {"requests": 0}),
        ("--requests", {"requests": 15}),
        ("--prompt-tokens", {"prompt_tokens": (0, 4)}),
        ("--prompt-tokens", {"prompt_tokens": (9, 4)}),
        ("--output-tokens", {"output_tokens": 1}),
        ("--output-tokens", {"output_tokens": 512}),
        ("--zipf", {"zipf": float("nan")}),
        ("--zipf", {"zipf": -1.0}),
        ("--cold-share", {"cold_share": 1.01}),
        ("--mode", {"mode": "online"}),
        ("--mode", {"mode": "none"}),
        ("--baseline", {"baseline": "vllm"}),
        ("--train", {"train": "maybe"}),
        ("--loads", {"loads": (0.5,)}),
        ("--loads", {"train": "on", "loads": ()}),
        ("--loads", {"train": "on", "loads": (0.5, 1.5)}),
        ("--loads", {"train": "on", "loads": (0.5, 0.5)}),
        ("--training-shares", {"training_shares": (0.5,)}),
        ("--training-shares", {"train": "on", "training_shares": (0.0,)}),
        ("--training-shares", {"train": "on", "training_shares": (0.95,)}),
        ("--training-shares", {"train": "on", "training_shares": (0.2, 0.2)}),
        ("--rounds", {"rounds": 0}),
        ("--cold-store-delay", {"cold_store_delay_s": -1.0}),
        ("--cold-store-delay", {"cold_store_delay_s": 10.0}),
        ("--seed", {"seed": -1}),
        ("--no-stream", {"stream": False}),
    ],
)
def test_an_impossible_value_is_refused_by_name(option: str, changes: dict[str, Any]) -> None:
    limits = {"max_context": 512, "max_rank": 64, "pool_rows": 256, "object_timeout_s": 9.0}
    WorkloadSpec().check(**limits)
    with pytest.raises(BenchOptionInvalid) as caught:
        WorkloadSpec(**changes).check(**limits)
    assert caught.value.param == option
    assert caught.value.message.startswith(option)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--adapters", "many"),
        ("--concurrency", "8,x"),
        ("--prompt-tokens", "64-"),
        ("--concurrency", ""),
        ("--loads", "half"),
    ],
)
def test_a_value_that_is_no_number_is_a_usage_error(arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(build_app(), ["bench", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


# Figures


def test_percentiles_interpolate_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert Percentiles.of([]) is None
    assert Percentiles.of([0.002]) == Percentiles(2.0, 2.0, 2.0)


def test_a_row_takes_latencies_of_all_rounds_and_keeps_cold_ones_apart() -> None:
    slow = RoundTrace(2.0, (trace(0, 0.5, 0.6, 0.8), trace(1, 1.5, 1.6, cold=True)))
    fast = RoundTrace(1.0, (trace(0, 0.5, 0.6, 0.8), trace(1, 1.5, 1.6, cold=True)))
    row = make_row("offline", 2, 1, [slow, fast, fast], FACTS)
    assert row.rounds_tokens_per_s == (2.5, 5.0, 5.0)
    assert row.tokens_per_s == 5.0
    assert row.ttft_ms is not None
    assert row.ttft_ms.p50 == pytest.approx(500)
    assert row.cold_ttft_ms is not None
    assert row.cold_ttft_ms.p99 == pytest.approx(1500)
    assert row.inter_token_ms is not None
    assert row.inter_token_ms.p50 == pytest.approx(100)


def test_a_ratio_compares_rounds_that_were_neighbours() -> None:
    def row(system: str, *walls: float) -> Any:
        return make_row(system, 1, 1, [RoundTrace(wall, (trace(0, 1.0, 2.0),)) for wall in walls], FACTS)

    # The machine slowed down to a tenth in the second round: both were hit, and the ratio is not.
    assert ratio(row("offline", 1, 10, 1), row("peft-mixed", 3, 30, 3)) == pytest.approx(3)


# Equal tokens


def jobs_of(count: int) -> tuple[Job, ...]:
    return tuple(Job(i, f"warm-{i:04d}", (1, 2), 3) for i in range(count))


def answered(*answers: tuple[int, ...]) -> RoundTrace:
    return RoundTrace(1.0, tuple(RequestTrace(i, False, 0.0, (), len(a), a) for i, a in enumerate(answers)))


def test_equal_tokens_count_once_for_each_peer() -> None:
    ours = answered((1, 2, 3), (4, 5, 6))
    assert require_equal(jobs_of(2), ours, {"peft-mixed": ours, "peft-swap": ours}) == 12


def test_a_different_token_voids_the_benchmark() -> None:
    ours, theirs = answered((1, 2, 3), (4, 5, 6)), answered((1, 2, 3), (4, 9, 6))
    with pytest.raises(BenchFailed, match=r"peft-mixed: request 1 \(warm-0001\), token 1: ours is 5, theirs 9"):
        require_equal(jobs_of(2), ours, {"peft-mixed": theirs})


@pytest.mark.parametrize("theirs", [answered((1, 2, 3)), answered((1, 2, 3), (4, 5))])
def test_a_missing_answer_or_token_is_a_difference(theirs: RoundTrace) -> None:
    assert len(differences(jobs_of(2), answered((1, 2, 3), (4, 5, 6)), {"peft-swap": theirs})) == 1


# HTTP


def test_text_counts_when_the_piece_that_completes_its_event_came() -> None:
    def event(text: str) -> bytes:
        return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"

    first, second, last = event("a"), event("b"), event("")
    whole = first + second + last + b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    pieces = [(1.0, whole[:5]), (2.0, whole[5 : len(first) + 3]), (3.0, whole[len(first) + 3 :])]
    assert news_times(pieces) == (2.0, 3.0)
    assert [event["usage"] for event in sse_events(whole) if event.get("usage")] == [{"completion_tokens": 2}]


def test_an_error_in_the_stream_voids_the_benchmark() -> None:
    with pytest.raises(BenchFailed, match="out of luck"):
        list(sse_events(b'data: {"error":{"message":"out of luck"}}\n\n'))


def test_the_server_gets_our_settings_and_none_of_the_users(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, threads=3, prefix_caching=False, port=8000, kv_cache_bytes="1GiB")
    result = server_environment(settings, {"PATH": "/bin", "LODGER_THREADS": "9", "LODGER_S3_REGION": "moon"})
    assert result["LODGER_THREADS"] == "3"
    assert result["LODGER_PREFIX_CACHING"] == "False"
    assert result["LODGER_KV_CACHE_BYTES"] == str(1 << 30)
    assert result["LODGER_PORT"] == "0"
    assert result["PATH"] == "/bin"
    assert "LODGER_S3_REGION" not in result


# Cold arrivals and training


def test_cold_windows_take_turns_and_leave_the_arrivals_own_tokens_out() -> None:
    spec = WorkloadSpec(cold_store_delay_s=1.0, rounds=3)
    kinds: list[tuple[int, set[bool]]] = []
    used: list[str] = []

    def window(jobs: Any, concurrency: int, seconds: float, extras: Any) -> RoundTrace:
        kinds.append((len(extras), {extra.job.is_cold for extra in extras}))
        used.extend(extra.job.adapter for extra in extras if extra.job.is_cold)
        gap = 0.011 if used and extras and extras[0].job.is_cold else 0.010
        return RoundTrace(1.0, (trace(0, 1.0, 1.0 + gap), trace(1, 2.0, 9.0, extra=True)))

    result = measure_cold(spec, VOCAB, 40, window)
    assert kinds == [(0, set()), (ARRIVALS, {False}), (ARRIVALS, {True})] * 3
    assert used == list(cold_labels(40, 3 * ARRIVALS))
    assert result.ratio("alone") == pytest.approx(1.1)
    assert [result.p95(kind) for kind in KINDS] == pytest.approx([10, 10, 11])


def test_loads_below_one_come_at_random_moments_and_shares_of_training_take_turns() -> None:
    spec = WorkloadSpec(train="both", rounds=2, output_tokens=10, concurrency=(4,), loads=(0.5, 1.0))
    served: list[tuple[int, float]] = []

    def call(method: str, *args: Any) -> Any:
        if method != "serve":
            return 50.0
        _, _, arrivals, share, _ = args
        served.append((len(arrivals), share))
        if len(served) == 1:
            return Window(RoundTrace(0.02, (trace(0, 1.0, 1.01),)), 0.0)  # 100 tokens/s
        return Window(RoundTrace(10.0, (trace(0, 1.0, 1.01 + share),)), 50 * share)

    result = measure_coserving(spec, VOCAB, (0.4, 0.2), call)
    assert result.full_tokens_per_s == pytest.approx(100)
    assert served[1:] == [(count, share) for count in (200, 0) for share in (0.0, 0.2, 0.4, 0.4, 0.2, 0.0)]
    for point, load in zip(result.points, spec.loads, strict=True):
        assert point.load == load
        assert point.off is not None
        assert point.off.inter_token_ms.p95 == pytest.approx(10)
        assert [kind.training_share for kind in point.on] == [0.2, 0.4]
        assert [result.share_kept(kind) for kind in point.on] == pytest.approx([0.2, 0.4])
        assert [point.p95_ratio(kind) for kind in point.on] == pytest.approx([21, 41])
        assert all(len(kind.window_p95_ms) == 2 for kind in point.on)


def test_latencies_are_of_all_windows_of_a_kind_together() -> None:
    spec = WorkloadSpec(train="on", rounds=2, output_tokens=10, concurrency=(4,), loads=(1.0,))
    gaps = iter([0.01, 0.1, 0.3])

    def call(method: str, *args: Any) -> Any:
        return 50.0 if method != "serve" else Window(RoundTrace(1.0, (trace(0, 1.0, 1.0 + next(gaps)),)), 1.0)

    (point,) = measure_coserving(spec, VOCAB, (0.4,), call).points
    assert point.off is None
    assert point.on[0].window_p95_ms == pytest.approx((100, 300))
    assert point.on[0].inter_token_ms.p50 == pytest.approx(200)
    assert point.p95_ratio(point.on[0]) is None


def test_random_arrivals_are_so_many_in_the_window() -> None:
    arrivals = random_arrivals(jobs_of(3), 1000, 200.0, seed="s")
    moments = [extra.at_s for extra in arrivals]
    assert len(arrivals) == 1000
    assert moments == sorted(moments)
    assert 0 <= moments[0] < 5
    assert 195 < moments[-1] <= 200
    assert 450 < sum(at < 100 for at in moments) < 550
    assert arrivals == random_arrivals(jobs_of(3), 1000, 200.0, seed="s")
    assert arrivals != random_arrivals(jobs_of(3), 1000, 200.0, seed="t")


def test_a_slow_store_delays_reads_and_changes_nothing(tmp_path: Path) -> None:
    slept: list[float] = []
    store = SlowStore(DirectoryStore(tmp_path), 5.0, sleep=slept.append)
    assert store.put_if_absent("a/b", b"xyz")
    assert slept == []
    assert store.get("a/b", max_bytes=9) == b"xyz"
    assert store.get_range("a/b", 1, 1) == b"y"
    assert store.head("a/b").size == 3
    assert store.download("a/b", tmp_path / "copy", max_bytes=9).size == 3
    assert slept == [5.0] * 4
    assert [info.key for info in store.list("a/")] == ["a/b"]
    with pytest.raises(ObjectNotFound):
        store.get("a/c", max_bytes=9)


# Processes


class Echo:
    """Lives in a child process."""

    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self) -> None:
        raise ValueError("no such luck")

    def die(self) -> None:
        os._exit(3)

    def close(self) -> None: ...


def test_a_child_answers_reports_errors_and_its_death() -> None:
    child = Child(Echo, name="echo", start_timeout_s=60)
    try:
        assert child.call("add", 1, 2, timeout_s=30) == 3
        with pytest.raises(BenchFailed, match="no such luck"):
            child.call("fail", timeout_s=30)
        with pytest.raises(BenchFailed, match="echo died in 'die'"):
            child.call("die", timeout_s=30)
    finally:
        child.close()


# The report


def full_report() -> Report:
    machine = MachineFacts("A CPU", 2, 8 << 30, "cpu", 1.5, "3.11.7", {"torch": "2.13.0"}, 0.0)
    spec = WorkloadSpec(concurrency=(8,), mode="both", baseline="all", rounds=1)
    report = Report(spec, machine, "smol", tokens_checked=64)
    for system, wall in (("offline", 1.0), ("http", 1.1), ("peft-mixed", 4.0), ("peft-swap", 5.0)):
        report.rows.append(make_row(system, 8, 8, [RoundTrace(wall, (trace(0, 0.1, 0.2),))], FACTS))
    return report


def test_the_report_says_which_bars_are_met_and_that_the_machine_was_busy() -> None:
    report, console = full_report(), wide_console()
    with console.capture() as captured:
        report.print(console)
    text = captured.get()
    assert "offline / peft-mixed at 8: 4.00x (meets 3x)" in text
    assert "offline / peft-swap at 8: 5.00x (MISSES 6x)" in text
    assert "http / offline at 8: 0.91x (meets 0.85x)" in text
    assert "WARNING: the machine was busy" in text
    assert "64 greedy fp32 tokens equal PEFT's" in text
    assert "nf4, dense copy" in text


def test_the_json_holds_every_row_with_what_computed_it(tmp_path: Path) -> None:
    full_report().write_json(tmp_path / "bench.json")
    body = json.loads((tmp_path / "bench.json").read_text())
    assert [row["system"] for row in body["rows"]] == ["offline", "http", "peft-mixed", "peft-swap"]
    assert body["rows"][0]["facts"]["dtype"] == "float32"
    assert body["machine"]["is_busy"] is True
    assert [found["is_met"] for found in body["comparisons"]] == [True, False, True]


def coserving_report() -> Report:
    def kind(share: float, p95: float, trained: float) -> Kind:
        return Kind(share, Percentiles(100.0, p95, 300.0), Percentiles(400.0, 500.0, 600.0), (p95,), 25.0, trained)

    report = full_report()
    # Speed kept need not rise with the share: the plot has room for the first point, too.
    point = LoadPoint(0.5, kind(0.0, 200.0, 0.0), (kind(0.2, 250.0, 40.0), kind(0.4, 300.0, 30.0)))
    report.coserving = CoservingResult(8, 55.0, 80.0, 79.0, (point,))
    return report


def test_the_report_tells_the_curve_of_training_beside_serving(tmp_path: Path) -> None:
    report, console = coserving_report(), wide_console()
    with console.capture() as captured:
        report.print(console)
    text = captured.get()
    rows = [line for line in text.splitlines() if line.startswith("│ 0.5 │")]
    assert [("off" in row, "1.25x" in row, "1.50x" in row) for row in rows] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip
    assert "50 %" in rows[1]
    report.write_json(tmp_path / "bench.json")
    (point,) = json.loads((tmp_path / "bench.json").read_text())["coserving"]["points"]
    assert [(kind["p95_ratio"], kind["share_kept"]) for kind in point["on"]] == [(1.25, 0.5), (1.5, 0.375)]


def test_the_plot_of_training_beside_serving_shows_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(plot.plt, "close", shown.append)
    plot.write_coserving_plot(coserving_report(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = shown[0].axes
    drawn = axis.lines[0]
    assert list(drawn.get_xdata()) == [0, 50, 37.5]
    assert list(drawn.get_ydata()) == [1, 1.25, 1.5]
    low, high = axis.get_xlim()
    assert low <= 0
    assert high > 50
