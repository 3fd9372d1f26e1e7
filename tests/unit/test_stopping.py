"""What ends a sequence, and what may not yet."""

from __future__ import annotations

from typing import Any

import pytest

from app.engine.sequence import FinishReason, Request, SamplingParams, Sequence
from app.engine.stopping import ending_ids, finish_reason_after

EOS, STOP, WORD = 2, 7, 50


def sequence(generated: list[int], **params: Any) -> Sequence:
    request = Request(
        id="r",
        tenant="acme",
        prompt=(10, 11, 12),
        sampling=SamplingParams(**{"max_tokens": 5, **params}),
        adapter=None,
        arrival=0.0,
        deadline=60.0,
        eos_ids=frozenset({EOS}),
    )
    seq = Sequence(request)
    seq.tokens.extend(generated)
    return seq


@pytest.mark.parametrize(
    ("generated", "params", "reason"),
    [
        ([WORD], {}, None),
        ([WORD, EOS], {}, FinishReason.STOP),
        ([WORD, EOS], {"ignore_eos": True}, None),
        ([WORD, STOP], {"stop_ids": frozenset({STOP})}, FinishReason.STOP),
        ([WORD, STOP], {"stop_ids": frozenset({STOP}), "ignore_eos": True}, FinishReason.STOP),
        ([WORD] * 5, {}, FinishReason.LENGTH),
        ([WORD] * 4 + [EOS], {}, FinishReason.STOP),
        ([WORD] * 5, {"max_tokens": 100}, None),
        ([EOS], {"min_tokens": 1}, None),
        ([WORD, EOS], {"min_tokens": 1}, FinishReason.STOP),
        ([WORD] * 5, {"min_tokens": 5}, FinishReason.LENGTH),
    ],
)
def test_a_sequence_ends_when_its_parameters_say(
    generated: list[int], params: dict[str, Any], reason: FinishReason | None
) -> None:
    assert finish_reason_after(sequence(generated, **params), generated[-1], max_context=100) is reason


def test_prompt_and_answer_together_fill_the_context() -> None:
    seq = sequence([WORD, WORD], max_tokens=100)
    assert finish_reason_after(seq, WORD, max_context=6) is None
    assert finish_reason_after(seq, WORD, max_context=5) is FinishReason.LENGTH


def test_an_eos_in_the_prompt_ends_nothing() -> None:
    seq = sequence([WORD])
    seq.tokens[2] = EOS
    assert finish_reason_after(seq, WORD, max_context=100) is None


def test_ignored_eos_ids_are_no_ending_ids() -> None:
    assert ending_ids(sequence([]).request) == {EOS}
    assert ending_ids(sequence([], ignore_eos=True, stop_ids=frozenset({STOP})).request) == {STOP}


def test_only_the_newest_token_can_be_asked_about() -> None:
    with pytest.raises(AssertionError):
        finish_reason_after(sequence([WORD, EOS]), WORD, max_context=100)
