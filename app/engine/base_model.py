"""The one base model in memory: loaded through transformers, quantized to NF4 by bitsandbytes, wrapped for LoRA.

The only file that imports bitsandbytes. The base is frozen: nothing here or elsewhere changes a weight after loading,
and `checksums` lets tests and the watchdog say so. Engine thread only, once it is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from adapters.layers import LoraContext, LoraLinear
from adapters.manifest import BaseModelSpec
from app.engine.attention import ATTENTION_NAME, AttentionContext
from app.engine.base_files import base_digest, base_name, build_once, resolve_base, source_fingerprint
from app.engine.frozen_linear import FrozenLinear, Weight, freeze

logger = logging.getLogger(__name__)

TARGET_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Those that read one input, in the order in which every Llama-like decoder asks them.
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",), ("lm_head",))


class BaseModelUnsupported(Exception):
    """This model cannot be the base. Lodger serves Llama-like decoders with separate q, k, v, o, gate, up and down."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The numbers of the model that the engine plans with."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context: int  # tokens


@dataclass(slots=True, eq=False)
class BaseModel:
    """The frozen base with its two seams: `lora` adds adapters to its linears, `attention` says who sees whom."""

    model: Any  # transformers' ForCausalLM
    spec: BaseModelSpec
    shapes: Shapes
    lora: LoraContext
    attention: AttentionContext
    device: torch.device
    dtype: torch.dtype
    quantization: str  # "nf4" or "none"
    directory: Path  # the original's files: tokenizer, chat template, generation config
    eos_ids: frozenset[int]

    @property
    def body(self) -> Any:
        """The decoder without its head."""
        return self.model.model

    def embed_and_rotate(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """ids and positions `[B, T]` -> hidden states `[B, T, hidden]` and rotary (cos, sin)."""
        hidden = self.body.embed_tokens(ids)
        return hidden, self.body.rotary_emb(hidden, position_ids=positions)

    def run_layer(self, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
        """One decoder layer under the current attention mode and LoRA plan."""
        out: Any = self.body.layers[index](
            hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False
        )
        layer_out: Tensor = out[0] if isinstance(out, tuple) else out
        return layer_out

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: `[N, hidden]` -> `[N, V]`, in fp32."""
        out: Tensor = self.model.lm_head(self.body.norm(hidden))
        return out.float()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by kind: NF4 values, the dense weights a CPU computes on, and everything else in 16 or 32 bits."""
        kinds = {"nf4": 0, "dense": 0, "other": 0}
        seen: set[int] = set()
        for module in self.model.modules():
            if isinstance(module, FrozenLinear):
                kinds["nf4"] += 0 if module.nf4 is None else module.nf4.nbytes
                kinds["dense"] += module.num_bytes
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if id(tensor) not in seen:
                    kinds["nf4" if tensor.dtype == torch.uint8 else "other"] += tensor.nbytes
                seen.add(id(tensor))
        return kinds

    def memory_words(self) -> str:
        """One sentence for the operator at start."""
        kinds = self.memory_bytes()
        parts = []
        if kinds["nf4"]:
            parts.append(f"{_mb(kinds['nf4'])} of NF4 weights")
        if kinds["dense"]:
            parts.append(f"{_mb(kinds['dense'])} of linears and head in {_dtype_name(self.dtype)} to compute on")
        parts.append(f"{_mb(kinds['other'])} of embeddings and norms" if parts else f"{_mb(kinds['other'])} of weights")
        return f"{self.spec.id} on {self.device}: " + ", ".join(parts) + f"; computes in {_dtype_name(self.dtype)}"

    def checksums(self) -> dict[str, str]:
        """sha256 of every tensor of the base, packed ones included."""
        sums = {}
        for name, module in self.model.named_modules():
            tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            if isinstance(module, FrozenLinear):
                tensors["weight"] = module.dense_weight
                if module.nf4 is not None:
                    tensors["nf4"] = module.nf4.data
            for key, tensor in tensors.items():
                raw = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
                sums[f"{name}.{key}"] = hashlib.sha256(raw).hexdigest()
        return sums


def load_base_model(
    model: str,
    data_dir: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    quantization: str = "nf4",
    dtype: str = "auto",
    device: str = "auto",
) -> BaseModel:
    """Load the base, quantizing it and keeping a snapshot on disk the first time.

    Raises BaseModelUnsupported, BaseModelMissing, or what transformers raises on a model that is not there.
    """
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    compute = choose_dtype(dtype, target)
    source = resolve_base(model, data_dir, revision)
    served = name or base_name(model)
    _require_supported(AutoConfig.from_pretrained(source))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        if quantization == "nf4":
            snapshot = _snapshot(source, served, data_dir, target)
            loaded = _load_quantized(snapshot, compute, target)
        else:
            loaded = _from_pretrained(source, dtype=compute, device_map={"": target})
    digest = base_digest(source, quantization, data_dir / "base" / served)
    spellings = (model, str(source), base_name(model))
    base = _wrap(loaded, served, spellings, digest, target, compute, quantization, source)
    logger.info(base.memory_words(), extra={"action": "base_loaded", "base": served})
    return base


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes it natively, else float32: emulated bf16 is several times slower."""
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def _from_pretrained(source: Path, **kwargs: Any) -> Any:
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        source, attn_implementation=ATTENTION_NAME, trust_remote_code=False, use_safetensors=True, **kwargs
    )


def _quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _snapshot(source: Path, served: str, data_dir: Path, device: torch.device) -> Path:
    """The quantized model's directory; made once per model, revision and quantization settings."""
    key = f"nf4-dq-{source_fingerprint(source)}"

    def quantize(out: Path) -> None:
        logger.info("quantizing the base once", extra={"action": "quantizing", "base": served})
        transformers_logging.enable_progress_bar()
        quantized = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.bfloat16,
            quantization_config=_quantization_config(torch.bfloat16),
            device_map={"": device},
            trust_remote_code=False,
        )
        _forbid_repacking(quantized)
        quantized.save_pretrained(out)

    return build_once(data_dir / "base" / served / key, quantize)


def _load_quantized(snapshot: Path, dtype: torch.dtype, device: torch.device) -> Any:
    loaded = _from_pretrained(snapshot, dtype=dtype, device_map={"": device})
    _forbid_repacking(loaded)
    for module in loaded.modules():
        if not _is_4bit(module):
            # transformers loads a quantized model's other weights as they were saved, whatever dtype is asked for.
            # Buffers stay: rotary frequencies are fp32 by design.
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            continue
        module.compute_dtype, module.compute_type_is_set = dtype, True
        # What the values are rounded to when they are unpacked. The snapshot says bf16, and bitsandbytes heeds it where
        # there are gradients and not where there are none: in fp32, training would see other weights than serving.
        module.weight.quant_state.dtype = dtype
    return loaded


def _freeze_for_cpu(model: Any) -> None:
    """Put frozen dense products in the place of the target linears and the head.

    On a CPU the dense product is faster than unpacking 4-bit values from two tokens on, and bitsandbytes' fused kernel
    would repack the weight in place at the first call, after which autograd through it is silently wrong.
    """
    embeddings = model.get_input_embeddings().weight
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        for leaves in ONE_INPUT:
            if all(leaf in children for leaf in leaves):
                frozen = freeze([_weight_of(children[leaf], embeddings) for leaf in leaves])
                for leaf, linear in zip(leaves, frozen, strict=True):
                    setattr(parent, leaf, linear)


def _weight_of(linear: nn.Module, embeddings: Tensor) -> Weight:
    import bitsandbytes as bnb

    weight: Any = linear.weight
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    if not _is_4bit(linear):
        return Weight(weight.data, bias, is_tied=weight.data_ptr() == embeddings.data_ptr())
    return Weight(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), bias, weight)


def _is_4bit(module: nn.Module) -> bool:
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear4bit)


def _forbid_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first inference call on an AVX512-BF16 CPU."""
    for module in model.modules():
        if _is_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _require_supported(config: Any) -> None:
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "layer_types", None) not in (None, []):
        types = set(getattr(config, "layer_types", None) or ())
        if types - {"full_attention", "sliding_attention"} or getattr(config, "attn_logit_softcapping", None):
            raise BaseModelUnsupported(f"{config.model_type}: only full softmax attention is supported")
    for name in ("logits_scaling", "logit_scale", "final_logit_softcapping", "embedding_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise BaseModelUnsupported(f"{config.model_type}: {name} is not supported")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        # They look at the longest position of a batch, so a token would depend on its neighbours.
        raise BaseModelUnsupported(f"{config.model_type}: rope type {rope} is not supported")
    if not hasattr(config, "num_key_value_heads"):
        raise BaseModelUnsupported(f"{config.model_type} is not a Llama-like decoder")


def _max_context(config: Any) -> int:
    """Where a layer slides, attention is exact only inside the window: the window is then the longest context."""
    window = getattr(config, "sliding_window", None)
    slides = getattr(config, "use_sliding_window", True) and window
    if getattr(config, "layer_types", None):
        slides = window and "sliding_attention" in config.layer_types
    return int(min(config.max_position_embeddings, window) if slides else config.max_position_embeddings)


def _wrap(
    model: Any,
    served: str,
    spellings: tuple[str, ...],
    digest: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
    directory: Path,
) -> BaseModel:
    model.eval().requires_grad_(False)
    vocab_size = model.lm_head.weight.shape[0]
    if device.type == "cpu":
        _freeze_for_cpu(model)
    linears: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in TARGET_KINDS and not isinstance(module, LoraLinear):
            linears[name] = (int(module.in_features), int(module.out_features))
    if {path.rsplit(".", 1)[1] for path in linears} != set(TARGET_KINDS):
        raise BaseModelUnsupported(f"{served}: not all of {', '.join(TARGET_KINDS)} are there")
    context = LoraContext(tuple(linears))
    for index, path in enumerate(linears):
        parent, leaf = path.rsplit(".", 1)
        owner = model.get_submodule(parent)
        setattr(owner, leaf, LoraLinear(getattr(owner, leaf), context, index))
    attention = AttentionContext()
    attention.bind(model)
    config = model.config
    heads = config.num_attention_heads
    shapes = Shapes(
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        vocab_size=vocab_size,
        max_context=_max_context(config),
    )
    names = {served, *spellings, getattr(config, "_name_or_path", "") or ""} - {""}
    spec = BaseModelSpec(served, digest, tuple(sorted(names)), linears)
    base = BaseModel(
        model, spec, shapes, context, attention, device, dtype, quantization, directory, _eos_ids(model, directory)
    )
    _check_layer_by_layer(base)
    return base


@torch.inference_mode()
def _check_layer_by_layer(base: BaseModel) -> None:
    """See that embedding, layers, norm and head, called one by one as training calls them, are the whole model.

    An architecture that does more between them (scales, shares, offsets) would be served or trained wrongly in silence.
    """
    ids = torch.arange(8, device=base.device)[None] % base.shapes.vocab_size
    positions = torch.arange(8, device=base.device)[None]
    whole = base.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    hidden, rotary = base.embed_and_rotate(ids, positions)
    for index in range(base.shapes.num_layers):
        hidden = base.run_layer(index, hidden, rotary, positions)
    tolerance = 1e-3 if base.dtype == torch.float32 else 5e-2
    if (base.logits(hidden[0]) - whole).norm() > tolerance * whole.norm():
        raise BaseModelUnsupported(f"{base.spec.id} computes more than embedding, layers, norm and head")


def _eos_ids(model: Any, directory: Path) -> frozenset[int]:
    """End-of-sequence ids from the generation config, else from the config."""
    path = directory / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    if found is None:
        found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = model.config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def make_adamw(
    parameters: list[Tensor], *, betas: tuple[float, float], eps: float, weight_decay: float, is_8bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW for an adapter's fp32 parameters: bitsandbytes' paged one on CUDA, which keeps its state out of the way of
    serving when memory is short, torch's own elsewhere. With `is_8bit` the moments are blocks of 8 bits, in parameters
    of 4,096 numbers and more (arXiv:2110.02861). Here, since this is the one file that knows bitsandbytes.
    """
    is_on_cuda = parameters[0].device.type == "cuda"
    if not (is_on_cuda or is_8bit):
        # Fused: one pass over each tensor, no copies, and the same sums whatever other tensors there are. A quantum of
        # 15 ms instead of 50 to 150 (rank 16 on all linears of SmolLM2).
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    import bitsandbytes as bnb

    kinds = {
        (True, False): bnb.optim.PagedAdamW32bit,
        (True, True): bnb.optim.PagedAdamW8bit,
        (False, True): bnb.optim.AdamW8bit,
    }
    kind = kinds[is_on_cuda, is_8bit]
    made: torch.optim.Optimizer = kind(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)
    return made


def use_threads(count: int) -> None:
    """Set torch's CPU threads once at start: more threads than free cores cost a factor, not a percentage."""
    torch.set_num_threads(count)
    # Nothing here is compiled, and bitsandbytes would load torch's compiler at import: two seconds of every start.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(count))
