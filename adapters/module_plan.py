"""Which linears a config adapts, with which rank and scaling: PEFT's matching rules for plain names, without regexes.

Sources of the rules: peft's `check_target_module_exists`, `get_pattern_key` and LoRA's `update_layer`. Tests compare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapters.checked import DoorLimits
from adapters.errors import AdapterAlphaInvalid, AdapterModuleUnknown, AdapterNoModules
from adapters.manifest import AdapterConfig, BaseModelSpec
from adapters.strict_json import shown

Number = TypeVar("Number", int, float)


# The first numbered part behind a name that is not the path's first: "model.layers.<index>.self_attn.q_proj".
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """What the config says of one linear of the base."""

    path: str
    rank: int
    scaling: float


def plan_modules(config: AdapterConfig, base: BaseModelSpec, limits: DoorLimits) -> tuple[PlannedModule, ...]:
    """Return the linears that `config` adapts, in the base's order.

    Raises AdapterModuleUnknown for a target or layer that the base lacks, AdapterNoModules when nothing is left, and
    AdapterAlphaInvalid when a module's scaling is above the limit.
    """
    _check_targets_exist(config, base)
    targets, layers = frozenset(config.target_modules), frozenset(config.layers_to_transform or ())
    paths = [path for path in base.linears if _is_adapted(path, targets, layers)]
    if not paths:
        raise AdapterNoModules(param="target_modules")
    ranks = _PatternTable(config.rank_pattern)
    alphas = _PatternTable(config.alpha_pattern)
    plan = []
    for path in paths:
        rank = ranks.value(path, config.r)
        scaling = module_scaling(rank, alphas.value(path, config.lora_alpha), use_rslora=config.use_rslora)
        if scaling > limits.max_scale:
            raise AdapterAlphaInvalid(
                f"lora_alpha gives {path} a scale of {scaling:g}; at most {limits.max_scale:g} is served here.",
                param="lora_alpha",
            )
        plan.append(PlannedModule(path, rank, scaling))
    return tuple(plan)


def module_scaling(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _check_targets_exist(config: AdapterConfig, base: BaseModelSpec) -> None:
    known = {suffix for path in base.linears for suffix in _suffixes(path)}
    for target in config.target_modules:
        if target not in known:
            raise AdapterModuleUnknown(
                f"The base model has no module {shown(target)} that can be adapted.", param="target_modules"
            )
    layers = {_layer_index(path) for path in base.linears}
    for layer in config.layers_to_transform or ():
        if layer not in layers:
            raise AdapterModuleUnknown(f"The base model has no layer {layer}.", param="layers_to_transform")


def _is_adapted(path: str, targets: frozenset[str], layers: frozenset[int]) -> bool:
    if path in targets:  # PEFT applies layers_to_transform to suffixes alone
        return True
    if targets.isdisjoint(_suffixes(path)):
        return False
    return not layers or _layer_index(path) in layers


def _suffixes(path: str) -> list[str]:
    """The path and what is behind each of its dots."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _layer_index(path: str) -> int | None:
    match = _LAYER_INDEX.match(path)
    return int(match[1]) if match else None


class _PatternTable(Generic[Number]):
    """A rank_pattern or alpha_pattern: the first key, in the file's order, that names the module or its tail counts."""

    def __init__(self, pattern: Mapping[str, Number]) -> None:
        # PEFT takes the key for a regex, in which a dot stands for any character; the door lets in no other sign that
        # means something there. So each of these expressions has one fixed length and matches in one pass.
        self._entries: list[tuple[int, re.Pattern[str], Number]] = [
            (len(key), re.compile(key), value) for key, value in pattern.items()
        ]

    def value(self, path: str, default: Number) -> Number:
        for length, expression, value in self._entries:
            start = len(path) - length
            if (start == 0 or (start > 0 and path[start - 1] == ".")) and expression.fullmatch(path, start):
                return value
        return default
