"""Which examples make up an optimizer step, and how a step is cut into micro-batches. No torch; pure, any thread.

Everything follows from (seed, step) alone: the data cursor of a job is its step number, and a run that is continued
sees what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.training.examples import Examples

Numbers = npt.NDArray[np.int64]
GROUP_BATCHES = 16  # batches whose examples are sorted together: wide enough to match lengths, narrow enough to mix


class BatchOrder:
    """The order of examples, epoch by epoch: shuffled, batches of like length, batches in random order."""

    def __init__(self, lengths: Numbers, *, batch_size: int, seed: int) -> None:
        """lengths `[n]`: tokens of each example. An epoch's last batch may be smaller; every example is in one."""
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch = -1
        self._batches: list[Numbers] = []

    def batch(self, step: int) -> Numbers:
        """Positions of the examples of optimizer step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[within]

    def _shuffled(self, epoch: int) -> list[Numbers]:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths)).astype(np.int64)
        group = self._batch_size * GROUP_BATCHES
        batches: list[Numbers] = []
        for start in range(0, len(order), group):
            members = order[start : start + group]
            members = members[np.argsort(self._lengths[members], kind="stable")]
            batches += [members[at : at + self._batch_size] for at in range(0, len(members), self._batch_size)]
        return [batches[place] for place in random.permutation(len(batches))]


@dataclass(frozen=True, slots=True)
class ExampleSizes:
    """What batching needs to know of each example, taken from the table once."""

    tokens: Numbers  # [n] of all its sequences
    labels: Numbers  # [n] label tokens
    widths: Numbers  # [n] tokens of its longest sequence
    num_rows: int  # sequences of each example

    @classmethod
    def of(cls, examples: Examples) -> ExampleSizes:
        group = examples.table.group
        lengths = np.diff(examples.table.offsets).reshape(-1, group)[examples.index]
        widths = lengths.max(axis=1) if len(lengths) else np.empty(0, np.int64)
        return cls(examples.num_tokens, examples.num_labels, np.asarray(widths, np.int64), group)

    def __len__(self) -> int:
        return len(self.tokens)


def micro_batches(positions: Sequence[int] | Numbers, sizes: ExampleSizes, *, max_tokens: int) -> list[list[int]]:
    """Cut a step into parts of at most `max_tokens` tokens, padding counted; an example that is longer goes alone.

    Longest first, so that rows of one part are of like length.
    """
    order = sorted((int(position) for position in positions), key=lambda p: (-int(sizes.widths[p]), p))
    parts: list[list[int]] = []
    for position in order:
        width = int(sizes.widths[parts[-1][0]]) if parts else 0
        if parts and width * (len(parts[-1]) + 1) * sizes.num_rows <= max_tokens:
            parts[-1].append(position)
        else:
            parts.append([position])
    return parts


def in_length_order(sizes: ExampleSizes, *, max_tokens: int) -> list[list[int]]:
    """All examples in micro-batches, for measuring."""
    return micro_batches(np.arange(len(sizes), dtype=np.int64), sizes, max_tokens=max_tokens)
