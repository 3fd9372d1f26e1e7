"""Which rows of the rank pool belong to which adapter. Book-keeping alone: it never sees a tensor.

Engine thread only, hence no locks. An adapter of rank r is resident in one contiguous extent of r rows, so ranks of
any mix live side by side without padding. Who owns the buffers applies a `Placement`: first its moves in order, then
the copy of the new adapter into its extent (all r rows of *every* module, zeros where the adapter has none: the rows
may hold another adapter's numbers).

Moves are safe between steps only, also for leased adapters: each step's plan is rebuilt from the extents of that step
and must never be memoised across a `place`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeAlias

AdapterKey: TypeAlias = tuple[str, str]  # (tenant, digest)


@dataclass(frozen=True, slots=True)
class Extent:
    """Rows [start, start + count) of the pool."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Move:
    """Copy `count` rows from row `src` on to row `dst` on, as memmove does: the two ranges may overlap."""

    src: int
    dst: int
    count: int

    @property
    def overlaps(self) -> bool:
        """True when a plain slice assignment would read rows that it has already written: copy through a clone."""
        return abs(self.src - self.dst) < self.count


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a new adapter goes, and what must happen to the buffers first."""

    extent: Extent
    moves: tuple[Move, ...]  # in the order in which they are safe
    evicted: tuple[AdapterKey, ...]


@dataclass(frozen=True, slots=True)
class Resident:
    """One resident adapter at one moment, for snapshots."""

    key: AdapterKey
    extent: Extent
    leases: int
    is_pinned: bool


@dataclass(slots=True, eq=False)
class _Entry:
    key: AdapterKey
    extent: Extent
    last_used: int
    leases: int = 0
    is_pinned: bool = False
    is_dropped: bool = False  # its last release frees the rows, unless it is leased anew before

    @property
    def is_idle(self) -> bool:
        """True when it may be evicted."""
        return self.leases == 0 and not self.is_pinned


class RankPool:
    """Contiguous extents of rows, one a resident adapter.

    Invariant: extents never overlap, and an adapter that is leased or pinned is never evicted (it may be moved).
    """

    def __init__(self, num_rows: int, *, never_pinned_rows: int = 0) -> None:
        """`never_pinned_rows`: rows that pins must leave over, at best the largest rank that the door lets in."""
        if num_rows < 1:
            raise ValueError(f"num_rows must be 1 or more, not {num_rows}")
        self.num_rows = num_rows
        self._max_pinned_rows = max(0, num_rows - never_pinned_rows)
        self._entries: dict[AdapterKey, _Entry] = {}
        self._clock = itertools.count()
        self._free_rows = num_rows
        self._idle_rows = 0
        self.num_evictions = 0
        self.num_moves = 0

    @property
    def free_rows(self) -> int:
        """Rows that belong to nobody."""
        return self._free_rows

    @property
    def idle_rows(self) -> int:
        """Rows of adapters that may be evicted."""
        return self._idle_rows

    @property
    def leased_rows(self) -> int:
        return sum(entry.extent.count for entry in self._entries.values() if entry.leases)

    @property
    def pinned_rows(self) -> int:
        return sum(entry.extent.count for entry in self._entries.values() if entry.is_pinned)

    def fits(self, rank: int) -> bool:
        """Whether the pool is large enough at all. False is for ever: refuse the request, do not let it wait."""
        return 1 <= rank <= self.num_rows

    def can_place(self, rank: int) -> bool:
        """Whether `place` would find room now. Changes nothing; constant time."""
        return self.fits(rank) and rank <= self._free_rows + self._idle_rows

    def extent_of(self, key: AdapterKey) -> Extent | None:
        """Where a resident adapter is until the next `place`. No use, no lease."""
        entry = self._entries.get(key)
        return None if entry is None else entry.extent

    def lease(self, key: AdapterKey) -> Extent | None:
        """Look up and lease in one act; None if it is not resident. Each lease needs one `release`.

        A dropped adapter whose rows others still lease is kept after all: the key is its content, so its rows are
        right, and a request that had to wait for the old leases would hold up everybody else's.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.is_dropped = False
        self._change(entry, leases=entry.leases + 1)
        entry.last_used = next(self._clock)
        return entry.extent

    def release(self, key: AdapterKey) -> None:
        """Give one lease back. Raises KeyError if there is none: a count that drifts is a bug, never repaired."""
        entry = self._entries.get(key)
        if entry is None or entry.leases == 0:
            raise KeyError(f"{key!r} is not leased")
        self._change(entry, leases=entry.leases - 1)
        entry.last_used = next(self._clock)
        if entry.is_dropped and entry.leases == 0:
            self._free(entry)

    def place(self, key: AdapterKey, rank: int) -> Placement | None:
        """Give a new adapter its rows: free ones first, then compaction, then eviction of the least recently used.

        Returns None, and changes nothing, when leases and pins leave no room now. The new adapter is not leased: lease
        it before the next `place`, which might evict it.
        Raises ValueError for a rank that the pool can never hold, and for a key that is resident.
        """
        if not self.fits(rank):
            raise ValueError(f"an adapter of rank {rank} cannot fit a rank pool of {self.num_rows} rows")
        present = self._entries.get(key)
        if present is not None:
            raise ValueError(f"{key!r} is resident: lease it")
        if not self.can_place(rank):
            return None
        evicted = self._victims(rank - self._free_rows)
        for victim in evicted:
            self._free(self._entries[victim])
        start, moves = self._find_hole(rank)
        self._free_rows -= rank
        self._idle_rows += rank
        extent = Extent(start, rank)
        self._entries[key] = _Entry(key, extent, next(self._clock))
        self.num_evictions += len(evicted)
        self.num_moves += len(moves)
        return Placement(extent, moves, evicted)

    def pin(self, key: AdapterKey) -> bool:
        """Keep a resident adapter until `unpin` or `drop`. False: not resident, or too many rows would be pinned."""
        entry = self._entries.get(key)
        if entry is None or entry.is_dropped:
            return False
        if not entry.is_pinned and self.pinned_rows + entry.extent.count > self._max_pinned_rows:
            return False
        self._change(entry, is_pinned=True)
        return True

    def unpin(self, key: AdapterKey) -> bool:
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._change(entry, is_pinned=False)
        return True

    def drop(self, key: AdapterKey) -> bool:
        """Take an adapter out, pinned or not. True: its rows are free now (or it had none).

        False: it is leased, and its last release frees the rows unless somebody leases it anew before.
        """
        entry = self._entries.get(key)
        if entry is None:
            return True
        self._change(entry, is_pinned=False)
        if entry.leases:
            entry.is_dropped = True
            return False
        self._free(entry)
        return True

    def resident(self) -> tuple[Resident, ...]:
        """Every adapter that holds rows, least recently used first."""
        entries = sorted(self._entries.values(), key=lambda entry: entry.last_used)
        return tuple(Resident(entry.key, entry.extent, entry.leases, entry.is_pinned) for entry in entries)

    def check(self) -> None:
        """Raise AssertionError if the invariant is broken."""
        end = 0
        for entry in self._by_row():
            assert entry.extent.count >= 1
            assert entry.extent.start >= end, "extents overlap"
            end = entry.extent.end
            assert entry.leases >= 0
            assert not entry.is_dropped or (entry.leases > 0 and not entry.is_pinned)
        assert end <= self.num_rows
        assert self._free_rows == self.num_rows - sum(entry.extent.count for entry in self._entries.values())
        assert self._idle_rows == sum(entry.extent.count for entry in self._entries.values() if entry.is_idle)
        assert self.pinned_rows <= self._max_pinned_rows

    def _victims(self, missing: int) -> tuple[AdapterKey, ...]:
        """Choose idle adapters with `missing` rows or more, least recently used first, and none in vain.

        Going from the old end may take a small one before a large one that is enough alone; the second pass, from the
        young end, spares whoever is not needed.
        """
        chosen: list[_Entry] = []
        for entry in sorted(self._entries.values(), key=lambda entry: entry.last_used):
            if missing <= 0:
                break
            if entry.is_idle:
                chosen.append(entry)
                missing -= entry.extent.count
        needed: list[AdapterKey] = []
        for entry in reversed(chosen):
            if missing + entry.extent.count <= 0:
                missing += entry.extent.count
            else:
                needed.append(entry.key)
        return tuple(reversed(needed))

    def _find_hole(self, rank: int) -> tuple[int, tuple[Move, ...]]:
        """First row of a hole of `rank` rows, and the moves that make it. There are enough free rows in total."""
        holes = self._holes()
        fitting = [hole for hole in holes if hole.count >= rank]
        if fitting:
            return min(fitting, key=lambda hole: (hole.count, hole.start)).start, ()
        first, last = self._cheapest_run(holes, rank)
        next_row = holes[first].start
        moves = []
        for entry in self._by_row():
            # Ascending: each slides down into rows that are free or were left by the one before.
            if holes[first].start < entry.extent.start < holes[last].start:
                moves.append(Move(src=entry.extent.start, dst=next_row, count=entry.extent.count))
                entry.extent = Extent(next_row, entry.extent.count)
                next_row = entry.extent.end
        return next_row, tuple(moves)

    @staticmethod
    def _cheapest_run(holes: list[Extent], rank: int) -> tuple[int, int]:
        """Indices of the first and last of neighbouring holes that hold `rank` rows with the fewest rows in between."""
        best: tuple[int, int, int] | None = None
        first = total = 0
        for last, hole in enumerate(holes):
            total += hole.count
            while total - holes[first].count >= rank:
                total -= holes[first].count
                first += 1
            if total >= rank:
                cost = hole.end - holes[first].start - total
                if best is None or cost < best[0]:
                    best = (cost, first, last)
        assert best is not None, "fewer free rows than counted"
        return best[1], best[2]

    def _holes(self) -> list[Extent]:
        holes, end = [], 0
        for entry in self._by_row():
            if entry.extent.start > end:
                holes.append(Extent(end, entry.extent.start - end))
            end = entry.extent.end
        if end < self.num_rows:
            holes.append(Extent(end, self.num_rows - end))
        return holes

    def _by_row(self) -> list[_Entry]:
        return sorted(self._entries.values(), key=lambda entry: entry.extent.start)

    def _free(self, entry: _Entry) -> None:
        self._free_rows += entry.extent.count
        self._idle_rows -= entry.extent.count * entry.is_idle
        del self._entries[entry.key]

    def _change(self, entry: _Entry, *, leases: int | None = None, is_pinned: bool | None = None) -> None:
        """Change who holds an entry and keep the idle count in step; the one place that does."""
        self._idle_rows -= entry.extent.count * entry.is_idle
        entry.leases = entry.leases if leases is None else leases
        entry.is_pinned = entry.is_pinned if is_pinned is None else is_pinned
        self._idle_rows += entry.extent.count * entry.is_idle
