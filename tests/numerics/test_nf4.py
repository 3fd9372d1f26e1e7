"""The NF4 base on a CPU: its products are bitsandbytes' own on the same stored values, with and without gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.engine.base_model import BaseModel, load_base_model
from tests.tiny import build_base

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def load(base_dir: Path, data_dir: Path, dtype: str) -> BaseModel:
    return load_base_model(str(base_dir), data_dir, name="tiny-chat", quantization="nf4", dtype=dtype, device="cpu")


def bitsandbytes_model(data_dir: Path, base: BaseModel) -> torch.nn.Module:
    """The snapshot as transformers and bitsandbytes run it."""
    (snapshot,) = (data_dir / "base" / "tiny-chat").glob("nf4-dq-*")
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=base.dtype).eval()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = base.dtype, True  # type: ignore[assignment]
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.weight.quant_state.dtype = base.dtype  # type: ignore[union-attr]
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(base.dtype)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_linear_computes_what_bitsandbytes_computes(base_dir: Path, data_dir: Path, dtype: str) -> None:
    base = load(base_dir, data_dir, dtype)
    theirs = bitsandbytes_model(data_dir, base)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # bf16: one rounding of a sum that may be made in pieces
    for path in base.lora.paths:
        ours = base.model.get_submodule(path).base
        linear = theirs.get_submodule(path)
        x = torch.randn(3, base.spec.linears[path][0], dtype=base.dtype)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), linear(x), atol=tolerance, rtol=tolerance)
        one, other = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        torch.testing.assert_close(ours(one), linear(other), atol=tolerance, rtol=tolerance)
        ours(one).sum().backward()
        linear(other).sum().backward()
        torch.testing.assert_close(one.grad, other.grad, atol=tolerance, rtol=tolerance)


def test_logits_equal_those_of_the_quantized_model(base_dir: Path, data_dir: Path) -> None:
    base = load(base_dir, data_dir, "float32")
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode():
        want = bitsandbytes_model(data_dir, base)(input_ids=ids, use_cache=False).logits
        got = base.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_start_loads_the_same_base_from_its_snapshot(base_dir: Path, data_dir: Path, dtype: str) -> None:
    first, second = load(base_dir, data_dir, dtype), load(base_dir, data_dir, dtype)
    assert first.checksums() == second.checksums()
    assert first.memory_bytes()["nf4"] > 0
    assert first.spec == second.spec
