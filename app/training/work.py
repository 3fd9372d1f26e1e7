"""What a job's generator asks of whoever drives it, and what may interrupt it. The generator itself never blocks.

A job is written as one flat generator. It yields `Compute` for a micro-step and gets its `PartResult`, `Wait` for
something that runs in another thread and gets that one's result. So the driver can put several jobs' micro-steps into
one forward, let others go first, and stop a job at any border between two micro-steps.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from app.training.adapter import TrainedAdapter
from app.training.examples import Examples
from app.training.micro_step import Part

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Compute:
    """One micro-step of one job; answered with its `PartResult`."""

    part: Part
    train: bool  # False only measures

    @property
    def num_rows(self) -> int:
        return len(self.part.sequences)

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(len(sequence.ids) for sequence in self.part.sequences)


@dataclass(frozen=True, slots=True)
class Wait:
    """Something under way elsewhere; answered with its result, or its exception is raised."""

    future: Future[Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A piece of work is done and the next would follow: others may go first. Answered with None."""


Work = Compute | Wait | Turn
Steps = Generator[Work, Any, T]


class Interrupted(Exception):
    """Thrown into a job at a border between micro-steps; gradients that were being summed up are dropped."""


class PauseWanted(Interrupted):
    """The tenant paused the job: write a durable state, then say so."""


class ReturnWanted(Interrupted):
    """The process ends, or another tenant waits: write a durable state and give the job back."""


class OutOfMemory(Interrupted):
    """The micro-step did not fit: try again with smaller ones."""


class Spoiled(Exception):
    """A micro-step that the job shared failed, and nobody knows by whose fault: make the step again, alone."""


def wait(future: Future[T]) -> Steps[T]:
    """`x = yield from wait(future)`."""
    result: T = yield Wait(future)
    return result


def part_of(
    adapter: TrainedAdapter,
    examples: Examples,
    positions: Sequence[int],
    *,
    weight: float,
    step: int = 0,
    beta: float | None = None,
    reference: TrainedAdapter | None = None,
) -> Part:
    """The examples at `positions` as one micro-step; `step` and position name each row for its dropout mask."""
    sequences, keys = [], []
    for position in positions:
        for number, sequence in enumerate(examples[position]):
            sequences.append(sequence)
            keys.append(f"{step}/{position}/{number}")
    return Part(adapter, sequences, weight, tuple(keys), beta, reference)
