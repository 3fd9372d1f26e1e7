"""Small real implementations of the API's ports: an engine that emits scripted tokens in a thread, a byte tokenizer.

No model: a sequence's tokens are the bytes of a script, so that tests know every character of an answer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from adapters.manifest import AdapterManifest
from app.engine.sequence import (
    Admitted,
    Event,
    Finished,
    FinishReason,
    Request,
    Timings,
    Token,
    TokenLogprob,
    Warmed,
)
from app.errors import QueueFull, RequestInvalid
from app.metrics import ResidentAdapter, ServingSnapshot

EOS = 256
VOCAB_SIZE = 257


class ByteText:
    """Token = byte; 256 ends a sequence. Chat renders as `role: content` lines."""

    eos_ids = frozenset({EOS})
    digest = "byte-text"

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if any(message["role"] == "developer" for message in messages[1:]):
            raise RequestInvalid("A developer message comes first.", param="messages")
        lines = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.encode(lines + "assistant: ")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token != EOS).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == EOS else bytes([token])

    def token_text(self, token: int) -> str:
        data = self.token_bytes(token)
        return data.decode() if data.isascii() else f"bytes:\\x{token:02x}"

    def stream(self, prompt: Sequence[int]) -> ByteStream:
        return ByteStream()


class ByteStream:
    """Holds bytes back until they are whole characters."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, token: int) -> str:
        if token == EOS:
            return ""
        self._held += bytes([token])
        try:
            text = self._held.decode()
        except UnicodeDecodeError:
            return ""
        self._held = b""
        return text

    def flush(self) -> str:
        text, self._held = self._held.decode(errors="replace"), b""
        return text


@dataclass
class _Running:
    request: Request
    sink: Callable[[list[Event]], None]
    script: list[int]
    admitted_at: float | None = None
    first_token_at: float | None = None
    generated: list[int] = field(default_factory=list)


class ScriptedEngine:
    """Answers every request with its script, one token a step; runs in a thread of its own, like the real one."""

    def __init__(self, script: str = "hello world", *, step_s: float = 0.0005, max_waiting: int = 64) -> None:
        self.scripts: dict[str, str] = {}  # by adapter label, "" for the base
        self.default_script = script
        self.step_s = step_s
        self.max_waiting = max_waiting
        self.held = threading.Event()  # set: nothing is admitted
        self.errors: dict[str, Exception] = {}  # by adapter label: ends after the third token
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.warmed: dict[tuple[str, str], ResidentAdapter] = {}
        self.is_draining = False
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[str, _Running] = {}
        self._num_queued = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="scripted-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Callable[[list[Event]], None]) -> None:
        if self._num_queued + len(self._live) >= self.max_waiting:
            raise QueueFull()
        self._num_queued += 1
        self.requests.append(request)
        self._inbox.put(lambda: self._start(request, sink))

    def cancel(self, request_id: str) -> None:
        self._inbox.put(lambda: self._cancel(request_id))

    def warm(self, manifest: AdapterManifest, *, pin: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        key = (manifest.tenant, manifest.digest)
        tier = "pool" if key in self.warmed else "disk"
        held = ResidentAdapter(manifest.tenant, manifest.digest, manifest.name, manifest.rank, 0, pin)
        self.warmed = {**self.warmed, key: held}
        future.set_result(Warmed(tier, is_resident=True, is_pinned=pin))
        return future

    def unpin(self, key: tuple[str, str]) -> Future[Any]:
        future: Future[Any] = Future()
        if key in self.warmed:
            held = self.warmed[key]
            unpinned = ResidentAdapter(held.tenant, held.digest, held.name, held.rank, 0, False)
            self.warmed = {**self.warmed, key: unpinned}
        future.set_result(None)
        return future

    def unload(self, key: tuple[str, str]) -> Future[Any]:
        future: Future[Any] = Future()
        self.warmed = {other: held for other, held in self.warmed.items() if other != key}
        future.set_result(True)
        return future

    def snapshot(self) -> ServingSnapshot:
        return ServingSnapshot(
            num_waiting=self._num_queued,
            num_running=len(self._live),
            resident=tuple(self.warmed.values()),
            is_draining=self.is_draining,
        )

    @property
    def num_live(self) -> int:
        return self._num_queued + len(self._live)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(5)

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self._absorb()
            if self._live and not self.held.is_set():
                self._step()
            time.sleep(self.step_s)

    def _absorb(self) -> None:
        try:
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _start(self, request: Request, sink: Callable[[list[Event]], None]) -> None:
        self._num_queued -= 1
        label = "" if request.adapter is None else request.adapter.label
        script = [*self.scripts.get(label, self.default_script).encode(), EOS]
        self._live[request.id] = _Running(request, sink, script)

    def _cancel(self, request_id: str) -> None:
        running = self._live.pop(request_id, None)
        if running is not None:
            self.cancelled.append(request_id)
            running.sink([self._finished(running, FinishReason.CANCELLED)])

    def _step(self) -> None:
        events: dict[Callable[[list[Event]], None], list[Event]] = {}
        for running in list(self._live.values()):
            out = events.setdefault(running.sink, [])
            if running.admitted_at is None:
                running.admitted_at = time.monotonic()
                out.append(Admitted(running.request.id, cached_tokens=min(2, len(running.request.prompt) - 1)))
            out.extend(self._advance(running))
        for sink, batch in events.items():
            sink(batch)

    def _advance(self, running: _Running) -> list[Event]:
        request, now = running.request, time.monotonic()
        if now > request.deadline:
            return [self._end(running, FinishReason.DEADLINE)]
        label = "" if request.adapter is None else request.adapter.label
        if label in self.errors and len(running.generated) == 3:
            return [self._end(running, FinishReason.ERROR, self.errors[label])]
        token = running.script[len(running.generated) % len(running.script)]
        running.first_token_at = running.first_token_at or now
        first = not running.generated
        running.generated.append(token)
        event = Token(
            request.id,
            token,
            logprob=_logprob(token, request.sampling.logprobs),
            prompt_logprobs=_prompt_logprobs(request) if first else None,
        )
        is_end = token in request.sampling.stop_ids or (token in request.eos_ids and not request.sampling.ignore_eos)
        if is_end:
            return [event, self._end(running, FinishReason.STOP)]
        if len(running.generated) >= request.sampling.max_tokens:
            return [event, self._end(running, FinishReason.LENGTH)]
        return [event]

    def _end(self, running: _Running, reason: FinishReason, error: Exception | None = None) -> Finished:
        del self._live[running.request.id]
        return self._finished(running, reason, error)

    def _finished(self, running: _Running, reason: FinishReason, error: Exception | None = None) -> Finished:
        request = running.request
        timings = Timings(
            arrival=request.arrival,
            admitted=running.admitted_at,
            first_token=running.first_token_at,
            finished=time.monotonic(),
            prompt_tokens=len(request.prompt),
            generated_tokens=len(running.generated),
            cached_tokens=0,
            tier=None if request.adapter is None else "host",
        )
        return Finished(request.id, reason, error, timings)


def _logprob(token: int, wanted: int | None) -> TokenLogprob | None:
    if wanted is None:
        return None
    top = tuple(((token + i) % VOCAB_SIZE, -0.5 - i) for i in range(wanted))
    return TokenLogprob(token, -0.5, top)


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob | None, ...] | None:
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return None
    return (None, *(TokenLogprob(token, -1.0, ((token, -1.0),) * min(wanted, 1)) for token in request.prompt[1:]))
