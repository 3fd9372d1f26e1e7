"""What the HTTP layer needs of the rest of the program: ports (Protocols), plain limits, and the bundle of both.

`app.bootstrap` builds one `Services` and hands it to `create_app`; tests hand in small real implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.checked import CheckedAdapter
from adapters.manifest import AdapterManifest, BaseModelSpec
from app.api.training_services import TrainingServices
from app.engine.sequence import Event, Request, Warmed
from app.idempotency import IdempotencyKeys
from app.metrics import Metrics, ServingSnapshot
from app.rate_limits import RateLimiter
from app.tenants import Tenants


class EnginePort(Protocol):
    """The engine's face; every method may be called from any thread and returns at once."""

    def submit(self, request: Request, sink: Callable[[list[Event]], None]) -> None:
        """Queue a request; `sink` is called in the engine thread, once a step, with all its events of that step.

        Raises QueueFull, ServerDraining, EngineNotReady or RequestInvalid.
        """

    def cancel(self, request_id: str) -> None:
        """End a request within two steps; an unknown or finished id is fine. A Finished event follows."""

    def warm(self, manifest: AdapterManifest, *, pin: bool = False) -> Future[Warmed]:
        """Make an adapter resident; the future fails with an AdapterError or EngineNotReady."""

    def unpin(self, key: tuple[str, str]) -> Future[Any]:
        """Let a pinned adapter be evicted again; an adapter that is not pinned is fine."""

    def unload(self, key: tuple[str, str]) -> Future[Any]:
        """Drop an adapter from the pool once nobody leases it."""


class TextStream(Protocol):
    """Turns one sequence's tokens into text, piece by piece, never splitting a character."""

    def feed(self, token: int) -> str:
        """Take one token; returns the text that is certain now, which may be empty."""

    def flush(self) -> str:
        """The text still held back; the sequence is over."""


class TextPort(Protocol):
    """Tokenizer and chat template of the base model. Thread-safe; long inputs are rendered in a worker thread."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def digest(self) -> str:
        """Changes with anything that changes how messages become tokens."""

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages (role, content) as prompt ids, ending where the assistant speaks. Raises RequestInvalid."""

    def encode(self, text: str) -> list[int]:
        """A plain prompt's ids, with the beginning-of-sequence token where the base has one."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of whole ids, special tokens left out."""

    def token_bytes(self, token: int) -> bytes:
        """One token's own bytes, which need not be valid UTF-8."""

    def token_text(self, token: int) -> str:
        """One token as the OpenAI API spells it: its text, or `bytes:\\x…` for a part of a character."""

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A fresh text stream for what follows `prompt`."""


class SummaryPort(Protocol):
    """One adapter of a listing; `live` is None while a plain directory waits for its import."""

    @property
    def name(self) -> str: ...

    @property
    def versions(self) -> Sequence[int]: ...

    @property
    def aliases(self) -> Mapping[str, int]: ...

    @property
    def live(self) -> AdapterManifest | None: ...


class CatalogPort(Protocol):
    """Names, versions and aliases of tenants' adapters. All but `peek` and `is_due` may wait for the store: worker
    threads only.

    Raises AdapterNotFound, AdapterUnavailable, AdapterRefused, AdapterConflict.
    """

    def peek(self, tenant: str, name: str, selector: str | None) -> AdapterManifest | None:
        """What `resolve` would say if it is known and fresh; never blocks."""

    def resolve(self, tenant: str, name: str, selector: str | None) -> AdapterManifest: ...

    def is_due(self, tenant: str, name: str) -> bool:
        """True, to one caller, when what `peek` tells will soon be too old; never blocks."""

    def refresh(self, tenant: str, name: str, selector: str | None) -> None:
        """Look into the store again before anybody has to wait for that."""

    def publish(
        self, tenant: str, name: str, config: bytes, weights: Path, *, alias: str | None, source: str
    ) -> AdapterManifest: ...

    def import_directory(self, tenant: str, name: str) -> AdapterManifest | None:
        """Import the plain directory of that name; None when there is none."""

    def list(self, tenant: str) -> Sequence[SummaryPort]: ...

    def versions(self, tenant: str, name: str) -> Sequence[AdapterManifest]: ...

    def aliases(self, tenant: str, name: str) -> Mapping[str, int]: ...

    def set_alias(self, tenant: str, name: str, alias: str, version: int) -> object: ...

    def roll_back(self, tenant: str, name: str, alias: str) -> object: ...

    def delete_alias(self, tenant: str, name: str, alias: str) -> None: ...

    def delete_version(self, tenant: str, name: str, version: int) -> None: ...

    def delete(self, tenant: str, name: str) -> None: ...

    def erase_tenant(self, tenant: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds at the HTTP edge. Times in seconds, sizes in bytes."""

    max_context: int  # tokens of prompt and answer together
    vocab_size: int
    default_max_tokens: int = 512  # of a chat completion that names none
    max_choices: int = 16  # n
    max_sequences: int = 128  # prompts x n of one request
    max_timeout_s: float = 600.0
    max_body_bytes: int = 1 << 20
    max_adapter_bytes: int = 512 << 20
    max_config_bytes: int = 64 << 10
    body_timeout_s: float = 30.0
    upload_timeout_s: float = 900.0
    keep_alive_s: float = 10.0
    stale_engine_s: float = 30.0  # silence of the engine after which the server is unready


@dataclass(frozen=True)
class Services:
    """Everything a route may use."""

    engine: EnginePort
    text: TextPort
    catalog: CatalogPort
    tenants: Tenants
    rates: RateLimiter
    idempotency: IdempotencyKeys
    check_adapter: Callable[[bytes, Path], CheckedAdapter]  # config, weights file; raises AdapterRefused
    base: BaseModelSpec
    limits: ApiLimits
    metrics: Metrics
    snapshot: Callable[[], ServingSnapshot]
    scratch: Path
    started_at: int  # Unix seconds
    forget_tenant: Callable[[str], None] = lambda tenant: None  # drops an erased tenant's adapters from the caches
    tier_of: Callable[[AdapterManifest], str] = lambda adapter: "s3"  # the nearest cache below the rank pool
    forget_adapter: Callable[[AdapterManifest], None] = lambda adapter: None  # drops a deleted version from the caches
    training: TrainingServices | None = None  # None: no routes for files, jobs and webhooks
    admin_key: str | None = None
    metrics_open: bool = True  # without a key: on loopback
    admin_here: bool = True  # False when the admin port serves /admin and /metrics
