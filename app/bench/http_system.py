"""The real server in a process of its own on a free loopback port, and a client process that keeps it busy.

The client writes down when each chunk came and looks into chunks only after the round: both share the machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from app.bench.figures import ProcessFacts, RequestTrace, RoundTrace
from app.bench.machine import process_age_s, rss_bytes
from app.bench.process import Child
from app.bench.tenancy import ADAPTER_NAME, Tenancy
from app.bench.workload import BenchFailed, Job
from app.settings import Settings
from app.settings_sources import FIELDS, variable_of

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05
REQUEST_TIMEOUT_S = 3600.0
NOT_HANDED_ON = ("config", "host", "port", "admin_host", "admin_port", "admin_key", "log_level", "request_timeout_s")
LOG_TAIL_CHARS = 2000


class ServerProcess:
    """`lodger serve` as a user starts it, with the benchmark's settings. Ended by its process id."""

    def __init__(self, settings: Settings, log: Path) -> None:
        """Start it and wait until it is ready. Raises BenchFailed with the end of its log when it does not come up."""
        self._log = log
        environment = server_environment(settings, os.environ)
        started = time.monotonic()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            self.url = self._wait_for_url(started + START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.start_s = process_age_s(self._process.pid)

    @property
    def rss_bytes(self) -> int:
        return rss_bytes(self._process.pid)

    def close(self) -> None:
        """Ask it to end; kill it when it does not."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _wait_for_url(self, until: float) -> str:
        while True:
            for line in self._log.read_text("utf-8", "replace").splitlines():
                if '"ready"' in line:
                    fields = json.loads(line)
                    return f"http://{fields['host']}:{fields['port']}"
            if self._process.poll() is not None or time.monotonic() >= until:
                tail = self._log.read_text("utf-8", "replace")[-LOG_TAIL_CHARS:]
                raise BenchFailed(f"the server did not start (exit code {self._process.poll()})\n{tail}")
            time.sleep(POLL_S)


def server_environment(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without its LODGER_ variables, and every setting of ours as one. Listens on a free port."""
    result = {name: value for name, value in environment.items() if not name.upper().startswith("LODGER_")}
    for field in FIELDS:
        value = getattr(settings, field)
        if value is None or field in NOT_HANDED_ON:
            continue
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        # A byte size prints itself with a rounded unit.
        result[variable_of(field)] = str(int(value)) if isinstance(value, int) and not isinstance(value, bool) else text
    result |= {
        "LODGER_HOST": "127.0.0.1",
        "LODGER_PORT": "0",
        "LODGER_LOG_LEVEL": "info",
        "LODGER_REQUEST_TIMEOUT_S": str(REQUEST_TIMEOUT_S),
        "PYTHONUNBUFFERED": "1",
    }
    return result


class HttpClient:
    """Asks a server over HTTP; lives in a process of its own."""

    def __init__(self, url: str, base_id: str, keys: Mapping[str, str], *, stream: bool) -> None:
        self._url = url
        self._base_id = base_id
        self._keys = keys
        self._stream = stream

    def warm_up(self, jobs: Sequence[Job]) -> None:
        self.round(jobs, 1)

    def round(self, jobs: Sequence[Job], concurrency: int) -> RoundTrace:
        return asyncio.run(self._round(jobs, concurrency))

    def close(self) -> None:
        """Each round closes its own connections."""

    async def _round(self, jobs: Sequence[Job], concurrency: int) -> RoundTrace:
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        remaining = iter(jobs)
        traces: list[RequestTrace] = []
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=REQUEST_TIMEOUT_S) as client:

            async def stream() -> None:
                for job in remaining:
                    traces.append(await self._ask(client, job))

            began = time.monotonic()
            async with asyncio.TaskGroup() as streams:
                for _ in range(concurrency):
                    streams.create_task(stream())
            wall_s = time.monotonic() - began
        return RoundTrace(wall_s, tuple(sorted(traces, key=lambda trace: trace.asked_at)))

    async def _ask(self, client: httpx.AsyncClient, job: Job) -> RequestTrace:
        body: dict[str, Any] = {
            "model": self._base_id if job.adapter is None else ADAPTER_NAME,
            "prompt": list(job.prompt),
            "max_tokens": job.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"authorization": f"Bearer {self._keys[job.adapter or '']}"}
        asked_at = time.monotonic()
        pieces: list[tuple[float, bytes]] = []
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            async for piece in answer.aiter_raw():
                pieces.append((time.monotonic(), piece))
        whole = b"".join(piece for _, piece in pieces)
        if answer.status_code != 200:
            raise BenchFailed(f"the server answered {answer.status_code}: {whole.decode(errors='replace')[:500]}")
        if not self._stream:
            return _trace(job, asked_at, (), json.loads(whole)["usage"])
        usage = next(event["usage"] for event in reversed(list(sse_events(whole))) if event.get("usage"))
        return _trace(job, asked_at, news_times(pieces), usage)


def _trace(job: Job, asked_at: float, news_at: tuple[float, ...], usage: Mapping[str, int]) -> RequestTrace:
    if usage["completion_tokens"] != job.output_tokens:
        raise BenchFailed(f"the server made {usage['completion_tokens']} tokens instead of {job.output_tokens}")
    return RequestTrace(job.index, job.is_cold, asked_at, news_at, usage["completion_tokens"])


def news_times(pieces: Sequence[tuple[float, bytes]]) -> tuple[float, ...]:
    """When text came: each event counts at the time of the piece that completed it."""
    times: list[float] = []
    rest = b""
    for at, piece in pieces:
        *complete, rest = (rest + piece).split(b"\n\n")
        times.extend(at for event in complete if _has_text(event))
    return tuple(times)


def sse_events(whole: bytes) -> Iterator[dict[str, Any]]:
    """The JSON events of a finished stream. Raises BenchFailed for an error event."""
    for block in whole.split(b"\n\n"):
        if block.startswith(b"data: {"):
            event = json.loads(block.removeprefix(b"data: "))
            if "error" in event:
                raise BenchFailed(f"the stream ended with an error: {event['error'].get('message')}")
            yield event


def _has_text(event: bytes) -> bool:
    if not event.startswith(b"data: {"):
        return False
    choices = json.loads(event.removeprefix(b"data: ")).get("choices") or [{}]
    return bool(choices[0].get("text"))


class HttpSystem:
    """Server and client together, as a `System`. The server is started by this process and ended by it."""

    def __init__(self, tenancy: Tenancy, *, stream: bool, dtype: str, weights: str) -> None:
        settings = tenancy.settings
        self._threads, self._dtype, self._weights = settings.threads, dtype, weights
        self._server = ServerProcess(settings, tenancy.root / "server.log")
        try:
            self._client = Child(
                _make_client,
                self._server.url,
                settings.base_id,
                dict(tenancy.keys),
                stream,
                name="http client",
                start_timeout_s=START_TIMEOUT_S,
            )
        except BaseException:
            self._server.close()
            raise

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """As `Child.call`; facts are the server's."""
        if method == "facts":
            return ProcessFacts(self._server.start_s, self._server.rss_bytes, self._threads, self._dtype, self._weights)
        return self._client.call(method, *args, timeout_s=timeout_s)

    def close(self) -> None:
        self._client.close()
        self._server.close()


def _make_client(url: str, base_id: str, keys: Mapping[str, str], stream: bool) -> HttpClient:
    return HttpClient(url, base_id, keys, stream=stream)
