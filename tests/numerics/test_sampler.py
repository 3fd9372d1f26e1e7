"""The sampler against slow references: one row at a time, in fp64, and transformers' own logits processors."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from app.engine import sampler as sampler_module
from app.engine.sampler import Sampled, Sampler
from app.engine.sequence import Request, SamplingParams, Sequence, TokenLogprob

V = 300
EOS = 2


def sequence(prompt: tuple[int, ...] = (10, 11, 12, 10), generated: tuple[int, ...] = (), **params: Any) -> Sequence:
    request = Request(
        id="r",
        tenant="acme",
        prompt=prompt,
        sampling=SamplingParams(**params),
        adapter=None,
        arrival=0.0,
        deadline=60.0,
        eos_ids=frozenset({EOS}),
    )
    seq = Sequence(request)
    seq.tokens.extend(generated)
    return seq


def logits_for(num_rows: int, seed: int = 0, scale: float = 3.0, vocab: int = V) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def slow_distribution(row: Tensor, seq: Sequence) -> Tensor:
    """The distribution that the next token is drawn from, by plain loops over the definition."""
    params = seq.request.sampling
    values = row.double().tolist()
    generated = seq.tokens[seq.num_prompt :]
    for token in set(seq.tokens):
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token, count in Counter(generated).items():
        values[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, bias in params.logit_bias:
        values[token] += bias
    if len(generated) < params.min_tokens:
        for token in params.stop_ids | (frozenset() if params.ignore_eos else seq.request.eos_ids):
            values[token] = -math.inf
    if params.temperature == 0:
        best = max(range(len(values)), key=lambda token: values[token])
        return torch.nn.functional.one_hot(torch.tensor(best), len(values)).double()
    probs = torch.tensor(values, dtype=torch.float64).div(params.temperature).softmax(-1)
    probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    if 0 < params.top_k < len(values):
        probs = torch.where(probs >= probs.sort(descending=True).values[params.top_k - 1], probs, 0.0)
    probs = probs / probs.sum()
    kept, share = [], 0.0
    for token in probs.argsort(descending=True).tolist():
        if share >= params.top_p:
            break
        kept.append(token)
        share += probs[token].item()
    result = torch.zeros_like(probs)
    result[kept] = probs[kept]
    return result / result.sum()


def drawn_weights(monkeypatch: pytest.MonkeyPatch, logits: Tensor, seqs: list[Sequence]) -> Tensor:
    """What the sampler looks its numbers up in, as probabilities."""
    seen: list[Tensor] = []
    look_up = sampler_module._look_up
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "_look_up", lambda w, n: (seen.append(w.clone()), look_up(w, n))[1])
        Sampler(logits.shape[-1]).sample(logits, seqs)
    return seen[0] / seen[0].sum(-1, keepdim=True)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 1},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999, "temperature": 2.0},
    {"top_k": 20, "top_p": 0.7, "temperature": 1.3},
    {"min_p": 0.1},
    {"min_p": 0.02, "top_k": 8, "top_p": 0.8},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5, "frequency_penalty": 2.0, "top_p": 0.5},
    {"logit_bias": ((10, -100.0), (55, 4.0)), "temperature": 0.8},
    {"min_tokens": 9, "stop_ids": frozenset({40, 41})},
    {"min_tokens": 9, "ignore_eos": True, "stop_ids": frozenset({40})},
    {"min_tokens": 2},
]


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("scale", [0.2, 3.0, 20.0])
    def test_each_row_of_a_mixed_batch_has_its_own_distribution(
        self, monkeypatch: pytest.MonkeyPatch, scale: float
    ) -> None:
        seqs = [sequence(generated=(20, 21, 20, 10), **params) for params in SETTINGS]
        logits = logits_for(len(seqs), scale=scale)
        expected = torch.stack([slow_distribution(row, seq) for row, seq in zip(logits, seqs, strict=True)])
        probs = drawn_weights(monkeypatch, logits, seqs)
        assert torch.allclose(probs.double(), expected, atol=2e-6)  # fp32 exp and sum against fp64

    @pytest.mark.parametrize("scale", [0.05, 2.0, 8.0])
    def test_a_nucleus_of_any_size_is_found_in_a_large_vocabulary(
        self, monkeypatch: pytest.MonkeyPatch, scale: float
    ) -> None:
        seqs = [sequence(top_p=top_p) for top_p in (0.1, 0.5, 0.9, 0.999)]
        logits = logits_for(len(seqs), vocab=6000, scale=scale)
        expected = torch.stack([slow_distribution(row, seq) for row, seq in zip(logits, seqs, strict=True)])
        probs = drawn_weights(monkeypatch, logits, seqs).double()
        # At the border of the nucleus fp32 may keep one token more or fewer than fp64.
        assert ((probs > 0) != (expected > 0)).sum(-1).max() <= 1
        assert torch.allclose(probs, expected, atol=1e-3 if scale > 1 else 2e-4)

    def test_greedy_rows_with_edits_take_the_largest_edited_logit(self) -> None:
        settings = [{**params, "temperature": 0.0} for params in SETTINGS]
        seqs = [sequence(generated=(20, 21, 20, 10), **params) for params in settings]
        logits = logits_for(len(seqs))
        expected = [slow_distribution(row, seq).argmax().item() for row, seq in zip(logits, seqs, strict=True)]
        assert [s.token for s in Sampler(V).sample(logits, seqs)] == expected

    def test_logits_are_left_as_they_were(self) -> None:
        seqs = [sequence(generated=(20,), **params) for params in [*SETTINGS, {"temperature": 0.0, "logprobs": 2}]]
        logits = logits_for(len(seqs))
        before = logits.clone()
        Sampler(V).sample(logits, seqs)
        assert torch.equal(logits, before)

    def test_lower_precision_logits_are_taken(self) -> None:
        logits = logits_for(2).bfloat16()
        seqs = [sequence(temperature=0.0), sequence(top_k=1)]
        assert [s.token for s in Sampler(V).sample(logits, seqs)] == logits.argmax(-1).tolist()

    def test_an_empty_batch_samples_nothing(self) -> None:
        assert Sampler(V).sample(torch.zeros(0, V), []) == []


class TestAgainstTransformers:
    """Seeds are chosen so that no two logits tie."""

    @pytest.mark.parametrize(
        ("params", "warper"),
        [
            ({"top_k": 7}, TopKLogitsWarper(7)),
            ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
            ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
        ],
    )
    def test_cuts_keep_the_same_tokens(
        self, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], warper: Any
    ) -> None:
        logits = logits_for(4)
        theirs = warper(torch.zeros(4, 1, dtype=torch.long), logits.clone()).softmax(-1)
        assert torch.allclose(
            drawn_weights(monkeypatch, logits, [sequence(**params) for _ in range(4)]), theirs, atol=1e-6
        )

    def test_repetition_penalty_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seq = sequence(generated=(20, 21, 20), repetition_penalty=1.7)
        logits = logits_for(1)
        theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seq.tokens]), logits.clone()).softmax(-1)
        assert torch.allclose(drawn_weights(monkeypatch, logits, [seq]), theirs, atol=1e-6)


class TestSeeds:
    PARAMS: dict[str, Any] = {"seed": 1234, "temperature": 1.2, "top_p": 0.95, "frequency_penalty": 0.3}  # noqa: RUF012

    def generate(self, num_tokens: int = 12, **params: Any) -> list[int]:
        """A sequence alone: the logits of a step depend on the tokens so far, as a model's do."""
        seq = sequence(**{**self.PARAMS, **params})
        for _ in range(num_tokens):
            self.step([seq])
        return seq.tokens[seq.num_prompt :]

    @staticmethod
    def step(seqs: list[Sequence]) -> None:
        logits = torch.cat([logits_for(1, seed=hash(tuple(seq.tokens)) % (1 << 31)) for seq in seqs])
        for seq, sampled in zip(seqs, Sampler(V).sample(logits, seqs), strict=True):
            seq.tokens.append(sampled.token)

    def test_same_seed_same_tokens(self) -> None:
        assert self.generate() == self.generate()
        assert self.generate() != self.generate(seed=1235)

    def test_without_a_seed_tokens_differ(self) -> None:
        assert self.generate(seed=None) != self.generate(seed=None)

    def test_neither_the_batch_nor_the_row_changes_a_sequences_tokens(self) -> None:
        expected = self.generate()
        shuffle = random.Random(0)
        seq = sequence(**self.PARAMS)
        for _ in range(12):
            others = [sequence(**shuffle.choice(SETTINGS)) for _ in range(shuffle.randrange(6))]
            batch = [*others, seq]
            shuffle.shuffle(batch)
            self.step(batch)
        assert seq.tokens[seq.num_prompt :] == expected

    def test_a_preemption_that_loses_the_state_changes_nothing(self) -> None:
        expected = self.generate()
        seq = sequence(**self.PARAMS)
        for n in range(12):
            if n % 3 == 0:
                seq.sampler_state = None
            self.step([seq])
        assert seq.tokens[seq.num_prompt :] == expected

    def test_tokens_that_were_taken_back_are_not_counted(self) -> None:
        strong = {"frequency_penalty": 2.0, "temperature": 0.7}
        expected = self.generate(**strong)
        seq = sequence(**{**self.PARAMS, **strong})
        for _ in range(8):
            self.step([seq])
        del seq.tokens[-3:]
        for _ in range(7):
            self.step([seq])
        assert seq.tokens[seq.num_prompt :] == expected
        seq.tokens = [*seq.tokens[: seq.num_prompt], 20, 20]
        self.step([seq])
        assert seq.sampler_state.counts.sum() == 2

    def test_one_seed_draws_by_the_distribution(self) -> None:
        """Chi-square over 5,000 draws of one sequence's numbers; 1e-4 quantile of 9 degrees of freedom."""
        row = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, 1.5, 0.2, -0.5, 1.2, 0.8]])
        num_draws, num_rows = 5_000, 250
        seq = sequence(prompt=(0,), seed=5)
        counts = torch.zeros(10)
        for start in range(0, num_draws, num_rows):
            seqs = [sequence(prompt=(0,), generated=(0,) * (start + n), seed=5) for n in range(num_rows)]
            for sampled in Sampler(10).sample(row.expand(num_rows, -1), seqs):
                counts[sampled.token] += 1
        expected = slow_distribution(row[0], seq) * num_draws
        assert ((counts - expected) ** 2 / expected).sum() < 33.7

    def test_seeds_draw_by_the_distribution(self) -> None:
        row = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, 1.5, 0.2, -0.5, 1.2, 0.8]])
        seqs = [sequence(prompt=(0,), seed=seed) for seed in range(5_000)]
        counts = torch.zeros(10)
        for sampled in Sampler(10).sample(row.expand(len(seqs), -1), seqs):
            counts[sampled.token] += 1
        expected = slow_distribution(row[0], seqs[0]) * len(seqs)
        assert ((counts - expected) ** 2 / expected).sum() < 33.7


class TestLookUp:
    @pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 1000])
    def test_the_token_found_is_the_one_whose_share_the_number_falls_in(self, vocab: int) -> None:
        generator = torch.Generator().manual_seed(vocab)
        weights = torch.rand(200, vocab, generator=generator) ** 4
        weights[:, ::3] = 0
        if vocab == 1:
            weights[:] = 0.5
        numbers = torch.rand(200, generator=generator, dtype=torch.float64)
        for row, number, found in zip(
            weights, numbers.tolist(), sampler_module._look_up(weights, numbers), strict=True
        ):
            ends = row.double().cumsum(0)
            expected = int((ends <= number * ends[-1]).sum())
            assert abs(found - expected) <= 2  # neighbours, where the number falls on a border and rounding decides
            assert row[found] > 0

    @pytest.mark.parametrize("number", [0.0, 1 - 2**-48])
    def test_the_extreme_numbers_find_tokens_that_can_be_drawn(self, number: float) -> None:
        weights = torch.zeros(20, 1000)
        weights[0, 512:515] = torch.tensor([1e-30, 1.0, 1e-30])
        weights[1, 999] = 1e-20
        weights[2, 0] = 1.0
        weights[3:, 256:500] = torch.rand(17, 244, generator=torch.Generator().manual_seed(0))  # sums that round
        found = sampler_module._look_up(weights, torch.full((20,), number, dtype=torch.float64))
        assert all(weights[row, token] > 0 for row, token in enumerate(found.tolist()))


class TestTies:
    def test_tokens_that_tie_with_the_last_one_kept_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        row = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]])
        probs = drawn_weights(monkeypatch, row, [sequence(prompt=(0,), top_k=3)])
        assert (probs > 0).tolist() == [[True, True, True, True, True, False]]
        probs = drawn_weights(monkeypatch, torch.zeros(1, 6), [sequence(prompt=(0,), top_p=0.3)])
        assert (probs > 0).all()


class TestNonFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 5, "logprobs": 3}])
    def test_a_row_that_is_not_finite_fails_alone(self, bad: float, params: dict[str, Any]) -> None:
        settings = [{"seed": n, **params} for n in range(3)]
        logits = logits_for(3)
        expected = Sampler(V).sample(logits, [sequence(**params) for params in settings])
        logits[1, 17] = bad
        results = Sampler(V).sample(logits, [sequence(**params) for params in settings])
        assert results[1] == Sampled(-1, None, is_finite=False)
        assert results[0] == expected[0]
        assert results[2] == expected[2]

    def test_a_wholly_nan_row_is_reported(self) -> None:
        logits = torch.full((1, V), math.nan)
        assert not Sampler(V).sample(logits, [sequence(top_p=0.5, min_p=0.1, top_k=3)])[0].is_finite


class TestPenaltyState:
    def test_counts_are_kept_token_by_token_and_equal_a_recount(self, monkeypatch: pytest.MonkeyPatch) -> None:
        params = {"frequency_penalty": 0.4, "presence_penalty": 0.2, "repetition_penalty": 1.2, "seed": 3}
        seq = sequence(prompt=tuple(range(60)), **params)
        logits = logits_for(1, scale=0.5)
        for _ in range(80):  # more distinct tokens than the first tensor holds
            seq.tokens.append(Sampler(V).sample(logits, [seq])[0].token)
        fresh = sequence(prompt=tuple(range(60)), generated=tuple(seq.tokens[60:]), **params)
        kept = drawn_weights(monkeypatch, logits, [seq])
        assert torch.equal(kept, drawn_weights(monkeypatch, logits, [fresh]))
        assert torch.allclose(kept[0].double(), slow_distribution(logits[0], fresh), atol=2e-6)

    def test_ids_outside_the_vocabulary_harm_nobody(self) -> None:
        seq = sequence(prompt=(0, V + 5), logit_bias=((V, 5.0), (4, 100.0)), min_tokens=2, stop_ids=frozenset({V + 1}))
        assert Sampler(V).sample(logits_for(1), [seq])[0].token == 4


class TestLogprobs:
    def test_they_are_those_of_the_unmodified_distribution(self) -> None:
        logits = logits_for(3)
        seqs = [
            sequence(temperature=0.0, logprobs=4),
            sequence(temperature=0.2, logit_bias=((9, 100.0),), logprobs=2, generated=(9, 9), frequency_penalty=2.0),
            sequence(logprobs=0, seed=1),
        ]
        expected = logits.double().log_softmax(-1)
        results = Sampler(V).sample(logits, seqs)
        assert results[1].token == 9
        for row, (result, count) in enumerate(zip(results, (4, 2, 0), strict=True)):
            assert result.logprob is not None
            assert result.logprob.token == result.token
            assert result.logprob.logprob == pytest.approx(expected[row, result.token].item(), abs=1e-5)
            values, ids = expected[row].topk(count)
            assert [token for token, _ in result.logprob.top] == ids.tolist()
            assert [value for _, value in result.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)

    def test_only_rows_that_ask_get_them(self) -> None:
        results = Sampler(V).sample(logits_for(2), [sequence(temperature=0.0), sequence(temperature=0.0, logprobs=1)])
        assert results[0].logprob is None
        assert results[1].logprob is not None

    def test_more_than_the_vocabulary_cannot_be_asked(self) -> None:
        result = Sampler(5).sample(logits_for(1, vocab=5), [sequence(prompt=(0,), temperature=0.0, logprobs=20)])[0]
        assert result.logprob is not None
        assert len(result.logprob.top) == 5

    def test_prompt_logprobs_score_the_tokens_that_follow(self) -> None:
        logits = logits_for(4)
        scored = Sampler(V).prompt_logprobs(logits, [5, 6, 7, 8], 3)
        expected = logits.double().log_softmax(-1)
        for row, (entry, token) in enumerate(zip(scored, (5, 6, 7, 8), strict=True)):
            assert isinstance(entry, TokenLogprob)
            assert entry.token == token
            assert entry.logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
            assert [i for i, _ in entry.top] == expected[row].topk(3).indices.tolist()
        assert Sampler(V).prompt_logprobs(logits[:0], [], 3) == []
