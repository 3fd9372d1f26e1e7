"""One HTTP request's sequences: submits them, turns their events into text and log-probabilities, counts usage.

Everything here runs in the event loop's thread. Events are taken in as they are dealt (`Choice.receive`), so a step
wakes a request's task once, however many of its choices it fed.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapters.manifest import AdapterManifest
from app.api.engine_client import EngineClient
from app.api.services import TextPort
from app.engine.sequence import (
    Admitted,
    Event,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    Timings,
    Token,
    TokenLogprob,
)
from app.errors import DeadlineExceeded, InternalError, ServerDraining
from app.text import StopStrings

FINISH_LABELS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.DEADLINE: "deadline",
    FinishReason.ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token's log-probability and where its text begins in the answer (characters, the echo included)."""

    logprob: TokenLogprob | None  # None: the first prompt token, which nothing precedes
    token: int
    offset: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate, resolved and checked; the parts that all sequences of a request share."""

    tenant: str
    adapter: AdapterManifest | None
    model: str  # what the answer says made it; can be asked for again
    sampling: SamplingParams
    stops: tuple[str, ...]
    deadline: float  # time.monotonic()
    echo: bool = False
    is_shared: bool = False  # the adapter's owner lets this tenant use it
    hides_tokens: bool = False  # max_tokens 0: only the echo is wanted, the one token that scoring needs is not shown


class Choice:
    """One sequence of the answer: its text so far, and what of it is not yet sent."""

    def __init__(self, generation: Generation, index: int, request: Request, text: TextPort, plan: Plan) -> None:
        self.index = index
        self.request = request
        self.text = ""  # shown so far; all of it at the end
        self.tokens: list[ShownToken] = []
        self.num_generated = 0
        self.num_cached = 0
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.is_over = False  # nothing more will be shown
        self.timings: Timings | None = None
        self.sent_chars = 0
        self.sent_tokens = 0
        self._generation = generation
        self._plan = plan
        self._stream = text.stream(request.prompt)
        self._stops = StopStrings(plan.stops) if plan.stops else None
        sampling = request.sampling
        self._hidden = sampling.stop_ids if sampling.ignore_eos else sampling.stop_ids | request.eos_ids
        self._wants_logprobs = sampling.logprobs is not None
        self._num_chars = 0  # of the text made so far, held-back text included
        if plan.echo:
            self._show_prompt(text)

    @property
    def finish_label(self) -> str:
        return self.finish_reason or ("error" if self.error else "abort")

    def receive(self, event: Event) -> None:
        if type(event) is Token:
            if not self.is_over:
                self._take_token(event)
        elif type(event) is Admitted:
            self.num_cached = event.cached_tokens
            self._generation.is_admitted = True
        else:
            assert type(event) is Finished
            self.timings = event.timings
            if not self.is_over:
                self._finish(event)
        self._generation.wake()

    def fail(self, error: Exception) -> None:
        if not self.is_over:
            self.error, self.is_over = error, True
        self._generation.wake()

    def _take_token(self, event: Token) -> None:
        if event.prompt_logprobs is not None and self._plan.echo and self._wants_logprobs:
            pairs = zip(self.tokens, event.prompt_logprobs, strict=True)
            self.tokens = [replace(shown, logprob=logprob) for shown, logprob in pairs]
        if self._plan.hides_tokens:
            return
        self.num_generated += 1
        token = event.token
        if token in self._hidden:
            return
        if self._wants_logprobs:
            self.tokens.append(ShownToken(event.logprob, token, self._num_chars))
        text = self._stream.feed(token)
        if text:
            self._show(text)

    def _show(self, text: str) -> None:
        self._num_chars += len(text)
        if self._stops is None:
            self.text += text
            return
        if self.num_generated < self.request.sampling.min_tokens:
            self.text += self._stops.flush() + text
            return
        shown, stopped = self._stops.push(text)
        self.text += shown
        if stopped:
            self._end("stop")
            self.tokens = [token for token in self.tokens if token.offset < len(self.text)]
            self._generation.cancel_choice(self)

    def _finish(self, event: Finished) -> None:
        if event.reason in (FinishReason.STOP, FinishReason.LENGTH):
            tail = self._stream.flush()
            if tail:
                self._show(tail)
            if self.is_over:
                return
            if self._stops is not None:
                self.text += self._stops.flush()
            self._end("length" if event.reason is FinishReason.LENGTH else "stop")
            return
        self.is_over = True
        if event.error is not None:
            self.error = event.error
        elif event.reason is FinishReason.DEADLINE:
            self.error = DeadlineExceeded()
        elif event.reason is FinishReason.ERROR:
            self.error = InternalError()
        elif not self._generation.is_cancelled:
            self.error = ServerDraining()

    def _end(self, reason: str) -> None:
        self.is_over = True
        self.finish_reason = reason

    def _show_prompt(self, text: TextPort) -> None:
        stream = text.stream(())
        for token in self.request.prompt:
            if self._wants_logprobs:
                self.tokens.append(ShownToken(None, token, len(self.text)))
            self.text += stream.feed(token)
        self.text += stream.flush()
        self._num_chars = len(self.text)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of an answer; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


class Generation:
    """All sequences of one HTTP request: `n` choices of each prompt, in that order."""

    def __init__(
        self,
        client: EngineClient,
        text: TextPort,
        plan: Plan,
        prompts: Sequence[Sequence[int]],
        n: int,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self.is_admitted = False
        self.is_cancelled = False
        self._client = client
        self._n = n
        self._is_dirty = False
        self._waiter: asyncio.Future[None] | None = None
        arrival = time.monotonic()
        self.choices: list[Choice] = []
        for prompt in prompts:
            for i in range(n):
                index = len(self.choices)
                seed = plan.sampling.seed  # the choices of a seeded request differ from each other, as every time
                sampling = plan.sampling if seed is None else replace(plan.sampling, seed=_choice_seed(seed, i))
                request = Request(
                    id=f"{self.id}-{index}",
                    tenant=plan.tenant,
                    prompt=tuple(prompt),
                    sampling=sampling,
                    adapter=plan.adapter,
                    arrival=arrival,
                    deadline=plan.deadline,
                    eos_ids=text.eos_ids,
                    is_shared=plan.is_shared,
                )
                self.choices.append(Choice(self, index, request, text, plan))

    def submit(self) -> None:
        """Queue every sequence or none: when the queue takes only some, those are cancelled and the error passes on."""
        try:
            for choice in self.choices:
                self._client.submit(choice.request, choice)
        except BaseException:
            self.cancel()
            raise

    def close(self) -> None:
        """The answer is over, however it ended: nothing may go on running for it."""
        if not self.is_over:
            self.cancel()

    def cancel(self) -> None:
        """End what still runs; idempotent."""
        self.is_cancelled = True
        for choice in self.choices:
            choice.is_over = True
            self._client.cancel(choice.request.id)
        self.wake()

    def fail(self, error: Exception) -> None:
        """End all choices with `error`, for a cause outside the engine."""
        for choice in self.choices:
            choice.fail(error)
            self._client.cancel(choice.request.id)

    def cancel_choice(self, choice: Choice) -> None:
        self._client.cancel(choice.request.id)

    def wake(self) -> None:
        self._is_dirty = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changed(self) -> None:
        """Wait for news since the last call; one task at a time."""
        if not self._is_dirty:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_dirty = False

    async def admitted(self) -> None:
        """Wait until the answer's status is known: a sequence runs or all ended. Raises what ended the first."""
        while not self.is_admitted and not self.is_over:
            await self.changed()
        self._is_dirty = True  # what came with the admission is news to whoever reads next
        if not self.is_admitted:
            self.raise_error()

    async def finished(self) -> None:
        """Wait for the end of every choice; the first error cancels the rest and is raised."""
        while not self.is_over:
            await self.changed()
            self.raise_error()
        self.raise_error()

    def raise_error(self) -> None:
        for choice in self.choices:
            if choice.error is not None:
                self.cancel()
                raise choice.error

    @property
    def is_over(self) -> bool:
        return all(choice.is_over for choice in self.choices)

    def usage(self) -> Usage:
        firsts = self.choices[:: self._n]
        return Usage(
            prompt_tokens=sum(len(choice.request.prompt) for choice in firsts),
            completion_tokens=sum(choice.num_generated for choice in self.choices),
            cached_tokens=sum(choice.num_cached for choice in firsts),
        )


def _choice_seed(seed: int, index: int) -> int:
    """A seed per choice: the first keeps the client's own, so `n=1` and `n=2` agree on it."""
    return seed if index == 0 else (seed + index * 0x9E3779B97F4A7C15) % (1 << 63)
