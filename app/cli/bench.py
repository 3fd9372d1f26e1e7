"""`lodger bench`: how fast this machine serves many adapters, beside PEFT on the same work."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.flags import with_settings
from app.cli.output import say
from app.settings_sources import ConfigurationError, LoadedSettings

if TYPE_CHECKING:
    from app.bench.workload import WorkloadSpec

PACKAGES = ("matplotlib", "peft", "httpx")  # the extra "bench"


def register(app: typer.Typer) -> None:
    app.command()(bench)


@with_settings()
def bench(
    loaded: LoadedSettings,
    adapters: Annotated[
        str, typer.Option(help="Adapters that are asked for in turns; 'same': as many as requests at once.")
    ] = "same",
    rank: Annotated[int, typer.Option(help="Rank of every adapter.")] = 16,
    targets: Annotated[str, typer.Option(help="Linears with adapters: q_proj,down_proj or all.")] = "all",
    concurrency: Annotated[str, typer.Option(help="Requests at once; several loads as 8,16.")] = "8,16",
    requests: Annotated[int | None, typer.Option(help="Requests in a round. Default: twice the concurrency.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Length of the prompts: 64, or a range 32-512.")] = "64",
    output_tokens: Annotated[int, typer.Option(help="Length of every answer.")] = 64,
    zipf: Annotated[float, typer.Option(help="Skew of the adapters' popularity; 0: they take turns.")] = 0.0,
    cold_share: Annotated[float, typer.Option(help="Share of requests for an adapter nobody has loaded yet.")] = 0.0,
    mode: Annotated[str, typer.Option(help="offline, http or both; none: only what is asked for beside.")] = "both",
    baseline: Annotated[str, typer.Option(help="The same work by PEFT: none, peft-mixed, peft-swap, all.")] = "none",
    rounds: Annotated[int, typer.Option(help="Rounds; the systems take turns in each.")] = 5,
    stream: Annotated[bool, typer.Option(help="Stream over HTTP.")] = True,
    cold_store_delay: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Also: warm streams beside cold arrivals from a store that slow."),
    ] = 0.0,
    train: Annotated[str, typer.Option(help="Also: serving beside training at several loads: off, on, both.")] = "off",
    loads: Annotated[
        str, typer.Option(help="With --train: the loads; 1 is a full batch, never idle.")
    ] = "0.25,0.5,0.75,1",
    training_shares: Annotated[
        str, typer.Option(help="With --train: shares of the time for training, as 0.2,0.4. Default: the setting's.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Directory for bench.json and bench.png.")] = Path("bench-results"),
    seed: Annotated[int, typer.Option(help="Fixes prompts, adapters and their order.")] = 0,
) -> None:
    """Measure throughput and latency with many adapters; print a table, write JSON and a plot."""
    require_packages()
    from app.bench.workload import BenchOptionInvalid, WorkloadSpec

    try:
        spec = WorkloadSpec(
            adapters=None if adapters == "same" else _number(adapters, "--adapters"),
            rank=rank,
            targets=_targets(targets),
            concurrency=tuple(_number(part, "--concurrency") for part in concurrency.split(",")),
            requests=requests,
            prompt_tokens=_range(prompt_tokens, "--prompt-tokens"),
            output_tokens=output_tokens,
            zipf=zipf,
            cold_share=cold_share,
            mode=mode,
            baseline=baseline,
            rounds=rounds,
            stream=stream,
            train=train,
            loads=_shares(loads, "--loads"),
            training_shares=_shares(training_shares, "--training-shares"),
            cold_store_delay_s=cold_store_delay,
            seed=seed,
        )
        run(loaded, spec, out)
    except BenchOptionInvalid as exc:
        raise typer.BadParameter(exc.message.removeprefix(f"{exc.param}: "), param_hint=exc.param) from exc


def run(loaded: LoadedSettings, spec: WorkloadSpec, out: Path) -> None:
    """Measure, print, write."""
    from app.bench.report import wide_console
    from app.bench.run import run_bench

    # Whoever ends this ends what it started too: the server, and the scratch directory.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    report = run_bench(loaded.settings, spec, say)
    report.print(wide_console())
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(out / "bench.json")
    written = [out / "bench.json"]
    from app.bench.plot import write_coserving_plot, write_plot

    if report.rows:
        written.append(out / "bench.png")
        write_plot(report, written[-1])
    if report.coserving is not None and spec.train == "both":
        written.append(out / "bench-training.png")
        write_coserving_plot(report, written[-1])
    say(f"written: {', '.join(map(str, written))}")


def require_packages() -> None:
    """Raise ConfigurationError that says how to get what the benchmark needs beyond the server's packages."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            [f"lodger bench needs {', '.join(missing)}: pip install 'lodger[bench]', or make bench"]
        )


def _number(text: str, option: str) -> int:
    if re.fullmatch(r"\s*\d{1,9}\s*", text) is None:
        raise typer.BadParameter(f"{text!r} is no whole number from 0 on", param_hint=option)
    return int(text)


def _range(text: str, option: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    first = _number(low, option)
    return (first, _number(high, option)) if dash else (first, first)


def _shares(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers as 0.25,0.5", param_hint=option) from None


def _targets(text: str) -> tuple[str, ...]:
    from app.bench.workload import TARGETS

    return TARGETS if text.strip() == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
