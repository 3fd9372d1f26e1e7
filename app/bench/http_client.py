"""The client of the HTTP mode: streams in a process of its own. Imports little: it shares the machine with the server.

It writes down when each piece of an answer came, and looks into the pieces only once the answer is whole.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from app.bench.figures import RequestTrace, RoundTrace
from app.bench.workload import ADAPTER_NAME, BenchFailed, Job

REQUEST_TIMEOUT_S = 3600.0


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


def make_client(url: str, base_id: str, keys: Mapping[str, str], stream: bool) -> HttpClient:
    return HttpClient(url, base_id, keys, stream=stream)
