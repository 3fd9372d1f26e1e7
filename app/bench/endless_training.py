"""A training job that never ends, made of the trainer's own parts: layer-wise micro-steps and the optimizer.

It stands where the trainer stands in the engine, so the engine's own rule decides when a quantum runs. It leaves out
the queue, checkpoints and publishing, which other threads do. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from app.bench.workload import WorkloadSpec
from app.engine.base_model import BaseModel
from app.training.adapter import MasterPair, TrainedAdapter
from app.training.examples import TokenSequence
from app.training.micro_step import Part, micro_step
from app.training.optimizer import AdapterOptimizer, RateSchedule

EXAMPLE_TOKENS = 64
LEARNING_RATE = 1e-5  # the work is the same at any rate
TOTAL_STEPS = 1_000_000


class EndlessTraining:
    """A `TrainingStepper` with work while `is_on`. An optimizer step follows each micro-step."""

    def __init__(self, base: BaseModel, spec: WorkloadSpec, *, micro_batch_tokens: int) -> None:
        self.is_on = False
        self._num_tokens = 0  # of whole micro-steps
        self._quanta_done, self._quanta_per_step = 0, 0
        self._base = base
        self._adapter = _new_adapter(base, spec)
        rates = RateSchedule("constant", LEARNING_RATE, 0, TOTAL_STEPS)
        self._optimizer = AdapterOptimizer(self._adapter, rates, max_grad_norm=1.0)
        self._sequences = _random_examples(base, max(1, micro_batch_tokens // EXAMPLE_TOKENS), spec.seed)
        self._tokens_per_step = sum(len(sequence.ids) for sequence in self._sequences)
        self._quanta = self._run()

    @property
    def num_tokens(self) -> float:
        """Trained since the beginning; a micro-step under way counts by the share of its quanta that are done."""
        if not self._quanta_per_step:
            return 0.0
        return self._num_tokens + self._tokens_per_step * min(self._quanta_done / self._quanta_per_step, 1.0)

    def has_work(self) -> bool:
        return self.is_on

    def quantum(self) -> None:
        next(self._quanta)
        self._quanta_done += 1

    def leave(self) -> None:
        self.is_on = False

    def _run(self) -> Iterator[None]:
        labels = sum(sequence.num_labels for sequence in self._sequences)
        keys = tuple(str(i) for i in range(len(self._sequences)))
        for step in range(TOTAL_STEPS):
            yield from micro_step(self._base, [Part(self._adapter, self._sequences, 1 / labels, keys)])
            self._optimizer.step(step)
            self._num_tokens += self._tokens_per_step
            self._quanta_per_step, self._quanta_done = self._quanta_done + 1, -1  # this one is yet to be counted
            yield


def _new_adapter(base: BaseModel, spec: WorkloadSpec) -> TrainedAdapter:
    generator = torch.Generator().manual_seed(spec.seed)
    pairs = {}
    for index, path in enumerate(base.lora.paths):
        if path.rsplit(".", 1)[1] not in spec.targets:
            continue
        features_in, features_out = base.spec.linears[path]
        a = torch.randn(spec.rank, features_in, generator=generator) / features_in**0.5
        b = torch.zeros(features_out, spec.rank)
        pairs[index] = MasterPair(*(t.to(base.device).requires_grad_(True) for t in (a, b)))
    return TrainedAdapter(pairs, scaling=2.0)


def _random_examples(base: BaseModel, count: int, seed: int) -> Sequence[TokenSequence]:
    rng = np.random.default_rng(seed)
    labels = np.ones(EXAMPLE_TOKENS, dtype=np.bool_)
    labels[0] = False
    return [
        TokenSequence(rng.integers(0, base.shapes.vocab_size, EXAMPLE_TOKENS).astype(np.int32), labels)
        for _ in range(count)
    ]
