"""Tells a run that went astray from one that has a hard batch. Plain numbers; what it remembers lies in `Progress`."""

from __future__ import annotations

import math

from app.training.progress import Progress

NUM_FIRST = 10  # steps whose losses say what is normal
NUM_HIGH = 3  # steps in a row that must be far above it


def has_diverged(progress: Progress, loss: float, grad_norm: float, *, vocab_size: int) -> bool:
    """Judge a step and remember it.

    A loss or gradient that is not finite is the end at once. A spike is a loss above twice the highest of the first
    steps and above that of guessing (ln V), three steps in a row: single examples may be as hard as they like.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return True
    if len(progress.first_losses) < NUM_FIRST:
        progress.first_losses.append(loss)
        return False
    is_high = loss > max(2 * max(progress.first_losses), math.log(vocab_size))
    progress.num_high = progress.num_high + 1 if is_high else 0
    return progress.num_high >= NUM_HIGH
