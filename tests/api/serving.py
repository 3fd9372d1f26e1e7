"""A real HTTP server around the API for tests: uvicorn on a free port, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from adapters.catalog import AdapterCatalog
from adapters.checked import DoorLimits
from adapters.door import check_adapter
from adapters.manifest import AdapterManifest
from adapters.store import DirectoryStore
from app.api.http import create_admin_app, create_app
from app.api.services import ApiLimits, Services
from app.database import migrate, open_database
from app.idempotency import IdempotencyKeys
from app.metrics import Metrics
from app.rate_limits import RateLimiter
from app.tenants import Tenants
from tests.adapter_files import config_bytes, plain_tensors, safetensors_bytes, tiny_base
from tests.api.fakes import VOCAB_SIZE, ByteText, ScriptedEngine

ADMIN_KEY = "admin-key-for-tests"
MAX_CONTEXT = 512


@dataclass
class Serving:
    """A running server and what is behind it."""

    url: str
    app: FastAPI
    services: Services
    engine: ScriptedEngine
    keys: dict[str, str]  # by tenant, and "service"

    @property
    def base(self) -> str:
        return self.services.base.id

    def client(self, tenant: str = "acme") -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=10)

    def openai(self, tenant: str = "acme", **options: Any) -> OpenAI:
        options.setdefault("max_retries", 0)
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[tenant], timeout=10, **options)

    def publish(self, tenant: str, name: str, *, seed: int = 0, alias: str | None = "live") -> AdapterManifest:
        """Publish a small adapter; another `seed` makes other bytes and so another digest."""
        path = self.services.scratch / f"weights-{time.monotonic_ns()}.safetensors"
        path.write_bytes(weights_bytes(seed))
        return self.services.catalog.publish(tenant, name, config_bytes(), path, alias=alias, source="upload")

    def wait_idle(self, timeout_s: float = 5.0) -> None:
        """Wait until no request is left in the engine nor in the API."""
        until = time.monotonic() + timeout_s
        client = self.app.state.context.client
        while self.engine.num_live or client.num_open:
            assert time.monotonic() < until, "requests are left over"
            time.sleep(0.005)


def weights_bytes(seed: int = 0) -> bytes:
    return safetensors_bytes(plain_tensors(seed=seed))


def build_services(directory: Path, engine: ScriptedEngine, **changes: Any) -> tuple[Services, dict[str, str]]:
    database = open_database(f"sqlite:///{directory / 'lodger.db'}")
    migrate(database)
    tenants = Tenants(database)
    keys: dict[str, str] = {}
    for tenant in ("acme", "globex"):
        tenants.create(tenant)
        keys[tenant] = tenants.create_key(tenant).text
    keys["service"] = tenants.create_service_key(["acme"]).text
    keys["admin"] = ADMIN_KEY
    scratch = directory / "scratch"
    scratch.mkdir()
    base, door = tiny_base(), DoorLimits()
    limits = ApiLimits(max_context=MAX_CONTEXT, vocab_size=VOCAB_SIZE, default_max_tokens=64)
    services = Services(
        engine=engine,
        text=ByteText(),
        catalog=AdapterCatalog(DirectoryStore(directory / "store"), base, door, check=check_adapter, scratch=scratch),
        tenants=tenants,
        rates=RateLimiter(),
        idempotency=IdempotencyKeys(database),
        check_adapter=lambda config, weights: check_adapter(config, weights, base, door),
        base=base,
        limits=replace(limits, **changes.pop("limits", {})),
        metrics=Metrics(model_name=base.id, snapshot=engine.snapshot),
        snapshot=engine.snapshot,
        scratch=scratch,
        started_at=1_700_000_000,
        admin_key=ADMIN_KEY,
    )
    return replace(services, **changes), keys


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@contextlib.contextmanager
def serve(directory: Path, *, admin: bool = False, script: str = "hello world", **changes: Any) -> Iterator[Serving]:
    engine = ScriptedEngine(script)
    try:
        services, keys = build_services(directory, engine, **changes)
        app = create_admin_app(services) if admin else create_app(services)
        with running(app) as url:
            yield Serving(url, app, services, engine, keys)
    finally:
        engine.stop()


def sse_events(text: str) -> list[Any]:
    """The data of each event, JSON parsed; `[DONE]` stays text. Comments are left out."""
    events: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            events.append(data if data == "[DONE]" else json.loads(data))
    return events
