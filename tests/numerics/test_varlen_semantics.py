"""The CUDA branch of paged attention on a CPU: its tables and calls, with a slow loop in the place of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine import model_runner
from app.engine.assembly import EngineConfig, assemble_engine
from app.engine.attention import KVPool, PagedStep, Span, VarlenPagedStep
from app.engine.base_model import load_base_model
from tests.engine_rig import Answer, Collector, DirectoryLoader, random_prompt, request
from tests.tiny import build_adapter, build_base
from tests.varlen_reference import reference_varlen_attn

DIM, BLOCK, NUM_BLOCKS, LAYERS = 8, 4, 64, 2
PAST = (5, 30, 0, 11, 16)


@pytest.fixture(autouse=True)
def slow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn)


def filled_pool(kv_heads: int) -> KVPool:
    pool = KVPool(
        layers=LAYERS,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK,
        kv_heads=kv_heads,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.tensor.normal_(generator=torch.Generator().manual_seed(1))  # histories, and stale values of earlier owners
    return pool


def make_spans(counts: Sequence[int], spare: int = 0) -> list[Span]:
    """One span a count, with blocks in no order; `spare` blocks more than the step needs, as a scheduler may hold."""
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(2)).tolist()
    return [
        Span(before, count, [free.pop() for _ in range(-(-(before + count) // BLOCK) + spare)])
        for before, count in zip(PAST, counts, strict=False)
    ]


def new_tokens(count: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, count, DIM, generator=g) for n in (heads, kv_heads, kv_heads))
    return q, k, v


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [7, 1, 13, 1, 2], [1], [9], [3, 2]])
@pytest.mark.parametrize("layer", [0, 1])
def test_both_backends_answer_and_store_alike(counts: list[int], heads: int, kv_heads: int, layer: int) -> None:
    spans = make_spans(counts)
    q, k, v = new_tokens(sum(counts), heads, kv_heads)
    one, other = filled_pool(kv_heads), filled_pool(kv_heads)
    want = PagedStep(one, spans, heads=heads).attend(layer, q, k, v, 0.3)
    got = VarlenPagedStep(other, spans).attend(layer, q, k, v, 0.3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(one.tensor, other.tensor), "new keys and values lie in the same places"


def test_what_lies_past_a_sequence_is_never_seen() -> None:
    counts = [2, 1, 5]
    spans = make_spans(counts, spare=2)
    q, k, v = new_tokens(sum(counts), 6, 2)
    clean, poisoned = filled_pool(2), filled_pool(2)
    own = torch.zeros(NUM_BLOCKS * BLOCK, dtype=torch.bool)
    for span in spans:
        own[[span.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(span.start + span.count)]] = True
    poisoned.tensor.flatten(2, 3)[:, :, ~own] = float("nan")
    want = VarlenPagedStep(clean, spans).attend(0, q, k, v, 0.3)
    got = VarlenPagedStep(poisoned, spans).attend(0, q, k, v, 0.3)
    assert torch.equal(got, want)


def test_a_token_never_sees_a_later_one_of_its_own_chunk() -> None:
    spans = make_spans([6])
    q, k, v = new_tokens(6, 6, 2)
    whole = VarlenPagedStep(filled_pool(2), spans).attend(0, q, k, v, 0.3)
    k[:, :, 4:], v[:, :, 4:] = 100.0, -100.0
    changed = VarlenPagedStep(filled_pool(2), spans).attend(0, q, k, v, 0.3)
    assert torch.equal(whole[:, :4], changed[:, :4])
    assert not torch.equal(whole[:, 4:], changed[:, 4:])


def test_a_prompt_in_chunks_equals_a_prompt_at_once() -> None:
    blocks = make_spans([20])[0].blocks
    q, k, v = new_tokens(20, 6, 2)
    whole = VarlenPagedStep(filled_pool(2), [Span(0, 20, blocks)]).attend(1, q, k, v, 0.3)
    pool = filled_pool(2)
    parts = [
        VarlenPagedStep(pool, [Span(lo, hi - lo, blocks)]).attend(
            1, q[:, :, lo:hi], k[:, :, lo:hi], v[:, :, lo:hi], 0.3
        )
        for lo, hi in ((0, 7), (7, 8), (8, 17), (17, 20))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-5)


def answers_of_an_engine(base_dir: Path, data_dir: Path, adapters: list[Path]) -> dict[str, Answer]:
    """Five prompts of base and adapters in one engine: cut into chunks, decoded together, a prefix found again."""
    base = load_base_model(str(base_dir), data_dir, quantization="none", dtype="float32", device="cpu")
    loader = DirectoryLoader(base)
    owners = [*(loader.add(f"tenant{i}", directory) for i, directory in enumerate(adapters)), None]
    engine = assemble_engine(base, loader, EngineConfig(max_batch_tokens=40, kv_cache_bytes=4 << 20))
    engine.start()
    sink = Collector()
    shared = random_prompt(48, base.shapes.vocab_size, 7)
    try:
        for i, length in enumerate((3, 70, 33, 1, 18)):
            prompt = shared + random_prompt(length, base.shapes.vocab_size, i)
            engine.submit(request(f"r{i}", prompt, owners[i % len(owners)], max_tokens=8), sink)
        assert engine.drain(60)
    finally:
        engine.stop()
    engine.check()
    return sink.answers


def test_an_engine_on_the_cuda_branch_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_dir = build_base(tmp_path / "base")
    adapters = [build_adapter(tmp_path / f"a{i}", base_dir, r=rank, seed=i) for i, rank in enumerate((4, 16))]
    want = answers_of_an_engine(base_dir, tmp_path / "data", adapters)
    used: list[int] = []

    def varlen_step(pool: KVPool, spans: Sequence[Span], *, heads: int) -> VarlenPagedStep:
        used.append(len(spans))
        return VarlenPagedStep(pool, spans)

    monkeypatch.setattr(model_runner, "paged_step", varlen_step)
    got = answers_of_an_engine(base_dir, tmp_path / "data", adapters)
    assert max(used) > 1, "steps were mixed"
    for name, answer in want.items():
        assert got[name].tokens == answer.tokens, name
        torch.testing.assert_close(torch.tensor(got[name].logprobs), torch.tensor(answer.logprobs), atol=1e-4, rtol=0)
