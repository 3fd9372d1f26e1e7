"""Our tables of config fields and matching rules against the installed PEFT, so that a new version cannot slip by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig
from adapters.module_plan import plan_modules
from adapters.peft_config import FIXED, HONOURED, IGNORED, parse_config
from adapters.peft_format import peft_config_json, write_peft_directory
from tests.adapter_files import LIMITS, tiny_base

BASE = tiny_base()
PARTS = ["model", "layers", "0", "1", "self_attn", "mlp", "q_proj", "v_proj", "down_proj", "q", "proj", "_"]
DOTTED = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
TARGETS = st.sampled_from([path.split(".", cut)[-1] for path in BASE.linears for cut in range(5)])


def saved_fields(tmp_path: Path) -> dict[str, Any]:
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    return dict(json.loads((tmp_path / CONFIG_FILE).read_bytes()))


def test_every_field_of_pefts_config_is_in_a_table() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == HONOURED | IGNORED | FIXED.keys()


def test_pefts_default_of_every_fixed_field_is_accepted() -> None:
    defaults = json.loads(json.dumps({k: v for k, v in LoraConfig().to_dict().items() if not isinstance(v, set)}))
    for name, allowed in FIXED.items():
        if name in defaults and defaults[name] is not None:
            assert any(type(value) is type(defaults[name]) and value == defaults[name] for value in allowed), name


def test_our_writer_spells_out_the_fields_that_peft_saves(tmp_path: Path) -> None:
    ours = json.loads(peft_config_json(AdapterConfig(8, 8.0, ("q_proj",))))
    theirs = saved_fields(tmp_path)
    assert ours.keys() == theirs.keys()
    # PEFT sets inference_mode when it saves a model, and a task type is ours to state.
    assert {name for name in ours if ours[name] != theirs[name]} == {"inference_mode", "task_type"}


def test_our_config_is_read_back_by_the_door_and_by_peft(tmp_path: Path) -> None:
    config = AdapterConfig(
        r=4,
        lora_alpha=6.5,
        target_modules=("q_proj", "v_proj"),
        use_rslora=True,
        layers_to_transform=(1,),
        rank_pattern={"v_proj": 2, "q_proj": 3},
        alpha_pattern={"v_proj": 2.5},
        base_model_name_or_path=BASE.id,
    )
    data = peft_config_json(config)
    assert parse_config(data, BASE, LIMITS) == config
    assert list(parse_config(data, BASE, LIMITS).rank_pattern) == ["v_proj", "q_proj"]
    (tmp_path / CONFIG_FILE).write_bytes(data)
    theirs = LoraConfig.from_pretrained(str(tmp_path))
    assert (theirs.r, theirs.lora_alpha, theirs.use_rslora) == (4, 6.5, True)
    assert (theirs.rank_pattern, theirs.init_lora_weights) == ({"v_proj": 2, "q_proj": 3}, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_safetensors_library_reads_what_we_write(dtype: torch.dtype, tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(5, 64), torch.randn(64, 5)
    write_peft_directory(tmp_path, AdapterConfig(5, 8.0, ("q_proj",)), {path: (a, b.T.contiguous().T)}, dtype)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor(f"base_model.model.{path}.lora_A.weight").equal(a.to(dtype))
        assert file.get_tensor(f"base_model.model.{path}.lora_B.weight").equal(b.to(dtype))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(TARGETS, min_size=1, max_size=3),
    st.none() | st.lists(st.integers(0, 1), max_size=2),
    st.lists(st.tuples(DOTTED | TARGETS, st.integers(1, 60)), max_size=4),
)
def test_plan_is_pefts_own(targets: list[str], layers: list[int] | None, pattern: list[tuple[str, int]]) -> None:
    ranks = dict(pattern)
    theirs = LoraConfig(r=61, target_modules=targets, layers_to_transform=layers, rank_pattern=ranks)
    config = AdapterConfig(61, 8.0, tuple(targets), layers_to_transform=tuple(layers or ()) or None, rank_pattern=ranks)
    adapted = [path for path in BASE.linears if check_target_module_exists(theirs, path)]
    expected = {path: ranks.get(get_pattern_key(list(ranks), path), 61) for path in adapted}
    assume(expected)
    assert {module.path: module.rank for module in plan_modules(config, BASE, LIMITS)} == expected
