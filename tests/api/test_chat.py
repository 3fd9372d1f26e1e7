"""Chat completions through the official client, against a real HTTP server and a scripted engine."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import openai
import pytest

from adapters.errors import AdapterUnavailable
from app.errors import NonFiniteOutput
from tests.adapter_files import config_bytes
from tests.api.serving import Serving, serve, sse_events, weights_bytes

HELLO = [{"role": "user", "content": "Hi"}]


def test_whole_answer_has_text_usage_and_the_base_models_name(serving: Serving) -> None:
    raw = serving.openai().chat.completions.with_raw_response.create(model=serving.base, messages=HELLO)
    answer = raw.parse()
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == serving.base
    assert answer.usage.prompt_tokens == len("user: Hi\nassistant: ")
    assert answer.usage.completion_tokens == len("hello world") + 1  # the end token counts
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.system_fingerprint == "fp_" + "b" * 12
    assert raw.headers["x-lodger-base-digest"] == "b" * 64
    assert "x-lodger-adapter-digest" not in raw.headers
    assert raw.headers["x-request-id"].startswith("req_")
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_adapter_answers_under_its_resolved_version(serving: Serving) -> None:
    first, second = serving.publish("acme", "support"), serving.publish("acme", "support", seed=1)
    serving.engine.scripts = {"support@v1": "one", "support@v2": "two"}
    client = serving.openai()
    for model, text, label, digest in (
        ("support", "two", "support@v2", second.digest),
        ("support@v1", "one", "support@v1", first.digest),
        ("support@live", "two", "support@v2", second.digest),
        ("acme/support@v1", "one", "support@v1", first.digest),
    ):
        raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO)
        answer = raw.parse()
        assert (answer.choices[0].message.content, answer.model) == (text, label)
        assert raw.headers["x-lodger-adapter-digest"] == digest
    assert {request.adapter.tenant for request in serving.engine.requests} == {"acme"}


def test_stream_is_the_whole_answer_in_pieces(serving: Serving) -> None:
    chunks = list(serving.openai().chat.completions.create(model=serving.base, messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_ends_with_usage_when_asked_and_with_done(serving: Serving) -> None:
    body = {"model": serving.base, "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    with serving.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    events = sse_events(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None for event in events[:-2])


def test_characters_of_several_tokens_are_never_split(tmp_path: Path) -> None:
    script = "héllo ✓ 世界 🎉"
    with serve(tmp_path, script=script) as serving:
        chunks = serving.openai().chat.completions.create(model=serving.base, messages=HELLO, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == script
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_cuts_the_text_and_ends_the_sequence(tmp_path: Path, stream: bool) -> None:
    with serve(tmp_path, script="one two three " * 20) as serving:
        client = serving.openai()
        answer = client.chat.completions.create(
            model=serving.base, messages=HELLO, stop=["three", "zzz"], stream=stream
        )
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == ("one two ", "stop")
        serving.wait_idle()
        assert len(serving.engine.cancelled) == 1


def test_stop_token_is_counted_and_not_shown(serving: Serving) -> None:
    answer = serving.openai().chat.completions.create(
        model=serving.base, messages=HELLO, extra_body={"stop_token_ids": [ord("w")]}
    )
    assert answer.choices[0].message.content == "hello "
    assert answer.usage.completion_tokens == 7


def test_length_is_told(serving: Serving) -> None:
    answer = serving.openai().chat.completions.create(model=serving.base, messages=HELLO, max_completion_tokens=5)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_are_n_sequences_with_seeds_of_their_own(serving: Serving, stream: bool) -> None:
    answer = serving.openai().chat.completions.create(
        model=serving.base, messages=HELLO, n=3, seed=7, max_tokens=4, stream=stream
    )
    if stream:
        texts = ["", "", ""]
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == len("user: Hi\nassistant: ")
        assert answer.usage.completion_tokens == 12
    assert texts == ["hell"] * 3
    seeds = [request.sampling.seed for request in serving.engine.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_name_token_bytes_and_alternatives(serving: Serving, stream: bool) -> None:
    answer = serving.openai().chat.completions.create(
        model=serving.base, messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=3, stream=stream
    )
    if stream:
        content = [
            entry for chunk in answer if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
        ]
    else:
        content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["h", "e", "l"]
    assert content[0].bytes == [ord("h")]
    assert content[0].logprob == -0.5
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("h", -0.5), ("i", -1.5)]


def test_parameters_reach_the_engine(serving: Serving) -> None:
    serving.openai().chat.completions.create(
        model=serving.base,
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": 3},
        seed=11,
        max_tokens=3,
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True},
    )
    sampling = serving.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 4, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.2)
    assert (sampling.logit_bias, sampling.seed, sampling.max_tokens) == (((5, 3.0),), 11, 3)
    assert (sampling.min_tokens, sampling.ignore_eos) == (2, True)


def test_fields_without_effect_are_accepted(serving: Serving) -> None:
    serving.openai().chat.completions.create(
        model=serving.base,
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
    )
    assert bytes(serving.engine.requests[0].prompt) == b"user: ab\nassistant: "


def test_error_before_the_first_token_is_a_status(serving: Serving) -> None:
    serving.publish("acme", "support")
    serving.engine.errors["support@v1"] = AdapterUnavailable()
    with pytest.raises(openai.InternalServerError) as caught:
        serving.openai().chat.completions.create(model="support", messages=HELLO)
    assert caught.value.status_code == 503
    assert caught.value.code == "adapter_unavailable"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_error_in_a_stream_is_an_event_and_no_done(serving: Serving) -> None:
    serving.publish("acme", "support")
    serving.engine.errors["support@v1"] = NonFiniteOutput()
    body = {"model": "support", "messages": HELLO, "stream": True}
    with serving.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    events = sse_events(response.text)
    assert response.status_code == 200
    assert events[-1]["error"]["code"] == "adapter_quarantined"
    assert "[DONE]" not in events
    with pytest.raises(openai.APIError, match="not finite"):
        list(serving.openai().chat.completions.create(**body))


def test_status_is_decided_before_the_first_byte(serving: Serving) -> None:
    serving.engine.held.set()
    body = {"model": serving.base, "messages": HELLO, "stream": True, "timeout": 0.2}
    with socket.create_connection(serving.url.removeprefix("http://").split(":")) as sock:
        sock.sendall(_raw_request(serving, body))
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        serving.engine.held.clear()
        sock.settimeout(5)
        assert sock.recv(100).startswith(b"HTTP/1.1 ")


def test_deadline_that_passes_in_the_queue_is_504(serving: Serving) -> None:
    serving.engine.held.set()

    def release() -> None:
        while not serving.engine.requests:
            time.sleep(0.002)
        time.sleep(max(serving.engine.requests[0].deadline - time.monotonic(), 0) + 0.01)
        serving.engine.held.clear()

    threading.Thread(target=release).start()
    with pytest.raises(openai.InternalServerError) as caught:
        serving.openai().chat.completions.create(
            model=serving.base, messages=HELLO, extra_headers={"X-Request-Timeout": "0.05"}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_admitted", [False, True])
def test_client_that_leaves_cancels_all_its_sequences(tmp_path: Path, stream: bool, is_admitted: bool) -> None:
    with serve(tmp_path, script="for ever " * 1000) as serving:
        serving.engine.step_s = 0.002
        if not is_admitted:
            serving.engine.held.set()
        body = {"model": serving.base, "messages": HELLO, "n": 3, "stream": stream, "max_tokens": 490}
        with socket.create_connection(serving.url.removeprefix("http://").split(":")) as sock:
            sock.sendall(_raw_request(serving, body))
            while len(serving.engine.requests) < 3:
                time.sleep(0.002)
            if stream and is_admitted:
                assert sock.recv(10)
        serving.wait_idle(timeout_s=0.5)
        assert len(serving.engine.cancelled) == 3
        page = serving.services.metrics.render()[0].decode()
        assert 'lodger_requests_cancelled_total{reason="client_disconnect"} 1.0' in page


def test_silent_stream_is_kept_alive(tmp_path: Path) -> None:
    with serve(tmp_path, script="ab", limits={"keep_alive_s": 0.05}) as serving:
        serving.engine.step_s = 0.12
        body = {"model": serving.base, "messages": HELLO, "stream": True}
        with serving.client() as client:
            text = client.post("/v1/chat/completions", json=body).text
        assert ": keep-alive\n\n" in text
        assert text.endswith("data: [DONE]\n\n")


def test_full_queue_is_refused_whole_and_leaves_nothing_behind(serving: Serving) -> None:
    serving.engine.max_waiting = 2
    serving.engine.held.set()
    with pytest.raises(openai.InternalServerError) as caught:
        serving.openai().chat.completions.create(model=serving.base, messages=HELLO, n=3)
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"]
    serving.wait_idle()


def _raw_request(serving: Serving, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {serving.keys['acme']}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def test_adapter_trained_with_another_renderer_is_refused(serving: Serving, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for name, digest in (("same", serving.services.text.digest), ("other", "f" * 64)):
        path.write_bytes(weights_bytes())
        catalog = serving.services.catalog
        catalog.publish("acme", name, config_bytes(), path, source="training", renderer_digest=digest)
    client = serving.openai()
    assert client.chat.completions.create(model="same", messages=HELLO).choices
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="other", messages=HELLO)
    assert refused.value.code == "adapter_renderer_mismatch"
