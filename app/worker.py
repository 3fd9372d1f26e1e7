"""The worker process: the engine without HTTP, training all the time. Puts itself together from the server's parts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from adapters.disk_tier import DiskTier
from adapters.loader import AdapterLoader
from adapters.weights import HostAdapter
from app.bootstrap import engine_config, load_base, make_loader, open_catalog
from app.chat import Renderer
from app.database import migrate, open_database
from app.engine.assembly import assemble_engine
from app.engine.base_model import use_threads
from app.engine.engine import Engine
from app.logs import configure_logging
from app.machine import keep_freed_memory
from app.scratch import Scratch
from app.settings import Settings
from app.storage import door_limits, open_store
from app.training_side import Parts, TrainingSide, build_training

logger = logging.getLogger(__name__)

# A worker generates only the few sample answers of the gate.
MAX_SEQUENCES = 8
KV_CACHE_BYTES = 256 << 20
ALIVE_EVERY_S = 1.0
STUCK_S = 600.0
EXIT_FAILED = 1


@dataclass(frozen=True)
class Worker:
    """Everything that runs in a worker; `close` gives its jobs back."""

    parts: Parts
    engine: Engine
    training: TrainingSide
    loader: AdapterLoader[HostAdapter]
    disk: DiskTier
    scratch: Scratch

    def start(self) -> None:
        self.engine.start()
        self.training.start()

    @property
    def is_stuck(self) -> bool:
        """True when the engine has not turned for far longer than any quantum takes."""
        return time.monotonic() - self.engine.heartbeat > STUCK_S

    def close(self) -> None:
        self.engine.stop()
        self.training.close()
        self.loader.close()
        self.disk.close()
        self.scratch.close()


def build_worker(settings: Settings) -> Worker:
    """Load the base and open store and database, as the server does."""
    keep_freed_memory()
    use_threads(1)  # the engine thread takes settings.threads for itself
    base = load_base(settings)
    database = open_database(settings.database_url)
    migrate(database)
    store = open_store(settings)
    disk = DiskTier(settings.data_dir / "adapters", settings.disk_cache_bytes)
    loader = make_loader(settings, base, store, disk)
    scratch = Scratch(settings.data_dir / "scratch")
    catalog = open_catalog(settings, store, base.spec, scratch.path)
    config = replace(engine_config(settings), max_sequences=MAX_SEQUENCES, kv_cache_bytes=KV_CACHE_BYTES)
    engine = assemble_engine(base, loader, config)
    engine.threads = settings.threads
    renderer = Renderer.load(base.directory, max_context=base.shapes.max_context)
    limits = door_limits(settings)
    parts = Parts(settings, base, engine, loader, catalog, store, database, renderer, limits, scratch.path)
    return Worker(parts, engine, build_training(parts, trains=True, serves=False), loader, disk, scratch)


def run_worker(settings: Settings, on_ready: Callable[[], None] = lambda: None) -> int:
    """Train until SIGTERM or SIGINT, then write durable states and give the jobs back; returns the exit code."""
    configure_logging(settings.log_level)
    stop = threading.Event()
    worker = build_worker(settings)
    with _handling_signals(stop):
        worker.start()
        logger.info("worker ready", extra={"action": "worker_ready", "base": worker.parts.base.spec.id})
        on_ready()
        try:
            while worker.engine.is_running and not stop.wait(ALIVE_EVERY_S):
                if worker.is_stuck:
                    # Its thread cannot be taken over, so nothing can be saved: the leases run out, and others go on.
                    logger.critical("engine is stuck", extra={"action": "engine_stuck"})
                    os._exit(EXIT_FAILED)
            return 0 if stop.is_set() else EXIT_FAILED
        finally:
            worker.close()
            logger.info("worker ended", extra={"action": "worker_ended"})


@contextmanager
def _handling_signals(stop: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
