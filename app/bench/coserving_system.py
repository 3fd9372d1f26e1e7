"""The engine with a training job beside it, as the co-serving measurement drives it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from app.bench.coserving import Window
from app.bench.endless_training import EndlessTraining
from app.bench.engine_system import EngineSystem
from app.bench.tenancy import Tenancy
from app.bench.workload import Extra, Job, WorkloadSpec
from app.training_side import MICRO_BATCH_TOKENS


class CoservingSystem(EngineSystem):
    """The engine with a training job beside it."""

    def __init__(self, tenancy: Tenancy, spec: WorkloadSpec) -> None:
        super().__init__(tenancy)
        tokens = MICRO_BATCH_TOKENS[self.base.device.type]
        self._training = self.engine.call(lambda: EndlessTraining(self.base, spec, micro_batch_tokens=tokens)).result()
        self.engine.trainer = self._training

    def train_alone(self, seconds: float) -> float:
        """Tokens a second of a bare loop over the quanta, no engine between them."""

        def loop() -> float:
            before, began = self._training.num_tokens, time.monotonic()
            while time.monotonic() - began < seconds:
                self._training.quantum()
            return (self._training.num_tokens - before) / (time.monotonic() - began)

        return float(self.engine.call(loop).result())

    def train_idle(self, seconds: float) -> float:
        """Tokens a second of the engine that serves nobody."""
        before, began = self._switch(True), time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        return (self._switch(False) - before) / took

    def serve(
        self, jobs: Sequence[Job], concurrency: int, arrivals: Sequence[Extra], is_training: bool, seconds: float
    ) -> Window:
        """Answer what comes by the arrivals' times; without any, a closed loop of jobs for so many seconds."""
        before = self._switch(is_training)
        try:
            trace = self._drive(iter(()), 0, arrivals) if arrivals else self.window(jobs, concurrency, seconds, ())
        finally:
            after = self._switch(False)
        return Window(trace, after - before)

    def _switch(self, is_on: bool) -> int:
        """Turn training on or off between two steps; returns the tokens trained until now."""

        def turn() -> int:
            self._training.is_on = is_on
            return self._training.num_tokens

        return int(self.engine.call(turn).result())
