"""Files of small adapters, made by hand: a plain one to vary, and safetensors headers of any kind.

numpy only. The shapes are those of the tiny Llama that other tests build: 2 layers, hidden 64, 2 KV heads of 16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.door import DoorLimits, tensor_name
from adapters.manifest import BaseModelSpec

NUM_LAYERS = 2
KINDS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 128),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}
LIMITS = DoorLimits()
Q0 = "model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = tensor_name(Q0, "A"), tensor_name(Q0, "B")


def tiny_base(num_layers: int = NUM_LAYERS) -> BaseModelSpec:
    linears = {f"model.layers.{i}.{kind}": shape for i in range(num_layers) for kind, shape in KINDS.items()}
    return BaseModelSpec(id="tiny-llama", digest="b" * 64, aliases=("lodger/Tiny-Llama-1",), linears=linears)


# A config as peft 0.21.2 saves it.
PEFT_CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "tiny-llama",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def config_bytes(**changes: Any) -> bytes:
    return json.dumps(PEFT_CONFIG | changes, indent=2).encode()


@dataclass(frozen=True)
class RawTensor:
    """A tensor as its file has it: the dtype's name, the declared shape, and the bytes."""

    dtype: str
    shape: list[int]
    data: bytes


def raw(values: np.ndarray, dtype: str = "F32") -> RawTensor:
    if dtype == "BF16":
        data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "BOOL": "?"}[dtype]).tobytes()
    return RawTensor(dtype, list(values.shape), data)


def plain_tensors(
    kinds: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 8, seed: int = 0, dtype: str = "F32"
) -> dict[str, RawTensor]:
    """The tensors of an ordinary adapter on the named kinds of every layer."""
    random = np.random.default_rng(seed)
    tensors = {}
    for path, (in_features, out_features) in tiny_base().linears.items():
        if path.rsplit(".", 1)[1] in kinds:
            tensors[tensor_name(path, "A")] = raw(random.normal(0, 0.1, (rank, in_features)), dtype)
            tensors[tensor_name(path, "B")] = raw(random.normal(0, 0.1, (out_features, rank)), dtype)
    return tensors


def safetensors_bytes(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    return with_header(header, b"".join(tensor.data for tensor in tensors.values()))


def with_header(header: Any, data: bytes = b"") -> bytes:
    """A file of this header (an object, or its bytes as they are) and data."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data


def edit_header(edit: Callable[[dict[str, Any]], None], data: bytes | None = None) -> bytes:
    """The plain adapter's file with its header changed in place by `edit`."""
    file = safetensors_bytes(plain_tensors())
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    edit(header)
    return with_header(header, file[8 + length :] if data is None else data)


PLAIN_CONFIG = config_bytes()
PLAIN_WEIGHTS = safetensors_bytes(plain_tensors())
