"""One PNG: throughput and latency of every system at every load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window

from matplotlib import pyplot as plt

from app.bench.figures import Row
from app.bench.report import Report

DOTS_PER_INCH = 120


def write_plot(report: Report, path: Path) -> None:
    """Three panels side by side. Needs at least one row."""
    figure, (throughput, inter_token, first_token) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    systems = list(dict.fromkeys(row.system for row in report.rows))
    colors = {system: f"C{i}" for i, system in enumerate(systems)}
    _bars(throughput, report.rows, systems, colors)
    for axis, field, title in (
        (inter_token, "inter_token_ms", "Inter-token latency, ms"),
        (first_token, "ttft_ms", "Time to first token, ms"),
    ):
        _percentiles(axis, report.rows, systems, colors, field)
        axis.set_title(title)
    figure.suptitle(
        f"{report.base}, rank {report.spec.rank}, {report.machine.cpu}, {report.machine.cores} cores, "
        f"{report.rows[0].facts.dtype}, load {report.machine.load_average:.2f}",
        fontsize=10,
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def write_coserving_plot(report: Report, path: Path) -> None:
    """The curve: what training costs in latency against what it keeps of its speed. Needs windows of both kinds."""
    found = report.coserving
    assert found is not None
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    rightmost = 0.0
    for point in found.points:
        shares = [(0.0, 1.0)] + [(100 * found.share_kept(k), s) for k in point.on if (s := point.p95_ratio(k))]
        axis.plot(*zip(*shares, strict=True), marker="o", label=f"load {point.load:g}")
        for kind, (kept, slower) in zip(point.on, shares[1:], strict=False):
            text = f"{kind.training_share:g}"
            axis.annotate(text, (kept, slower), textcoords="offset points", xytext=(6, -3), fontsize=8)
        rightmost = max(rightmost, *(kept for kept, _ in shares))
    axis.legend(title="at each point: training's share", fontsize=8, title_fontsize=8)
    axis.axhline(1.5, color="0.6", linestyle="--", linewidth=1)
    axis.set_xlabel("training speed kept, % of training alone")
    axis.set_ylabel("p95 inter-token latency, training on / off")
    axis.set_xlim(0, 1.15 * rightmost or 1.0)  # room for the last label
    axis.set_title(f"{report.base}, {report.machine.cpu}, {found.concurrency} at once", fontsize=10)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _bars(axis: Any, rows: Sequence[Row], systems: Sequence[str], colors: dict[str, str]) -> None:
    loads = sorted({row.concurrency for row in rows})
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        own = {row.concurrency: row for row in rows if row.system == system}
        places = [loads.index(load) + (i - (len(systems) - 1) / 2) * width for load in own]
        medians = [row.tokens_per_s for row in own.values()]
        spread = [
            [m - min(row.rounds_tokens_per_s) for m, row in zip(medians, own.values(), strict=True)],
            [max(row.rounds_tokens_per_s) - m for m, row in zip(medians, own.values(), strict=True)],
        ]
        bars = axis.bar(places, medians, width, yerr=spread, capsize=3, label=system, color=colors[system])
        axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axis.set_xticks(range(len(loads)), [str(load) for load in loads])
    axis.set_xlabel("requests at once")
    axis.set_title("Output tokens per second, median and range")
    axis.legend(fontsize=8)


def _percentiles(axis: Any, rows: Sequence[Row], systems: Sequence[str], colors: dict[str, str], field: str) -> None:
    """p95 as a line, and a bar from p50 to p99."""
    for system in systems:
        own = [(row.concurrency, found) for row in rows if row.system == system and (found := getattr(row, field))]
        if not own:
            continue
        loads = [load for load, _ in own]
        below = [found.p95 - found.p50 for _, found in own]
        above = [found.p99 - found.p95 for _, found in own]
        p95 = [found.p95 for _, found in own]
        axis.errorbar(loads, p95, yerr=[below, above], marker="o", capsize=3, label=system, color=colors[system])
    axis.set_yscale("log")
    axis.set_xlabel("requests at once (mark: p95; bar: p50 to p99)")
    axis.set_xticks(sorted({row.concurrency for row in rows}))
    axis.grid(visible=True, which="both", alpha=0.25)
