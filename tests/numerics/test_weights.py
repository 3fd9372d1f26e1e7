"""Host adapters against PEFT, the oracle: the same deltas for every spelling of rank, alpha, rsLoRA and layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.door import check_directory
from adapters.errors import AdapterDigestMismatch
from adapters.manifest import WEIGHTS_FILE
from adapters.peft_format import write_peft_directory
from adapters.weights import HostAdapter, LoraPair, load_host_adapter, pack_host_adapter
from tests.adapter_files import KINDS, LIMITS, tiny_base

# PEFT still asks transformers for a property that has been renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

BASE = tiny_base()
ALL = [kind.rsplit(".", 1)[1] for kind in KINDS]
Q1 = "model.layers.1.self_attn.q_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linears": {"target_modules": ALL},
    "whole paths": {"target_modules": [Q1, "0.mlp.down_proj"]},
    "rank pattern": {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 16}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 5, Q1: 40}},
    "both patterns": {"rank_pattern": {Q1: 2, "q_proj": 5}, "alpha_pattern": {"1.self_attn.q_proj": 7, "q_proj": 9}},
    # PEFT sorts the keys when it saves, so this order is the one that it reads again.
    "general key first": {"target_modules": ALL, "rank_pattern": {"mlp.up_proj": 5, "model.layers.1.mlp.up_proj": 2}},
    "key with a dot that is any sign": {"rank_pattern": {"q.proj": 5}},
    "key that ends inside a name": {"rank_pattern": {"proj": 5}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "one layer": {"layers_to_transform": [1]},
    "one layer as a number": {"layers_to_transform": 1},
    "one layer and a whole path": {"layers_to_transform": [0], "target_modules": ["v_proj", Q1]},
    "no layers listed": {"layers_to_transform": []},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    model.name_or_path = BASE.id
    return model


def peft_adapter(directory: Path, **changes: Any) -> PeftModel:
    """A PEFT model with random factors, saved to `directory`."""
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*did not match any targeted module.*", RuntimeWarning)
        model = get_peft_model(tiny_llama(), LoraConfig(**settings | changes)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory, save_embedding_layers=False)  # "auto" asks a hub for the vocabulary
    return model


def reload(directory: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*did not match any targeted module.*", RuntimeWarning)
        return PeftModel.from_pretrained(tiny_llama(), directory).eval()


def peft_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def load(directory: Path, dtype: torch.dtype = torch.float32) -> HostAdapter:
    checked = check_directory(directory, BASE, LIMITS)
    return load_host_adapter(("acme", checked.digest), checked, directory / WEIGHTS_FILE, dtype=dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_host_adapter_is_pefts_delta(name: str, tmp_path: Path) -> None:
    expected = peft_deltas(peft_adapter(tmp_path, **CONFIGS[name]))
    host = load(tmp_path)
    assert host.modules.keys() == expected.keys()
    for path, delta in expected.items():
        module = host.modules[path]
        # Folding the scale into B moves one rounding: a few units in the last place of fp32.
        torch.testing.assert_close(module.b.T @ module.a, delta, rtol=1e-5, atol=1e-6)
    assert host.rank == max(module.a.shape[0] for module in host.modules.values())


def test_pattern_order_is_that_of_the_file_as_for_peft(tmp_path: Path) -> None:
    """PEFT's save sorts an alpha_pattern, which changes what it means; what counts is what PEFT itself reads back."""
    in_memory = peft_adapter(tmp_path, alpha_pattern={"q_proj": 5, Q1: 40})
    layers = [model.get_submodule(f"base_model.model.{Q1}") for model in (in_memory, reload(tmp_path))]
    assert [layer.scaling["default"] for layer in layers] == [5 / 8, 5.0]
    checked = check_directory(tmp_path, BASE, LIMITS)
    assert {module.path: module.scaling for module in checked.modules}[Q1] == 5.0


def test_eva_save_is_accepted(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that EVA's own initialisation was not run
        model = peft_adapter(tmp_path, init_lora_weights="eva")
    assert load(tmp_path).modules.keys() == peft_deltas(model).keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_is_folded_in_fp32_before_the_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    model = peft_adapter(tmp_path, lora_alpha=3, use_rslora=True)
    host = load(tmp_path, dtype)
    layer = model.get_submodule(f"base_model.model.{Q1}")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert host.modules[Q1].a.equal(a.to(dtype))
    assert host.modules[Q1].b.equal((b.float() * layer.scaling["default"]).T.to(dtype))


@pytest.mark.parametrize("stored", DTYPES)
def test_every_stored_dtype_is_read_exactly(stored: torch.dtype, tmp_path: Path) -> None:
    model = peft_adapter(tmp_path, lora_alpha=3).to(stored)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    host = load(tmp_path)
    layer = model.get_submodule(f"base_model.model.{Q1}")
    assert host.modules[Q1].a.equal(layer.lora_A["default"].weight.float())
    assert host.modules[Q1].b.equal((layer.lora_B["default"].weight.float() * (3 / 8)).T)


def test_host_adapter_is_one_block(tmp_path: Path) -> None:
    peft_adapter(tmp_path, target_modules=ALL)
    host = load(tmp_path, torch.bfloat16)
    tensors = [tensor for module in host.modules.values() for tensor in (module.a, module.b)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert sum(tensor.nbytes for tensor in tensors) == host.num_bytes
    assert all(tensor.is_contiguous() and tensor.dtype == torch.bfloat16 for tensor in tensors)
    assert {path: (m.a.shape[1], m.b.shape[1]) for path, m in host.modules.items()} == BASE.linears


def test_packing_from_memory_equals_loading_from_disk(tmp_path: Path) -> None:
    model = peft_adapter(tmp_path, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5})
    loaded = load(tmp_path, torch.bfloat16)
    pairs = {}
    for path in loaded.modules:
        layer = model.get_submodule(f"base_model.model.{path}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        pairs[path] = LoraPair(a, b, layer.scaling["default"])
    packed = pack_host_adapter(loaded.key, pairs, dtype=torch.bfloat16)
    assert (packed.digest, packed.rank, packed.num_bytes) == (loaded.digest, loaded.rank, loaded.num_bytes)
    for path, module in loaded.modules.items():
        assert packed.modules[path].a.equal(module.a)
        assert packed.modules[path].b.equal(module.b)
        assert not packed.modules[path].a.requires_grad


def test_file_that_shrank_after_the_door_is_refused(tmp_path: Path) -> None:
    peft_adapter(tmp_path)
    checked = check_directory(tmp_path, BASE, LIMITS)
    weights = tmp_path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterDigestMismatch):
        load_host_adapter(("acme", checked.digest), checked, weights, dtype=torch.float32)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gaussian", "orthogonal")])
def test_what_we_write_means_the_same_to_peft(name: str, tmp_path: Path) -> None:
    """PEFT's save -> our door -> our writer -> PEFT again: the logits stay."""
    original = peft_adapter(tmp_path / "peft", **CONFIGS[name])
    checked = check_directory(tmp_path / "peft", BASE, LIMITS)
    pairs = {}
    for module in checked.modules:
        layer = original.get_submodule(f"base_model.model.{module.path}")
        pairs[module.path] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    write_peft_directory(tmp_path / "ours", checked.config, pairs, torch.float32)
    again = reload(tmp_path / "ours")
    tokens = torch.arange(24).view(1, -1)
    with torch.no_grad():
        assert again(tokens).logits.equal(original(tokens).logits)
    host = load(tmp_path / "ours")
    assert host.modules.keys() == load(tmp_path / "peft").modules.keys()
    for path, module in load(tmp_path / "peft").modules.items():
        assert host.modules[path].b.equal(module.b)


def test_merged_host_adapter_gives_pefts_logits(tmp_path: Path) -> None:
    adapted = peft_adapter(tmp_path, target_modules=ALL, rank_pattern={"q_proj": 3}, use_rslora=True)
    merged = tiny_llama()
    with torch.no_grad():
        for path, module in load(tmp_path).modules.items():
            merged.get_submodule(path).weight += module.b.T @ module.a
        tokens = torch.arange(24).view(1, -1)
        expected, base = adapted(tokens).logits, tiny_llama()(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2
