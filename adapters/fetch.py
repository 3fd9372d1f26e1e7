"""One load from start to end: disk tier, else the store; hashed; handed to the parser. Runs in a loader thread, and
fetches the config in a second one meanwhile: a cold adapter waits for its slower file, not for one after the other.

The files' bytes are trusted once they hash to what the manifest says; whether they are a fit adapter is the parser's
question. Store and disk errors end here: whoever calls sees AdapterErrors and the reason for the metrics.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from adapters.disk_tier import DiskFile, DiskTier, file_matches
from adapters.errors import (
    AdapterConfigTooLarge,
    AdapterDigestMismatch,
    AdapterError,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnavailable,
    LocalDiskFailed,
    ObjectNotFound,
    ObjectTooLarge,
    StoreError,
)
from adapters.lru import Eviction
from adapters.manifest import AdapterManifest, FileFact, blob_key
from adapters.refusals import failure_reason

if TYPE_CHECKING:
    from adapters.store import BlobStore

H = TypeVar("H")

FETCH_ATTEMPTS = 2  # wrong bytes may be a bad transfer once; twice they are what is stored


@dataclass(frozen=True, slots=True)
class Loaded(Generic[H]):
    """A parsed adapter, where its files came from, and the seconds of each stage that it went through."""

    value: H
    num_bytes: int  # of host memory
    tier: str  # "disk" if both files were there, else "s3"
    seconds: Mapping[str, float]  # "fetch", "verify", "parse"


class LoadFailed(Exception):
    """A load ended without an adapter."""

    def __init__(self, error: AdapterError, reason: str | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.reason = reason or failure_reason(error)


class _WrongBytes(Exception):
    """The file does not hash to its name."""


@dataclass(frozen=True, slots=True)
class LoaderLimits:
    """How much at once, for how long, and what a manifest may ask for, whoever wrote it."""

    workers: int = 8
    max_parsing: int = 2  # adapters parsed at a time; the cores belong to the engine
    max_pending: int = 1024  # loads that wait for a worker
    max_pending_per_tenant: int = 256
    fetch_timeout_s: float = 20.0  # for its turn, and again for the load itself
    max_config_bytes: int = 64 << 10
    max_weights_bytes: int = 512 << 20


class Fetcher(Generic[H]):
    """Turns manifests into parsed adapters. Thread-safe."""

    def __init__(
        self,
        store: BlobStore,
        disk: DiskTier,
        parse: Callable[[AdapterManifest, Path, Path], H],
        size_of: Callable[[H], int],
        *,
        clock: Callable[[], float] = time.monotonic,
        limits: LoaderLimits,
    ) -> None:
        self.store = store
        self.disk = disk
        self.parse = parse
        self.size_of = size_of
        self.clock = clock
        self.limits = limits
        self.parsing = threading.BoundedSemaphore(limits.max_parsing)

    def load(self, manifest: AdapterManifest, deadline: float) -> Loaded[H]:
        """Fetch, verify and parse. No object is asked of the store once `deadline` has passed.

        Raises LoadFailed; an exception of any other kind comes from the parser.
        """
        try:
            return _Load(self, manifest, deadline).run()
        except AdapterError as exc:
            raise LoadFailed(exc) from exc


class _Load(Generic[H]):
    """One load's two files and their way to the parser."""

    def __init__(self, fetcher: Fetcher[H], manifest: AdapterManifest, deadline: float) -> None:
        self._fetcher = fetcher
        self._manifest = manifest
        self._config, self._weights = (
            _FileLoad(fetcher, manifest.tenant, fact, deadline) for fact in (manifest.config, manifest.weights)
        )

    def run(self) -> Loaded[H]:
        manifest, fetcher = self._manifest, self._fetcher
        if manifest.config.num_bytes > fetcher.limits.max_config_bytes:
            raise AdapterConfigTooLarge()
        if manifest.weights.num_bytes > fetcher.limits.max_weights_bytes:
            raise AdapterTooLarge()
        with self._files() as (config, weights), fetcher.parsing:
            started = fetcher.clock()
            value = fetcher.parse(manifest, config.path, weights.path)
            parse_s = fetcher.clock() - started
        both = (self._config, self._weights)
        stages = {
            stage: max(one.seconds.get(stage, 0.0) for one in both)  # they went side by side
            for stage in {**self._config.seconds, **self._weights.seconds}
        }
        tier = "s3" if any(one.is_from_store for one in both) else "disk"
        return Loaded(value, fetcher.size_of(value), tier, {**stages, "parse": parse_s})

    @contextlib.contextmanager
    def _files(self) -> Iterator[tuple[DiskFile, DiskFile]]:
        with contextlib.ExitStack() as leases:
            known = self._config.known()
            if known is not None:
                leases.enter_context(known)
                yield known, leases.enter_context(self._weights.file())
                return
            config = _in_thread(self._config.fetched)
            try:
                weights = leases.enter_context(self._weights.file())
            finally:  # whatever became of the weights, the config's lease ends here
                concurrent.futures.wait([config])
                if config.exception() is None:
                    leases.enter_context(config.result())
            yield config.result(), weights


class _FileLoad:
    """One file on its way, beside the other."""

    def __init__(self, fetcher: Fetcher[Any], tenant: str, fact: FileFact, deadline: float) -> None:
        self._fetcher = fetcher
        self._disk = fetcher.disk
        self._tenant = tenant
        self._fact = fact
        self._deadline = deadline
        self.seconds: defaultdict[str, float] = defaultdict(float)  # "fetch", "verify"
        self.is_from_store = False  # set once the store is asked

    def file(self) -> DiskFile:
        """The file, leased and checked. Raises AdapterErrors and LoadFailed."""
        return self.known() or self.fetched()

    def known(self) -> DiskFile | None:
        """The file if it is on disk and sound."""
        tenant, fact = self._tenant, self._fact
        file = self._disk.open(tenant, fact.sha256)
        if file is not None:
            try:
                self._verify(file.path, fact)
                return file
            except (_WrongBytes, OSError):
                file.release()
                self._disk.drop(tenant, fact.sha256, Eviction.CORRUPT)
            except BaseException:
                file.release()
                raise
        return None

    def fetched(self) -> DiskFile:
        """The file from the store."""
        self.is_from_store = True
        for _ in range(FETCH_ATTEMPTS):
            with contextlib.suppress(_WrongBytes):
                return self._fetch(self._fact)
        raise AdapterDigestMismatch()

    def _fetch(self, fact: FileFact) -> DiskFile:
        try:
            return self._fetch_to_disk(fact, keep=True)
        except LocalDiskFailed:
            # The disk is full before our budget is. Make room for the next one, and serve this one without keeping it.
            self._disk.relieve(fact.num_bytes)
        try:
            return self._fetch_to_disk(fact, keep=False)
        except LocalDiskFailed as exc:
            raise LoadFailed(AdapterUnavailable(), "disk") from exc

    def _fetch_to_disk(self, fact: FileFact, *, keep: bool) -> DiskFile:
        if self._fetcher.clock() >= self._deadline:
            raise LoadFailed(AdapterUnavailable(), "timeout")
        tenant = self._tenant
        with self._disk.begin(tenant, fact, keep=keep) as arrival:
            with self._stage("fetch"), _translated():
                self._fetcher.store.download(blob_key(tenant, fact.sha256), arrival.path, max_bytes=fact.num_bytes)
            self._verify(arrival.path, fact)
            return arrival.commit()

    def _verify(self, path: Path, fact: FileFact) -> None:
        with self._stage("verify"):
            if not file_matches(path, fact):
                raise _WrongBytes

    @contextlib.contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        start = self._fetcher.clock()
        try:
            yield
        finally:
            self.seconds[stage] += self._fetcher.clock() - start


def _in_thread(load: Callable[[], DiskFile]) -> concurrent.futures.Future[DiskFile]:
    """Run it in a thread of its own, which no end of the process waits for."""
    future: concurrent.futures.Future[DiskFile] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(load())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="adapter-config", daemon=True).start()
    return future


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn the store's errors into what they mean for this adapter. Their text stays here: it may name buckets."""
    try:
        yield
    except LocalDiskFailed:
        raise
    except OSError as exc:
        raise LocalDiskFailed() from exc
    except ObjectTooLarge as exc:  # larger than the manifest says
        raise _WrongBytes from exc
    except ObjectNotFound as exc:
        raise AdapterNotFound("The adapter's files are no longer in the store. Publish it again.") from exc
    except StoreError as exc:
        raise LoadFailed(AdapterUnavailable()) from exc
