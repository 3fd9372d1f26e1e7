"""What the door reads from an adapter_config.json, and the rules by which it applies to the base's modules."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from adapters.errors import AdapterBaseMismatch, AdapterRefused
from adapters.manifest import AdapterConfig
from adapters.module_plan import plan_modules
from adapters.peft_config import FIXED, HONOURED, IGNORED, parse_config
from tests.adapter_files import LIMITS, PEFT_CONFIG, Q0, config_bytes, tiny_base

BASE = tiny_base()
Q1 = Q0.replace("layers.0", "layers.1")


def parse(**changes: Any) -> AdapterConfig:
    return parse_config(config_bytes(**changes), BASE, LIMITS)


def plan(**changes: Any) -> dict[str, tuple[int, float]]:
    return {module.path: (module.rank, module.scaling) for module in plan_modules(parse(**changes), BASE, LIMITS)}


def test_plain_config_is_read() -> None:
    assert parse() == AdapterConfig(8, 16.0, ("v_proj", "q_proj"), base_model_name_or_path="tiny-llama")


def test_short_config_of_an_old_version_is_read() -> None:
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    assert parse_config(json.dumps(fields).encode(), BASE, LIMITS) == AdapterConfig(4, 8.0, ("q_proj",))


@pytest.mark.parametrize("field", sorted(set(PEFT_CONFIG) - {"peft_type", "r", "lora_alpha", "target_modules"}))
def test_null_means_the_default(field: str) -> None:
    expected = parse()
    assert parse(**{field: None}) == AdapterConfig(
        expected.r,
        expected.lora_alpha,
        expected.target_modules,
        base_model_name_or_path=None if field == "base_model_name_or_path" else "tiny-llama",
    )


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisation_that_leaves_the_base_alone_is_accepted(init: Any) -> None:
    assert parse(init_lora_weights=init) == parse()


def test_settings_of_eva_are_accepted_with_eva() -> None:
    assert parse(init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99}) == parse()


@pytest.mark.parametrize("field", sorted(IGNORED))
@pytest.mark.parametrize("value", [{"parent_library": "os"}, "x", 0.3, [1], True])
def test_ignored_field_may_hold_anything(field: str, value: Any) -> None:
    assert parse(**{field: value}) == parse()


def test_unknown_null_field_is_ignored() -> None:
    assert parse(field_of_a_later_version=None) == parse()


@pytest.mark.parametrize(
    "name", ["tiny-llama", "lodger/Tiny-Llama-1", "/data/models/tiny-llama/", "someone/TINY-LLAMA", "tiny-llama-1", ""]
)
def test_base_may_be_named_by_hub_id_path_or_alias(name: str) -> None:
    assert parse(base_model_name_or_path=name).base_model_name_or_path == name


@pytest.mark.parametrize("name", ["tiny-llama-2", "tiny-llama/other", "llama", "/"])
def test_other_base_is_refused_naming_both(name: str) -> None:
    with pytest.raises(AdapterBaseMismatch, match="tiny-llama") as refusal:
        parse(base_model_name_or_path=name)
    assert name in refusal.value.message


def test_no_field_is_in_two_tables() -> None:
    assert not HONOURED & IGNORED
    assert not (HONOURED | IGNORED) & FIXED.keys()


def test_targets_match_at_dots_alone() -> None:
    assert set(plan(target_modules=["q_proj"])) == {Q0, Q1}
    assert set(plan(target_modules=["self_attn.q_proj"])) == {Q0, Q1}
    assert set(plan(target_modules=["1.self_attn.q_proj", Q0])) == {Q0, Q1}
    assert set(plan(target_modules=["layers.1.self_attn.q_proj"])) == {Q1}


def test_layers_to_transform_limits_suffixes_but_not_whole_paths() -> None:
    assert set(plan(target_modules=["q_proj"], layers_to_transform=[1])) == {Q1}
    assert set(plan(target_modules=["q_proj"], layers_to_transform=1)) == {Q1}
    assert set(plan(target_modules=["q_proj"], layers_to_transform=[])) == {Q0, Q1}
    assert set(plan(target_modules=["q_proj", Q0], layers_to_transform=[1])) == {Q0, Q1}


def test_first_pattern_key_that_matches_counts() -> None:
    assert plan(target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 4, "q_proj": 2}) == {
        Q0: (2, 8.0),
        Q1: (4, 4.0),
    }
    assert plan(target_modules=["q_proj"], rank_pattern={"q_proj": 2, Q1: 4}) == {Q0: (2, 8.0), Q1: (2, 8.0)}
    assert plan(target_modules=["q_proj"], rank_pattern={"proj": 2, "other": 3}) == {Q0: (8, 2.0), Q1: (8, 2.0)}


def test_scaling_is_of_each_modules_own_rank_and_alpha() -> None:
    changes = {"target_modules": ["q_proj"], "rank_pattern": {Q0: 4}, "alpha_pattern": {Q1: 2.5}}
    assert plan(**changes) == {Q0: (4, 4.0), Q1: (8, 2.5 / 8)}
    assert plan(**changes, use_rslora=True) == {Q0: (4, 8.0), Q1: (8, 2.5 / math.sqrt(8))}


def test_many_names_are_judged_quickly() -> None:
    base = tiny_base(num_layers=80)
    names = [f"l{i}.q_proj" for i in range(5000)]
    pattern = {f"{i:03}.self_attn.q_proj": 8 for i in range(len(base.linears))}
    began = time.process_time()
    with pytest.raises(AdapterRefused):
        plan_modules(parse_config(config_bytes(target_modules=names), base, LIMITS), base, LIMITS)
    config = parse_config(config_bytes(rank_pattern=pattern, alpha_pattern=pattern), base, LIMITS)
    plan_modules(config, base, LIMITS)
    assert time.process_time() - began < 0.5
