"""Runs one batch: packs it into `[1, T]`, sets the two seams, calls the model, samples.

Sees finished decisions only (which tokens, which blocks, which rows) and takes none. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.layers import PoolTensors, Segment
from app.engine.attention import CausalRows, KVPool, Span, paged_step
from app.engine.base_model import BaseModel
from app.engine.sampler import Sampled, Sampler
from app.engine.sequence import Batch, Chunk, TokenLogprob

# From this many tokens on, a segment is multiplied with its own rows only. On a CPU always: a product there costs its
# work, not its call (measured, SmolLM2-135M, 8 tokens of 8 adapters of rank 16, two AVX2 cores: about 60 us a linear
# against 190 us for the masked product).
LONG_SEGMENT = {"cpu": 1, "cuda": 24}
# Rows of logits made at once for prompt log-probabilities: 64 x 49,152 x 4 bytes = 13 MB.
LOGIT_ROWS = 64


@dataclass(frozen=True, slots=True)
class ResidentRows:
    """Where an adapter lies in the pool, and which linears it touches (bit i = linear i)."""

    row: int
    rank: int
    linears: int


class ModelRunner:
    """The base model with its KV pool, pool of rank rows and sampler."""

    def __init__(
        self, base: BaseModel, kv: KVPool, pool: PoolTensors, sampler: Sampler, *, long_segment: int | None = None
    ) -> None:
        self._base = base
        self._kv = kv
        self._pool = pool
        self._sampler = sampler
        self._long_segment = LONG_SEGMENT[base.device.type] if long_segment is None else long_segment

    @torch.inference_mode()
    def run(self, batch: Batch, rows_of: Callable[[tuple[str, str]], ResidentRows]) -> Mapping[str, Sampled]:
        """Compute the batch's tokens; return one sampled token for each chunk that ends its sequence, by request id.

        Also fills `Sequence.prompt_logprobs` where asked for. `rows_of` is asked anew each step, never remembered.
        """
        base, device = self._base, self._base.device
        chunks, segments = _pack(batch.chunks, rows_of)
        ids = torch.tensor([[t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.count]]], device=device)
        positions = torch.cat([torch.arange(c.start, c.start + c.count) for c in chunks])[None].to(device)
        spans = [Span(c.start, c.count, c.sequence.blocks) for c in chunks]
        try:
            base.attention.mode = paged_step(self._kv, spans, heads=base.shapes.num_heads)
            base.lora.plan = self._pool.plan(segments, long_segment=self._long_segment)
            hidden: Tensor = base.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        finally:
            base.lora.plan = None
            base.attention.mode = CausalRows()
        self._prompt_logprobs(chunks, hidden)
        return self._sample(chunks, hidden)

    def _sample(self, chunks: Sequence[Chunk], hidden: Tensor) -> dict[str, Sampled]:
        last, sequences, at = [], [], 0
        for chunk in chunks:
            at += chunk.count
            if chunk.samples:
                last.append(at - 1)
                sequences.append(chunk.sequence)
        if not sequences:
            return {}
        logits = self._base.model.lm_head(hidden[last]).float()
        sampled = self._sampler.sample(logits, sequences)
        return {sequence.id: result for sequence, result in zip(sequences, sampled, strict=True)}

    def _prompt_logprobs(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        at = 0
        for chunk in chunks:
            wanted = chunk.sequence.request.sampling.prompt_logprobs
            if wanted is not None:
                self._score_prompt(chunk, hidden[at : at + chunk.count], wanted)
            at += chunk.count

    def _score_prompt(self, chunk: Chunk, hidden: Tensor, wanted: int) -> None:
        """Log-probabilities of the prompt tokens that follow the chunk's positions."""
        seq = chunk.sequence
        known: list[TokenLogprob | None] = seq.prompt_logprobs
        if not known:
            known.append(None)  # nothing predicts the first token
        # After a preemption the prompt is computed again: what is known is not scored twice.
        first = max(chunk.start, len(known) - 1)
        stop = min(chunk.start + chunk.count, seq.num_prompt - 1)
        for lo in range(first, stop, LOGIT_ROWS):
            hi = min(lo + LOGIT_ROWS, stop)
            logits = self._base.model.lm_head(hidden[lo - chunk.start : hi - chunk.start]).float()
            known.extend(self._sampler.prompt_logprobs(logits, seq.tokens[lo + 1 : hi + 1], wanted))


def _pack(
    chunks: Sequence[Chunk], rows_of: Callable[[tuple[str, str]], ResidentRows]
) -> tuple[list[Chunk], list[Segment]]:
    """Put the chunks in the order of their rows, decodes first, and tell which tokens have an adapter.

    So what lies side by side in the pool does so in the step. Neighbours of one adapter are one segment.
    """
    rows = {c.sequence.adapter_key: rows_of(c.sequence.adapter_key) for c in chunks if c.sequence.adapter_key}
    ordered = sorted(chunks, key=lambda c: (c.count > 1, rows[k].row if (k := c.sequence.adapter_key) else -1))
    segments: list[Segment] = []
    at = 0
    for chunk in ordered:
        start, at = at, at + chunk.count
        key = chunk.sequence.adapter_key
        if key is None:
            continue
        own = rows[key]
        before = segments[-1] if segments else None
        if before is not None and before.stop == start and before.row == own.row:
            start = segments.pop().start
        segments.append(Segment(start, at, own.row, own.rank, own.linears))
    return ordered, segments
