"""AdamW on an adapter's master weights: learning-rate schedule, clipping by the global norm, state as plain tensors.

The step sizes depend on the step's number alone, so a run that is continued makes the steps it would have made.
Engine thread only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.base_model import make_adamw
from app.training.adapter import TrainedAdapter
from app.training.spec import OptimizerKind, Schedule

BETAS = (0.9, 0.999)
EPSILON = 1e-8
PORTABLE_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # bitsandbytes' names of the moments: torch's
WEIGHT_DECAY = 0.0  # B A starts at zero: decay would only pull back to the base


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """Learning rate by step: up from zero in `warmup_steps`, then to zero at `total_steps`, or constant."""

    kind: Schedule
    peak: float
    warmup_steps: int
    total_steps: int

    def rate(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0. The first is not zero, and neither is the last."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        left = max(0, self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * (left if self.kind == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


@dataclass(frozen=True, slots=True)
class StepTaken:
    """An optimizer step's numbers; `grad_norm` is before clipping. A step that is not finite changed nothing."""

    rate: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm)


class AdapterOptimizer:
    """One job's optimizer. The adapter's gradients are those summed up since the last step."""

    def __init__(
        self,
        adapter: TrainedAdapter,
        schedule: RateSchedule,
        *,
        max_grad_norm: float,
        kind: OptimizerKind = "adamw",
    ) -> None:
        self._adapter, self._schedule, self._max_grad_norm = adapter, schedule, max_grad_norm
        self._parameters = adapter.parameters
        self._inner = make_adamw(
            self._parameters, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, is_8bit=kind == "adamw_8bit"
        )

    @torch.no_grad()
    def step(self, step: int) -> StepTaken:
        """Clip and apply the gradient sums as optimizer step `step` (from 0), and clear them."""
        gradients = self._adapter.gradients
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        taken = StepTaken(self._schedule.rate(step), norm)
        if taken.is_finite:
            scale = min(1.0, self._max_grad_norm / (norm + 1e-6))
            self._apply(gradients, scale, taken.rate)
        self._adapter.clear_gradients()
        return taken

    def _apply(self, gradients: list[Tensor], scale: float, rate: float) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient.mul_(scale)
        for group in self._inner.param_groups:
            group["lr"] = rate
        self._inner.step()
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """The optimizer's own tensors by `<parameter's number>.<name>`; empty before the first step.

        The moments have torch's names on every device, so a job may go on where the optimizer is another library's.
        """
        out = {}
        for number, parameter in enumerate(self._parameters):
            for name, value in self._inner.state.get(parameter, {}).items():
                held = value if isinstance(value, Tensor) else torch.tensor(value)
                out[_portable(f"{number}.{name}")] = held
        return out

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError when it is not of this adapter and kind of optimizer."""
        state = {_portable(key): tensor for key, tensor in state.items()}
        self._inner.state.clear()
        if not state:
            return
        # A step of size zero lets the optimizer make its buffers where it wants them: paged, 8-bit or plain.
        self._apply([torch.zeros_like(parameter) for parameter in self._parameters], 1.0, 0.0)
        made = {
            _portable(f"{n}.{name}"): (self._inner.state[p], name)
            for n, p in enumerate(self._parameters)
            for name in self._inner.state[p]
        }
        if set(made) != set(state):
            raise ValueError("the optimizer's state is of another adapter or optimizer")
        for key, (held, name) in made.items():
            value = held[name]
            if isinstance(value, Tensor):
                if value.shape != state[key].shape:
                    raise ValueError(f"the optimizer's {name} has another shape")
                value.copy_(state[key])
            else:
                held[name] = type(value)(state[key].item())


def _portable(key: str) -> str:
    """`<parameter's number>.<name>` with torch's name."""
    number, name = key.split(".", 1)
    return f"{number}.{PORTABLE_NAMES.get(name, name)}"
