"""The rank pool's tensors and the batched LoRA product: y += (x @ A.T, zeroed outside each token's own rows) @ B.

Owns the pool's A and B per target linear and the wrapper that stands in a linear's place. Knows nothing of names, of
eviction or of scheduling: `rank_pool` decides which rows, the model runner says which tokens. Engine thread only.

Shapes: `T` tokens of the step, `R` rows of the pool, `r` an adapter's rows, `I`/`O` features in and out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from adapters.weights import HostAdapter

# Rows that are gathered into a dense block are read twice and written once; a span is read once. So a span of up to
# this many times the active rows is the cheaper choice.
SPAN_OVER_GATHER = 3


class LoraPlan(Protocol):
    """What the wrapped linears add during one forward pass."""

    def apply(self, linear: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y with the LoRA product of linear number `linear` added; x is its input, `[..., I]`, y `[..., O]`."""


class LoraContext:
    """The one switch between the wrapped linears and whoever runs the model: the plan of the pass now running."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.plan: LoraPlan | None = None


class LoraLinear(nn.Module):
    """A frozen base linear plus whatever the context's plan adds. Without a plan it runs no LoRA code at all."""

    def __init__(self, base: nn.Module, context: LoraContext, index: int) -> None:
        super().__init__()
        self.base = base
        self.context = context
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        plan = self.context.plan
        return y if plan is None else plan.apply(self.index, x, y)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of the step belong to the adapter whose rows are [row, row + rank)."""

    start: int
    stop: int
    row: int
    rank: int
    linears: int  # bit i is set when the adapter touches linear i


class PoolTensors:
    """`A [R, I]` and `B [R, O]` per target linear, in the compute dtype, scaling folded into B.

    Invariant: within an adapter's rows, what it does not fill is zero. Rows that nobody holds keep old numbers, which
    reach no token.
    """

    def __init__(
        self, linears: Mapping[str, tuple[int, int]], num_rows: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_rows = num_rows
        self.index = {path: i for i, path in enumerate(linears)}
        self.a = [torch.zeros(num_rows, i, dtype=dtype, device=device) for i, _ in linears.values()]
        self.b = [torch.zeros(num_rows, o, dtype=dtype, device=device) for _, o in linears.values()]
        self._layout: tuple[object, ...] = ()
        self._plan: PooledPlan | None = None  # of that layout

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.a, *self.b))

    def write(self, row: int, adapter: HostAdapter) -> int:
        """Copy an adapter into rows [row, row + rank) of every linear; return the bit set of the linears it touches.

        Every linear's rows are written, also those that the adapter does not have: what lay there before must not
        answer in its name.
        """
        touched = 0
        stop = row + adapter.rank
        for path, i in self.index.items():
            module = adapter.modules.get(path)
            rank = 0 if module is None else module.a.shape[0]
            if module is not None:
                self.a[i][row : row + rank].copy_(module.a, non_blocking=True)
                self.b[i][row : row + rank].copy_(module.b, non_blocking=True)
                touched |= 1 << i
            if row + rank < stop:
                self.a[i][row + rank : stop].zero_()
                self.b[i][row + rank : stop].zero_()
        return touched

    def move(self, src: int, dst: int, count: int) -> None:
        """Copy rows [src, src + count) down to [dst, …), dst < src; the ranges may overlap.

        In pieces that do not, so that nothing is allocated: a move that failed half-way would leave torn rows.
        """
        assert dst < src, "rows only move down"
        step = src - dst
        for pool in (*self.a, *self.b):
            for at in range(0, count, step):
                end = min(at + step, count)
                pool[dst + at : dst + end] = pool[src + at : src + end]

    def plan(self, segments: Sequence[Segment], *, long_segment: int) -> PooledPlan | None:
        """Lay out one step; None when no token has an adapter.

        Segments of at least `long_segment` tokens are multiplied with their own rows only, neighbours of one shape
        together. All shorter ones share two matrix products over a span of the pool or a gathered copy of their rows:
        more work in fewer calls, which is what a GPU wants. Segments in the order of their rows make the fewest calls.
        """
        if not segments:
            return None
        layout = (long_segment, *segments)
        if layout != self._layout:  # while the same sequences decode, one layout lasts for many steps
            shared = [s for s in segments if s.stop - s.start < long_segment]
            runs = _runs(s for s in segments if s.stop - s.start >= long_segment)
            self._layout = layout
            self._plan = PooledPlan(self, (*runs, _masked(shared, self)) if shared else runs)
        return self._plan


@dataclass(frozen=True, slots=True)
class Run:
    """Segments of one shape that lie side by side in the step and in the pool: one batched product for all of them.

    Each has `tokens` tokens and `rank` rows; the first begins at token `start` and at row `row`.
    """

    start: int
    tokens: int
    row: int
    rank: int
    linears: int  # bit i is set when they touch linear i
    count: int = 1

    def joins(self, s: Segment) -> bool:
        return (
            s.start == self.start + self.count * self.tokens
            and s.row == self.row + self.count * self.rank
            and (s.stop - s.start, s.rank, s.linears) == (self.tokens, self.rank, self.linears)
        )

    def view(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """a `[R, I]` and b `[R, O]` of the pool -> this run's `[I, r]` and `[r, O]`, stacked where there are many."""
        rows = slice(self.row, self.row + self.count * self.rank)
        if self.count == 1:
            return a[rows].t(), b[rows]
        each = (self.count, self.rank, -1)
        return a[rows].view(each).transpose(1, 2), b[rows].view(each)

    def add(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor) -> None:
        """x `[T, I]`, out `[T, O]`, changed in place; a and b as `view` gave them."""
        own = slice(self.start, self.start + self.count * self.tokens)
        x, out = x[own], out[own]
        if self.count == 1:
            out.addmm_(x @ a, b)
        else:
            each = (self.count, self.tokens, -1)
            h = torch.bmm(x.view(each), a)
            if out.is_contiguous():
                out.view(each).baddbmm_(h, b)
            else:  # part of a wider product, where a batched product falls apart into single ones
                out.add_(torch.bmm(h, b).view(out.shape))


def _runs(segments: Iterable[Segment]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for s in segments:
        if runs and runs[-1].joins(s):
            runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
        else:
            runs.append(Run(s.start, s.stop - s.start, s.row, s.rank, s.linears))
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class MaskedProduct:
    """One product of tokens [start, stop) with `rows` of the pool, zeroed outside each token's own, and one back."""

    start: int
    stop: int
    linears: int  # bit i is set when any token touches linear i
    rows: slice | Tensor
    foreign: Tensor  # bool [tokens, number of rows], True where the row is not the token's own

    def view(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The pool's, whole: gathered rows would be a copy, and what is kept must see what the pool is given later."""
        return a, b

    def add(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor) -> None:
        """x `[T, I]`, out `[T, O]`, changed in place; a `[R, I]`, b `[R, O]`."""
        h = x[self.start : self.stop] @ a[self.rows].t()
        # Filled, not multiplied: what overflows in one adapter's rows must not reach another's tokens as NaN.
        out[self.start : self.stop].addmm_(h.masked_fill_(self.foreign, 0), b[self.rows])


def _masked(segments: Sequence[Segment], pool: PoolTensors) -> MaskedProduct:
    device = pool.a[0].device
    start, stop = min(s.start for s in segments), max(s.stop for s in segments)
    linears = functools.reduce(operator.or_, (s.linears for s in segments))
    extents = sorted({(s.row, s.rank) for s in segments})
    lo, hi = extents[0][0], extents[-1][0] + extents[-1][1]
    rows: slice | Tensor
    if hi - lo <= SPAN_OVER_GATHER * sum(rank for _, rank in extents):
        rows, num_rows = slice(lo, hi), hi - lo
        column = {row: row - lo for row, _ in extents}
    else:
        rows = torch.cat([torch.arange(row, row + rank) for row, rank in extents]).to(device)
        num_rows, column, at = rows.numel(), {}, 0
        for row, rank in extents:
            column[row], at = at, at + rank
    foreign = torch.ones(stop - start, num_rows, dtype=torch.bool)
    for s in segments:
        own = slice(s.start - start, s.stop - start)
        foreign[own, column[s.row] : column[s.row] + s.rank] = False
    return MaskedProduct(start, stop, linears, rows, foreign.to(device, non_blocking=True))


class PooledPlan:
    """One step's LoRA product: a function of which tokens belong to which rows, and of nothing else.

    The runner asks for it anew each step, from the leases; it is made anew when that layout changes. It keeps views of
    the pool, never numbers.
    """

    def __init__(self, pool: PoolTensors, products: tuple[Run | MaskedProduct, ...]) -> None:
        self._pool = pool
        self.products = products
        self._parts: dict[int, list[tuple[Run | MaskedProduct, Tensor, Tensor]]] = {}

    def apply(self, linear: int, x: Tensor, y: Tensor) -> Tensor:
        """x `[1, T, I]`, y `[1, T, O]`, changed in place."""
        parts = self._parts.get(linear)
        if parts is None:
            a, b = self._pool.a[linear], self._pool.b[linear]
            parts = [(p, *p.view(a, b)) for p in self.products if p.linears >> linear & 1]
            self._parts[linear] = parts
        tokens, out = x[0], y[0]
        for product, a, b in parts:
            product.add(tokens, out, a, b)
        return y
