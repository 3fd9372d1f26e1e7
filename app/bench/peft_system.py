"""PEFT on the same numbers: the dense values of the very NF4 weights that Lodger serves, in the same compute dtype.

Dense is PEFT's best setting: with 4-bit linears it would dequantize them in every call. `mixed` is one static batch at
a time by `adapter_names`, left-padded, with a KV cache; `swap` is one request at a time after `set_adapter`.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from adapters.layers import LoraLinear
from app.bench.figures import ProcessFacts, RequestTrace, RoundTrace
from app.bench.machine import process_age_s, rss_bytes
from app.bench.tenancy import Tenancy
from app.bench.workload import BenchFailed, Job
from app.bootstrap import load_base
from app.engine.base_model import BaseModel, use_threads
from app.engine.frozen_linear import FrozenLinear
from app.machine import keep_freed_memory

BASE_ROWS = "__base__"  # PEFT's name in `adapter_names` for rows without an adapter


class PeftSystem:
    """One PEFT model for both ways of using it."""

    def __init__(self, tenancy: Tenancy, warm: Sequence[str], dtype: str | None = None) -> None:
        settings = tenancy.settings
        if dtype is not None:
            settings = settings.model_copy(update={"dtype": dtype})
        keep_freed_memory()
        use_threads(settings.threads)
        self._threads = settings.threads
        self._directories = tenancy.directories
        base = load_base(settings)
        self._dtype, self._device = base.dtype, base.device
        self._weights = "dense from nf4" if base.quantization == "nf4" else "dense"
        model = dense_twin(base)
        del base
        gc.collect()
        self._names: dict[str, str] = {}
        self._model = _with_adapter(model, self._directories[warm[0]], self._name(warm[0])) if warm else model
        self._has_adapters = bool(warm)
        for label in warm[1:]:
            self._load(label)
        self._model.eval()
        self._start_s = process_age_s()

    def warm_up(self, jobs: Sequence[Job]) -> None:
        self.mixed(jobs, min(len(jobs), 8))
        self.swap(jobs, 1)

    def mixed(self, jobs: Sequence[Job], concurrency: int) -> RoundTrace:
        """Static batches of `concurrency` neighbours."""
        return self._run([jobs[i : i + concurrency] for i in range(0, len(jobs), concurrency)], is_mixed=True)

    def swap(self, jobs: Sequence[Job], concurrency: int) -> RoundTrace:
        """One request at a time, the first `concurrency` of them: the speed does not depend on how many there are."""
        return self._run([[job] for job in jobs[:concurrency]], is_mixed=False)

    def facts(self) -> ProcessFacts:
        dtype = str(self._dtype).removeprefix("torch.")
        return ProcessFacts(self._start_s, rss_bytes(), self._threads, dtype, self._weights)

    def close(self) -> None:
        """Nothing is left open."""

    @torch.inference_mode()
    def _run(self, batches: Sequence[Sequence[Job]], *, is_mixed: bool) -> RoundTrace:
        began = time.monotonic()
        traces = [trace for batch in batches for trace in self._answer(batch, is_mixed=is_mixed)]
        wall_s = time.monotonic() - began
        for label in [label for label in self._names if label.startswith("cold-")]:
            if len(self._names) > 1:  # PEFT cannot be without any
                self._model.delete_adapter(self._names.pop(label))  # cold again for the other way
        return RoundTrace(wall_s, tuple(traces))

    def _answer(self, jobs: Sequence[Job], *, is_mixed: bool) -> list[RequestTrace]:
        asked_at = time.monotonic()
        for job in jobs:
            if job.adapter is not None and job.adapter not in self._names:
                self._load(job.adapter)
        count = jobs[0].output_tokens
        clock = _TokenClock()
        options: dict[str, Any] = {}
        if self._has_adapters and is_mixed:
            options["adapter_names"] = [BASE_ROWS if job.adapter is None else self._names[job.adapter] for job in jobs]
        elif self._has_adapters:
            self._select(jobs[0].adapter)
        ids, mask = self._pad([job.prompt for job in jobs])
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,  # never stops early, and spends no time on looking
            pad_token_id=0,
            streamer=clock,
            **options,
        )
        new = out[:, ids.shape[1] :].tolist()
        if any(len(tokens) != count for tokens in new) or len(clock.at) != count:
            raise BenchFailed(f"PEFT made {len(new[0])} tokens instead of {count}")
        return [
            RequestTrace(job.index, job.is_cold, asked_at, tuple(clock.at), count, tuple(tokens))
            for job, tokens in zip(jobs, new, strict=True)
        ]

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left padding: ids and mask `[B, T]`."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _select(self, label: str | None) -> None:
        if label is None:
            self._model.base_model.disable_adapter_layers()
        else:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(self._names[label], inference_mode=True)

    def _load(self, label: str) -> None:
        if not self._has_adapters:
            self._model = _with_adapter(self._model, self._directories[label], self._name(label)).eval()
            self._has_adapters = True
            return
        self._model.load_adapter(self._directories[label], adapter_name=self._name(label))
        self._model.eval()

    def _name(self, label: str) -> str:
        # Names of one length, none part of another: PEFT finds an adapter's tensors by substring in places.
        return self._names.setdefault(label, label.replace("-", "_"))


class _TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when each step's tokens are there. The first thing it is handed is the prompt."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self.at.append(time.monotonic())
        self._has_prompt = True

    def end(self) -> None: ...


def dense_twin(base: BaseModel) -> Any:
    """transformers' own model with plain linears that hold the base's values in its compute dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = AutoModelForCausalLM.from_pretrained(
            base.directory, dtype=base.dtype, device_map={"": base.device}, use_safetensors=True
        )
    # Embeddings and norms too: the 4-bit snapshot keeps them in bf16, whatever the original has.
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            ours = base.model.get_submodule(name)
            weight = dense_weight(ours.base if isinstance(ours, LoraLinear) else ours, base)
            module.weight = nn.Parameter(weight, requires_grad=False)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(base.model.get_submodule(name).get_parameter(key).data)
    twin.tie_weights()
    return twin.eval().requires_grad_(False)


@torch.no_grad()
def dense_weight(linear: nn.Module, base: BaseModel) -> Tensor:
    """The matrix `[O, I]` that a linear multiplies by. A 4-bit one tells it by its products with the unit vectors,
    which are exact: each is one weight and zeros."""
    if isinstance(linear, FrozenLinear):
        return linear.dense_weight.clone()
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if weight.dtype == base.dtype:
        return weight.detach()
    features_in = int(linear.in_features)  # type: ignore[arg-type]
    product: Tensor = linear(torch.eye(features_in, dtype=base.dtype, device=base.device))
    if linear.bias is not None:
        product = product - linear.bias.to(base.dtype)  # type: ignore[union-attr, operator]
    return product.t().contiguous()


def _with_adapter(model: Any, directory: Path, name: str) -> Any:
    with warnings.catch_warnings():  # PEFT still reads an attribute that transformers has deprecated
        warnings.simplefilter("ignore")
        from peft import PeftModel

        return PeftModel.from_pretrained(model, directory, adapter_name=name)
