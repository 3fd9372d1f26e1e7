"""Whether a trained adapter may have its alias. Plain numbers in, a verdict with its reason out; no torch, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GateFacts:
    """What was measured; None was not. Losses are means over label tokens (supervised) or pairs (dpo)."""

    loss: float | None = None  # held-out, of the new adapter
    base_loss: float | None = None
    live_loss: float | None = None  # of the version that the alias points to now
    live_version: int | None = None
    regression_loss: float | None = None  # on the regression file
    regression_live_loss: float | None = None  # of the alias's version there, or of the base's where there is none
    train_loss_start: float | None = None
    train_loss_end: float | None = None
    eos_rate: float | None = None  # share of greedy answers to sample prompts that ended by themselves
    base_eos_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` says what held the alias back; None when nothing did."""

    passed: bool
    reason: str | None
    facts: GateFacts

    def to_dict(self) -> dict[str, Any]:
        """As stored with the job: what was measured and is finite, and the verdict."""
        measured = {
            name: value for name, value in asdict(self.facts).items() if value is not None and math.isfinite(value)
        }
        return {"passed": self.passed, "reason": self.reason, **measured}


def judge(facts: GateFacts, *, min_improvement: float, hold: bool = False) -> Verdict:
    """Pass an adapter that is measurably better than the base, not worse than what is live, and that ends its answers.

    Without a held-out set (few examples) the training loss must have fallen. `hold` publishes without the alias.
    """
    reason = _fault(facts, min_improvement)
    if reason is None and hold:
        reason = "'publish.gate.hold' asks for it"
    return Verdict(reason is None, reason, facts)


def _fault(facts: GateFacts, min_improvement: float) -> str | None:
    measured = (facts.loss, facts.regression_loss, facts.train_loss_end)
    if any(value is not None and not math.isfinite(value) for value in measured):
        return "a measured loss is not finite"
    if facts.loss is not None and facts.base_loss is not None:
        wanted = facts.base_loss * (1 - min_improvement)
        if facts.loss > wanted:
            below = f"{min_improvement:.1%} below the base's {facts.base_loss:.4f}"
            return f"the held-out loss {facts.loss:.4f} is not {below}"
        if facts.live_loss is not None and facts.loss > facts.live_loss:
            live = f"version {facts.live_version}, {facts.live_loss:.4f}"
            return f"the held-out loss {facts.loss:.4f} is above that of {live}"
    elif facts.train_loss_start is None or facts.train_loss_end is None:
        return "there is nothing that shows an improvement: no held-out examples, and one step only"
    elif facts.train_loss_end >= facts.train_loss_start:
        return f"the training loss did not fall ({facts.train_loss_start:.4f} to {facts.train_loss_end:.4f})"
    regression, before = facts.regression_loss, facts.regression_live_loss
    if regression is not None and before is not None and regression > before:
        return f"the loss on the regression file, {regression:.4f}, is above the {before:.4f} of what is live"
    if facts.eos_rate == 0 and facts.base_eos_rate:
        return "none of its answers to sample prompts ends by itself, and the base's do"
    return None


def start_and_end(losses: Sequence[float]) -> tuple[float | None, float | None]:
    """Means of the first and the last quarter of the steps; (None, None) for fewer than two steps."""
    if len(losses) < 2:
        return None, None
    quarter = max(1, len(losses) // 4)
    return sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
