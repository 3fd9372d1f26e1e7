"""The engine with a training job beside it, as the co-serving measurement drives it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from app.bench.coserving import Window
from app.bench.endless_training import EndlessTraining
from app.bench.engine_system import EngineSystem
from app.bench.tenancy import Tenancy
from app.bench.workload import Extra, Job, WorkloadSpec
from app.training_side import MICRO_BATCH_TOKENS

IDLE_SHARE = 0.5  # any: an idle engine's training uses no share


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
        began = self._mark(IDLE_SHARE)
        time.sleep(seconds)
        ended = self._mark(0.0)
        return (ended[1] - began[1]) / (ended[0] - began[0])

    def serve(
        self, jobs: Sequence[Job], concurrency: int, arrivals: Sequence[Extra], share: float, seconds: float
    ) -> Window:
        """Answer what comes by the arrivals' times; without any, a closed loop of jobs for so many seconds. `share`: of
        the time, for training at most; 0 is without."""
        marks: list[tuple[float, float]] = []
        at_the_end = threading.Timer(seconds, lambda: marks.append(self._mark()))
        began = self._mark(share)
        at_the_end.start()
        try:
            trace = self._drive(iter(()), 0, arrivals) if arrivals else self.window(jobs, concurrency, seconds, ())
        finally:
            at_the_end.join()
            self._mark(0.0)
        (ended,) = marks
        return Window(trace, (ended[1] - began[1]) / (ended[0] - began[0]))

    def _mark(self, share: float | None = None) -> tuple[float, float]:
        """The time, and the tokens trained until now, read between two steps; may set training's share there."""

        def turn() -> tuple[float, float]:
            if share is not None:
                self._training.is_on = share > 0
            if share:
                self.engine.training_budget.share = share
            return time.monotonic(), self._training.num_tokens

        return self.engine.call(turn).result()
