"""Paged attention against the slow reference: each sequence alone, dense, causal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from app.engine.attention import CausalRows, KVPool, PagedStep, Span

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 8, 4


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q `[H, n, D]` is the end of a sequence whose k and v are `[KVH, m, D]`; returns `[n, H, D]`."""
    out = torch.empty(q.shape[1], HEADS, DIM)
    past = k.shape[1] - q.shape[1]
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        for i in range(q.shape[1]):
            seen = past + i + 1
            weights = torch.softmax(k[kv, :seen] @ q[head, i] * DIM**-0.5, dim=0)
            out[i, head] = weights @ v[kv, :seen]
    return out


@pytest.mark.parametrize("counts", [[1, 1, 1], [7, 1, 1], [3, 9, 1, 2], [1]])
def test_packed_step_equals_each_sequence_alone(counts: list[int]) -> None:
    torch.manual_seed(0)
    pool = KVPool(
        layers=2, num_blocks=64, block_size=BLOCK, kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    pool.tensor.normal_()  # stale values of earlier owners must not be seen
    past = [5, 30, 2, 11][: len(counts)]
    free = torch.randperm(64).tolist()
    spans, histories = [], []
    for before, count in zip(past, counts, strict=True):
        blocks = [free.pop() for _ in range(-(-(before + count) // BLOCK))]
        k, v = torch.randn(KV_HEADS, before + count, DIM), torch.randn(KV_HEADS, before + count, DIM)
        for position in range(before):
            place = (blocks[position // BLOCK], position % BLOCK)
            pool.tensor[1, 0, place[0], place[1]] = k[:, position]
            pool.tensor[1, 1, place[0], place[1]] = v[:, position]
        spans.append(Span(before, count, blocks))
        histories.append((torch.randn(HEADS, count, DIM), k, v))
    q, k, v = (
        torch.cat([q for q, _, _ in histories], 1)[None],
        torch.cat([k[:, s.start :] for s, (_, k, _) in zip(spans, histories, strict=True)], 1)[None],
        torch.cat([v[:, s.start :] for s, (_, _, v) in zip(spans, histories, strict=True)], 1)[None],
    )
    got = PagedStep(pool, spans, heads=HEADS).attend(1, q, k, v, DIM**-0.5)
    want = torch.cat([dense(*h) for h in histories])[None]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_causal_rows_have_gradients_and_equal_sdpa() -> None:
    q, k, v = (torch.randn(2, h, 5, DIM, requires_grad=True) for h in (HEADS, KV_HEADS, KV_HEADS))
    got = CausalRows().attend(0, q, k, v, 0.3)
    wide = [t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v)]
    want = F.scaled_dot_product_attention(q, *wide, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert q.grad is not None
    assert k.grad is not None
