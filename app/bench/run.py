"""The order of a benchmark: furnish, check tokens, start the systems, warm up, interleave the rounds, report."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from adapters.manifest import BaseModelSpec
from app.bench.cold import ColdResult, measure_cold, num_cold, window_s
from app.bench.coserving import CoservingResult, measure_coserving
from app.bench.coserving_system import CoservingSystem
from app.bench.engine_system import EngineSystem, computes_in
from app.bench.exactness import checked_jobs, require_equal
from app.bench.figures import RoundTrace, make_row
from app.bench.http_system import HttpSystem
from app.bench.machine import MachineFacts, machine_facts
from app.bench.peft_system import PeftSystem
from app.bench.process import Child
from app.bench.report import Report
from app.bench.tenancy import Tenancy, furnish, scratch_settings
from app.bench.workload import (
    SWAP_REQUESTS,
    Job,
    WorkloadSpec,
    cold_labels,
    make_jobs,
    warm_labels,
    warm_up_jobs,
)
from app.engine.base_files import resolve_base
from app.engine.base_spec import read_base_spec
from app.settings import Settings

START_TIMEOUT_S = 900.0  # a large base is quantized the first time
SLOWEST_TOKEN_S = 2.0  # what a call may take: this much for each token of its jobs, prompts included
LEAST_TIMEOUT_S = 120.0
WINDOWS_TIMEOUT_S = 1800.0  # a window of co-serving, on a machine that cannot keep up

Say = Callable[[str], None]


class Callee(Protocol):
    """What `Child` and `HttpSystem` share."""

    def call(self, method: str, *args: Any, timeout_s: float) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PeftWay:
    """One of the two ways, "mixed" or "swap", of using the one PEFT process."""

    child: Child
    way: str

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        if method != "round":
            return self.child.call(method, *args, timeout_s=timeout_s)
        jobs, concurrency = args
        width = min(concurrency, SWAP_REQUESTS) if self.way == "swap" else concurrency
        return self.child.call(self.way, jobs, width, timeout_s=timeout_s)

    def close(self) -> None:
        self.child.close()


@dataclass(frozen=True, slots=True)
class Bench:
    """What every step needs."""

    spec: WorkloadSpec
    tenancy: Tenancy
    vocab_size: int
    say: Say

    @property
    def warm(self) -> tuple[str, ...]:
        return warm_labels(self.spec.most_adapters)

    def jobs(self, concurrency: int, first_cold: int) -> tuple[Job, ...]:
        cold = cold_labels(first_cold, self.spec.num_cold_at(concurrency))
        return make_jobs(self.spec, concurrency, self.vocab_size, cold)


def run_bench(settings: Settings, spec: WorkloadSpec, say: Say) -> Report:
    """Measure everything the spec asks for. Raises BenchOptionInvalid before any work, BenchFailed after some."""
    base_dir = resolve_base(settings.base_model, settings.data_dir, settings.base_revision)
    config = json.loads((base_dir / "config.json").read_text("utf-8"))
    spec.check(
        max_context=config["max_position_embeddings"],
        max_rank=settings.max_rank,
        pool_rows=settings.pool_rank,
        object_timeout_s=settings.s3_object_timeout_s,
    )
    machine = machine_facts(device_name(settings.device))
    if machine.is_busy:
        say(f"warning: load average {machine.load_average:.2f} on {machine.cores} cores; figures will be noisy")
    base = _base_spec(settings)
    with tempfile.TemporaryDirectory(prefix="lodger-bench-") as root:
        bench = _furnish(Path(root), settings, spec, base, base_dir, config["vocab_size"], say)
        return _measure(bench, base, machine)


def _measure(bench: Bench, base: BaseModelSpec, machine: MachineFacts) -> Report:
    spec = bench.spec
    report = Report(spec, machine, base.id)
    if spec.systems:
        with _running(bench) as systems:
            if any(name.startswith("peft") for name in systems):
                bench.say("comparing greedy fp32 tokens with PEFT's")
                report.tokens_checked = check_tokens(bench, systems)
            for concurrency in spec.concurrency:
                traces = measure_load(bench, systems, concurrency)
                adapters = spec.adapters_at(concurrency)
                for name, rounds in traces.items():
                    facts = systems[name].call("facts", timeout_s=LEAST_TIMEOUT_S)
                    report.rows.append(make_row(name, concurrency, adapters, rounds, facts))
    if spec.cold_store_delay_s:
        bench.say(f"warm streams beside cold arrivals, {spec.cold_store_delay_s:g} s an object")
        report.cold = _cold(bench)
    if spec.train != "off":
        bench.say("serving beside training, at several loads")
        report.coserving = _coserve(bench)
    return report


def check_tokens(bench: Bench, systems: Mapping[str, Callee]) -> int:
    """Let ours and PEFT answer the first batch in fp32, all ways; return how many tokens are equal.

    What runs is asked if it computes in fp32 anyway; else two processes are started for this.
    """
    concurrency = max(bench.spec.concurrency)
    jobs = checked_jobs(_warm_jobs(bench, concurrency), concurrency)
    limit_s = _limit(jobs)
    ways = [name.removeprefix("peft-") for name in systems if name.startswith("peft")]
    if "offline" in systems and computes_in(bench.tenancy.settings)[0] == "float32":
        own: RoundTrace = systems["offline"].call("round", jobs, concurrency, timeout_s=limit_s)
        theirs = {f"peft-{way}": systems[f"peft-{way}"].call(way, jobs, concurrency, timeout_s=limit_s) for way in ways}
        return require_equal(jobs, own, theirs)
    with _child("lodger, fp32", EngineSystem, bench.tenancy, 0.0, "float32") as ours:
        own = ours.call("round", jobs, concurrency, timeout_s=limit_s)
    with _child("peft, fp32", PeftSystem, bench.tenancy, bench.warm, "float32") as peft:
        theirs = {f"peft-{way}": peft.call(way, jobs, concurrency, timeout_s=limit_s) for way in ways}
    return require_equal(jobs, own, theirs)


def measure_load(bench: Bench, systems: dict[str, Callee], concurrency: int) -> dict[str, list[RoundTrace]]:
    """All rounds at one load: the systems take turns, so that what slows the machine slows them all."""
    spec = bench.spec
    traces: dict[str, list[RoundTrace]] = {name: [] for name in systems}
    first_cold = _first_cold(spec, concurrency)
    # Kernels choose their code by shape at the first batch of this width: that belongs to no round.
    first = checked_jobs(_warm_jobs(bench, concurrency), concurrency)
    for system in systems.values():
        system.call("round", first, concurrency, timeout_s=_limit(first))
    for number in range(spec.rounds):
        jobs = bench.jobs(concurrency, first_cold + number * spec.num_cold_at(concurrency))
        for name, system in systems.items():
            trace: RoundTrace = system.call("round", jobs, concurrency, timeout_s=_limit(jobs))
            traces[name].append(trace)
            bench.say(
                f"{concurrency} at once, round {number + 1}/{spec.rounds}: {name} {trace.tokens_per_s:.1f} tokens/s"
            )
    return traces


def _warm_jobs(bench: Bench, concurrency: int) -> tuple[Job, ...]:
    return make_jobs(replace(bench.spec, cold_share=0.0), concurrency, bench.vocab_size)


def device_name(device: str) -> str:
    """The accelerator that the settings come to, by its own name."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_name())


def _base_spec(settings: Settings) -> BaseModelSpec:
    return read_base_spec(
        settings.base_model,
        settings.data_dir,
        name=settings.base_id,
        revision=settings.base_revision,
        quantization=settings.quantization,
    )


def _furnish(
    root: Path, settings: Settings, spec: WorkloadSpec, base: BaseModelSpec, base_dir: Path, vocab_size: int, say: Say
) -> Bench:
    ours = scratch_settings(settings, root, base_dir=base_dir, max_sequences=max(spec.concurrency))
    warm = warm_labels(spec.most_adapters)
    cold = cold_labels(0, _first_cold(spec, None) + num_cold(spec))
    if warm or cold:
        say(f"writing {len(warm)} adapters" + (f" and {len(cold)} cold ones" if cold else ""))
    return Bench(spec, furnish(root, ours, spec, base, warm, cold), vocab_size, say)


def _first_cold(spec: WorkloadSpec, concurrency: int | None) -> int:
    """How many cold adapters the loads before this one use up; None: all loads. Each is used in one round only."""
    before = spec.concurrency if concurrency is None else spec.concurrency[: spec.concurrency.index(concurrency)]
    return sum(spec.rounds * spec.num_cold_at(load) for load in before)


@contextlib.contextmanager
def _running(bench: Bench) -> Iterator[dict[str, Callee]]:
    """Start the systems one after the other, warm them up, and end them whatever happens."""
    systems: dict[str, Callee] = {}
    jobs = warm_up_jobs(bench.spec, bench.warm, bench.vocab_size)
    with contextlib.ExitStack() as stack:
        for name in bench.spec.systems:
            shared = next((s.child for s in systems.values() if isinstance(s, PeftWay)), None)
            if shared is not None:
                systems[name] = PeftWay(shared, name.removeprefix("peft-"))
                continue
            bench.say(f"starting {name}")
            systems[name] = _start(name, bench)
            stack.callback(systems[name].close)
            systems[name].call("warm_up", jobs, timeout_s=_limit(jobs))
        yield systems


def _start(name: str, bench: Bench) -> Callee:
    tenancy = bench.tenancy
    match name:
        case "offline":
            return Child(EngineSystem, tenancy, name=name, start_timeout_s=START_TIMEOUT_S)
        case "http":
            dtype, weights = computes_in(tenancy.settings)
            return HttpSystem(tenancy, stream=bench.spec.stream, dtype=dtype, weights=weights)
        case _:
            child = Child(PeftSystem, tenancy, bench.warm, name="peft", start_timeout_s=START_TIMEOUT_S)
            return PeftWay(child, name.removeprefix("peft-"))


def _cold(bench: Bench) -> ColdResult:
    spec = bench.spec
    jobs = warm_up_jobs(spec, bench.warm, bench.vocab_size)
    extra_s = len(jobs) * 2 * spec.cold_store_delay_s
    with _child("lodger, slow store", EngineSystem, bench.tenancy, spec.cold_store_delay_s) as child:
        child.call("warm_up", jobs, timeout_s=_limit(jobs) + extra_s)

        def window(*args: Any) -> RoundTrace:
            trace: RoundTrace = child.call("window", *args, timeout_s=_limit(args[0]) + window_s(spec))
            return trace

        return measure_cold(spec, bench.vocab_size, _first_cold(spec, None), window)


def _coserve(bench: Bench) -> CoservingResult:
    with _child("lodger, training", CoservingSystem, bench.tenancy, bench.spec) as child:
        jobs = warm_up_jobs(bench.spec, bench.warm, bench.vocab_size)
        child.call("warm_up", jobs, timeout_s=_limit(jobs))

        def call(method: str, *args: Any) -> Any:
            told = f", {len(args[2]) or 'no'} arrivals, training share {args[3]:g}" if method == "serve" else ""
            bench.say(f"  {method}{told}")
            return child.call(method, *args, timeout_s=WINDOWS_TIMEOUT_S)

        shares = bench.spec.training_shares or (bench.tenancy.settings.training_share,)
        return measure_coserving(bench.spec, bench.vocab_size, shares, call)


@contextlib.contextmanager
def _child(name: str, make: Callable[..., Any], *args: Any) -> Iterator[Child]:
    child = Child(make, *args, name=name, start_timeout_s=START_TIMEOUT_S)
    try:
        yield child
    finally:
        child.close()


def _limit(jobs: tuple[Job, ...]) -> float:
    """Seconds that a call may take at most."""
    return max(LEAST_TIMEOUT_S, SLOWEST_TOKEN_S * sum(len(job.prompt) + job.output_tokens for job in jobs))
