"""`lodger merge`: one adapter and its base as a single model in transformers' format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.flags import with_settings
from app.cli.output import say
from app.settings_sources import LoadedSettings

PROBE = "The quick brown fox jumps over the lazy dog. What comes next, and why? Answer in one sentence."

Adapter = Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT directory, as `lodger adapters export` writes.")]
Out = Annotated[Path, typer.Option("--out", help="Directory that is made.")]


def register(app: typer.Typer) -> None:
    app.command()(merge)


@with_settings()
def merge(loaded: LoadedSettings, adapter: Adapter, out: Out = Path("merged")) -> None:
    """Dequantize the base, add the adapter in fp32, save fp16, and say by how much the logits moved.

    The result is the trained model as nearly as fp16 can hold it; the adapter on its NF4 base stays the exact one.
    """
    import torch

    from adapters.door import check_directory
    from adapters.manifest import WEIGHTS_FILE
    from adapters.weights import read_pairs
    from app.bootstrap import load_base
    from app.chat import Renderer
    from app.engine.base_model import use_threads
    from app.merge import MergeImpossible
    from app.merge import merge as merge_into
    from app.storage import door_limits

    settings = loaded.settings.model_copy(update={"device": "cpu", "dtype": "float32"})
    use_threads(settings.threads)
    base = load_base(settings)
    checked = check_directory(adapter, base.spec, door_limits(settings))
    pairs = read_pairs(checked, adapter / WEIGHTS_FILE)
    probe = torch.tensor([Renderer.load(base.directory, max_context=base.shapes.max_context).encode(PROBE)])
    try:
        result = merge_into(base, pairs, out, probe)
    except (MergeImpossible, FileExistsError) as exc:
        say(f"lodger: {exc}")
        sys.exit(1)
    say(
        f"largest logit difference to the adapter beside its base: {result.largest_logit_difference:.4g} "
        f"(logits up to {result.largest_logit:.3g}; the likeliest token is the same at "
        f"{result.num_same_argmax} of {result.num_positions} positions)"
    )
    print(out)
