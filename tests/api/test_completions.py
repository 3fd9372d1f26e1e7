"""Plain completions: every form of prompt, echo with log-probabilities, several prompts times several choices."""

from __future__ import annotations

import pytest

from tests.api.serving import Serving, sse_events


@pytest.mark.parametrize(
    ("prompt", "num"),
    [("ab", 1), (["ab", "cd"], 2), ([97, 98], 1), ([[97, 98], [99, 100], [101]], 3), (["ab"], 1)],
)
def test_every_form_of_prompt(serving: Serving, prompt: object, num: int) -> None:
    answer = serving.openai().completions.create(model=serving.base, prompt=prompt, max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["hello"] * num
    assert [choice.index for choice in answer.choices] == list(range(num))
    assert bytes(serving.engine.requests[0].prompt) == b"ab"
    assert answer.object == "text_completion"


def test_sixteen_tokens_by_default(serving: Serving) -> None:
    serving.openai().completions.create(model=serving.base, prompt="a")
    assert serving.engine.requests[0].sampling.max_tokens == 16


def test_choices_of_several_prompts_are_in_prompt_order(serving: Serving) -> None:
    answer = serving.openai().completions.create(model=serving.base, prompt=["a", "bb"], n=2, echo=True, max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["ahe", "ahe", "bbhe", "bbhe"]
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(serving: Serving, stream: bool) -> None:
    answer = serving.openai().completions.create(
        model=serving.base, prompt="abc", echo=True, logprobs=1, max_tokens=2, stream=stream
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        tokens = [token for part in parts for token in part.tokens]
        logprobs = [value for part in parts for value in part.token_logprobs]
        offsets = [value for part in parts for value in part.text_offset]
        tops = [value for part in parts for value in part.top_logprobs]
    else:
        text, found = answer.choices[0].text, answer.choices[0].logprobs
        tokens, logprobs, offsets = found.tokens, found.token_logprobs, found.text_offset
        tops = found.top_logprobs
    assert text == "abche"
    assert tokens == ["a", "b", "c", "h", "e"]
    assert logprobs == [None, -1.0, -1.0, -0.5, -0.5]
    assert offsets == [0, 1, 2, 3, 4]
    assert tops == [None, {"b": -1.0}, {"c": -1.0}, {"h": -0.5}, {"e": -0.5}]


def test_max_tokens_zero_only_scores(serving: Serving) -> None:
    answer = serving.openai().completions.create(model=serving.base, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs.token_logprobs == [None, -1.0, -1.0]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0


def test_stop_string_drops_the_logprobs_of_what_is_not_shown(serving: Serving) -> None:
    answer = serving.openai().completions.create(model=serving.base, prompt="a", stop="o w", logprobs=0)
    assert answer.choices[0].text == "hell"
    assert answer.choices[0].logprobs.tokens == list("hell")


def test_stream_tells_every_choice_once(serving: Serving) -> None:
    body = {"model": serving.base, "prompt": ["a", "b"], "n": 2, "stream": True, "max_tokens": 3}
    with serving.client() as client:
        events = sse_events(client.post("/v1/completions", json=body).text)
    assert events[-1] == "[DONE]"
    texts = ["", "", "", ""]
    reasons = []
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        reasons += [choice["index"]] if choice["finish_reason"] == "length" else []
    assert texts == ["hel"] * 4
    assert sorted(reasons) == [0, 1, 2, 3]


def test_best_of_equal_to_n_is_fine(serving: Serving) -> None:
    answer = serving.openai().completions.create(model=serving.base, prompt="a", n=2, best_of=2)
    assert len(answer.choices) == 2
