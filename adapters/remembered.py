"""What was read from the store a short while ago: one reader per key, a time to live, and what to do when it fails.

Knows nothing of adapters. Any thread may ask; reading happens in the thread that asks first. Monotonic time only, so
that a clock that is set changes nothing.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from adapters.errors import StoreError, StoreUnavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

READ_AHEAD = 0.75  # of its lifetime a value is used for before somebody is asked to read it ahead
MAX_REREADS = 3  # of a value that its own process keeps changing while it is read


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Seconds that a reading is used for."""

    present_s: float = 15.0
    absent_s: float = 10.0
    stale_s: float = 86_400.0  # a reading's greatest age while the store fails
    retry_s: float = 2.0  # between two attempts on a failing store, up to half as much again at random


@dataclass(frozen=True, slots=True)
class Reading(Generic[V]):
    value: V
    read_at: float  # when the reading began
    fresh_until: float
    is_stale: bool = False  # the store failed when it was to be read again
    is_claimed: bool = False  # somebody was asked to read it ahead


@dataclass(slots=True)
class _Flight(Generic[V]):
    done: threading.Event = field(default_factory=threading.Event)
    reading: Reading[V] | None = None
    is_outdated: bool = False  # the value was changed while it was being read


class KeyedLocks(Generic[K]):
    """A lock per key that exists only while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[K, tuple[threading.Lock, int]] = {}  # the key's lock, and how many hold or await it

    @contextlib.contextmanager
    def alone(self, key: K) -> Iterator[None]:
        with self._lock:
            lock, holders = self._held.get(key, (threading.Lock(), 0))
            self._held[key] = (lock, holders + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, holders = self._held.pop(key)
                if holders > 1:
                    self._held[key] = (lock, holders - 1)

    def is_busy(self, key: K) -> bool:
        with self._lock:
            return key in self._held


class Remembered(Generic[K, V]):
    """Readings by key, at most `capacity` present and as many absent ones; the least recently used go first.

    Absent ones are counted apart: asking for a thousand names that do not exist costs no name that does its reading.
    """

    def __init__(
        self,
        load: Callable[[K, V | None], V],
        *,
        is_absent: Callable[[V], bool],
        lifetimes: Lifetimes,
        capacity: int,
        clock: Callable[[], float],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`load(key, last value)` reads; it may raise StoreErrors."""
        self._load = load
        self._is_absent = is_absent
        self._times = lifetimes
        self._capacity = capacity
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._present: OrderedDict[K, Reading[V]] = OrderedDict()
        self._absent: OrderedDict[K, Reading[V]] = OrderedDict()
        self._failed: OrderedDict[K, float] = OrderedDict()  # nothing to fall back on: until when not to try
        self._flights: dict[K, _Flight[V]] = {}
        self.num_stale_served = 0

    def get(self, key: K, *, read_since: float | None = None) -> Reading[V]:
        """Return a reading that is fresh, or the best there is. Blocks on the store. Raises StoreErrors.

        With `read_since` (monotonic) the reading began then or later, or is stale because the store fails. While
        another thread reads anew what is known already, the known reading is returned at once.
        """
        while True:
            with self._lock:
                now = self._clock()
                known = self._find(key)
                is_recent = known is not None and (read_since is None or known.read_at >= read_since or known.is_stale)
                if known is not None and is_recent and now < known.fresh_until:
                    return self._used(key, known)
                if known is None and now < self._failed.get(key, now):
                    raise StoreUnavailable("The store failed a moment ago.")
                flight = self._flights.get(key)
                if flight is None:
                    mine = self._flights[key] = _Flight()
                elif known is not None and is_recent and not flight.is_outdated:
                    return known
            if flight is None:
                return self._lead(key, known, mine)
            flight.done.wait()
            if flight.reading is None:
                raise StoreUnavailable("The store failed a moment ago.")
            if read_since is None or flight.reading.read_at >= read_since or flight.reading.is_stale:
                return flight.reading

    def peek(self, key: K) -> V | None:
        """Return the value if it needs no reading, or if somebody is reading it anew; never blocks."""
        with self._lock:
            known = self._find(key)
            if known is None:
                return None
            flight = self._flights.get(key)
            is_being_read = flight is not None and not flight.is_outdated
            return self._used(key, known).value if is_being_read or self._clock() < known.fresh_until else None

    def is_due(self, key: K) -> bool:
        """True, to one caller, when a value in use will not be fresh for long: `reread` it, and nobody has to wait when
        its time is over. Never blocks.

        While the store fails that is so each time when it may be tried again; the value is used a little longer then.
        """
        with self._lock:
            known, now = self._present.get(key), self._clock()
            if known is None or key in self._flights:
                return False
            if known.is_stale:
                if now < known.fresh_until or now - known.read_at >= self._times.stale_s:
                    return False
                self._present[key] = replace(known, fresh_until=now + self._times.retry_s)
                return True
            due_at = known.read_at + READ_AHEAD * (known.fresh_until - known.read_at)
            if known.is_claimed or not due_at <= now < known.fresh_until:
                return False
            self._present[key] = replace(known, is_claimed=True)
            return True

    def reread(self, key: K) -> None:
        """Read the value anew, unless somebody does so now. Blocks on the store. Raises StoreErrors."""
        with self._lock:
            if key in self._flights:
                return
            known, flight = self._find(key), _Flight[V]()
            self._flights[key] = flight
        self._lead(key, known, flight)

    def expire(self, key: K, in_s: float) -> None:
        """Have the value read again in `in_s` seconds, if that is sooner than planned."""
        with self._lock:
            known = self._find(key)
            if known is not None:
                kept = self._present if key in self._present else self._absent
                kept[key] = replace(known, fresh_until=min(known.fresh_until, self._clock() + in_s))

    def forget(self, key: K) -> None:
        """Drop the value: it was changed. A reading under way starts over."""
        with self._lock:
            self._drop(key)
            if key in self._flights:
                self._flights[key].is_outdated = True

    def forget_if(self, chosen: Callable[[K], bool]) -> None:
        with self._lock:
            for key in [key for kept in (self._present, self._absent, self._failed) for key in kept if chosen(key)]:
                self._drop(key)
            for key, flight in self._flights.items():
                flight.is_outdated |= chosen(key)

    def _drop(self, key: K) -> None:
        self._present.pop(key, None)
        self._absent.pop(key, None)
        self._failed.pop(key, None)

    def _find(self, key: K) -> Reading[V] | None:
        return self._present.get(key) or self._absent.get(key)

    def _used(self, key: K, known: Reading[V]) -> Reading[V]:
        kept = self._present if key in self._present else self._absent
        kept.move_to_end(key)
        self.num_stale_served += self._is_too_old(known)
        return known

    def _is_too_old(self, known: Reading[V]) -> bool:
        """For a store that does not fail."""
        return known.is_stale and self._clock() - known.read_at >= self._times.present_s

    def _lead(self, key: K, known: Reading[V] | None, flight: _Flight[V]) -> Reading[V]:
        """Read for everyone who waits. Whatever happens, the flight ends."""
        try:
            for attempt in range(MAX_REREADS):
                flight.is_outdated = False
                read_at = self._clock()
                value = self._load(key, known.value if known is not None else None)
                lifetime = self._times.absent_s if self._is_absent(value) else self._times.present_s
                with self._lock:
                    if flight.is_outdated and attempt + 1 < MAX_REREADS:
                        continue
                    flight.reading = Reading(value, read_at, read_at if flight.is_outdated else read_at + lifetime)
                    self._keep(key, flight.reading)
                    break
        except StoreError:
            flight.reading = self._fall_back(key, known)
            if flight.reading is None:
                raise
        finally:
            with self._lock:
                del self._flights[key]
            flight.done.set()
        assert flight.reading is not None
        return flight.reading

    def _keep(self, key: K, reading: Reading[V]) -> None:
        self._drop(key)
        kept = self._absent if self._is_absent(reading.value) else self._present
        kept[key] = reading
        if len(kept) > self._capacity:
            kept.popitem(last=False)

    def _fall_back(self, key: K, known: Reading[V] | None) -> Reading[V] | None:
        with self._lock:
            now = self._clock()
            retry_at = now + self._times.retry_s * (1 + self._jitter() / 2)
            if known is None or now - known.read_at >= self._times.stale_s:
                self._failed[key] = retry_at
                if len(self._failed) > self._capacity:
                    self._failed.popitem(last=False)
                return None
            # What was read ahead of its time keeps its time.
            stale = replace(known, fresh_until=max(retry_at, known.fresh_until), is_stale=True)
            self._keep(key, stale)
            self.num_stale_served += self._is_too_old(stale)
            return stale
