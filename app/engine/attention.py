"""Paged attention behind transformers' attention-function registry.

Owns the KV pool's tensors and the function that every attention layer calls. What a pass attends to is the context's
`mode`: `PagedStep` for serving, `CausalRows` for training and plain forwards. Knows nothing of scheduling.

Shapes: `T` tokens of the step, `H` query heads, `G` query heads per KV head, `KVH` KV heads, `D` head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_NAME = "lodger_paged"


class AttentionMode(Protocol):
    """How one forward pass attends."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q `[B, H, T, D]`, k and v `[B, KVH, T, D]` of this pass -> `[B, T, H, D]`."""


class AttentionContext:
    """The one switch between the model's attention layers and whoever runs the model."""

    def __init__(self) -> None:
        self.mode: AttentionMode = CausalRows()

    def bind(self, model: nn.Module) -> None:
        """Give every attention layer of the model a way to find this context."""
        for module in model.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
                module.lodger_attention = self  # type: ignore[assignment]


def _registered_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls; the mask is always None, since the mode knows who sees whom."""
    context: AttentionContext = module.lodger_attention  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    return context.mode.attend(layer, query, key, value, scaling or query.shape[-1] ** -0.5), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _registered_attention)


class CausalRows:
    """Plain causal attention over each row of a rectangular batch, with gradients: training, and tests.

    Rows are padded on the right: a causal row never looks at what follows it, so padding needs no mask.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


class KVPool:
    """K and V of every block: `[L, 2, blocks, block_size, KVH, D]`. Uninitialised blocks are never read."""

    def __init__(
        self,
        *,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Zeros, not empty: a masked NaN is still a NaN after multiplying with a zero weight.
        self.tensor = _zeros((layers, 2, num_blocks, block_size, kv_heads, head_dim), dtype, device)

    @staticmethod
    def bytes_per_block(*, layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return layers * 2 * block_size * kv_heads * head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take memory only when they are first written: numpy leaves that to the operating system."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step: `count` tokens from position `start` on; `blocks` hold positions 0, 1, …"""

    start: int
    count: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Singles:
    """Tokens of B sequences that decode, of similar length, the longest of which is L."""

    tokens: slice | Tensor  # B of the step's
    places: Tensor  # [B, L] of the cache
    bias: Tensor  # [B, 1, 1, L]


class PagedStep:
    """Attention of one packed step: writes the new K and V into their blocks, then lets each token see its own past.

    Single tokens (decodes) are grouped by similar length and attend in one call a group; longer spans one by one.
    Query heads that share a KV head are folded into the query length, so K and V are never repeated.
    """

    def __init__(self, pool: KVPool, spans: Sequence[Span], *, heads: int) -> None:
        self._pool = pool
        self._device = pool.tensor.device
        self._groups = heads // pool.tensor.shape[4]
        bs = pool.block_size
        write: list[Tensor] = []
        self._singles: list[_Singles] = []
        self._longs: list[tuple[int, int, Tensor, Tensor]] = []  # first token, last, cache positions [L], bias
        by_length: dict[int, list[tuple[int, Tensor]]] = {}
        at = 0
        for span in spans:
            end = span.start + span.count
            table = torch.tensor(span.blocks[: -(-end // bs)], dtype=torch.long)
            places = (table[:, None] * bs + torch.arange(bs)).reshape(-1)[:end]
            write.append(places[span.start :])
            if span.count == 1:
                by_length.setdefault((end - 1).bit_length(), []).append((at, places))
            else:
                self._longs.append((at, at + span.count, places.to(self._device), self._causal_bias(span)))
            at += span.count
        self._write = torch.cat(write).to(self._device)
        for members in by_length.values():
            self._singles.append(self._pad(members))

    def _causal_bias(self, span: Span) -> Tensor:
        """[G * count, end]: 0 where the query may look, -inf elsewhere; repeated for the heads that share a KV head."""
        end = span.start + span.count
        hidden = torch.arange(end)[None, :] > torch.arange(span.start, end)[:, None]
        bias = torch.zeros(span.count, end).masked_fill_(hidden, float("-inf"))
        return bias.repeat(self._groups, 1).to(self._device, self._pool.tensor.dtype)

    def _pad(self, members: list[tuple[int, Tensor]]) -> _Singles:
        longest = max(len(places) for _, places in members)
        # Padded with a place of its own: a masked NaN is still a NaN, and must not come from somebody else's block.
        index = torch.stack([F.pad(places, (0, longest - len(places)), value=int(places[-1])) for _, places in members])
        bias = torch.full((len(members), 1, 1, longest), float("-inf"))
        for i, (_, places) in enumerate(members):
            bias[i, ..., : len(places)] = 0
        return _Singles(
            _select([token for token, _ in members], self._device),
            index.to(self._device),
            bias.to(self._device, self._pool.tensor.dtype),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = (self._pool.tensor[layer, i].flatten(0, 1) for i in (0, 1))  # [places, KVH, D]
        keys.index_copy_(0, self._write, k[0].transpose(0, 1))
        values.index_copy_(0, self._write, v[0].transpose(0, 1))
        _, heads, num_tokens, dim = q.shape
        kv_heads = heads // self._groups
        queries = q[0].view(kv_heads, self._groups, num_tokens, dim)
        out = q.new_empty(num_tokens, heads, dim)
        for group in self._singles:
            batch, length = group.places.shape
            kk, vv = (t.index_select(0, group.places.view(-1)) for t in (keys, values))
            kk, vv = (t.view(batch, length, kv_heads, dim).transpose(1, 2) for t in (kk, vv))
            qq = queries[:, :, group.tokens].permute(2, 0, 1, 3)  # [B, KVH, G, D]
            o = F.scaled_dot_product_attention(qq, kk, vv, attn_mask=group.bias, scale=scale)
            out[group.tokens] = o.reshape(batch, heads, dim)
        for first, last, places, bias in self._longs:
            kk = keys.index_select(0, places).transpose(0, 1)[None]
            vv = values.index_select(0, places).transpose(0, 1)[None]
            qq = queries[:, :, first:last].reshape(1, kv_heads, -1, dim)
            o = F.scaled_dot_product_attention(qq, kk, vv, attn_mask=bias, scale=scale)
            out[first:last] = o.view(heads, last - first, dim).transpose(0, 1)
        return out[None]


def _select(tokens: list[int], device: torch.device) -> slice | Tensor:
    """An index of these tokens: a view where they are neighbours, which costs a copy less in each layer."""
    first, last = tokens[0], tokens[-1]
    if tokens == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(tokens, device=device)


class VarlenPagedStep:
    """The same step on CUDA through torch's varlen attention, which reads the blocks where they lie.

    Only for half-precision dtypes; the block size must be a multiple of 256 (a limit of the kernel's page loads).
    """

    def __init__(self, pool: KVPool, spans: Sequence[Span]) -> None:
        device = pool.tensor.device
        bs = pool.block_size
        self._pool = pool
        ends = [span.start + span.count for span in spans]
        pages = [list(span.blocks[: -(-end // bs)]) for span, end in zip(spans, ends, strict=True)]
        widest = max(len(p) for p in pages)
        self._table = torch.tensor([p + [0] * (widest - len(p)) for p in pages], dtype=torch.int32, device=device)
        self._used = torch.tensor(ends, dtype=torch.int32, device=device)
        counts = torch.tensor([0, *(span.count for span in spans)], dtype=torch.int32)
        self._starts = counts.cumsum(0, dtype=torch.int32).to(device)
        self._max_q, self._max_k = int(counts.max()), max(ends)
        write = []
        for span, end in zip(spans, ends, strict=True):
            positions = torch.arange(span.start, end)
            write.append(torch.tensor(span.blocks, dtype=torch.long)[positions // bs] * bs + positions % bs)
        self._write = torch.cat(write).to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        keys, values = self._pool.tensor[layer, 0], self._pool.tensor[layer, 1]
        keys.flatten(0, 1).index_copy_(0, self._write, k[0].transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, self._write, v[0].transpose(0, 1))
        out = varlen_attn(
            q[0].transpose(0, 1).contiguous(),
            keys,
            values,
            self._starts,
            None,
            self._max_q,
            self._max_k,
            scale=scale,
            window_size=(-1, 0),  # causal; the default sees everything
            enable_gqa=q.shape[1] != k.shape[1],
            seqused_k=self._used,
            block_table=self._table,
            num_splits=1,
        )
        assert isinstance(out, Tensor)
        return out[None]


def paged_step(pool: KVPool, spans: Sequence[Span], *, heads: int) -> AttentionMode:
    """Choose the backend for one step: the CUDA kernel where it can run, gather and SDPA everywhere else."""
    tensor = pool.tensor
    if tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16) and pool.block_size % 256 == 0:
        return VarlenPagedStep(pool, spans)
    return PagedStep(pool, spans, heads=heads)
