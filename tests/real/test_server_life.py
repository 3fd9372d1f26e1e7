"""The life of a real server process: drain, second signal, clients that leave, floods, nonsense, a dead store."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.adapter_files import config_bytes, plain_tensors, safetensors_bytes
from tests.conftest import StartServer
from tests.loader_rig import BASE_NAME, KINDS
from tests.server_process import ServerProcess
from tests.tiny import build_base

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

LONG = 600  # tokens: a second or more of the tiny model
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"), max_context=8192)


def settings(base_dir: Path, **changes: object) -> dict[str, object]:
    plain = {"base_model": base_dir, "base_name": BASE_NAME, "quantization": "none", "dtype": "float32"}
    return {**plain, "kv_cache_bytes": 64 << 20, **changes}


@pytest.fixture(scope="module")
def shared(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for the tests that leave it as it was."""
    server = ServerProcess(tmp_path_factory.mktemp("shared"), **settings(base_dir, max_waiting=16, max_sequences=4))
    try:
        server.wait_ready()
        yield server
        assert server.process.poll() is None, "the server has died"
    finally:
        server.kill()


@pytest.fixture(scope="module")
def key(shared: ServerProcess) -> str:
    made = shared.new_tenant("acme")
    push(shared, made, "support", seed=1)
    return made


def push(server: ServerProcess, key: str, name: str, *, seed: int) -> str:
    config = config_bytes(base_model_name_or_path=BASE_NAME, target_modules=list(KINDS))
    return server.push(key, name, config, safetensors_bytes(plain_tensors(KINDS, 8, seed)))


def ask(model: str = BASE_NAME, max_tokens: int = 8, **more: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello world"}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return {**body, **more}


class Stream:
    """One streamed answer, read in a thread of its own."""

    def __init__(self, server: ServerProcess, key: str, body: dict[str, Any]) -> None:
        self.events: list[Any] = []
        self.status = 0
        self.first = threading.Event()
        self._request = (server, key, {**body, "stream": True, "stream_options": {"include_usage": True}})
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        server, key, body = self._request
        with server.client(key) as client, client.stream("POST", CHAT, json=body) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    self.events.append(data if data == "[DONE]" else json.loads(data))
                    if len(self.events) > 2:
                        self.first.set()
        self.first.set()

    def join(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the stream never ended"

    @property
    def completion_tokens(self) -> int:
        usage = [e["usage"] for e in self.events if isinstance(e, dict) and e.get("usage")]
        return int(usage[-1]["completion_tokens"]) if usage else 0


def test_sigterm_lets_accepted_work_finish_and_refuses_new_work(start_server: StartServer, base_dir: Path) -> None:
    server = start_server(**settings(base_dir, drain_timeout_s=200))
    key = server.new_tenant("acme")
    push(server, key, "support", seed=1)
    streams = [Stream(server, key, ask(model, LONG)) for model in (BASE_NAME, "support") * 3]
    for stream in streams:
        assert stream.first.wait(60)
    server.terminate()
    with server.client(key) as client:
        until = time.monotonic() + 2
        while client.get("/readyz").status_code == 200:
            assert time.monotonic() < until, "still ready"
        refused = client.post(CHAT, json=ask())
        assert client.get("/livez").status_code == 200
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "server_draining"
    assert int(refused.headers["retry-after"]) >= 1
    for stream in streams:
        stream.join()
        assert stream.events[-1] == "[DONE]"
        assert stream.completion_tokens == LONG
    assert server.wait(60) == 0, "it does not use up the drain time"


def test_what_outlasts_the_drain_ends_with_an_error_event(start_server: StartServer, base_dir: Path) -> None:
    server = start_server(**settings(base_dir, drain_timeout_s=0.5))
    key = server.new_tenant("acme")
    stream = Stream(server, key, ask(max_tokens=7000))
    assert stream.first.wait(60)
    server.terminate()
    stream.join()
    told = [e for e in stream.events if isinstance(e, dict) and "error" in e]
    assert [e["error"]["code"] for e in told] == ["server_draining"]
    assert server.wait(20) == 0


def test_a_second_signal_ends_the_process_at_once(start_server: StartServer, base_dir: Path) -> None:
    server = start_server(**settings(base_dir))
    key = server.new_tenant("acme")
    with server.client(key) as client, client.stream("POST", CHAT, json=ask(max_tokens=7000, stream=True)) as answer:
        next(answer.iter_lines())
        server.terminate()
        while client.get("/readyz").status_code == 200:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.wait(10) == 0
        assert time.monotonic() - started < 3


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_rows(shared: ServerProcess, key: str, streamed: bool) -> None:
    shared.wait_idle()
    body = json.dumps(ask("support", 7000, stream=streamed)).encode()
    where = urlsplit(shared.url)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.sendall(head.encode() + body)
        until = time.monotonic() + 20
        while not shared.metric("lodger_adapter_leases"):
            assert time.monotonic() < until, "it never ran"
        if streamed:
            assert connection.recv(100)
    left = time.monotonic()
    shared.wait_idle(5)
    assert time.monotonic() - left < 2.5, "7000 tokens take longer: it was stopped"


def test_a_revoked_key_is_refused_within_a_second(shared: ServerProcess) -> None:
    doomed = shared.new_tenant("globex")
    with shared.client(doomed) as client:
        assert client.post(CHAT, json=ask()).status_code == 200
        shared.command("keys", "revoke", doomed)
        revoked = time.monotonic()
        while client.post(CHAT, json=ask(max_tokens=1)).status_code == 200:
            assert time.monotonic() - revoked < 1, "the key still works"
        assert client.post(CHAT, json=ask()).status_code == 401


def test_a_flood_is_refused_early_and_what_was_accepted_is_answered(shared: ServerProcess, key: str) -> None:
    shared.wait_idle()
    times: list[tuple[int, float]] = []

    def one(number: int) -> None:
        started = time.monotonic()
        with shared.client(key) as client:
            answer = client.post(CHAT, json=ask("support" if number % 2 else BASE_NAME, 400))
        times.append((answer.status_code, time.monotonic() - started))
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 400
        else:
            assert answer.status_code in (429, 503)
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"]

    with ThreadPoolExecutor(60) as pool:
        list(pool.map(one, range(60)))
    accepted = [seconds for status, seconds in times if status == 200]
    refused = [seconds for status, seconds in times if status != 200]
    assert len(accepted) >= 16
    assert len(refused) >= 10
    assert max(refused) < max(accepted), "a refusal does not wait for the queue"
    shared.wait_idle()


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3.5,
    1e308,
    10**30,
    "",
    "x",
    "\x00",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    "a" * 5000,
]
FIELDS = (
    "model", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logit_bias",
    "logprobs", "top_logprobs", "stream_options", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "stop_token_ids", "min_tokens", "timeout", "tools", "response_format", "no_such_field", "prompt", "user",
)  # fmt: skip


def nonsense(draw: random.Random) -> bytes:
    """A request body that is wrong in one or several ways, now and then by luck in none."""
    kind = draw.randrange(6)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    text = json.dumps(ask()).encode()
    if kind == 1:
        return text[: draw.randrange(len(text))]
    if kind == 2:
        return b"[" * draw.choice((10, 5000, 100_000))
    body = ask(max_tokens=2)
    for _ in range(draw.choice((1, 1, 2, 4))):
        body[draw.choice(FIELDS)] = draw.choice(VALUES)
    if kind == 3:
        message: dict[str, Any] = {"role": draw.choice(["user", "tool", "", None]), "content": draw.choice(VALUES)}
        body["messages"] = [message] * draw.choice((1, 3))
    return json.dumps(body).encode()


def test_three_hundred_bad_requests_cost_the_good_ones_among_them_nothing(shared: ServerProcess, key: str) -> None:
    shared.wait_idle()
    draw = random.Random(20)
    with shared.client(key) as client:
        canaries = [ask(), ask("support", 12), ask("support@v1", 5, logprobs=True, top_logprobs=2)]
        golden = [client.post(CHAT, json=canary).json()["choices"] for canary in canaries]
        statuses: dict[int, int] = {}
        for number in range(300):
            body = nonsense(draw)
            answer = client.post(
                draw.choice((CHAT, "/v1/completions")), content=body, headers={"content-type": "application/json"}
            )
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (answer.status_code, answer.text, body[:500])
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
            if number % 25 == 0:
                which = draw.randrange(len(canaries))
                assert client.post(CHAT, json=canaries[which]).json()["choices"] == golden[which]
        huge = client.post(CHAT, content=b'{"a":"' + b"x" * (2 << 20) + b'"}')
        assert huge.status_code == 413
        assert client.post(CHAT, json=ask(max_tokens=10**6)).status_code == 400
        assert client.post(CHAT, json=ask("nobody")).status_code == 404
    assert statuses.get(400, 0) > 150, statuses
    shared.wait_idle()


def test_cached_adapters_are_served_while_s3_is_down(
    start_server: StartServer, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="adapters")
    s3 = {
        "store": "s3://adapters/lodger",
        "s3_endpoint_url": endpoint,
        "s3_addressing_style": "path",
        "s3_connect_timeout_s": 0.5,
        "s3_read_timeout_s": 1,
        "s3_object_timeout_s": 3,
        "pointer_ttl_s": 1,
    }
    server = start_server(**settings(base_dir, **s3))
    key = server.new_tenant("acme")
    push(server, key, "warm", seed=1)
    push(server, key, "cold", seed=2)
    with server.client(key) as client:
        before = client.post(CHAT, json=ask("warm"))
        assert before.status_code == 200, before.text
        resolved = client.get("/v1/models/cold")
        assert resolved.status_code == 200
        moto.stop()
        time.sleep(1.2)  # what the catalog knows is now older than it believes without asking
        for _ in range(3):
            during = client.post(CHAT, json=ask("warm"))
            assert during.status_code == 200, during.text
            assert during.json()["choices"] == before.json()["choices"]
        started = time.monotonic()
        cold = client.post(CHAT, json=ask("cold"))
        assert cold.status_code == 503, cold.text
        assert cold.json()["error"]["code"] == "adapter_unavailable"
        assert "retry-after" in cold.headers
        assert time.monotonic() - started < 10
        again = time.monotonic()
        assert client.post(CHAT, json=ask("cold")).status_code == 503
        assert time.monotonic() - again < 2, "a known failure is not tried again at once"
        assert httpx.get(f"{server.url}/readyz", timeout=10).status_code == 200
    server.terminate()
    assert server.wait() == 0
