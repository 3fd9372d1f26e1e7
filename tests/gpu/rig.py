"""What the GPU tests share: an engine that is run to its end, and PEFT on the very same 4-bit weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.manifest import AdapterManifest
from app.engine.assembly import EngineConfig, assemble_engine
from app.engine.base_model import BaseModel
from app.engine.sequence import Request
from tests.engine_rig import Answer, Collector, DirectoryLoader

KV_BYTES = 64 << 20

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PeftModel


def run_engine(
    base: BaseModel,
    directories: Sequence[Path],
    make_requests: Callable[[list[AdapterManifest]], list[Request]],
    **config: Any,
) -> dict[str, Answer]:
    """Serve all requests in one engine; one tenant an adapter directory. Checks the engine's books at the end."""
    loader = DirectoryLoader(base)
    adapters = [loader.add(f"tenant{i}", directory) for i, directory in enumerate(directories)]
    engine = assemble_engine(base, loader, EngineConfig(**{"kv_cache_bytes": KV_BYTES, **config}))
    engine.start()
    sink = Collector()
    try:
        for request in make_requests(adapters):
            engine.submit(request, sink)
        assert engine.drain(300)
    finally:
        engine.stop()
    engine.check()
    return sink.answers


class PeftOnBase:
    """PEFT with ordinary attention on the original base, or on the 4-bit snapshot that the server made of it."""

    def __init__(self, base: BaseModel, data_dir: Path) -> None:
        source = base.directory
        if base.quantization == "nf4":
            (source,) = (data_dir / "base" / base.spec.id).glob("nf4-dq-*")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=base.dtype, device_map={"": base.device})
        for module in model.modules():
            if hasattr(module, "compute_dtype"):  # a 4-bit linear: computes in the dtype that its snapshot names
                module.compute_dtype, module.compute_type_is_set = base.dtype, True
                module.weight.quant_state.dtype = base.dtype
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(base.dtype)
        self.model: Any = model.eval()
        self._device = base.device
        self._adapted: dict[Path, Any] = {}

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], adapter: Path | None) -> Tensor:
        """Of each token after the first, given those before it: `[len(ids) - 1]`, fp32, on the CPU."""
        wanted = torch.tensor([list(ids)], device=self._device)
        if adapter is None:
            logits = self.model(input_ids=wanted, use_cache=False).logits
        else:
            adapted = PeftModel.from_pretrained(self.model, adapter, adapter_name="a").eval()
            logits = adapted(input_ids=wanted, use_cache=False).logits
            self.model = adapted.unload()
        scores = torch.log_softmax(logits[0, :-1].float(), -1)
        return scores.gather(1, wanted[0, 1:, None])[:, 0].cpu()
