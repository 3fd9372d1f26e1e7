"""Read a stranger's adapter_config.json: a closed schema over PEFT's LoRA config. Bytes in, `AdapterConfig` out.

Every field that PEFT knows is in exactly one of three places: `HONOURED` (read below), `IGNORED` (no effect once
weights are given), `FIXED` (only the values listed are accepted, since any other changes what the adapter computes, or
the base itself). A test compares the three with the installed LoraConfig.
"""

from __future__ import annotations

import math
import re
from typing import Any

from adapters.checked import DoorLimits
from adapters.errors import (
    AdapterAlphaInvalid,
    AdapterBaseMismatch,
    AdapterConfigFieldUnknown,
    AdapterConfigInvalid,
    AdapterConfigTooLarge,
    AdapterConfigValueUnsupported,
    AdapterRankInvalid,
    AdapterRankTooLarge,
    AdapterTypeUnsupported,
)
from adapters.manifest import AdapterConfig, BaseModelSpec
from adapters.strict_json import JsonRefused, parse_object, shown

HONOURED = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
    }
)
IGNORED = frozenset({"auto_mapping", "peft_version", "inference_mode", "lora_dropout", "revision"})

# Field -> values accepted besides null. Where PEFT only asks whether a list is empty, the empty one is its default too.
FIXED: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",),
    # They decide how weights begin, and ours are given. The others (olora, pissa, corda, loftq...) alter the base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "exclude_modules": ([],),
    "modules_to_save": ([],),
    "layers_pattern": ([], ""),
    "layer_replication": (),
    "target_parameters": ([],),
    "trainable_token_indices": (),
    "ensure_weight_tying": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "qalora_group_size": (16,),
    "use_bdlora": (),
    "alora_invocation_tokens": (),
    "loftq_config": ({},),
    "eva_config": (),  # an object when init_lora_weights is "eva"
    "corda_config": (),
    "lora_ga_config": (),
    "velora_config": (),
    "monteclora_config": (),
    "arrow_config": (),
    "kasa_config": (),
    "megatron_config": (),
    "megatron_core": ("megatron.core",),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}

MODULE_PATH = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_MAX_PATH_CHARACTERS = 256


def parse_config(
    data: bytes, base: BaseModelSpec, limits: DoorLimits, *, check_base_name: bool = True
) -> AdapterConfig:
    """Return what Lodger honours of a PEFT LoRA config. Raises the config codes of `adapters.errors`."""
    if len(data) > limits.max_config_bytes:
        raise AdapterConfigTooLarge()
    try:
        fields = parse_object(data, max_depth=limits.max_config_depth)
    except JsonRefused as exc:
        raise AdapterConfigInvalid(f"adapter_config.json cannot be read: {exc}. Send it as PEFT wrote it.") from exc
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":  # first: another type's fields are all unknown here
        raise AdapterTypeUnsupported(param="peft_type")
    _check_other_fields(fields)
    config = AdapterConfig(
        r=_rank(fields.get("r"), "r", limits),
        lora_alpha=_alpha(fields.get("lora_alpha"), "lora_alpha"),
        target_modules=_targets(fields.get("target_modules")),
        use_rslora=_flag(fields.get("use_rslora"), "use_rslora"),
        layers_to_transform=_layers(fields.get("layers_to_transform")),
        rank_pattern={
            key: _rank(value, f"rank_pattern.{key}", limits)
            for key, value in _pattern(fields.get("rank_pattern"), "rank_pattern", base).items()
        },
        alpha_pattern={
            key: _alpha(value, f"alpha_pattern.{key}")
            for key, value in _pattern(fields.get("alpha_pattern"), "alpha_pattern", base).items()
        },
        base_model_name_or_path=_base_name(fields.get("base_model_name_or_path")),
    )
    if check_base_name and not names_base(config.base_model_name_or_path, base):
        raise AdapterBaseMismatch(
            f"The adapter was made for {shown(str(config.base_model_name_or_path))}; this server's base is {base.id}.",
            param="base_model_name_or_path",
        )
    return config


def names_base(name: str | None, base: BaseModelSpec) -> bool:
    """True when a config's base name may mean `base`.

    People train from a hub id or from a local directory, so the last part counts, in any case; no name says nothing,
    and the shapes decide.
    """
    if not name:
        return True
    spellings = {base.id, *base.aliases}
    return name in spellings or _last_part(name) in {_last_part(spelling) for spelling in spellings}


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _check_other_fields(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if value is None or name in HONOURED or name in IGNORED:
            continue
        if name not in FIXED:
            raise AdapterConfigFieldUnknown(
                f"PEFT's LoRA config has no field {shown(name)}. Remove it or set it to null.", param=shown(name)
            )
        if name == "eva_config" and fields.get("init_lora_weights") == "eva" and isinstance(value, dict):
            continue
        # By type as well: to Python 0 == False and 1 == True.
        if not any(type(value) is type(allowed) and value == allowed for allowed in FIXED[name]):
            raise AdapterConfigValueUnsupported(
                f"The config field {name} has a value that is not served here. Train with its default.", param=name
            )


def _rank(value: Any, param: str, limits: DoorLimits) -> int:
    if type(value) is not int or value < 1:
        raise AdapterRankInvalid(f"{param} must be a whole number of at least 1.", param=param)
    if value > limits.max_rank:
        raise AdapterRankTooLarge(
            f"{param} is above {limits.max_rank}, the largest rank served here. Train with a lower one.", param=param
        )
    return value


def _alpha(value: Any, param: str) -> float:
    if type(value) in (int, float):
        try:
            alpha = float(value)
        except OverflowError:
            alpha = math.inf
        if 0 < alpha < math.inf:
            return alpha
    raise AdapterAlphaInvalid(f"{param} must be a finite number above 0.", param=param)


def _flag(value: Any, param: str) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise AdapterConfigValueUnsupported(f"{param} must be true or false.", param=param)
    return value


def _targets(value: Any) -> tuple[str, ...]:
    # A string is a regular expression to PEFT: it can match anything and run for hours.
    if not isinstance(value, list) or not all(isinstance(item, str) and _is_path(item) for item in value):
        raise AdapterConfigValueUnsupported(
            'target_modules must be a list of plain module names, such as ["q_proj", "v_proj"].', param="target_modules"
        )
    return tuple(dict.fromkeys(value))


def _layers(value: Any) -> tuple[int, ...] | None:
    layers = [value] if type(value) is int else value
    if layers is None or layers == []:  # PEFT takes an empty list for "all"
        return None
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise AdapterConfigValueUnsupported(
            "layers_to_transform must be a layer's number or a list of them.", param="layers_to_transform"
        )
    return tuple(dict.fromkeys(layers))


def _pattern(value: Any, param: str, base: BaseModelSpec) -> dict[str, Any]:
    if value is None:
        return {}
    # PEFT takes a key for a regular expression. One entry per module is as many as can have an effect.
    if not isinstance(value, dict) or len(value) > len(base.linears) or not all(_is_path(key) for key in value):
        raise AdapterConfigValueUnsupported(
            f"{param} must map plain module names or dotted paths to numbers, at most one per module.", param=param
        )
    return value


def _base_name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise AdapterConfigValueUnsupported(
            "base_model_name_or_path must be a string.", param="base_model_name_or_path"
        )
    return value


def _is_path(text: str) -> bool:
    return len(text) <= _MAX_PATH_CHARACTERS and MODULE_PATH.fullmatch(text) is not None
