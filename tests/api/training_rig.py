"""The training side of a test server: real stores on SQLite and a directory, a byte renderer, a worker by hand."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from adapters.store import DirectoryStore
from app.api.http import create_app
from app.api.training_services import TrainingServices
from app.database import open_database
from app.training.config import TrainableBase
from app.training.dataset import DatasetLimits
from app.training.files import FileLimits, FileStore
from app.training.fine_tuning import FineTuning
from app.training.job import Succeeded
from app.training.jobs import JobStore
from app.training.permissions import Permissions
from app.training.uploads import UploadStore
from app.training.webhooks import Webhooks
from app.training.work_queue import ClaimedJob, WorkQueue
from app.training_side import model_resolver
from tests.api.fakes import ScriptedEngine
from tests.api.serving import MAX_CONTEXT, Serving, build_services, running
from tests.byte_renderer import ByteRenderer


@dataclass
class Rig:
    """A server, its training services, and the hands of a worker."""

    serving: Serving
    training: TrainingServices
    queue: WorkQueue
    database: Engine

    def validate(self) -> None:
        while self.training.fine_tuning.validate_next("validator"):
            pass

    def start(self) -> ClaimedJob:
        self.validate()
        claim = self.queue.claim("worker")
        assert claim is not None
        return claim

    def succeed(self, claim: ClaimedJob, result: Path) -> None:
        file = self.training.files.add_result(claim.job.tenant, "results.csv", result)
        self.queue.begin_publish(claim)
        gate = {"passed": True, "reason": None}
        self.queue.succeed(claim, Succeeded(1, trained_tokens=5, total_tokens=9, result_file=file.id, gate=gate))


@contextlib.contextmanager
def training_server(directory: Path) -> Iterator[Rig]:
    engine = ScriptedEngine("hello")
    services, keys = build_services(directory, engine)
    database, store = open_database(f"sqlite:///{directory / 'lodger.db'}"), DirectoryStore(directory / "store")

    jobs, queue = JobStore(database), WorkQueue(database, base_id=services.base.id)
    limits = FileLimits(max_file_bytes=1 << 20, max_upload_bytes=200 << 20)
    files = FileStore(database, store, limits=limits)
    base = TrainableBase(
        services.base, MAX_CONTEXT, hidden_size=32, num_layers=2, vocab_size=300, max_rank=64, micro_batch_tokens=128
    )
    fine_tuning = FineTuning(
        jobs,
        queue,
        files,
        base=base,
        renderer=ByteRenderer(),
        resolve_model=model_resolver(services.catalog, jobs, services.base.id),
        scratch=services.scratch,
        data_limits=DatasetLimits(),
    )
    training = TrainingServices(
        fine_tuning,
        UploadStore(database, store, files, scratch=services.scratch),
        Permissions(database),
        Webhooks(database, send=lambda url, body, headers: 204),
        poll_s=0.02,
    )
    try:
        app = create_app(replace(services, training=training))
        with running(app) as url:
            yield Rig(Serving(url, app, services, engine, keys), training, queue, database)
    finally:
        engine.stop()
        database.dispose()


def chat_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(start, start + count)
    ]


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def wait_until(condition: Any, timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
