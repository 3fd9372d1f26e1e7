"""The benchmark's systems on a tiny model: each answers the same work, with the same tokens, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.bench.coserving_system import CoservingSystem
from app.bench.engine_system import EngineSystem
from app.bench.exactness import require_equal
from app.bench.peft_system import PeftSystem, dense_twin
from app.bench.plot import write_plot
from app.bench.tenancy import Tenancy, furnish, scratch_settings
from app.bench.workload import (
    BenchFailed,
    Extra,
    WorkloadSpec,
    cold_labels,
    make_jobs,
    warm_labels,
    warm_up_jobs,
)
from app.bootstrap import load_base
from app.engine.base_spec import read_base_spec
from app.settings import Settings
from tests.tiny import build_base
from tests.unit.test_bench import full_report

VOCAB = 256
SPEC = WorkloadSpec(
    adapters=3, rank=4, concurrency=(4,), requests=8, prompt_tokens=(3, 20), output_tokens=6, cold_share=0.25, rounds=1
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("bench-data")
    base = build_base(root / "tiny-chat")
    return Settings(
        base_model=str(base), data_dir=root / "data", dtype="float32", device="cpu", threads=1, kv_cache_bytes=1 << 24
    )


@pytest.fixture
def tenancy(settings: Settings, tmp_path: Path) -> Tenancy:
    ours = scratch_settings(settings, tmp_path, base_dir=Path(settings.base_model), max_sequences=4)
    base = read_base_spec(settings.base_model, settings.data_dir, name=settings.base_id)
    return furnish(tmp_path, ours, SPEC, base, warm_labels(3), cold_labels(0, 6))


@pytest.fixture
def engine(tenancy: Tenancy) -> Iterator[EngineSystem]:
    system = EngineSystem(tenancy)
    system.warm_up(warm_up_jobs(SPEC, warm_labels(3), VOCAB))
    yield system
    system.close()


def test_engine_and_both_ways_of_peft_give_the_same_tokens(engine: EngineSystem, tenancy: Tenancy) -> None:
    jobs = make_jobs(SPEC, 4, VOCAB, cold_labels(0, 2))
    peft = PeftSystem(tenancy, warm_labels(3))
    peft.warm_up(warm_up_jobs(SPEC, warm_labels(3), VOCAB))
    ours = engine.round(jobs, 4)
    mixed = peft.mixed(jobs, 4)
    assert require_equal(jobs, ours, {"peft-mixed": mixed}) == 8 * 6
    assert require_equal(jobs[:4], ours, {"peft-swap": peft.swap(jobs, 4)}) == 4 * 6
    assert [trace.is_cold for trace in mixed.requests] == [job.is_cold for job in jobs]
    answers = {job.adapter: trace.tokens for job, trace in zip(jobs, mixed.requests, strict=True)}
    assert len(set(answers.values())) > 1


def test_the_check_sees_an_adapter_that_is_not_the_one_asked_for(engine: EngineSystem, tenancy: Tenancy) -> None:
    jobs = make_jobs(replace(SPEC, cold_share=0.0), 4, VOCAB)
    first, second = tenancy.directories["warm-0000"], tenancy.directories["warm-0001"]
    confused = replace(tenancy, directories={**tenancy.directories, "warm-0000": second, "warm-0001": first})
    with pytest.raises(BenchFailed, match="no speed counts"):
        require_equal(jobs, engine.round(jobs, 4), {"peft-mixed": PeftSystem(confused, warm_labels(3)).mixed(jobs, 4)})


def test_a_round_times_every_token_and_knows_what_was_cold(engine: EngineSystem) -> None:
    jobs = make_jobs(SPEC, 4, VOCAB, cold_labels(0, 2))
    trace = engine.round(jobs, 4)
    assert trace.num_tokens == 8 * 6
    assert sorted(request.index for request in trace.requests) == list(range(8))
    assert all(len(request.news_at) == 6 and len(request.gaps_s) == 5 for request in trace.requests)
    assert sum(request.is_cold for request in trace.requests) == 2
    assert engine.loader.snapshot().loads["s3"] == 3 + 2
    assert engine.facts().dtype == "float32"


def test_extras_are_answered_beside_the_streams_of_a_window(engine: EngineSystem) -> None:
    jobs = make_jobs(replace(SPEC, cold_share=0.0), 4, VOCAB)
    extras = [Extra(0.05, replace(jobs[0], adapter="cold-0000")), Extra(0.1, replace(jobs[1], adapter="cold-0001"))]
    trace = engine.window(jobs, 2, 0.3, extras)
    assert sum(request.is_extra for request in trace.requests) == 2
    assert all(request.is_cold == request.is_extra for request in trace.requests)
    assert trace.wall_s >= 0.3


def test_a_slow_store_makes_cold_requests_wait_and_nobody_else(tenancy: Tenancy) -> None:
    system = EngineSystem(tenancy, 0.3)
    try:
        system.warm_up(warm_up_jobs(SPEC, warm_labels(1), VOCAB))
        warm = replace(make_jobs(SPEC, 4, VOCAB, cold_labels(0, 2))[0], adapter="warm-0000")
        trace = system.window([warm], 1, 0.2, [Extra(0.0, replace(warm, adapter="cold-0000"))])
    finally:
        system.close()
    cold = next(request for request in trace.requests if request.is_cold)
    others = [request for request in trace.requests if not request.is_cold]
    assert cold.ttft_s is not None
    assert cold.ttft_s > 0.3
    assert len(others) > 1, "the stream was held up"


def test_training_goes_on_beside_serving_and_stops_when_told(tenancy: Tenancy) -> None:
    system = CoservingSystem(tenancy, SPEC)
    try:
        jobs = make_jobs(replace(SPEC, cold_share=0.0), 4, VOCAB)
        assert system.train_alone(0.2) > 0
        assert system.train_idle(0.2) > 0
        alone = {trace.index: trace.tokens for trace in system.round(jobs, 4).requests}
        off = system.serve(jobs, 2, (), 0.0, 0.2)
        on = system.serve(jobs, 2, [Extra(0.1 * i, jobs[i]) for i in range(4)], 0.4, 0.4)
    finally:
        system.close()
    assert off.trained_per_s == 0
    assert on.trained_per_s > 0
    assert len(on.trace.requests) == 4
    assert [r.tokens for r in on.trace.requests] == [alone[r.index] for r in on.trace.requests]


def test_the_peer_computes_on_the_very_values_that_we_serve(settings: Settings) -> None:
    base = load_base(settings)
    twin = dense_twin(base)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        ours = base.model(input_ids=ids, use_cache=False).logits
        theirs = twin(input_ids=ids, use_cache=False).logits
    # The same products, summed in another order by another kernel.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    write_plot(full_report(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_command_measures_server_engine_and_peft_in_processes_of_their_own(
    settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "app", "bench", "--adapters", "3", "--rank", "4", "--concurrency", "2,4"]
    command += ["--requests", "8", "--prompt-tokens", "3-9", "--output-tokens", "6", "--cold-share", "0.25"]
    command += ["--rounds", "2", "--mode", "both", "--baseline", "all", "--out", str(out)]
    command += ["--base-model", settings.base_model, "--data-dir", str(settings.data_dir), "--threads", "1"]
    done = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    body = json.loads((out / "bench.json").read_text())
    systems = ("offline", "http", "peft-mixed", "peft-swap")
    assert [(row["system"], row["concurrency"]) for row in body["rows"]] == [(s, c) for c in (2, 4) for s in systems]
    assert all(len(row["rounds_tokens_per_s"]) == 2 and row["facts"]["rss_bytes"] > 0 for row in body["rows"])
    assert body["greedy_fp32_tokens_compared"] == 2 * 4 * 6
    assert (out / "bench.png").exists()
