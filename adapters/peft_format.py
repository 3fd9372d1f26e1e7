"""Write an adapter as PEFT does: the config and the safetensors file that PEFT loads and the door accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.door import tensor_name
from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig

PEFT_VERSION = "0.21.2"  # whose config fields these are
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8

# Every field of PEFT's LoRA config that we do not set, with its default: an explicit file means the same to a later
# PEFT whose defaults have changed.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
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
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}


def write_peft_directory(
    directory: Path, config: AdapterConfig, modules: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    """Write both files into `directory`, which is made if need be. Arguments as of the two functions below."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_bytes(peft_config_json(config))
    write_weights(directory / WEIGHTS_FILE, modules, dtype)


def peft_config_json(config: AdapterConfig) -> bytes:
    """Return adapter_config.json with every field spelled out. `base_model_name_or_path` should be the base's id."""
    honoured = {
        "r": config.r,
        "lora_alpha": int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "layers_to_transform": None if config.layers_to_transform is None else list(config.layers_to_transform),
        "rank_pattern": dict(config.rank_pattern),  # in its order: the first key that matches counts
        "alpha_pattern": dict(config.alpha_pattern),
        "base_model_name_or_path": config.base_model_name_or_path,
    }
    fields = _DEFAULTS | honoured
    return json.dumps({name: fields[name] for name in sorted(fields)}, indent=2, allow_nan=False).encode()


def write_weights(path: Path, modules: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Write lora_A [r, I] and lora_B [O, r] of each module path, unscaled, as safetensors in `dtype`."""
    tensors = {
        tensor_name(path, side): tensor
        for path, pair in sorted(modules.items())
        for side, tensor in zip("AB", pair, strict=True)
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            values = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            file.write(values.view(torch.uint8).numpy().data)
