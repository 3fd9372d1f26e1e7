"""The planner's figures against published ones and against counts made by hand."""

from __future__ import annotations

import pytest

from app.memory_plan import (
    HEAD_CHUNK,
    NF4_BITS,
    RESERVE_BYTES,
    ModelShape,
    longest_step,
    trainings,
)

LLAMA_7B = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, False)
LLAMA_13B = ModelShape(5120, 13824, 40, 40, 40, 128, 32000, False)
LLAMA_31_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256, False)
LLAMA_31_70B = ModelShape(8192, 28672, 80, 64, 8, 128, 128256, False)


def test_nf4_with_double_quantization_is_4_127_bits() -> None:
    assert pytest.approx(4.127, abs=5e-4) == NF4_BITS


@pytest.mark.parametrize(
    ("shape", "gb"), [(LLAMA_7B, 3.87), (LLAMA_31_8B, 5.70), (LLAMA_13B, 7.20), (LLAMA_31_70B, 39.5)]
)
def test_quantized_weights_are_the_known_figures(shape: ModelShape, gb: float) -> None:
    assert shape.nf4_bytes / 1e9 == pytest.approx(gb, rel=5e-3)


@pytest.mark.parametrize(("shape", "billions"), [(LLAMA_7B, 6.738), (LLAMA_31_8B, 8.030), (LLAMA_31_70B, 70.554)])
def test_parameters_are_the_models_own(shape: ModelShape, billions: float) -> None:
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=1e-3)


def test_adapters_have_the_known_sizes() -> None:
    assert LLAMA_7B.adapter_parameters(8) == 19_988_480
    assert LLAMA_31_8B.adapter_parameters(8) == 20_971_520
    queries_and_values = frozenset({"q_proj", "v_proj"})
    assert LLAMA_7B.adapter_parameters(8, queries_and_values) == 4_194_304
    assert LLAMA_31_8B.adapter_parameters(8, queries_and_values) == 3_407_872


def test_tied_head_counts_once() -> None:
    config = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config |= {"num_key_value_heads": 3, "vocab_size": 49152}
    tied, free = (ModelShape.from_config({**config, "tie_word_embeddings": tie}) for tie in (True, False))
    assert tied.parameters == 134_515_008
    assert free.parameters - tied.parameters == 49152 * 576
    assert tied.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2


def test_ways_to_train_are_in_their_order() -> None:
    qlora, lora, full = trainings(LLAMA_31_8B, rank=16, tokens=2048)
    assert qlora.total < lora.total < full.total
    assert qlora.state == 41_943_040 * 16
    assert full.state == LLAMA_31_8B.parameters * 16


@pytest.mark.parametrize("gb", [7.5, 10, 16, 24, 80])
def test_longest_step_fills_the_memory_and_no_more(gb: float) -> None:
    qlora = trainings(LLAMA_31_8B, rank=16, tokens=1)[0]
    longest = longest_step(LLAMA_31_8B, qlora, gb * 1e9)
    fixed = qlora.weights + qlora.state + RESERVE_BYTES
    if longest:
        assert fixed + LLAMA_31_8B.activation_bytes(longest) <= gb * 1e9
        assert fixed + LLAMA_31_8B.activation_bytes(longest + 2) > gb * 1e9
    else:
        assert fixed + LLAMA_31_8B.activation_bytes(1) > gb * 1e9
    assert (longest > HEAD_CHUNK) == (gb >= 10)
