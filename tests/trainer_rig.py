"""A real trainer on a small base, with a database and a directory store: shared by the numerics and real tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.catalog import AdapterCatalog
from adapters.checked import DoorLimits
from adapters.disk_tier import DiskTier
from adapters.loader import AdapterLoader
from adapters.lru import ByteLRU
from adapters.store import BlobStore, DirectoryStore
from adapters.weights import HostAdapter
from app.bootstrap import adapter_parser
from app.chat import Renderer
from app.database import migrate, open_database
from app.engine.assembly import EngineConfig, assemble_engine
from app.engine.base_model import BaseModel
from app.training.config import TrainableBase
from app.training.evaluate import GreedySampler
from app.training.files import FileStore, NewFile
from app.training.fine_tuning import FineTuning, JobRequest
from app.training.job import Job
from app.training.jobs import JobStore
from app.training.publish import AdapterOutput
from app.training.spec import Hyperparameters, LoraOptions
from app.training.trainer import Trainer
from app.training.work_queue import WorkQueue
from app.training.workroom import Workroom

TENANT = "acme"
WORDS = ("red", "green", "blue", "north", "south", "hello", "user", "the", "a", "is")


def chat_row(number: int) -> dict[str, Any]:
    """A question whose answer follows from it, so that there is something to learn."""
    word, other = WORDS[number % len(WORDS)], WORDS[(number * 7 + 3) % len(WORDS)]
    question = {"role": "user", "content": f"{word} {other}?"}
    return {"messages": [question, {"role": "assistant", "content": f"{other} is {word} " + "x" * (number % 5)}]}


def preference_row(number: int) -> dict[str, Any]:
    word, other = WORDS[number % len(WORDS)], WORDS[(number * 3 + 1) % len(WORDS)]
    return {
        "input": {"messages": [{"role": "user", "content": f"say {word} {number}"}]},
        "preferred_output": [{"role": "assistant", "content": f"{word} {other}"}],
        "non_preferred_output": [{"role": "assistant", "content": f"no, {other}"}],
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Rig:
    """One process's training side. The engine thread is started by `run`, or the test drives the trainer itself."""

    base: BaseModel
    directory: Path
    store: BlobStore
    database_url: str
    micro_batch_tokens: int = 256
    lease_s: float = 30.0
    state_every_s: float = 60.0
    max_jobs: int = 4
    wrap_room: Callable[[Workroom], Workroom] = lambda room: room

    def __post_init__(self) -> None:
        base, limits = self.base, DoorLimits()
        scratch = self.directory / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        database = open_database(self.database_url)
        migrate(database)
        self.jobs = JobStore(database)
        self.queue = WorkQueue(database, base_id=base.spec.id)
        self.files = FileStore(database, self.store)
        self.catalog = AdapterCatalog(self.store, base.spec, limits, scratch=scratch)
        self.catalog.collector.ask(self.jobs.needed_blobs)
        self.renderer = Renderer.load(base.directory, max_context=base.shapes.max_context)
        trainable = TrainableBase(
            base.spec,
            max_context=base.shapes.max_context,
            hidden_size=base.shapes.hidden_size,
            num_layers=base.shapes.num_layers,
            vocab_size=base.shapes.vocab_size,
            max_rank=64,
            micro_batch_tokens=self.micro_batch_tokens,
            compute_bytes=base.dtype.itemsize,
        )
        self.fine_tuning = FineTuning(
            self.jobs,
            self.queue,
            self.files,
            base=trainable,
            renderer=self.renderer,
            resolve_model=self._resolve,
            scratch=scratch,
            lease_s=self.lease_s,
        )
        self.loader: AdapterLoader[HostAdapter] = AdapterLoader(
            fetch=self.store,
            disk=DiskTier(self.directory / "adapters", 1 << 28),
            host=ByteLRU(1 << 28),
            parse=adapter_parser(base, limits),
            size_of=lambda adapter: adapter.num_bytes,
        )
        config = EngineConfig(pool_rows=64, max_sequences=8, kv_cache_bytes=4 << 20)
        self.engine = assemble_engine(base, self.loader, config)
        output = AdapterOutput(
            base=base.spec,
            dtype=base.dtype,
            catalog=self.catalog,
            store=self.store,
            host=self.loader,
            limits=limits,
            renderer_digest=self.renderer.digest,
        )
        self.room = self.wrap_room(
            Workroom(
                base=base,
                fine_tuning=self.fine_tuning,
                output=output,
                sampler=GreedySampler(self.engine, eos_ids=self.renderer.eos_ids, max_context=base.shapes.max_context),
                store=self.store,
                scratch=scratch,
                micro_batch_tokens=self.micro_batch_tokens,
                state_every_s=self.state_every_s,
            )
        )
        self.trainer = Trainer(
            self.room,
            worker=f"worker-{id(self):x}",
            lease_s=self.lease_s,
            wake=lambda: self.engine.call(lambda: None),
            max_jobs=self.max_jobs,
            rest_s=0.02,
            poll_s=0.02,
        )
        self.engine.trainer = self.trainer

    def _resolve(self, tenant: str, model: str) -> Any:
        if model == self.base.spec.id:
            return None
        name, _, selector = model.partition("@")
        return self.catalog.resolve(tenant, name, selector or None)

    def start(self) -> None:
        self.engine.start()
        self.trainer.start()

    def start_with(self, count: int) -> None:
        """Start, and let nobody train before `count` jobs are validated and claimed: they will meet."""
        while self.fine_tuning.validate_next("validator"):
            pass
        self.engine.trainer = None
        self.start()
        deadline = time.monotonic() + 30
        while self.trainer.num_active < count:
            assert time.monotonic() < deadline, "not all were claimed"
            time.sleep(0.01)
        self.engine.call(lambda: setattr(self.engine, "trainer", self.trainer)).result(10)

    def close(self) -> None:
        self.engine.stop()
        self.trainer.close()
        self.loader.close()

    def upload(self, rows: Sequence[Mapping[str, Any]], tenant: str = TENANT, name: str = "data.jsonl") -> str:
        path = write_rows(self.directory / f"upload-{time.monotonic_ns()}.jsonl", rows)
        return self.files.add(tenant, NewFile(name), path).id

    def create(self, rows: Sequence[Mapping[str, Any]], *, tenant: str = TENANT, **asked: Any) -> Job:
        """A job with small, fixed hyperparameters unless told otherwise."""
        request = JobRequest(
            model=asked.pop("model", self.base.spec.id),
            training_file=self.upload(rows, tenant),
            asked={"at": time.monotonic_ns()},
            seed=asked.pop("seed", 7),
            hyperparameters=asked.pop(
                "hyperparameters", Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=20.0)
            ),
            lora=asked.pop("lora", LoraOptions(rank=4, dropout=0.0)),
        )
        return self.fine_tuning.create(tenant, replace(request, **asked))

    def get(self, job: Job) -> Job:
        return self.jobs.get(job.tenant, job.id)

    def wait(self, *jobs: Job, timeout_s: float = 60.0, until: Callable[[Job], bool] | None = None) -> list[Job]:
        """Wait until the jobs are over, or until `until` holds for each."""
        reached = until or (lambda job: job.status.is_over)
        deadline = time.monotonic() + timeout_s
        while True:
            now = [self.get(job) for job in jobs]
            if all(map(reached, now)):
                return now
            assert time.monotonic() < deadline, [f"{job.status} at step {job.step}" for job in now]
            time.sleep(0.02)

    def messages(self, job: Job) -> list[str]:
        return [event.message for event in self.jobs.events(job.tenant, job.id, limit=1000, asc=True).items]


def directory_rig(base: BaseModel, directory: Path, **options: Any) -> Rig:
    """A rig on its own SQLite file and directory store below `directory`."""
    store = DirectoryStore(directory / "store")
    return Rig(base, directory, store, f"sqlite:///{directory / 'lodger.db'}", **options)
