"""What the catalog's tests share: a clock set by hand, a store that misbehaves on command, a door for toy files."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.catalog import AdapterCatalog
from adapters.checked import CheckedAdapter, DoorLimits, ModuleFact, TensorFact
from adapters.errors import AdapterConfigInvalid, StoreUnavailable
from adapters.manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterManifest,
    BaseModelSpec,
    FileFact,
    adapter_digest,
    adapter_prefix,
    blob_key,
)
from adapters.store import BlobStore, DirectoryStore

BASE = BaseModelSpec("toy-base", "b" * 64, (), {"model.layers.0.self_attn.q_proj": (8, 8)})


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def toy_check(config: bytes, weights: Path, base: BaseModelSpec, limits: DoorLimits) -> CheckedAdapter:
    """A door that lets everything in but a config that says so. Digests are real."""
    if config == b"refuse":
        raise AdapterConfigInvalid()
    data = weights.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    a, b = (TensorFact(name, "F32", (1, 8), 0, 32) for name in "ab")
    return CheckedAdapter(
        config=AdapterConfig(1, 1.0, ("q_proj",)),
        config_bytes=config,
        modules=(ModuleFact("model.layers.0.self_attn.q_proj", 1, 1.0, a, b),),
        rank=1,
        weights=FileFact(sha256, len(data)),
        config_file=FileFact(hashlib.sha256(config).hexdigest(), len(config)),
        digest=adapter_digest(config, sha256),
        warnings=(),
    )


class TrickyStore:
    """A store in front of another. Counts calls; breaks as it is told. Calls are numbered from 0."""

    def __init__(self, inner: BlobStore) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()
        self.is_down = False
        self.dies_at: int | None = None  # from this call on every one fails
        self.loses_answer_of: int | None = None  # this call is carried out, and then fails
        self.before: Callable[[str, str], None] | None = None  # called with (op, key) ahead of each call
        self.after: Callable[[str, str], None] | None = None
        self._lock = threading.Lock()

    def __getattr__(self, op: str) -> Callable[..., Any]:
        method = getattr(self.inner, op)

        def call(key: str = "", *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                number = self.calls.total()
                self.calls[op] += 1
            if self.is_down or (self.dies_at is not None and number >= self.dies_at):
                raise StoreUnavailable("down")
            if self.before is not None:
                self.before(op, key)
            try:
                answer = method(key, *args, **kwargs)
            finally:
                if self.after is not None:
                    self.after(op, key)
                if number == self.loses_answer_of:
                    raise StoreUnavailable("the answer was lost")
            return answer

        return call


class Lab:
    """A directory, and any number of catalogs over it as if in several processes."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        self.plain = DirectoryStore(tmp_path / "store")
        self.store = TrickyStore(self.plain)
        self.clock = Clock()
        self.num_checks = 0
        self.catalog = self.open()

    def open(self, store: Any = None, base: BaseModelSpec = BASE, **settings: Any) -> AdapterCatalog:
        def check(config: bytes, weights: Path, base: BaseModelSpec, limits: DoorLimits) -> CheckedAdapter:
            self.num_checks += 1
            return toy_check(config, weights, base, limits)

        return AdapterCatalog(
            store or self.store,
            base,
            DoorLimits(),
            scratch=self.path / "scratch",
            check=check,
            clock=self.clock,
            wall=lambda: 1_700_000_000.0,
            **settings,
        )

    def publish(
        self,
        name: str,
        weights: str,
        *,
        tenant: str = "acme",
        config: bytes = b"{}",
        catalog: AdapterCatalog | None = None,
        **facts: Any,
    ) -> AdapterManifest:
        path = self.path / f"weights-{threading.get_ident()}"
        path.write_bytes(weights.encode())
        return (catalog or self.catalog).publish(tenant, name, config, path, **{"source": "upload", **facts})

    def copy_in(self, name: str, weights: str | None, config: bytes | None = b"{}", tenant: str = "acme") -> None:
        """Put a plain PEFT directory into the store, or one of its files."""
        if config is not None:
            self.plain.put(adapter_prefix(tenant, name) + CONFIG_FILE, config)
        if weights is not None:
            self.plain.put(adapter_prefix(tenant, name) + WEIGHTS_FILE, weights.encode())

    def weights_of(self, manifest: AdapterManifest) -> str:
        """Read a version's weights as a loader would; fails unless config and weights are whole."""
        config = self.plain.get(blob_key(manifest.tenant, manifest.config.sha256), max_bytes=1 << 20)
        data = self.plain.get(blob_key(manifest.tenant, manifest.weights.sha256), max_bytes=1 << 20)
        assert hashlib.sha256(data).hexdigest() == manifest.weights.sha256
        assert manifest.digest == adapter_digest(config, manifest.weights.sha256)
        return data.decode()
