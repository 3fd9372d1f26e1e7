"""The NF4 base: against PEFT on the same 4-bit weights, frozen while it serves, and the same after a reload."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.engine.assembly import EngineConfig, assemble_engine
from app.engine.base_model import BaseModel, load_base_model
from app.engine.frozen_linear import FrozenLinear
from app.engine.sequence import Token, TokenLogprob
from tests.engine_rig import Answer, Collector, DirectoryLoader, random_prompt, request
from tests.tiny import build_adapter, build_base

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from peft import PeftModel

# Largest difference of two log-probabilities. In fp32 both sides multiply the same numbers; in bf16 they round their
# sums in another order, and the tiny model's logits spread over about 20, where neighbours in bf16 are 0.125 apart.
# Measured: 5e-6 and 0.134.
TOLERANCE = {"float32": 5e-5, "bfloat16": 0.2}
LENGTHS = (1, 33, 120)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def adapter_dirs(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [build_adapter(root / f"a{r}", base_dir, r=r, seed=r) for r in (4, 16)]


def load(base_dir: Path, data_dir: Path, dtype: str) -> BaseModel:
    return load_base_model(str(base_dir), data_dir, quantization="nf4", dtype=dtype, device="cpu")


def their_base(data_dir: Path, dtype: torch.dtype) -> Any:
    """The kept 4-bit snapshot on bitsandbytes' own Linear4bit, which must not repack its weights on the way."""
    (snapshot,) = (data_dir / "base").glob("*/nf4-dq-*")
    model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=dtype, device_map={"": "cpu"})
    found = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
            found += 1
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    assert found == 14
    return model.eval()


@torch.inference_mode()
def their_scores(model: Any, prompt: list[int]) -> torch.Tensor:
    """`[T, V]`: log-probabilities of the token after each of the prompt's."""
    return torch.log_softmax(model(input_ids=torch.tensor([prompt])).logits[0].float(), -1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixed_batch_scores_as_peft_does_on_the_same_4_bit_weights(
    dtype: str, base_dir: Path, data_dir: Path, adapter_dirs: list[Path]
) -> None:
    base = load(base_dir, data_dir, dtype)
    checksums = base.checksums()
    loader = DirectoryLoader(base)
    owners = [None, *(loader.add(f"tenant{i}", directory) for i, directory in enumerate(adapter_dirs))]
    engine = assemble_engine(base, loader, EngineConfig(max_batch_tokens=64))
    engine.start()
    sink = Collector()
    prompts = {length: random_prompt(length, base.shapes.vocab_size, length) for length in LENGTHS}
    for i, owner in enumerate(owners):
        for length, prompt in prompts.items():
            engine.submit(request(f"{i}-{length}", prompt, owner, max_tokens=1, logprobs=5, prompt_logprobs=5), sink)
    assert engine.drain(60)
    engine.stop()
    engine.check()

    worst = 0.0
    for i, directory in enumerate([None, *adapter_dirs]):
        theirs = their_base(data_dir, getattr(torch, dtype))
        if directory is not None:
            theirs = PeftModel.from_pretrained(theirs, directory)
        for length, prompt in prompts.items():
            scores = their_scores(theirs, prompt)
            ours = scored(sink.answers[f"{i}-{length}"])
            assert len(ours) == length
            for position, scored_token in enumerate(ours):
                for token, logprob in (*scored_token.top, (scored_token.token, scored_token.logprob)):
                    worst = max(worst, abs(logprob - float(scores[position, token])))
    assert worst <= TOLERANCE[dtype], worst
    assert base.checksums() == checksums, "serving changed the base"


def scored(answer: Answer) -> list[TokenLogprob]:
    """What the engine said of each position: the prompt's from the second token on, then the one it generated."""
    token = next(event for event in answer.events if isinstance(event, Token))
    assert token.logprob is not None
    assert token.prompt_logprobs is not None
    return [*(entry for entry in token.prompt_logprobs if entry is not None), token.logprob]


def test_the_kept_snapshot_loads_bit_equal(base_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    made_now = load(base_dir, tmp_path, "float32").checksums()
    loaded = load(base_dir, tmp_path, "float32").checksums()
    assert loaded == made_now
    assert load(base_dir, data_dir, "float32").checksums() == made_now, "quantizing again gives the same bytes"


def test_the_linears_are_4_bit_and_compute_on_the_same_values(base_dir: Path, data_dir: Path) -> None:
    base = load(base_dir, data_dir, "float32")
    linears = [m for m in base.model.modules() if isinstance(m, FrozenLinear) and m.nf4 is not None]
    assert len(linears) == 14
    for linear in linears:
        packed = linear.nf4
        assert packed.data.dtype == torch.uint8
        assert len(linear.dense_weight.unique()) > 16, "scales differ from block to block"
        dense = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        assert torch.equal(dense.float(), linear.dense_weight)
