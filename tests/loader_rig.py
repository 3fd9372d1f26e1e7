"""A real engine behind the real loader, catalog and directory store, on a small base: cold adapters stay cold here."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

from adapters.catalog import AdapterCatalog
from adapters.checked import DoorLimits
from adapters.disk_tier import DiskTier
from adapters.errors import StoreUnavailable
from adapters.loader import AdapterLoader, LoaderLimits
from adapters.lru import ByteLRU
from adapters.manifest import AdapterManifest
from adapters.store import DirectoryStore, ObjectInfo
from adapters.weights import HostAdapter
from app.bootstrap import adapter_parser
from app.engine.assembly import EngineConfig, assemble_engine
from app.engine.base_model import BaseModel
from app.engine.sequence import Finished, Request
from tests.adapter_files import RawTensor, config_bytes, plain_tensors, safetensors_bytes
from tests.engine_rig import Answer, Collector

BASE_NAME = "tiny-llama"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIMITS = DoorLimits()


class SlowStore(DirectoryStore):
    """A directory store that counts downloads, holds those of chosen keys until they are let go, and can be down."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.downloads: Counter[str] = Counter()
        self.is_down = False
        self.num_held = 0
        self._held: set[str] = set()
        self._changed = threading.Condition()

    def hold(self, *manifests: AdapterManifest) -> None:
        """From now on downloads of these adapters' weights wait for `let_go`."""
        with self._changed:
            self._held |= {manifest.weights.sha256 for manifest in manifests}

    def let_go(self) -> None:
        with self._changed:
            self._held.clear()
            self._changed.notify_all()

    def wait_held(self, number: int, timeout_s: float = 60) -> None:
        """Wait until so many downloads hang at a time."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.num_held >= number, timeout_s), f"{self.num_held} hang"

    def download(self, key: str, path: Path, *, max_bytes: int) -> ObjectInfo:
        blob = key.rsplit("/", 1)[1]
        with self._changed:
            self.downloads[blob] += 1
            if self.is_down:
                raise StoreUnavailable
            if blob in self._held:
                self.num_held += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: blob not in self._held, timeout=60)
                self.num_held -= 1
        return super().download(key, path, max_bytes=max_bytes)


class Shop:
    """Everything between a stored adapter and its tokens. Budgets in bytes."""

    def __init__(
        self,
        base: BaseModel,
        directory: Path,
        *,
        disk_bytes: int = 1 << 30,
        host_bytes: int = 1 << 30,
        workers: int = 8,
        **config: object,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.base, self.directory = base, directory
        self.store = SlowStore(directory / "store")
        self.catalog = AdapterCatalog(self.store, base.spec, LIMITS, scratch=directory)
        self.disk = DiskTier(directory / "disk", disk_bytes)
        self.host: ByteLRU[tuple[str, str], HostAdapter] = ByteLRU(host_bytes)
        self.loader: AdapterLoader[HostAdapter] = AdapterLoader(
            fetch=self.store,
            disk=self.disk,
            host=self.host,
            parse=adapter_parser(base, LIMITS),
            size_of=lambda adapter: adapter.num_bytes,
            limits=LoaderLimits(workers=workers, fetch_timeout_s=60.0),
        )
        self.engine = assemble_engine(base, self.loader, EngineConfig(**config))  # type: ignore[arg-type]
        self.engine.start()

    def publish(
        self, tenant: str, name: str, *, seed: int, rank: int = 4, tensors: dict[str, RawTensor] | None = None
    ) -> AdapterManifest:
        """Publish a random adapter on all linears as the next version of its name."""
        path = self.directory / f"{tenant}-{name}.safetensors"
        path.write_bytes(safetensors_bytes(tensors or plain_tensors(KINDS, rank, seed)))
        config = config_bytes(
            base_model_name_or_path=BASE_NAME, r=rank, lora_alpha=2 * rank, target_modules=list(KINDS)
        )
        manifest = self.catalog.publish(tenant, name, config, path, source="upload")
        path.unlink()
        return manifest

    def run(self, *requests: Request, timeout_s: float = 120) -> dict[str, Answer]:
        """Submit all, wait for their ends, and return their answers."""
        sink = Waiter()
        for request in requests:
            self.engine.submit(request, sink)
        sink.wait(len(requests), timeout_s)
        return sink.answers

    def settle(self) -> None:
        """Stop everything; raise AssertionError if anything is still held."""
        self.store.let_go()
        self.engine.stop()
        self.engine.check()
        self.loader.close()
        after = self.loader.snapshot()
        assert (after.pending, after.running, after.waiters) == (0, 0, 0), "loads are left"
        self.host.check()
        self.disk.check()
        assert self.disk.stats().leased == 0, "a file is still leased"
        self.disk.close()


class Waiter(Collector):
    """A sink that others can wait on."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self.num_finished = 0
        self.token_times: dict[str, list[float]] = {}

    def __call__(self, events: list) -> None:  # type: ignore[type-arg]
        now = time.monotonic()
        with self._changed:
            super().__call__(events)
            for event in events:
                self.token_times.setdefault(event.request_id, []).append(now)
                self.num_finished += isinstance(event, Finished)
            self._changed.notify_all()

    def wait(self, num_finished: int, timeout_s: float = 60) -> None:
        with self._changed:
            ended = self._changed.wait_for(lambda: self.num_finished >= num_finished, timeout_s)
            assert ended, f"{self.num_finished} of {num_finished} requests ended in {timeout_s} s"

    def wait_tokens(self, request_id: str, num_tokens: int, timeout_s: float = 60) -> None:
        """Wait until a request has so many tokens, or has ended."""

        def there() -> bool:
            answer = self.answers.get(request_id)
            return answer is not None and (len(answer.tokens) >= num_tokens or answer.finished is not None)

        with self._changed:
            assert self._changed.wait_for(there, timeout_s), f"{request_id} has not come to {num_tokens} tokens"
