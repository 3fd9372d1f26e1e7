"""The rank pool's tensors and the batched LoRA product: y += (x @ A.T, zeroed outside each token's own rows) @ B.

Owns the pool's A and B per target linear and the wrapper that stands in a linear's place. Knows nothing of names, of
eviction or of scheduling: `rank_pool` decides which rows, the model runner says which tokens. Engine thread only.

Shapes: `T` tokens of the step, `R` rows of the pool, `r` an adapter's rows, `I`/`O` features in and out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from adapters.weights import HostAdapter

# Rows that are gathered into a dense block are read twice and written once; a span is read once. So a span of up to
# this many times the active rows is the cheaper choice.
SPAN_OVER_GATHER = 3
# A batched product of pages pays when it multiplies tokens with at most one row in this many of the masked product
# (measured, SmolLM2-135M, 8 tokens of 8 adapters of rank 16, two AVX2 cores: 75 us a linear against 192 us).
PAGED_GAIN = 2
MIN_PAGE = 4  # rows; smaller pages cost more calls than they save work


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

        Segments of at least `long_segment` tokens run alone, on views of their rows. All shorter ones share two matrix
        products over a span of the pool or over a gathered copy of the active rows.
        """
        if not segments:
            return None
        alone = tuple(s for s in segments if s.stop - s.start >= long_segment)
        shared = [s for s in segments if s.stop - s.start < long_segment]
        return PooledPlan(self, alone, _share(shared, self) if shared else None)


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """The short segments of a step: tokens [start, stop), and which linears any of them touches."""

    start: int
    stop: int
    linears: int

    def covers(self, linear: int) -> bool:
        return bool(self.linears >> linear & 1)


@dataclass(frozen=True, slots=True)
class MaskedProduct:
    """One product of all tokens with `rows` of the pool, zeroed outside each token's own, and one back."""

    tokens: SharedTokens
    rows: slice | Tensor
    foreign: Tensor  # bool [tokens, number of rows], True where the row is not the token's own

    def add(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor) -> None:
        """x `[t, I]`, out `[t, O]`, changed in place; a `[R, I]`, b `[R, O]` are the whole pool's."""
        h = x @ a[self.rows].t()
        # Filled, not multiplied: what overflows in one adapter's rows must not reach another's tokens as NaN.
        out.addmm_(h.masked_fill_(self.foreign, 0), b[self.rows])


@dataclass(frozen=True, slots=True)
class PagedProduct:
    """The same for few tokens of many adapters: rows [first, last) as pages, each multiplied with its owner's tokens.

    A page is as many rows as divide every extent of the step, so ranks of any mix fit without padding. No token meets a
    foreign row: the work is that of each adapter alone, in two batched products.
    """

    tokens: SharedTokens
    first: int
    last: int
    page: int  # rows
    index: Tensor  # [P * m] token of each place of each page; 0 where a page has fewer than m
    targets: Tensor  # [K] the tokens that places belong to
    sources: Tensor | None  # [K] those places; None when they are all

    def add(self, x: Tensor, out: Tensor, a: Tensor, b: Tensor) -> None:
        num_pages = (self.last - self.first) // self.page
        own = x.index_select(0, self.index).view(num_pages, -1, x.shape[1])
        h = torch.bmm(own, a[self.first : self.last].view(num_pages, self.page, -1).transpose(1, 2))
        added = torch.bmm(h, b[self.first : self.last].view(num_pages, self.page, -1)).view(-1, out.shape[1])
        out.index_add_(0, self.targets, added if self.sources is None else added.index_select(0, self.sources))


def _share(segments: Sequence[Segment], pool: PoolTensors) -> MaskedProduct | PagedProduct:
    """Choose the cheaper of the two by the rows that tokens would be multiplied with."""
    start, stop = min(s.start for s in segments), max(s.stop for s in segments)
    linears = 0
    for s in segments:
        linears |= s.linears
    tokens = SharedTokens(start, stop, linears)
    first, last = min(s.row for s in segments), max(s.row + s.rank for s in segments)
    page = math.gcd(*(s.row - first for s in segments), *(s.rank for s in segments))
    most = max(s.stop - s.start for s in segments)
    # Sums of several pages into one token are made by atomic adds on a GPU, in any order; and its products are fast.
    on_cpu = pool.a[0].device.type == "cpu"
    if on_cpu and PAGED_GAIN * (last - first) * most <= (stop - start) * (last - first) and page >= MIN_PAGE:
        return _paged(segments, tokens, first, last, page, most)
    return _masked(segments, tokens, pool)


def _paged(
    segments: Sequence[Segment], tokens: SharedTokens, first: int, last: int, page: int, most: int
) -> PagedProduct:
    index = [0] * ((last - first) // page * most)
    targets, sources = [], []
    for s in segments:
        for number in range((s.row - first) // page, (s.row + s.rank - first) // page):
            for i, token in enumerate(range(s.start - tokens.start, s.stop - tokens.start)):
                index[number * most + i] = token
                targets.append(token)
                sources.append(number * most + i)
    every = sources == list(range(len(index)))
    return PagedProduct(
        tokens, first, last, page, torch.tensor(index), torch.tensor(targets), None if every else torch.tensor(sources)
    )


def _masked(segments: Sequence[Segment], tokens: SharedTokens, pool: PoolTensors) -> MaskedProduct:
    device = pool.a[0].device
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
    foreign = torch.ones(tokens.stop - tokens.start, num_rows, dtype=torch.bool)
    for s in segments:
        own = slice(s.start - tokens.start, s.stop - tokens.start)
        foreign[own, column[s.row] : column[s.row] + s.rank] = False
    return MaskedProduct(tokens, rows, foreign.to(device, non_blocking=True))


class PooledPlan:
    """One step's LoRA product. Rebuilt from the leases each step: a plan that outlives its step is a wrong answer."""

    def __init__(
        self, pool: PoolTensors, alone: tuple[Segment, ...], shared: MaskedProduct | PagedProduct | None
    ) -> None:
        self._pool = pool
        self._alone = alone
        self._shared = shared

    def apply(self, linear: int, x: Tensor, y: Tensor) -> Tensor:
        """x `[1, T, I]`, y `[1, T, O]`, changed in place."""
        a, b = self._pool.a[linear], self._pool.b[linear]
        tokens, out = x[0], y[0]
        for s in self._alone:
            if s.linears >> linear & 1:
                rows = slice(s.row, s.row + s.rank)
                out[s.start : s.stop].addmm_(tokens[s.start : s.stop] @ a[rows].t(), b[rows])
        if self._shared is not None and self._shared.tokens.covers(linear):
            own = self._shared.tokens
            self._shared.add(tokens[own.start : own.stop], out[own.start : own.stop], a, b)
        return y
