"""When a sequence ends by its tokens, and which tokens may not end it yet. No torch.

Stop strings are text and so the API's: it cancels a sequence that it has seen enough of.
"""

from __future__ import annotations

from app.engine.sequence import FinishReason, Request, Sequence


def ending_ids(request: Request) -> frozenset[int]:
    """The token ids that end the sequence: its stop ids, and the end-of-sequence ids unless they are to be ignored."""
    stop_ids = request.sampling.stop_ids
    return stop_ids if request.sampling.ignore_eos else stop_ids | request.eos_ids


def owes_tokens(seq: Sequence, num_generated: int) -> bool:
    """True while, after `num_generated` tokens, the next one may not end the sequence (min_tokens)."""
    return num_generated < seq.request.sampling.min_tokens


def finish_reason_after(seq: Sequence, token: int, max_context: int) -> FinishReason | None:
    """Why the sequence ends with `token`, which has just been appended to `seq.tokens`; None if it goes on.

    `max_context` counts prompt and generated tokens together. A token that ends the sequence and is also the last
    allowed one is a stop: nothing was cut off.
    """
    assert seq.num_generated > 0, "nothing was generated yet"
    assert seq.tokens[-1] == token, "asked about a token that is not the newest"
    if token in ending_ids(seq.request) and not owes_tokens(seq, seq.num_generated - 1):
        return FinishReason.STOP
    if seq.num_generated >= seq.request.sampling.max_tokens or len(seq.tokens) >= max_context:
        return FinishReason.LENGTH
    return None
