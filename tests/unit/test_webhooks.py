"""Webhooks: who is told, how it is signed, what is sent again, and where nothing is ever sent."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from openai import OpenAI

from app.database import migrate, open_database, writing
from app.errors import RequestInvalid
from app.training import tables, webhook_post
from app.training.courier import Courier
from app.training.jobs import JobStore, NewJob
from app.training.spec import JobSpec, PinnedFile
from app.training.webhook_post import PostFailed, UrlRefused, check_url, exchange, is_public, post
from app.training.webhooks import RETRY_AFTER_S, EndpointChange, Webhooks

Sent = tuple[str, bytes, Mapping[str, str]]
CANCELLED = "fine_tuning.job.cancelled"


class World:
    """A database, an outbox, and a wire that answers with `status` (None: nobody answers)."""

    def __init__(self, path: Path) -> None:
        self.now = 1_700_000_000.0
        self.status: int | None = 200
        self.sent: list[Sent] = []
        self.engine = open_database(f"sqlite:///{path / 'lodger.db'}")
        migrate(self.engine)
        self.jobs = JobStore(self.engine, wall=lambda: self.now)
        self.webhooks = Webhooks(self.engine, send=self.send, wall=lambda: self.now)
        with writing(self.engine) as connection:
            row = {"id": "file-1", "tenant": "acme", "sha256": "0", "num_bytes": 1, "filename": "f"}
            row |= {"purpose": "fine-tune", "created_at": 0.0, "is_deleted": False}
            connection.execute(sa.insert(tables.files).values(**row))

    def send(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        self.sent.append((url, body, headers))
        if self.status is None:
            raise PostFailed
        return self.status

    def deliver(self) -> int:
        return sum(self.webhooks.deliver(message) for message in self.webhooks.due())

    def end_a_job(self) -> str:
        job = self.jobs.create("acme", NewJob(JobSpec("m", PinnedFile("file-1", "0", 1)), asked={}))
        return self.jobs.cancel("acme", job.id).id


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.engine.dispose()


def unwrap(
    secret: str, sent: tuple[str, bytes, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch, now: float
) -> object:
    monkeypatch.setattr("time.time", lambda: now)
    client = OpenAI(api_key="x", webhook_secret=secret)
    return client.webhooks.unwrap(sent[1], dict(sent[2]))


def test_end_of_a_job_is_told_to_who_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = world.webhooks.create("acme", "mine", "https://example.com/hook?x=1", [CANCELLED])
    world.webhooks.create("acme", "other", "https://example.com/other", ["fine_tuning.job.succeeded"])
    world.webhooks.create("bolt", "theirs", "https://example.com/theirs", [CANCELLED])
    job_id = world.end_a_job()
    assert world.deliver() == 1
    assert world.deliver() == 0
    (sent,) = world.sent
    assert sent[0] == endpoint.url
    event = unwrap(endpoint.secret, sent, monkeypatch, world.now)
    assert (event.type, event.data.id) == (CANCELLED, job_id)  # type: ignore[attr-defined]


def test_failed_message_is_sent_again_with_the_same_id_and_a_new_signature(world: World) -> None:
    world.webhooks.create("acme", "mine", "https://example.com/", [CANCELLED])
    world.end_a_job()
    for status, wait in zip((500, None, 302, 410, 500, 500, 503), (*RETRY_AFTER_S, 1e6), strict=True):
        world.status = status
        assert world.deliver() == 1
        world.now += wait - 1
        assert world.deliver() == 0
        world.now += 1
    assert len(world.sent) == 7
    assert len({headers["webhook-id"] for _, _, headers in world.sent}) == 1
    assert len({headers["webhook-timestamp"] for _, _, headers in world.sent}) == 7
    assert world.deliver() == 0  # given up


def test_rotated_secret_signs_beside_the_old_one_for_a_day(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.webhooks.create("acme", "mine", "https://example.com/", [CANCELLED])
    new = world.webhooks.rotate_secret("acme", old.id, keep_old=True)
    world.webhooks.test("acme", old.id, CANCELLED)
    for secret in (old.secret, new.secret):
        assert unwrap(secret, world.sent[-1], monkeypatch, world.now)
    world.now += 86_400
    world.webhooks.test("acme", old.id, CANCELLED)
    assert len(world.sent[-1][2]["webhook-signature"].split()) == 1
    newest = world.webhooks.rotate_secret("acme", old.id, keep_old=False)
    world.webhooks.test("acme", old.id, CANCELLED)
    assert unwrap(newest.secret, world.sent[-1], monkeypatch, world.now)
    assert len(world.sent[-1][2]["webhook-signature"].split()) == 1


def test_endpoints_are_private_and_can_be_changed(world: World) -> None:
    endpoint = world.webhooks.create("acme", "mine", "https://example.com/", [CANCELLED])
    with pytest.raises(RequestInvalid):
        world.webhooks.get("bolt", endpoint.id)
    with pytest.raises(RequestInvalid):
        world.webhooks.delete("bolt", endpoint.id)
    world.now += 5
    same = world.webhooks.update("acme", endpoint.id, EndpointChange(name="mine"))
    assert same.updated_at == endpoint.updated_at
    changed = world.webhooks.update("acme", endpoint.id, EndpointChange(url="https://example.org/"))
    assert (changed.url, changed.secret, changed.updated_at) == ("https://example.org/", endpoint.secret, world.now)
    world.webhooks.delete("acme", endpoint.id)
    assert world.webhooks.list("acme").items == ()
    assert endpoint.secret not in repr(endpoint)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://",
        "https://user:secret@example.com/",
        "https://example.com:22/",
        "https://example.com:x/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://[::ffff:10.0.0.1]/",
        "https://example.com/ space",
        "https://exämple.com/",
        "https://example.com/#part",
        "file:///etc/passwd",
    ],
)
def test_url_that_leads_elsewhere_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(url)


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "192.168.0.1", "172.16.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "fe80::1%eth0",
     "fd00::1", "::", "64:ff9b::a00:1", "2002:a00:1::", "ff02::1"],
)  # fmt: skip
def test_name_that_leads_inside_is_refused_before_connecting(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(UrlRefused):
        post("https://example.com/", b"", {}, resolver=lambda host, port: ["93.184.216.34", address])


def test_public_addresses_are_public() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_answer_that_drips_is_cut_in_wall_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            peer, _ = listener.accept()
            with peer, suppress(OSError):
                peer.recv(4096)
                for _ in range(200):
                    peer.sendall(b"H")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=5)
        began = time.monotonic()
        with pytest.raises(PostFailed):
            exchange(connection, "/", b"{}", {}, within_s=0.3)
        assert time.monotonic() - began < 3


def test_name_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_post, "TIMEOUT_S", 0.05)
    go = threading.Event()

    def silent(host: str, port: int) -> list[str]:
        go.wait(10)
        return ["8.8.8.8"]

    with pytest.raises(PostFailed):
        post("https://example.com/", b"", {}, resolver=silent)
    go.set()


def test_endpoint_that_hangs_holds_up_neither_others_nor_its_second_message(world: World) -> None:
    go, reached = threading.Event(), threading.Event()
    sent: list[str] = []

    def send(url: str, body: bytes, headers: Mapping[str, str]) -> int:
        if "slow" in url:
            sent.append("slow")
            go.wait(10)
        else:
            reached.set()
        return 200

    webhooks = Webhooks(world.engine, send=send, wall=lambda: world.now)
    webhooks.create("acme", "slow", "https://slow.example.com/", [CANCELLED])
    world.end_a_job()
    world.end_a_job()
    courier = Courier(webhooks, every_s=0.01)
    courier.start()
    try:
        webhooks.create("acme", "quick", "https://quick.example.com/", [CANCELLED])
        world.end_a_job()
        assert reached.wait(5)
        time.sleep(0.05)  # rounds in which a second one could have gone out
        assert sent == ["slow"]
        go.set()
        until = time.monotonic() + 5
        while len(sent) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        go.set()
        courier.close()
    assert webhooks.due() == []


@pytest.mark.parametrize("url", ["https://[::1", "https://[x]/", "https://a:b/"])
def test_url_that_cannot_be_read_is_refused_as_input(world: World, url: str) -> None:
    with pytest.raises(RequestInvalid):
        world.webhooks.create("acme", "mine", url, [CANCELLED])
