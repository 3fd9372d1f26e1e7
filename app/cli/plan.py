"""`lodger plan MODEL`: the memory that a base takes to serve and to train, before anything is downloaded in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.output import print_table
from app.settings_sources import ConfigurationError

if TYPE_CHECKING:
    from app.memory_plan import ModelShape, Training

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a config.json, or a hub id.")]
Rank = Annotated[int, typer.Option("--rank", min=1, help="Of the adapter that is trained.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Of one micro-batch in training.")]
Rows = Annotated[int, typer.Option("--pool-rank", min=1, help="Rows of the rank pool in serving.")]
Context = Annotated[int, typer.Option("--kv-tokens", min=1, help="Tokens in the KV cache in serving.")]


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    model: Model, rank: Rank = 16, tokens: Tokens = 2048, pool_rank: Rows = 256, kv_tokens: Context = 16384
) -> None:
    """Print what MODEL takes in memory: serving, and QLoRA, LoRA and full fine-tuning side by side."""
    from app import memory_plan
    from app.memory_plan import ModelShape

    shape = _shape(model, ModelShape)
    ways = memory_plan.trainings(shape, rank=rank, tokens=tokens)
    adapter = shape.adapter_parameters(rank)
    print(
        f"{shape.parameters / 1e9:.3f} billion parameters, {shape.linear_parameters / shape.parameters:.0%} in linears"
    )
    print(f"an adapter of rank {rank} on every linear: {adapter:,} parameters, {adapter * 2 / 1e6:.1f} MB in 16 bits\n")
    kv, pool = shape.kv_bytes_per_token * kv_tokens, memory_plan.pool_bytes(shape, pool_rank)
    serving = [
        ("weights, linears in NF4 (4.127 bits)", shape.nf4_bytes),
        (f"KV cache, {kv_tokens:,} tokens of {shape.kv_bytes_per_token:,} bytes", kv),
        (f"rank pool, {pool_rank} rows", pool),
        ("in all", shape.nf4_bytes + kv + pool),
    ]
    print_table(("serving", "GB"), [(name, _gb(value)) for name, value in serving])
    print()
    rows = [
        ("weights", *(_gb(way.weights) for way in ways)),
        ("trained parameters, gradients, AdamW", *(_gb(way.state) for way in ways)),
        (f"activations and logits, {tokens:,} tokens", *(_gb(way.activations) for way in ways)),
        ("in all", *(_gb(way.total) for way in ways)),
    ]
    print_table(("training, GB", *(way.name for way in ways)), rows)
    print()
    header = ("fits on", "KV tokens, serving", *(f"tokens a step, {way.name}" for way in ways), "serve + QLoRA")
    print_table(header, [_fits(shape, ways, gb, serving[-1][1]) for gb in memory_plan.MEMORIES_GB])


def _fits(shape: ModelShape, ways: tuple[Training, ...], gb: int, serving: float) -> tuple[str, ...]:
    """What one size of memory is enough for."""
    from app import memory_plan

    memory = gb * 1e9
    kv = memory_plan.tokens_that_fit(
        memory, shape.nf4_bytes + memory_plan.pool_bytes(shape, 256), shape.kv_bytes_per_token
    )
    steps = [memory_plan.longest_step(shape, way, memory) for way in ways]
    both = serving + ways[0].state + ways[0].activations + memory_plan.RESERVE_BYTES <= memory
    return (f"{gb} GB", *(f"{value:,}" if value else "no" for value in (kv, *steps)), "yes" if both else "no")


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _shape(model: str, kind: type[ModelShape]) -> ModelShape:
    try:
        return kind.from_config(_config(model))
    except (KeyError, ValueError, OSError) as exc:
        raise ConfigurationError([f"{model}: no config of a Llama-like decoder ({type(exc).__name__}: {exc})"]) from exc


def _config(model: str) -> Any:
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    from huggingface_hub import hf_hub_download

    return json.loads(Path(hf_hub_download(model, "config.json")).read_text("utf-8"))
