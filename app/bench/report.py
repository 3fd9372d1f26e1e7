"""What the reader sees: a table, lines of ratios, and the same as JSON. Every row says what computed in what."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from app.bench.figures import Percentiles, Row, ratio
from app.bench.machine import MachineFacts
from app.bench.workload import SWAP_REQUESTS, WorkloadSpec

if TYPE_CHECKING:
    from app.bench.cold import ColdResult
    from app.bench.coserving import CoservingResult, Kind, LoadPoint

WANTED = {  # at least; (ours, theirs) -> factor
    ("offline", "peft-mixed"): 3.0,
    ("offline", "peft-swap"): 6.0,
    ("http", "offline"): 0.85,
}
WANTED_COLD = 1.15  # at most
MIN_WIDTH = 180  # columns, where the output is no terminal


@dataclass(frozen=True, slots=True)
class Comparison:
    """One system's throughput over another's at one load, median over rounds."""

    ours: str
    theirs: str
    concurrency: int
    factor: float
    wanted: float | None

    @property
    def is_met(self) -> bool | None:
        return None if self.wanted is None else self.factor >= self.wanted


@dataclass(slots=True)
class Report:
    """Everything that was measured."""

    spec: WorkloadSpec
    machine: MachineFacts
    base: str
    rows: list[Row] = field(default_factory=list)
    cold: ColdResult | None = None
    coserving: CoservingResult | None = None
    tokens_checked: int = 0

    def comparisons(self) -> list[Comparison]:
        found = []
        for concurrency in self.spec.concurrency:
            at = {row.system: row for row in self.rows if row.concurrency == concurrency}
            for (ours, theirs), wanted in WANTED.items():
                if ours in at and theirs in at:
                    found.append(Comparison(ours, theirs, concurrency, ratio(at[ours], at[theirs]), wanted))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "machine": self.machine.to_json(),
            "base": self.base,
            "workload": asdict(self.spec),
            "greedy_fp32_tokens_compared": self.tokens_checked,
            "rows": [_row_json(row) for row in self.rows],
            "comparisons": [asdict(found) | {"is_met": found.is_met} for found in self.comparisons()],
            "cold": None if self.cold is None else _cold_json(self.cold),
            "coserving": None if self.coserving is None else _coserving_json(self.coserving),
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=2, sort_keys=True) + "\n", "utf-8")

    def print(self, console: Console) -> None:
        for line in _head(self):
            console.print(line, highlight=False, markup=False)
        if self.rows:
            console.print(_table(self.rows))
        if self.coserving is not None:
            console.print(_coserving_table(self.coserving))
        for line in (*map(_say_comparison, self.comparisons()), *(_say_cold(self.cold) if self.cold else ())):
            console.print(line, highlight=False, markup=False)


def wide_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=MIN_WIDTH)


def _head(report: Report) -> list[str]:
    machine, spec = report.machine, report.spec
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    shortest, longest = spec.prompt_tokens
    prompt = str(shortest) if shortest == longest else f"{shortest}-{longest}"
    lines = [
        f"{report.base}: rank {spec.rank} on {', '.join(spec.targets)}; {prompt} prompt and {spec.output_tokens} output"
        f" tokens; {spec.rounds} interleaved rounds; zipf {spec.zipf:g}; cold share {spec.cold_share:g}; "
        f"seed {spec.seed}",
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, {machine.device}; "
        f"Python {machine.python}, {versions}; load average {machine.load_average:.2f} at the start",
    ]
    if machine.is_busy:
        lines.append("WARNING: the machine was busy before this began; these figures are not worth publishing")
    if "peft-swap" in spec.systems:
        lines.append(f"peft-swap answers the first {SWAP_REQUESTS} requests of each round, one at a time")
    if report.tokens_checked:
        lines.append(f"{report.tokens_checked} greedy fp32 tokens equal PEFT's")
    return lines


def _table(rows: Sequence[Row]) -> Table:
    table = Table(pad_edge=False)
    for name in ("system", "at once", "adapters"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for name in (
        "tokens/s\nmedian (min-max)",
        "TTFT ms\np50 / p95 / p99",
        "inter-token ms\np50 / p95 / p99",
        "cold TTFT ms\np50 / p95 / p99",
    ):
        table.add_column(name, justify="right")
    for name in ("dtype", "weights", "threads", "RSS MB", "start s"):
        table.add_column(name, justify="right" if name not in ("dtype", "weights") else "left")
    for row in rows:
        low, high = min(row.rounds_tokens_per_s), max(row.rounds_tokens_per_s)
        table.add_row(
            row.system,
            str(row.concurrency),
            str(row.adapters),
            f"{row.tokens_per_s:.1f} ({low:.1f}-{high:.1f})",
            _triple(row.ttft_ms),
            _triple(row.inter_token_ms),
            _triple(row.cold_ttft_ms),
            row.facts.dtype,
            row.facts.weights,
            str(row.facts.threads),
            f"{row.facts.rss_bytes / 1e6:.0f}",
            f"{row.facts.start_s:.1f}",
        )
    return table


def _triple(found: Percentiles | None) -> str:
    if found is None:
        return "-"
    return " / ".join(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in (found.p50, found.p95, found.p99))


def _say_comparison(found: Comparison) -> str:
    line = f"{found.ours} / {found.theirs} at {found.concurrency}: {found.factor:.2f}x"
    if found.wanted is None:
        return line
    return f"{line} ({'meets' if found.is_met else 'MISSES'} {found.wanted:g}x)"


def _say_cold(found: ColdResult) -> list[str]:
    whole, added = found.ratio("alone"), found.ratio("resident")
    verdict = "meets" if whole <= WANTED_COLD else "MISSES"
    lines = [
        f"store slowed by {found.delay_s:g} s an object, {found.concurrency} warm streams, windows of "
        f"{found.window_s:g} s: p95 inter-token latency (median of windows) "
        + ", ".join(f"{kind} {found.p95(kind):.1f} ms" for kind in found.windows),
        f"cold / alone: {whole:.2f}x ({verdict} {WANTED_COLD:g}x); cold / resident: {added:.2f}x",
    ]
    if "cold" in found.arrival_ttft_ms:
        lines.append(f"first token of the cold requests: p50 {found.arrival_ttft_ms['cold'].p50 / 1000:.2f} s")
    return lines


def _coserving_table(found: CoservingResult) -> Table:
    table = Table(
        title=f"Serving beside training: load 1 is {found.full_tokens_per_s:.1f} tokens/s at {found.concurrency} at "
        f"once; training alone {found.alone_per_s:.1f} tokens/s, in an idle server {found.idle_per_s:.1f}",
        title_justify="left",
        pad_edge=False,
    )
    for name in (
        "load",
        "training's share",
        "inter-token ms\np50 / p95 / p99",
        "p95 on / off",
        "p95 of each window",
        "first token ms\np50 / p95 / p99",
        "tokens/s",
        "trained tokens/s",
        "speed kept",
    ):
        table.add_column(name, justify="right")
    for point in found.points:
        for kind in (point.off, *point.on):
            if kind is not None:
                table.add_row(*_coserving_cells(found, point, kind))
        table.add_section()
    return table


def _coserving_cells(found: CoservingResult, point: LoadPoint, kind: Kind) -> list[str]:
    slower = point.p95_ratio(kind)
    is_on = kind is not point.off
    return [
        f"{point.load:g}",
        f"{kind.training_share:g}" if is_on else "off",
        _triple(kind.inter_token_ms),
        f"{slower:.2f}x" if is_on and slower is not None else "-",
        ", ".join(f"{p95:.0f}" for p95 in kind.window_p95_ms),
        _triple(kind.ttft_ms),
        f"{kind.tokens_per_s:.1f}",
        f"{kind.trained_per_s:.1f}" if is_on else "-",
        f"{100 * found.share_kept(kind):.0f} %" if is_on else "-",
    ]


def _coserving_json(found: CoservingResult) -> dict[str, Any]:
    def told(point: LoadPoint, kind: Kind) -> dict[str, Any]:
        return asdict(kind) | {"p95_ratio": point.p95_ratio(kind), "share_kept": found.share_kept(kind)}

    points = [asdict(point) | {"on": [told(point, kind) for kind in point.on]} for point in found.points]
    return asdict(found) | {"points": points}


def _row_json(row: Row) -> dict[str, Any]:
    return asdict(row) | {"tokens_per_s": row.tokens_per_s}


def _cold_json(found: ColdResult) -> dict[str, Any]:
    medians = {kind: statistics.median(w.p95 for w in windows) for kind, windows in found.windows.items()}
    return asdict(found) | {
        "p95_ms": medians,
        "ratio_to_alone": found.ratio("alone"),
        "ratio_to_resident": found.ratio("resident"),
        "wanted_at_most": WANTED_COLD,
    }
