"""PEFT running one adapter alone, one sequence at a time: the slow reference of every exactness test."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PeftModel


class Oracle:
    """Greedy decoding of the base, or of one adapter on it, with transformers' own attention."""

    def __init__(self, base_dir: Path, dtype: torch.dtype = torch.float32) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype).eval()
        self._peft: PeftModel | None = None
        self._names: dict[Path, str] = {}

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int, adapter: Path | None = None) -> tuple[list[int], list[float]]:
        """`count` greedy tokens after `prompt` and their log-probabilities; the end token does not stop it."""
        model = self._select(adapter)
        tokens, logprobs, cache, ids = [], [], None, torch.tensor([list(prompt)])
        for _ in range(count):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            scores = torch.log_softmax(out.logits[0, -1].float(), -1)
            tokens.append(int(scores.argmax()))
            logprobs.append(float(scores[tokens[-1]]))
            ids = torch.tensor([[tokens[-1]]])
        return tokens, logprobs

    def _select(self, adapter: Path | None) -> torch.nn.Module:
        """The model with that adapter alone active."""
        if adapter is None:
            if self._peft is None:
                return self._base
            self._peft.base_model.disable_adapter_layers()
            return self._peft
        if self._peft is None:
            self._names[adapter] = "a0"
            self._peft = PeftModel.from_pretrained(self._base, adapter, adapter_name="a0").eval()
        elif adapter not in self._names:
            # Names of one length: PEFT finds an adapter's tensors by substring in places.
            self._names[adapter] = f"a{len(self._names)}"
            self._peft.load_adapter(adapter, adapter_name=self._names[adapter])
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(self._names[adapter])
        return self._peft
