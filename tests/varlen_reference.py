"""What torch documents of `torch.nn.attention.varlen.varlen_attn`, as a slow loop on any device.

Stands in for the CUDA kernel in the CPU tests, and is compared with it where there is a GPU. Strict about its
arguments: what the kernel would misread in silence is an AssertionError here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """query `[T, H, D]`; key and value pages `[P, page, KVH, D]`; returns `[T, H, D]`. Paged calls only.

    Sequence i has the queries `cu_seq_q[i]` to `cu_seq_q[i + 1]`, which are the last ones of its `seqused_k[i]` keys;
    key j of it lies in page `block_table[i, j // page]`. A window (-1, 0) is causal, (-1, -1) sees every key.
    """
    assert cu_seq_k is None
    assert seqused_k is not None
    assert block_table is not None
    for index in (cu_seq_q, seqused_k, block_table):
        assert index.dtype == torch.int32
        assert index.is_contiguous()
    num_sequences, page = len(seqused_k), key.shape[1]
    assert cu_seq_q.shape == (num_sequences + 1,)
    assert block_table.shape[0] == num_sequences
    assert query.is_contiguous()
    assert query.shape[0] == cu_seq_q[-1]
    assert cu_seq_q[0] == 0
    assert max_q == cu_seq_q.diff().max()
    assert max_k == seqused_k.max()
    assert window_size in ((-1, 0), (-1, -1))
    assert num_splits == 1, "anything else makes a sequence's result depend on its neighbours"
    heads, kv_heads = query.shape[1], key.shape[2]
    assert heads == kv_heads or (enable_gqa and heads % kv_heads == 0)
    assert block_table.min() >= 0
    assert block_table.max() < key.shape[0]
    out = torch.empty_like(query)
    for i in range(num_sequences):
        first, last, used = int(cu_seq_q[i]), int(cu_seq_q[i + 1]), int(seqused_k[i])
        assert last - first <= used
        places = torch.arange(used, device=query.device)
        pages = block_table[i].long()[places // page]
        keys, values = (t[pages, places % page].float() for t in (key, value))  # [used, KVH, D]
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[first:last].float(), keys)
        scores *= query.shape[2] ** -0.5 if scale is None else scale
        if window_size == (-1, 0):
            asks = torch.arange(used - (last - first), used, device=query.device)
            scores.masked_fill_(places[None, :] > asks[:, None], float("-inf"))
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(query.dtype)
    return out
