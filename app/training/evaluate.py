"""Measuring an adapter: loss and accuracy on examples, and whether its answers come to an end. Changes nothing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from adapters.manifest import AdapterManifest
from app.engine.sequence import Event, Finished, FinishReason, Request, SamplingParams, Token
from app.errors import LodgerError
from app.training.adapter import TrainedAdapter
from app.training.batching import ExampleSizes, micro_batches
from app.training.examples import Examples
from app.training.micro_step import PartResult
from app.training.work import Compute, Steps, part_of

NUM_SAMPLES = 8
MAX_SAMPLE_TOKENS = 128
SAMPLE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over label tokens (supervised) or over pairs (dpo: accuracy is the share preferred rightly)."""

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Examples that only measure, and how they are measured."""

    examples: Examples
    sizes: ExampleSizes
    beta: float | None = None
    reference: TrainedAdapter | None = None

    @classmethod
    def of(cls, examples: Examples, *, beta: float | None, reference: TrainedAdapter | None) -> HeldOut:
        return cls(examples, ExampleSizes.of(examples), beta, reference)

    def __len__(self) -> int:
        return len(self.sizes)


def bare_base() -> TrainedAdapter:
    """What adds nothing."""
    return TrainedAdapter({}, 1.0)


def measure(
    adapter: TrainedAdapter, held_out: HeldOut, *, max_tokens: int, positions: Sequence[int] | None = None
) -> Steps[Measured]:
    """Loss and accuracy of `adapter` on all examples, or on those at `positions`."""
    wanted = range(len(held_out)) if positions is None else positions
    loss = correct = units = 0.0
    for batch in micro_batches(list(wanted), held_out.sizes, max_tokens=max_tokens):
        part = part_of(adapter, held_out.examples, batch, weight=1.0, beta=held_out.beta, reference=held_out.reference)
        result: PartResult = yield Compute(part, train=False)
        loss += result.loss
        correct += result.num_correct
        units += result.num_units
    return Measured(loss / units, correct / units) if units else Measured(math.nan, math.nan)


# ---- sample answers


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """One greedy answer. `ended`: by an end-of-sequence token; `failed`: the engine refused or found it not finite."""

    tokens: tuple[int, ...]
    ended: bool
    failed: bool = False


class Submitting(Protocol):
    """The engine's side that sampling needs."""

    def submit(self, request: Request, sink: Callable[[list[Event]], None]) -> None: ...


@dataclass(slots=True, eq=False)
class _Gathering:
    """A sink for the answers of one call; completes the future with the last of them. Engine thread, after start."""

    num_expected: int
    future: Future[list[SampledAnswer]]
    tokens: dict[str, list[int]] = field(default_factory=dict)
    done: dict[str, SampledAnswer] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Token(request_id=request_id, token=token):
                    self.tokens.setdefault(request_id, []).append(token)
                case Finished(request_id=request_id, reason=reason, error=error):
                    got = tuple(self.tokens.get(request_id, ()))
                    self.finish(request_id, SampledAnswer(got, reason is FinishReason.STOP, error is not None))

    def finish(self, request_id: str, answer: SampledAnswer) -> None:
        with self.lock:
            self.done[request_id] = answer
            complete = len(self.done) == self.num_expected
        if complete:
            self.future.set_result([self.done[key] for key in sorted(self.done)])


class GreedySampler:
    """Greedy answers through the engine, in the same batches as everybody else's. Any thread; returns at once."""

    def __init__(self, engine: Submitting, *, eos_ids: frozenset[int], max_context: int) -> None:
        self._engine, self._eos_ids, self._max_context = engine, eos_ids, max_context
        self._made = 0

    def start(
        self, tenant: str, adapter: AdapterManifest | None, prompts: Sequence[Sequence[int]], *, max_tokens: int
    ) -> Future[list[SampledAnswer]]:
        """One answer per prompt, in order. Never raises; what the engine refuses is a failed answer."""
        future: Future[list[SampledAnswer]] = Future()
        self._made += 1
        gathering = _Gathering(len(prompts), future)
        now = time.monotonic()
        for number, prompt in enumerate(prompts):
            request = Request(
                id=f"sample-{id(self):x}-{self._made}-{number:03d}",
                tenant=tenant,
                prompt=tuple(prompt),
                sampling=SamplingParams(temperature=0.0, max_tokens=min(max_tokens, self._max_context - len(prompt))),
                adapter=adapter,
                arrival=now,
                deadline=now + SAMPLE_TIMEOUT_S,
                eos_ids=self._eos_ids,
            )
            try:
                self._engine.submit(request, gathering)
            except LodgerError:
                gathering.finish(request.id, SampledAnswer((), False, failed=True))
        if not prompts:
            future.set_result([])
        return future


def sample_prompts(examples: Examples, *, max_context: int) -> tuple[list[list[int]], int]:
    """Prompts of a few examples spread over the set (all before the first label), and the tokens an answer may have:
    twice the longest true answer's, and some."""
    stride = max(1, len(examples) // NUM_SAMPLES)
    prompts, longest = [], 0
    for position in range(0, len(examples), stride)[:NUM_SAMPLES]:
        sequence = examples[position][0]
        first = int(sequence.labels.argmax())
        if first > 0 and first < max_context - 1:
            prompts.append(sequence.ids[:first].tolist())
            longest = max(longest, sequence.num_labels)
    return prompts, min(2 * longest + 16, MAX_SAMPLE_TOKENS)


def eos_rate(answers: Sequence[SampledAnswer]) -> float | None:
    """Share of answers that ended by themselves; None when the engine gave none."""
    given = [answer for answer in answers if not answer.failed]
    return sum(answer.ended for answer in given) / len(given) if given else None
