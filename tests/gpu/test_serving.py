"""The engine on a GPU: adapters on NF4 weights against PEFT on the same weights, and mixed batches against solo runs.

Log-probabilities are compared on the engine's own tokens, so a near tie that falls the other way is no failure.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.manifest import AdapterManifest
from app.engine.sequence import Request
from tests.engine_rig import Answer, random_prompt, request
from tests.gpu.conftest import LoadBase
from tests.gpu.rig import PeftOnBase, run_engine

pytestmark = pytest.mark.gpu

PROMPTS = [5, 64, 130, 257, 300, 31, 400, 12]
NEW_TOKENS = 12
# Of log-probabilities. fp32: other kernels, other orders of sums. bf16: eight bits of mantissa through three layers,
# on logits whose standard deviation is several units.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}
CASES = [("nf4", "float32"), ("nf4", "bfloat16"), ("none", "float32"), ("none", "bfloat16")]


def make_requests(vocab: int, adapters: list[AdapterManifest], *, only: int | None = None) -> list[Request]:
    owners: list[AdapterManifest | None] = [*adapters, None, None]
    return [
        request(f"r{i}", random_prompt(length, vocab, i), owner, max_tokens=NEW_TOKENS, prompt_logprobs=0)
        for i, (owner, length) in enumerate(zip(owners, PROMPTS, strict=True))
        if only in (None, i)
    ]


def scored(answer: Answer) -> torch.Tensor:
    """Log-probabilities of the prompt after its first token, then of the answer."""
    first = next(event for event in answer.events if getattr(event, "prompt_logprobs", None))
    prompt = [score.logprob for score in first.prompt_logprobs if score is not None]  # type: ignore[union-attr]
    return torch.tensor([*prompt, *answer.logprobs])


@pytest.mark.parametrize(("quantization", "dtype"), CASES)
def test_mixed_batch_agrees_with_peft_on_the_same_weights(
    load_base: LoadBase, data_dir: Path, adapter_dirs: list[Path], quantization: str, dtype: str
) -> None:
    base = load_base(quantization, dtype)
    vocab = base.shapes.vocab_size
    answers = run_engine(base, adapter_dirs, lambda adapters: make_requests(vocab, adapters), max_batch_tokens=128)
    peft = PeftOnBase(base, data_dir)
    for i, directory in enumerate([*adapter_dirs, None, None]):
        prompt, answer = random_prompt(PROMPTS[i], vocab, i), answers[f"r{i}"]
        assert len(answer.tokens) == NEW_TOKENS
        want = peft.logprobs([*prompt, *answer.tokens], directory)
        torch.testing.assert_close(scored(answer), want, atol=TOLERANCE[dtype], rtol=0, msg=lambda m, i=i: f"r{i}: {m}")


@pytest.mark.parametrize(("quantization", "dtype"), CASES)
def test_mixed_batch_agrees_with_each_request_alone(
    load_base: LoadBase, adapter_dirs: list[Path], quantization: str, dtype: str
) -> None:
    base = load_base(quantization, dtype)
    vocab = base.shapes.vocab_size
    mixed = run_engine(base, adapter_dirs, lambda adapters: make_requests(vocab, adapters))
    for i in range(len(PROMPTS)):
        alone = run_engine(base, adapter_dirs, lambda adapters, i=i: make_requests(vocab, adapters, only=i))[f"r{i}"]  # type: ignore[misc]
        together = mixed[f"r{i}"]
        if dtype == "float32":
            assert together.tokens == alone.tokens
        same = next(
            (n for n, (a, b) in enumerate(zip(together.tokens, alone.tokens, strict=True)) if a != b), NEW_TOKENS
        )
        # From the first near tie on the two texts are different questions.
        upto = PROMPTS[i] - 1 + same
        torch.testing.assert_close(scored(together)[:upto], scored(alone)[:upto], atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(("quantization", "dtype"), CASES)
def test_an_adapter_changes_its_own_answers_alone(
    load_base: LoadBase, adapter_dirs: list[Path], quantization: str, dtype: str
) -> None:
    base = load_base(quantization, dtype)
    prompt = random_prompt(90, base.shapes.vocab_size, 50)

    def ask(adapters: list[AdapterManifest]) -> list[Request]:
        owners = [None, *adapters, None]
        return [request(f"r{i}", prompt, owner, max_tokens=4, prompt_logprobs=0) for i, owner in enumerate(owners)]

    answers = run_engine(base, adapter_dirs, ask)
    first, last = scored(answers["r0"]), scored(answers[f"r{len(adapter_dirs) + 1}"])
    torch.testing.assert_close(first[: len(prompt) - 1], last[: len(prompt) - 1], atol=TOLERANCE[dtype], rtol=0)
    for i in range(1, len(adapter_dirs) + 1):
        changed = (scored(answers[f"r{i}"]) - first)[: len(prompt) - 1].abs().max()
        assert changed > 2 * TOLERANCE[dtype], f"adapter {i - 1} answered as the base"


def test_serving_leaves_the_nf4_base_as_it_was(load_base: LoadBase, adapter_dirs: list[Path]) -> None:
    base = load_base("nf4", "bfloat16")
    before = base.checksums()
    assert base.memory_bytes()["dense"] == 0, "on a GPU nothing is kept besides the 4-bit values"
    run_engine(base, adapter_dirs, lambda adapters: make_requests(base.shapes.vocab_size, adapters))
    assert base.checksums() == before
