"""The training half of the composition root: names the concrete classes of files, jobs, webhooks and the trainer."""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from adapters.catalog import AdapterCatalog
from adapters.checked import DoorLimits
from adapters.loader import AdapterLoader
from adapters.manifest import AdapterManifest
from adapters.store import BlobStore
from adapters.weights import HostAdapter
from app.chat import Renderer
from app.engine.base_model import BaseModel
from app.engine.engine import Engine
from app.model_names import AdapterName, BaseModelName, model_not_found, parse_model_name
from app.settings import Settings
from app.training.checkpoint import sweep_states
from app.training.config import TrainableBase
from app.training.courier import Courier
from app.training.evaluate import GreedySampler
from app.training.figures import TrainingFigures
from app.training.files import FileLimits, FileStore
from app.training.fine_tuning import FineTuning
from app.training.jobs import JobStore
from app.training.permissions import Permissions
from app.training.publish import FINE_TUNED_MODEL, AdapterOutput
from app.training.trainer import Trainer
from app.training.uploads import UploadStore
from app.training.webhooks import Webhooks
from app.training.work_queue import WorkQueue
from app.training.workroom import Workroom

logger = logging.getLogger(__name__)

# Tokens of a micro-step, padding counted. A layer's quantum is what a running request may have to wait for: 128 tokens
# of SmolLM2 take two cores about 12 ms forward and 32 ms backward, a third of a decode step.
MICRO_BATCH_TOKENS = {"cpu": 128, "cuda": 8192}
# Where nobody is served, nobody waits: unpacking the weights and the many small calls are paid a quarter as often. 115
# tokens a second against 82 on the same cores.
MICRO_BATCH_TOKENS_ALONE = {"cpu": 512, "cuda": 8192}
CHORES_EVERY_S = 5.0


@dataclass(frozen=True)
class Parts:
    """What the training side shares with serving."""

    settings: Settings
    base: BaseModel
    engine: Engine
    loader: AdapterLoader[HostAdapter]
    catalog: AdapterCatalog
    store: BlobStore
    database: sa.Engine
    renderer: Renderer
    limits: DoorLimits
    scratch: Path


@dataclass(frozen=True)
class TrainingSide:
    """Jobs, files, webhooks, and the trainer where this process has one."""

    fine_tuning: FineTuning
    uploads: UploadStore
    permissions: Permissions
    webhooks: Webhooks
    trainer: Trainer | None
    chores: Chores
    courier: Courier
    figures: TrainingFigures

    def start(self) -> None:
        if self.trainer is not None:
            self.trainer.start()
        self.chores.start()
        self.courier.start()

    def close(self) -> None:
        """After the engine has stopped."""
        if self.trainer is not None:
            self.trainer.close()
        self.courier.close()
        self.chores.close()


class Chores:
    """What has to be done now and then, by any process: drop what has expired. Webhooks are the courier's."""

    def __init__(self, acts: tuple[Callable[[], object], ...], *, every_s: float = CHORES_EVERY_S) -> None:
        self._acts, self._every_s = acts, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chores", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._every_s)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            for act in self._acts:
                try:
                    act()
                except Exception:  # the next round may have more luck
                    logger.exception("chore failed", extra={"action": "chore_failed"})


def build_training(parts: Parts, *, trains: bool, serves: bool) -> TrainingSide:
    """Wire it; `trains` says whether this process's engine works on jobs, `serves` whether it also answers prompts."""
    settings, base = parts.settings, parts.base
    limits = FileLimits(settings.max_file_bytes, settings.max_upload_bytes)
    files = FileStore(parts.database, parts.store, limits=limits, collector=parts.catalog.collector)
    jobs = JobStore(parts.database)
    parts.catalog.collector.ask(jobs.needed_blobs)
    fine_tuning = FineTuning(
        jobs,
        WorkQueue(parts.database, base_id=base.spec.id, base_digest=base.spec.digest),
        files,
        base=trainable_base(base, settings.max_rank, settings.max_scale, micro_batch_tokens(base, serves=serves)),
        renderer=parts.renderer,
        resolve_model=model_resolver(parts.catalog, jobs, base.spec.id),
        scratch=parts.scratch,
        lease_s=settings.job_lease_s,
    )
    uploads = UploadStore(parts.database, parts.store, files, scratch=parts.scratch)
    webhooks = Webhooks(parts.database)
    trainer = build_trainer(parts, fine_tuning, serves=serves) if trains else None
    parts.engine.trainer = trainer
    figures = TrainingFigures(parts.database, None if trainer is None else trainer.counters)
    clear = functools.partial(sweep_states, jobs, parts.store, parts.scratch)
    chores = Chores((files.sweep, files.collect_unpinned, uploads.sweep, clear, figures.look))
    permissions, courier = Permissions(parts.database), Courier(webhooks)
    return TrainingSide(fine_tuning, uploads, permissions, webhooks, trainer, chores, courier, figures)


def build_trainer(parts: Parts, fine_tuning: FineTuning, *, serves: bool) -> Trainer:
    base, engine = parts.base, parts.engine
    output = AdapterOutput(
        base=base.spec,
        dtype=base.dtype,
        catalog=parts.catalog,
        store=parts.store,
        host=parts.loader,
        limits=parts.limits,
        renderer_digest=parts.renderer.digest,
        pin_memory=base.device.type == "cuda",
    )
    room = Workroom(
        base=base,
        fine_tuning=fine_tuning,
        output=output,
        sampler=GreedySampler(engine, eos_ids=parts.renderer.eos_ids, max_context=base.shapes.max_context),
        store=parts.store,
        scratch=parts.scratch,
        micro_batch_tokens=micro_batch_tokens(base, serves=serves),
    )
    worker = f"{socket.gethostname()}-{os.getpid()}"
    wake = lambda: engine.call(lambda: None)
    return Trainer(room, worker=worker[:128], lease_s=parts.settings.job_lease_s, wake=wake)


def micro_batch_tokens(base: BaseModel, *, serves: bool) -> int:
    """Most tokens of one pass of a process that also answers prompts, or only trains."""
    return (MICRO_BATCH_TOKENS if serves else MICRO_BATCH_TOKENS_ALONE)[base.device.type]


def trainable_base(base: BaseModel, max_rank: int, max_scale: float, micro_batch_tokens: int) -> TrainableBase:
    shapes = base.shapes
    return TrainableBase(
        base.spec,
        max_context=shapes.max_context,
        hidden_size=shapes.hidden_size,
        num_layers=shapes.num_layers,
        vocab_size=shapes.vocab_size,
        max_rank=max_rank,
        micro_batch_tokens=micro_batch_tokens,
        max_scale=max_scale,
        compute_bytes=base.dtype.itemsize,
    )


def model_resolver(
    catalog: AdapterCatalog, jobs: JobStore, base_id: str
) -> Callable[[str, str], AdapterManifest | None]:
    """What a job's `model` stands for: None is the base, else the adapter version to continue from."""

    def resolve(tenant: str, model: str) -> AdapterManifest | None:
        name = parse_model_name(model, base_id)
        if isinstance(name, BaseModelName):
            return None
        if name.tenant not in (None, tenant):
            raise model_not_found(model)
        if isinstance(name, AdapterName):
            return catalog.resolve(tenant, name.name, name.selector)
        known = jobs.find_model(name.id)
        if known is not None and known.tenant == tenant and known.manifest is not None:  # a checkpoint
            return AdapterManifest.from_dict(known.manifest)
        for summary in catalog.list(tenant):
            for manifest in catalog.versions(tenant, summary.name):
                if manifest.extra.get(FINE_TUNED_MODEL) == name.id:
                    return manifest
        raise model_not_found(model)

    return resolve
