"""The official client against a real server process: a tiny random Llama in fp32, a real adapter, nothing faked."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from adapters.manifest import BaseModelSpec
from tests.adapter_files import config_bytes, raw, safetensors_bytes, tensor_name
from tests.tiny import BASE_NAME, build_base

ADMIN_KEY = "admin-key-for-tests"
HELLO = [{"role": "user", "content": "hello world"}]
START_TIMEOUT_S = 120


@dataclass
class RealServer:
    url: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
        return sum(map(float, found))

    def wait_idle(self, timeout_s: float = 10) -> None:
        until = time.monotonic() + timeout_s
        while self.metric("vllm:num_requests_running") or self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < until, "requests are left over"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    directory = tmp_path_factory.mktemp("server")
    base = build_base(directory / "base")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {
        "BASE_MODEL": base,
        "BASE_NAME": BASE_NAME,
        "DATA_DIR": directory / "data",
        "QUANTIZATION": "none",
        "DTYPE": "float32",
        "DEVICE": "cpu",
        "THREADS": 1,
        "PORT": port,
        "KV_CACHE_BYTES": 32 << 20,
        "ADMIN_KEY": ADMIN_KEY,
        "TRAINING": "off",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LODGER_")}
    environment = kept | {f"LODGER_{name}": str(value) for name, value in settings.items()}
    log = directory / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "app", "serve"], env=environment, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, process, log)
        admin = httpx.Client(base_url=url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
        assert admin.post("/admin/tenants", json={"id": "acme"}).status_code == 201
        key = admin.post("/admin/keys", json={"tenant": "acme"}).json()["key"]
        yield RealServer(url, key, process, log)
    finally:
        process.kill()
        process.wait()


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def adapter(server: RealServer) -> str:
    """A random adapter on every q and v projection, uploaded over HTTP; returns its digest."""
    import numpy as np

    linears = {
        f"model.layers.{layer}.self_attn.{kind}": shape
        for layer in range(2)
        for kind, shape in (("q_proj", (64, 64)), ("v_proj", (64, 32)))
    }
    spec = BaseModelSpec(id=BASE_NAME, digest="", aliases=(), linears=linears)
    values = np.random.default_rng(3)
    tensors = {}
    for path, (in_features, out_features) in spec.linears.items():
        tensors[tensor_name(path, "A")] = raw(values.normal(0, 0.5, (8, in_features)))
        tensors[tensor_name(path, "B")] = raw(values.normal(0, 0.5, (out_features, 8)))
    response = httpx.post(
        f"{server.url}/v1/adapters",
        headers={"authorization": f"Bearer {server.key}"},
        files={
            "name": (None, "support"),
            "adapter_config": ("c", config_bytes(base_model_name_or_path=BASE_NAME)),
            "adapter_model": ("w", safetensors_bytes(tensors)),
        },
        timeout=60,
    )
    assert response.status_code == 201, response.text
    digest: str = response.json()["digest"]
    return digest


def test_streamed_and_whole_answers_agree(server: RealServer) -> None:
    client = server.openai()
    options = {"model": BASE_NAME, "messages": HELLO, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_adapter_answers_differently_from_the_base_and_says_whose_bytes(server: RealServer, adapter: str) -> None:
    client = server.openai()
    options = {"messages": HELLO, "max_tokens": 16, "temperature": 0}
    base = client.chat.completions.create(model=BASE_NAME, **options)
    raw_answer = client.chat.completions.with_raw_response.create(model="support", **options)
    answer = raw_answer.parse()
    assert answer.model == "support@v1"
    assert raw_answer.headers["x-lodger-adapter-digest"] == adapter
    assert answer.choices[0].message.content != base.choices[0].message.content
    assert server.openai().models.retrieve("support").adapter["digest"] == adapter
    assert [model.id for model in client.models.list()] == [BASE_NAME, "support"]
    shown = httpx.get(f"{server.url}/v1/adapters/support", headers={"authorization": f"Bearer {server.key}"}).json()
    assert [shown["versions"][0][key] for key in ("tier", "resident")] == ["pool", True]


def test_same_seed_same_text_and_choices_differ(server: RealServer) -> None:
    client = server.openai()
    options = {"model": BASE_NAME, "prompt": "hello", "max_tokens": 12, "n": 3, "seed": 5}
    first, second = (client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1
    alone = client.completions.create(**{**options, "n": 1})
    assert alone.choices[0].text == texts[0]


def test_logprobs_of_a_greedy_answer_name_the_likeliest_token(server: RealServer) -> None:
    client = server.openai()
    answer = client.chat.completions.create(
        model=BASE_NAME, messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
    assert (
        b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == answer.choices[0].message.content
    )


def test_echo_scores_a_prompt_as_it_was_generated(server: RealServer) -> None:
    client = server.openai()
    made = client.completions.create(model=BASE_NAME, prompt=[5, 6, 7], max_tokens=5, temperature=0, logprobs=0)
    prompt = [5, 6, 7]
    scored = client.completions.create(
        model=BASE_NAME, prompt=prompt, max_tokens=0, temperature=0, logprobs=0, echo=True
    )
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    assert len(scored.choices[0].logprobs.token_logprobs) == 3
    assert all(value < 0 for value in scored.choices[0].logprobs.token_logprobs[1:])
    assert scored.usage.completion_tokens == 0
    assert len(made.choices[0].logprobs.token_logprobs) == 5


def test_stop_string_is_cut_where_it_first_appears(server: RealServer) -> None:
    client = server.openai()
    options = {
        "model": BASE_NAME,
        "prompt": "hello",
        "max_tokens": 32,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    text = client.completions.create(**options).choices[0].text
    stop = text[6:8]
    cut = client.completions.create(**options, stop=stop).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    server.wait_idle()


def test_errors_carry_code_param_type_and_request_id(server: RealServer) -> None:
    client = server.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=BASE_NAME, messages=HELLO, top_p=2)
    error = bad.value
    assert (error.code, error.param, error.type) == ("invalid_value", "top_p", "invalid_request_error")
    assert error.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=BASE_NAME, prompt="x " * 5000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nonsense").models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_the_engine(server: RealServer, stream: bool) -> None:
    before = server.metric("lodger_requests_cancelled_total")
    client = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.key}"})
    body = {"model": BASE_NAME, "prompt": "x", "n": 4, "max_tokens": 480, "ignore_eos": True, "stream": stream}
    if stream:
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.05))
    client.close()
    server.wait_idle(timeout_s=5)
    assert server.metric("lodger_requests_cancelled_total") == before + 1


def test_hostile_requests_leave_the_canaries_answer_unchanged(server: RealServer, adapter: str) -> None:
    client = server.openai()
    options = {"model": "support", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    golden = client.completions.create(**options).choices[0].text
    random_ = random.Random(3)
    values = [0, -1, 2, 1e9, None, True, "x", [], {}, [1, 2], {"1": 100.0}, 1.5]
    fields = ["temperature", "top_p", "top_k", "min_p", "n", "max_tokens", "logit_bias", "seed", "stop", "logprobs"]
    fields += ["presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "stop_token_ids", "echo"]
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.key}"}, timeout=60) as raw_client:
        for i in range(120):
            body = {"model": random_.choice(["support", BASE_NAME]), "prompt": "hi", "max_tokens": 3}
            body |= {random_.choice(fields): random_.choice(values) for _ in range(random_.randrange(1, 4))}
            response = raw_client.post("/v1/completions", json=body)
            assert response.status_code in (200, 400), (body, response.text)
            if i % 20 == 0:
                assert client.completions.create(**options).choices[0].text == golden
    assert server.process.poll() is None
    server.wait_idle()


def test_sigterm_lets_running_streams_finish(server: RealServer) -> None:
    """Last in the file: it ends the server."""
    chunks = server.openai().completions.create(
        model=BASE_NAME, prompt="x", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    received = iter(chunks)
    next(received)
    server.process.send_signal(signal.SIGTERM)
    reasons = [chunk.choices[0].finish_reason for chunk in received]
    assert reasons[-1] == "length"
    assert server.process.wait(timeout=30) == 0
    assert "hello" not in server.log.read_text()
