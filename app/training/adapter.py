"""The adapter under training: fp32 master weights beside the frozen base, and the plan that adds them with gradients.

Several adapters may share one forward: each is added to its own rows of the batch, so its gradients are those of a run
alone. Engine thread only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.weights import LoraPair
from app.engine.base_model import BaseModel
from app.training.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class MasterPair:
    """One linear's trained factors, fp32: delta W = scaling * b @ a."""

    a: Tensor  # [r, I]
    b: Tensor  # [O, r]


@dataclass(slots=True, eq=False)
class TrainedAdapter:
    """Master weights by linear number, and the sums of their gradients since the last optimizer step."""

    pairs: dict[int, MasterPair]
    scaling: float
    dropout: float = 0.0
    dropout_seed: int = 0
    grads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[Tensor]:
        """All factors in a fixed order: a and b of each linear."""
        return [t for pair in self.pairs.values() for t in (pair.a, pair.b)]

    @property
    def gradients(self) -> list[Tensor]:
        """Gradient sums in the order of `parameters`; zeros where nothing arrived."""
        out = []
        for index, pair in self.pairs.items():
            a, b = self.grads.get(index) or (torch.zeros_like(pair.a), torch.zeros_like(pair.b))
            out += [a, b]
        return out

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in self.parameters)

    def accumulate(self, index: int, a: Tensor, b: Tensor) -> None:
        """Add one micro-step's gradients of linear `index`."""
        held = self.grads.get(index)
        if held is None:
            self.grads[index] = (a.detach().clone(), b.detach().clone())
        else:
            held[0].add_(a)
            held[1].add_(b)

    def clear_gradients(self) -> None:
        self.grads.clear()

    def exported(self, paths: Sequence[str]) -> dict[str, LoraPair]:
        """Detached factors by module path, as files and the host tier take them."""
        return {
            paths[index]: LoraPair(pair.a.detach(), pair.b.detach(), self.scaling) for index, pair in self.pairs.items()
        }


def new_adapter(base: BaseModel, config: TrainingConfig) -> TrainedAdapter:
    """An adapter with B = 0 (it starts as the base), A drawn as `config.init` says from the job's own seed.

    `default` is PEFT's: uniform in +-1/sqrt(I) (Kaiming with a = sqrt(5)); `gaussian` has standard deviation 1/r;
    `orthogonal` has orthonormal rows scaled by 1/sqrt(r), and like PEFT's also starts B off zero, in the complement.
    `eva` is drawn as `default` here; `app.training.eva` then sets A from the job's first examples.
    """
    generator = torch.Generator().manual_seed(config.seed)
    targets = set(config.target_modules)
    pairs = {}
    for index, path in enumerate(base.lora.paths):
        if path.rsplit(".", 1)[1] not in targets:
            continue
        features_in, features_out = base.spec.linears[path]
        a, b = _initial(config.init, config.rank, features_in, features_out, generator)
        pairs[index] = _on_device(a, b, base.device)
    return TrainedAdapter(pairs, config.scaling, config.dropout, config.seed)


def continued_adapter(
    base: BaseModel, config: TrainingConfig, start: Mapping[str, tuple[Tensor, Tensor]]
) -> TrainedAdapter:
    """An adapter that begins at another's factors: path -> (a `[r, I]`, b `[O, r]`)."""
    index_of = {path: i for i, path in enumerate(base.lora.paths)}
    pairs = {index_of[path]: _on_device(a.float(), b.float(), base.device) for path, (a, b) in start.items()}
    return TrainedAdapter(dict(sorted(pairs.items())), config.scaling, config.dropout, config.seed)


def _on_device(a: Tensor, b: Tensor, device: torch.device) -> MasterPair:
    return MasterPair(*(t.to(device, torch.float32).clone().requires_grad_(True) for t in (a, b)))


def _initial(init: str, rank: int, features_in: int, features_out: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    b = torch.zeros(features_out, rank)
    if init == "gaussian":
        return torch.randn(rank, features_in, generator=g) / rank, b
    if init == "orthogonal":
        # B A = 0 with both factors non-zero: A's rows and B's columns come from complementary halves of one orthonormal
        # basis of rank r, so the first step can already move both.
        basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=g))
        even, odd = basis[0::2], basis[1::2]
        left = torch.randn(features_in, rank // 2, generator=g) @ even / 10
        right = torch.randn(rank // 2, features_out, generator=g).t() @ odd / 10
        return left.t().contiguous(), right
    bound = 1 / math.sqrt(features_in)
    return torch.empty(rank, features_in).uniform_(-bound, bound, generator=g), b


@dataclass(frozen=True, slots=True)
class PlanPart:
    """Rows [first, last) of the batch are trained on by `adapter`; `row_keys` name each row for its dropout mask."""

    adapter: TrainedAdapter
    first: int
    last: int
    row_keys: tuple[str, ...]
    lengths: tuple[int, ...]  # tokens of each row, padding not counted


class TrainingPlan:
    """Adds each part's adapter to its rows, with gradients. A `LoraPlan`; x is `[B, T, I]`."""

    def __init__(self, parts: Sequence[PlanPart], *, with_dropout: bool) -> None:
        self._parts = parts
        self._with_dropout = with_dropout

    def apply(self, linear: int, x: Tensor, y: Tensor) -> Tensor:
        rows = [self._added(part, linear, x[part.first : part.last], y[part.first : part.last]) for part in self._parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _added(self, part: PlanPart, linear: int, x: Tensor, y: Tensor) -> Tensor:
        """y + scaling * (x A^T) B^T, or y itself where the adapter leaves this linear alone."""
        pair = part.adapter.pairs.get(linear)
        if pair is None:
            return y
        if self._with_dropout and part.adapter.dropout > 0:
            x = x * self._mask(part, linear, x)
        h = x.flatten(0, 1) @ pair.a.t().to(x.dtype)
        out = torch.addmm(y.flatten(0, 1), h, pair.b.t().to(x.dtype), alpha=part.adapter.scaling)
        return out.view(y.shape)

    def _mask(self, part: PlanPart, linear: int, x: Tensor) -> Tensor:
        """The rows' dropout mask, scaled.

        A function of job, row and linear alone: the recomputation in the backward pass draws the same one, and so does
        a run in which other jobs share the batch.
        """
        keep = 1 - part.adapter.dropout
        mask = torch.zeros_like(x)
        for row, (key, length) in enumerate(zip(part.row_keys, part.lengths, strict=True)):
            digest = hashlib.blake2b(f"{part.adapter.dropout_seed}/{key}/{linear}".encode(), digest_size=8).digest()
            g = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big") >> 1)
            drawn = torch.rand(length, x.shape[2], generator=g, device=x.device)
            mask[row, :length] = (drawn < keep).to(x.dtype) / keep
        return mask
