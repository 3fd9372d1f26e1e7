"""The composition root: the one file that names concrete classes. Settings in, a running server out."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.catalog import AdapterCatalog
from adapters.checked import CheckedAdapter, DoorLimits
from adapters.disk_tier import DiskTier
from adapters.door import check_adapter, check_base
from adapters.errors import AdapterDigestMismatch
from adapters.loader import AdapterLoader, LoaderLimits
from adapters.lru import ByteLRU, Eviction
from adapters.manifest import AdapterManifest, BaseModelSpec
from adapters.store import BlobStore
from adapters.weights import HostAdapter, load_host_adapter
from app import __version__
from app.api.services import ApiLimits, Services
from app.api.training_services import TrainingServices
from app.chat import Renderer
from app.database import migrate, open_database
from app.engine.assembly import EngineConfig, assemble_engine
from app.engine.base_model import BaseModel, BaseModelUnsupported, load_base_model, use_threads
from app.engine.engine import Engine
from app.idempotency import IdempotencyKeys
from app.logs import configure_logging
from app.machine import is_loopback, keep_freed_memory
from app.metrics import Metrics
from app.rate_limits import RateLimiter
from app.scratch import Scratch
from app.server import run_server
from app.serving_view import LoadTimes, ServingView
from app.settings import Settings
from app.storage import default_limits, door_limits, open_store
from app.tenant_shares import TenantShares
from app.tenants import Tenants
from app.training_side import Parts, TrainingSide, build_training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """Everything that runs in a serving process; `close` ends it in the order in which the parts need each other."""

    settings: Settings
    base: BaseModel
    engine: Engine
    loader: AdapterLoader[HostAdapter]
    disk: DiskTier
    catalog: AdapterCatalog
    services: Services
    training: TrainingSide
    scratch: Scratch

    def close(self) -> None:
        self.engine.stop()
        self.training.close()
        self.loader.close()
        self.disk.close()
        self.scratch.close()


class Draining:
    """A flag that the probes read and the signal handler raises."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self) -> bool:
        return self.is_set


def build_server(settings: Settings, draining: Draining) -> Server:
    """Load the base, open store and database, start the engine."""
    keep_freed_memory()
    use_threads(1)  # the engine thread takes settings.threads for itself
    data_dir = settings.data_dir
    base = load_base(settings)
    limits = door_limits(settings)
    database = open_database(settings.database_url)
    migrate(database)
    shares = TenantShares()
    tenants = Tenants(database, defaults=default_limits(settings), on_limits=shares.note)
    store_calls = _Later()
    store = open_store(settings, on_call=store_calls)
    load_times = LoadTimes()
    disk = DiskTier(data_dir / "adapters", settings.disk_cache_bytes)
    loader = make_loader(settings, base, store, disk, load_times.observe)
    check = functools.partial(check_adapter, base=base.spec, limits=limits)
    scratch = Scratch(data_dir / "scratch")
    catalog = open_catalog(settings, store, base.spec, scratch.path)
    engine = assemble_engine(base, loader, engine_config(settings), shares)
    view = ServingView(
        engine,
        loader,
        load_times,
        is_draining=draining,
        num_stale_served=lambda: catalog.num_stale_served,
        breaker=getattr(store, "breaker", None),  # a directory has none
    )
    renderer = Renderer.load(base.directory, max_context=base.shapes.max_context)
    if len(renderer.tokens) > base.shapes.vocab_size:
        known, given = base.shapes.vocab_size, len(renderer.tokens)
        raise BaseModelUnsupported(f"the tokenizer has {given} tokens and the model's embedding {known}")
    parts = Parts(settings, base, engine, loader, catalog, store, database, renderer, limits, scratch.path)
    training = build_training(parts, trains=settings.training == "auto", serves=True)
    metrics = Metrics(
        model_name=base.spec.id,
        snapshot=view,
        training=training.figures.snapshot,
        max_context=base.shapes.max_context,
        build={
            "version": __version__,
            "base_model": base.spec.id,
            "quant": base.quantization,
            "device": base.device.type,
        },
    )
    store_calls.target = metrics.store_call
    services = Services(
        engine=engine,
        text=renderer,
        catalog=catalog,
        tenants=tenants,
        rates=RateLimiter(),
        idempotency=IdempotencyKeys(database),
        check_adapter=lambda config, weights: check(config, weights),
        base=base.spec,
        limits=ApiLimits(
            max_context=base.shapes.max_context,
            vocab_size=base.shapes.vocab_size,
            default_max_tokens=settings.default_max_tokens,
            max_timeout_s=settings.request_timeout_s,
            max_body_bytes=settings.max_body_bytes,
            max_adapter_bytes=settings.max_adapter_bytes,
            stale_engine_s=settings.stale_engine_s,
        ),
        metrics=metrics,
        snapshot=view,
        scratch=scratch.path,
        started_at=int(time.time()),
        forget_tenant=loader.forget_tenant,
        tier_of=loader.tier_of,
        forget_adapter=lambda adapter: loader.forget(
            adapter.ref.key, Eviction.SUPERSEDED, files=(adapter.config, adapter.weights)
        ),
        admin_key=settings.admin_key_text,
        metrics_open=settings.admin_port is not None or is_loopback(settings.host),
        admin_here=settings.admin_port is None,
        training=TrainingServices(training.fine_tuning, training.uploads, training.permissions, training.webhooks),
    )
    engine.threads = settings.threads
    engine.start()
    training.start()
    return Server(settings, base, engine, loader, disk, catalog, services, training, scratch)


def serve(settings: Settings, on_ready: Callable[[str], None] | None = None) -> int:
    """Run the server until SIGTERM; returns the exit code. `on_ready(url)` is called once it answers."""
    configure_logging(settings.log_level)
    draining = Draining()
    server = build_server(settings, draining)
    try:
        return run_server(server, draining, on_ready)
    finally:
        server.close()


# ---- parts, also used by the worker, the command line and the benchmark


def load_base(settings: Settings) -> BaseModel:
    return load_base_model(
        settings.base_model,
        settings.data_dir,
        name=settings.base_name,
        revision=settings.base_revision,
        quantization=settings.quantization,
        dtype=settings.dtype,
        device=settings.device,
    )


def engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        pool_rows=settings.pool_rank,
        max_pinned_leaves_rows=settings.max_rank,
        max_sequences=settings.max_sequences,
        max_batch_tokens=settings.max_batch_tokens,
        max_prefill_tokens=settings.max_prefill_tokens,
        max_waiting=settings.max_waiting,
        block_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        prefix_caching=settings.prefix_caching,
        latency_factor=settings.training_latency_factor,
        training_share=settings.training_share,
    )


def make_loader(
    settings: Settings,
    base: BaseModel,
    store: BlobStore,
    disk: DiskTier,
    observe: Callable[[str, float], None] | None = None,
) -> AdapterLoader[HostAdapter]:
    return AdapterLoader(
        fetch=store,
        disk=disk,
        host=ByteLRU(settings.host_cache_bytes),
        parse=adapter_parser(base, door_limits(settings)),
        size_of=lambda adapter: adapter.num_bytes,
        limits=LoaderLimits(
            workers=settings.loader_workers,
            fetch_timeout_s=settings.s3_object_timeout_s,
            max_weights_bytes=settings.max_adapter_bytes,
        ),
        observe=observe,
    )


def adapter_parser(base: BaseModel, limits: DoorLimits) -> Callable[[AdapterManifest, Path, Path], HostAdapter]:
    """The loader's last stage: the door, then one block of host memory in the compute dtype."""

    def parse(manifest: AdapterManifest, config: Path, weights: Path) -> HostAdapter:
        check_base(manifest, base.spec)
        checked: CheckedAdapter = check_adapter(config.read_bytes(), weights, base.spec, limits)
        if checked.digest != manifest.digest:  # the door alone knows how files become an identity
            raise AdapterDigestMismatch()
        return load_host_adapter(
            (manifest.tenant, manifest.digest),
            checked,
            weights,
            dtype=base.dtype,
            pin_memory=base.device.type == "cuda" and torch.cuda.is_available(),
        )

    return parse


def open_catalog(settings: Settings, store: object, base: BaseModelSpec, scratch: Path) -> AdapterCatalog:
    limits = door_limits(settings)
    return AdapterCatalog(
        store,  # type: ignore[arg-type]
        base,
        limits,
        check=check_adapter,
        scratch=scratch,
        pointer_ttl_s=settings.pointer_ttl_s,
        stale_ttl_s=settings.stale_ttl_s,
    )


class _Later:
    """Where the store reports its calls: the metrics, which are made after it."""

    def __init__(self) -> None:
        self.target: Callable[[str, str, float], None] | None = None

    def __call__(self, op: str, outcome: str, seconds: float) -> None:
        if self.target is not None:
            self.target(op, outcome, seconds)
