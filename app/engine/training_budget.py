"""How much training may stand between two steps of serving. No torch and no clock: seconds come from the caller.

Between two tokens of a running request lie the training after one step and the next step itself. Steps differ: one that
takes a prompt in lasts longer than one that only decodes. So the budget fills the gaps before decodes, up to
`latency_factor` times what one step in twenty takes: the 95th percentile of inter-token latency grows by about that
factor, and the quick steps pay for the training rather than the slow ones. `share` bounds what it costs in
throughput and in the median.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

STEPS = 256  # remembered: half a minute on a CPU, seconds on a GPU
QUANTA = 4  # remembered: the next one is expected to take as long as the longest of them
# Where no quantum fits, so many steps earn one anyway: training goes on, and the 95th percentile does not see it.
STEPS_PER_LATE_QUANTUM = 32


class TrainingBudget:
    """Decides from how long serving steps and training quanta took lately. Engine thread only."""

    def __init__(self, latency_factor: float, share: float) -> None:
        self._factor = latency_factor
        self.share = share  # of the time while requests run, at most this much is training's
        self._steps: deque[tuple[float, float]] = deque(maxlen=STEPS)  # seconds, weight
        self._quanta: deque[float] = deque(maxlen=QUANTA)
        self._decode_s = 0.0
        self._slow_s = 0.0
        self._spent_s = 0.0  # since the last step
        self._owed_s = 0.0  # of the share: what gaps too short for a quantum leave to later ones
        self._is_refused = False  # in this gap
        self._steps_refused = 0  # in a row

    @property
    def is_spent(self) -> bool:
        """True when training stood in the gap before the step that comes now."""
        return self._spent_s > 0

    def stepped(self, seconds: float, *, num_decodes: int, has_prefill: bool) -> None:
        """A step of serving took so long and ended a gap of so many sequences; the next gap begins."""
        # Training made the gap longer, so fewer decodes stand between two prompts than there would be without it: each
        # counts for as many as would have fitted, or p95 would be that of the slower server it makes.
        stretch = 1 + self._spent_s / seconds if seconds else 1.0
        self._steps.append((seconds, num_decodes * stretch))
        self._slow_s = _percentile_95(self._steps)
        if not has_prefill:
            self._decode_s = seconds if not self._decode_s else 0.8 * self._decode_s + 0.2 * seconds
        self._steps_refused = self._steps_refused + 1 if self._is_refused and not self.is_spent else 0
        self._owe(seconds * self.share / (1 - self.share))
        self._spent_s, self._is_refused = 0.0, False

    def trained(self, seconds: float, *, is_idle: bool = False) -> None:
        """A quantum took so long. `is_idle`: nobody was served meanwhile, so no gap grew and no share was used."""
        self._quanta.append(seconds)
        if not is_idle:
            self._spent_s += seconds
            self._owe(-seconds)

    def allows(self, *, prompt_waits: bool) -> bool:
        """True when one more quantum and then a decode fit into this gap. Who waits for a first token goes first."""
        is_late = self._steps_refused >= STEPS_PER_LATE_QUANTUM and not self.is_spent
        allowed = is_late or (not prompt_waits and self._fits())
        self._is_refused |= not allowed
        return allowed

    def _owe(self, seconds: float) -> None:
        """Within a slow step and a quantum either way: a long wait earns no long stretch."""
        most = self._slow_s + max(self._quanta, default=0.0)
        self._owed_s = min(max(self._owed_s + seconds, -most), most)

    def _fits(self) -> bool:
        quantum_s = max(self._quanta, default=0.0)
        gap_s = self._spent_s + quantum_s + self._decode_s
        return quantum_s <= self._owed_s and gap_s <= self._factor * self._slow_s


def _percentile_95(steps: Iterable[tuple[float, float]]) -> float:
    """Of seconds by weight: one in twenty takes at least so long."""
    slowest_first = sorted(steps, reverse=True)
    left = sum(weight for _, weight in slowest_first) / 20
    for seconds, weight in slowest_first:
        left -= weight
        if left < 0:
            return seconds
    return slowest_first[0][0]  # nobody decoded yet
