"""Listening, signals, drain and watchdog: the life of the serving process around the engine.

SIGTERM or SIGINT: unready at once, the listener stays open, new work gets 503, accepted work finishes within the drain
time, what is left gets an error event, exit 0. A second signal exits within a second.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from app.api.http import create_admin_app, create_app
from app.engine.engine import Engine

if TYPE_CHECKING:
    from app.bootstrap import Draining, Server

logger = logging.getLogger(__name__)

EXIT_WATCHDOG = 70
CLOSE_CONNECTIONS_S = 5  # what uvicorn waits for answers that are on their way out
GIL_SWITCH_S = 0.001  # Python's 5 ms would let the event loop hold up every step that the engine thread begins


def run_server(server: Server, draining: Draining, on_ready: Callable[[str], None] | None) -> int:
    """Serve until a signal; returns the exit code."""
    settings = server.settings
    sys.setswitchinterval(GIL_SWITCH_S)
    main = _Listener(_config(create_app(server.services), settings.host, settings.port))
    others = []
    if settings.admin_port is not None:
        app = create_admin_app(server.services)
        others.append(_Listener(_config(app, settings.admin_host, settings.admin_port)))
    drain = _Drain(server.engine, draining, settings.drain_timeout_s, [main, *others])
    watchdog = threading.Thread(
        target=_watch, args=(server.engine, settings.dead_engine_s), name="watchdog", daemon=True
    )
    watchdog.start()

    async def run() -> None:
        tasks = [asyncio.create_task(listener.serve()) for listener in (main, *others)]
        while not main.started and not tasks[0].done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        if main.started:
            host, port = main.address
            url = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
            logger.info("ready", extra={"action": "ready", "host": host, "port": port, "base": server.base.spec.id})
            if on_ready is not None:
                on_ready(url)
        await asyncio.gather(*tasks)

    with drain.handling_signals():
        asyncio.run(run())
    return 0 if main.started else 1


def _config(app: object, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_CONNECTIONS_S,
        limit_concurrency=None,
    )


class _Listener(uvicorn.Server):
    """A uvicorn server that leaves the process's signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return str(host), int(port)


class _Drain:
    """What signals do."""

    def __init__(self, engine: Engine, draining: Draining, timeout_s: float, listeners: list[_Listener]) -> None:
        self._engine = engine
        self._draining = draining
        self._timeout_s = timeout_s
        self._listeners = listeners

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._draining.is_set:
            logging.shutdown()
            os._exit(0)
        self._draining.is_set = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        logger.info("draining", extra={"action": "draining", "seconds": self._timeout_s})
        try:
            finished = self._engine.drain(self._timeout_s)
            self._engine.stop()
            logger.info("drained", extra={"action": "drained", "outcome": "ok" if finished else "cut"})
        finally:  # whatever happened above, a process that was told to end must end
            for listener in self._listeners:
                listener.should_exit = True


def _watch(engine: Engine, dead_after_s: float) -> None:
    """End the process when the engine thread has ended or has been silent for too long: a restart is the only cure."""
    while not engine.is_ending:
        is_stuck = time.monotonic() - engine.heartbeat > dead_after_s
        if is_stuck or not engine.is_running:
            reason = "stuck" if is_stuck else "ended"
            logger.critical("engine is lost", extra={"action": "watchdog", "reason": reason, "seconds": dead_after_s})
            faulthandler.dump_traceback(all_threads=True)
            os._exit(EXIT_WATCHDOG)
        time.sleep(min(1.0, dead_after_s / 10))
