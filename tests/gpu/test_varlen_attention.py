"""Paged attention by torch's CUDA kernel: against its documented semantics, and against the gather path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.engine.attention import KVPool, PagedStep, Span, VarlenPagedStep, paged_step
from tests.varlen_reference import reference_varlen_attn

pytestmark = pytest.mark.gpu

BLOCK = 256  # what the kernel loads as a page
NUM_BLOCKS = 24
SPANS = [(0, 1), (700, 1), (255, 1), (256, 1), (0, 300), (511, 2), (13, 40)]
# Half-precision inputs of unit variance: one rounding of the probabilities and one of the result.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
HEADS = [(8, 8), (9, 3), (32, 8)]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def filled_pool(kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> KVPool:
    pool = KVPool(
        layers=2, num_blocks=NUM_BLOCKS, block_size=BLOCK, kv_heads=kv_heads, head_dim=dim, dtype=dtype, device=device
    )
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(1)))
    return pool


def make_spans(parts: list[tuple[int, int]]) -> list[Span]:
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(2)).tolist()
    return [Span(start, count, [free.pop() for _ in range(-(-(start + count) // BLOCK))]) for start, count in parts]


def new_tokens(
    count: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, count, dim, generator=g).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_kernel_equals_the_gather_path(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    spans = make_spans(SPANS)
    fresh = new_tokens(sum(s.count for s in spans), heads, kv_heads, dim, dtype, device)
    one, other = (filled_pool(kv_heads, dim, dtype, device) for _ in range(2))
    want = PagedStep(one, spans, heads=heads).attend(1, *fresh, dim**-0.5)
    got = VarlenPagedStep(other, spans).attend(1, *fresh, dim**-0.5)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(one.tensor, other.tensor)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_kernel_does_what_its_reference_says(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = make_spans(SPANS)
    fresh = new_tokens(sum(s.count for s in spans), heads, kv_heads, 64, dtype, device)
    got = VarlenPagedStep(filled_pool(kv_heads, 64, dtype, device), spans).attend(0, *fresh, 0.2)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn)
    want = VarlenPagedStep(filled_pool(kv_heads, 64, dtype, device), spans).attend(0, *fresh, 0.2)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_sequence_is_bit_equal_alone_and_among_others(device: torch.device, dtype: torch.dtype) -> None:
    spans = make_spans(SPANS)
    q, k, v = new_tokens(sum(s.count for s in spans), 9, 3, 64, dtype, device)
    together = VarlenPagedStep(filled_pool(3, 64, dtype, device), spans).attend(0, q, k, v, 0.125)
    at = 0
    for span in spans:
        part = slice(at, at + span.count)
        step = VarlenPagedStep(filled_pool(3, 64, dtype, device), [span])
        alone = step.attend(0, q[:, :, part], k[:, :, part], v[:, :, part], 0.125)
        assert torch.equal(alone, together[:, part]), span
        at += span.count


def test_stale_values_past_a_sequence_change_nothing(device: torch.device, dtype: torch.dtype) -> None:
    spans = make_spans(SPANS)
    fresh = new_tokens(sum(s.count for s in spans), 8, 8, 64, dtype, device)
    clean, other = (filled_pool(8, 64, dtype, device) for _ in range(2))
    own = torch.zeros(NUM_BLOCKS * BLOCK, dtype=torch.bool, device=device)
    for span in spans:
        own[[span.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(span.start + span.count)]] = True
    other.tensor.flatten(2, 3)[:, :, ~own] = 777.0  # finite: the pool is made of zeros and holds no NaN
    want = VarlenPagedStep(clean, spans).attend(0, *fresh, 0.125)
    got = VarlenPagedStep(other, spans).attend(0, *fresh, 0.125)
    assert torch.equal(got, want)


def test_the_kernel_is_chosen_where_it_can_run(device: torch.device) -> None:
    def choice(block_size: int, dtype: torch.dtype) -> type:
        pool = KVPool(
            layers=1, num_blocks=2, block_size=block_size, kv_heads=2, head_dim=64, dtype=dtype, device=device
        )
        return type(paged_step(pool, [Span(0, 1, [0])], heads=4))

    assert choice(256, torch.bfloat16) is VarlenPagedStep
    assert choice(256, torch.float32) is PagedStep
    assert choice(16, torch.bfloat16) is PagedStep
