"""Runs one batch: packs it into `[1, T]`, sets the two seams, calls the model, samples.

Sees finished decisions only (which tokens, which blocks, which rows) and takes none. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.layers import PoolTensors, Segment
from app.engine.attention import CausalRows, KVPool, Span, paged_step
from app.engine.base_model import BaseModel
from app.engine.sampler import Sampled, Sampler
from app.engine.sequence import Batch, Chunk, TokenLogprob

# From this many tokens on, a segment's own two products are cheaper than its share of the masked one (measured on
# SmolLM2-135M with 8 adapters of rank 16: even at about 24 tokens on two CPU cores).
LONG_SEGMENT = 24
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
        self, base: BaseModel, kv: KVPool, pool: PoolTensors, sampler: Sampler, *, long_segment: int = LONG_SEGMENT
    ) -> None:
        self._base = base
        self._kv = kv
        self._pool = pool
        self._sampler = sampler
        self._long_segment = long_segment

    @torch.inference_mode()
    def run(self, batch: Batch, rows_of: Callable[[tuple[str, str]], ResidentRows]) -> Mapping[str, Sampled]:
        """Compute the batch's tokens; return one sampled token for each chunk that ends its sequence, by request id.

        Also fills `Sequence.prompt_logprobs` where asked for. `rows_of` is asked anew each step, never remembered.
        """
        base, device = self._base, self._base.device
        ids = torch.tensor(
            [[t for c in batch.chunks for t in c.sequence.tokens[c.start : c.start + c.count]]], device=device
        )
        positions = torch.cat([torch.arange(c.start, c.start + c.count) for c in batch.chunks])[None].to(device)
        spans = [Span(c.start, c.count, c.sequence.blocks) for c in batch.chunks]
        try:
            base.attention.mode = paged_step(self._kv, spans, heads=base.shapes.num_heads)
            base.lora.plan = self._pool.plan(_segments(batch, rows_of), long_segment=self._long_segment)
            hidden: Tensor = base.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        finally:
            base.lora.plan = None
            base.attention.mode = CausalRows()
        self._prompt_logprobs(batch, hidden)
        return self._sample(batch, hidden)

    def _sample(self, batch: Batch, hidden: Tensor) -> dict[str, Sampled]:
        last, sequences, at = [], [], 0
        for chunk in batch.chunks:
            at += chunk.count
            if chunk.samples:
                last.append(at - 1)
                sequences.append(chunk.sequence)
        if not sequences:
            return {}
        logits = self._base.model.lm_head(hidden[last]).float()
        sampled = self._sampler.sample(logits, sequences)
        return {sequence.id: result for sequence, result in zip(sequences, sampled, strict=True)}

    def _prompt_logprobs(self, batch: Batch, hidden: Tensor) -> None:
        at = 0
        for chunk in batch.chunks:
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


def _segments(batch: Batch, rows_of: Callable[[tuple[str, str]], ResidentRows]) -> list[Segment]:
    """Token ranges with an adapter; neighbours of equal adapter are one segment."""
    segments: list[Segment] = []
    at = 0
    for chunk in batch.chunks:
        start, at = at, at + chunk.count
        key = chunk.sequence.adapter_key
        if key is None:
            continue
        rows = rows_of(key)
        before = segments[-1] if segments else None
        if before is not None and before.stop == start and before.row == rows.row:
            start = segments.pop().start
        segments.append(Segment(start, at, rows.row, rows.rank, rows.linears))
    return segments
