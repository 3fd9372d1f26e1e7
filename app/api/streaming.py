"""Answers over time: server-sent events, keep-alive comments, and what happens when the client leaves.

A chunk is a string formatted around one `json` string of new text: the parts that do not change are serialised once.
A step's news of all choices leaves in one write.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii as quote
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.errors import answer_for
from app.api.generation import Choice, Generation
from app.api.middleware import RequestFacts

SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class ChunkFormat(Protocol):
    """How one route writes its chunks."""

    def opening(self, choice: Choice) -> str:
        """What comes before a choice's first text; may be empty."""

    def text(self, choice: Choice, text: str, logprobs: str) -> str:
        """A chunk of new text; `logprobs` is JSON."""

    def logprobs(self, choice: Choice) -> str:
        """The log-probabilities not yet sent, as JSON; `null` where none were asked for."""

    def closing(self, choice: Choice) -> str:
        """The chunk with the finish reason."""

    def usage(self, usage: Mapping[str, object]) -> str:
        """The last chunk, without choices."""


class JsonPieces:
    """A chunk's unchanging head and tail around what changes."""

    def __init__(self, head: Mapping[str, object], *, nulls_usage: bool) -> None:
        self.head = "data: " + json.dumps(head, separators=(",", ":"))[:-1] + ',"choices":['
        self.tail = '],"usage":null}\n\n' if nulls_usage else "]}\n\n"

    def chunk(self, choice: str) -> str:
        return self.head + choice + self.tail

    def usage(self, usage: Mapping[str, object]) -> str:
        return f'{self.head}],"usage":{json.dumps(usage)}}}\n\n'


class DisconnectWatch:
    """Calls back once when the client leaves. Starts when the request's body has been read."""

    def __init__(self, receive: Receive, on_disconnect: Callable[[], None]) -> None:
        self.has_left = False
        self._on_disconnect = on_disconnect
        self._task = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        self._on_disconnect()

    def stop(self) -> None:
        self._task.cancel()


class EventStream(Response):
    """The ASGI response of a streamed generation that has been admitted."""

    def __init__(
        self,
        generation: Generation,
        chunks: ChunkFormat,
        watch: DisconnectWatch,
        facts: RequestFacts,
        *,
        headers: Mapping[str, str],
        include_usage: bool,
        keep_alive_s: float,
        on_end: Callable[[], None],
    ) -> None:
        self._on_end = on_end
        self._generation = generation
        self._chunks = chunks
        self._watch = watch
        self._facts = facts
        self.status_code = 200
        self.background = None
        self.raw_headers = [*SSE_HEADERS, *((k.encode(), v.encode()) for k, v in headers.items())]
        self._include_usage = include_usage
        self._keep_alive_s = keep_alive_s
        self._keep_alive_due = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        self._timer = loop.call_later(self._keep_alive_s, self._tick)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._write("".join(map(self._chunks.opening, self._generation.choices)).encode(), send)
            await self._run(send)
        finally:
            self._timer.cancel()
            self._on_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, send: Send) -> None:
        """Write what is new until every choice has ended; the end is always told, as [DONE] or as an error."""
        generation = self._generation
        closed: set[int] = set()
        while True:
            await generation.changed()
            if self._watch.has_left:
                self._facts.client_left()
                return
            news = "".join(self._news(choice, closed) for choice in generation.choices if choice.index not in closed)
            failed = next((choice.error for choice in generation.choices if choice.error is not None), None)
            if failed is not None:
                generation.cancel()
                answer = answer_for(failed)
                self._facts.stream_failed(answer, failed)
                await self._write(f"{news}data: {json.dumps(answer.envelope)}\n\n".encode(), send)
                return
            if len(closed) == len(generation.choices):
                last = self._chunks.usage(generation.usage().to_json()) if self._include_usage else ""
                await self._write((news + last).encode() + DONE, send)
                return
            if news:
                await self._write(news.encode(), send)
            elif self._keep_alive_due:
                await self._write(KEEP_ALIVE, send)
            self._keep_alive_due = False

    def _news(self, choice: Choice, closed: set[int]) -> str:
        text = choice.text[choice.sent_chars :]
        news = ""
        if text or (choice.is_over and len(choice.tokens) > choice.sent_tokens):
            news = self._chunks.text(choice, quote(text), self._chunks.logprobs(choice))
            choice.sent_chars = len(choice.text)
        if choice.finish_reason is not None:
            closed.add(choice.index)
            news += self._chunks.closing(choice)
        return news

    async def _write(self, body: bytes, send: Send) -> None:
        if body:
            self._sent_at = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": body, "more_body": True})

    def _tick(self) -> None:
        """One timer for the whole stream: re-armed by how long ago something was sent."""
        loop = asyncio.get_running_loop()
        silent_s = loop.time() - self._sent_at
        if silent_s >= self._keep_alive_s:
            self._keep_alive_due = True
            self._generation.wake()
            silent_s = 0.0
        self._timer = loop.call_later(self._keep_alive_s - silent_s, self._tick)
