"""Merge an adapter into the base it was trained on: dequantize, add B A * scaling in fp32, save fp16 for transformers.

The adapter was fitted to the *dequantized* NF4 weights. Added to the original 16-bit weights, or quantized again, it is
another model: the quantization's own error is several times an adapter's. fp16 keeps three bits more than bf16, which
is what a small delta needs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.weights import LoraPair
from app.engine.base_model import BaseModel
from app.training.adapter import PlanPart, TrainingPlan
from app.training.setting_up import fixed_adapter

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
HALF_MAX = torch.finfo(torch.float16).max


class MergeImpossible(Exception):
    """A merged weight does not fit fp16."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What the merge cost: logits of the merged model against those of the base with the adapter beside it."""

    largest_logit_difference: float
    largest_logit: float
    num_same_argmax: int
    num_positions: int


def merge(base: BaseModel, pairs: Mapping[str, LoraPair], out: Path, probe: Tensor) -> Merged:
    """Write the merged model to `out`, which must not exist, and measure it on `probe` (token ids `[1, T]`).

    `base` is loaded on the CPU in fp32. Raises MergeImpossible, FileExistsError.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = adapted_logits(base, pairs, probe)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        directory = Path(name) / "merged"
        _write(base, pairs, directory)
        got = _plain_logits(directory, probe)
        directory.rename(out)
    return Merged(
        largest_logit_difference=float((got - wanted).abs().max()),
        largest_logit=float(wanted.abs().max()),
        num_same_argmax=int((got.argmax(-1) == wanted.argmax(-1)).sum()),
        num_positions=len(wanted),
    )


@torch.no_grad()
def adapted_logits(base: BaseModel, pairs: Mapping[str, LoraPair], probe: Tensor) -> Tensor:
    """Logits `[T, V]` of the base with the adapter beside it: what is served."""
    part = PlanPart(fixed_adapter(base, pairs), 0, 1, ("probe",), (probe.shape[1],))
    base.lora.plan = TrainingPlan([part], with_dropout=False)
    try:
        hidden: Tensor = base.body(input_ids=probe.to(base.device), use_cache=False).last_hidden_state[0]
        logits: Tensor = base.model.lm_head(hidden).float()
    finally:
        base.lora.plan = None
    return logits


@torch.no_grad()
def _write(base: BaseModel, pairs: Mapping[str, LoraPair], directory: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float16, trust_remote_code=False)
    for name, parameter in merged.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = base.model.get_submodule(path)
        own = _dense(getattr(module, "base", module)) if leaf == "weight" else getattr(module, leaf)
        pair = pairs.get(path) if leaf == "weight" else None
        value = own.float() if pair is None else own.float() + (pair.b.float() @ pair.a.float()) * pair.scaling
        if float(value.abs().max()) > HALF_MAX:
            raise MergeImpossible(f"{name} has a value beyond fp16")
        parameter.copy_(value)
    merged.save_pretrained(directory)
    for name in TEXT_FILES:
        if (base.directory / name).is_file():
            shutil.copyfile(base.directory / name, directory / name)


def _dense(linear: Any) -> Tensor:
    """The weight `[O, I]` that the base computes on, dequantized if it is quantized."""
    weight: Tensor = linear.dense_weight if hasattr(linear, "dense_weight") else linear.weight
    return weight


@torch.no_grad()
def _plain_logits(directory: Path, probe: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    logits: Tensor = model(input_ids=probe).logits[0].float()
    return logits
