"""S3Store against moto's HTTP server, and against small servers that misbehave on purpose."""

from __future__ import annotations

import copy
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import botocore.exceptions as aws
import pytest
from moto.server import ThreadedMotoServer

from adapters.errors import (
    LocalDiskFailed,
    ObjectNotFound,
    ObjectTooLarge,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from adapters.s3 import S3Store, translate
from tests.store_contract import StoreContract

REGION = "us-east-1"


@pytest.fixture(autouse=True, scope="module")
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        yield


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def open_store(endpoint: str, bucket: str, prefix: str = "some/prefix", **settings: object) -> S3Store:
    settings = {"region": REGION, "addressing_style": "path", **settings}
    return S3Store(bucket, prefix, endpoint_url=endpoint, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bucket_store(endpoint: str) -> Iterator[S3Store]:
    store = open_store(endpoint, "bucket")
    store._client.create_bucket(Bucket="bucket")
    yield store
    store.close()


@pytest.fixture
def store(bucket_store: S3Store) -> S3Store:
    """A store of its own for each test: a client takes long to make, a prefix does not."""
    fresh = copy.copy(bucket_store)
    fresh._prefix = f"some/{uuid.uuid4().hex}/"
    return fresh


class TestS3Store(StoreContract):
    def test_two_prefixes_of_a_bucket_are_two_stores(self, store: S3Store, endpoint: str) -> None:
        one, other = (open_store(endpoint, store.bucket, prefix) for prefix in ("/a/b", "a/b-2/"))
        whole = open_store(endpoint, store.bucket, "")
        one.put("k", b"one")
        assert other.list("") == []
        assert [info.key for info in whole.list("a/")] == ["a/b/k"]

    def test_long_listings_are_read_page_by_page(self, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("adapters.s3.PAGE_KEYS", 3)
        keys = [f"p/{n:02}" for n in range(8)]
        for key in keys:
            store.put(key, b"")
        assert [info.key for info in store.list("p/")] == keys
        assert [info.key for info in store.list("p/", after="p/01", limit=5)] == keys[2:7]

    def test_a_console_folder_is_no_object(self, store: S3Store) -> None:
        store._client.put_object(Bucket=store.bucket, Key=store._prefix + "folder/", Body=b"")
        store.put("folder/x", b"")
        assert [info.key for info in store.list("")] == ["folder/x"]

    def test_a_bucket_that_does_not_exist_is_not_an_empty_one(self, endpoint: str) -> None:
        store = open_store(endpoint, "absent-bucket")
        with pytest.raises(StoreUnavailable, match="bucket does not exist"):
            store.list("")
        assert "absent-bucket" in store.probe()[0]

    def test_a_store_that_ignores_create_only_is_found_out(
        self, store: S3Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put = store._client.put_object
        monkeypatch.setattr(store._client, "put_object", lambda IfNoneMatch=None, **rest: put(**rest))
        assert "conditional writes" in store.probe()[0]

    def test_every_call_is_observed(self, endpoint: str, store: S3Store) -> None:
        calls: list[tuple[str, str]] = []
        store = open_store(
            endpoint, store.bucket, "observed", on_call=lambda op, outcome, seconds: calls.append((op, outcome))
        )
        store.put("k", b"12")
        store.put_if_absent("k", b"")
        with pytest.raises(ObjectNotFound):
            store.head("j")
        with pytest.raises(ObjectTooLarge):
            store.get("k", max_bytes=1)
        with pytest.raises(LocalDiskFailed):
            store.download("k", Path("/no/such/directory/k"), max_bytes=9)
        store.list("")
        store.delete("k")
        assert calls == [
            ("put", "ok"),
            ("create", "ok"),
            ("head", "absent"),
            ("get", "too_large"),
            ("get", "error"),
            ("list", "ok"),
            ("delete", "ok"),
        ]


class Server:
    """A socket server that answers each connection with what `answer` sends. Counts the connections."""

    def __init__(self, answer: object) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._listener.settimeout(0.05)
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(5)
            try:
                while b"\r\n\r\n" not in connection.recv(65536):
                    pass
                self._answer(connection, self._stop)  # type: ignore[operator]
            except OSError:
                pass

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[Server] = []

    def start(answer: object) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def _silence(_: socket.socket, stop: threading.Event) -> None:
    stop.wait(5)


def _trickle(connection: socket.socket, stop: threading.Event) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: "e"\r\n\r\n')
    while not stop.wait(0.1):
        connection.sendall(b"x")


def _half_a_body(connection: socket.socket, _: threading.Event) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: "e"\r\nConnection: close\r\n\r\nonly this')


def _answer(status: str, code: str) -> object:
    body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()

    def answer(connection: socket.socket, _: threading.Event) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)

    return answer


QUICK = {"connect_timeout_s": 0.3, "read_timeout_s": 0.4, "object_timeout_s": 0.8}


class TestMisbehavingServers:
    def test_a_silent_store_costs_no_more_than_the_budget(self, serve) -> None:  # type: ignore[no-untyped-def]
        server = serve(_silence)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            open_store(server.url, "b", max_attempts=10, **QUICK).get("k", max_bytes=9)
        assert time.monotonic() - started < 1.5
        assert server.connections == 1  # a second attempt could have outlasted the budget

    def test_a_trickling_body_ends_with_the_budget(self, serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        store = open_store(serve(_trickle).url, "b", **QUICK)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.download("k", tmp_path / "k", max_bytes=1000)
        assert 0.7 < time.monotonic() - started < 1.5

    def test_a_body_cut_short_is_never_taken_for_whole(self, serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        store = open_store(serve(_half_a_body).url, "b", **QUICK)
        with pytest.raises(StoreUnavailable):
            store.get("k", max_bytes=1000)
        with pytest.raises(StoreUnavailable):
            store.download("k", tmp_path / "k", max_bytes=1000)

    def test_server_errors_are_tried_again(self, serve) -> None:  # type: ignore[no-untyped-def]
        server = serve(_answer("503 Slow Down", "SlowDown"))
        with pytest.raises(StoreUnavailable, match="SlowDown"):
            open_store(server.url, "b", max_attempts=2).get("k", max_bytes=9)
        assert server.connections == 2

    def test_a_decision_in_progress_is_asked_for_again(self, serve) -> None:  # type: ignore[no-untyped-def]
        answers = iter([_answer("409 Conflict", "ConditionalRequestConflict"), _answer("412 No", "PreconditionFailed")])
        server = serve(lambda *a: next(answers)(*a))  # type: ignore[operator]
        assert not open_store(server.url, "b", max_attempts=1).put_if_absent("k", b"")
        assert server.connections == 2

    def test_a_failing_store_is_left_alone_for_a_while(self, serve) -> None:  # type: ignore[no-untyped-def]
        now = [0.0]
        server = serve(_answer("500 Oh", "InternalError"))
        calls: list[str] = []
        store = open_store(
            server.url,
            "b",
            max_attempts=1,
            clock=lambda: now[0],
            on_call=lambda op, outcome, seconds: calls.append(outcome),
        )
        for _ in range(7):
            with pytest.raises(StoreUnavailable):
                store.get("k", max_bytes=1)
        assert server.connections == 5
        assert calls == ["unavailable"] * 5 + ["paused"] * 2
        now[0] = 5.0
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                store.get("k", max_bytes=1)
        assert server.connections == 6

    def test_answers_that_are_no_failures_do_not_open_the_breaker(self, serve) -> None:  # type: ignore[no-untyped-def]
        server = serve(_answer("404 No", "NoSuchKey"))
        store = open_store(server.url, "b")
        for _ in range(8):
            with pytest.raises(ObjectNotFound):
                store.get("k", max_bytes=1)
        assert server.connections == 8

    def test_a_closed_port_is_unavailable(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        store = open_store(f"http://127.0.0.1:{port}", "b", max_attempts=1)
        with pytest.raises(StoreUnavailable):
            store.list("")
        assert "Check the endpoint" in store.probe()[0]


def client_error(status: int, code: str) -> aws.ClientError:
    return aws.ClientError(
        {"Error": {"Code": code, "Message": "hush"}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        "GetObject",
    )


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (client_error(404, "NoSuchKey"), ObjectNotFound),
        (client_error(404, "404"), ObjectNotFound),
        (client_error(404, "NoSuchBucket"), StoreUnavailable),
        (client_error(403, "AccessDenied"), StoreDenied),
        (client_error(403, "403"), StoreDenied),
        (client_error(403, "SignatureDoesNotMatch"), StoreDenied),
        (client_error(401, "Unauthorized"), StoreDenied),
        (client_error(400, "ExpiredToken"), StoreDenied),
        (client_error(400, "AuthorizationHeaderMalformed"), StoreDenied),
        (client_error(400, "InvalidRequest"), StoreUnavailable),
        (client_error(409, "ConditionalRequestConflict"), StoreUnavailable),
        (client_error(429, "TooManyRequests"), StoreUnavailable),
        (client_error(500, "InternalError"), StoreUnavailable),
        (client_error(503, "SlowDown"), StoreUnavailable),
        (aws.EndpointConnectionError(endpoint_url="http://hush"), StoreUnavailable),
        (aws.ConnectTimeoutError(endpoint_url="http://hush"), StoreUnavailable),
        (aws.ReadTimeoutError(endpoint_url="http://hush"), StoreUnavailable),
        (aws.ConnectionClosedError(endpoint_url="http://hush"), StoreUnavailable),
        (aws.IncompleteReadError(actual_bytes=1, expected_bytes=2), StoreUnavailable),
        (aws.SSLError(endpoint_url="http://hush", error="e"), StoreUnavailable),
        (aws.NoCredentialsError(), StoreDenied),
        (aws.PartialCredentialsError(provider="env", cred_var="x"), StoreDenied),
        (aws.ParamValidationError(report="hush"), StoreUnavailable),
        (aws.BotoCoreError(), StoreUnavailable),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:60],
)
def test_every_foreign_error_becomes_ours_and_tells_no_detail(foreign: Exception, ours: type[StoreError]) -> None:
    translated = translate(foreign)
    assert type(translated) is ours
    assert "hush" not in str(translated)


def test_no_credentials_are_denied_with_a_hint(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    store = open_store(endpoint, "b")
    with pytest.raises(StoreDenied, match="AWS_ACCESS_KEY_ID"):
        store.list("")
    assert "AWS_" in store.probe()[0]
