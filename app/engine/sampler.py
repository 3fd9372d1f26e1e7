"""Logits -> the next token of each sequence, by its own parameters. Engine thread only.

The order is vLLM's (`vllm/v1/sample/sampler.py`): penalties (repetition, frequency, presence), logit bias, min_tokens,
temperature, then min_p, top_k and top_p, each over what the one before it left. Log-probabilities come from the logits
as the model gave them.

A draw uses one number in [0, 1) that depends on the sequence's seed and on how many tokens it has generated, and on
nothing else: neither the batch, nor the row, nor a preemption in between can change it. The number is looked up in the
cumulated probabilities in order of token ids, so that equal logits need no order of their own. For the same reason
what is cut off is cut by value: tokens that tie with the last one kept are kept.

Shapes: `S` sequences, `n` rows of them, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.engine.sequence import SamplingParams, Sequence, TokenLogprob
from app.engine.stopping import ending_ids, owes_tokens

# Below this a temperature is greedy: dividing by it would overflow fp32 and could change nothing but ties.
MIN_TEMPERATURE = 1e-5
# How many of the most likely tokens are sorted in search of the top_p cut, before all are.
NUCLEUS_GUESSES = (128, 4096)
LOOK_UP_BLOCK = 256  # tokens


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome. Where `is_finite` is false the token is -1 and means nothing."""

    token: int
    logprob: TokenLogprob | None = None
    is_finite: bool = True


class Sampler:
    """Stateless but for its shapes: what a sequence needs between steps is in its `sampler_state`."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """logits [S, V], any float dtype, unchanged; row i belongs to sequences[i]. Does not append the tokens."""
        if not sequences:
            return []
        finite = logits.sum(-1, dtype=torch.float32).isfinite()  # a NaN or an inf anywhere survives a sum
        plain = [i for i, seq in enumerate(sequences) if _is_plain_greedy(seq.request.sampling)]
        tokens = logits.argmax(-1) if len(plain) == len(sequences) else self._choose(logits, sequences, plain)
        logprobs = self._logprobs(logits, tokens, sequences)
        return [
            Sampled(token, logprobs.get(i)) if is_finite else Sampled(-1, None, is_finite=False)
            for i, (token, is_finite) in enumerate(zip(tokens.tolist(), finite.tolist(), strict=True))
        ]

    def prompt_logprobs(self, logits: Tensor, next_ids: Rows[int], k: int) -> list[TokenLogprob]:
        """logits [n, V] predict `next_ids`; returns each one's log-probability with the `k` most likely tokens."""
        if not len(next_ids):
            return []
        return _score(logits.float(), _index(next_ids, logits.device), [k] * len(next_ids))

    def _choose(self, logits: Tensor, sequences: Rows[Sequence], plain: list[int]) -> Tensor:
        """The chosen tokens [S]; rows `plain` are known to be the largest raw logit."""
        tokens = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
        drawn = [i for i, seq in enumerate(sequences) if seq.request.sampling.temperature >= MIN_TEMPERATURE]
        edited = sorted({*range(len(sequences))}.difference(plain, drawn))
        for indices, choose in ((plain, _greedy), (edited, _greedy), (drawn, _draw)):
            if not indices:
                continue
            rows, chosen = _index(indices, logits.device), [sequences[i] for i in indices]
            work = logits.index_select(0, rows).float()  # a copy
            if indices is not plain:
                for row, seq in zip(work, chosen, strict=True):
                    _state_of(seq, self.vocab_size, self.device).apply(row, seq)
            tokens[rows] = choose(work, chosen)
        return tokens

    def _logprobs(self, logits: Tensor, tokens: Tensor, sequences: Rows[Sequence]) -> dict[int, TokenLogprob]:
        asked = [i for i, seq in enumerate(sequences) if seq.request.sampling.logprobs is not None]
        if not asked:
            return {}
        rows = _index(asked, logits.device)
        counts = [sequences[i].request.sampling.logprobs or 0 for i in asked]
        return dict(zip(asked, _score(logits.index_select(0, rows).float(), tokens[rows], counts), strict=True))


def _index(values: Rows[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _is_plain_greedy(params: SamplingParams) -> bool:
    """True when the largest raw logit is the answer. top_k, top_p and min_p never remove it."""
    return params.temperature < MIN_TEMPERATURE and not _edits_logits(params)


def _edits_logits(params: SamplingParams) -> bool:
    return (
        _has_penalties(params) or params.repetition_penalty != 1.0 or bool(params.logit_bias) or params.min_tokens > 0
    )


def _has_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _score(logits: Tensor, tokens: Tensor, counts: list[int]) -> list[TokenLogprob]:
    """logits [n, V] fp32, tokens [n]; counts[i] is how many of row i's most likely tokens are wanted."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, tokens[:, None]) - total)[:, 0].tolist()
    values, ids = logits.topk(min(max(counts), logits.shape[-1]), dim=-1)
    tops = zip(ids.tolist(), (values - total).tolist(), strict=True)
    scored = []
    for token, logprob, count, (top_ids, top_logprobs) in zip(tokens.tolist(), chosen, counts, tops, strict=True):
        pairs = sorted(zip(top_ids, top_logprobs, strict=True), key=lambda pair: (-pair[1], pair[0]))
        scored.append(TokenLogprob(token, logprob, tuple(pairs[:count])))
    return scored


# ---- choosing


def _greedy(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    return logits.argmax(-1)


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """logits [n, V] fp32, overwritten; returns one token of each row [n]."""
    params = [seq.request.sampling for seq in sequences]
    logits /= _column([p.temperature for p in params], logits)
    logits -= logits.amax(-1, keepdim=True)  # so exp() is in [0, 1] and the most likely token has exactly 1
    cut = _min_p_and_top_k_cut(logits, params)
    weights = logits.exp()
    if cut is not None:
        weights.masked_fill_(logits < cut, 0.0)
    if any(p.top_p < 1.0 for p in params):
        weights.masked_fill_(weights < _top_p_cut(weights, params), 0.0)
    numbers = torch.tensor([_next_uniform(seq) for seq in sequences], dtype=torch.float64, device=logits.device)
    return _look_up(weights, numbers)


def _look_up(weights: Tensor, numbers: Tensor) -> Tensor:
    """The first token of each row whose cumulated weight is above the row's number times the row's total.

    weights [n, V] fp32 >= 0; numbers [n] float64 in [0, 1). Cumulated in float64, as fp32 would lose the tail of a
    large vocabulary, and in two levels, as a cumulated sum is the slowest of these operations: blocks of tokens, then
    the tokens of the block found.
    """
    n, vocab = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocab % LOOK_UP_BLOCK)).view(n, -1, LOOK_UP_BLOCK)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    targets = numbers[:, None] * ends[:, -1:]
    # right=True, twice: what is found has itself a weight above zero. Only a row that is not finite finds nothing.
    block = torch.searchsorted(ends, targets, right=True).clamp_(max=blocks.shape[1] - 1)
    inner = blocks[torch.arange(n, device=weights.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    # The two levels round differently: the rest is kept below what the block's tokens come to, one after the other.
    rest = torch.minimum(targets - before, torch.nextafter(inner[:, -1:], torch.zeros_like(before)))
    token = torch.searchsorted(inner, rest, right=True).clamp_(max=LOOK_UP_BLOCK - 1)
    return (block * LOOK_UP_BLOCK + token)[:, 0].clamp_(max=vocab - 1)


def _column(values: Rows[float], like: Tensor) -> Tensor:
    """[n, 1], in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _min_p_and_top_k_cut(logits: Tensor, params: list[SamplingParams]) -> Tensor | None:
    """The least logit that min_p and top_k keep, [n, 1]; logits [n, V] have their largest at 0. None: all are kept."""
    vocab = logits.shape[-1]
    cut = None
    if any(p.min_p > 0 for p in params):
        cut = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], logits)
    limited = [i for i, p in enumerate(params) if 0 < p.top_k < vocab]
    if limited:
        rows = _index(limited, logits.device)
        counts = _index([params[i].top_k for i in limited], logits.device)
        largest = logits.index_select(0, rows).topk(max(params[i].top_k for i in limited)).values
        least = logits.new_full((len(params), 1), -math.inf)
        least[rows] = largest.gather(-1, counts[:, None] - 1)
        cut = least if cut is None else torch.maximum(cut, least)
    return cut


def _top_p_cut(weights: Tensor, params: list[SamplingParams]) -> Tensor:
    """The least weight [n, 1] in each row's nucleus, the fewest most likely tokens whose share reaches top_p; 0: all.

    weights [n, V] are zero where min_p or top_k cut. Most distributions have small nuclei: a few of the largest weights
    are sorted first, and the whole vocabulary only for rows that need it.
    """
    vocab = weights.shape[-1]
    cut = weights.new_zeros((len(params), 1))
    open_rows = [i for i, p in enumerate(params) if p.top_p < 1.0]
    for size in (*(guess for guess in NUCLEUS_GUESSES if guess < vocab), vocab):
        if not open_rows:
            break
        rows = _index(open_rows, weights.device)
        candidates = weights if len(open_rows) == len(params) else weights.index_select(0, rows)
        goal = candidates.sum(-1, keepdim=True).double() * _column([params[i].top_p for i in open_rows], weights)
        largest = candidates.topk(size).values if size < vocab else candidates.sort(descending=True).values
        before = largest.cumsum(-1, dtype=torch.float64) - largest
        num_kept = (before < goal).sum(-1, keepdim=True)
        cut[rows] = largest.gather(-1, (num_kept - 1).clamp_(min=0))
        # Where all of a guess were kept there may be more to keep, unless only zeros are left.
        is_open = (num_kept == size) & (largest[:, -1:] > 0)
        open_rows = [open_rows[i] for i, more in enumerate(is_open[:, 0].tolist()) if more]
    return cut


# ---- a sequence's own state


@dataclass(slots=True)
class SamplerState:
    """What a sequence's sampling needs of its past, kept up token by token. Can be rebuilt from the tokens at any time.

    The tokens seen are kept as distinct ids with the number of times each was generated, in tensors that grow by
    doubling, so that a step costs as much as there are distinct tokens and no more.
    """

    seed: int
    bias_ids: Tensor  # [number of biases]
    bias: Tensor
    ending: Tensor  # ids that min_tokens forbids
    num_seen: int = 0  # leading tokens of the sequence that are counted below
    place: dict[int, int] = field(default_factory=dict)  # token id -> index into ids and counts
    ids: Tensor = field(default_factory=lambda: torch.zeros(64, dtype=torch.long))
    counts: Tensor = field(default_factory=lambda: torch.zeros(64))  # times generated; 0: only in the prompt

    def absorb(self, seq: Sequence, vocab_size: int) -> None:
        """Count the tokens that were appended since the last step."""
        for at in range(self.num_seen, len(seq.tokens)):
            token = seq.tokens[at]
            if not 0 <= token < vocab_size:
                continue
            index = self.place.get(token)
            if index is None:
                index = self.place[token] = len(self.place)
                if index == len(self.ids):
                    self.ids = torch.cat([self.ids, torch.zeros_like(self.ids)])
                    self.counts = torch.cat([self.counts, torch.zeros_like(self.counts)])
                self.ids[index] = token
            if at >= seq.num_prompt:
                self.counts[index] += 1
        self.num_seen = len(seq.tokens)

    def apply(self, row: Tensor, seq: Sequence) -> None:
        """Edit the sequence's logits [V] in place: penalties, bias, min_tokens."""
        params = seq.request.sampling
        if _counts_tokens(params) and self.place:
            ids = self.ids[: len(self.place)].to(row.device)
            counts = self.counts[: len(self.place)].to(row.device)
            seen = row[ids]
            if params.repetition_penalty != 1.0:
                seen = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
            seen = seen - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
            row[ids] = seen
        if len(self.bias_ids):
            row[self.bias_ids] += self.bias
        if len(self.ending) and owes_tokens(seq, seq.num_generated):
            row[self.ending] = -math.inf


def _counts_tokens(params: SamplingParams) -> bool:
    return _has_penalties(params) or params.repetition_penalty != 1.0


def _state_of(seq: Sequence, vocab_size: int, device: torch.device) -> SamplerState:
    """The sequence's state, made or brought up to date. Nothing breaks if it was dropped, or tokens were taken back."""
    params = seq.request.sampling
    state = seq.sampler_state
    if not isinstance(state, SamplerState) or state.num_seen > len(seq.tokens):
        seed = state.seed if isinstance(state, SamplerState) else _first_seed(params)
        # Ids are checked at the API's edge. One outside the vocabulary would fail the whole step, everyone's.
        biases = {token: bias for token, bias in params.logit_bias if 0 <= token < vocab_size}
        ending = sorted(token for token in ending_ids(seq.request) if 0 <= token < vocab_size)
        state = SamplerState(
            seed,
            bias_ids=_index(list(biases), device),
            bias=torch.tensor(list(biases.values()), dtype=torch.float32, device=device),
            ending=_index(ending if params.min_tokens else [], device),
        )
        seq.sampler_state = state
    if _counts_tokens(params):
        state.absorb(seq, vocab_size)
    return state


def _first_seed(params: SamplingParams) -> int:
    return params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "big")


def _next_uniform(seq: Sequence) -> float:
    """A number in [0, 1), from the sequence's seed and the number of its generated tokens alone.

    48 bits, so that no product with a float64 total can round up to the total.
    """
    state = seq.sampler_state
    assert isinstance(state, SamplerState)
    digest = hashlib.blake2b(
        f"{state.seed}/{seq.num_generated}".encode(), digest_size=6, person=b"lodger-draw"
    ).digest()
    return int.from_bytes(digest, "big") / (1 << 48)
