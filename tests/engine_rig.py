"""A real engine on a small base, with adapters loaded from PEFT directories: shared by the numerics and real tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapters.checked import DoorLimits
from adapters.door import check_directory
from adapters.errors import AdapterError
from adapters.manifest import WEIGHTS_FILE, AdapterManifest
from adapters.weights import HostAdapter, load_host_adapter
from app.engine.base_model import BaseModel
from app.engine.sequence import Event, Finished, Request, SamplingParams, Token

Key = tuple[str, str]


class DirectoryLoader:
    """Adapters that lie in PEFT directories, read at once in the caller's thread: no cache, no network."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._known: dict[Key, HostAdapter] = {}
        self.num_loads = 0

    def add(self, tenant: str, directory: Path) -> AdapterManifest:
        checked = check_directory(directory, self._base.spec, DoorLimits(), check_base_name=False)
        key = (tenant, checked.digest)
        self._known[key] = load_host_adapter(key, checked, directory / WEIGHTS_FILE, dtype=self._base.dtype)
        return AdapterManifest(
            tenant=tenant,
            name=directory.name.lower(),
            version=1,
            digest=checked.digest,
            config=checked.config_file,
            weights=checked.weights,
            rank=checked.rank,
            applied_modules=len(checked.modules),
            base_id=self._base.spec.id,
            base_digest=self._base.spec.digest,
            created_at=0.0,
            source="upload",
        )

    def host(self, manifest: AdapterManifest) -> HostAdapter | None:
        self.num_loads += 1
        return self._known[manifest.tenant, manifest.digest]

    def want(
        self,
        manifest: AdapterManifest,
        on_done: Callable[[AdapterManifest, HostAdapter | None, AdapterError | None, str], None],
    ) -> None:
        on_done(manifest, self._known[manifest.tenant, manifest.digest], None, "disk")

    def quarantine(self, key: Key) -> None:
        self._known.pop(key, None)


@dataclass
class Answer:
    """Everything one request emitted."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    finished: Finished | None = None


class Collector:
    """A sink that gathers events by request."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}

    def __call__(self, events: list[Event]) -> None:
        for event in events:
            answer = self.answers.setdefault(event.request_id, Answer())
            answer.events.append(event)
            match event:
                case Token(token=token, logprob=logprob):
                    answer.tokens.append(token)
                    if logprob is not None:
                        answer.logprobs.append(logprob.logprob)
                case Finished():
                    assert answer.finished is None, "a request ends once"
                    answer.finished = event


def request(
    request_id: str,
    prompt: Sequence[int],
    adapter: AdapterManifest | None = None,
    *,
    tenant: str | None = None,
    timeout_s: float = 300.0,
    **sampling: object,
) -> Request:
    now = time.monotonic()
    params = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True, **sampling}
    return Request(
        id=request_id,
        tenant=tenant or (adapter.tenant if adapter else "base-only"),
        prompt=tuple(prompt),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        adapter=adapter,
        arrival=now,
        deadline=now + timeout_s,
        eos_ids=frozenset({2}),
    )


def random_prompt(length: int, vocab: int, seed: int) -> list[int]:
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
