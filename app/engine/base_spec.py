"""The base's identity and shapes without loading its weights: what it takes to check and publish adapters.

The shapes are read off the model's code once and kept beside the 4-bit snapshot; later calls need no torch.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from adapters.manifest import BaseModelSpec, canonical_json
from app.engine.base_files import base_digest, base_name, resolve_base, source_fingerprint

Linears = dict[str, tuple[int, int]]


def read_base_spec(
    model: str, data_dir: Path, *, name: str | None = None, revision: str | None = None, quantization: str = "nf4"
) -> BaseModelSpec:
    """Return the spec that `load_base_model` would have. The first call for a base converts and hashes it.

    Raises BaseModelUnsupported, BaseModelMissing.
    """
    source = resolve_base(model, data_dir, revision)
    served = name or base_name(model)
    kept_in = data_dir / "base" / served
    kept = kept_in / f"linears-{source_fingerprint(source)}.json"
    if not kept.exists():
        _keep(kept, _read_linears(source))
    linears = {path: (shape[0], shape[1]) for path, shape in json.loads(kept.read_text("utf-8")).items()}
    spellings = {served, model, str(source), base_name(model)}
    return BaseModelSpec(served, base_digest(source, quantization, kept_in), tuple(sorted(spellings)), linears)


def _read_linears(source: Path) -> Linears:
    """Build the model without memory for its weights, and look at it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from app.engine.base_model import TARGET_KINDS

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return {
        name: (int(module.in_features), int(module.out_features))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in TARGET_KINDS
    }


def _keep(path: Path, linears: Linears) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    scratch.write_bytes(canonical_json(linears))
    os.replace(scratch, path)
