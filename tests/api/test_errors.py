"""Bad input of every kind: a clear 4xx in the envelope, through the official client where it can send it."""

from __future__ import annotations

import json
import random
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from adapters import errors as adapter_errors
from app import errors
from app.api.errors import TABLE, answer_for
from tests.api.serving import Serving, serve

HELLO = [{"role": "user", "content": "Hi"}]
FAMILIES = (adapter_errors.AdapterRefused, adapter_errors.StoreError)


def tree(root: type[Exception]) -> list[type[Exception]]:
    return [root] + [below for child in root.__subclasses__() for below in tree(child)]


def test_every_error_class_has_its_row() -> None:
    for root in (errors.LodgerError, adapter_errors.AdapterError, adapter_errors.StoreError):
        for cls in tree(root):
            if cls.__module__ in (errors.__name__, adapter_errors.__name__):
                assert cls in TABLE or issubclass(cls, FAMILIES), cls


def test_every_answer_is_an_envelope_with_a_status_that_clients_understand() -> None:
    for root in (errors.LodgerError, adapter_errors.AdapterError, adapter_errors.StoreError):
        for cls in tree(root):
            answer = answer_for(cls())
            assert answer.status in (400, 401, 403, 404, 409, 410, 413, 429, 500, 503, 504), cls
            assert (answer.status == 409) == (cls is errors.CallInProgress), "the client repeats a 409"
            assert set(answer.envelope["error"]) == {"message", "type", "param", "code"}
            assert answer.message, cls
            assert ("Retry-After" in answer.headers) == (answer.status in (409, 429, 503)), cls
            kind = "invalid_request_error" if answer.status < 429 else "server_error"
            assert answer.type == ("rate_limit_error" if answer.status == 429 else kind), cls


def test_what_nobody_knows_is_a_500_without_a_word_of_the_cause() -> None:
    for error in (RuntimeError("secret prompt"), errors.InternalError("secret"), adapter_errors.StoreError("secret")):
        assert b"secret" not in answer_for(error).body


BAD_CHAT: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": None}, 400, "invalid_value", "model"),
    ({"model": 5}, 400, "invalid_value", "model"),
    ({"model": "nobody"}, 404, "model_not_found", "model"),
    ({"model": "no such model!"}, 404, "model_not_found", "model"),
    ({"model": "globex/support"}, 404, "model_not_found", "model"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": "hi"}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, 400, "unknown_parameter", "messages[0].extra"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        400,
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "unsupported_parameter", "messages[0].role"),
    ({"temperature": 3}, 400, "invalid_value", "temperature"),
    ({"temperature": "1"}, 400, "invalid_value", "temperature"),
    ({"temperature": True}, 400, "invalid_value", "temperature"),
    ({"top_p": 0}, 400, "invalid_value", "top_p"),
    ({"top_p": 1.1}, 400, "invalid_value", "top_p"),
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": 17}, 400, "invalid_value", "n"),
    ({"n": 1.5}, 400, "invalid_value", "n"),
    ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": 10_000}, 400, "context_length_exceeded", "messages"),
    ({"max_tokens": 1 << 80}, 400, "invalid_value", "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, 400, "invalid_value", "min_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, "invalid_value", "stop"),
    ({"stop": [""]}, 400, "invalid_value", "stop"),
    ({"stop": 5}, 400, "invalid_value", "stop"),
    ({"stop_token_ids": [100_000]}, 400, "invalid_value", "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"100000": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, "invalid_value", "logit_bias.1"),
    ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ({"seed": 1.5}, 400, "invalid_value", "seed"),
    ({"stream": "yes"}, 400, "invalid_value", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    ({"timeout": 0}, 400, "invalid_value", "timeout"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
    ({"functions": [{"name": "f"}]}, 400, "unsupported_parameter", "functions"),
    ({"tool_choice": "required"}, 400, "unsupported_parameter", "tool_choice"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    ({"modalities": ["text", "audio"]}, 400, "unsupported_parameter", "modalities"),
    ({"audio": {"voice": "x"}}, 400, "unsupported_parameter", "audio"),
    ({"tempratur": 1}, 400, "unknown_parameter", "tempratur"),
    ({"prompt": "x"}, 400, "unknown_parameter", "prompt"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serve(tmp_path_factory.mktemp("errors")) as serving:
        serving.publish("globex", "support")
        yield serving


@pytest.mark.parametrize(("change", "status", "code", "param"), BAD_CHAT, ids=lambda value: str(value)[:40])
def test_bad_chat_body(shared: Serving, change: dict[str, Any], status: int, code: str, param: str | None) -> None:
    body = {"model": shared.base, "messages": HELLO} | change
    with shared.client() as client:
        response = client.post(
            "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        )
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error"
    assert "http://x" not in error["message"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"prompt": None}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": ["a", 5]}, "invalid_value", "prompt"),
        ({"prompt": [1, True]}, "invalid_value", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt"),
        ({"prompt": [[1], []]}, "invalid_value", "prompt[1]"),
        ({"prompt": [100_000]}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 129}, "invalid_value", "prompt"),
        ({"prompt": "x" * 600}, "context_length_exceeded", "prompt"),
        ({"prompt": "x", "max_tokens": 512}, "context_length_exceeded", "prompt"),
        ({"best_of": 3}, "unsupported_parameter", "best_of"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"logprobs": True}, "invalid_value", "logprobs"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"messages": HELLO}, "unknown_parameter", "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_completion_body(shared: Serving, change: dict[str, Any], code: str, param: str) -> None:
    with shared.client() as client:
        response = client.post("/v1/completions", json={"model": shared.base, "prompt": "a"} | change)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"\xff\xfe",
        b'{"a":' * 50_000,
        b"[" * 100_000,
        b'{"max_tokens":' + b"9" * 5000 + b"}",
        b'{"temperature": NaN}',
        b"{'model': 'x'}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_body_that_is_no_json_object(shared: Serving, content: bytes) -> None:
    with shared.client() as client:
        response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_paths_and_methods_have_the_envelope(shared: Serving) -> None:
    with shared.client() as client:
        for method, path, status, code in (
            ("GET", "/v1/nothing", 404, "not_found"),
            ("GET", "/", 404, "not_found"),
            ("GET", "/docs", 404, "not_found"),
            ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
            ("PATCH", "/v1/models", 405, "method_not_allowed"),
        ):
            response = client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert response.headers["x-request-id"].startswith("req_")


def test_body_cap_is_exact_declared_or_chunked(shared: Serving) -> None:
    cap = shared.services.limits.max_body_bytes
    head = b'{"model":"' + shared.base.encode() + b'","messages":[{"role":"user","content":"'
    tail = b'"}]}'

    def body(size: int) -> bytes:
        return head + b"x" * (size - len(head) - len(tail)) + tail

    def chunked(data: bytes) -> Any:
        yield from (data[i : i + 65536] for i in range(0, len(data), 65536))

    json_type = {"content-type": "application/json"}
    with shared.client() as client:
        for size, status, code in (
            (cap - 1, 400, "context_length_exceeded"),
            (cap, 400, "context_length_exceeded"),
            (cap + 1, 413, "request_too_large"),
            (cap * 5, 413, "request_too_large"),
        ):
            whole = client.post("/v1/chat/completions", content=body(size), headers=json_type)
            assert (whole.status_code, whole.json()["error"]["code"]) == (status, code)
        for size, status in ((cap, 400), (cap + 1, 413)):
            parts = client.post("/v1/chat/completions", content=chunked(body(size)), headers=json_type)
            assert parts.status_code == status


def test_slow_body_is_given_up(tmp_path: Path) -> None:
    with (
        serve(tmp_path, limits={"body_timeout_s": 0.1}) as serving,
        socket.create_connection(serving.url.removeprefix("http://").split(":")) as sock,
    ):
        sock.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {serving.keys['acme']}\r\n"
            "content-type: application/json\r\ncontent-length: 100\r\n\r\n{".encode()
        )
        sock.settimeout(5)
        assert b" 408 " in sock.recv(4096)


def test_request_ids_are_echoed_or_made(shared: Serving) -> None:
    with shared.client() as client:
        assert client.get("/v1/models", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
        for bad in ("a b", "x" * 129, "a/b", "é".encode()):
            made = client.get(
                "/v1/models", headers=[(b"x-request-id", bad if isinstance(bad, bytes) else bad.encode())]
            )
            assert made.headers["x-request-id"].startswith("req_")


def test_official_client_sees_code_param_type_and_request_id(shared: Serving) -> None:
    client = shared.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=shared.base, messages=HELLO, temperature=5)
    assert (bad.value.code, bad.value.param, bad.value.type) == (
        "invalid_value",
        "temperature",
        "invalid_request_error",
    )
    assert bad.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="lk_wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.response.headers["www-authenticate"] == "Bearer"


def test_keyless_requests_reach_nothing_but_the_probes(shared: Serving) -> None:
    open_paths = {"/livez", "/readyz", "/startupz", "/health", "/metrics"}
    with httpx.Client(base_url=shared.url) as client:
        for route in _routes(shared.app):
            path = route.path_format.format(**dict.fromkeys(route.param_convertors, "x"))
            for method in route.methods:
                response = client.request(method, path, json={})
                if path in open_paths:
                    assert response.status_code == 200, path
                else:
                    assert response.status_code == 401, (method, path, response.text)


def _routes(app: Any) -> list[Any]:
    return [context.route for context in iter_route_contexts(app.routes) if isinstance(context.route, APIRoute)]


def mutate(random_: random.Random, value: Any) -> Any:
    """Spoil one place of a JSON value."""
    junk = [None, True, -1, 1 << 70, 1e308, "", "\ud800", "x" * 3000, [], {}, [[[]]], {"a": {"b": 1}}, "☃", "null\x00"]
    if isinstance(value, dict) and value and random_.random() < 0.8:
        key = random_.choice(sorted(value))
        return {**value, key: mutate(random_, value[key])} | (
            {random_.choice("abc"): 1} if random_.random() < 0.1 else {}
        )
    if isinstance(value, list) and value and random_.random() < 0.7:
        at = random_.randrange(len(value))
        return [*value[:at], mutate(random_, value[at]), *value[at + 1 :]]
    return random_.choice(junk)


def test_fuzzed_bodies_leave_the_server_and_its_canaries_alive(shared: Serving) -> None:
    seeds = [
        {
            "model": shared.base,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "stop": ["a"],
            "logit_bias": {"1": 2},
            "n": 2,
            "stream": False,
            "max_tokens": 4,
            "temperature": 1,
            "logprobs": True,
            "top_logprobs": 1,
        },
        {"model": shared.base, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 1, "max_tokens": 2},
    ]
    random_ = random.Random(7)
    stopped = threading.Event()
    wrong: list[str] = []

    def canaries() -> None:
        client = shared.openai()
        while not stopped.is_set():
            answer = client.completions.create(model=shared.base, prompt="a", max_tokens=5)
            if answer.choices[0].text != "hello":
                wrong.append(answer.choices[0].text)

    thread = threading.Thread(target=canaries)
    thread.start()
    try:
        with shared.client() as client:
            for i in range(200):
                path = ("/v1/chat/completions", "/v1/completions")[i % 2]
                body = mutate(random_, seeds[i % 2])
                for _ in range(random_.randrange(3)):
                    body = mutate(random_, body)
                response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
                assert response.status_code in (200, 400, 404), (body, response.text)
                if response.status_code != 200:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    finally:
        stopped.set()
        thread.join()
    assert not wrong
    shared.wait_idle()
