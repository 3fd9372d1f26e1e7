"""How far a job is, in plain values: what a durable state holds besides tensors. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Progress:
    """How far a job is, in plain values. Mutable while it runs."""

    step: int = 0  # optimizer steps done; also the cursor of the data
    settled_step: int = 0  # the last step whose measuring and reporting is done
    trained_tokens: int = 0  # label tokens of all steps run
    total_tokens: int = 0
    micro_batch_tokens: int = 0
    pending: dict[str, float] = field(default_factory=dict)  # metrics of `step` that are not reported yet
    first_losses: list[float] = field(default_factory=list)  # of the first steps: what the watchdog compares with
    num_high: int = 0  # steps in a row whose loss was far above those
    num_rollbacks: int = 0
    base_loss: float | None = None  # held-out, where the adapter began; None until measured
    base_accuracy: float | None = None
    best_loss: float | None = None  # held-out
    best_step: int | None = None
    epochs_without_better: int = 0
    is_stopped_early: bool = False

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Progress:
        """Raises TypeError for a body of another version."""
        return cls(**body)
