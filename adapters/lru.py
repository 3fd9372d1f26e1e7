"""A byte-budgeted LRU with leases and pins: the book-keeping of the disk tier and of the host tier.

Any thread may call it: one lock inside, held for dictionary work only. `on_evict` runs after the lock is released, in
the thread that caused the eviction, so it may do I/O and may call back.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Eviction(enum.Enum):
    """Why an entry left its tier."""

    LRU = "lru"  # room was needed and nothing else was used longer ago
    SUPERSEDED = "superseded"  # another value took its key, or its version is retired
    ERASED = "erased"  # its owner deleted it
    CORRUPT = "corrupt"  # its bytes were not what they should be


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier at one moment. Counters only grow."""

    used_bytes: int  # entries, among them those that wait for their last release, and reservations
    budget_bytes: int
    entries: int
    leased: int
    pinned: int
    hits: int
    misses: int
    evictions: Mapping[Eviction, int]


@dataclass(slots=True, eq=False)
class _Entry(Generic[V]):
    value: V
    num_bytes: int
    leases: int = 0
    is_pinned: bool = False
    doomed: Eviction | None = None  # set: nobody finds it any more, its last release frees it


class ByteLRU(Generic[K, V]):
    """Entries with sizes under one budget; the least recently used one goes first.

    Invariant: used bytes never exceed the budget, and an entry that is leased or pinned never leaves for want of room.
    """

    def __init__(self, budget_bytes: int, *, on_evict: Callable[[K, V, Eviction], None] | None = None) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes must be 0 or more, not {budget_bytes}")
        self.budget_bytes = budget_bytes
        self._on_evict = on_evict
        self._lock = threading.Lock()
        self._entries: dict[K, _Entry[V]] = {}  # least recently used first
        self._used_bytes = 0
        self._reserved_bytes = 0
        self._hits = 0
        self._misses = 0
        self._evictions: Counter[Eviction] = Counter()

    def get(self, key: K) -> V | None:
        """Return the value and count it as used now; None if there is none. The value may be evicted at any time."""
        with self._lock:
            entry = self._touch(key)
            return None if entry is None else entry.value

    def lease(self, key: K) -> V | None:
        """Look up and lease in one act. Each lease needs one `release`."""
        with self._lock:
            entry = self._touch(key)
            if entry is None:
                return None
            entry.leases += 1
            return entry.value

    def release(self, key: K) -> None:
        """Give one lease back. Raises KeyError if there is none: a lease count that drifts is a bug, never repaired."""
        gone: list[tuple[K, V, Eviction]] = []
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.leases == 0:
                raise KeyError(f"{key!r} is not leased")
            entry.leases -= 1
            if entry.doomed is not None and entry.leases == 0:
                self._remove(key, entry.doomed, gone)
        self._report(gone)

    def put(self, key: K, value: V, num_bytes: int, *, leased: bool = False, reserved_bytes: int = 0) -> bool:
        """Add or replace an entry, evicting what was used longest ago; `reserved_bytes` of `reserve` are given back.

        Returns False, and evicts nothing, when it is larger than the budget or than what leases and pins leave free.
        A replaced entry keeps its leases and its pin.
        """
        gone: list[tuple[K, V, Eviction]] = []
        with self._lock:
            self._reserved_bytes -= reserved_bytes
            assert self._reserved_bytes >= 0, "more bytes given back than reserved"
            old = self._entries.get(key)
            fits = self._make_room(num_bytes - (old.num_bytes if old else 0), gone, keep=key)
            if fits:
                entry = _Entry(value, num_bytes)
                if old is not None:
                    entry.leases, entry.is_pinned = old.leases, old.is_pinned
                    self._remove(key, Eviction.SUPERSEDED, gone)
                entry.leases += leased
                self._entries[key] = entry
                self._used_bytes += num_bytes
        self._report(gone)
        return fits

    def reserve(self, num_bytes: int) -> bool:
        """Make room ahead of a `put`, so that bytes on their way count too. Undo by `put` or `unreserve`."""
        gone: list[tuple[K, V, Eviction]] = []
        with self._lock:
            fits = self._make_room(num_bytes, gone)
            if fits:
                self._reserved_bytes += num_bytes
        self._report(gone)
        return fits

    def unreserve(self, num_bytes: int) -> None:
        with self._lock:
            assert self._reserved_bytes >= num_bytes, "more bytes given back than reserved"
            self._reserved_bytes -= num_bytes

    def evict(self, key: K, reason: Eviction) -> bool:
        """Take an entry out, pinned or not. A leased one is hidden at once and freed by its last release.

        Returns True if there was such an entry.
        """
        gone: list[tuple[K, V, Eviction]] = []
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.doomed is not None:
                return False
            if entry.leases:
                entry.doomed, entry.is_pinned = reason, False
            else:
                self._remove(key, reason, gone)
        self._report(gone)
        return True

    def shrink(self, num_bytes: int) -> int:
        """Evict least recently used entries until `num_bytes` are gone or none may go. Returns the bytes freed."""
        gone: list[tuple[K, V, Eviction]] = []
        freed = 0
        with self._lock:
            for key, entry in list(self._entries.items()):
                if freed >= num_bytes:
                    break
                if not entry.leases and not entry.is_pinned:
                    freed += entry.num_bytes
                    self._remove(key, Eviction.LRU, gone)
        self._report(gone)
        return freed

    def pin(self, key: K) -> bool:
        """Keep an entry until `unpin` or `evict`. Returns False if there is no such entry."""
        return self._set_pin(key, True)

    def unpin(self, key: K) -> bool:
        return self._set_pin(key, False)

    def oldest_first(self) -> list[K]:
        """What can be found now, least recently used first."""
        with self._lock:
            return [key for key, entry in self._entries.items() if entry.doomed is None]

    def __contains__(self, key: K) -> bool:
        """Whether the key can be found; neither a use nor a hit or miss."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.doomed is None

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                used_bytes=self._used_bytes + self._reserved_bytes,
                budget_bytes=self.budget_bytes,
                entries=len(self._entries),
                leased=sum(1 for entry in self._entries.values() if entry.leases),
                pinned=sum(1 for entry in self._entries.values() if entry.is_pinned),
                hits=self._hits,
                misses=self._misses,
                evictions=MappingProxyType({reason: self._evictions[reason] for reason in Eviction}),
            )

    def check(self) -> None:
        """Raise AssertionError if the invariant is broken."""
        with self._lock:
            assert self._used_bytes == sum(entry.num_bytes for entry in self._entries.values())
            assert self._reserved_bytes >= 0
            assert self._used_bytes + self._reserved_bytes <= self.budget_bytes
            for entry in self._entries.values():
                assert entry.leases >= 0
                assert entry.doomed is None or (entry.leases > 0 and not entry.is_pinned)

    def _touch(self, key: K) -> _Entry[V] | None:
        entry = self._entries.get(key)
        if entry is None or entry.doomed is not None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries[key] = self._entries.pop(key)
        return entry

    def _make_room(self, num_bytes: int, gone: list[tuple[K, V, Eviction]], *, keep: K | None = None) -> bool:
        """Evict from the old end until `num_bytes` more fit, or evict nothing at all."""
        missing = self._used_bytes + self._reserved_bytes + num_bytes - self.budget_bytes
        victims: list[K] = []
        for key, entry in self._entries.items():
            if missing <= 0:
                break
            if not entry.leases and not entry.is_pinned and key != keep:
                victims.append(key)
                missing -= entry.num_bytes
        if missing > 0:
            return False
        for key in victims:
            self._remove(key, Eviction.LRU, gone)
        return True

    def _remove(self, key: K, reason: Eviction, gone: list[tuple[K, V, Eviction]]) -> None:
        entry = self._entries.pop(key)
        self._used_bytes -= entry.num_bytes
        self._evictions[reason] += 1
        gone.append((key, entry.value, reason))

    def _report(self, gone: list[tuple[K, V, Eviction]]) -> None:
        if self._on_evict is not None:
            for key, value, reason in gone:
                self._on_evict(key, value, reason)

    def _set_pin(self, key: K, is_pinned: bool) -> bool:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.doomed is not None:
                return False
            entry.is_pinned = is_pinned
            return True
