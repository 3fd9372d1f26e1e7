"""Each system runs in a process of its own, so that its memory, its start and its threads are its own.

The parent calls methods of an object that lives in the child; every call has a time limit. A child dies with its
parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from app.bench.figures import ProcessFacts, RoundTrace
from app.bench.workload import BenchFailed, Job

CLOSE_S = 20.0


class System(Protocol):
    """Something that answers requests. Blocks; one call at a time."""

    def warm_up(self, jobs: Sequence[Job]) -> None:
        """Answer requests that are not measured, one adapter after the other."""

    def round(self, jobs: Sequence[Job], concurrency: int) -> RoundTrace:
        """Answer all jobs, `concurrency` at a time."""

    def facts(self) -> ProcessFacts:
        """The process that does the work, now."""

    def close(self) -> None: ...


class Child:
    """A `System`, or anything else with methods, in a spawned process."""

    def __init__(self, make: Callable[..., Any], *args: Any, name: str, start_timeout_s: float) -> None:
        """`make(*args)` runs in the child; both must be picklable. Raises BenchFailed when it raises or is too slow."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, make, args), name=name, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer("start", start_timeout_s)
        except BaseException:
            self._process.kill()
            raise

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Raises BenchFailed with the child's own words, when it died, or when the time is up."""
        try:
            self._ours.send((method, args))
        except OSError as exc:
            raise BenchFailed(f"{self.name} is gone (exit code {self._process.exitcode})") from exc
        return self._answer(method, timeout_s)

    def close(self) -> None:
        """Let it close itself; kill it when it does not."""
        with contextlib.suppress(OSError, BenchFailed):
            self.call("close", timeout_s=CLOSE_S)
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._ours.close()

    def _answer(self, method: str, timeout_s: float) -> Any:
        until = time.monotonic() + timeout_s
        while not self._ours.poll(min(1.0, max(until - time.monotonic(), 0.0))):
            if not self._process.is_alive() and not self._ours.poll():
                raise BenchFailed(f"{self.name} died in {method!r} (exit code {self._process.exitcode})")
            if time.monotonic() >= until:
                raise BenchFailed(f"{self.name}: {method!r} took more than {timeout_s:.0f} s")
        try:
            is_good, value = self._ours.recv()
        except EOFError as exc:
            raise BenchFailed(f"{self.name} died in {method!r}") from exc
        if not is_good:
            raise BenchFailed(f"{self.name}: {method!r} failed\n{value}")
        return value


def _live(connection: Connection, make: Callable[..., Any], args: Sequence[Any]) -> None:
    """The child's main loop: ends when told to close, or when the parent is gone."""
    try:
        subject = make(*args)
        connection.send((True, None))
    except BaseException:
        connection.send((False, traceback.format_exc(limit=-6)))
        return
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            try:
                answer = (True, getattr(subject, method)(*arguments))
            except Exception:
                answer = (False, traceback.format_exc(limit=-6))
            connection.send(answer)
            if method == "close":
                return
    subject.close()
